//! The replication pattern without consensus.
//!
//! The leader sends each batch to every follower and writes it to its own file; a follower receives a batch,
//! writes it, and acknowledges how many of the first batches it holds durably. A batch is committed when a
//! majority holds it and all before it. There is no checksum, no term, no index: a batch is its sequence
//! number, a mark on the last one, and noise. With no follower this measures the disk alone.
//!
//! What makes it the floor: one system call per turn of a follower (it submits the write, the next receive
//! and the acknowledgement together); a leader that sleeps through completions that cannot commit anything
//! (it waits for as many as votes are missing); sends that cost no completion; nothing allocated on the
//! way. The same memory is received into and written from.

use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use super::disk::LogFile;
use super::ring::{Ring, Token};
use super::socket::{Answer, Command, Control};
use super::{Measured, Pace, Samples, Shape, Usage};

/// A measurement without a result is made so many times longer at the most.
const WINDOWS_MAX: u32 = 100;
/// How many batches fit into memory: as many as are in flight, and these for a follower that is behind.
const SLOTS_SPARE: usize = 8;
/// Batches in memory take at most about this much, if two fit and all that are in flight.
const SLOTS_BYTES: usize = 4 << 20;
/// An acknowledgement: the number of batches durable, 8 bytes.
const ACK_BYTES: usize = 8;
/// Room for acknowledgements, per follower: several may arrive together.
const ACK_ROOM: usize = 64 * ACK_BYTES;
/// The file table of either side: its log file first, then its sockets.
const LOG: u32 = 0;

const WRITE: Token = 1 << 56;
const RECV: Token = 2 << 56;
const ROOM: Token = 3 << 56;
const ACK: Token = 4 << 56;
const KIND: Token = 0x7f << 56;

/// The first 8 bytes of a batch: twice its sequence number, plus one if it is the last.
fn stamp(sequence: u64, last: bool) -> u64 {
    sequence << 1 | u64::from(last)
}

/// How many batches either side keeps in memory for `shape`.
pub(super) fn slots(shape: Shape) -> usize {
    let spare = SLOTS_SPARE.min(SLOTS_BYTES / shape.batch_bytes);
    shape.in_flight + spare.max(1)
}

/// How many of the first batches are written, from completions in any order.
struct Written {
    /// By slot: written, but not yet counted.
    done: Vec<bool>,
    count: u64,
}

impl Written {
    fn new(slots: usize) -> Self {
        Self { done: vec![false; slots], count: 0 }
    }

    fn mark(&mut self, sequence: u64) {
        let slots = self.done.len() as u64;
        self.done[(sequence % slots) as usize] = true;
        while std::mem::take(&mut self.done[(self.count % slots) as usize]) {
            self.count += 1;
        }
    }
}

/// The leader's view of a follower.
struct Peer<'a> {
    control: &'a Control,
    /// Its place in the file table.
    file: u32,
    ack_at: usize,
    sent_bytes: u64,
    waits_for_room: bool,
    acked: u64,
}

/// Replicates batches of `shape` to `peers` at `pace`. If everybody `looks`, they do so for work before they sleep.
pub(super) fn lead(
    file: &LogFile,
    peers: &mut [&mut Control],
    shape: Shape,
    looks: bool,
    pace: &Pace,
) -> anyhow::Result<Measured> {
    file.check(shape.batch_bytes)?;
    ensure!(
        (1..=32).contains(&shape.in_flight),
        "{} batches in flight; 1 to 32 are possible",
        shape.in_flight
    );
    let slots = slots(shape);
    for peer in peers.iter_mut() {
        let ready = peer.ask(&Command::Replicate { batch_bytes: shape.batch_bytes, slots, looks })?;
        ensure!(matches!(ready, Answer::Ready), "a follower answered out of turn");
    }
    let mut measured = Leader::new(file, peers, shape, slots, looks)?.run(pace)?;
    for peer in peers.iter_mut() {
        let Answer::Report { cpu_ns } = peer.ask(&Command::Report)? else {
            bail!("a follower answered out of turn")
        };
        measured.cpu_ns_total += cpu_ns;
    }
    pace.check()?;
    Ok(Measured {
        samples: measured.samples,
        count: measured.counted,
        total: measured.count,
        seconds: measured.seconds,
        cpu_ns_each: measured.cpu_ns_total as f64 / measured.count as f64,
    })
}

/// What the leader alone knows after a run.
struct Run {
    samples: Samples,
    counted: u64,
    seconds: f64,
    count: u64,
    cpu_ns_total: u64,
}

struct Leader<'a> {
    ring: Ring,
    file: &'a LogFile,
    peers: Vec<Peer<'a>>,
    shape: Shape,
    slots: usize,
    majority: usize,
    /// Batches begun, of which `committed` are committed.
    begun: u64,
    committed: u64,
    /// The last batch has been begun.
    last: bool,
    written: Written,
    /// By slot: when its batch was begun.
    begun_at: Vec<Instant>,
}

impl<'a> Leader<'a> {
    fn new(
        file: &'a LogFile,
        controls: &'a [&mut Control],
        shape: Shape,
        slots: usize,
        looks: bool,
    ) -> anyhow::Result<Self> {
        let batches_bytes = slots * shape.batch_bytes;
        let mut files = vec![file.as_fd()];
        let mut peers = Vec::new();
        for control in controls.iter() {
            let at = peers.len();
            let ack_at = batches_bytes + at * ACK_ROOM;
            let file = 1 + at as u32;
            files.push(control.as_fd());
            peers.push(Peer { control, file, ack_at, sent_bytes: 0, waits_for_room: false, acked: 0 });
        }
        let mut ring = Ring::new(&files, batches_bytes + peers.len() * ACK_ROOM, looks)?;
        ring.fill();
        Ok(Self {
            ring,
            file,
            majority: peers.len().div_ceil(2) + 1,
            peers,
            shape,
            slots,
            begun: 0,
            committed: 0,
            last: false,
            written: Written::new(slots),
            begun_at: vec![Instant::now(); slots],
        })
    }

    fn run(mut self, pace: &Pace) -> anyhow::Result<Run> {
        let mut samples = Samples::new()?;
        let mut counted = 0;
        let cpu = pace.usage.cpu_ns();
        let begun = Instant::now();
        let counted_from = begun + pace.warm_up;
        // A window in which nothing was committed says nothing: it is made longer, within reason.
        let mut windows = 1;
        let mut counted_to = counted_from + pace.measure;
        let mut now = begun;
        for at in 0..self.peers.len() {
            self.receive_acks(at)?;
        }
        loop {
            if now >= counted_to && counted == 0 && windows < WINDOWS_MAX {
                windows += 1;
                counted_to += pace.measure;
            }
            while !self.last && self.may_begin() {
                self.last = now >= counted_to || pace.stopped();
                self.begin(now)?;
            }
            let all = self.peers.iter().map(|peer| peer.acked).fold(self.written.count, u64::min);
            if self.last && all == self.begun {
                break;
            }
            self.ring.turn(self.completions_needed()).context("waiting on io_uring")?;
            now = Instant::now();
            self.take_completions()?;
            let committed = self.count_committed();
            for sequence in self.committed..committed {
                let since = self.begun_at[(sequence % self.slots as u64) as usize];
                if since >= counted_from && now < counted_to {
                    samples.record(now - since);
                    counted += 1;
                }
            }
            self.committed = committed;
        }
        let cpu_ns_total = pace.usage.cpu_ns() - cpu;
        let seconds = pace.measure.as_secs_f64() * f64::from(windows);
        Ok(Run { samples, counted, seconds, count: self.begun, cpu_ns_total })
    }

    /// Whether the window has room, and a slot is free: its batch is written here and sent to all.
    fn may_begin(&self) -> bool {
        let batch = self.shape.batch_bytes as u64;
        let sent = self.peers.iter().map(|peer| peer.sent_bytes / batch).fold(self.written.count, u64::min);
        self.begun - self.committed < self.shape.in_flight as u64 && self.begun - sent < self.slots as u64
    }

    /// Stamps the next batch, sends it, and hands its write to the next turn.
    fn begin(&mut self, now: Instant) -> anyhow::Result<()> {
        let (sequence, bytes) = (self.begun, self.shape.batch_bytes);
        let slot = (sequence % self.slots as u64) as usize;
        self.ring.copy_in(slot * bytes, &stamp(sequence, self.last).to_le_bytes());
        self.begun_at[slot] = now;
        self.begun += 1;
        for at in 0..self.peers.len() {
            self.send(at)?;
        }
        let offset = self.file.offset(sequence, bytes);
        self.ring.push_write(LOG, slot * bytes, bytes, offset, WRITE | sequence)?;
        Ok(())
    }

    /// Sends a follower all that it lacks and its socket takes; the ring tells when there is room again.
    fn send(&mut self, at: usize) -> anyhow::Result<()> {
        let peer = &mut self.peers[at];
        if peer.waits_for_room {
            return Ok(());
        }
        let round = (self.slots * self.shape.batch_bytes) as u64;
        let end = self.begun * self.shape.batch_bytes as u64;
        while peer.sent_bytes < end {
            let from = peer.sent_bytes % round;
            let len = (round - from).min(end - peer.sent_bytes) as usize;
            let sent = self.ring.send_now(peer.control.as_fd(), from as usize, len);
            let sent = sent.context("sending to a follower")?;
            peer.sent_bytes += sent as u64;
            if sent < len {
                self.ring.push_poll_out(peer.file, ROOM | at as u64)?;
                peer.waits_for_room = true;
                break;
            }
        }
        Ok(())
    }

    fn receive_acks(&mut self, at: usize) -> anyhow::Result<()> {
        let peer = &self.peers[at];
        Ok(self.ring.push_recv(peer.file, peer.ack_at, ACK_ROOM, false, RECV | at as u64)?)
    }

    /// How many completions must come before anything more can be committed: one per missing vote. Each
    /// voter has an operation in flight, so as many will come.
    fn completions_needed(&self) -> usize {
        if self.committed == self.begun || self.last || self.peers.iter().any(|peer| peer.waits_for_room) {
            return 1;
        }
        let has = |count: u64| usize::from(count > self.committed);
        let votes = has(self.written.count) + self.peers.iter().map(|peer| has(peer.acked)).sum::<usize>();
        self.majority.saturating_sub(votes).max(1)
    }

    fn take_completions(&mut self) -> anyhow::Result<()> {
        while let Some(completion) = self.ring.next() {
            let (kind, value) = (completion.token & KIND, completion.token & !KIND);
            match kind {
                WRITE => {
                    let written = completion.result.context("writing the leader's file")?;
                    ensure!(written == self.shape.batch_bytes, "short write of {written} bytes");
                    self.written.mark(value);
                }
                RECV => {
                    let received = completion.result.context("receiving from a follower")?;
                    self.take_acks(value as usize, received)?;
                }
                ROOM => {
                    completion.result.context("waiting for room to send")?;
                    self.peers[value as usize].waits_for_room = false;
                    self.send(value as usize)?;
                }
                _ => bail!("an unknown completion: {completion:?}"),
            }
        }
        Ok(())
    }

    fn take_acks(&mut self, at: usize, received: usize) -> anyhow::Result<()> {
        ensure!(received > 0, "a follower ended during the measurement");
        ensure!(received.is_multiple_of(ACK_BYTES), "a follower failed; it says why itself");
        let peer = &mut self.peers[at];
        let acked = self.ring.copy_out(peer.ack_at + received - ACK_BYTES);
        ensure!(
            peer.acked <= acked && acked <= self.begun,
            "a follower acknowledged {acked} of {}",
            self.begun
        );
        peer.acked = acked;
        // The last acknowledgement is followed by the answer to a command, which is not for the ring.
        if !self.last || acked < self.begun {
            self.receive_acks(at)?;
        }
        Ok(())
    }

    /// How many batches a majority holds.
    fn count_committed(&self) -> u64 {
        let holds = |count: u64| {
            let votes = self.peers.iter().filter(|peer| peer.acked >= count).count();
            votes + usize::from(self.written.count >= count) >= self.majority
        };
        let candidates = self.peers.iter().map(|peer| peer.acked).chain([self.written.count]);
        candidates.filter(|count| holds(*count)).max().unwrap_or(0).max(self.committed)
    }
}

/// The follower's side: receives, writes and acknowledges until the last batch. Returns the processor time.
pub(super) fn follow(
    file: &LogFile,
    leader: &mut Control,
    batch_bytes: usize,
    slots: usize,
    looks: bool,
    usage: Usage,
) -> anyhow::Result<u64> {
    file.check(batch_bytes)?;
    ensure!((2..=64).contains(&slots) && batch_bytes <= 64 << 20, "{slots} slots of {batch_bytes} bytes");
    const LEADER: u32 = 1;
    let ack_at = slots * batch_bytes;
    let mut ring = Ring::new(&[file.as_fd(), leader.as_fd()], ack_at + ACK_BYTES, looks)?;
    ring.fill();
    leader.tell(&Answer::Ready)?;
    let cpu = usage.cpu_ns();
    let quiet = ring.quiet_sends();
    let at = |sequence: u64| (sequence % slots as u64) as usize * batch_bytes;
    let (mut received, mut acked, mut last) = (0u64, 0u64, false);
    let mut written = Written::new(slots);
    // Of the batch being received, so much has arrived.
    let (mut receiving, mut filled) = (false, 0);
    loop {
        if acked < written.count {
            acked = written.count;
            // If an earlier one were still unsent it would now say more, and rightly so.
            ring.copy_in(ack_at, &acked.to_le_bytes());
            if quiet && !(last && acked == received) {
                ring.push_quiet_send(LEADER, ack_at, ACK_BYTES, ACK)?;
            } else {
                let sent = ring.send_now(leader.as_fd(), ack_at, ACK_BYTES).context("acknowledging")?;
                ensure!(sent == ACK_BYTES, "the leader takes no acknowledgements");
            }
        }
        if last && acked == received {
            return Ok(usage.cpu_ns() - cpu);
        }
        if !receiving && !last && received - written.count < slots as u64 {
            ring.push_recv(LEADER, at(received) + filled, batch_bytes - filled, true, RECV | received)?;
            receiving = true;
        }
        ring.turn(1).context("waiting on io_uring")?;
        while let Some(completion) = ring.next() {
            let (kind, value) = (completion.token & KIND, completion.token & !KIND);
            match kind {
                WRITE => {
                    let bytes = completion.result.context("writing a follower's file")?;
                    ensure!(bytes == batch_bytes, "short write of {bytes} bytes");
                    written.mark(value);
                }
                RECV => {
                    let bytes = completion.result.context("receiving from the leader")?;
                    ensure!(bytes > 0, "the leader ended during the measurement");
                    receiving = false;
                    filled += bytes;
                    if filled < batch_bytes {
                        // Kernels before 5.19 may return a part of what was to be received whole.
                        continue;
                    }
                    filled = 0;
                    let stamped = ring.copy_out(at(received));
                    ensure!(stamped >> 1 == received, "batch {received} arrived as {}", stamped >> 1);
                    last = stamped & 1 == 1;
                    ring.push_write(
                        LOG,
                        at(received),
                        batch_bytes,
                        file.offset(received, batch_bytes),
                        WRITE | received,
                    )?;
                    received += 1;
                }
                ACK => bail!("acknowledging: {:?}", completion.result),
                _ => bail!("an unknown completion: {completion:?}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_that_complete_out_of_order_count_once_all_before_them_are_done() {
        let mut written = Written::new(4);
        written.mark(1);
        written.mark(2);
        assert_eq!(written.count, 0);
        written.mark(0);
        assert_eq!(written.count, 3);
        written.mark(4);
        written.mark(5);
        assert_eq!(written.count, 3);
        written.mark(3);
        assert_eq!(written.count, 6);
    }

    #[test]
    fn memory_holds_what_is_in_flight_and_at_least_one_batch_more() {
        assert_eq!(slots(Shape { batch_bytes: 4096, in_flight: 1 }), 9);
        assert_eq!(slots(Shape { batch_bytes: 256 << 10, in_flight: 4 }), 12);
        assert_eq!(slots(Shape { batch_bytes: 16 << 20, in_flight: 4 }), 5);
    }
}
