//! One io_uring with all that its operations use: the only file of this backend that talks to the kernel's ring.
//!
//! An operation is started with its *owner*: a value that keeps the memory and the descriptor which the kernel was told of.
//! The ring has the owner from then on and gives it back with the completion, so that nothing can be freed or reused while
//! the kernel may use it, whatever becomes of who started the operation. Cancelling asks the kernel to complete an operation
//! early; its owner comes back like any other. A ring that is dropped cancels what is in flight, waits for it, and leaks
//! what does not come back.
//!
//! The ring is set up for one thread (SINGLE_ISSUER), and to do its deferred work only when that thread enters the kernel to
//! collect completions (DEFER_TASKRUN): the thread is not interrupted for it. A flag in shared memory says that there
//! is such work (TASKRUN_FLAG), so a thread that has nothing to submit need not ask.

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// The completions of the bell, which has no owner.
const BELL: u64 = u64::MAX;
/// Those of cancellations, which are of no interest.
const CANCEL: u64 = u64::MAX - 1;
/// Completions that the kernel has room for, for each entry of the submission queue. It keeps more, at a higher cost.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// What has an operation's memory and descriptor.
///
/// # Safety
/// [`Owner::entry`] names only memory that stays allocated and in place until the owner is dropped, also when the owner
/// itself is moved; that nobody else changes meanwhile; and that nobody else reads meanwhile if the kernel is to write there.
pub(super) unsafe trait Owner {
    /// The operation. Its descriptor stays open until the owner is dropped.
    fn entry(&mut self) -> squeue::Entry;

    /// Whether the kernel should have it at once. What has to wait for another machine anyway may go with the next entry.
    fn is_urgent(&self) -> bool;
}

/// Names an operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(u64);

/// An operation has ended.
pub(super) struct Completion<T> {
    /// What it was started with.
    pub(super) owner: T,
    /// What the kernel returned: a negative error number, or what the operation counts.
    pub(super) result: i32,
}

pub(super) struct Ring<T: Owner> {
    uring: IoUring,
    slots: Slots<T>,
    /// What the submission queue had no room for.
    backlog: VecDeque<squeue::Entry>,
    bell: Arc<OwnedFd>,
    bell_watched: bool,
    /// Something urgent was started since the kernel was last entered.
    urgent: bool,
}

/// A ring as this backend needs it. Kernels that do not know one of its flags refuse with EINVAL.
pub(super) fn setup(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_clamp()
        .setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_ENTRY))
        .build(entries)
}

impl<T: Owner> Ring<T> {
    /// A ring of this thread that wakes when `bell`, an eventfd, rings.
    pub(super) fn new(entries: u32, bell: Arc<OwnedFd>) -> io::Result<Self> {
        // The kernel refuses none with the error that it has for flags it does not know.
        let uring = setup(entries.max(1))?;
        let slots = Slots { slots: Vec::new(), free: Vec::new(), in_flight: 0 };
        Ok(Self { uring, slots, backlog: VecDeque::new(), bell, bell_watched: false, urgent: false })
    }

    /// Starts the operation of `owner`, with the next entry into the kernel.
    pub(super) fn start(&mut self, owner: T) -> Token {
        self.urgent |= owner.is_urgent();
        let (token, owner) = self.slots.insert(owner);
        let entry = owner.entry().user_data(token.0);
        // SAFETY: what the entry names belongs to the owner, by the contract of `Owner`. The owner is in its slot until
        // the operation's only completion has been taken: see `next`, and `drop` for the end of the ring.
        unsafe { self.push(entry) };
        token
    }

    /// Asks the kernel to end an operation soon. It completes in any case, with ECANCELED or with what it came to.
    pub(super) fn cancel(&mut self, token: Token) {
        let entry = opcode::AsyncCancel::new(token.0).build().user_data(CANCEL);
        // SAFETY: a cancellation uses no memory.
        unsafe { self.push(entry) };
    }

    /// As [`Ring::cancel`], for all operations whose owner is such.
    pub(super) fn cancel_those(&mut self, such: impl Fn(&T) -> bool) {
        for token in self.slots.tokens(such) {
            self.cancel(token);
        }
    }

    /// Whether something urgent was started that the kernel does not have yet.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// Operations started whose completion has not been taken.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.in_flight
    }

    /// The next completion at hand.
    pub(super) fn next(&mut self) -> Option<Completion<T>> {
        loop {
            let entry = self.uring.completion().next()?;
            match entry.user_data() {
                BELL => self.bell_watched &= cqueue::more(entry.flags()),
                CANCEL => {}
                token => {
                    if let Some(owner) = self.slots.remove(Token(token)) {
                        return Some(Completion { owner, result: entry.result() });
                    }
                }
            }
        }
    }

    /// Whether a completion is at hand, or the bell has rung.
    pub(super) fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// Hands over what was started, and lets the kernel do what it has deferred, if there is either. Does not wait.
    ///
    /// # Errors
    /// The ring is of no use any more.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.refill();
        let submission = self.uring.submission();
        let nothing = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
        drop(submission);
        if nothing { Ok(()) } else { self.enter(0, None) }
    }

    /// Hands over what was started and waits until a completion is at hand, the bell rings or the time is over. May return
    /// earlier.
    ///
    /// # Errors
    /// The ring is of no use any more.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.bell_watched {
            self.watch_bell();
        }
        self.refill();
        let want = usize::from(self.backlog.is_empty() && self.uring.completion().is_empty());
        self.enter(want, timeout)
    }

    /// Each ring is one more event of the same request, until the kernel says that it was the last.
    fn watch_bell(&mut self) {
        self.bell_watched = true;
        let bell = types::Fd(self.bell.as_raw_fd());
        let entry = opcode::PollAdd::new(bell, libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll uses no memory. The bell is open for as long as the ring lives.
        unsafe { self.push(entry.user_data(BELL)) };
    }

    /// # Safety
    /// What the entry names must live until its completion.
    unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's.
        if !self.backlog.is_empty() || unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: that of `push`, which put it there.
            if unsafe { self.uring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        self.urgent = false;
        let submitter = self.uring.submitter();
        let entered = match timeout {
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&timeout))
            }
            None => submitter.submit_and_wait(want),
        };
        match entered {
            Ok(_) => Ok(()),
            // The time is over, or a signal came, or the kernel lacks memory for now. Nothing is lost: what it did not
            // take stays in the queue.
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }
}

impl<T: Owner> Drop for Ring<T> {
    fn drop(&mut self) {
        self.cancel_those(|_| true);
        while self.slots.in_flight > 0 {
            if let Err(error) = self.wait(None) {
                // The kernel may still use their memory.
                tracing::error!(%error, operations = self.slots.in_flight, "the ring is lost with what is in flight");
                std::mem::forget(std::mem::take(&mut self.slots.slots));
                return;
            }
            while self.next().is_some() {}
        }
    }
}

/// The owners of what is in flight. A token is the slot's number and, above it, how often the slot was used before, so that
/// a late cancellation does not meet the slot's next operation.
struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    in_flight: usize,
}

struct Slot<T> {
    uses: u32,
    owner: Option<T>,
}

impl<T> Slots<T> {
    fn insert(&mut self, owner: T) -> (Token, &mut T) {
        let number = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { uses: 0, owner: None });
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations are in flight")
        });
        self.in_flight += 1;
        let slot = &mut self.slots[number as usize];
        // Not the last one, of which the tokens without a slot are.
        slot.uses = (slot.uses + 1) % u32::MAX;
        let token = Token(u64::from(slot.uses) << 32 | u64::from(number));
        (token, slot.owner.insert(owner))
    }

    fn remove(&mut self, token: Token) -> Option<T> {
        let number = token.0 as u32;
        let slot = self.slots.get_mut(number as usize)?;
        assert_eq!(u64::from(slot.uses), token.0 >> 32, "an operation completes once");
        let owner = slot.owner.take()?;
        self.free.push(number);
        self.in_flight -= 1;
        Some(owner)
    }

    fn tokens(&self, such: impl Fn(&T) -> bool) -> Vec<Token> {
        let numbered = self.slots.iter().zip(0_u64..);
        let theirs = numbered.filter(|(slot, _)| slot.owner.as_ref().is_some_and(&such));
        theirs.map(|(slot, number)| Token(u64::from(slot.uses) << 32 | number)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// A receive, or a write of what it holds.
    struct Bytes {
        socket: UnixStream,
        bytes: Box<[u8]>,
        sends: bool,
    }

    // SAFETY: the memory of the box stays in place when the box moves, and nobody else knows it.
    unsafe impl Owner for Bytes {
        fn entry(&mut self) -> squeue::Entry {
            let (fd, len) = (types::Fd(self.socket.as_raw_fd()), self.bytes.len() as u32);
            if self.sends {
                opcode::Send::new(fd, self.bytes.as_ptr(), len).build()
            } else {
                opcode::Recv::new(fd, self.bytes.as_mut_ptr(), len).build()
            }
        }

        fn is_urgent(&self) -> bool {
            self.sends
        }
    }

    fn ring(entries: u32) -> (Ring<Bytes>, Arc<OwnedFd>) {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        (Ring::new(entries, Arc::clone(&bell)).unwrap(), bell)
    }

    fn recv(socket: &UnixStream) -> Bytes {
        Bytes { socket: socket.try_clone().unwrap(), bytes: vec![0; 8].into(), sends: false }
    }

    fn next(ring: &mut Ring<Bytes>) -> Completion<Bytes> {
        loop {
            if let Some(completion) = ring.next() {
                return completion;
            }
            ring.wait(None).unwrap();
        }
    }

    #[test]
    fn an_owner_comes_back_with_what_the_kernel_put_into_it() {
        let (mut ring, _bell) = ring(8);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ring.start(recv(&ours));
        ring.flush().unwrap();
        assert!(ring.next().is_none());
        theirs.write_all(b"hello").unwrap();
        let Completion { owner, result } = next(&mut ring);
        assert_eq!((result, &owner.bytes[..5]), (5, &b"hello"[..]));
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn more_operations_than_the_queue_has_room_for_all_complete() {
        for entries in [0, 2] {
            all_complete(ring(entries).0);
        }
    }

    fn all_complete(mut ring: Ring<Bytes>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for number in 0..100_u8 {
            let bytes = vec![number].into();
            ring.start(Bytes { socket: ours.try_clone().unwrap(), bytes, sends: true });
        }
        for _ in 0..100 {
            assert_eq!(next(&mut ring).result, 1);
        }
        let mut got = [0; 100];
        theirs.read_exact(&mut got).unwrap();
        assert!((0..100).all(|number| got.contains(&number)));
    }

    #[test]
    fn a_cancelled_operation_gives_its_owner_back_and_a_late_cancellation_meets_nobody() {
        let (mut ring, _bell) = ring(8);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let first = ring.start(recv(&ours));
        ring.cancel(first);
        assert_eq!(next(&mut ring).result, -libc::ECANCELED);
        let second = ring.start(recv(&ours));
        assert_eq!(first.0 as u32, second.0 as u32, "the same slot");
        ring.cancel(first);
        ring.flush().unwrap();
        assert!(ring.next().is_none());
        theirs.write_all(b"x").unwrap();
        assert_eq!(next(&mut ring).result, 1);
    }

    #[test]
    fn a_ring_dropped_with_a_receive_in_flight_ends_it_before_its_memory_is_freed() {
        let (mut ring, _bell) = ring(8);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ring.start(recv(&ours));
        ring.flush().unwrap();
        drop(ring);
        // Had it outlived the ring, it would take this.
        theirs.write_all(b"x").unwrap();
        let mut byte = [0];
        (&ours).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn each_ring_of_the_bell_ends_a_wait_though_nobody_reads_it() {
        let (mut ring, bell) = ring(8);
        for _ in 0..1000 {
            assert!(ring.next().is_none());
            rustix::io::write(&bell, &1_u64.to_ne_bytes()).unwrap();
            ring.wait(None).unwrap();
        }
        assert!(ring.next().is_none());
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        assert!(ring.uring.completion().is_empty(), "only the time was over");
    }
}
