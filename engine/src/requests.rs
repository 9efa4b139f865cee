//! What is asked of the core besides commands and reads: rare, so that a lock will do, and a turn in which nothing has been
//! asked does not take it.

use crate::answer::AnswerSlot;
use crate::driver::Transferred;
use crate::error::{StopCause, TransferError};
use crate::handle::{SnapshotError, SnapshotTaken, lock};
use crate::membership::{Changed, MembershipChange, MembershipError, Plan};
use ringraft_block::NodeId;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Requests that wait for the core, and of one kind in the core. More are refused as busy.
pub(crate) const REQUESTS_MAX: usize = 64;

/// Where the end of a transfer goes.
pub(crate) type TransferSlot = Arc<AnswerSlot<Result<Transferred, TransferError>>>;
/// Where a snapshot that was asked for is announced.
pub(crate) type SnapshotSlot = Arc<AnswerSlot<Result<SnapshotTaken, SnapshotError>>>;
/// Where the answer to a request for the members goes.
pub(crate) type MembersSlot<T> = Arc<AnswerSlot<Result<T, MembershipError>>>;

/// What is asked.
pub(crate) enum Request {
    /// Hand leadership over.
    Transfer { to: Option<NodeId>, slot: TransferSlot },
    /// Take a snapshot of all that is applied.
    Snapshot { slot: SnapshotSlot },
    /// Of the members.
    Members(MembersRequest),
}

/// What is asked about the members.
pub(crate) enum MembersRequest {
    Change { change: MembershipChange, slot: MembersSlot<Changed> },
    Plan { change: MembershipChange, slot: MembersSlot<Plan> },
    ReserveId { slot: MembersSlot<NodeId> },
}

impl Request {
    fn refuse_as_busy(self) {
        match self {
            Self::Transfer { slot, .. } => slot.complete(Err(TransferError::Busy)),
            Self::Snapshot { slot } => slot.complete(Err(SnapshotError::Busy)),
            Self::Members(request) => request.refuse(MembershipError::Busy),
        }
    }

    /// The core has stopped.
    fn refuse_as_stopped(self, cause: StopCause) {
        match self {
            Self::Transfer { slot, .. } => slot.complete(Err(TransferError::Stopped(cause))),
            Self::Snapshot { slot } => slot.complete(Err(SnapshotError::Stopped(cause))),
            Self::Members(request) => request.refuse(MembershipError::Stopped(cause)),
        }
    }
}

impl MembersRequest {
    pub(crate) fn refuse(self, error: MembershipError) {
        match self {
            Self::Change { slot, .. } => slot.complete(Err(error)),
            Self::Plan { slot, .. } => slot.complete(Err(error)),
            Self::ReserveId { slot } => slot.complete(Err(error)),
        }
    }
}

/// The way of requests into the core.
#[derive(Default)]
pub(crate) struct Requests {
    /// Written under the lock.
    any: AtomicBool,
    queue: Mutex<VecDeque<Request>>,
}

impl Requests {
    /// Queues a request; one too many is refused.
    pub(crate) fn push(&self, request: Request) {
        let mut queue = lock(&self.queue);
        if queue.len() >= REQUESTS_MAX {
            // Whoever is answered may ask again at once: not under the lock.
            drop(queue);
            return request.refuse_as_busy();
        }
        queue.push_back(request);
        self.any.store(true, Ordering::Release);
    }

    /// Whether any wait.
    pub(crate) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// All that wait, in order. Costs a load when there are none.
    pub(crate) fn take(&self) -> VecDeque<Request> {
        if !self.any() {
            return VecDeque::new();
        }
        let mut queue = lock(&self.queue);
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut *queue)
    }

    /// Refuses all that wait.
    pub(crate) fn refuse_all(&self, cause: &StopCause) {
        self.take().into_iter().for_each(|request| request.refuse_as_stopped(cause.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Answer;
    use crate::error::StopError;
    use crate::ingress::Ingress;

    type Asked<T, E> = Answer<Result<T, E>>;

    fn one_of_each(
        ingress: &Ingress,
    ) -> (
        Asked<Transferred, TransferError>,
        Asked<SnapshotTaken, SnapshotError>,
        Asked<NodeId, MembershipError>,
    ) {
        let (transfer, slot) = Answer::new();
        ingress.push_request(Request::Transfer { to: None, slot });
        let (snapshot, slot) = Answer::new();
        ingress.push_request(Request::Snapshot { slot });
        let (id, slot) = Answer::new();
        ingress.push_request(Request::Members(MembersRequest::ReserveId { slot }));
        (transfer, snapshot, id)
    }

    #[test]
    fn requests_are_taken_once_in_the_order_in_which_they_were_asked() {
        let ingress = Ingress::new(4, 1 << 20, 4);
        assert!(ingress.take_requests().is_empty());
        let _answers = one_of_each(&ingress);
        let taken = ingress.take_requests();
        let kinds = taken.iter().map(|request| match request {
            Request::Transfer { .. } => 1,
            Request::Snapshot { .. } => 2,
            Request::Members(_) => 3,
        });
        assert_eq!(kinds.collect::<Vec<_>>(), [1, 2, 3]);
        assert!(ingress.take_requests().is_empty());
    }

    /// The lock is held by somebody else all the time: a turn that took it would never end.
    #[test]
    fn no_lock_is_taken_while_nothing_is_asked() {
        let requests = Requests::default();
        let _held = lock(&requests.queue);
        assert!(requests.take().is_empty());
    }

    #[test]
    fn requests_are_bounded_and_all_are_answered_when_the_node_stops_also_those_that_come_later() {
        let ingress = Ingress::new(4, 1 << 20, 4);
        let mut answers = Vec::new();
        for _ in 0..REQUESTS_MAX {
            let (answer, slot) = Answer::new();
            ingress.push_request(Request::Members(MembersRequest::ReserveId { slot }));
            answers.push(answer);
        }
        let (transfer, snapshot, id) = one_of_each(&ingress);
        assert_eq!(transfer.wait(), Err(TransferError::Busy));
        assert_eq!(snapshot.wait(), Err(SnapshotError::Busy));
        assert_eq!(id.wait(), Err(MembershipError::Busy));

        assert_eq!(answers[0].try_take(), None);
        let cause = StopCause::from(StopError::Requested);
        ingress.stop(cause.clone());
        for answer in answers {
            assert_eq!(answer.wait(), Err(MembershipError::Stopped(cause.clone())));
        }
        let (transfer, snapshot, id) = one_of_each(&ingress);
        assert_eq!(transfer.wait(), Err(TransferError::Stopped(cause.clone())));
        assert_eq!(snapshot.wait(), Err(SnapshotError::Stopped(cause.clone())));
        assert_eq!(id.wait(), Err(MembershipError::Stopped(cause)));
    }
}
