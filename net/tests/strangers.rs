//! What others may send: wrong identities, other protocols, damaged, late, endless and replayed bytes.

mod common;

use common::*;
use ringraft_block::{ClusterId, Incarnation, NodeId};
use ringraft_net::frame::KIND_KEEPALIVE;
use ringraft_net::handshake::{HANDSHAKE_BYTES, Handshake, HandshakeKind};
use ringraft_net::{
    DisconnectCause, FrameError, HandshakeError, NetLimits, Referral, RejectReason, Rejection,
};

#[test]
fn a_wrong_hello_gets_its_reason_and_changes_nothing() {
    type Change = fn(&mut Handshake);
    let cases: [(Change, RejectReason); 9] = [
        (|hello| hello.cluster = ClusterId(9), RejectReason::WrongCluster),
        (|hello| hello.to = NodeId(3), RejectReason::WrongDestination { node: NodeId(1) }),
        (|hello| hello.from = NodeId(77), RejectReason::UnknownPeer),
        (
            |hello| hello.incarnation = Incarnation(9),
            RejectReason::WrongIncarnation { known: incarnation(2) },
        ),
        (
            |hello| hello.incarnation_expected = Incarnation(9),
            RejectReason::WrongIncarnation { known: incarnation(1) },
        ),
        (|hello| hello.version_min = 2, RejectReason::VersionUnsupported { min: 1, max: 1 }),
        (|hello| hello.format_fingerprint = 9, RejectReason::FormatMismatch { fingerprint: FINGERPRINT }),
        (|hello| hello.lane = 2, RejectReason::LaneUnsupported { lane: 2 }),
        (|hello| hello.session.0 = 5 << 32, RejectReason::StaleSession { newest: 5 << 32 }),
    ];
    let mut world = World::alone(3, &NetLimits { rejections_per_second: 100, ..NetLimits::default() });
    let session = 5 << 32;
    world.node(1).net.pin(NodeId(2), incarnation(2));
    let member = world.raw_session(2, session);
    for (change, reason) in cases {
        let mut hello = hello(2, 1, 6 << 32);
        change(&mut hello);
        let raw = world.hub.connect(address(1), "127.0.0.1:50001");
        raw.write(&hello.encode());
        world.run(5);
        let answer = raw.read_handshake().expect("an answer");
        assert_eq!(answer.kind, HandshakeKind::Reject(reason));
        assert_eq!(answer.cluster, ClusterId(0), "a stranger learns nothing");
        assert!(raw.is_closed());
        assert_eq!(world.node(1).rejections().pop(), Some(Rejection::Refused(reason)));
    }
    member.write_frame(session, 0, NOTE, b"undisturbed", b"");
    world.run(2);
    assert_eq!(world.node(1).session(2), Some(session));
    assert_eq!(world.node(1).frames().count(), 1);
    assert_eq!(world.node(1).net.stats().sessions, 1);
    // Nor did the refused hello with session 6.0 use that number up.
    world.raw_session(2, 6 << 32);
}

#[test]
fn other_protocols_are_closed_at_their_first_bytes_without_an_answer() {
    let mut world = World::alone(2, &NetLimits { rejections_per_second: u32::MAX, ..NetLimits::default() });
    let tls = [0x16, 0x03, 0x01, 0x02];
    let mut nearly = hello(2, 1, 9).encode();
    nearly[7] ^= 0x20;
    for garbage in [b"GET / HTTP/1.1\r\n\r\n", &tls[..], b"\0", b"ringnet ", &nearly] {
        let raw = world.hub.connect(address(1), "10.0.0.9:1");
        raw.write(garbage);
        world.run(4);
        assert!(raw.is_closed(), "{garbage:?}");
        assert_eq!(raw.read(), b"");
        assert_eq!(
            world.node(1).rejections().pop(),
            Some(Rejection::Malformed(HandshakeError::Magic)),
            "{garbage:?}"
        );
    }
    for at in 8..HANDSHAKE_BYTES {
        let mut damaged = hello(2, 1, 9).encode();
        damaged[at] ^= 0x40;
        let raw = world.hub.connect(address(1), "10.0.0.9:1");
        raw.write(&damaged);
        world.run(4);
        assert!(raw.is_closed());
        assert_eq!(raw.read(), b"");
    }
    assert_eq!(world.node(1).net.stats().sessions, 0);
    let answers = [HandshakeKind::Welcome, HandshakeKind::Reject(RejectReason::UnknownPeer)];
    for kind in answers {
        let raw = world.hub.connect(address(1), "10.0.0.9:1");
        raw.write(&Handshake { kind, ..hello(2, 1, 9) }.encode());
        world.run(4);
        assert!(raw.is_closed());
        assert_eq!(raw.read(), b"");
    }
    type Change = fn(&mut Handshake);
    let nobody: [Change; 3] =
        [|h| h.from = NodeId(0), |h| h.incarnation = Incarnation(0), |h| h.session.0 = 0];
    for change in nobody {
        let mut hello = hello(2, 1, 9);
        change(&mut hello);
        let raw = world.hub.connect(address(1), "10.0.0.9:1");
        raw.write(&hello.encode());
        world.run(4);
        assert!(raw.is_closed());
        assert_eq!(world.node(1).rejections().pop(), Some(Rejection::Malformed(HandshakeError::Identity)));
    }
}

#[test]
fn reports_of_rejections_are_few_and_their_count_is_full() {
    let mut world = World::alone(2, &NetLimits::default());
    for _ in 0..100 {
        world.hub.connect(address(1), "10.0.0.9:1").write(b"GET /");
        world.run(3);
    }
    let rejected = world.node(1).net.stats().rejected;
    assert_eq!(rejected, 100);
    assert!(world.node(1).rejections().len() <= 8, "4 in each second that it took");
}

#[test]
fn a_session_ends_at_the_first_byte_that_is_no_frame_of_it() {
    let session = 5 << 32;
    let good = frame(session, 1, NOTE, b"second", b"");
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let cases = [
        (flipped(0), FrameError::Magic),
        (flipped(17), FrameError::HeaderChecksum),
        (flipped(FRAME_HEADER_BYTES), FrameError::BodyChecksum),
        (frame(session, 2, NOTE, b"", b""), FrameError::Sequence { expected: 1, got: 2 }),
        (frame(session, 0, NOTE, b"", b""), FrameError::Sequence { expected: 1, got: 0 }),
        (frame(session - 1, 1, NOTE, b"", b""), FrameError::Session),
        (frame(session, 1, 99, b"", b""), FrameError::UnknownKind(99)),
        (frame(session, 1, NOTE, &[0; 257], b""), FrameError::BodyTooLarge { kind: NOTE, bytes: 257 }),
        (frame(session, 1, NOTE, b"", b"x"), FrameError::AttachmentTooLarge { kind: NOTE, bytes: 1 }),
        (
            frame(session, 1, KIND_KEEPALIVE, b"x", b""),
            FrameError::BodyTooLarge { kind: KIND_KEEPALIVE, bytes: 1 },
        ),
        (b"GET / HTTP/1.1\r\nHost: a.member.of.the.cluster\r\n\r\n".to_vec(), FrameError::Magic),
    ];
    for (bytes, error) in cases {
        let mut world = World::alone(2, &NetLimits::default());
        let raw = world.raw_session(2, session);
        raw.write_frame(session, 0, NOTE, b"first", b"");
        raw.write(&bytes);
        raw.write(&good);
        world.run(4);
        assert!(raw.is_closed());
        assert_eq!(world.node(1).frames().count(), 1, "the one before it: {error}");
        assert_eq!(world.node(1).causes(), [DisconnectCause::Frame(error)]);
        let stats = world.node(1).net.stats();
        assert_eq!(stats.checksum_errors + stats.frame_errors, 1);
        assert_eq!(world.node(1).blocks.pool.stats().used_bytes, 0);
    }
}

#[test]
fn a_stream_that_ends_within_a_frame_gives_nothing_of_it() {
    let whole = frame(9, 0, BATCH, b"body", &bytes(3000, 1));
    for cut in [1, FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + 4, FRAME_HEADER_BYTES + 5, whole.len() - 1] {
        let mut world = World::alone(2, &NetLimits { staging_bytes: 512, ..NetLimits::default() });
        let raw = world.raw_session(2, 9);
        raw.write(&whole[..cut]);
        world.run(20);
        raw.close();
        world.run(3);
        assert_eq!(world.node(1).frames().count(), 0);
        assert_eq!(world.node(1).causes(), [DisconnectCause::Ended]);
        assert_eq!(world.node(1).blocks.pool.stats().used_bytes, 0);
    }
}

#[test]
fn a_newer_session_replaces_the_older_whose_late_frames_count_no_more() {
    let mut world = World::alone(3, &NetLimits::default());
    let older = world.raw_session(2, 5 << 32);
    let newer = world.raw_session(2, (5 << 32) + 1);
    assert!(older.is_closed());
    older.write_frame(5 << 32, 0, NOTE, b"late", b"");
    newer.write_frame((5 << 32) + 1, 0, NOTE, b"new", b"");
    world.run(4);
    let connected = |session| Seen::Connected { peer: 2, session, incarnation: incarnation(2) };
    assert_eq!(
        world.node(1).seen[1..],
        [
            connected(5 << 32),
            Seen::Disconnected { peer: 2, session: 5 << 32, cause: DisconnectCause::Replaced },
            connected((5 << 32) + 1),
            Seen::Frame {
                peer: 2,
                session: (5 << 32) + 1,
                kind: NOTE,
                body: b"new".to_vec(),
                attachment: vec![]
            },
        ]
    );
    // A recording of either session, played again, is refused, also after the end of both.
    newer.close();
    world.run(4);
    for session in [5 << 32, (5 << 32) + 1] {
        let replay = world.hub.connect(address(1), "127.0.0.1:50000");
        replay.write(&hello(2, 1, session).encode());
        replay.write(&frame(session, 0, NOTE, b"again", b""));
        world.run(4);
        let newest = (5 << 32) + 1;
        assert_eq!(
            replay.read_handshake().unwrap().kind,
            HandshakeKind::Reject(RejectReason::StaleSession { newest })
        );
    }
    assert_eq!(world.node(1).frames().count(), 1);
}

#[test]
fn frames_that_arrive_with_the_replacing_hello_are_not_delivered() {
    let mut world = World::alone(2, &NetLimits::default());
    let older = world.raw_session(2, 5 << 32);
    // Both in the same turn: the order of arrival decides, and nothing of the older follows its end.
    older.write_frame(5 << 32, 0, NOTE, b"in time or not", b"");
    let newer = world.hub.connect(address(1), "127.0.0.1:50000");
    newer.write(&hello(2, 1, 6 << 32).encode());
    world.run(3);
    let end = world.node(1).seen.iter().position(|seen| matches!(seen, Seen::Disconnected { .. })).unwrap();
    let late = world.node(1).seen[end..].iter().any(|seen| matches!(seen, Seen::Frame { .. }));
    assert!(!late);
    assert_eq!(world.node(1).session(2), Some(6 << 32));
}

#[test]
fn a_handshake_that_crawls_is_cut_off_whatever_its_pace() {
    let limits = NetLimits { rejections_per_second: 100, ..NetLimits::default() };
    for pace in [0, 900 * MILLISECOND, 10 * MILLISECOND] {
        let mut world = World::alone(2, &limits);
        let raw = world.hub.connect(address(1), "10.0.0.9:1");
        world.run(2);
        let started = world.now;
        for byte in hello(2, 1, 9).encode() {
            if pace > 0 && !raw.is_closed() {
                raw.write(&[byte]);
                world.run_for(pace);
            }
        }
        world.run_until("the end of its patience", |_| raw.is_closed());
        assert!(world.now - started <= limits.handshake_timeout_ns + pace.max(5 * MILLISECOND) * 128);
        assert_eq!(world.node(1).rejections(), [Rejection::TimedOut]);
        assert_eq!(world.node(1).net.stats().sessions, 0);
    }
}

#[test]
fn a_frame_that_crawls_is_cut_off_though_bytes_keep_coming() {
    for attachment in [0, 5000] {
        let mut world = World::alone(2, &NetLimits::default());
        let raw = world.raw_session(2, 9);
        let started = world.now;
        for byte in frame(9, 0, BATCH, &[1; 60], &bytes(attachment, 1)) {
            if raw.is_closed() {
                break;
            }
            raw.write(&[byte]);
            world.run_for(900 * MILLISECOND);
        }
        assert!(raw.is_closed());
        assert_eq!(world.node(1).causes(), [DisconnectCause::FrameTimeout]);
        assert!(world.now - started < 8 * SECOND);
    }
}

#[test]
fn a_frame_has_its_time_from_its_own_first_byte() {
    let mut world = World::alone(2, &NetLimits::default());
    let raw = world.raw_session(2, 9);
    world.run_for(2800 * MILLISECOND);
    let slow = frame(9, 0, NOTE, b"", b"");
    for byte in &slow {
        raw.write(&[*byte]);
        world.run_for(100 * MILLISECOND);
    }
    assert_eq!(world.node(1).frames().count(), 1);
}

#[test]
fn a_pause_is_not_held_against_the_peer() {
    let mut world = World::alone(2, &NetLimits::default());
    let raw = world.raw_session(2, 9);
    world.node(1).net.pause(NodeId(2));
    let early = frame(9, 0, NOTE, b"body", b"");
    raw.write(&early[..20]);
    world.run_for(10 * SECOND);
    world.node(1).net.resume(NodeId(2));
    world.run_for(SECOND);
    raw.write(&early[20..]);
    world.run(2);
    assert_eq!((world.node(1).frames().count(), world.node(1).causes()), (1, vec![]));
}

#[test]
fn a_silent_peer_is_given_up_and_so_is_one_that_never_reads() {
    let mut world = World::alone(2, &NetLimits::default());
    world.raw_session(2, 9);
    let started = world.now;
    world.run_until("the end of its patience", |world| !world.node(1).causes().is_empty());
    assert_eq!(world.node(1).causes(), [DisconnectCause::IdleTimeout]);
    assert!((2900 * MILLISECOND..3100 * MILLISECOND).contains(&(world.now - started)));

    let mut world = World::alone(2, &NetLimits::default());
    let raw = world.raw_session(2, 9);
    world.hub.window(100);
    world.node(1).batch(2, b"", &bytes(5000, 1)).unwrap();
    for sequence in 0..12 {
        raw.write_frame(9, sequence, KIND_KEEPALIVE, b"", b"");
        world.run_for(SECOND);
    }
    assert_eq!(world.node(1).causes(), [DisconnectCause::SendTimeout]);
}

#[test]
fn a_flood_of_strangers_holds_few_connections_and_keeps_no_member_out() {
    let limits = NetLimits { handshakes_max: 8, ..NetLimits::default() };
    let mut world = World::alone(2, &limits);
    let mut strangers = Vec::new();
    for number in 0..500 {
        strangers.push(world.hub.connect(address(1), "10.0.0.9:1"));
        if number == 300 {
            strangers.push(world.hub.connect(address(1), "127.0.0.1:5"));
            strangers[301].write(&hello(2, 1, 9).encode());
        }
        if number % 3 == 0 {
            world.run(1);
            let held = strangers.iter().filter(|raw| !raw.is_closed()).count();
            let waiting = strangers.len() - world.node(1).net.stats().accepted as usize;
            assert!(held <= waiting + limits.handshakes_max * 2, "{held} of which {waiting} wait");
        }
    }
    world.run(600);
    assert_eq!(world.node(1).session(2), Some(9));
    let held = strangers.iter().filter(|raw| !raw.is_closed()).count();
    assert_eq!(held, limits.handshakes_max + 1, "the last few strangers and the member");
}

#[test]
fn strangers_do_not_crowd_out_a_slow_handshake_from_a_peers_address() {
    let mut world = World::alone(2, &NetLimits { handshakes_max: 4, ..NetLimits::default() });
    let member = world.hub.connect(address(1), "127.0.0.1:5");
    for _ in 0..100 {
        world.hub.connect(address(1), "10.0.0.9:1");
        world.run(2);
    }
    member.write(&hello(2, 1, 9).encode());
    world.run(3);
    assert_eq!(world.node(1).session(2), Some(9));
}

/// Whoever had named an address of its own as a member's was as good as one: its connections pushed out those of members.
#[test]
fn an_address_that_is_a_peers_by_hearsay_is_a_strangers() {
    let mut world = World::alone(2, &NetLimits { handshakes_max: 4, ..NetLimits::default() });
    let (configured, rumour) = (address(2), "10.0.0.9:7".parse().unwrap());
    world.node(1).net.set_addresses(NodeId(2), &[rumour, configured], &[rumour]);
    let member = world.hub.connect(address(1), "127.0.0.1:5");
    for _ in 0..100 {
        world.hub.connect(address(1), "10.0.0.9:1");
        world.run(2);
    }
    member.write(&hello(2, 1, 9).encode());
    world.run(3);
    assert_eq!(world.node(1).session(2), Some(9));
}

#[test]
fn a_peers_address_is_no_pass_beyond_the_number_of_handshakes() {
    let limits = NetLimits { handshakes_max: 4, ..NetLimits::default() };
    let mut world = World::alone(2, &limits);
    let crowd: Vec<_> = (0..10).map(|_| world.hub.connect(address(1), "127.0.0.1:5")).collect();
    world.run(40);
    let held: Vec<bool> = crowd.iter().map(|raw| !raw.is_closed()).collect();
    assert_eq!(held, [[false; 6].as_slice(), &[true; 4]].concat(), "the oldest give way");
}

#[test]
fn the_dialer_checks_who_answers() {
    type Change = fn(&mut Handshake);
    let refused = |reason| Rejection::Refused(reason);
    let cases: [(Change, Rejection); 8] = [
        (|h| h.cluster = ClusterId(9), refused(RejectReason::WrongCluster)),
        (|h| h.from = NodeId(7), refused(RejectReason::WrongDestination { node: NodeId(7) })),
        (|h| h.to = NodeId(7), refused(RejectReason::WrongDestination { node: NodeId(2) })),
        (|h| h.format_fingerprint = 9, refused(RejectReason::FormatMismatch { fingerprint: FINGERPRINT })),
        (|h| h.session.0 += 1, Rejection::Malformed(HandshakeError::Session)),
        (|h| h.incarnation = Incarnation(0), Rejection::Malformed(HandshakeError::Identity)),
        (|h| h.kind = HandshakeKind::Hello, Rejection::Malformed(HandshakeError::Kind(1))),
        (
            |h| h.kind = HandshakeKind::Reject(RejectReason::Busy { retry_after_ms: u64::MAX }),
            Rejection::RefusedByPeer {
                peer: NodeId(1),
                reason: RejectReason::Busy { retry_after_ms: u64::MAX },
            },
        ),
    ];
    for (change, rejection) in cases {
        let mut world = World::new(2, &NetLimits::default());
        world.nodes.remove(0);
        world.hub.listen(address(1));
        world.run(3);
        let raw = world.hub.accept(address(1)).expect("a dial");
        let hello = raw.read_handshake().expect("a hello");
        assert_eq!((hello.from, hello.to, hello.kind), (NodeId(2), NodeId(1), HandshakeKind::Hello));
        let mut welcome = common::hello(1, 2, hello.session.0);
        welcome.kind = HandshakeKind::Welcome;
        change(&mut welcome);
        raw.write(&welcome.encode());
        world.run(3);
        let two = &world.nodes[0];
        assert!(raw.is_closed());
        assert_eq!(two.rejections(), [rejection]);
        assert_eq!(two.net.stats().sessions, 0);
        // No answer keeps it from trying again within the longest wait.
        world.run_for(1100 * MILLISECOND);
        assert!(world.hub.accept(address(1)).is_some());
    }
}

#[test]
fn a_peer_that_comes_back_faster_than_its_connections_end_is_told_to_wait() {
    let mut world = World::alone(2, &NetLimits { lingering_max: 2, ..NetLimits::default() });
    world.hub.hold_closes(true);
    for session in 1..=3 {
        world.raw_session(2, session);
    }
    let raw = world.hub.connect(address(1), "127.0.0.1:5");
    raw.write(&hello(2, 1, 4).encode());
    world.run(4);
    let busy = RejectReason::Busy { retry_after_ms: 100 };
    assert_eq!(raw.read_handshake().unwrap().kind, HandshakeKind::Reject(busy));
    assert_eq!(world.node(1).session(2), Some(3), "the session in progress is not touched");
    world.hub.hold_closes(false);
    world.run(2);
    world.raw_session(2, 4);
}

#[test]
fn connections_that_do_not_end_hold_up_accepting() {
    let limits = NetLimits { handshakes_max: 4, ..NetLimits::default() };
    let mut world = World::alone(2, &limits);
    world.hub.hold_closes(true);
    let _crowd: Vec<_> = (0..30).map(|_| world.hub.connect(address(1), "10.0.0.9:1")).collect();
    world.run(100);
    assert_eq!(world.node(1).net.stats().accepted, 8, "twice as many as may shake hands");
    world.hub.hold_closes(false);
    world.run(100);
    assert_eq!(world.node(1).net.stats().accepted, 30);
}

// ---- Whom to turn to

#[test]
fn whoever_asks_is_referred_in_both_directions_and_nothing_changes() {
    let mut world = World::new(2, &NetLimits::default());
    world.connect_all();
    let sessions = (world.node(1).session(2), world.node(2).session(1));
    let leader = Referral { node: NodeId(7), address: "10.0.0.7:7000".parse().unwrap() };
    world.node(1).net.refer_to(Some(leader));
    for (asks, of, expected) in [(2, 1, Some(leader)), (1, 2, None)] {
        let Node { net, link, .. } = world.node(asks);
        assert!(net.ask(NodeId(of), address(of), link));
        assert!(!net.ask(NodeId(of), address(of), link), "it is being asked");
        world.run(10);
        assert_eq!(world.node(asks).seen.pop(), Some(Seen::Referred(of, expected)));
        assert_eq!(world.node(of).net.stats().referrals, 1);
    }
    assert_eq!((world.node(1).session(2), world.node(2).session(1)), sessions);
    assert_eq!((world.node(1).causes(), world.node(2).net.stats().dials_failed), (vec![], 0));
    // It is told where the one that asks listens, if that wants it.
    let Node { net, link, .. } = world.node(1);
    net.introduce_at(Some("10.0.0.1:7001".parse().unwrap()));
    assert!(net.ask(NodeId(2), address(2), link));
    world.run(10);
    assert_eq!(world.node(2).seen.pop(), Some(Seen::Asked(1, "10.0.0.1:7001".parse().unwrap())));
    // It can be asked again, and one that is no peer of anybody here may ask.
    let asked = Handshake { kind: HandshakeKind::Ask(None), ..hello(77, 1, 9) };
    let raw = world.hub.connect(address(1), "127.0.0.1:50001");
    raw.write(&asked.encode());
    world.run(5);
    let answer = raw.read_handshake().expect("an answer");
    assert_eq!((answer.kind, answer.session.0), (HandshakeKind::Referral(Some(leader)), 9));
    assert!(raw.is_closed());
    let foreign = Handshake { cluster: ClusterId(9), ..asked };
    let raw = world.hub.connect(address(1), "127.0.0.1:50001");
    raw.write(&foreign.encode());
    world.run(5);
    let answer = raw.read_handshake().expect("an answer");
    assert_eq!(answer.kind, HandshakeKind::Reject(RejectReason::WrongCluster));
    assert_eq!(answer.cluster, ClusterId(0), "a stranger learns nothing");
}

#[test]
fn an_answer_that_is_none_ends_the_question_and_a_silent_node_does_not_block_the_next_one() {
    type Change = fn(&mut Handshake);
    let wrong: [Change; 5] = [
        |answer| answer.kind = HandshakeKind::Welcome,
        |answer| answer.kind = HandshakeKind::Reject(RejectReason::WrongCluster),
        |answer| answer.from = NodeId(5),
        |answer| answer.cluster = ClusterId(9),
        |answer| answer.session.0 += 1,
    ];
    let mut world = World::alone(1, &NetLimits::default());
    world.hub.listen(address(2));
    for change in wrong {
        let Node { net, link, .. } = world.node(1);
        assert!(net.ask(NodeId(2), address(2), link));
        world.run(5);
        let raw = world.hub.accept(address(2)).expect("a dial");
        let asked = raw.read_handshake().expect("a question");
        assert_eq!((asked.kind, asked.from, asked.to), (HandshakeKind::Ask(None), NodeId(1), NodeId(2)));
        let kind = HandshakeKind::Referral(None);
        let mut answer = Handshake { kind, features: 0, ..hello(2, 1, asked.session.0) };
        change(&mut answer);
        raw.write(&answer.encode());
        world.run(5);
        assert!(raw.is_closed());
    }
    let Node { net, link, .. } = world.node(1);
    assert!(net.ask(NodeId(2), address(2), link));
    world.run_for(20 * SECOND);
    let Node { net, link, .. } = world.node(1);
    assert!(net.ask(NodeId(2), address(2), link), "the other one was given up");
    assert!(!world.node(1).seen.iter().any(|seen| matches!(seen, Seen::Referred(..))));
}

/// It kept all others back until the link had given its dial up, which takes a system that hears nothing ten seconds and more.
#[test]
fn a_question_whose_dial_goes_unanswered_keeps_no_other_back() {
    let limits = NetLimits { handshakes_max: 4, ..NetLimits::default() };
    let mut world = World::new(2, &limits);
    world.connect_all();
    let leader = Referral { node: NodeId(3), address: address(3) };
    world.node(1).net.refer_to(Some(leader));
    for node in 7..=10 {
        world.hub.silence(address(node), true);
    }
    let ask = |world: &mut World, of: u64| {
        let Node { net, link, .. } = world.node(2);
        net.ask(NodeId(of), address(of), link)
    };
    let answered = |world: &mut World| {
        world.run(10);
        std::mem::take(&mut world.node(2).seen).contains(&Seen::Referred(1, Some(leader)))
    };
    for node in 7..=9 {
        assert!(ask(&mut world, node) && !ask(&mut world, node), "it is being asked");
        assert!(ask(&mut world, 1) && answered(&mut world));
    }
    // They are given up, and can be asked again; what is still under way of them counts, and keeps the descriptors bounded.
    world.run_for(2 * limits.dial_timeout_ns);
    assert!(ask(&mut world, 7) && !ask(&mut world, 10), "too many");
    world.hub.fail_unanswered_dials();
    world.run(10);
    assert!(ask(&mut world, 10));
    assert!(ask(&mut world, 1) && answered(&mut world));
}
