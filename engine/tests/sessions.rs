//! Sessions of a node on its real backend: what blocks, and what a restart leaves.

use ringraft::error::{ProposeError, Refusal, UnknownOutcome};
use ringraft::sessions::{Resolved, SessionPosition};
use ringraft::state_machine::{CommittedBatch, Replies};
use ringraft::{ClusterId, Config, Handle, MemberConfig, Node, NodeId, Role, StateMachine};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

/// Replies with how many commands it has applied.
#[derive(Default)]
struct Count(u8);

impl StateMachine for Count {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        for _ in batch.commands() {
            self.0 += 1;
            replies.push(vec![self.0]);
        }
    }
}

fn address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// One node of `members`, which need not run.
fn start(directory: &Path, members: &[SocketAddr]) -> Node {
    let members = (1..).zip(members).map(|(id, address)| MemberConfig { id: NodeId(id), address: *address });
    let config = Config {
        segment_bytes: 32 << 20,
        segments_ahead: 1,
        ..Config::new(ClusterId(0x7e57), NodeId(1), members.collect(), directory)
    };
    Node::start(config, Count::default).unwrap_or_else(|cause| panic!("{cause}"))
}

fn until_led(handle: &Handle) {
    let (status, led) = handle.wait_status(Duration::from_secs(60), |status| status.role == Role::Leader);
    assert!(led, "{status:?}");
}

fn in_seconds(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

#[test]
fn a_client_goes_on_with_its_session_after_a_restart_and_waits_for_the_election_by_itself() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let members = [address()];
    let node = start(directory.path(), &members);
    until_led(&node.handle());
    let session = node.handle().open_session().wait().expect("open");
    let first = session.propose_until("first", in_seconds(60)).expect("committed");
    assert_eq!(first.reply[..], [1]);
    let position = session.position();
    assert_eq!(position, SessionPosition { id: session.id(), window: 256, floor: 2, confirmed: 1, next: 2 });
    node.handle().shutdown();
    assert!(node.join().is_orderly());
    let outcome = session.propose_until("never", in_seconds(60));
    let Err(ProposeError::Refused(refused)) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(refused.reason, Refusal::Stopped(_)), "{refused}");

    let node = start(directory.path(), &members);
    let session = node.handle().resume_session(position);
    // It does not lead yet, or hardly: this waits.
    let second = session.propose_until("second", in_seconds(60)).expect("committed");
    assert_eq!((session.position().next, second.reply[..].to_vec()), (3, vec![2]));
    let again = session.retry_until(1, "first", in_seconds(60)).expect("committed");
    assert_eq!(again, first, "as it was told before the restart");
    session.keep_alive().wait().expect("alive");
    assert_eq!(session.resolve(2).wait().expect("resolved"), Resolved::Committed(second));
    session.close().wait().expect("closed");
}

#[test]
fn a_deadline_ends_the_wait_for_an_election_that_cannot_be_won_with_a_refusal() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let node = start(directory.path(), &[address(), address()]);
    let position = SessionPosition { id: 7, window: 4, floor: 1, confirmed: 1, next: 1 };
    let session = node.handle().resume_session(position);
    let mut refusals = 0;
    for _ in 0..4 {
        let begun = Instant::now();
        let outcome = session.propose_until("command", begun + Duration::from_millis(200));
        assert!(begun.elapsed() >= Duration::from_millis(200));
        match outcome {
            Err(ProposeError::Refused(refused)) => {
                assert!(matches!(refused.reason, Refusal::NotLeader { .. }), "{refused}");
                assert_eq!(refused.command[..], *b"command", "given back: it never left");
                refusals += 1;
            }
            // It came just after an attempt had begun.
            Err(ProposeError::Unknown(UnknownOutcome::Deadline { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(refusals > 0);
    // Numbers are used up by refusals, and a follower says why it cannot acknowledge them.
    for _ in 0..20 {
        let outcome = session.propose("command").wait();
        let Err(ProposeError::Refused(refused)) = outcome else { panic!("{outcome:?}") };
        let expected = matches!(refused.reason, Refusal::NotLeader { .. } | Refusal::Session(_));
        assert!(expected, "{refused}");
    }
}
