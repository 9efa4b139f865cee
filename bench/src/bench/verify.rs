//! The check after the run: every node's log is read back from its disk and compared with what the ledgers say was
//! sent and acknowledged.
//!
//! The reader is its own: it knows the format (`ringraft_wal::format`) but shares nothing with the engine's recovery,
//! so a fault there cannot hide here. A node's log is its segments in the order of their generations; one that
//! begins with a cut drops what lies beyond the cut; slots count as long as envelope, place, checksums and chain
//! fit. Memory does not grow with the commands: per batch a few dozen bytes, per stream one number.
//!
//! That no command is there twice follows from the order: a stream's next sequence is sent when the outcome of the
//! one before is known, so its sequences must rise along the log.
//!
//! Of a log that was purged only what is left can be read: of each stream what comes from its first command there on, and of a
//! stream without any there, nothing. What was purged is checked by number: a state machine has applied as many commands as were
//! acknowledged, and of those with unknown outcome some; and there is a snapshot where the log begins.

mod log;

use super::ledger::Ledger;
use crate::load;
use log::Log;
use ringraft_block::LogIndex;
use ringraft_wal::format::BatchKind;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;

/// Problems of one kind that are spelled out; the others are counted.
const PROBLEMS_SHOWN: usize = 8;

/// What the check found.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Verified {
    pub(crate) ok: bool,
    /// Commands that were acknowledged.
    pub(crate) acked: u64,
    /// Acknowledged commands that are in the log once.
    pub(crate) present: u64,
    /// Acknowledged commands that lie behind snapshots, where the log that was read does not go any more.
    pub(crate) purged: u64,
    /// Commands whose outcome their proposer never learnt, how many of them are in the log, and of how many it cannot tell since it was
    /// purged.
    pub(crate) unknown: u64,
    pub(crate) unknown_present: u64,
    pub(crate) unknown_purged: u64,
    /// Acknowledged commands that are not in the log.
    pub(crate) missing: u64,
    /// Commands that are in the log twice, or out of their stream's order.
    pub(crate) repeated: u64,
    /// Commands in the log that nobody sent, or that were refused.
    pub(crate) never_sent: u64,
    /// Commands whose bytes differ from those sent.
    pub(crate) altered: u64,
    /// The logs are equal by chain, each as far as it goes within what is committed.
    pub(crate) chains_equal: bool,
    /// A majority of the nodes holds everything that is committed.
    pub(crate) on_majority: bool,
    /// Every node's disk holds all that the node ever reported as durable and committed, also of a minority.
    pub(crate) complete: bool,
    /// Nodes that had applied everything told how many commands that was, and it is as many as there can be.
    pub(crate) counted: usize,
    /// The end of what is committed.
    pub(crate) committed: u64,
    pub(crate) nodes: Vec<VerifiedNode>,
    /// Batches of commands in the log, and the mean bytes of their images.
    pub(crate) batches: u64,
    pub(crate) image_bytes_mean: f64,
    pub(crate) problems: Vec<String>,
}

/// One node's log.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct VerifiedNode {
    pub(crate) node: u64,
    pub(crate) batches: usize,
    /// Where its log begins: behind that index.
    pub(crate) start: u64,
    /// The last index on its disk.
    pub(crate) last: u64,
    /// Whether its log has something in common with the one whose commands were read.
    pub(crate) compared: bool,
    /// The last index that it reported as durable and committed.
    pub(crate) kept: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ok {
            let unknown = match (self.unknown, self.unknown_purged) {
                (0, _) => String::new(),
                (unknown, 0) => {
                    format!("; of {unknown} with unknown outcome {} are there", self.unknown_present)
                }
                (unknown, untold) => format!(
                    "; of {unknown} with unknown outcome {} are there, and of {untold} nobody can tell",
                    self.unknown_present
                ),
            };
            let once = match self.purged {
                0 => format!("all {} acknowledged commands are in the log once", self.acked),
                purged => format!(
                    "of {} acknowledged commands {purged} lie behind snapshots, of which {} nodes have counted them, and the \
                     others are in the log once",
                    self.acked, self.counted
                ),
            };
            let compared = self.nodes.iter().filter(|node| node.compared).count();
            let apart = match self.nodes.len() - compared {
                0 => String::new(),
                apart => format!(" ({apart} ended before the others begin)"),
            };
            return write!(
                f,
                "Verified from disk: {once}{unknown}; the logs of {compared} nodes are equal by chain{apart}, and hold what each \
                 node reported as durable and committed.",
            );
        }
        writeln!(
            f,
            "VERIFICATION FAILED: {} acknowledged, {} of them present once.",
            self.acked, self.present
        )?;
        for problem in &self.problems {
            writeln!(f, "  {problem}")?;
        }
        Ok(())
    }
}

/// A node's data directory.
pub(crate) struct NodeDir {
    pub(crate) node: u64,
    pub(crate) dir: PathBuf,
    /// The end of what the node knew to be committed when it stopped in good order.
    pub(crate) committed: Option<u64>,
    /// What its disk must hold at the least; see [`NodeStatus::kept`](super::control::NodeStatus::kept).
    pub(crate) kept: u64,
    /// Commands that it has applied, if it had applied all that is committed.
    pub(crate) entries: Option<u64>,
}

/// What a generator did.
pub(crate) struct RunLedger {
    pub(crate) run: u32,
    /// In which its leader was elected: its commands are of no earlier term.
    pub(crate) term: u64,
    pub(crate) ledger: Ledger,
}

/// Reads all logs and compares them with the ledgers. Fails only where a directory cannot be read at all; everything
/// found wrong is in the result.
pub(crate) fn verify(
    nodes: &[NodeDir],
    runs: &[RunLedger],
    payload_bytes: usize,
) -> anyhow::Result<Verified> {
    let logs: Vec<anyhow::Result<Log>> = std::thread::scope(|scope| {
        let read: Vec<_> = nodes.iter().map(|node| scope.spawn(|| Log::read(&node.dir))).collect();
        read.into_iter().map(|thread| thread.join().expect("reading a log does not panic")).collect()
    });
    let logs: Vec<Log> = logs.into_iter().collect::<Result<_, _>>()?;
    let mut verified =
        Verified { chains_equal: true, on_majority: true, complete: true, ..Verified::default() };
    for (node, log) in nodes.iter().zip(&logs) {
        let (batches, start, last) = (log.batches.len(), log.start().get(), log.last().get());
        verified.nodes.push(VerifiedNode {
            node: node.node,
            batches,
            start,
            last,
            kept: node.kept,
            compared: true,
        });
        if start > log.snapshot.unwrap_or(0) {
            verified.complete = false;
            verified.problems.push(format!(
                "node {}: its log begins behind {start}, and no snapshot goes so far",
                node.node
            ));
        }
        verified.problems.extend(log.problems.iter().map(|problem| format!("node {}: {problem}", node.node)));
        // Of a snapshot that was being installed the log need not tell yet.
        if last.max(log.snapshot.unwrap_or(0)) < node.kept {
            verified.complete = false;
            verified.problems.push(format!(
                "node {}: it reported {} as durable and committed, but the log in {} ends at {last}",
                node.node,
                node.kept,
                node.dir.display()
            ));
        }
    }

    // What is committed: as the nodes said, or else as far as a majority's disks go.
    let mut ends: Vec<u64> = logs.iter().map(|log| log.last().get()).collect();
    ends.sort_unstable();
    let on_majority = ends[(ends.len() - 1) / 2];
    let committed = nodes.iter().filter_map(|node| node.committed).max().unwrap_or(on_majority);
    verified.committed = committed;
    if on_majority < committed {
        verified.on_majority = false;
        let problem = format!("index {committed} is committed, but a majority's disks end at {on_majority}");
        verified.problems.push(problem);
    }
    // The one that ends last, and of those the one that has purged least.
    let reference = logs
        .iter()
        .zip(nodes)
        .max_by_key(|(log, node)| (node.committed, log.last_term(), log.last(), Reverse(log.start())));
    let Some((reference, reference_node)) = reference else { return Ok(verified) };
    for ((log, node), shown) in logs.iter().zip(nodes).zip(&mut verified.nodes) {
        shown.compared = log.meets(reference);
        if let Some(index) = log.differs_from(reference, committed) {
            verified.chains_equal = false;
            let (node, other) = (node.node, reference_node.node);
            verified.problems.push(format!("the logs of nodes {node} and {other} differ at index {index}"));
        }
    }

    let mut check = Check::new(runs, payload_bytes, reference.start_term(), &mut verified);
    reference.for_each_command(LogIndex(committed), |bytes| check.command(bytes))?;
    check.finish();
    for node in nodes.iter().filter(|node| node.committed == Some(committed)) {
        let Some(entries) = node.entries else { continue };
        // Of what has an unknown outcome the log tells, but where it was purged.
        let least = verified.acked + verified.unknown_present;
        if (least..=least + verified.unknown_purged).contains(&entries) {
            verified.counted += 1;
        } else {
            verified.problems.push(format!(
                "node {}: it has applied {entries} commands, and there are {least}, with {} that nobody can tell of",
                node.node, verified.unknown_purged
            ));
        }
    }
    if verified.purged > 0 && verified.counted == 0 {
        let purged = verified.purged;
        verified
            .problems
            .push(format!("{purged} acknowledged commands were purged, and no node has counted them"));
    }
    let commands = reference.batches.iter().filter(|batch| batch.info.kind == BatchKind::Commands);
    let image_bytes = commands.map(|batch| u64::from(batch.info.image_bytes));
    let (count, bytes) = image_bytes.fold((0, 0), |(count, bytes), more| (count + 1, bytes + more));
    verified.batches = count;
    verified.image_bytes_mean = if count == 0 { 0.0 } else { bytes as f64 / count as f64 };
    verified.ok = verified.problems.is_empty();
    Ok(verified)
}

/// Compares the commands of a log with the ledgers.
struct Check<'a> {
    runs: HashMap<u32, RunCheck<'a>>,
    filler: Vec<u8>,
    verified: &'a mut Verified,
    shown: usize,
}

struct RunCheck<'a> {
    ledger: &'a Ledger,
    unknown: BTreeSet<(u64, u64)>,
    /// The log need not hold all of its commands any more.
    is_purged: bool,
    /// The highest sequence of each stream met so far.
    met: Vec<u64>,
}

impl<'a> Check<'a> {
    /// The log begins behind an entry of that term, which is none if nothing was purged.
    fn new(
        runs: &'a [RunLedger],
        payload_bytes: usize,
        purged: Option<u64>,
        verified: &'a mut Verified,
    ) -> Self {
        let runs = runs.iter().map(|RunLedger { run, term, ledger }| {
            // What was outstanding when a process was killed is unknown as well.
            let outstanding =
                (0..ledger.streams()).filter(|stream| ledger.sent(*stream) > ledger.settled(*stream));
            let outstanding = outstanding.map(|stream| (stream as u64, ledger.sent(stream)));
            let unknown: BTreeSet<_> = ledger.unknown().into_iter().chain(outstanding).collect();
            let settled: u64 = (0..ledger.streams()).map(|stream| ledger.settled(stream)).sum();
            let open =
                (0..ledger.streams()).filter(|stream| ledger.sent(*stream) > ledger.settled(*stream)).count();
            verified.unknown += unknown.len() as u64;
            verified.acked += settled + open as u64 - unknown.len() as u64;
            let is_purged = purged.is_some_and(|purged| purged >= *term);
            (*run, RunCheck { ledger, unknown, is_purged, met: vec![0; ledger.streams()] })
        });
        let runs = runs.collect();
        Self { runs, filler: load::filler(payload_bytes), verified, shown: 0 }
    }

    fn command(&mut self, bytes: &[u8]) {
        let Some((stream, sequence, rest)) = load::parse(bytes) else {
            self.verified.altered += 1;
            return self.problem(|| format!("a command of {} bytes, which nobody sent", bytes.len()));
        };
        let (run, number) = ((stream >> 32) as u32, stream as u32 as usize);
        let Some(check) = self.runs.get_mut(&run).filter(|check| number < check.met.len()) else {
            self.verified.never_sent += 1;
            return self.problem(|| format!("a command of stream {stream:#x}, which does not exist"));
        };
        if sequence == 0 || sequence > check.ledger.sent(number) {
            self.verified.never_sent += 1;
            return self
                .problem(|| format!("command ({stream:#x}, {sequence}) was never sent, or was refused"));
        }
        let met = check.met[number];
        if sequence <= met {
            self.verified.repeated += 1;
            return self.problem(|| format!("command ({stream:#x}, {sequence}) comes again, or after {met}"));
        }
        let missing = check.missing(number, met + 1, sequence);
        check.met[number] = sequence;
        if check.unknown.contains(&(number as u64, sequence)) {
            self.verified.unknown_present += 1;
        } else {
            self.verified.present += 1;
        }
        if check.is_purged && met == 0 {
            self.verified.unknown_purged += check.unknown(number, 1, sequence);
            self.verified.purged += missing;
        } else {
            self.missing(stream, met + 1, missing);
        }
        if rest != self.filler {
            self.verified.altered += 1;
            self.problem(|| format!("the bytes of command ({stream:#x}, {sequence}) are not those sent"));
        }
    }

    fn finish(mut self) {
        let mut left = Vec::new();
        for (run, check) in &self.runs {
            for number in 0..check.met.len() {
                let (from, end) = (check.met[number] + 1, check.ledger.settled(number) + 1);
                if check.is_purged && check.met[number] == 0 {
                    self.verified.unknown_purged += check.unknown(number, from, u64::MAX);
                    self.verified.purged += check.missing(number, from, end);
                } else if from < end {
                    let missing = check.missing(number, from, end);
                    left.push((u64::from(*run) << 32 | number as u64, from, missing));
                }
            }
        }
        for (stream, from, missing) in left {
            self.missing(stream, from, missing);
        }
        let Verified { missing, repeated, never_sent, altered, .. } = *self.verified;
        if self.shown > PROBLEMS_SHOWN {
            self.verified.problems.push(format!(
                "in all {missing} acknowledged commands missing, {repeated} repeated, {never_sent} never sent, \
                 {altered} altered"
            ));
        }
    }

    fn missing(&mut self, stream: u64, from: u64, count: u64) {
        if count > 0 {
            self.verified.missing += count;
            self.problem(|| {
                format!("{count} acknowledged commands missing of stream {stream:#x}, from {from} on")
            });
        }
    }

    fn problem(&mut self, problem: impl FnOnce() -> String) {
        if self.shown < PROBLEMS_SHOWN {
            self.verified.problems.push(problem());
        }
        self.shown += 1;
    }
}

impl RunCheck<'_> {
    /// How many of the sequences `from..end` of a stream were acknowledged.
    fn missing(&self, stream: usize, from: u64, end: u64) -> u64 {
        (end - from) - self.unknown(stream, from, end)
    }

    /// How many of them have an unknown outcome.
    fn unknown(&self, stream: usize, from: u64, end: u64) -> u64 {
        self.unknown.range((stream as u64, from)..(stream as u64, end)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringraft_block::{AlignedBuf, ClusterId, GroupId, Incarnation, NodeId, Pool, Term};
    use ringraft_wal::format::{
        BatchBuilder, Chain, Cut, Envelope, HARD_STATE_FILE_BYTES, HardState, LogStart, PriorContent, Seal,
        SegmentHeader, SegmentOrigin, content_checksum, prior_checksum_at, slots_start, write_envelope,
        write_hard_state, write_segment_header,
    };
    use std::convert::Infallible;
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    const PAYLOAD_BYTES: usize = 24;

    fn command(stream: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = stream.to_le_bytes().to_vec();
        bytes.extend(sequence.to_le_bytes());
        bytes.extend(load::filler(PAYLOAD_BYTES));
        bytes
    }

    /// One run, number 1, with two streams: (sent, settled) of each, and the unknown ones.
    fn check(streams: [(u64, u64); 2], unknown: &[(usize, u64)], log: &[(u64, u64)]) -> Verified {
        check_log(streams, unknown, log, None)
    }

    fn check_log(
        streams: [(u64, u64); 2],
        unknown: &[(usize, u64)],
        log: &[(u64, u64)],
        purged: Option<u64>,
    ) -> Verified {
        let ledger = Ledger::private(2).unwrap();
        for (stream, (sent, settled)) in streams.into_iter().enumerate() {
            ledger.set_sent(stream, sent);
            ledger.set_settled(stream, settled);
        }
        for (stream, sequence) in unknown {
            assert!(ledger.note_unknown(*stream, *sequence));
        }
        let runs = [RunLedger { run: 1, term: 1, ledger }];
        let mut verified = Verified::default();
        let mut check = Check::new(&runs, PAYLOAD_BYTES, purged, &mut verified);
        for (stream, sequence) in log {
            check.command(&command(*stream, *sequence));
        }
        check.finish();
        verified
    }

    const A: u64 = 1 << 32;
    const B: u64 = A + 1;

    #[test]
    fn a_log_with_each_acknowledged_command_once_is_good() {
        let verified = check([(2, 2), (1, 1)], &[], &[(A, 1), (B, 1), (A, 2)]);
        assert_eq!((verified.acked, verified.present, verified.problems.len()), (3, 3, 0), "{verified:?}");
    }

    #[test]
    fn what_has_an_unknown_outcome_may_or_may_not_be_there() {
        // Sequence 2 of A is listed; sequence 2 of B was outstanding when its process was killed.
        for (log, present) in [
            (&[(A, 1), (A, 2), (A, 3), (B, 1), (B, 2)][..], 2),
            (&[(A, 1), (A, 3), (B, 1)][..], 0),
            (&[(A, 1), (A, 3), (B, 1), (B, 2)][..], 1),
        ] {
            let verified = check([(3, 3), (2, 1)], &[(0, 2)], log);
            let counts = (verified.acked, verified.present, verified.unknown, verified.unknown_present);
            assert_eq!(counts, (3, 3, 2, present), "{verified:?}");
            assert!(verified.problems.is_empty(), "{verified:?}");
        }
    }

    #[test]
    fn a_missing_acknowledged_command_is_found_in_the_middle_and_at_the_end() {
        let verified = check([(4, 4), (0, 0)], &[], &[(A, 1), (A, 3)]);
        assert_eq!((verified.missing, verified.present, verified.acked), (2, 2, 4), "{verified:?}");
        assert_eq!(verified.problems.len(), 2);
    }

    #[test]
    fn of_a_purged_log_each_stream_counts_from_its_first_command_on() {
        let verified = check_log([(6, 6), (3, 3)], &[(0, 2)], &[(A, 4), (A, 5), (A, 6)], Some(1));
        let counts = (verified.acked, verified.present, verified.purged, verified.missing);
        assert_eq!(counts, (8, 3, 2 + 3, 0), "{verified:?}");
        assert_eq!((verified.unknown, verified.unknown_purged), (1, 1), "{verified:?}");
        assert!(verified.problems.is_empty(), "{verified:?}");
        // A gap behind that, and an end that is not there, are missed all the same.
        for log in [&[(A, 4), (A, 6)][..], &[(A, 4), (A, 5)], &[(A, 4), (A, 5), (A, 6), (A, 5)]] {
            let verified = check_log([(6, 6), (3, 3)], &[], log, Some(1));
            assert_eq!(verified.missing + verified.repeated, 1, "{verified:?}");
            assert_eq!(verified.problems.len(), 1, "{verified:?}");
        }
        // What was purged is of an earlier term than this leader's.
        let verified = check_log([(6, 6), (3, 3)], &[(0, 2)], &[(A, 4), (A, 5), (A, 6)], Some(0));
        assert_eq!((verified.purged, verified.missing, verified.problems.len()), (0, 5, 2), "{verified:?}");
    }

    #[test]
    fn a_command_that_comes_twice_is_found() {
        let verified = check([(2, 2), (0, 0)], &[], &[(A, 1), (A, 2), (A, 1)]);
        assert_eq!((verified.repeated, verified.present), (1, 2));
        let verified = check([(2, 2), (0, 0)], &[], &[(A, 1), (A, 2), (A, 2)]);
        assert_eq!((verified.repeated, verified.present), (1, 2));
    }

    #[test]
    fn a_command_that_was_refused_or_never_sent_is_found() {
        for stranger in [(A, 2), (A, 0), (A + 2, 1), (7, 1)] {
            let verified = check([(1, 1), (0, 0)], &[], &[(A, 1), stranger]);
            assert_eq!((verified.never_sent, verified.present), (1, 1), "{stranger:?}");
        }
    }

    /// Index `n` of the test log is the `n`th command of stream A.
    const BATCHES: u64 = 6;
    const SEGMENT_BYTES: u64 = 64 << 10;

    /// A data directory as a node leaves it: a hard state, a segment with `BATCHES` batches of one command each, of which so many were
    /// purged, and one made ready. Says where each slot begins.
    fn data_directory(dir: &Path, purged: u64) -> Vec<u64> {
        data_directory_at(dir, purged, 0)
    }

    /// With batches of another time, and so another log.
    fn data_directory_at(dir: &Path, purged: u64, time_ms: u64) -> Vec<u64> {
        let (cluster, node, incarnation, group) = (ClusterId(1), NodeId(1), Incarnation(3), GroupId(0));
        let start = LogStart { index: LogIndex(0), term: Term(0), chain: Chain([7; 16]) };
        let mut segment = vec![0; SEGMENT_BYTES as usize];
        let (nonce, epoch, boot, generation) = (5, 1, 1, 1);
        let origin = SegmentOrigin::Cut { cut: Cut::default(), after: start };
        write_segment_header(
            &mut segment,
            &SegmentHeader {
                cluster,
                node,
                incarnation,
                segment_bytes: SEGMENT_BYTES,
                nonce,
                epoch,
                boot,
                generation,
                group,
                prior_content: PriorContent::Zeros,
                origin,
            },
        );
        let (pool, mut log_start) = (Pool::new(0), start);
        let (mut offset, mut chain, mut offsets) = (slots_start(SEGMENT_BYTES), start.chain, Vec::new());
        for index in 1..=BATCHES {
            let block = pool.take(8192, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).unwrap();
            let mut builder = BatchBuilder::new(block);
            builder.push(&command(A, index), None).unwrap();
            let (mut block, info) = builder.seal(Seal {
                group,
                term: Term(1),
                first: LogIndex(index),
                kind: BatchKind::Commands,
                time_ms,
                previous_chain: chain,
            });
            write_envelope(
                &mut block,
                &Envelope {
                    cluster,
                    nonce,
                    generation,
                    group,
                    offset,
                    epoch,
                    boot,
                    durable_through: LogIndex(index - 1),
                    term: Term(1),
                    first: info.first,
                    last: info.last,
                    chain: info.chain,
                    image_bytes: info.image_bytes,
                },
            );
            let slot = info.slot_bytes();
            segment[offset as usize..][..slot].copy_from_slice(&block[..slot]);
            offsets.push(offset);
            (offset, chain) = (offset + slot as u64, info.chain);
            if index == purged {
                log_start = LogStart { index: info.last, term: Term(1), chain };
            }
        }
        std::fs::write(dir.join("segment-00000001.wal"), segment).unwrap();
        std::fs::write(dir.join("segment-00000002.wal"), vec![0; SEGMENT_BYTES as usize]).unwrap();
        let mut block = vec![0; HARD_STATE_FILE_BYTES];
        write_hard_state(
            &mut block,
            &HardState {
                cluster,
                node,
                incarnation,
                boot: 1,
                sequence: 1,
                group,
                term: Term(1),
                vote: None,
                epoch: 1,
                cut: Cut::default(),
                generation: 0,
                start: log_start,
                start_generation: 0,
                witness: LogIndex(0),
                claim: None,
                claim_epoch: 0,
                claim_cut: LogIndex(0),
                claim_may_settle: false,
                configuration: Vec::new(),
            },
        );
        std::fs::write(dir.join("hard-a"), block).unwrap();
        if purged > 0 {
            std::fs::write(dir.join(format!("snapshot-{purged:016x}.snap")), []).unwrap();
        }
        offsets
    }

    /// Three nodes that acknowledged everything and said so when they stopped; `change` is done to the third's
    /// directory.
    fn verify_three(kept: u64, change: impl FnOnce(&Path, &[u64])) -> Verified {
        verify_purged([0; 3], kept, change)
    }

    /// The same with logs of which so many batches were purged.
    fn verify_purged(purged: [u64; 3], kept: u64, change: impl FnOnce(&Path, &[u64])) -> Verified {
        verify_nodes(purged, |third, offsets| {
            third.kept = kept;
            change(&third.dir, offsets);
        })
    }

    /// `change` may be of what the third node said, too.
    fn verify_nodes(purged: [u64; 3], change: impl FnOnce(&mut NodeDir, &[u64])) -> Verified {
        let dir = tempfile::tempdir().unwrap();
        let mut offsets = Vec::new();
        let nodes = (1..=3).zip(purged).map(|(node, purged)| {
            let dir = dir.path().join(node.to_string());
            std::fs::create_dir(&dir).unwrap();
            offsets = data_directory(&dir, purged);
            NodeDir { node, dir, committed: Some(BATCHES), kept: BATCHES, entries: Some(BATCHES) }
        });
        let mut nodes: Vec<NodeDir> = nodes.collect();
        change(&mut nodes[2], &offsets);
        let ledger = Ledger::private(1).unwrap();
        // One more was on its way to a leader that was killed, and never came.
        ledger.set_sent(0, BATCHES + 1);
        ledger.set_settled(0, BATCHES);
        verify(&nodes, &[RunLedger { run: 1, term: 1, ledger }], PAYLOAD_BYTES).unwrap()
    }

    fn overwrite(file: &Path, offset: u64, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    #[test]
    fn three_equal_directories_are_good() {
        let verified = verify_three(BATCHES, |_, _| {});
        assert!(verified.ok && verified.complete && verified.chains_equal, "{verified:?}");
        assert_eq!((verified.acked, verified.present, verified.committed), (BATCHES, BATCHES, BATCHES));
    }

    #[test]
    fn logs_that_were_purged_to_different_places_are_compared_where_they_go() {
        let verified = verify_purged([2, 0, 4], BATCHES, |_, _| {});
        assert!(verified.ok && verified.chains_equal, "{verified:?}");
        assert_eq!((verified.present, verified.purged), (BATCHES, 0), "one has them all: {verified:?}");
        let verified = verify_purged([3; 3], BATCHES, |_, _| {});
        assert_eq!((verified.ok, verified.present, verified.purged), (true, BATCHES - 3, 3), "{verified:?}");
        let said = verified.to_string();
        assert!(said.contains("of 6 acknowledged commands 3 lie behind snapshots"), "{said}");
        assert!(said.contains("of which 3 nodes have counted them"), "{said}");
        // Purged beyond the end of another one, whose chain at that place is the only thing they have in common; and further.
        for (lost, purged, compared) in [(3, 4, true), (3, 5, false)] {
            let verified = verify_purged([purged, purged, 0], 0, |dir, slots| {
                overwrite(&dir.join("segment-00000001.wal"), slots[lost + 1], &[0; 4096]);
            });
            assert!(verified.ok, "{verified:?}");
            assert_eq!(verified.nodes[2].compared, compared, "{verified:?}");
            assert_eq!(verified.to_string().contains("(1 ended before"), !compared, "{verified}");
        }
        // Purged without a snapshot.
        let verified = verify_purged([2; 3], BATCHES, |dir, _| {
            std::fs::remove_file(dir.join("snapshot-0000000000000002.snap")).unwrap();
        });
        assert!(!verified.ok && verified.problems[0].contains("no snapshot goes so far"), "{verified:?}");
        // What is left is looked at as closely as ever.
        let verified = verify_purged([2; 3], BATCHES, |dir, slots| {
            overwrite(&dir.join("segment-00000001.wal"), slots[4], &[0; 4096]);
        });
        assert!(!verified.ok && !verified.complete, "{verified:?}");
    }

    #[test]
    fn a_minority_node_that_lost_batches_it_reported_as_durable_is_found() {
        let lost = |dir: &Path, slots: &[u64]| {
            overwrite(&dir.join("segment-00000001.wal"), slots[4], &[0; 4096]);
        };
        let verified = verify_three(BATCHES, lost);
        assert!(!verified.ok && !verified.complete, "{verified:?}");
        assert!(verified.chains_equal && verified.on_majority && verified.missing == 0, "{verified:?}");
        let [problem] = &verified.problems[..] else { panic!("{verified:?}") };
        for said in ["node 3", "reported 6 as durable", "ends at 4"] {
            assert!(problem.contains(said), "{said}: {problem}");
        }
        // What it had never reported, it may lack.
        let verified = verify_three(4, lost);
        assert!(verified.ok && verified.complete, "{verified:?}");
    }

    #[test]
    fn a_segment_whose_header_cannot_be_read_is_found_also_where_nothing_in_it_is_missed() {
        for (bytes, said) in [(&[0xff; 64][..], "magic"), (&[0; 512], "blank, but its slots are not")] {
            let verified = verify_three(0, |dir, _| overwrite(&dir.join("segment-00000001.wal"), 0, bytes));
            assert!(!verified.ok && verified.complete, "{verified:?}");
            let [problem] = &verified.problems[..] else { panic!("{verified:?}") };
            assert!(problem.contains("node 3: ") && problem.contains("segment-00000001.wal"), "{problem}");
            assert!(problem.contains(said), "{said}: {problem}");
        }
        let verified = verify_three(BATCHES, |dir, _| {
            overwrite(&dir.join("segment-00000002.wal"), 100, &[1]);
        });
        assert!(!verified.ok && verified.problems[0].contains("segment-00000002.wal"), "{verified:?}");
        let verified = verify_three(BATCHES, |dir, _| {
            overwrite(&dir.join("segment-00000001.wal"), SEGMENT_BYTES, &[0; 4096]);
        });
        assert!(!verified.ok && verified.problems[0].contains("65536 bytes"), "{verified:?}");
    }

    #[test]
    fn a_node_that_has_applied_more_or_fewer_commands_than_there_are_is_found() {
        for purged in [[0; 3], [3; 3]] {
            for entries in [BATCHES - 1, BATCHES + 1] {
                let verified = verify_nodes(purged, |third, _| third.entries = Some(entries));
                assert!(!verified.ok && verified.counted == 2, "{verified:?}");
                assert!(verified.problems[0].contains("node 3: it has applied"), "{verified:?}");
            }
            let verified = verify_nodes(purged, |third, _| third.entries = None);
            assert!(verified.ok && verified.counted == 2, "it had not come so far: {verified:?}");
        }
        // The third ends last, so the others are not at the end and nobody counts.
        let verified =
            verify_nodes([3; 3], |third, _| (third.committed, third.entries) = (Some(BATCHES + 1), None));
        assert!(!verified.ok && verified.counted == 0, "{verified:?}");
        assert!(
            verified.problems.iter().any(|problem| problem.contains("no node has counted")),
            "{verified:?}"
        );
    }

    #[test]
    fn logs_that_differ_are_found_where_both_go_and_where_one_begins() {
        for (purged, ends_at) in [([0; 3], None), ([3, 3, 0], None), ([0, 0, 3], None), ([3, 3, 0], Some(3))]
        {
            let verified = verify_nodes(purged, |third, _| {
                std::fs::remove_dir_all(&third.dir).unwrap();
                std::fs::create_dir(&third.dir).unwrap();
                let offsets = data_directory_at(&third.dir, purged[2], 5);
                if let Some(end) = ends_at {
                    overwrite(&third.dir.join("segment-00000001.wal"), offsets[end], &[0; 4096]);
                    (third.kept, third.committed) = (0, None);
                }
            });
            assert!(!verified.ok && !verified.chains_equal, "{purged:?}, {ends_at:?}: {verified:?}");
        }
    }

    /// The story: a file that is used again was taken into service, and its node was killed before it wrote the header.
    #[test]
    fn a_segment_without_a_header_may_hold_what_it_held_before() {
        let start = slots_start(SEGMENT_BYTES);
        let former = [0xab; 512];
        let known = content_checksum(&former).to_le_bytes();
        for is_known in [true, false] {
            let verified = verify_three(BATCHES, |dir, _| {
                let file = dir.join("segment-00000002.wal");
                overwrite(&file, start, &former.repeat(8));
                overwrite(&file, prior_checksum_at(start), &known.repeat(if is_known { 8 } else { 7 }));
            });
            assert_eq!(verified.ok, is_known, "{verified:?}");
        }
    }

    #[test]
    fn altered_bytes_are_found_and_many_problems_are_counted_rather_than_listed() {
        let ledger = Ledger::private(1).unwrap();
        ledger.set_sent(0, 100);
        ledger.set_settled(0, 100);
        let runs = [RunLedger { run: 1, term: 1, ledger }];
        let mut verified = Verified::default();
        let mut check = Check::new(&runs, PAYLOAD_BYTES, None, &mut verified);
        for sequence in 1..=100 {
            let mut bytes = command(A, sequence);
            *bytes.last_mut().unwrap() ^= 1;
            check.command(&bytes);
        }
        check.command(&[1, 2, 3]);
        check.finish();
        assert_eq!(verified.altered, 101);
        assert_eq!(verified.problems.len(), PROBLEMS_SHOWN + 1, "{verified:?}");
        assert!(verified.to_string().contains("VERIFICATION FAILED"));
    }
}
