//! Reads without a write, over real drivers.

use super::*;
use ringraft::error::ReadError;
use ringraft::reads::{Consistency, QueryReply, Read};
use std::future::Future;
use std::pin::pin;
use std::task::{Poll, Waker};

impl Rig {
    /// Lets things happen until the answer is there.
    fn answer<T>(&mut self, answer: Read<T>) -> Result<T, ReadError> {
        let mut answer = pin!(answer);
        let mut context = std::task::Context::from_waker(Waker::noop());
        for _ in 0..1_000_000 {
            if let Poll::Ready(outcome) = answer.as_mut().poll(&mut context) {
                return outcome;
            }
            self.step();
        }
        panic!("the read is never answered");
    }

    fn called(&mut self, node: usize) -> Handle {
        let process = self.process(node);
        process.wake_at = 0;
        process.handle.clone()
    }

    fn query(&mut self, node: usize, consistency: Consistency) -> Result<QueryReply, ReadError> {
        let answer = self.called(node).query("?", consistency);
        self.answer(answer)
    }
}

fn counted(reply: &QueryReply) -> u64 {
    assert_eq!(reply.reply[0], b'?', "the machine was asked what the program asked");
    u64::from_le_bytes(reply.reply[1..].try_into().expect("eight bytes"))
}

#[test]
fn a_query_sees_every_command_that_was_acknowledged_before_on_the_leader_and_on_followers() {
    let (mut rig, leader) = Rig::started(3);
    for count in 1..=5 {
        let index = rig.commit(leader, 100);
        for node in 0..3 {
            for consistency in [Consistency::Linearizable, Consistency::Quorum] {
                let reply = rig.query(node, consistency).expect("answered");
                assert!(reply.applied >= index);
                assert_eq!(counted(&reply), count, "on {node}, {consistency:?}");
            }
            let handle = rig.called(node);
            let point = rig.answer(handle.read(Consistency::Linearizable)).expect("answered");
            assert!(point.index >= index && rig.status(node).applied >= point.index);
        }
    }
}
