//! Changing the members of a running cluster: what is asked by a [`Handle`], and what comes back.
//!
//! One call is one change, however many nodes it adds, removes and promotes: it takes effect as a whole, by joint
//! consensus, or not at all. Whoever is to vote is caught up first, without a vote. A leader that falls meanwhile leaves the
//! change to the next one.

use crate::error::{LeaderHint, StopCause};
use crate::handle::{Handle, LocalHandle, lock};
pub use crate::raft::{ChangeError, Changed, Configuration, Member, MemberRole, Plan};
use ringraft_block::{Incarnation, LogIndex, NodeId};
use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// Requests that wait for the core. More are refused as [`MembershipError::Busy`].
const REQUESTS_MAX: usize = 64;

/// A change of the members. Start from [`MembershipChange::default`], which changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MembershipChange {
    /// Who joins. Its node runs already, started with [`Config::join`](crate::Config::join).
    pub add: Vec<NewMember>,
    /// Who leaves. The leader may be among them: it leads until that is committed, and another one follows.
    pub remove: Vec<NodeId>,
    /// Learners that become voters.
    pub promote: Vec<NodeId>,
    /// Voters that become learners.
    pub demote: Vec<NodeId>,
    /// Only if the configuration in force is the one at this index of the log
    /// ([`Membership::index`]): nobody has changed the members since they were looked at.
    pub expected: Option<LogIndex>,
    /// Also if the voters that would be there then cannot decide anything until some of them come back. Default: such a
    /// change is refused.
    pub even_if_quorum_is_lost: bool,
}

/// A node that joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMember {
    /// Its id: one of [`Handle::reserve_node_id`], or any that was never used.
    pub id: NodeId,
    /// Where its peers reach it.
    pub address: SocketAddr,
    /// Voter or learner.
    pub role: MemberRole,
    /// The life of its data directory. `None`: as the node says itself when the leader meets it.
    pub incarnation: Option<Incarnation>,
}

impl NewMember {
    /// A new voter, which the leader asks for its incarnation.
    #[must_use]
    pub fn voter(id: NodeId, address: SocketAddr) -> Self {
        Self { id, address, role: MemberRole::Voter, incarnation: None }
    }

    /// A new learner, which the leader asks for its incarnation.
    #[must_use]
    pub fn learner(id: NodeId, address: SocketAddr) -> Self {
        Self { role: MemberRole::Learner, ..Self::voter(id, address) }
    }
}

/// Who is in the cluster, as far as a node knows: part of its [`Status`](crate::handle::Status).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// Where the configuration in force stands in the log; 0, or where the log starts, for that of the formation. It is
    /// committed when the status' `commit` is as high.
    pub index: LogIndex,
    /// The configuration.
    pub configuration: Configuration,
    /// Whether it names this node, with the data directory that it has.
    pub is_member: bool,
}

/// Why a change of the members came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// Another node leads, or none does: ask there, or wait for an election.
    #[error("this node does not lead: ask {}", .leader.map_or("the leader once there is one".to_owned(), |leader| format!("node {} at {}", leader.id, leader.address)))]
    NotLeader {
        /// Who leads, where known.
        leader: Option<LeaderHint>,
    },
    /// A new member does not answer.
    #[error(
        "node {id} does not answer at {address}: start it there with `join` and the address of this leader among its members, \
         then try again"
    )]
    Unreachable {
        /// Who.
        id: NodeId,
        /// Where.
        address: SocketAddr,
    },
    /// Too many requests wait.
    #[error("too many requests for the members wait already: try again")]
    Busy,
    /// Refused, or given up on the way.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The node has stopped. Of a change that was under way the outcome is unknown.
    #[error("the node has stopped: {0}")]
    Stopped(StopCause),
}

/// An answer that is still to come. Cancel safe: dropping it abandons the answer, not what was asked for.
#[must_use = "what has become of a request is worth knowing"]
pub struct Answer<T> {
    slot: Arc<AnswerSlot<T>>,
}

struct AnswerSlot<T> {
    state: Mutex<AnswerState<T>>,
    done: Condvar,
}

struct AnswerState<T> {
    value: Option<Result<T, MembershipError>>,
    waker: Option<Waker>,
}

/// Where the core puts an answer.
pub(crate) struct Reply<T>(Arc<AnswerSlot<T>>);

fn answer<T>() -> (Reply<T>, Answer<T>) {
    let state = Mutex::new(AnswerState { value: None, waker: None });
    let slot = Arc::new(AnswerSlot { state, done: Condvar::new() });
    (Reply(Arc::clone(&slot)), Answer { slot })
}

impl<T> Reply<T> {
    pub(crate) fn send(self, value: Result<T, MembershipError>) {
        let waker = {
            let mut state = lock(&self.0.state);
            state.value = Some(value);
            state.waker.take()
        };
        self.0.done.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Answer<T> {
    /// Blocks until the answer is there: for ever when it has been taken.
    ///
    /// # Errors
    /// Those of the request.
    pub fn wait(self) -> Result<T, MembershipError> {
        let mut state = lock(&self.slot.state);
        loop {
            if let Some(value) = state.value.take() {
                return value;
            }
            state = self.slot.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The answer, if it is there. Never blocks.
    pub fn try_take(&mut self) -> Option<Result<T, MembershipError>> {
        lock(&self.slot.state).value.take()
    }
}

impl<T> Future for Answer<T> {
    type Output = Result<T, MembershipError>;

    /// Pending for ever once the answer has been taken.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.slot.state);
        match state.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// What the core is asked.
pub(crate) enum Request {
    Change { change: MembershipChange, reply: Reply<Changed> },
    Plan { change: MembershipChange, reply: Reply<Plan> },
    ReserveId { reply: Reply<NodeId> },
}

impl Request {
    pub(crate) fn refuse(self, error: MembershipError) {
        match self {
            Self::Change { reply, .. } => reply.send(Err(error)),
            Self::Plan { reply, .. } => reply.send(Err(error)),
            Self::ReserveId { reply } => reply.send(Err(error)),
        }
    }
}

/// The way of requests into the core.
#[derive(Default)]
pub(crate) struct Requests {
    waiting: AtomicBool,
    queue: Mutex<(VecDeque<Request>, Option<StopCause>)>,
}

impl Requests {
    fn push(&self, request: Request) {
        let mut queue = lock(&self.queue);
        let refused = match &queue.1 {
            Some(cause) => MembershipError::Stopped(cause.clone()),
            None if queue.0.len() >= REQUESTS_MAX => MembershipError::Busy,
            None => {
                queue.0.push_back(request);
                self.waiting.store(true, Ordering::Release);
                return;
            }
        };
        drop(queue);
        request.refuse(refused);
    }

    /// The next one. Costs no lock while there is none.
    pub(crate) fn pop(&self) -> Option<Request> {
        if !self.waiting.load(Ordering::Acquire) {
            return None;
        }
        let mut queue = lock(&self.queue);
        let request = queue.0.pop_front();
        self.waiting.store(!queue.0.is_empty(), Ordering::Release);
        request
    }

    /// Refuses all that wait and all that come later.
    pub(crate) fn stop(&self, cause: &StopCause) {
        let waiting = {
            let mut queue = lock(&self.queue);
            queue.1.get_or_insert_with(|| cause.clone());
            std::mem::take(&mut queue.0)
        };
        for request in waiting {
            request.refuse(MembershipError::Stopped(cause.clone()));
        }
    }
}

impl Handle {
    /// Changes the members; only on the leader. Resolves when the new configuration is committed, however many steps it
    /// takes, with its index; future voters are caught up before they count.
    pub fn change_membership(&self, change: MembershipChange) -> Answer<Changed> {
        let (reply, answer) = answer();
        self.request(Request::Change { change, reply });
        answer
    }

    /// What a change would do, and why it would be refused, if it would; only on the leader. Changes nothing. Print it to
    /// read it in words.
    pub fn plan_membership(&self, change: MembershipChange) -> Answer<Plan> {
        let (reply, answer) = answer();
        self.request(Request::Plan { change, reply });
        answer
    }

    /// Reserves an id that was never used, for a node that is to join; only on the leader. It is unique in the cluster for
    /// ever, also if the node never comes.
    pub fn reserve_node_id(&self) -> Answer<NodeId> {
        let (reply, answer) = answer();
        self.request(Request::ReserveId { reply });
        answer
    }

    fn request(&self, request: Request) {
        self.shared.membership.push(request);
        self.shared.wakeup.signal();
    }
}

impl LocalHandle {
    /// As [`Handle::change_membership`].
    pub fn change_membership(&self, change: MembershipChange) -> Answer<Changed> {
        let (reply, answer) = answer();
        self.request(Request::Change { change, reply });
        answer
    }

    /// As [`Handle::plan_membership`].
    pub fn plan_membership(&self, change: MembershipChange) -> Answer<Plan> {
        let (reply, answer) = answer();
        self.request(Request::Plan { change, reply });
        answer
    }

    /// As [`Handle::reserve_node_id`].
    pub fn reserve_node_id(&self) -> Answer<NodeId> {
        let (reply, answer) = answer();
        self.request(Request::ReserveId { reply });
        answer
    }

    fn request(&self, request: Request) {
        self.shared.membership.push(request);
        self.wakeup.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::StopError;

    #[test]
    fn requests_are_bounded_and_all_are_answered_when_the_node_stops() {
        let requests = Requests::default();
        let mut answers = Vec::new();
        for _ in 0..=REQUESTS_MAX {
            let (reply, answer) = answer();
            requests.push(Request::ReserveId { reply });
            answers.push(answer);
        }
        let refused = answers.pop().and_then(|mut answer| answer.try_take());
        assert_eq!(refused, Some(Err(MembershipError::Busy)));
        let first = requests.pop().expect("one waits");
        let Request::ReserveId { reply } = first else { panic!("another request") };
        reply.send(Ok(NodeId(7)));
        let cause = StopCause::from(StopError::Requested);
        requests.stop(&cause);
        assert!(requests.pop().is_none());
        let (reply, late) = answer();
        requests.push(Request::ReserveId { reply });
        assert_eq!(answers.remove(0).wait(), Ok(NodeId(7)));
        for answer in answers.into_iter().chain([late]) {
            assert_eq!(answer.wait(), Err(MembershipError::Stopped(cause.clone())));
        }
    }
}
