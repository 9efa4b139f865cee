//! Whether a history of calls can be explained by calls that take effect one at a time, each between its invocation and its
//! return.
//!
//! The search is Wing and Gong's ("Testing and verifying concurrent objects", 1993) with Lowe's memory of what was tried
//! ("Testing for linearizability", 2017): take any call that may be first, see whether its reply fits, go on with the rest, and
//! never enter the same pair of (calls taken, state) twice. It is iterative; what it remembers is 16 bytes a pair, and bounded.
//!
//! Calls that were answered are tried before those whose outcome is unknown: an unknown call fits almost anywhere, so trying it first
//! would try every subset of them at every step.
//!
//! Calls on different keys do not depend on one another, so each key is checked by itself (Herlihy and Wing's locality).
//! A call whose outcome is unknown may take effect at any moment after its invocation, or never.

use super::rng::Rng;
use std::collections::HashSet;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

#[cfg(test)]
mod tests;

/// What one key of the service does, one call at a time.
pub trait Model {
    /// What the key holds.
    type State: Clone;
    /// What is asked.
    type Operation: fmt::Debug;
    /// What is answered.
    type Reply: fmt::Debug;

    /// What a key holds at first.
    fn initial() -> Self::State;

    /// The state after `operation`, if it may answer `reply`; without a reply it may answer anything.
    fn step(
        state: &Self::State,
        operation: &Self::Operation,
        reply: Option<&Self::Reply>,
    ) -> Option<Self::State>;

    /// Tells states apart: 64 bits, equal for equal states.
    fn fingerprint(state: &Self::State) -> u64;
}

/// One call of a history.
#[derive(Clone, Debug)]
pub struct Call<O, R> {
    /// What was asked.
    pub operation: O,
    /// What was answered; none if that is unknown.
    pub reply: Option<R>,
    /// When it was asked, on a clock that no two invocations or returns share.
    pub invoked: u64,
    /// When the answer came; ignored without one.
    pub returned: u64,
}

/// What a check came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order that explains all replies.
    Linearizable,
    /// There is none. The text names the call whose reply could not be reached in the longest attempt.
    Impossible(String),
    /// The bound on memory was reached first.
    Undecided,
}

/// The default bound: 2^20 pairs are 16 MiB, and about a second.
pub const PAIRS_MAX: usize = 1 << 20;

/// The pairs' keys are random numbers already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, number: u128) {
        self.0 = number as u64 ^ (number >> 64) as u64;
    }
}

const NONE: u32 = u32::MAX;

/// Invocations and returns in the order of time, as a list from which calls can be lifted and put back.
struct Events {
    next: Vec<u32>,
    previous: Vec<u32>,
    /// The call that an event belongs to.
    call: Vec<u32>,
    is_return: Vec<bool>,
    /// By call.
    invocation: Vec<u32>,
    returning: Vec<u32>,
}

/// The list's head: an event that is never lifted.
const HEAD: u32 = 0;

impl Events {
    fn new<O, R>(calls: &[Call<O, R>]) -> Self {
        let mut order: Vec<(u64, bool, u32)> = Vec::with_capacity(calls.len() * 2);
        for (at, call) in calls.iter().enumerate() {
            order.push((call.invoked, false, at as u32));
            if call.reply.is_some() {
                order.push((call.returned, true, at as u32));
            }
        }
        order.sort_unstable();
        let count = order.len() as u32 + 1;
        let mut events = Self {
            next: (1..=count).map(|next| if next == count { NONE } else { next }).collect(),
            previous: (0..count).map(|at| at.wrapping_sub(1)).collect(),
            call: vec![NONE; count as usize],
            is_return: vec![false; count as usize],
            invocation: vec![NONE; calls.len()],
            returning: vec![NONE; calls.len()],
        };
        for (at, (_, is_return, call)) in order.into_iter().enumerate() {
            let event = at as u32 + 1;
            events.call[event as usize] = call;
            events.is_return[event as usize] = is_return;
            let of = if is_return { &mut events.returning } else { &mut events.invocation };
            of[call as usize] = event;
        }
        events
    }

    fn unlink(&mut self, event: u32) {
        let (before, after) = (self.previous[event as usize], self.next[event as usize]);
        self.next[before as usize] = after;
        if after != NONE {
            self.previous[after as usize] = before;
        }
    }

    fn link(&mut self, event: u32) {
        let (before, after) = (self.previous[event as usize], self.next[event as usize]);
        self.next[before as usize] = event;
        if after != NONE {
            self.previous[after as usize] = event;
        }
    }

    fn lift(&mut self, call: usize) {
        self.unlink(self.invocation[call]);
        if self.returning[call] != NONE {
            self.unlink(self.returning[call]);
        }
    }

    /// Puts the call back that was lifted last.
    fn put_back(&mut self, call: usize) {
        if self.returning[call] != NONE {
            self.link(self.returning[call]);
        }
        self.link(self.invocation[call]);
    }
}

fn wide(rng: &mut Rng) -> u128 {
    u128::from(rng.bits()) << 64 | u128::from(rng.bits())
}

/// Checks the history of one key. `pairs_max` bounds what is remembered: 16 bytes a pair, and its room in a hash table.
///
/// # Panics
/// When there are 2^31 calls or more.
pub fn check<M: Model>(calls: &[Call<M::Operation, M::Reply>], pairs_max: usize) -> Verdict {
    assert!(calls.len() < 1 << 31, "positions fit 32 bits");
    let mut events = Events::new(calls);
    // A set of calls is the exclusive or of its members' numbers (Zobrist): equal numbers are equal sets but for odds of
    // 2^-128 for each pair of pairs.
    let mut rng = Rng::new(0x11ea);
    let numbers: Vec<u128> = calls.iter().map(|_| wide(&mut rng)).collect();
    let mut tried: HashSet<u128, BuildHasherDefault<AsItIs>> = HashSet::default();
    let mut taken: Vec<(u32, M::State)> = Vec::new();
    let mut set = 0_u128;
    let mut state = M::initial();
    let mut left = calls.iter().filter(|call| call.reply.is_some()).count();
    let mut deepest = (0, NONE);
    let mut event = events.next[HEAD as usize];
    // Whether the calls of unknown outcome have their turn.
    let mut unknown = false;
    while left > 0 {
        // A call that returned is not lifted while `left` counts it, so the list ends with a return at the latest.
        let at = events.call[event as usize] as usize;
        if !events.is_return[event as usize] {
            let call = &calls[at];
            if call.reply.is_none() == unknown
                && let Some(after) = M::step(&state, &call.operation, call.reply.as_ref())
            {
                let with = set ^ numbers[at];
                let mut mixed = Rng::new(M::fingerprint(&after));
                if tried.len() >= pairs_max {
                    return Verdict::Undecided;
                }
                if tried.insert(with ^ wide(&mut mixed)) {
                    taken.push((at as u32, std::mem::replace(&mut state, after)));
                    set = with;
                    left -= usize::from(call.reply.is_some());
                    events.lift(at);
                    event = events.next[HEAD as usize];
                    unknown = false;
                    continue;
                }
            }
            event = events.next[event as usize];
            continue;
        }
        if !unknown {
            unknown = true;
            event = events.next[HEAD as usize];
            continue;
        }
        // Whatever takes effect next does so after this return: the attempt has failed.
        if taken.len() >= deepest.0 {
            deepest = (taken.len(), at as u32);
        }
        let Some((last, before)) = taken.pop() else {
            let call = &calls[deepest.1 as usize];
            return Verdict::Impossible(format!(
                "{:?} answered {:?}; no order of the calls explains that (the longest attempt explains {} of {})",
                call.operation,
                call.reply.as_ref().expect("it returned"),
                deepest.0,
                calls.len()
            ));
        };
        state = before;
        let last = last as usize;
        set ^= numbers[last];
        unknown = calls[last].reply.is_none();
        left += usize::from(!unknown);
        events.put_back(last);
        event = events.next[events.invocation[last] as usize];
    }
    Verdict::Linearizable
}
