//! The table of a small raw file.

use super::*;
use crate::runs::parse;
use crate::runs::tests::{cells, header};

const OURS: Figures = Figures {
    per_s: 1000.0,
    bytes_per_s: 128_000.0,
    p50_us: 110.0,
    p99_us: 300.0,
    cpu_us: 90.0,
    cpu_s_per_gb: 700.0,
};

/// Two rounds and the header before them, as lines of a raw file.
fn fixture() -> String {
    let mut lines = vec![serde_json::json!({ "run": header(TOOL) }).to_string()];
    for (round, p50_us, floor_us) in [(1, 110.0, 100.0), (2, 130.0, 100.0)] {
        let floor = LimitRow {
            pattern: Pattern::Replicate,
            nodes: 3,
            shape: SMALL,
            count: 1,
            per_s: 1.0,
            bytes_per_s: 1.0,
            us_p50: Some(floor_us),
            us_p99: Some(100.0),
            cpu_us: 60.0,
        };
        let commands = |side: &str, work, figures| {
            let (side, is_peer) = (side.to_owned(), side != "uring");
            Record::Commands { round, side, is_peer, work, figures }
        };
        let quick = Figures { per_s: 400.0, ..OURS };
        // Once it was the quicker one, by chance.
        let slow = Figures { per_s: if round == 1 { 100.0 } else { 450.0 }, p99_us: 200.0, ..OURS };
        for record in [
            Record::Floor {
                round,
                rows: vec![
                    LimitRow { shape: Shape::of(12 * KIB, 1), per_s: 10.0, ..floor.clone() },
                    LimitRow {
                        pattern: Pattern::ReplicateLooking,
                        us_p50: Some(80.0),
                        us_p99: Some(150.0),
                        cpu_us: 120.0,
                        ..floor.clone()
                    },
                    LimitRow {
                        pattern: Pattern::ReplicateLooking,
                        shape: Shape::of(12 * KIB, 1),
                        per_s: 16.0,
                        ..floor.clone()
                    },
                    floor,
                ],
            },
            Record::Idle { round, side: "uring".to_owned(), processors: 0.006 * round as f64 },
            commands("uring", ON_CORE, Figures { p50_us, ..OURS }),
            commands("uring", Work::from_thread(128, 64), OURS),
            commands("slow", Work::from_thread(128, 64), slow),
            commands("quick", Work::from_thread(128, 64), quick),
        ] {
            lines.push(serde_json::to_string(&record).unwrap());
        }
    }
    lines.join("\n")
}

#[test]
fn a_table_has_medians_of_ratios_of_one_round_and_says_what_is_met() {
    let runs = parse(TOOL, &fixture()).unwrap();
    let table = tables(&runs);
    let rows: Vec<String> = cells(&table)[1..].iter().map(|row| row.join("; ")).collect();
    assert_eq!(
        rows,
        [
            "128 B x 1, on core; p50, µs; floor, 4 KiB x 1; 120; 100; 1.20; 1.10 to 1.30; 1.25; 1.10; met",
            "128 B x 1, on core; p99, µs; floor, 4 KiB x 1; 300; 100; 3.00; 3.00 to 3.00; 1.50; 1.50; missed",
            "128 B x 1, on core; CPU each, µs; floor, 4 KiB x 1; 90.00; 60.00; 1.50; 1.50 to 1.50; 1.60; 1.25; met",
            // Whichever of the others is better over all rounds, for each figure by itself.
            "128 B x 64; commands/s; quick; 1000; 400; 2.50; 2.50 to 2.50; 2.00; 2.50; goal",
            "128 B x 64; p99, µs; slow; 300; 200; 1.50; 1.50 to 1.50; 0.60; 0.60; missed",
            "idle; CPU per node; -; 0.30 %; -; -; 0.20 % to 0.40 %; 0.50 %; -; met",
            "commands/s, of the floor's; floor; uring; the other program; required",
            // Ten batches of 64 commands, and sixteen.
            "128 B x 64; 640, as 12 KiB x 1; 1.56; 0.62; 1.25",
            "128 B x 64; 1024, as 12 KiB x 1, looking; 0.98; 0.39; 0.78",
            "128 B x 1, on core, of the floor's; floor; floor, looking; uring; required",
            "p50, µs; 100; 0.80; 1.20; 1.25",
            "p99, µs; 100; 1.50; 3.00; 1.50",
            "CPU each, µs; 60.00; 2.00; 1.50; 1.60",
        ]
    );
}

#[test]
fn rounds_of_several_runs_are_rounds_of_their_own() {
    let twice = format!("{}\n{}", fixture(), fixture());
    let runs = parse(TOOL, &twice).unwrap();
    assert_eq!((runs.len(), rounds(&runs).len()), (2, 4));
    assert_eq!(tables(&runs), tables(&runs[..1]));
}

#[test]
fn every_goal_is_ordered_from_whom_it_concerns() {
    let [core, thread, peer] =
        [(false, true), (false, false), (true, false)].map(|(is_peer, on_core)| work_of(is_peer, on_core));
    assert_eq!(core, [ON_CORE]);
    for goal in GOALS {
        assert!([&core, &thread].iter().any(|all| all.contains(&goal.work)));
        let of_peers = |other: &Goal| other.work == goal.work && matches!(other.against, Against::Peer);
        assert_eq!(peer.contains(&goal.work), GOALS.iter().any(of_peers));
    }
}
