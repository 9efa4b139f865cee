//! One member of a cluster under test, as a process: orders come in on standard input, answers go out on standard
//! output, one line each. It ends when its standard input does.
//!
//! ```text
//! load FIRST COUNT   begins a closed loop of COUNT streams, from stream FIRST on; answers `ack STREAM SEQUENCE`
//!                    for each acknowledged command, and `unknown STREAM SEQUENCE` or `lost` where one is not
//! stop               ends the load; answers `stopped`, once its status shows all that it acknowledged as applied
//! status             answers `status ROLE TERM LEADER LAST COMMIT APPLIED CHAIN`
//! applied            answers `applied INDEX CHAIN COUNT` and that many lines `at STREAM SEQUENCE`, in log order
//! change add=ID@ADDRESS,… remove=ID,…
//!                    changes the members; answers `changed at INDEX` or `changed not: WHY`
//! quit               stops in good order; answers `quit`
//! ```
//!
//! Without an order it says `full` when commands are refused for lack of space (and tries again), and `died ERROR` when
//! the node stops by itself; then it ends with an exit status that is not 0.

use anyhow::{Context, Result, bail, ensure};
use ringraft::error::{ProposeError, Refusal};
use ringraft::handle::{Completion, Pipeline};
use ringraft::state_machine::{CommittedBatch, Replies};
use ringraft::{Config, MembershipChange, NewMember, Node, NodeId, StateMachine};
use ringraft_tests::process::{NodeArgs, PATIENCE};
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Remembers every command that it was given, in order.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Applied>>);

#[derive(Default)]
struct Applied {
    index: u64,
    chain: [u8; 16],
    commands: Vec<(u64, u64)>,
}

impl StateMachine for Journal {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        let mut applied = self.0.lock().expect("no holder panics");
        for command in batch.commands() {
            assert!(
                command.index.get() > applied.index,
                "index {} comes after {}",
                command.index,
                applied.index
            );
            applied.index = command.index.get();
            let number =
                |at: usize| u64::from_le_bytes(command.bytes[at..at + 8].try_into().expect("eight bytes"));
            applied.commands.push((number(0), number(8)));
            replies.push_empty();
        }
        applied.chain = batch.chain();
    }
}

fn main() -> Result<()> {
    run(&NodeArgs::from_env()?)
}

/// The member of that command line.
pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    let mut config = Config::new(args.cluster, args.id, args.members.clone(), &args.dir);
    config.backend = Some(args.engine.backend);
    config.segment_bytes = args.engine.segment_bytes;
    config.segments_ahead = args.engine.segments_ahead;
    config.batch_bytes_max = args.engine.batch_bytes_max;
    config.command_bytes_max = args.engine.command_bytes_max;
    config.disk_stall_stop = Duration::from_millis(args.engine.disk_stall_stop_ms);
    config.join = args.join;
    let journal = Journal::default();
    let machine = journal.clone();
    let node = Node::start(config, move || machine).with_context(|| format!("node {}", args.id))?;
    let handle = node.handle();
    say("ready");
    let watcher = std::thread::spawn(move || {
        let cause = node.join();
        if !cause.is_orderly() {
            say(&format!("died {:?}", cause.error()));
            std::process::exit(1);
        }
    });
    let stop_load = Arc::new(AtomicBool::new(false));
    let mut load = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["load", first, count] => {
                let (first, count): (u64, u64) = (first.parse()?, count.parse()?);
                stop_load.store(false, Ordering::Relaxed);
                let (pipeline, stop) = (handle.pipeline(), Arc::clone(&stop_load));
                load = Some(std::thread::spawn(move || run_load(pipeline, first, count, &stop)));
            }
            ["stop"] => {
                stop_load.store(true, Ordering::Relaxed);
                if let Some(load) = load.take() {
                    // Acknowledgements leave before the status tells of them.
                    let last: u64 = load.join().expect("the load does not panic");
                    let (status, shown) = handle.wait_status(PATIENCE, |status| status.applied.get() >= last);
                    ensure!(shown, "acknowledged up to {last}, applied up to {}", status.applied);
                }
                say("stopped");
            }
            ["status"] => {
                let status = handle.status();
                let leader = status.leader.map_or(0, |leader| leader.id.get());
                let chain = hex(&status.applied_chain);
                let (term, last, commit, applied) = (status.term, status.last, status.commit, status.applied);
                say(&format!("status {:?} {term} {leader} {last} {commit} {applied} {chain}", status.role));
            }
            ["applied"] => {
                let applied = journal.0.lock().expect("no holder panics");
                let mut text =
                    format!("applied {} {} {}", applied.index, hex(&applied.chain), applied.commands.len());
                for (stream, sequence) in &applied.commands {
                    text.push_str(&format!("\nat {stream} {sequence}"));
                }
                say(&text);
            }
            ["change", ref words @ ..] => {
                let outcome = handle.change_membership(change_of(words)?).wait();
                say(&match outcome {
                    Ok(changed) => format!("changed at {}", changed.index),
                    Err(error) => format!("changed not: {error}"),
                });
            }
            ["quit"] => break,
            _ => bail!("unknown order {line:?}"),
        }
    }
    stop_load.store(true, Ordering::Relaxed);
    handle.shutdown();
    watcher.join().expect("the watcher does not panic");
    say("quit");
    Ok(())
}

/// `add=4@127.0.0.1:7004 remove=2`
fn change_of(words: &[&str]) -> Result<MembershipChange> {
    let mut change = MembershipChange::default();
    for word in words {
        let (what, ids) = word.split_once('=').context("what=ids")?;
        for id in ids.split(',') {
            match (what, id.split_once('@')) {
                ("add", Some((id, address))) => {
                    change.add.push(NewMember::voter(NodeId(id.parse()?), address.parse()?));
                }
                ("remove", None) => change.remove.push(NodeId(id.parse()?)),
                _ => bail!("unknown change {word:?}"),
            }
        }
    }
    Ok(change)
}

/// Every stream has one command under way; the next sequence follows when its outcome is known. Returns the index of the
/// last that was acknowledged.
fn run_load(mut pipeline: Pipeline, first: u64, count: u64, stop: &AtomicBool) -> u64 {
    let mut next: BTreeMap<u64, u64> = (first..first + count).map(|stream| (stream, 0)).collect();
    let mut idle: Vec<u64> = next.keys().copied().collect();
    let mut under_way = 0_u64;
    let mut last = 0;
    let mut done = Vec::new();
    let mut full = false;
    loop {
        if !stop.load(Ordering::Relaxed) {
            for stream in std::mem::take(&mut idle) {
                let sequence = next[&stream];
                let mut command = Vec::with_capacity(16);
                command.extend(stream.to_le_bytes());
                command.extend(sequence.to_le_bytes());
                match pipeline.submit(stream, command) {
                    Ok(()) => under_way += 1,
                    Err(refused) if is_passing(&refused.reason, &mut full) => idle.push(stream),
                    Err(_) => {
                        say("lost");
                        return last;
                    }
                }
            }
        } else if under_way == 0 {
            return last;
        }
        pipeline.wait(&mut done, Duration::from_millis(100));
        let mut text = Vec::new();
        for Completion { tag: stream, outcome } in done.drain(..) {
            under_way -= 1;
            let sequence = next.entry(stream).or_default();
            match outcome {
                Ok(committed) => {
                    full = false;
                    last = last.max(committed.index.get());
                    text.push(format!("ack {stream} {sequence}"));
                }
                Err(ProposeError::Unknown(_) | ProposeError::ReplyGone { .. }) => {
                    text.push(format!("unknown {stream} {sequence}"))
                }
                Err(ProposeError::Refused(refused)) => {
                    if !is_passing(&refused.reason, &mut full) {
                        say("lost");
                        return last;
                    }
                    idle.push(stream);
                    continue;
                }
            }
            *sequence += 1;
            idle.push(stream);
        }
        if !text.is_empty() {
            say(&text.join("\n"));
        }
    }
}

/// Whether a command that was refused for this may be taken later. `full` is whether this was said.
fn is_passing(reason: &Refusal, full: &mut bool) -> bool {
    if *reason == Refusal::NoSpace && !std::mem::replace(full, true) {
        say("full");
    }
    matches!(reason, Refusal::Busy | Refusal::NoSpace)
}

/// One write, so that lines of different threads do not mix.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    // The parent may be gone; then so are we, soon.
    let _ = out.write_all(format!("{text}\n").as_bytes()).and_then(|()| out.flush());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
