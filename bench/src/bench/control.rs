//! What the parent of a benchmark and its nodes say to each other: one JSON value a line, orders on a node's
//! standard input, one answer to each on its standard output. An end of the input means that the parent is gone.

use ringraft::handle::Status;
use ringraft::raft::Role;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What a node is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub(crate) enum Order {
    /// Tell what you are.
    Status,
    /// Begin to generate load; the ledger tells how it goes.
    Run {
        /// The ledger to write to, made by the parent.
        ledger: PathBuf,
        /// What to do.
        plan: Plan,
    },
    /// End the load at once; the outcomes of what is in flight are still awaited.
    StopLoad,
    /// Stop in good order.
    Shutdown,
}

/// What a load generator does. Times are on CLOCK_MONOTONIC, which all processes share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Number of this generator among all of the benchmark: the high half of its streams' ids.
    pub(crate) run: u32,
    /// Streams, each with at most one command outstanding.
    pub(crate) streams: u32,
    /// Bytes of a command.
    pub(crate) payload_bytes: usize,
    /// Commands per second in an open loop; without it the loop is closed.
    pub(crate) rate: Option<f64>,
    /// The open loop's first command is due at this time: for the first leader when the load begins, for the next one
    /// the time up to which the timetable has been served, so that what fell due without a leader is sent late and its
    /// latency counts from when it was due.
    pub(crate) due_from_ns: u64,
    /// The measured window.
    pub(crate) begin_ns: u64,
    pub(crate) end_ns: u64,
}

/// What a node answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(crate) enum Answer {
    /// The node is up: its log is open and it listens. Sent once, unasked.
    Ready {
        /// The node.
        node: u64,
    },
    /// What the node is.
    Status(NodeStatus),
    /// The order was taken.
    Taken,
    /// The order cannot be carried out.
    Failed {
        /// Why.
        error: String,
    },
}

/// A node's status, as far as a benchmark needs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeStatus {
    pub(crate) node: u64,
    pub(crate) formed: bool,
    pub(crate) leads: bool,
    pub(crate) term: u64,
    pub(crate) last: u64,
    pub(crate) durable: u64,
    pub(crate) commit: u64,
    pub(crate) applied: u64,
    /// Hexadecimal.
    pub(crate) applied_chain: String,
    /// Commands that its state machine has applied, at least up to `applied`, since the cluster was formed.
    pub(crate) entries: u64,
}

impl NodeStatus {
    /// The end of what the node's disk holds from now on, whatever happens to the node, as long as the disk keeps what
    /// it reported as durable.
    ///
    /// Not all of `durable`: a new leader may truncate what is durable here and not committed. Not all of `commit`: a
    /// leader commits what a majority of others holds before its own disk does. Both are taken from one moment of the
    /// node, and what is committed is never truncated, so the lower of the two is a bound for ever: a later process on
    /// the directory may report less for a while, and a killed one reports nothing, but the disk must hold it still.
    pub(crate) fn kept(&self) -> u64 {
        self.durable.min(self.commit)
    }
}

impl NodeStatus {
    /// `entries` is read after `status`.
    pub(crate) fn new(status: Status, entries: impl FnOnce() -> u64) -> Self {
        Self {
            node: status.node.get(),
            formed: status.formed,
            leads: status.role == Role::Leader,
            term: status.term.get(),
            last: status.last.get(),
            durable: status.durable.get(),
            commit: status.commit.get(),
            applied: status.applied.get(),
            applied_chain: status.applied_chain.iter().map(|byte| format!("{byte:02x}")).collect(),
            entries: entries(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_answers_survive_the_line() {
        let plan = Plan {
            run: 1,
            streams: 256,
            payload_bytes: 128,
            rate: Some(1e5),
            due_from_ns: 1,
            begin_ns: 1,
            end_ns: u64::MAX,
        };
        for order in [
            Order::Status,
            Order::Run { ledger: "a b/ledger-1".into(), plan },
            Order::StopLoad,
            Order::Shutdown,
        ] {
            let line = serde_json::to_string(&order).unwrap();
            assert!(!line.contains('\n'));
            let read: Order = serde_json::from_str(&line).unwrap();
            assert_eq!(format!("{read:?}"), format!("{order:?}"));
        }
        let read: Answer = serde_json::from_str(r#"{"answer":"failed","error":"no"}"#).unwrap();
        assert!(matches!(read, Answer::Failed { error } if error == "no"));
    }
}
