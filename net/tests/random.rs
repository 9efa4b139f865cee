//! Random runs: chunks, windows, resets, pauses and shortages. Every failure prints its seed.

mod common;

use common::*;
use ringraft_block::NodeId;
use ringraft_net::NetLimits;
use std::collections::BTreeMap;

/// Bodies and attachments by sender, receiver and session.
type Frames = BTreeMap<(u64, u64, u64), Vec<(Vec<u8>, Vec<u8>)>>;

/// Nodes send numbered frames to each other while their streams break. What a node gets in a session must be the
/// frames that were taken for that session, from the first on, none missing, doubled or changed.
fn run(seed: u64) -> (usize, usize) {
    let mut random = Random::new(seed);
    let nodes = 2 + random.below(3) as u64;
    let limits = NetLimits {
        staging_bytes: 512 + random.below(5000),
        frames_per_turn_max: 1 + random.below(40),
        queue_frames_max: 5 + random.below(200),
        queue_bytes_max: 110_000 + random.below(400_000),
        send_parts_max: 1 + random.below(64),
        send_bytes_max: 1 + random.below(100_000),
        idle_timeout_ns: 300 * MILLISECOND,
        frame_timeout_ns: 2 * SECOND,
        ..NetLimits::default()
    };
    let mut world = World::new(nodes, &limits);
    world.hub.chunks(1 + random.below(20_000), Some(seed ^ 0xabcd));
    world.hub.window(200 + random.below(100_000));
    // What was taken for each (from, to, session), in order.
    let mut taken: Frames = BTreeMap::new();
    let mut number = 0usize;
    let (faults, rest) = (1500, 600);
    for turn in 0..faults + rest {
        if turn == faults {
            world.hub.chunks(usize::MAX, None);
            world.hub.window(1 << 20);
            for node in 1..=nodes {
                (1..=nodes).for_each(|peer| world.node(node).net.resume(NodeId(peer)));
                world.node(node).blocks.deny = false;
            }
        }
        if turn < faults {
            let streams = world.hub.open_streams();
            if !streams.is_empty() && random.one_in(150) {
                world.hub.reset(streams[random.below(streams.len())]);
            }
            let node = 1 + random.below(nodes as usize) as u64;
            let peer = NodeId(1 + random.below(nodes as usize) as u64);
            match random.below(30) {
                0 => world.node(node).net.pause(peer),
                1..4 => world.node(node).net.resume(peer),
                4 => world.node(node).blocks.deny = true,
                5..9 => world.node(node).blocks.deny = false,
                _ => {}
            }
        }
        let sends = if turn < faults { random.below(8) } else { 0 };
        for _ in 0..sends {
            let (from, to) =
                (1 + random.below(nodes as usize) as u64, 1 + random.below(nodes as usize) as u64);
            if from == to {
                continue;
            }
            let Some(session) = world.node(from).session(to) else { continue };
            number += 1;
            let body = [&number.to_le_bytes()[..], &bytes(random.below(56), number)].concat();
            let size = [0, 1 + random.below(300), 1 + random.below(30_000)][random.below(3)];
            let attachment = if random.one_in(2) { bytes(size, number) } else { Vec::new() };
            let sent = if attachment.is_empty() {
                world.node(from).note(to, &body)
            } else {
                world.node(from).batch(to, &body, &attachment)
            };
            if sent.is_ok() {
                taken.entry((from, to, session)).or_default().push((body, attachment));
            }
        }
        world.run(1);
    }
    let mut delivered = 0;
    for node in 1..=nodes {
        let mut got: Frames = BTreeMap::new();
        let mut current: BTreeMap<u64, u64> = BTreeMap::new();
        for seen in world.node(node).seen.clone() {
            match seen {
                Seen::Connected { peer, session, .. } => {
                    assert_eq!(current.insert(peer, session), None, "seed {seed}: one session at a time");
                }
                Seen::Disconnected { peer, session, .. } => {
                    assert_eq!(current.remove(&peer), Some(session), "seed {seed}: the one that began");
                }
                Seen::Frame { peer, session, body, attachment, .. } => {
                    assert_eq!(current.get(&peer), Some(&session), "seed {seed}: within its session");
                    got.entry((peer, node, session)).or_default().push((body, attachment));
                    delivered += 1;
                }
                _ => {}
            }
        }
        for (key, sent) in taken.iter().filter(|(key, _)| key.1 == node) {
            if current.get(&key.0) == Some(&key.2) {
                let count = got.get(key).map_or(0, Vec::len);
                assert_eq!(count, sent.len(), "seed {seed}: {key:?} goes on, so nothing is missing");
            }
        }
        for (key, frames) in got {
            let sent = taken.get(&key).unwrap_or_else(|| panic!("seed {seed}: {key:?} was sent"));
            assert!(frames.len() <= sent.len(), "seed {seed}: {key:?} doubled");
            for (at, (got, sent)) in frames.iter().zip(sent).enumerate() {
                assert_eq!(got.0, sent.0, "seed {seed}: {key:?}, frame {at}");
                assert_eq!(got.1.len(), sent.1.len(), "seed {seed}: {key:?}, frame {at}");
                assert!(got.1 == sent.1, "seed {seed}: {key:?}, frame {at}");
            }
        }
    }
    (delivered, world.nodes.iter().map(|node| node.net.stats().reconnects as usize).sum())
}

#[test]
fn whatever_the_weather_frames_of_a_session_are_exact_and_in_order() {
    let (mut delivered, mut reconnects) = (0, 0);
    for seed in 0..60 {
        let (frames, again) = run(seed);
        delivered += frames;
        reconnects += again;
    }
    // A run that met no fault proves nothing.
    assert!(delivered > 20_000, "{delivered} frames");
    assert!(reconnects > 300, "{reconnects} reconnects");
}
