//! What the benchmarks share, run small: replicas that are conducted, a follower that is started again, what a cluster asks of
//! the kernel. Nothing here depends on how fast the machine is.

use ringraft_bench::conducted::tracer::{ALL, Traced, Tracer, finish};
use ringraft_bench::conducted::{Replicas, ensure_room, ringraft};
use ringraft_bench::runs::work::Work;
use std::path::Path;
use std::time::Duration;

/// Small segments, nothing purged, and a leader that a busy machine does not unseat.
const SMALL: [&str; 12] = [
    "--command-kb",
    "64",
    "--batch-kb",
    "64",
    "--segment-mb",
    "4",
    "--segments-ahead",
    "2",
    "--snapshot-mb",
    "0",
    "--election-timeout",
    "3s",
];
const SPAN: Duration = Duration::from_millis(200);

fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn replicas(count: usize, dir: &Path) -> Replicas {
    let command = ringraft(env!("CARGO_BIN_EXE_ringraft"), "glommio", false, &SMALL);
    Replicas::start(&command, count, dir).unwrap()
}

/// On a busy machine nothing may come through in so short a time: then once more.
fn order(replicas: &mut Replicas, work: Work) -> u64 {
    (0..50).find_map(|_| Some(replicas.order(work, Duration::ZERO, SPAN).ok()?.entries)).expect("commits")
}

#[test]
fn one_node_and_several_commit_what_is_ordered_and_leave_no_process() {
    for count in [1, 3] {
        let dir = on_disk();
        let mut replicas = replicas(count, dir.path());
        assert!(order(&mut replicas, Work::from_thread(128, 16)) > 0);
        assert!(replicas.resident_bytes().unwrap() > 1 << 20);
        let processes = replicas.processes();
        assert_eq!(processes.len(), count);
        drop(replicas);
        for process in processes {
            assert!(!Path::new(&format!("/proc/{process}")).exists(), "{process} runs on");
        }
    }
}

#[test]
fn a_follower_that_is_started_again_has_applied_all_that_was_committed() {
    let dir = on_disk();
    let mut replicas = replicas(3, dir.path());
    replicas.write(4 << 20).unwrap();
    let before = replicas.processes();
    let restart = replicas.restart(2).unwrap();
    assert!(Duration::ZERO < restart.started && restart.started <= restart.applied, "{restart:?}");
    let after = replicas.processes();
    assert_eq!((before[0], before[2]), (after[0], after[2]));
    assert_ne!(before[1], after[1]);
    assert!(order(&mut replicas, Work::from_thread(128, 4)) > 0, "the cluster goes on");
    for not_a_follower in [0, 1, 4] {
        let error = replicas.restart(not_a_follower).unwrap_err();
        assert!(error.to_string().contains("does not follow"), "{error:#}");
    }
}

#[test]
fn what_every_replica_asks_of_the_kernel_can_be_counted() {
    let dir = on_disk();
    let tracer = match Tracer::find(dir.path()) {
        Ok(tracer) => tracer,
        Err(error) => return eprintln!("skipped: {error:#}"),
    };
    let mut replicas = replicas(3, dir.path());
    let all = replicas.processes().into_iter().map(Traced::Process);
    let tracing = all.map(|process| tracer.start(process, dir.path()).unwrap()).collect();
    let commits = order(&mut replicas, Work::from_thread(128, 1));
    for counts in finish(tracing).unwrap() {
        // A batch is received and answered by the one, and sent and answered for by the other.
        assert!(counts[ALL] >= commits && counts["io_uring_enter"] > 0, "{commits} commits: {counts:?}");
    }
}

#[test]
fn a_log_that_the_disk_cannot_hold_is_refused() {
    let dir = on_disk();
    ensure_room(dir.path(), 1).unwrap();
    let error = ensure_room(dir.path(), u64::MAX).unwrap_err();
    assert!(error.to_string().contains("more room"), "{error:#}");
}
