//! The limit run small: what it leaves in its report, and that it leaves nothing else.

use super::*;

/// A directory beside the sources, as the system's temporary directory is often in memory.
fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

fn small(dir: &Path, nodes: usize) -> LimitOptions {
    let shapes = vec![Shape::of(4 * KIB, 1), Shape::of(16 * KIB, 4)];
    LimitOptions {
        measure: Duration::from_millis(50),
        disk: shapes.clone(),
        looking: vec![Shape::of(8 * KIB, 2)],
        replicated: shapes,
        file_bytes: 1 << 20,
        followers: FollowerKind::Thread,
        ..LimitOptions::full(dir, nodes)
    }
}

/// Files of `dir` that are still open: unlinked or not, a follower that had not ended would hold one. (Threads
/// of other tests run at the same time, so counting threads would not do.)
fn open_files_in(dir: &Path) -> usize {
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    targets.filter(|target| target.starts_with(dir)).count()
}

#[test]
fn a_report_is_filled_and_no_file_or_follower_is_left_for_each_number_of_nodes() {
    for nodes in [1, 3, 5] {
        let dir = on_disk();
        let report = measure(&small(dir.path(), nodes)).unwrap();
        assert_eq!(report.nodes, nodes);
        assert_eq!(report.rows.len(), 2 + 2 + 2 + 1);
        for row in &report.rows {
            assert!(row.count > 0 && row.cpu_us > 0.0 && row.bytes_per_s > 0.0, "{row:?}");
            assert_eq!(row.us_p50.is_some(), row.pattern != Pattern::Stream, "{row:?}");
            assert!(row.us_p50 <= row.us_p99, "{row:?}");
        }
        let commits = report.replicated(Shape::of(1, 1)).unwrap();
        assert_eq!((commits.nodes, commits.us_p50), (nodes, Some(report.commit_us_p50)));
        for figure in [
            report.flush_us_p50,
            report.write_bytes_per_s,
            report.rtt_us_p50,
            report.loopback_bytes_per_s,
            report.commit_cpu_us,
            report.bytes_per_s,
        ] {
            assert!(figure > 0.0, "{report:?}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(open_files_in(dir.path()), 0);
        let table = render(&report);
        assert!(table.contains("replicated commit") && table.contains("16 KiB"), "{table}");
        assert!(table.contains("replicated commit, looking") && table.contains("8 KiB"), "{table}");
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<LimitReport>(&json).unwrap().rows.len(), report.rows.len());
    }
}

#[test]
fn an_observer_hears_of_each_shape_of_the_pattern_and_can_end_the_measurement() {
    let dir = on_disk();
    let options = small(dir.path(), 3);
    let mut heard = Vec::new();
    let mut total = 0;
    let report = measure_observed(&options, &mut |moment| {
        match moment {
            Moment::Begins { shape, leader, followers } => {
                assert_eq!((leader, followers.len()), (rustix::thread::gettid().as_raw_pid() as u32, 0));
                heard.push(shape);
            }
            Moment::Ended { commits } => total += commits,
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(heard, [&options.replicated[..], &options.looking].concat());
    let of_commits = |row: &&LimitRow| matches!(row.pattern, Pattern::Replicate | Pattern::ReplicateLooking);
    let counted = report.rows.iter().filter(of_commits).map(|row| row.count);
    assert!(total >= counted.sum::<u64>(), "{total} commits with those of the warm-up");

    let error = measure_observed(&options, &mut |_| bail!("not today")).unwrap_err();
    assert!(error.to_string().contains("not today"), "{error:#}");
    assert_eq!(open_files_in(dir.path()), 0);
}

#[test]
fn a_file_system_in_memory_is_refused_with_its_cure() {
    let memory = Path::new("/dev/shm");
    let dir = match tempfile::tempdir_in(memory) {
        Ok(dir) => dir,
        Err(error) => return eprintln!("skipped: no directory in {}: {error}", memory.display()),
    };
    match measure(&small(dir.path(), 3)) {
        Err(error) => assert!(error.to_string().contains("--dir"), "{error:#}"),
        Ok(report) => assert_ne!(report.file_system, "tmpfs", "skipped: /dev/shm is on a disk"),
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_stopped_measurement_fails_and_leaves_nothing() {
    let dir = on_disk();
    let stop = Arc::new(AtomicBool::new(true));
    let options = LimitOptions { stop: Some(stop), ..small(dir.path(), 3) };
    let error = measure(&options).unwrap_err();
    assert!(error.to_string().contains("stopped"), "{error:#}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(open_files_in(dir.path()), 0);
}

#[test]
fn an_executable_that_is_no_follower_is_an_error_and_leaves_nothing() {
    let dir = on_disk();
    let followers = FollowerKind::Process("/bin/false".into());
    let error = measure(&LimitOptions { followers, ..small(dir.path(), 3) }).unwrap_err();
    assert!(error.to_string().contains("before it said hello"), "{error:#}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn impossible_options_are_refused() {
    let dir = on_disk();
    for options in [
        small(dir.path(), 2),
        LimitOptions { replicated: vec![Shape::of(4096, 1)], ..small(dir.path(), 3) },
        LimitOptions { disk: vec![Shape::of(4096, 1), Shape::of(4096, 33)], ..small(dir.path(), 3) },
        LimitOptions { measure: Duration::ZERO, ..small(dir.path(), 3) },
        small(&dir.path().join("absent"), 3),
    ] {
        assert!(measure(&options).is_err());
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_batch_is_rounded_up_to_whole_blocks() {
    assert_eq!(Shape::of(0, 1).batch_bytes, 4096);
    assert_eq!(Shape::of(4096, 1).batch_bytes, 4096);
    assert_eq!(Shape::of(4097, 1).batch_bytes, 8192);
}

#[test]
fn shapes_are_given_as_kib_and_depth() {
    assert_eq!(shape("64x2"), Ok(Shape { batch_bytes: 64 << 10, in_flight: 2 }));
    assert_eq!(shape("3x32"), Ok(Shape { batch_bytes: 4 << 10, in_flight: 32 }), "whole blocks");
    for wrong in ["", "64", "64x", "x2", "0x2", "64x0", "64x33", "65537x1", "64 x 2", "-1x2"] {
        assert!(shape(wrong).is_err(), "{wrong}");
    }
}
