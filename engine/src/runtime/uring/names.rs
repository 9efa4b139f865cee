//! A thread for the system calls of a disk that may block and that no ring does, or none worth the trouble: they are rare.

use crate::runtime::{RuntimeError, Wakeup};
use ringraft_wal::disk::{Access, DirectoryEntry, DiskError, DiskErrorKind, DiskOpId};
use rustix::io::Errno;
use rustix::thread::CpuSet;
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// What came of an operation.
pub(super) enum NameOutput {
    Listed(Vec<DirectoryEntry>),
    Opened { file: OwnedFd, bytes: u64, access: Access },
    Done,
}

type Outcome = (DiskOpId, Result<NameOutput, DiskError>);
type Job = Box<dyn FnOnce(&OwnedFd) -> Outcome + Send>;

/// The thread, seen from the core. Dropping it ends the thread after its jobs, without waiting for that.
pub(super) struct Names {
    /// None once it has been told to end.
    jobs: Option<Sender<Job>>,
    outcomes: Receiver<Outcome>,
    /// Jobs whose outcome was not taken.
    pending: Cell<usize>,
    thread: Option<JoinHandle<()>>,
}

impl Names {
    /// Starts the thread for a directory, on these processors. It signals `wakeup` for each outcome.
    pub(super) fn new(
        directory: OwnedFd,
        wakeup: Arc<Wakeup>,
        processors: Option<CpuSet>,
    ) -> Result<Self, RuntimeError> {
        let (jobs, work) = channel::<Job>();
        let (done, outcomes) = channel();
        let body = move || {
            if let Some(processors) = processors {
                // The core's own processor, which this thread inherits, would do too.
                let _ = rustix::thread::sched_setaffinity(None, &processors);
            }
            for job in work {
                // The core is gone when nobody takes it.
                let _ = done.send(job(&directory));
                wakeup.signal();
            }
        };
        let thread = std::thread::Builder::new().name("ringraft-names".to_owned()).spawn(body)?;
        Ok(Self { jobs: Some(jobs), outcomes, pending: Cell::new(0), thread: Some(thread) })
    }

    /// Runs `work` on the thread, after what was submitted before.
    pub(super) fn submit(
        &self,
        id: DiskOpId,
        operation: &'static str,
        work: impl FnOnce(&OwnedFd) -> Result<NameOutput, Errno> + Send + 'static,
    ) {
        // A panic would leave this operation without a completion.
        let job = move |directory: &OwnedFd| match catch_unwind(AssertUnwindSafe(|| work(directory))) {
            Ok(result) => (id, result.map_err(|errno| DiskError::from_os(operation, errno.raw_os_error()))),
            Err(_) => (id, Err(DiskError { kind: DiskErrorKind::Io, operation, os_error: None })),
        };
        self.pending.set(self.pending.get() + 1);
        let jobs = self.jobs.as_ref().expect("a disk that was shut down has no user");
        jobs.send(Box::new(job)).expect("the thread takes jobs until it is told to end");
    }

    /// The next outcome, if there is one.
    pub(super) fn next(&self) -> Option<Outcome> {
        if self.pending.get() == 0 {
            return None;
        }
        let outcome = self.outcomes.try_recv().ok()?;
        self.pending.set(self.pending.get() - 1);
        Some(outcome)
    }

    /// Waits until all jobs are done, and ends the thread.
    pub(super) fn join(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It catches panics of its jobs.
            let _ = thread.join();
        }
    }
}
