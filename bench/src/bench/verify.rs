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

mod log;

use super::ledger::Ledger;
use crate::load;
use log::Log;
use ringraft_block::LogIndex;
use ringraft_wal::format::BatchKind;
use serde::Serialize;
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
    /// Commands whose outcome their proposer never learnt, and how many of them are in the log.
    pub(crate) unknown: u64,
    pub(crate) unknown_present: u64,
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
    /// The last index on its disk.
    pub(crate) last: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ok {
            let unknown = match self.unknown {
                0 => String::new(),
                unknown => format!("; of {unknown} with unknown outcome {} are there", self.unknown_present),
            };
            return write!(
                f,
                "Verified from disk: all {} acknowledged commands are in the log once{unknown}; the logs of {} nodes are \
                 equal by chain.",
                self.acked,
                self.nodes.len()
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
}

/// What a generator did.
pub(crate) struct RunLedger {
    pub(crate) run: u32,
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
    let mut verified = Verified { chains_equal: true, on_majority: true, ..Verified::default() };
    for (node, log) in nodes.iter().zip(&logs) {
        let (batches, last) = (log.batches.len(), log.last().get());
        verified.nodes.push(VerifiedNode { node: node.node, batches, last });
        verified.problems.extend(log.problems.iter().map(|problem| format!("node {}: {problem}", node.node)));
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
    let reference =
        logs.iter().zip(nodes).max_by_key(|(log, node)| (node.committed, log.last_term(), log.last()));
    let Some((reference, reference_node)) = reference else { return Ok(verified) };
    for (log, node) in logs.iter().zip(nodes) {
        if let Some(index) = log.differs_from(reference, committed) {
            verified.chains_equal = false;
            let (node, other) = (node.node, reference_node.node);
            verified.problems.push(format!("the logs of nodes {node} and {other} differ at index {index}"));
        }
    }

    let mut check = Check::new(runs, payload_bytes, &mut verified);
    reference.for_each_command(LogIndex(committed), |bytes| check.command(bytes))?;
    check.finish();
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
    /// The highest sequence of each stream met so far.
    met: Vec<u64>,
}

impl<'a> Check<'a> {
    fn new(runs: &'a [RunLedger], payload_bytes: usize, verified: &'a mut Verified) -> Self {
        let runs = runs.iter().map(|RunLedger { run, ledger }| {
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
            (*run, RunCheck { ledger, unknown, met: vec![0; ledger.streams()] })
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
        self.missing(stream, met + 1, missing);
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
                if from < end {
                    left.push((
                        u64::from(*run) << 32 | number as u64,
                        from,
                        check.missing(number, from, end),
                    ));
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
        let unknown = self.unknown.range((stream as u64, from)..(stream as u64, end)).count();
        (end - from) - unknown as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD_BYTES: usize = 24;

    fn command(stream: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = stream.to_le_bytes().to_vec();
        bytes.extend(sequence.to_le_bytes());
        bytes.extend(load::filler(PAYLOAD_BYTES));
        bytes
    }

    /// One run, number 1, with two streams: (sent, settled) of each, and the unknown ones.
    fn check(streams: [(u64, u64); 2], unknown: &[(usize, u64)], log: &[(u64, u64)]) -> Verified {
        let ledger = Ledger::private(2).unwrap();
        for (stream, (sent, settled)) in streams.into_iter().enumerate() {
            ledger.set_sent(stream, sent);
            ledger.set_settled(stream, settled);
        }
        for (stream, sequence) in unknown {
            assert!(ledger.note_unknown(*stream, *sequence));
        }
        let runs = [RunLedger { run: 1, ledger }];
        let mut verified = Verified::default();
        let mut check = Check::new(&runs, PAYLOAD_BYTES, &mut verified);
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

    #[test]
    fn altered_bytes_are_found_and_many_problems_are_counted_rather_than_listed() {
        let ledger = Ledger::private(1).unwrap();
        ledger.set_sent(0, 100);
        ledger.set_settled(0, 100);
        let runs = [RunLedger { run: 1, ledger }];
        let mut verified = Verified::default();
        let mut check = Check::new(&runs, PAYLOAD_BYTES, &mut verified);
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
