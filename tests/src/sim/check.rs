//! What must hold, whatever happens.
//!
//! [`History`] is what an all-knowing observer has seen: which command was applied where, which chain was committed
//! where, who led when, what clients were told. It only grows; whatever contradicts it is a failure. The names follow
//! the Raft paper's figure 3.

use super::context::Context;
use super::coverage::Mark;
use super::node::{LEADER, View};
use super::rng::Rng;
use super::trace::What;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A client's command: its number and the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommandId {
    /// The client, from 0.
    pub client: usize,
    /// Its command, from 0.
    pub sequence: usize,
}

const COMMAND_HEAD_BYTES: usize = 16;

impl CommandId {
    /// The command's bytes: the id, a checksum, and padding that follows from the id.
    #[must_use]
    pub fn encode(self, padding: usize) -> Vec<u8> {
        let mut bytes = vec![0; COMMAND_HEAD_BYTES + padding];
        bytes[..4].copy_from_slice(&(self.client as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.sequence as u32).to_le_bytes());
        let (head, tail) = bytes.split_at_mut(COMMAND_HEAD_BYTES);
        Rng::new(self.client as u64 ^ (self.sequence as u64) << 20).fill(tail);
        let sum = xxh3_64_with_seed(
            tail,
            padding as u64 ^ u64::from_le_bytes(head[..8].try_into().expect("8 bytes")),
        );
        head[8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The id of a command, if its bytes are whole.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, tail) = bytes.split_at_checked(COMMAND_HEAD_BYTES)?;
        let id = u64::from_le_bytes(head[..8].try_into().ok()?);
        let sum = u64::from_le_bytes(head[8..].try_into().ok()?);
        let whole = xxh3_64_with_seed(tail, tail.len() as u64 ^ id) == sum;
        whole.then_some(Self { client: (id & 0xffff_ffff) as usize, sequence: (id >> 32) as usize })
    }
}

/// What an index of the log holds, once some node has applied it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Unseen,
    /// An entry of the engine's own: state machines do not see it.
    Engine,
    Command {
        id: CommandId,
        term: u64,
        state: u64,
    },
}

/// What a client knows of one of its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Proposed, no answer yet.
    Open,
    /// Acknowledged at this index.
    Acknowledged(u64),
    /// Refused; not proposed again.
    Refused,
    /// No answer will come.
    Unknown,
}

#[derive(Clone, Copy)]
struct CommittedEnd {
    chain: [u8; 16],
    term: u64,
}

/// All that was ever seen.
#[derive(Clone)]
pub struct History {
    context: Rc<Context>,
    entries: Vec<Entry>,
    /// Where each client's commands were applied.
    applied_at: Vec<Vec<Option<u64>>>,
    fates: Vec<Vec<Fate>>,
    /// Batch ends that were committed on some node, with the term that the first node to know it was in then: it was
    /// committed in that term at the latest.
    committed: BTreeMap<u64, CommittedEnd>,
    leaders: BTreeMap<u64, usize>,
    last_leader: Option<usize>,
    failure: Option<String>,
}

impl History {
    /// Nothing yet.
    #[must_use]
    pub fn new(context: &Rc<Context>, clients: usize) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            context: Rc::clone(context),
            entries: Vec::new(),
            applied_at: vec![Vec::new(); clients],
            fates: vec![Vec::new(); clients],
            committed: BTreeMap::new(),
            leaders: BTreeMap::new(),
            last_leader: None,
            failure: None,
        }))
    }

    /// What was seen so far, to go on from it in another world.
    #[must_use]
    pub fn fork(&self, context: &Rc<Context>) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self { context: Rc::clone(context), ..self.clone() }))
    }

    /// The last batch end that was committed on some node, with its chain.
    #[must_use]
    pub fn last_committed(&self) -> Option<(u64, [u8; 16])> {
        self.committed.last_key_value().map(|(index, end)| (*index, end.chain))
    }

    /// Notes a failure; the first one stays.
    pub fn fail(&mut self, what: impl FnOnce() -> String) {
        if self.failure.is_none() {
            self.failure = Some(what());
        }
    }

    /// The first failure.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// A client proposes a command for the first time, or again after a refusal.
    pub fn proposed(&mut self, id: CommandId) {
        let fates = &mut self.fates[id.client];
        if fates.len() == id.sequence {
            fates.push(Fate::Open);
            self.applied_at[id.client].push(None);
        }
        self.fates[id.client][id.sequence] = Fate::Open;
    }

    /// A client learns what became of its command. An answer after the client gave up counts too.
    pub fn answered(&mut self, id: CommandId, fate: Fate) {
        self.fates[id.client][id.sequence] = fate;
        if let Fate::Acknowledged(index) = fate {
            self.context.cover(Mark::Acknowledged);
            let applied = self.applied_at[id.client][id.sequence];
            if applied != Some(index) {
                self.fail(|| format!("{id:?} was acknowledged at index {index} and applied at {applied:?}"));
            }
        }
    }

    /// Whether no client waits for an answer.
    #[must_use]
    pub fn all_answered(&self) -> bool {
        !self.fates.iter().flatten().any(|fate| *fate == Fate::Open)
    }

    /// How many commands were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.fates.iter().flatten().filter(|fate| matches!(fate, Fate::Acknowledged(_))).count()
    }

    /// Leader Election, State Machine Safety's precondition and the order of positions: cheap, after each turn.
    /// `before` is the node's last view in this life, all zeros at its beginning.
    pub fn see(&mut self, node: usize, before: &View, after: &View) {
        if after.role == LEADER {
            // Election Safety: at most one leader can be elected in a given term.
            let leader = *self.leaders.entry(after.term).or_insert(node);
            if leader != node {
                self.fail(|| format!("nodes {leader} and {node} both led term {}", after.term));
            }
            if before.role != LEADER || before.term != after.term {
                self.context.cover(Mark::Leader);
                if self.last_leader.is_some_and(|last| last != node) {
                    self.context.cover(Mark::LeaderChange);
                }
                self.last_leader = Some(node);
            } else if after.epoch != before.epoch || after.last < before.last {
                // Leader Append-Only.
                self.fail(|| format!("node {node} truncated its log while it led term {}", after.term));
            }
        }
        if before.formed && after.epoch != before.epoch {
            self.context.cover(Mark::Truncation);
        }
        if after.rollovers > before.rollovers {
            self.context.cover(Mark::Rollover);
        }
        if after.term < before.term || after.commit < before.commit || after.applied < before.applied {
            self.fail(|| format!("node {node} went backwards: {before:?}, then {after:?}"));
        }
        if after.applied > after.commit || after.commit > after.last || after.durable > after.last {
            self.fail(|| format!("node {node} has its positions out of order: {after:?}"));
        }
        if before.formed && !after.formed {
            self.fail(|| format!("node {node} forgot that the cluster is formed"));
        }
    }

    /// The commit index of a node in `term` has reached `index`, where its chain is `chain`. Whether that was news.
    pub fn committed(&mut self, node: usize, term: u64, index: u64, chain: Option<[u8; 16]>) -> bool {
        let Some(chain) = chain else {
            self.fail(|| format!("node {node} committed up to {index}, which is no batch end of its log"));
            return false;
        };
        match self.committed.get_mut(&index) {
            None => {
                self.committed.insert(index, CommittedEnd { chain, term });
                self.committed.last_key_value().is_some_and(|(last, _)| *last == index)
            }
            Some(known) if known.chain == chain => {
                known.term = known.term.min(term);
                false
            }
            Some(_) => {
                self.fail(|| format!("two logs are committed at index {index}; the second is node {node}'s"));
                false
            }
        }
    }

    /// Log Matching, over everything committed that a node's log still holds.
    pub fn sweep(
        &mut self,
        node: usize,
        view: &View,
        start: u64,
        chain_at: impl Fn(u64) -> Option<[u8; 16]>,
    ) {
        let end = view.commit.min(view.written);
        if end <= start {
            return;
        }
        let mut held = self.committed.range(start + 1..=end);
        if let Some((&index, _)) = held.find(|(index, end)| chain_at(**index) != Some(end.chain)) {
            self.fail(|| format!("node {node}'s log differs at the committed index {index}"));
        }
    }

    /// Leader Completeness: what was committed in earlier terms is in the log of a leader. (One that wins an old term
    /// late, having slept, need not have what was committed in later ones.)
    pub fn elected(
        &mut self,
        node: usize,
        view: &View,
        start: u64,
        chain_at: impl Fn(u64) -> Option<[u8; 16]>,
    ) {
        let Some((&index, end)) = self.committed.iter().rev().find(|(_, end)| end.term < view.term) else {
            return;
        };
        let absent = index > view.last;
        let different = (start + 1..=view.written).contains(&index) && chain_at(index) != Some(end.chain);
        if absent || different {
            self.fail(|| format!("node {node} was elected without the committed index {index}"));
        }
    }

    fn entry_mut(&mut self, index: u64) -> &mut Entry {
        let index = index as usize;
        if self.entries.len() <= index {
            self.entries.resize(index + 1, Entry::Unseen);
        }
        &mut self.entries[index]
    }

    fn see_entry(&mut self, node: usize, index: u64, entry: Entry) {
        let known = self.entry_mut(index);
        match *known {
            Entry::Unseen => *known = entry,
            known if known == entry => return,
            known => {
                self.fail(|| {
                    format!("node {node} applied {entry:?} at index {index}, another node {known:?}")
                });
                return;
            }
        }
        let Entry::Command { id, .. } = entry else { return };
        let place = self.applied_at.get_mut(id.client).and_then(|commands| commands.get_mut(id.sequence));
        match place {
            None => self.fail(|| format!("{id:?} was applied at index {index} and never proposed")),
            Some(place) => match place.replace(index) {
                None => {
                    if self.fates[id.client][id.sequence] == Fate::Refused {
                        self.fail(|| format!("{id:?} was refused and applied at index {index}"));
                    }
                }
                Some(first) => self.fail(|| format!("{id:?} was applied twice, at {first} and at {index}")),
            },
        }
    }

    /// What clients were told against what was applied, when all is over.
    pub fn finish(&mut self) {
        for client in 0..self.fates.len() {
            for sequence in 0..self.fates[client].len() {
                let id = CommandId { client, sequence };
                let fate = self.fates[client][sequence];
                let applied = self.applied_at[client][sequence];
                match (fate, applied) {
                    (Fate::Acknowledged(index), Some(applied)) if index == applied => {}
                    (Fate::Unknown, Some(_)) => self.context.cover(Mark::UnknownCommitted),
                    (Fate::Unknown, None) => self.context.cover(Mark::UnknownLost),
                    (Fate::Refused, None) => {}
                    _ => self.fail(|| format!("{id:?} ended as {fate:?} and was applied at {applied:?}")),
                }
            }
        }
    }
}

/// The state machine that every node runs: it remembers nothing but the order, and tells the observer.
pub struct Recorder {
    history: Rc<RefCell<History>>,
    context: Rc<Context>,
    node: usize,
    index: u64,
    state: u64,
}

impl Recorder {
    /// A state machine at the beginning of the log.
    #[must_use]
    pub fn new(history: &Rc<RefCell<History>>, node: usize) -> Self {
        let context = Rc::clone(&history.borrow().context);
        Self { history: Rc::clone(history), context, node, index: 0, state: 0 }
    }

    /// The hash of all commands applied so far, in order.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.state
    }

    /// Its state, for a snapshot.
    #[must_use]
    pub fn picture(&self) -> [u8; 16] {
        let mut picture = [0; 16];
        picture[..8].copy_from_slice(&self.index.to_le_bytes());
        picture[8..].copy_from_slice(&self.state.to_le_bytes());
        picture
    }

    /// Takes over the state of a snapshot, which must be one that some node has come by in order.
    /// `runs`: it had applied something in this life.
    pub fn restore(&mut self, picture: [u8; 16], runs: bool) {
        let number = |at: usize| u64::from_le_bytes(picture[at..at + 8].try_into().expect("8 bytes"));
        let (index, state) = (number(0), number(8));
        let mut history = self.history.borrow_mut();
        let (node, last) = (self.node, self.index);
        let known = match history.entry_mut(index) {
            Entry::Command { state, .. } => Some(*state),
            _ if index == 0 => Some(0),
            _ => None,
        };
        if index < last || known != Some(state) {
            history.fail(|| {
                format!("node {node}, at index {last}, restored state {state:x} of index {index}, which had {known:x?}")
            });
        }
        (self.index, self.state) = (index, state);
        self.context.record(node, What::Apply, index, state);
        self.context.cover(if runs { Mark::SnapshotInstalled } else { Mark::SnapshotRestored });
    }

    /// Applies the command at `index`.
    pub fn apply(&mut self, index: u64, term: u64, command: &[u8]) {
        let mut history = self.history.borrow_mut();
        let (node, last) = (self.node, self.index);
        if index <= last {
            history.fail(|| format!("node {node} applied index {index} after {last}"));
            return;
        }
        let Some(id) = CommandId::decode(command) else {
            history.fail(|| format!("node {node} applied a damaged command at index {index}"));
            return;
        };
        for skipped in last + 1..index {
            history.see_entry(node, skipped, Entry::Engine);
        }
        self.state = xxh3_64_with_seed(command, self.state ^ index);
        self.index = index;
        self.context.record(node, What::Apply, index, self.state);
        history.see_entry(node, index, Entry::Command { id, term, state: self.state });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::trace::Trace;

    fn history() -> Rc<RefCell<History>> {
        History::new(&Context::new(Trace::new(false)), 2)
    }

    fn id(client: usize, sequence: usize) -> CommandId {
        CommandId { client, sequence }
    }

    fn failure(history: &Rc<RefCell<History>>) -> String {
        history.borrow().failure().unwrap_or_default().to_owned()
    }

    #[test]
    fn a_command_is_recognised_and_a_damaged_one_is_not() {
        for padding in [0, 1, 100] {
            let mut bytes = id(3, 70_000).encode(padding);
            assert_eq!(CommandId::decode(&bytes), Some(id(3, 70_000)));
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            assert_eq!(CommandId::decode(&bytes), None);
        }
        assert_eq!(CommandId::decode(&[]), None);
    }

    #[test]
    fn state_machines_that_apply_different_commands_at_an_index_are_noticed() {
        let history = history();
        history.borrow_mut().proposed(id(0, 0));
        history.borrow_mut().proposed(id(1, 0));
        Recorder::new(&history, 0).apply(2, 1, &id(0, 0).encode(9));
        assert_eq!(failure(&history), "");
        Recorder::new(&history, 1).apply(2, 1, &id(1, 0).encode(9));
        assert!(failure(&history).contains("at index 2"));
    }

    #[test]
    fn a_state_machine_that_skips_a_command_is_noticed() {
        let history = history();
        history.borrow_mut().proposed(id(0, 0));
        history.borrow_mut().proposed(id(0, 1));
        let mut whole = Recorder::new(&history, 0);
        whole.apply(1, 1, &id(0, 0).encode(9));
        whole.apply(2, 1, &id(0, 1).encode(9));
        Recorder::new(&history, 1).apply(2, 1, &id(0, 1).encode(9));
        assert!(failure(&history).contains("at index 1"));
    }

    #[test]
    fn a_command_that_is_applied_twice_is_noticed() {
        let history = history();
        history.borrow_mut().proposed(id(0, 0));
        let mut recorder = Recorder::new(&history, 0);
        recorder.apply(1, 1, &id(0, 0).encode(9));
        recorder.apply(2, 1, &id(0, 0).encode(9));
        assert!(failure(&history).contains("twice"));
    }

    #[test]
    fn a_lost_acknowledgement_and_an_applied_refusal_are_noticed() {
        let history = history();
        history.borrow_mut().proposed(id(0, 0));
        history.borrow_mut().answered(id(0, 0), Fate::Acknowledged(4));
        assert!(failure(&history).contains("acknowledged at index 4"));

        let other = self::history();
        other.borrow_mut().proposed(id(0, 0));
        other.borrow_mut().answered(id(0, 0), Fate::Refused);
        Recorder::new(&other, 0).apply(1, 1, &id(0, 0).encode(9));
        assert!(failure(&other).contains("refused"));
    }

    #[test]
    fn two_leaders_of_a_term_and_two_chains_at_an_index_are_noticed() {
        let leader = View { role: LEADER, term: 3, ..View::default() };
        let history = history();
        history.borrow_mut().see(0, &View::default(), &leader);
        history.borrow_mut().see(0, &leader, &leader);
        assert_eq!(failure(&history), "");
        history.borrow_mut().see(1, &View::default(), &leader);
        assert!(failure(&history).contains("both led term 3"));

        let history = self::history();
        assert!(history.borrow_mut().committed(0, 3, 5, Some([1; 16])));
        assert!(!history.borrow_mut().committed(1, 3, 5, Some([1; 16])));
        history.borrow_mut().committed(2, 3, 5, Some([2; 16]));
        assert!(failure(&history).contains("two logs"));
    }

    #[test]
    fn a_leader_without_what_earlier_terms_committed_is_noticed_and_a_late_one_of_an_old_term_is_not() {
        let history = history();
        history.borrow_mut().committed(0, 4, 9, Some([1; 16]));
        let leader = |term| View { role: LEADER, term, last: 8, written: 8, ..View::default() };
        history.borrow_mut().elected(1, &leader(4), 0, |_| None);
        assert_eq!(failure(&history), "");
        history.borrow_mut().elected(1, &leader(5), 0, |_| None);
        assert!(failure(&history).contains("committed index 9"));
    }
}
