//! The protocol as text: each file in `scripts/` is a sequence of commands with the whole trace that they produce,
//! every event and every action of every node.
//!
//! A block is comment lines (`#`), commands, `----`, and the trace, up to an empty line. `UPDATE_SCRIPTS=1` rewrites
//! the traces; read the difference before believing it. Which rule each of them proves is in `tests/tests/proofs/` of the
//! workspace, by section of Raft's thesis and by feature.
//!
//! Notation: `4@2` is index 4 of term 2; `[4..5@2 200B]` a batch. A node is its number.
//!
//! | command | what happens |
//! |---|---|
//! | `nodes 3 [spare=4] [learners=4,5] [window=2] [window_bytes=1000] [lease=500ms] [slow=100ms] [consensus_only]` | a cluster of empty nodes, and spare ones that are no members; leases count on that minimum; leaders mind a disk that is ten times as slow as the others, and takes 20 ms, for that long |
//! | `node 1 term=3 [vote=2] [log=1,1,2*3] [commit=1]` | node 1 boots with that disk: a term per batch, `*3` of three entries |
//! | `node 1 ... [damaged=3] [claim=20@5] [uncertain=20@5]` | and it found a batch damaged, or its log cut before damage |
//! | `tick 2 [150ms]` | node 2 ticks after that time; without a time at its deadline |
//! | `wait 150ms` | time passes, nobody ticks |
//! | `propose 1 [count=2] [bytes=100] [times=3]` | the driver of node 1 seals batches |
//! | `deliver 1->2 [at=3] [count=1]` | messages under way arrive: all, or so many, from the third on |
//! | `duplicate 1->2`, `drop 1->2` | as deliver: arrive and stay under way, or do not arrive |
//! | `save 2`, `persist 2` | hard state, or log, of node 2 is durable, and reports it |
//! | `write 2`, `complete 2` | the halves of `persist`: it is durable; it is reported, in one completion per epoch |
//! | `damage 1 [3 9]` | the batches of node 1 that cannot be read are these now |
//! | `adopt 1 7@2`, `nowhere 1 6`, `asked 1 20@5` | what node 1's driver found out: a batch of its own, that there is none, how far all logs reach |
//! | `ask 1` | node 1's driver asks the driver of the node that it follows how far that one's log reaches |
//! | `snapshot 1 [at=6]` | the driver of node 1 has a durable snapshot of all that is committed, or up to there |
//! | `purge 1 [through=6]` | and moves the log's start to its end, or to there |
//! | `install 1->3`, `fail 1->3` | the snapshot of node 1 is durable at node 3, and the transfer has ended; or it came to nothing |
//! | `stateless 1`, `stateful 1` | what was applied before the log's start cannot be read at node 1, or is there again |
//! | `stall 1`, `unstall 1` | the disk of node 1 does not answer, or answers again |
//! | `timed 1 30ms [others=10ms] [times=5]` | node 1 proposes a batch; the others have it, and it knows, after that time or at once; its own disk has it after 30 ms |
//! | `transfer 1 [to=2]` | leadership is to be handed over |
//! | `read 1 [as=lease] [id=1]` | a read at node 1: `quorum` (the default), `lease`, `round` |
//! | `abandon 1 3 4` | nobody waits any more at node 1 for the reads #3 and #4 |
//! | `disconnect 1 2`, `connect 1 2` | the session ends, what is under way is lost; a session begins |
//! | `change 1 [add=4,5] [learn=6] [remove=2] [promote=6] [demote=3] [reserve] [expected=7] [force]` | somebody asks node 1 for other members |
//! | `plan 1 add=4` | what that would do, in words |
//! | `found 2 7` | the configuration at index 7, which node 2 could not read, can be read |
//! | `crash 3`, `restart 3` | node 3 loses what is not durable |
//! | `settle` | everything under way arrives, everything written is durable, until nothing is left; no time passes |
//! | `run 2000ms [without=3] [cut=3]` | time passes: due ticks, each then as `settle`; a node without does nothing at all, and messages from and to it, or one that is cut off, are lost |
//! | `elect 1` | node 1's timer fires, then as `settle` |
//! | `status [1]` | the nodes as they are |
//! | `quiet <command>` | without its trace |

use ringraft::raft::{
    Action, AppendOutcome, BatchRun, Boot, Change, Claim, Configuration, Elsewhere, Epoch, Event,
    LeaseSettings, LogId, Member, MemberRole, Message, Nanos, Raft, RaftConfig, ReadKind, ReadRefusal,
    ReplicationState, Role, Settings, SlowDiskLimits,
};
use ringraft_block::{Incarnation, LogIndex, NodeId, Term};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::path::Path;

#[test]
fn scripts_produce_the_traces_that_are_written_in_them() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut files: Vec<_> =
        std::fs::read_dir(&directory).expect("scripts").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let mut differing = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("readable");
        let (produced, failures) = replay(&text);
        differing.extend(failures.iter().map(|failure| format!("{}: {failure}", file.display())));
        if produced == text {
            continue;
        }
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            std::fs::write(&file, produced).expect("writable");
            continue;
        }
        let first = text.lines().zip(produced.lines()).position(|(expected, got)| expected != got);
        let line = first.unwrap_or_else(|| text.lines().count().min(produced.lines().count()));
        differing.push(format!(
            "{}:{}\n  expected: {}\n  produced: {}",
            file.display(),
            line + 1,
            text.lines().nth(line).unwrap_or("the end"),
            produced.lines().nth(line).unwrap_or("the end"),
        ));
    }
    assert!(differing.is_empty(), "UPDATE_SCRIPTS=1 rewrites them:\n{}", differing.join("\n"));
}

/// The script with its traces as they are now, and the commands that made no sense.
fn replay(text: &str) -> (String, Vec<String>) {
    let mut cluster = Cluster::default();
    let mut out = String::new();
    let mut in_trace = false;
    for line in text.lines() {
        if line.is_empty() {
            in_trace = false;
        }
        if in_trace {
            continue;
        }
        if line == "----" {
            in_trace = true;
            out.push_str("----\n");
            out.push_str(&std::mem::take(&mut cluster.trace));
            continue;
        }
        if !line.is_empty() && !line.starts_with('#') {
            cluster.command(line);
        }
        out.push_str(line);
        out.push('\n');
    }
    (out, cluster.failures)
}

/// A node's disk, and its life if it runs.
struct Node {
    disk: Disk,
    life: Option<Life>,
    boots: u64,
}

#[derive(Default)]
struct Disk {
    term: Term,
    vote: Option<NodeId>,
    log: Vec<BatchRun>,
    epoch: Epoch,
    commit: LogIndex,
    damaged_from: Option<LogIndex>,
    claim: Option<Claim>,
    start: LogId,
    snapshot: LogId,
    /// As of the snapshot, and where they stand.
    members: Option<(LogIndex, Configuration)>,
}

struct Life {
    raft: Raft,
    writes: VecDeque<Write>,
    completions: VecDeque<(Epoch, LogIndex)>,
    saves: VecDeque<(u64, Term, Option<NodeId>)>,
    deferred: VecDeque<(u64, NodeId, Message)>,
}

enum Write {
    Append(Epoch, BatchRun),
    Truncate(LogIndex, Epoch),
    Start(LogId, Option<Epoch>),
}

#[derive(Default)]
struct Cluster {
    now: Nanos,
    configuration: Configuration,
    /// Every configuration that was sealed, by term and index.
    sealed: BTreeMap<(Term, LogIndex), Configuration>,
    tickets: u64,
    window: Option<usize>,
    window_bytes: Option<u64>,
    consensus_only: bool,
    slow_disk: Option<SlowDiskLimits>,
    reads: u64,
    nodes: BTreeMap<NodeId, Node>,
    network: Vec<(NodeId, NodeId, Message)>,
    trace: String,
    failures: Vec<String>,
}

/// `name=value` among a command's words.
fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("{word:?} is not a number"))
}

fn count(words: &[&str], name: &str, default: u64) -> u64 {
    option(words, name).map_or(default, number)
}

fn id(word: &str) -> NodeId {
    NodeId(number(word))
}

/// `index@term`.
fn position(word: &str) -> LogId {
    let (index, term) = word.split_once('@').unwrap_or_else(|| panic!("{word:?} is no position"));
    LogId { term: Term(number(term)), index: LogIndex(number(index)) }
}

fn index(words: &[&str], name: &str) -> Option<LogIndex> {
    option(words, name).map(|word| LogIndex(number(word)))
}

fn millis(word: &str) -> Nanos {
    Nanos::from_millis(number(word.strip_suffix("ms").unwrap_or_else(|| panic!("{word:?} is no time"))))
}

impl Cluster {
    fn command(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let before = self.trace.len();
        match words.as_slice() {
            ["quiet", rest @ ..] => {
                self.command(&rest.join(" "));
                self.trace.truncate(before);
            }
            ["nodes", size, ..] => self.form(number(size), &words),
            ["node", node, ..] => self.prepare(id(node), &words),
            ["tick", node] => {
                let deadline = self.raft(id(node)).next_deadline();
                if deadline == Nanos::NEVER {
                    return self.fail(&format!("node {node} has no deadline"));
                }
                self.now = self.now.max(deadline);
                self.feed(id(node), Event::Tick);
            }
            ["tick", node, span] => {
                self.now = self.now.plus(millis(span));
                self.feed(id(node), Event::Tick);
            }
            ["wait", span] => self.now = self.now.plus(millis(span)),
            ["propose", node, ..] => {
                for _ in 0..count(&words, "times", 1) {
                    self.propose(id(node), count(&words, "count", 1), count(&words, "bytes", 100));
                }
            }
            [what @ ("deliver" | "duplicate" | "drop"), link, ..] => self.move_messages(what, link, &words),
            ["save", node] => while self.save(id(node)) {},
            ["persist", node] => {
                while self.write(id(node)) {}
                while self.complete(id(node)) {}
            }
            ["write", node] => while self.write(id(node)) {},
            ["complete", node] => while self.complete(id(node)) {},
            ["disconnect", one, other] => {
                let (one, other) = (id(one), id(other));
                self.network
                    .retain(|(from, to, _)| (*from, *to) != (one, other) && (*from, *to) != (other, one));
                self.feed(one, Event::PeerDisconnected { peer: other });
                self.feed(other, Event::PeerDisconnected { peer: one });
            }
            ["connect", one, other] => {
                self.feed(id(one), Event::PeerConnected { peer: id(other) });
                self.feed(id(other), Event::PeerConnected { peer: id(one) });
            }
            ["damage", node, firsts @ ..] => {
                let damaged: BTreeSet<LogIndex> =
                    firsts.iter().map(|first| LogIndex(number(first))).collect();
                self.node(id(node)).disk.damaged_from = damaged.first().copied();
                self.feed(id(node), Event::DamageChanged { damaged });
            }
            ["adopt", node, at] => {
                let LogId { term, index } = position(at);
                let batch = BatchRun { first: index, last: index, term, bytes: 100 };
                self.feed(id(node), Event::Adopt { batch, configuration: None });
            }
            ["nowhere", node, after, highest @ ..] => {
                let after = LogIndex(number(after));
                let believed = highest.get(1) != Some(&"doubted");
                let highest = highest.first().map(|highest| position(highest)).unwrap_or_default();
                let elsewhere = Elsewhere { highest, believed };
                self.feed(id(node), Event::NothingBehind { after, elsewhere });
            }
            ["asked", node, highest] => {
                let elsewhere = Elsewhere { highest: position(highest), believed: true };
                self.feed(id(node), Event::AllAsked { elsewhere });
            }
            ["ask", node] => {
                let Some(leader) = self.raft(id(node)).leader() else {
                    return self.fail(&format!("node {node} follows nobody"));
                };
                let (term, last) = (self.raft(leader).term(), self.raft(leader).last());
                self.feed(id(node), Event::LeaderHolds { leader, term, last });
            }
            ["snapshot", node, ..] => {
                let raft = self.raft(id(node));
                let at = index(&words, "at").unwrap_or(raft.commit().min(raft.durable()));
                match raft.log().batch_end_at(at).filter(|_| at <= raft.commit() && at <= raft.durable()) {
                    Some(last) => {
                        let members =
                            raft.configuration_at(at).map(|(index, members)| (index, members.clone()));
                        let disk = &mut self.node(id(node)).disk;
                        (disk.snapshot, disk.members) = (last, members);
                    }
                    None => self.fail("there is no snapshot to be taken there"),
                }
            }
            ["purge", node, ..] => {
                let through = index(&words, "through").unwrap_or(self.node(id(node)).disk.snapshot.index);
                self.feed(id(node), Event::Purged { through });
                let start = self.raft(id(node)).log_start();
                if let Some(life) = &mut self.node(id(node)).life {
                    life.writes.push_back(Write::Start(start, None));
                }
            }
            [what @ ("install" | "fail"), link] => {
                let (from, to) = link.split_once("->").unwrap_or_else(|| panic!("{link:?} is no link"));
                let Disk { snapshot: last, members, .. } = &self.node(id(from)).disk;
                let (last, members) = (*last, members.clone());
                if *what == "install" {
                    let formed = || (LogIndex(0), self.configuration.clone());
                    let (configuration_index, configuration) = members.clone().unwrap_or_else(formed);
                    let disk = &mut self.node(id(to)).disk;
                    (disk.snapshot, disk.members) = (last, members);
                    let received = Event::SnapshotReceived { last, configuration, configuration_index };
                    self.feed(id(to), received);
                }
                let installed = (*what == "install").then_some(last);
                self.feed(id(from), Event::SnapshotEnded { to: id(to), installed });
            }
            [what @ ("stateless" | "stateful"), node] => {
                self.feed(id(node), Event::StateLost { lost: *what == "stateless" });
            }
            [what @ ("stall" | "unstall"), node] => {
                self.feed(id(node), Event::DiskStalled { stalled: *what == "stall" });
            }
            ["timed", node, own, ..] => {
                let others: Vec<NodeId> =
                    self.nodes.keys().copied().filter(|other| *other != id(node)).collect();
                let waits = option(&words, "others").map_or(Nanos(0), millis);
                for _ in 0..count(&words, "times", 1) {
                    let done = self.now.plus(millis(own));
                    self.propose(id(node), 1, 100);
                    self.now = self.now.plus(waits);
                    for other in &others {
                        self.command(&format!("deliver {node}->{other}"));
                        self.command(&format!("persist {other}"));
                        self.command(&format!("deliver {other}->{node}"));
                    }
                    self.now = self.now.max(done);
                    self.command(&format!("persist {node}"));
                }
            }
            ["transfer", node, ..] => {
                let to = option(&words, "to").map(id);
                self.feed(id(node), Event::Transfer { to });
            }
            ["put-off", node] => self.feed(id(node), Event::HandoverPutOff),
            ["read", node, ..] => {
                self.reads = count(&words, "id", self.reads + 1);
                let kind = match option(&words, "as") {
                    Some("lease") => ReadKind::Lease,
                    Some("round") => ReadKind::Round,
                    _ => ReadKind::Quorum,
                };
                self.feed(id(node), Event::Read { id: self.reads, kind });
            }
            ["abandon", node, ids @ ..] => {
                let ids = ids.iter().map(|id| number(id)).collect();
                self.feed(id(node), Event::ReadsAbandoned { ids });
            }
            ["change", node, ..] => {
                self.tickets += 1;
                let change = Box::new(self.change(&words));
                self.feed(id(node), Event::Change { ticket: self.tickets, change });
            }
            ["plan", node, ..] => {
                let plan = self.raft(id(node)).plan(&self.change(&words));
                let _ = writeln!(self.trace, "{plan}");
            }
            ["found", node, at] => {
                let index = LogIndex(number(at));
                let log = &self.node(id(node)).disk.log;
                let Some(batch) = log.iter().find(|batch| batch.first == index).copied() else {
                    return self.fail(&format!("node {node} has nothing at {at}"));
                };
                let configuration = self.sealed.get(&(batch.term, index)).cloned().expect("a configuration");
                self.feed(
                    id(node),
                    Event::ConfigurationFound { index, configuration: Box::new(configuration) },
                );
            }
            ["crash", node] => self.node(id(node)).life = None,
            ["restart", node] => {
                self.boot(id(node));
                self.describe(id(node));
            }
            ["settle"] => self.settle(&[], &[]),
            ["run", span, ..] => {
                let ids = |name| option(&words, name).into_iter().flat_map(|ids| ids.split(',')).map(id);
                self.run(millis(span), &ids("without").collect::<Vec<_>>(), &ids("cut").collect::<Vec<_>>());
            }
            ["elect", node] => {
                self.command(&format!("tick {node}"));
                self.settle(&[], &[]);
            }
            ["status"] => {
                self.nodes.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| self.describe(id))
            }
            ["status", node] => self.describe(id(node)),
            _ => panic!("{line:?} is not a command"),
        }
    }

    /// A command that makes no sense where it stands: the script is wrong.
    fn fail(&mut self, why: &str) {
        self.failures.push(why.to_owned());
        let _ = writeln!(self.trace, "!! {why}");
    }

    fn form(&mut self, size: u64, words: &[&str]) {
        let learners = option(words, "learners").into_iter().flat_map(|ids| ids.split(',')).map(id);
        let learners: Vec<NodeId> = learners.collect();
        let members = (1..=size).map(NodeId).chain(learners.iter().copied()).map(|id| Member {
            id,
            incarnation: Incarnation(u128::from(id.get())),
            address: String::new(),
            role: if learners.contains(&id) { MemberRole::Learner } else { MemberRole::Voter },
        });
        let lease = option(words, "lease").map(millis);
        let lease = lease.map(|min| LeaseSettings { election_timeout_min_ns: min.0, drift_ppm: 1_000 });
        self.configuration =
            Configuration::new(members.collect()).expect("valid").with_settings(Settings { lease });
        self.reads = 0;
        self.now = Nanos(0);
        self.network.clear();
        self.nodes.clear();
        self.window = option(words, "window").map(|value| number(value) as usize);
        self.window_bytes = option(words, "window_bytes").map(number);
        self.consensus_only = words.contains(&"consensus_only");
        let slow = |span| SlowDiskLimits { factor: 10, floor: Nanos::from_millis(20), span };
        self.slow_disk = option(words, "slow").map(millis).map(slow);
        self.sealed.clear();
        self.tickets = 0;
        let spare = option(words, "spare").into_iter().flat_map(|ids| ids.split(',')).map(id);
        for id in self.configuration.members().iter().map(|member| member.id).chain(spare) {
            self.nodes.insert(id, Node { disk: Disk::default(), life: None, boots: 0 });
        }
        self.nodes.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| self.boot(id));
    }

    fn change(&self, words: &[&str]) -> Change {
        let ids = |name| option(words, name).into_iter().flat_map(|ids| ids.split(',')).map(id).collect();
        let new = |role| {
            move |id: NodeId| {
                let incarnation = Incarnation(u128::from(id.get()));
                Member { id, incarnation, address: String::new(), role }
            }
        };
        let (voters, learners): (Vec<NodeId>, Vec<NodeId>) = (ids("add"), ids("learn"));
        Change {
            add: voters
                .into_iter()
                .map(new(MemberRole::Voter))
                .chain(learners.into_iter().map(new(MemberRole::Learner)))
                .collect(),
            remove: ids("remove"),
            promote: ids("promote"),
            demote: ids("demote"),
            reserve_id: words.contains(&"reserve"),
            expected: index(words, "expected"),
            even_if_quorum_is_lost: words.contains(&"force"),
        }
    }

    fn prepare(&mut self, id: NodeId, words: &[&str]) {
        let mut log: Vec<BatchRun> = Vec::new();
        for batch in option(words, "log").into_iter().flat_map(|log| log.split(',')) {
            let (term, count) = batch.split_once('*').unwrap_or((batch, "1"));
            let first = log.last().map_or(LogIndex(0), |batch| batch.last).next();
            let last = LogIndex(first.get() + number(count) - 1);
            log.push(BatchRun { first, last, term: Term(number(term)), bytes: 100 });
        }
        self.node(id).disk = Disk {
            term: Term(count(words, "term", 0)),
            vote: option(words, "vote").map(crate::id),
            log,
            epoch: Epoch(0),
            commit: LogIndex(count(words, "commit", 0)),
            damaged_from: index(words, "damaged"),
            claim: ["claim", "uncertain"].into_iter().find_map(|name| {
                let LogId { term, index } = position(option(words, name)?);
                Some(Claim { term, last: index, certain: name == "claim" })
            }),
            start: LogId::default(),
            snapshot: LogId::default(),
            members: None,
        };
        self.boot(id);
        self.describe(id);
    }

    fn node(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(&id).unwrap_or_else(|| panic!("there is no node {id}"))
    }

    fn raft(&self, id: NodeId) -> &Raft {
        let life = self.nodes.get(&id).and_then(|node| node.life.as_ref());
        &life.unwrap_or_else(|| panic!("node {id} does not run")).raft
    }

    fn boot(&mut self, id: NodeId) {
        let now = self.now;
        let (consensus_only, slow_disk) = (self.consensus_only, self.slow_disk);
        let defaults = RaftConfig::new(id, 0);
        let unread = self.node(id).disk.damaged_from;
        let (window_batches, window_bytes) = (
            self.window.unwrap_or(defaults.window_batches),
            self.window_bytes.unwrap_or(defaults.window_bytes),
        );
        let Disk { log, commit, snapshot, members, .. } = &self.node(id).disk;
        let (log, commit, members) = (log.clone(), (*commit).max(snapshot.index), members.clone());
        let upto = log.iter().rev().filter(|batch| batch.last <= commit);
        let sealed =
            |batch: &BatchRun| Some((batch.first, self.sealed.get(&(batch.term, batch.first))?.clone()));
        let upto = upto.filter_map(sealed).next();
        let formed = || (LogIndex(0), self.configuration.clone());
        let (configuration_index, configuration) = upto.or(members).unwrap_or_else(formed);
        let changes = log.iter().filter(|batch| batch.last > commit).filter_map(|batch| {
            let sealed = self.sealed.get(&(batch.term, batch.first))?;
            Some((batch.first, Some(sealed.clone()).filter(|_| Some(batch.first) != unread)))
        });
        let changes = changes.collect();
        let node = self.node(id);
        node.boots += 1;
        node.disk.epoch = Epoch(node.disk.epoch.0 + 1);
        let config = RaftConfig {
            window_batches,
            window_bytes,
            seed: id.get() * 1_000 + node.boots,
            consensus_only,
            slow_disk,
            ..defaults
        };
        let snapshot = node.disk.snapshot;
        if snapshot.index > node.disk.start.index
            && !node.disk.log.iter().any(|batch| batch.end() == snapshot)
        {
            // An install was interrupted.
            node.disk.log.clear();
            node.disk.start = snapshot;
        }
        let last = node.disk.log.last().map_or(node.disk.start, BatchRun::end);
        let term = node.disk.term.max(last.term);
        let boot = Boot {
            term,
            term_saved: term,
            vote: node.disk.vote.filter(|_| term == node.disk.term),
            start: node.disk.start,
            batches: node.disk.log.clone(),
            epoch: node.disk.epoch,
            commit,
            damaged_from: node.disk.damaged_from,
            claim: node.disk.claim,
            configuration_index,
            now,
            changes,
        };
        node.life = Some(Life {
            raft: Raft::new(config, configuration, boot).expect("bootable"),
            writes: VecDeque::new(),
            completions: VecDeque::new(),
            saves: VecDeque::new(),
            deferred: VecDeque::new(),
        });
    }

    fn feed(&mut self, id: NodeId, event: Event) {
        let Some(life) = self.nodes.get_mut(&id).and_then(|node| node.life.as_mut()) else { return };
        let _ = writeln!(self.trace, "{id}: {}", show_event(&event));
        let mut actions = Vec::new();
        life.raft.handle(self.now, event, &mut actions);
        let (mut seal, mut claim_released, mut sealing) = (false, false, None);
        for action in actions {
            let _ = writeln!(self.trace, "    {}", show_action(&action));
            match action {
                Action::Persist { batch } => life.writes.push_back(Write::Append(life.raft.epoch(), batch)),
                Action::Truncate { after, epoch } => life.writes.push_back(Write::Truncate(after, epoch)),
                Action::SaveHardState { sequence, term, vote } => {
                    life.saves.push_back((sequence, term, vote))
                }
                Action::SendNow { to, message } => self.network.push((id, to, message)),
                Action::SendAfterSave { sequence, to, message } => {
                    life.deferred.push_back((sequence, to, message));
                }
                Action::SealEmpty => seal = true,
                Action::ReleaseClaim => claim_released = true,
                Action::SealConfiguration { configuration } => sealing = Some(configuration),
                Action::InstallSnapshot { last, epoch: Some(epoch) } => {
                    life.writes.push_back(Write::Start(last, Some(epoch)));
                }
                Action::Commit { .. }
                | Action::Become { .. }
                | Action::Stop { .. }
                | Action::SendSnapshot { .. }
                | Action::InstallSnapshot { .. }
                | Action::TransferEnded { .. }
                | Action::OwnDiskSlow { .. }
                | Action::ReadReady { .. }
                | Action::ReadRefused { .. }
                | Action::MembersChanged
                | Action::ChangeEnded { .. } => {}
            }
        }
        if let Some(configuration) = sealing {
            self.seal(id, configuration);
        }
        if claim_released {
            self.node(id).disk.claim = None;
        }
        if seal {
            self.propose(id, 1, 0);
        }
    }

    fn seal(&mut self, id: NodeId, configuration: Box<Configuration>) {
        let Some((term, first)) = self.raft(id).next_position() else {
            return self.fail(&format!("node {id} does not lead"));
        };
        self.sealed.insert((term, first), Configuration::clone(&configuration));
        let batch = BatchRun { first, last: first, term, bytes: 60 };
        self.feed(id, Event::ProposedConfiguration { batch, configuration });
    }

    /// As the driver hands it to the core: with the configuration that is in the image.
    fn receive(&mut self, from: NodeId, to: NodeId, mut message: Message) {
        if let Message::Append(append) = &mut message
            && let Some(batch) = &append.batch
        {
            append.configuration = self.sealed.get(&(batch.term, batch.first)).cloned().map(Box::new);
        }
        self.feed(to, Event::Received { from, message });
    }

    fn propose(&mut self, id: NodeId, count: u64, bytes: u64) {
        let Some((term, first)) = self.raft(id).next_position() else {
            return self.fail(&format!("node {id} does not lead"));
        };
        let last = LogIndex(first.get() + count - 1);
        let bytes = u32::try_from(bytes).expect("small");
        self.feed(id, Event::Proposed { batch: BatchRun { first, last, term, bytes } });
    }

    fn move_messages(&mut self, what: &str, link: &str, words: &[&str]) {
        let (from, to) = link.split_once("->").unwrap_or_else(|| panic!("{link:?} is no link"));
        let (from, to) = (id(from), id(to));
        let (skip, take) = (count(words, "at", 1) as usize - 1, count(words, "count", u64::MAX) as usize);
        let on_link =
            self.network.iter().enumerate().filter(|(_, message)| (message.0, message.1) == (from, to));
        let chosen: Vec<usize> = on_link.map(|(at, _)| at).skip(skip).take(take).collect();
        if chosen.is_empty() {
            return self.fail(&format!("nothing is under way on {link}"));
        }
        let messages: Vec<Message> = chosen.iter().map(|at| self.network[*at].2.clone()).collect();
        if what != "duplicate" {
            for at in chosen.into_iter().rev() {
                self.network.remove(at);
            }
        }
        for message in messages {
            if what == "drop" {
                let _ = writeln!(self.trace, "lost {link}: {}", show_message(&message));
            } else {
                self.receive(from, to, message);
            }
        }
    }

    fn save(&mut self, id: NodeId) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        let Some(life) = &mut node.life else { return false };
        let Some((sequence, term, vote)) = life.saves.pop_front() else { return false };
        (node.disk.term, node.disk.vote) = (term, vote);
        while let Some((after, ..)) = life.deferred.front()
            && *after <= sequence
        {
            if let Some((_, to, message)) = life.deferred.pop_front() {
                self.network.push((id, to, message));
            }
        }
        self.feed(id, Event::HardStateSaved { sequence });
        true
    }

    fn write(&mut self, id: NodeId) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        let Some(life) = &mut node.life else { return false };
        match life.writes.pop_front() {
            Some(Write::Append(epoch, batch)) => {
                node.disk.log.push(batch);
                match life.completions.back_mut() {
                    Some(completion) if completion.0 == epoch => completion.1 = batch.last,
                    _ => life.completions.push_back((epoch, batch.last)),
                }
            }
            Some(Write::Truncate(after, epoch)) => {
                node.disk.log.retain(|batch| batch.last <= after);
                node.disk.epoch = epoch;
            }
            Some(Write::Start(start, None)) => {
                node.disk.log.retain(|batch| batch.last > start.index);
                node.disk.start = start;
            }
            Some(Write::Start(start, Some(epoch))) => {
                node.disk.log.clear();
                (node.disk.start, node.disk.epoch) = (start, epoch);
            }
            None => return false,
        }
        true
    }

    fn complete(&mut self, id: NodeId) -> bool {
        let Some(life) = self.nodes.get_mut(&id).and_then(|node| node.life.as_mut()) else { return false };
        let Some((epoch, last)) = life.completions.pop_front() else { return false };
        self.feed(id, Event::Persisted { epoch, last });
        true
    }

    fn run(&mut self, span: Nanos, without: &[NodeId], cut: &[NodeId]) {
        let end = self.now.plus(span);
        loop {
            self.settle(without, cut);
            let alive = self.nodes.iter().filter(|(id, _)| !without.contains(id));
            let deadlines =
                alive.filter_map(|(id, node)| Some((node.life.as_ref()?.raft.next_deadline(), *id)));
            match deadlines.min() {
                Some((deadline, id)) if deadline <= end => {
                    self.now = self.now.max(deadline);
                    self.feed(id, Event::Tick);
                }
                _ => break,
            }
        }
        self.now = end;
    }

    fn settle(&mut self, without: &[NodeId], cut: &[NodeId]) {
        let ids: Vec<NodeId> = self.nodes.keys().copied().filter(|id| !without.contains(id)).collect();
        for _ in 0..1_000 {
            let mut busy = false;
            for id in &ids {
                while self.save(*id) {
                    busy = true;
                }
                while self.write(*id) {
                    busy = true;
                }
                while self.complete(*id) {
                    busy = true;
                }
            }
            for (from, to, message) in std::mem::take(&mut self.network) {
                busy = true;
                if [from, to].iter().any(|id| without.contains(id) || cut.contains(id)) {
                    continue;
                }
                self.receive(from, to, message);
            }
            if !busy {
                return;
            }
        }
        panic!("it does not settle");
    }

    fn describe(&mut self, id: NodeId) {
        let node = &self.nodes[&id];
        let Some(life) = &node.life else {
            let _ = writeln!(self.trace, "{id}: down");
            return;
        };
        if life.raft.violation().is_some() {
            let _ = writeln!(self.trace, "{id}: stopped");
            return;
        }
        let status = life.raft.status();
        let batches: Vec<String> = life.raft.log().iter().map(|batch| show_batch(&batch)).collect();
        let vote = status.vote.map_or("nobody".to_owned(), |vote| vote.to_string());
        let leader = status.leader.map_or("unknown".to_owned(), |leader| leader.to_string());
        let _ = writeln!(
            self.trace,
            "{id}: {} t{} vote {vote} leader {leader} durable {} commit {} epoch {} log {}",
            show_role(status.role),
            status.term,
            status.durable,
            status.commit,
            status.epoch.0,
            if batches.is_empty() { "empty".to_owned() } else { batches.join(" ") },
        );
        if status.log_start.index > LogIndex(0) {
            let _ = writeln!(self.trace, "    log behind {}", show_position(status.log_start));
        }
        let (index, configuration) = (life.raft.configuration_index(), life.raft.configuration());
        if life.raft.restraint().members_unknown {
            let _ = writeln!(self.trace, "    the configuration at {index} cannot be read");
        } else if *configuration != self.configuration || self.sealed.keys().any(|(_, at)| *at == index) {
            let _ = writeln!(self.trace, "    at {index}: {}", show_configuration(configuration));
        }
        let restraint = life.raft.restraint();
        let claim = restraint.claim.map(|claim| {
            let position = LogId { term: claim.term, index: claim.last };
            format!("{} {}", if claim.certain { "claim" } else { "uncertain" }, show_position(position))
        });
        let damage = restraint.damaged_from.map(|from| format!("damaged from {from}"));
        let stalled = restraint.stalled.then(|| "stalled".to_owned());
        let lost = restraint.state_lost.then(|| "state lost".to_owned());
        let restraints: Vec<String> = [damage, claim, stalled, lost].into_iter().flatten().collect();
        if !restraints.is_empty() {
            let bar =
                restraint.vote_bar.map_or("nobody".to_owned(), |bar| format!("from {}", show_position(bar)));
            let _ = writeln!(self.trace, "    {}; votes for {bar}", restraints.join(", "));
        }
        for peer in status.peers {
            let state = match peer.state {
                ReplicationState::Probe => "probe",
                ReplicationState::Replicate => "replicate",
                ReplicationState::Snapshot => "snapshot",
            };
            let _ = writeln!(
                self.trace,
                "    {}: {state} match {} next {} in flight {} ({}B) round {}",
                peer.id, peer.matched, peer.next, peer.inflight_batches, peer.inflight_bytes, peer.round.0
            );
        }
    }
}

fn show_role(role: Role) -> &'static str {
    match role {
        Role::Follower => "follower",
        Role::PreCandidate => "pre-candidate",
        Role::Candidate => "candidate",
        Role::Leader => "leader",
    }
}

fn show_position(position: LogId) -> String {
    format!("{}@{}", position.index, position.term)
}

fn show_batch(batch: &BatchRun) -> String {
    if batch.first == batch.last {
        format!("[{}@{} {}B]", batch.first, batch.term, batch.bytes)
    } else {
        format!("[{}..{}@{} {}B]", batch.first, batch.last, batch.term, batch.bytes)
    }
}

fn show_message(message: &Message) -> String {
    match message {
        Message::Append(append) => {
            let batch = append.batch.as_ref().map_or("nothing".to_owned(), show_batch);
            let ask = if append.reply_now { " ask" } else { "" };
            format!(
                "append t{} {batch} after {} commit {} round {}{ask}",
                append.term,
                show_position(append.previous),
                append.commit,
                append.round.0
            )
        }
        Message::AppendAck(ack) => {
            let outcome = match ack.outcome {
                AppendOutcome::Matched { matched } => format!("matched {}", show_position(matched)),
                AppendOutcome::Rejected { refused, hint } => {
                    format!("rejected {refused} hint {}", show_position(hint))
                }
                AppendOutcome::StaleTerm => "stale term".to_owned(),
            };
            format!("ack t{} {outcome} round {}", ack.term, ack.round.0)
        }
        Message::Vote(vote) => {
            let kind = if vote.pre { "pre-vote" } else { "vote" };
            let transfer = if vote.transfer { " transfer" } else { "" };
            format!("{kind} t{} last {}{transfer}", vote.term, show_position(vote.last))
        }
        Message::VoteReply(reply) => {
            let kind = if reply.pre { "pre-vote" } else { "vote" };
            let answer = if reply.granted { "granted" } else { "refused" };
            format!("{kind} t{} {answer}", reply.term)
        }
        Message::TimeoutNow(message) => format!("time-out now t{}", message.term),
        Message::ReadIndex(request) => {
            // The context is a number drawn at random: what counts is whether it is the one that is awaited.
            format!("read t{} {}", request.term, show_read(request.kind))
        }
        Message::ReadIndexReply(reply) => match reply.index {
            Some(index) => format!("read t{} at {index}", reply.term),
            None => format!("read t{} refused", reply.term),
        },
    }
}

fn show_ids(ids: impl IntoIterator<Item = NodeId>) -> String {
    ids.into_iter().map(|id| id.to_string()).collect::<Vec<_>>().join(" ")
}

/// `voters 1 2 learners 3 (until now 1 2 4) to be 1 2 3`, the last two in a transition and while a plan is there.
fn show_configuration(configuration: &Configuration) -> String {
    let mut text = format!("voters {}", show_ids(configuration.incoming_voters()));
    let learners = configuration.members().iter().filter(|member| member.role == MemberRole::Learner);
    let learners = show_ids(learners.map(|member| member.id));
    if !learners.is_empty() {
        let _ = write!(text, " learners {learners}");
    }
    if configuration.is_joint() {
        let _ = write!(text, " (until now {})", show_ids(configuration.outgoing().iter().copied()));
    }
    if !configuration.planned().is_empty() {
        let roles = configuration.planned().iter().map(|(id, role)| match role {
            MemberRole::Voter => id.to_string(),
            MemberRole::Learner => format!("{id} (learner)"),
        });
        let _ = write!(text, " to be {}", roles.collect::<Vec<_>>().join(" "));
    }
    text
}

fn show_change(change: &Change) -> String {
    let Change { add, remove, promote, demote, reserve_id, expected, even_if_quorum_is_lost } = change;
    let of = |role| add.iter().filter(move |member| member.role == role).map(|member| member.id).collect();
    let lists: [(&str, Vec<NodeId>); 5] = [
        ("add", of(MemberRole::Voter)),
        ("learn", of(MemberRole::Learner)),
        ("remove", remove.clone()),
        ("promote", promote.clone()),
        ("demote", demote.clone()),
    ];
    let lists = lists.into_iter().filter(|(_, ids)| !ids.is_empty());
    let mut words: Vec<String> = lists.map(|(what, ids)| format!("{what} {}", show_ids(ids))).collect();
    words.extend(reserve_id.then(|| "reserve an id".to_owned()));
    words.extend(expected.map(|index| format!("if at {index}")));
    words.extend(even_if_quorum_is_lost.then(|| "even if quorum is lost".to_owned()));
    words.join(", ")
}

fn show_event(event: &Event) -> String {
    match event {
        Event::Tick => "tick".to_owned(),
        Event::Proposed { batch } => format!("proposed {}", show_batch(batch)),
        Event::Received { from, message } => format!("from {from}: {}", show_message(message)),
        Event::Persisted { epoch, last } => format!("persisted up to {last} in epoch {}", epoch.0),
        Event::HardStateSaved { sequence } => format!("saved #{sequence}"),
        Event::PeerConnected { peer } => format!("connected to {peer}"),
        Event::PeerDisconnected { peer } => format!("disconnected from {peer}"),
        Event::DamageChanged { damaged } if damaged.is_empty() => "damaged nothing".to_owned(),
        Event::DamageChanged { damaged } => {
            let firsts: Vec<String> = damaged.iter().map(ToString::to_string).collect();
            format!("damaged {}", firsts.join(" "))
        }
        Event::Adopt { batch, .. } => format!("adopts {}", show_batch(batch)),
        Event::LeaderHolds { leader, term, last } => {
            format!("leader {leader} of t{term} holds {}", show_position(*last))
        }
        Event::AllAsked { elsewhere } => {
            format!("everybody ends at {} at the highest", show_position(elsewhere.highest))
        }
        Event::NothingBehind { after, elsewhere } if elsewhere.highest > LogId::default() => {
            let highest = show_position(elsewhere.highest);
            format!("nobody has anything behind {after}, somebody ends at {highest}")
        }
        Event::NothingBehind { after, .. } => format!("nobody has anything behind {after}"),
        Event::Transfer { to } => {
            format!("transfer to {}", to.map_or("the best".to_owned(), |to| to.to_string()))
        }
        Event::HandoverPutOff => "the hand-over could not begin".to_owned(),
        Event::DiskStalled { stalled } => {
            format!("the disk {}", if *stalled { "stalls" } else { "answers again" })
        }
        Event::ReadsAbandoned { ids } => format!("reads {ids:?} abandoned"),
        Event::Read { id, kind } => format!("read #{id} {}", show_read(*kind)),
        Event::Purged { through } => format!("purged through {through}"),
        Event::SnapshotReceived { last, .. } => format!("snapshot up to {} received", show_position(*last)),
        Event::SnapshotEnded { to, installed: Some(last) } => {
            format!("snapshot up to {} installed at {to}", show_position(*last))
        }
        Event::SnapshotEnded { to, installed: None } => format!("no snapshot installed at {to}"),
        Event::StateLost { lost } => format!("the state is {}", if *lost { "lost" } else { "there again" }),
        Event::Change { ticket, change } => format!("change #{ticket}: {}", show_change(change)),
        Event::ProposedConfiguration { batch, configuration } => {
            format!("proposed {} with {}", show_batch(batch), show_configuration(configuration))
        }
        Event::ConfigurationFound { index, configuration } => {
            format!("configuration at {index} found: {}", show_configuration(configuration))
        }
    }
}

fn show_action(action: &Action) -> String {
    match action {
        Action::Persist { batch } => format!("persist {}", show_batch(batch)),
        Action::Truncate { after, epoch } => format!("truncate after {after}, epoch {}", epoch.0),
        Action::SaveHardState { sequence, term, vote } => {
            let vote = vote.map_or("nobody".to_owned(), |vote| vote.to_string());
            format!("save #{sequence}: t{term} vote {vote}")
        }
        Action::SendNow { to, message } => format!("to {to}: {}", show_message(message)),
        Action::SendAfterSave { sequence, to, message } => {
            format!("after #{sequence} to {to}: {}", show_message(message))
        }
        Action::Commit { up_to } => format!("commit {up_to}"),
        Action::Become { role, term, leader } => {
            let leader = leader.map_or(String::new(), |leader| format!(" of {leader}"));
            let leader = if *role == Role::Follower { leader } else { String::new() };
            format!("become {}{leader} in t{term}", show_role(*role))
        }
        Action::SealEmpty => "seal an empty batch".to_owned(),
        Action::ReleaseClaim => "release the claim".to_owned(),
        Action::TransferEnded { end } => format!("transfer ended: {end}"),
        Action::OwnDiskSlow { own, others, to } => {
            let to: Vec<String> = to.iter().map(|id| format!(" {id}")).collect();
            let millis = |span: &Nanos| span.0 / 1_000_000;
            format!(
                "the own disk is slow: {} ms, the others' {} ms; to{}",
                millis(own),
                millis(others),
                to.concat()
            )
        }
        Action::Stop { violation } => format!("STOP: {violation}"),
        Action::SendSnapshot { to } => format!("send a snapshot to {to}"),
        Action::InstallSnapshot { last, epoch: Some(epoch) } => {
            format!("install the snapshot up to {}, log anew in epoch {}", show_position(*last), epoch.0)
        }
        Action::InstallSnapshot { last, epoch: None } => {
            format!("install the snapshot up to {}, log kept", show_position(*last))
        }
        Action::ReadReady { id, index } => format!("read #{id} at {index}"),
        Action::ReadRefused { id, reason } => {
            let why = match reason {
                ReadRefusal::NotLeader => "no leader",
                ReadRefusal::ConsensusOnly => "there is no log",
                ReadRefusal::LeaderChanged => "the leader changed",
                ReadRefusal::SessionLost => "the session is lost",
                ReadRefusal::Refused => "the leader refuses",
            };
            format!("read #{id} refused: {why}")
        }
        Action::SealConfiguration { configuration } => format!("seal {}", show_configuration(configuration)),
        Action::MembersChanged => "members changed".to_owned(),
        Action::ChangeEnded { ticket, outcome: Ok(changed) } => {
            let reserved = changed.reserved.map_or(String::new(), |id| format!(", id {id} reserved"));
            format!("change #{ticket} is done at {}{reserved}", changed.index)
        }
        Action::ChangeEnded { ticket, outcome: Err(error) } => format!("change #{ticket} refused: {error}"),
    }
}

fn show_read(kind: ReadKind) -> &'static str {
    match kind {
        ReadKind::Lease => "by lease or quorum",
        ReadKind::Quorum => "by quorum",
        ReadKind::Round => "round",
    }
}
