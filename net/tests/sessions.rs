//! Sessions between nodes: beginning, carrying frames, ending, beginning again.

mod common;

use common::*;
use ringraft_block::{Incarnation, NodeId};
use ringraft_net::handshake::{Handshake, HandshakeKind};
use ringraft_net::link::LinkErrorKind;
use ringraft_net::{DisconnectCause, NetLimits, PeerConfig, RejectReason, Rejection, SendError};

#[test]
fn two_nodes_meet_and_exchange_frames_both_ways() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    let session = first_session(2);
    world.node(1).note(2, b"from one").unwrap();
    world.node(2).batch(1, b"from two", &bytes(50_000, 7)).unwrap();
    world.run(10);
    let connected = |peer| Seen::Connected { peer, session, incarnation: incarnation(peer) };
    let frame = |peer, kind, body: &[u8], attachment| Seen::Frame {
        peer,
        session,
        kind,
        body: body.to_vec(),
        attachment,
    };
    let at_one = [Seen::Listening, connected(2), frame(2, BATCH, b"from two", bytes(50_000, 7))];
    assert_eq!(world.node(1).seen, at_one);
    assert_eq!(world.node(2).seen, [Seen::Listening, connected(1), frame(1, NOTE, b"from one", Vec::new())]);
    assert_eq!(world.hub.dials(0), [], "the lower id accepts");
    assert_eq!(world.hub.dials(1), [address(1)], "the higher dials");
    let stats = world.node(1).net.stats();
    assert_eq!((stats.frames_in, stats.frames_out, stats.sessions, stats.reconnects), (1, 1, 1, 0));
}

#[test]
fn frames_arrive_whole_when_bytes_dribble_one_by_one() {
    let mut world = World::new(2, &NetLimits::default());
    world.hub.chunks(1, None);
    world.connect_all();
    for number in 0..5 {
        world.node(1).batch(2, &[number], &bytes(700, usize::from(number))).unwrap();
        world.node(1).note(2, &bytes(usize::from(number), 9)).unwrap();
    }
    world.run(5000);
    let expected = (0..5u8).flat_map(|number| {
        let number_bytes = usize::from(number);
        [(1, vec![number], bytes(700, number_bytes)), (1, bytes(number_bytes, 9), Vec::new())]
    });
    assert_eq!(world.node(2).frames().collect::<Vec<_>>(), expected.collect::<Vec<_>>());
}

#[test]
fn frames_of_one_turn_leave_in_one_send_and_a_turn_delivers_no_more_than_its_share() {
    let limits = NetLimits { frames_per_turn_max: 10, ..NetLimits::default() };
    let mut world = World::new(2, &limits);
    world.connect_all();
    world.run(3);
    let (sends, parts) = world.hub.sends(0);
    for number in 0..200u8 {
        world.node(1).note(2, &[number]).unwrap();
    }
    world.run(2);
    assert_eq!(world.hub.sends(0), (sends + 1, parts + 1));
    assert_eq!(world.node(2).net.next_deadline(), 0, "there is more to deliver");
    world.run(30);
    let got: Vec<u8> = world.node(2).frames().map(|(_, body, _)| body[0]).collect();
    assert_eq!(got, (0..200).collect::<Vec<_>>());
    assert!(world.node(2).turn_frames_max <= 20, "a share before the turn and one in it");
    assert!(world.node(2).net.next_deadline() > world.now);
}

#[test]
fn attachments_of_every_size_around_the_staging_buffer_arrive_exactly() {
    let limits = NetLimits { staging_bytes: 1024, ..NetLimits::default() };
    for chunk in [usize::MAX, 1000, 333] {
        let mut world = World::new(2, &limits);
        world.hub.chunks(chunk, None);
        world.connect_all();
        let sizes: Vec<usize> = (1..40).chain(900..1100).chain([4095, 4096, 4097, 65_536, 100_000]).collect();
        for size in &sizes {
            while world.node(1).batch(2, &bytes(size % 60, 1), &bytes(*size, *size)) == Err(SendError::Full) {
                world.run(1);
            }
        }
        world.run(2000);
        let got: Vec<_> = world.node(2).frames().collect();
        assert_eq!(got.len(), sizes.len());
        for ((_, body, attachment), size) in got.into_iter().zip(sizes) {
            assert_eq!((body, attachment), (bytes(size % 60, 1), bytes(size, size)));
        }
    }
}

#[test]
fn a_full_queue_refuses_and_what_was_taken_arrives() {
    let limits = NetLimits { queue_frames_max: 50, ..NetLimits::default() };
    let mut world = World::new(2, &limits);
    assert_eq!(world.node(1).note(2, b"too early"), Err(SendError::NotConnected));
    assert_eq!(world.node(1).note(9, b"to nobody"), Err(SendError::NotConnected));
    world.connect_all();
    let mut taken = 0;
    while world.node(1).note(2, &[taken]).is_ok() {
        taken += 1;
    }
    assert_eq!(taken, 50);
    assert_eq!(world.node(1).note(2, b""), Err(SendError::Full));
    assert_eq!(world.node(1).net.peer_status(NodeId(2)).unwrap().queued_frames, 50);
    world.run(5);
    assert_eq!(world.node(2).frames().count(), 50);
    assert_eq!(world.node(1).net.stats().sends_refused, 2);
    world.node(1).note(2, b"room again").unwrap();
}

#[test]
fn a_slow_peer_fills_its_own_queue_and_costs_the_others_nothing() {
    let limits = NetLimits { queue_bytes_max: 200_000, ..NetLimits::default() };
    let mut world = World::new(3, &limits);
    world.hub.window(10_000);
    world.connect_all();
    world.node(3).net.pause(NodeId(1));
    let (mut refused, attachment) = (0, bytes(2000, 1));
    for number in 0..300u16 {
        world.node(1).batch(2, &number.to_le_bytes(), &attachment).unwrap();
        refused += usize::from(world.node(1).batch(3, b"slow", &attachment).is_err());
        world.run(1);
    }
    world.run(5);
    assert_eq!(world.node(2).frames().count(), 300);
    assert!(refused > 150);
    assert!(world.node(1).net.peer_status(NodeId(3)).unwrap().queued_bytes <= 200_000);
    assert_eq!(world.node(1).causes(), []);
}

#[test]
fn a_paused_peer_is_not_read_and_after_resume_nothing_is_missing() {
    let mut world = World::new(2, &NetLimits { send_timeout_ns: 100 * SECOND, ..NetLimits::default() });
    world.hub.window(1000);
    world.connect_all();
    world.run(3);
    world.node(2).net.pause(NodeId(1));
    for number in 0..100u8 {
        world.node(1).note(2, &[number; 100]).unwrap();
    }
    // Far longer than any time-out of reading: a session is not to blame for its reader's pause.
    world.run_for(20 * SECOND);
    assert!(world.node(2).frames().count() < 20, "only what a receive under way brought");
    assert_eq!(world.node(2).frames().count(), 0);
    assert_eq!(world.hub.unread(0), 1000, "the transport fills up");
    world.node(2).net.resume(NodeId(1));
    assert_eq!(world.node(2).net.next_deadline(), 0);
    world.run(100);
    assert_eq!(world.node(2).frames().count(), 100);
    assert_eq!(world.node(2).causes(), []);
}

#[test]
fn a_frame_waits_for_its_block_and_its_peer_with_it() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    world.node(2).blocks.deny = true;
    world.node(1).batch(2, b"first", &bytes(3000, 1)).unwrap();
    world.node(1).note(2, b"second").unwrap();
    world.run_for(20 * SECOND);
    assert_eq!(world.node(2).frames().count(), 0);
    assert_eq!(world.node(2).net.stats().block_waits, 1);
    assert!(world.node(2).net.next_deadline() <= world.now + MILLISECOND);
    world.node(2).blocks.deny = false;
    world.run(5);
    let bodies: Vec<_> = world.node(2).frames().map(|(_, body, _)| body).collect();
    assert_eq!(bodies, [b"first".to_vec(), b"second".to_vec()]);
    assert_eq!((world.node(1).causes(), world.node(2).causes()), (vec![], vec![]));
}

#[test]
fn nodes_with_nothing_to_say_keep_their_session() {
    let mut world = World::new(3, &NetLimits::default());
    world.connect_all();
    world.step_ns = 50 * MILLISECOND;
    world.run_for(120 * SECOND);
    for node in 1..=3 {
        assert_eq!(world.node(node).causes(), []);
        assert_eq!(world.node(node).frames().count(), 0, "keepalives are not delivered");
    }
}

#[test]
fn deadlines_alone_are_enough_to_keep_a_session() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    // The driver sleeps until the earlier of the two deadlines instead of turning all the time. A completion ends
    // the sleep, so every deadline is followed by a few turns.
    let end = world.now + 60 * SECOND;
    while world.now < end {
        let next = world.nodes.iter().map(|node| node.net.next_deadline()).min().unwrap();
        assert!(next < u64::MAX);
        world.step_ns = next.saturating_sub(world.now).max(1);
        world.run(1);
        world.step_ns = 1;
        world.run(3);
    }
    assert_eq!(world.node(1).causes(), []);
    assert_eq!(world.node(1).net.stats().sessions, 1);
}

#[test]
fn a_reset_in_the_middle_of_a_frame_ends_the_session_and_a_new_one_begins_afresh() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    world.hub.chunks(100, None);
    world.node(1).batch(2, b"cut off", &bytes(5000, 1)).unwrap();
    world.run(10);
    world.hub.reset(0);
    world.run(2);
    for node in [1, 2] {
        let [DisconnectCause::Link(error)] = &world.node(node).causes()[..] else { panic!("one cause") };
        assert_eq!(error.kind, LinkErrorKind::Disconnected);
    }
    assert_eq!(world.node(1).note(2, b""), Err(SendError::NotConnected));
    assert_eq!(world.node(2).blocks.pool.stats().used_bytes, 0, "the block of the cut frame is free again");
    world.connect_all();
    world.node(1).note(2, b"anew").unwrap();
    world.run(5);
    assert_eq!(world.node(2).frames().collect::<Vec<_>>(), [(1, b"anew".to_vec(), Vec::new())]);
    assert_eq!(world.node(2).session(1), Some(first_session(2) + 1));
    assert_eq!(world.node(1).net.stats().reconnects, 1);
}

#[test]
fn dials_wait_longer_after_every_failure_and_start_over_after_a_session_that_lasted() {
    let limits = NetLimits::default();
    let mut world = World::new(2, &limits);
    let one = world.nodes.remove(0);
    let dial_times = |world: &mut World, until_ns: u64| {
        let (mut times, mut count) = (Vec::new(), world.hub.dials(1).len());
        let end = world.now + until_ns;
        while world.now < end {
            world.run(1);
            let dials = world.hub.dials(1).len();
            times.extend((count..dials).map(|_| world.now));
            count = dials;
        }
        times.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<u64>>()
    };
    let gaps = dial_times(&mut world, 10 * SECOND);
    let mut full = limits.reconnect_delay_min_ns;
    for gap in &gaps {
        assert!((full / 2..=full + 3 * MILLISECOND).contains(gap), "{gap} of {full}: {gaps:?}");
        full = (full * 2).min(limits.reconnect_delay_max_ns);
    }
    assert!(gaps.len() > 12);
    world.nodes.insert(0, one);
    world.connect_all();
    // A session that breaks at once does not count as a success.
    world.hub.reset(world.hub.open_streams()[0]);
    world.run_for(300 * MILLISECOND);
    assert_eq!(world.node(2).session(1), None);
    world.connect_all();
    world.run_for(3 * SECOND);
    world.hub.reset(world.hub.open_streams()[0]);
    world.run_for(30 * MILLISECOND);
    assert!(world.node(2).session(1).is_some(), "back at once after one that lasted");
}

#[test]
fn dials_without_an_answer_are_given_up_and_bounded_in_number() {
    let limits = NetLimits { lingering_max: 3, ..NetLimits::default() };
    let mut world = World::new(2, &limits);
    world.hub.silence(address(1), true);
    world.step_ns = 10 * MILLISECOND;
    world.run_for(60 * SECOND);
    assert_eq!(world.hub.dials(1).len(), 3, "as many as may linger");
    world.hub.silence(address(1), false);
    world.run(2);
    assert_eq!(world.node(2).session(1), None);
    world.hub.fail_unanswered_dials();
    world.connect_all();
    assert_eq!(world.node(2).net.stats().dials_failed, 3);
}

#[test]
fn a_dial_that_is_answered_too_late_is_closed() {
    let mut world = World::new(2, &NetLimits { lingering_max: 1, ..NetLimits::default() });
    world.nodes.remove(0);
    world.hub.silence(address(1), true);
    world.run_for(1100 * MILLISECOND);
    assert_eq!(world.nodes[0].net.stats().dials_failed, 1);
    world.hub.answer_unanswered_dials();
    world.run(2);
    assert!(world.hub.dialer_closed(0));
    world.run_for(SECOND);
    assert_eq!(world.hub.dials(1).len(), 2, "and no longer in the way of the next");
}

#[test]
fn accepting_goes_on_after_failures_and_waits_when_the_system_is_exhausted() {
    let mut world = World::new(2, &NetLimits { accept_retry_ns: SECOND / 2, ..NetLimits::default() });
    world.hub.fail_accepts(address(1), &[LinkErrorKind::Disconnected, LinkErrorKind::Exhausted]);
    world.run_for(400 * MILLISECOND);
    assert_eq!(world.node(1).session(2), None);
    world.run_for(200 * MILLISECOND);
    assert!(world.node(1).session(2).is_some());
}

#[test]
fn a_listener_that_fails_is_reported_and_tried_again() {
    let mut world = World::new(2, &NetLimits { listen_retry_ns: SECOND, ..NetLimits::default() });
    world.hub.listen(address(1));
    world.run_for(2500 * MILLISECOND);
    assert_eq!(world.node(1).seen, [Seen::ListenFailed, Seen::ListenFailed, Seen::ListenFailed]);
    world.hub.stop_listening(address(1));
    world.connect_all();
}

#[test]
fn a_pinned_incarnation_is_the_only_one() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    world.node(1).net.pin(NodeId(2), incarnation(2));
    world.node(2).net.pin(NodeId(1), incarnation(1));
    world.run(10);
    assert_eq!(world.node(1).causes(), [], "the session is with the incarnation that was pinned");
    world.node(1).net.pin(NodeId(2), Incarnation(77));
    assert_eq!(world.node(1).note(2, b""), Err(SendError::NotConnected), "at once");
    assert_eq!(world.node(1).net.next_deadline(), 0, "the rest with the next turn");
    world.run_for(SECOND);
    assert_eq!(world.node(1).causes(), [DisconnectCause::Pinned]);
    let known = Incarnation(77);
    let reason = RejectReason::WrongIncarnation { known };
    assert_eq!(world.node(1).rejections()[0], Rejection::Refused(reason));
    assert_eq!(world.node(2).rejections()[0], Rejection::RefusedByPeer { peer: NodeId(1), reason });
    world.node(1).net.pin(NodeId(2), incarnation(2));
    world.connect_all();
}

#[test]
fn a_wiped_peer_is_refused_by_the_dialer_too() {
    let mut world = World::new(2, &NetLimits::default());
    let mut wrong = peer(1);
    wrong.incarnation = Some(Incarnation(5));
    let two = Node::new(&world.hub, config(2, NetLimits::default()), vec![wrong]);
    world.nodes[1] = two;
    world.run_for(SECOND);
    assert_eq!(world.node(1).session(2), None);
    let reason = RejectReason::WrongIncarnation { known: incarnation(1) };
    assert_eq!(world.node(2).rejections()[0], Rejection::RefusedByPeer { peer: NodeId(1), reason });
    assert_eq!(world.node(1).net.stats().sessions, 0);
}

#[test]
fn peers_come_go_and_move() {
    let mut world = World::new(3, &NetLimits::default());
    world.connect_all();
    world.node(2).net.remove_peer(NodeId(1));
    assert_eq!(world.node(2).note(1, b""), Err(SendError::NotConnected));
    world.run_for(SECOND);
    assert_eq!(world.node(2).causes(), [DisconnectCause::Removed]);
    assert_eq!(world.node(1).session(2), None);
    assert!(world.node(1).session(3).is_some());
    // Back, first at an address where nobody is.
    let nowhere = PeerConfig { address: address(40), ..peer(1) };
    world.node(2).net.add_peer(nowhere.clone()).unwrap();
    assert!(world.node(2).net.add_peer(nowhere).is_err());
    world.hub.silence(address(40), true);
    world.run_for(100 * MILLISECOND);
    assert_eq!(world.node(1).session(2), None);
    world.node(2).net.set_addresses(NodeId(1), &[address(1)], &[]);
    world.run(10);
    assert!(world.node(1).session(2).is_some(), "dialed at once");
    let session = world.node(1).session(2);
    world.node(2).net.set_addresses(NodeId(1), &[address(41)], &[]);
    world.run_for(SECOND);
    assert_eq!(world.node(1).session(2), session, "a session goes on");
}

#[test]
fn a_peer_is_looked_for_at_all_its_addresses_and_then_again_where_a_session_has_lasted() {
    let mut world = World::new(2, &NetLimits::default());
    let (nobody, no_answer) = (address(40), address(41));
    world.hub.silence(no_answer, true);
    world.node(2).net.set_addresses(NodeId(1), &[nobody, no_answer, address(1)], &[]);
    world.connect_all();
    assert_eq!(world.hub.dials(1), [nobody, no_answer, address(1)]);
    assert_eq!(world.node(2).net.dialed_at(NodeId(1)), Some(address(1)));
    assert_eq!(world.node(1).net.dialed_at(NodeId(2)), None, "it was dialed");
    world.run_for(3 * SECOND);
    let lose =
        |world: &World| world.hub.open_streams().into_iter().for_each(|stream| world.hub.reset(stream));
    lose(&world);
    world.run(2);
    world.connect_all();
    assert_eq!(world.hub.dials(1)[3..], [address(1)], "where it was");
    // Whoever does not stay may be somebody else.
    lose(&world);
    world.run(2);
    world.connect_all();
    assert_eq!(world.hub.dials(1)[4..], [nobody, no_answer, address(1)]);
}

/// Who is somewhere is told by the handshake alone: another member, another life of the peer, the peer.
#[test]
fn whoever_else_is_at_an_address_of_a_peer_is_refused_by_name_and_changes_nothing() {
    let mut world = World::new(3, &NetLimits::default());
    let impostor = address(40);
    world.hub.listen(impostor);
    world.node(3).net.pin(NodeId(1), incarnation(1));
    world.node(3).net.set_addresses(NodeId(1), &[address(2), impostor, address(1)], &[]);
    let mut raw = None;
    world.run_until("the impostor is dialed", |world| {
        raw = world.hub.accept(impostor);
        raw.is_some()
    });
    let raw = raw.expect("dialed");
    world.run(3);
    let hello = raw.read_handshake().expect("a hello");
    assert_eq!((hello.from, hello.to), (NodeId(3), NodeId(1)));
    assert_eq!(world.node(3).session(1), None);
    let other_life = Handshake {
        kind: HandshakeKind::Welcome,
        from: NodeId(1),
        to: NodeId(3),
        incarnation: Incarnation(9),
        ..hello
    };
    raw.write(&Handshake { incarnation_expected: Incarnation(0), ..other_life }.encode());
    world.connect_all();
    let refused = [
        Rejection::RefusedByPeer {
            peer: NodeId(1),
            reason: RejectReason::WrongDestination { node: NodeId(2) },
        },
        Rejection::Refused(RejectReason::WrongIncarnation { known: incarnation(1) }),
    ];
    assert_eq!(world.node(3).rejections(), refused);
    let met: Vec<(u64, Incarnation)> = world
        .node(3)
        .seen
        .iter()
        .filter_map(|seen| match seen {
            Seen::Connected { peer, incarnation, .. } => Some((*peer, *incarnation)),
            _ => None,
        })
        .collect();
    assert_eq!(met, [(2, incarnation(2)), (1, incarnation(1))]);
    assert_eq!(world.node(2).net.stats().sessions, 2, "with the two others");
    assert_eq!(world.node(3).causes(), []);
}

/// However many others are named behind it, and however often.
#[test]
fn the_first_address_of_a_peer_keeps_its_turn() {
    let mut world = World::new(2, &NetLimits::default());
    world.nodes.remove(0);
    for number in 0..2_000 {
        let rumour = address(100 + number);
        world.nodes[0].net.set_addresses(NodeId(1), &[address(1), rumour, address(99)], &[]);
        world.run(1);
    }
    let dials = world.hub.dials(1);
    let first = dials.iter().filter(|dialed| **dialed == address(1)).count();
    assert!(first >= 4 && first * 3 >= dials.len() - 2, "{first} of {}", dials.len());
}

#[test]
fn a_peer_that_was_disconnected_may_come_back_after_a_wait() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    let one = world.node(1);
    one.net.disconnect(NodeId(2), &mut one.link);
    assert_eq!(one.note(2, b""), Err(SendError::NotConnected));
    assert_eq!(one.net.next_deadline(), 0, "the event waits for the next turn");
    world.run(2);
    assert_eq!(world.node(1).causes(), [DisconnectCause::Disconnected]);
    assert_eq!(world.node(2).causes(), [DisconnectCause::Ended]);
    world.connect_all();
}

#[test]
fn closing_sends_what_is_queued_and_a_goodbye() {
    let mut world = World::new(3, &NetLimits::default());
    world.connect_all();
    world.node(2).note(1, b"last words").unwrap();
    world.node(2).batch(3, b"and bytes", &bytes(90_000, 1)).unwrap();
    let two = world.node(2);
    two.net.close(&mut two.link);
    assert_eq!(two.note(1, b""), Err(SendError::NotConnected));
    assert!(!two.net.is_closed());
    world.run(10);
    for node in [1, 3] {
        assert_eq!(world.node(node).frames().count(), 1);
        assert_eq!(world.node(node).causes(), [DisconnectCause::Goodbye]);
    }
    assert_eq!(world.node(2).causes(), [DisconnectCause::Closing, DisconnectCause::Closing]);
    assert!(world.node(2).net.is_closed());
    let late: Vec<_> = (0..3).map(|_| world.hub.connect(address(2), "127.0.0.1:5")).collect();
    world.run_for(3 * SECOND);
    assert!(late[0].is_closed(), "the accept under way brought one more");
    assert_eq!(world.node(2).net.stats().accepted, 2, "beside node 3 it was the last");
    assert_eq!(world.node(2).net.stats().sessions, 2, "nothing begins any more");
    assert!(world.node(1).session(3).is_some());
}

#[test]
fn the_same_seed_gives_the_same_operations() {
    let run = || {
        let mut world = World::new(3, &NetLimits::default());
        world.hub.chunks(500, Some(11));
        let mut random = Random::new(5);
        for turn in 0..3000u32 {
            if random.one_in(200)
                && let Some(stream) = world.hub.open_streams().first()
            {
                world.hub.reset(*stream);
            }
            let _ = world.node(1).batch(3, &turn.to_le_bytes(), &bytes(random.below(9000), 1));
            world.run(1);
        }
        (world.hub.trace(), world.node(1).net.stats().sessions)
    };
    let (trace, sessions) = run();
    assert_eq!((trace, sessions), run());
    assert!(sessions > 5);
}
