//! What must hold, whatever happens.
//!
//! [`History`] is what an all-knowing observer has seen: which command was applied where, which chain was committed
//! where, who led when, what clients were told. It only grows; whatever contradicts it is a failure. The names follow
//! the Raft paper's figure 3.

use super::context::Context;
use super::coverage::Mark;
use super::kv::{Command, CommandId, HEAD_BYTES, KEYS, Operation, Register, Store};
use super::linearizable::{self, Call, Verdict};
use super::node::{Ask, LEADER, Members, View};
use super::trace::What;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

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
    /// Acknowledged.
    Acknowledged {
        /// At this index.
        index: u64,
        /// With this reply.
        reply: u64,
    },
    /// Refused; not proposed again.
    Refused,
    /// No answer will come.
    Unknown,
    /// A read, answered.
    Read {
        /// With everything up to here applied.
        applied: u64,
        /// With this reply.
        reply: u64,
    },
    /// What was waited for has come.
    Reached {
        /// At this index.
        index: u64,
    },
}

/// A client's command: what it asked, when, and what it knows.
#[derive(Clone, Copy, Debug)]
struct Asked {
    command: Command,
    /// By the history's own clock, which no two moments share.
    invoked: u64,
    returned: u64,
    fate: Fate,
    applied_at: Option<u64>,
    /// What was asked instead of the command.
    ask: Option<Ask>,
    /// What was committed when it was asked.
    known: Known,
}

/// How far the cluster had come at some moment.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// The last index that some node knew to be committed.
    committed: u64,
    /// The highest term in which something was committed.
    term: u64,
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
    /// Each client's commands.
    asked: Vec<Vec<Asked>>,
    clock: u64,
    /// Batch ends that were committed on some node, with the term that the first node to know it was in then: it was
    /// committed in that term at the latest.
    committed: BTreeMap<u64, CommittedEnd>,
    leaders: BTreeMap<u64, usize>,
    last_leader: Option<usize>,
    known: Known,
    /// Configurations that are committed, by their places, each with the end of what is known to hold no other one.
    configurations: BTreeMap<u64, (Members, u64)>,
    /// Each key's values, by the index from which on they were there.
    values: [Vec<(u64, u64)>; KEYS],
    failure: Option<String>,
}

mod members;
mod reads;

impl History {
    /// Nothing yet.
    #[must_use]
    pub fn new(context: &Rc<Context>, clients: usize) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            context: Rc::clone(context),
            entries: Vec::new(),
            asked: vec![Vec::new(); clients],
            clock: 0,
            committed: BTreeMap::new(),
            leaders: BTreeMap::new(),
            last_leader: None,
            known: Known::default(),
            configurations: BTreeMap::new(),
            values: Default::default(),
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

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A client proposes a command for the first time, or again after a refusal.
    pub fn proposed(&mut self, command: Command) {
        self.asked(command, None);
    }

    /// As [`History::proposed`], where the command itself is not to be proposed.
    pub fn asked(&mut self, command: Command, ask: Option<Ask>) {
        let (invoked, known) = (self.tick(), self.known);
        let asked = Asked { command, invoked, returned: 0, fate: Fate::Open, applied_at: None, ask, known };
        let commands = &mut self.asked[command.id.client];
        match commands.get_mut(command.id.sequence) {
            Some(again) => *again = Asked { applied_at: again.applied_at, ..asked },
            None => commands.push(asked),
        }
    }

    /// A command that the client would have made and that is left out of the run.
    pub fn left_out(&mut self, command: Command) {
        self.proposed(command);
        self.answered(command.id, Fate::Refused);
    }

    /// A client learns what became of its command. An answer after the client gave up counts too.
    pub fn answered(&mut self, id: CommandId, fate: Fate) {
        let returned = self.tick();
        let asked = &mut self.asked[id.client][id.sequence];
        (asked.fate, asked.returned) = (fate, returned);
        let applied = asked.applied_at;
        match fate {
            Fate::Acknowledged { index, .. } => {
                self.context.cover(Mark::Acknowledged);
                if applied != Some(index) {
                    self.fail(|| {
                        format!("{id:?} was acknowledged at index {index} and applied at {applied:?}")
                    });
                }
            }
            Fate::Read { applied, reply } => self.check_read(id, applied, reply),
            Fate::Reached { index } => self.check_reached(id, index),
            _ => {}
        }
    }

    /// Nobody will say what became of a command that is still open.
    pub fn abandon(&mut self, id: CommandId) {
        if self.asked[id.client][id.sequence].fate == Fate::Open {
            self.answered(id, Fate::Unknown);
        }
    }

    /// Whether no client waits for an answer.
    #[must_use]
    pub fn all_answered(&self) -> bool {
        !self.asked.iter().flatten().any(|asked| asked.fate == Fate::Open)
    }

    /// How many commands were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.asked.iter().flatten().filter(|asked| matches!(asked.fate, Fate::Acknowledged { .. })).count()
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
        if after.met > before.met {
            self.context.cover(Mark::Met);
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

    /// Who led a term, if anybody was seen to.
    #[must_use]
    pub fn leader_of(&self, term: u64) -> Option<usize> {
        self.leaders.get(&term).copied()
    }

    /// The commit index of a node in `term` has reached `index`, where its chain is `chain`. Whether that was news.
    pub fn committed(&mut self, node: usize, term: u64, index: u64, chain: Option<[u8; 16]>) -> bool {
        let Some(chain) = chain else {
            self.fail(|| format!("node {node} committed up to {index}, which is no batch end of its log"));
            return false;
        };
        self.known.committed = self.known.committed.max(index);
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
        let Some(asked) = self.asked.get_mut(id.client).and_then(|commands| commands.get_mut(id.sequence))
        else {
            return self.fail(|| format!("{id:?} was applied at index {index} and never proposed"));
        };
        let (fate, earlier) = (asked.fate, asked.applied_at.replace(index));
        match earlier {
            None if fate == Fate::Refused => {
                self.fail(|| format!("{id:?} was refused and applied at index {index}"));
            }
            None => {}
            Some(first) => self.fail(|| format!("{id:?} was applied twice, at {first} and at {index}")),
        }
    }

    /// What clients were told against what was applied, and against one another, when all is over.
    pub fn finish(&mut self) {
        for client in 0..self.asked.len() {
            for sequence in 0..self.asked[client].len() {
                let Asked { command, fate, applied_at, .. } = self.asked[client][sequence];
                match (fate, applied_at) {
                    (Fate::Acknowledged { index, reply }, Some(applied)) if index == applied => {
                        self.context.cover(match command.operation {
                            Operation::Get => Mark::Got,
                            Operation::Put { .. } => Mark::Put,
                            Operation::Append { .. } => Mark::Appended,
                            Operation::Cas { expected, .. } if expected == reply => Mark::CasHit,
                            Operation::Cas { .. } => Mark::CasMissed,
                        });
                    }
                    (Fate::Unknown, Some(_)) => self.context.cover(Mark::UnknownCommitted),
                    (Fate::Unknown, None) if self.asked[client][sequence].ask.is_some() => {}
                    (Fate::Unknown, None) => self.context.cover(Mark::UnknownLost),
                    (Fate::Refused | Fate::Read { .. } | Fate::Reached { .. }, None) => {}
                    _ => {
                        let id = command.id;
                        self.fail(|| format!("{id:?} ended as {fate:?} and was applied at {applied_at:?}"));
                    }
                }
            }
        }
        self.check_linearizability();
    }

    /// The run ends with commands under way: nobody will say what became of them.
    pub fn abandon_open(&mut self) {
        let now = self.tick();
        for asked in self.asked.iter_mut().flatten().filter(|asked| asked.fate == Fate::Open) {
            (asked.fate, asked.returned) = (Fate::Unknown, now);
        }
    }

    /// Linearizability of what clients asked and were told: what was refused never happened, what is unknown may have, and of a
    /// read without an answer there is nothing to explain.
    fn check_linearizability(&mut self) {
        let mut keys: [Vec<Call<Operation, u64>>; KEYS] = Default::default();
        for Asked { command, invoked, returned, fate, ask, .. } in self.asked.iter().flatten().copied() {
            let reply = match fate {
                Fate::Acknowledged { reply, .. } => Some(reply),
                Fate::Read { reply, .. } if ask.is_some_and(Ask::is_linearizable) => Some(reply),
                Fate::Refused | Fate::Read { .. } | Fate::Reached { .. } => continue,
                Fate::Open | Fate::Unknown if command.operation.reads() => continue,
                Fate::Open | Fate::Unknown => None,
            };
            let call = Call { operation: command.operation, reply, invoked, returned };
            keys[usize::from(command.key)].push(call);
        }
        for (key, calls) in keys.iter().enumerate().filter(|(_, calls)| !calls.is_empty()) {
            match linearizable::check::<Register>(calls, linearizable::PAIRS_MAX) {
                Verdict::Linearizable => self.context.cover(Mark::HistoryChecked),
                Verdict::Undecided => self.context.cover(Mark::HistoryUndecided),
                Verdict::Impossible(why) => self.fail(|| format!("key {key} is not linearizable: {why}")),
            }
        }
    }
}

/// The state machine that every node runs: a store of a few keys. It tells the observer what it does.
pub struct Recorder {
    history: Rc<RefCell<History>>,
    context: Rc<Context>,
    node: usize,
    index: u64,
    state: u64,
    store: Store,
}

impl Recorder {
    /// A state machine at the beginning of the log.
    #[must_use]
    pub fn new(history: &Rc<RefCell<History>>, node: usize) -> Self {
        let context = Rc::clone(&history.borrow().context);
        Self { history: Rc::clone(history), context, node, index: 0, state: 0, store: Store::default() }
    }

    /// The hash of all commands applied so far, in order.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.state
    }

    /// The value of the key that a command reads.
    #[must_use]
    pub fn read(&self, bytes: &[u8]) -> Option<u64> {
        Command::decode(bytes).map(|command| self.store.value(command.key))
    }

    /// Its state, for a snapshot.
    #[must_use]
    pub fn picture(&self) -> Vec<u8> {
        let numbers = [self.index, self.state].into_iter().chain(self.store.values());
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    /// Takes over the state of a snapshot, which must be one that some node has come by in order.
    /// `runs`: it had applied something in this life.
    ///
    /// # Errors
    /// When it is too short.
    pub fn restore(&mut self, picture: &[u8], runs: bool) -> Result<(), String> {
        let mut numbers = picture.chunks_exact(8).map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes));
        let short = || "the snapshot is too short".to_owned();
        let (index, state) = numbers.next().zip(numbers.next()).ok_or_else(short)?;
        let store = Store::of_values(numbers).ok_or_else(short)?;
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
        (self.index, self.state, self.store) = (index, state, store);
        self.context.record(node, What::Apply, index, state);
        self.context.cover(if runs { Mark::SnapshotInstalled } else { Mark::SnapshotRestored });
        Ok(())
    }

    /// Applies the command at `index`. The answer to its client.
    pub fn apply(&mut self, index: u64, term: u64, bytes: &[u8]) -> u64 {
        let mut history = self.history.borrow_mut();
        let (node, last) = (self.node, self.index);
        if index <= last {
            history.fail(|| format!("node {node} applied index {index} after {last}"));
            return 0;
        }
        let Some(command) = Command::decode(bytes) else {
            history.fail(|| format!("node {node} applied a damaged command at index {index}"));
            return 0;
        };
        let reply = self.store.apply(&command);
        for skipped in last + 1..index {
            history.see_entry(node, skipped, Entry::Engine);
        }
        // The bytes have been compared with their checksum, which is in the head.
        self.state = xxh3_64_with_seed(&bytes[..HEAD_BYTES], self.state ^ index ^ reply.rotate_left(32));
        self.index = index;
        history.note_value(index, command.key, self.store.value(command.key));
        self.context.record(node, What::Apply, index, self.state);
        history.see_entry(node, index, Entry::Command { id: command.id, term, state: self.state });
        reply
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

    fn command(client: usize, sequence: usize) -> Command {
        let operation = Operation::Append { item: sequence as u64 };
        Command { id: id(client, sequence), key: 0, operation }
    }

    fn bytes(client: usize, sequence: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        command(client, sequence).encode(9, &mut bytes);
        bytes
    }

    fn failure(history: &Rc<RefCell<History>>) -> String {
        history.borrow().failure().unwrap_or_default().to_owned()
    }

    #[test]
    fn state_machines_that_apply_different_commands_at_an_index_are_noticed() {
        let history = history();
        history.borrow_mut().proposed(command(0, 0));
        history.borrow_mut().proposed(command(1, 0));
        Recorder::new(&history, 0).apply(2, 1, &bytes(0, 0));
        assert_eq!(failure(&history), "");
        Recorder::new(&history, 1).apply(2, 1, &bytes(1, 0));
        assert!(failure(&history).contains("at index 2"));
    }

    #[test]
    fn a_state_machine_that_skips_a_command_is_noticed() {
        let history = history();
        history.borrow_mut().proposed(command(0, 0));
        history.borrow_mut().proposed(command(0, 1));
        let mut whole = Recorder::new(&history, 0);
        whole.apply(1, 1, &bytes(0, 0));
        whole.apply(2, 1, &bytes(0, 1));
        Recorder::new(&history, 1).apply(2, 1, &bytes(0, 1));
        assert!(failure(&history).contains("at index 1"));
    }

    #[test]
    fn a_command_that_is_applied_twice_is_noticed() {
        let history = history();
        history.borrow_mut().proposed(command(0, 0));
        let mut recorder = Recorder::new(&history, 0);
        recorder.apply(1, 1, &bytes(0, 0));
        recorder.apply(2, 1, &bytes(0, 0));
        assert!(failure(&history).contains("twice"));
    }

    #[test]
    fn a_lost_acknowledgement_and_an_applied_refusal_are_noticed() {
        let history = history();
        history.borrow_mut().proposed(command(0, 0));
        history.borrow_mut().answered(id(0, 0), Fate::Acknowledged { index: 4, reply: 0 });
        assert!(failure(&history).contains("acknowledged at index 4"));

        let other = self::history();
        other.borrow_mut().proposed(command(0, 0));
        other.borrow_mut().answered(id(0, 0), Fate::Refused);
        Recorder::new(&other, 0).apply(1, 1, &bytes(0, 0));
        assert!(failure(&other).contains("refused"));
    }

    #[test]
    fn a_reply_that_no_order_explains_is_noticed() {
        let history = history();
        for sequence in 0..2 {
            history.borrow_mut().proposed(command(0, sequence));
        }
        let mut recorder = Recorder::new(&history, 0);
        let replies = [recorder.apply(1, 1, &bytes(0, 0)), recorder.apply(2, 1, &bytes(0, 1))];
        for (sequence, reply) in replies.into_iter().rev().enumerate() {
            let fate = Fate::Acknowledged { index: sequence as u64 + 1, reply };
            history.borrow_mut().answered(id(0, sequence), fate);
        }
        assert_eq!(failure(&history), "");
        history.borrow_mut().finish();
        assert!(failure(&history).contains("key 0 is not linearizable"), "{}", failure(&history));
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
