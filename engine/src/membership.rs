//! Changing the members of a running cluster: what is asked by a [`Handle`], and what comes back.
//!
//! One call is one change, however many nodes it adds, removes and promotes: it takes effect as a whole, by joint
//! consensus, or not at all. Whoever is to vote is caught up first, without a vote. A leader that falls meanwhile leaves the
//! change to the next one.

use crate::answer::Answer;
use crate::error::{LeaderHint, StopCause};
use crate::handle::{Handle, LocalHandle};
pub use crate::raft::{ChangeError, Changed, Configuration, Member, MemberRole, Plan};
use crate::requests::{MembersRequest, Request};
use ringraft_block::{Incarnation, LogIndex, NodeId};
use std::net::SocketAddr;

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
    /// Where the configuration in force stands in the log, which may start behind it by now; 0 for that of the formation. It
    /// is committed when the status' `commit` is as high.
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
        "node {id} does not answer at {address}: start it there with `join` and the address of any member among its members, \
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

impl Handle {
    /// Changes the members; only on the leader. Resolves when the new configuration is committed, however many steps it
    /// takes, with its index; future voters are caught up before they count. Dropping the answer takes nothing back.
    ///
    /// # Errors
    /// The answer is an error when the change was refused, or came to nothing; each says what to do.
    pub fn change_membership(&self, change: MembershipChange) -> Answer<Result<Changed, MembershipError>> {
        let (answer, slot) = Answer::new();
        self.request(MembersRequest::Change { change, slot });
        answer
    }

    /// What a change would do, and why it would be refused, if it would; only on the leader. Changes nothing. Print it to
    /// read it in words.
    ///
    /// # Errors
    /// The answer is an error when this node does not lead, or cannot tell.
    pub fn plan_membership(&self, change: MembershipChange) -> Answer<Result<Plan, MembershipError>> {
        let (answer, slot) = Answer::new();
        self.request(MembersRequest::Plan { change, slot });
        answer
    }

    /// Reserves an id that was never used, for a node that is to join; only on the leader. It is unique in the cluster for
    /// ever, also if the node never comes.
    ///
    /// # Errors
    /// The answer is an error when no id was reserved.
    pub fn reserve_node_id(&self) -> Answer<Result<NodeId, MembershipError>> {
        let (answer, slot) = Answer::new();
        self.request(MembersRequest::ReserveId { slot });
        answer
    }

    fn request(&self, request: MembersRequest) {
        self.shared.ingress.push_request(Request::Members(request));
        self.shared.wakeup.signal();
    }
}

impl LocalHandle {
    /// As [`Handle::change_membership`].
    pub fn change_membership(&self, change: MembershipChange) -> Answer<Result<Changed, MembershipError>> {
        let (answer, slot) = Answer::new();
        self.request(MembersRequest::Change { change, slot });
        answer
    }

    /// As [`Handle::plan_membership`].
    pub fn plan_membership(&self, change: MembershipChange) -> Answer<Result<Plan, MembershipError>> {
        let (answer, slot) = Answer::new();
        self.request(MembersRequest::Plan { change, slot });
        answer
    }

    /// As [`Handle::reserve_node_id`].
    pub fn reserve_node_id(&self) -> Answer<Result<NodeId, MembershipError>> {
        let (answer, slot) = Answer::new();
        self.request(MembersRequest::ReserveId { slot });
        answer
    }

    fn request(&self, request: MembersRequest) {
        self.shared.ingress.push_request(Request::Members(request));
        self.wakeup.wake();
    }
}
