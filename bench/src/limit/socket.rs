//! Loopback sockets: the control messages between the leader and its followers, the round trip and the stream.
//!
//! Leader and follower share one TCP connection. Between measurements it carries [`Command`]s and [`Answer`]s
//! (a length, then JSON). A command that begins a measurement turns it over to that measurement's raw
//! bytes, whose last message says that it is the last; after that both are back to commands.
//!
//! Round trip and stream use plain blocking calls: for one small message at a time nothing is faster.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Measured, Pace, Samples};

/// The longest control message.
const MESSAGE_BYTES_MAX: usize = 4096;
/// The leader gives up on a follower that is silent for so long between measurements.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// What the leader tells a follower.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// Make the log file this long.
    Fill { bytes: u64 },
    /// Receive messages until the last, and send each one back if `echo`.
    Stream { message_bytes: usize, echo: bool },
    /// Receive batches, write them, acknowledge them, until the last, and look for them before you sleep if `looks`.
    Replicate { batch_bytes: usize, slots: usize, looks: bool },
    /// Say how much processor time the last measurement took.
    Report,
}

/// What a follower answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The first message: which follower this is, and that its file is open.
    Hello { id: usize },
    /// The command has been prepared (or done): raw bytes may come.
    Ready,
    /// Processor time of the last measurement.
    Report { cpu_ns: u64 },
    /// The follower cannot go on.
    Failed { error: String },
}

/// One end of the connection.
pub(super) struct Control {
    stream: TcpStream,
}

impl Control {
    /// Takes over a fresh connection.
    pub(super) fn new(stream: TcpStream) -> anyhow::Result<Self> {
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        Ok(Self { stream })
    }

    /// Makes reads fail when the other side is silent for too long.
    pub(super) fn limit_silence(&self) -> anyhow::Result<()> {
        self.stream.set_read_timeout(Some(SILENCE_MAX)).context("setting a receive timeout")
    }

    /// Sends a control message.
    pub(super) fn tell(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let body = serde_json::to_vec(message)?;
        ensure!(body.len() <= MESSAGE_BYTES_MAX, "a control message of {} bytes", body.len());
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        self.stream.write_all(&frame).context("sending a control message")
    }

    /// Receives a control message; `None` when the other side has closed.
    pub(super) fn hear<M: DeserializeOwned>(&mut self) -> anyhow::Result<Option<M>> {
        let mut len = [0; 4];
        match self.stream.read_exact(&mut len) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read.context("receiving a control message")?,
        }
        let len = u32::from_le_bytes(len) as usize;
        ensure!(len <= MESSAGE_BYTES_MAX, "a control message of {len} bytes");
        let mut body = vec![0; len];
        self.stream.read_exact(&mut body).context("receiving a control message")?;
        Ok(Some(serde_json::from_slice(&body).context("reading a control message")?))
    }

    /// Sends a command and waits for its answer.
    pub(super) fn ask(&mut self, command: &Command) -> anyhow::Result<Answer> {
        self.tell(command)?;
        self.answer()
    }

    /// Waits for an answer that is not a failure.
    pub(super) fn answer(&mut self) -> anyhow::Result<Answer> {
        match self.hear()? {
            Some(Answer::Failed { error }) => bail!("a follower failed: {error}"),
            Some(answer) => Ok(answer),
            None => bail!("a follower ended unexpectedly"),
        }
    }

    /// Closes the connection in both directions, so that the other side ends.
    pub(super) fn close(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Whether the other side has closed, whatever it sent before.
    pub(super) fn closed_by_peer(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut polled, Some(&at_once)), Ok(1))
    }

    fn send_all(&self, mut bytes: &[u8]) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.stream, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("sending on loopback"),
            }
        }
        Ok(())
    }

    fn recv_all(&self, bytes: &mut [u8]) -> anyhow::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            match rustix::net::recv(&self.stream, &mut bytes[at..], RecvFlags::WAITALL) {
                Ok((0, _)) => bail!("the other side closed the connection"),
                Ok((received, _)) => at += received,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("receiving on loopback"),
            }
        }
        Ok(())
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The leader's side of [`Command::Stream`]: messages one after the other, each answered if `echo`.
pub(super) fn send_messages(
    peer: &mut Control,
    message_bytes: usize,
    echo: bool,
    pace: &Pace,
) -> anyhow::Result<Measured> {
    let ready = peer.ask(&Command::Stream { message_bytes, echo })?;
    ensure!(matches!(ready, Answer::Ready), "a follower answered out of turn");
    let mut message = vec![0u8; message_bytes];
    let mut samples = Samples::new()?;
    let cpu = pace.usage.cpu_ns();
    let begun = Instant::now();
    let (counted_from, counted_to) = (begun + pace.warm_up, begun + pace.warm_up + pace.measure);
    let (mut count, mut counted) = (0u64, 0u64);
    loop {
        let sent = Instant::now();
        // At least one message is counted, however slow the machine.
        let last = sent >= counted_to && counted > 0 || pace.stopped();
        message[0] = u8::from(last);
        peer.send_all(&message)?;
        if echo {
            peer.recv_all(&mut message)?;
        }
        count += 1;
        if last {
            break;
        }
        if sent >= counted_from {
            counted += 1;
            if echo {
                samples.record(sent.elapsed());
            }
        }
    }
    let Answer::Report { cpu_ns } = peer.ask(&Command::Report)? else {
        bail!("a follower answered out of turn")
    };
    let elapsed = begun.elapsed().saturating_sub(pace.warm_up);
    let cpu_ns = (pace.usage.cpu_ns() - cpu) + cpu_ns;
    pace.check()?;
    Ok(Measured {
        samples,
        count: counted,
        total: count,
        seconds: elapsed.as_secs_f64(),
        cpu_ns_each: cpu_ns as f64 / count as f64,
    })
}

/// The follower's side of [`Command::Stream`].
pub(super) fn receive_messages(leader: &mut Control, message_bytes: usize, echo: bool) -> anyhow::Result<()> {
    ensure!((1..=16 << 20).contains(&message_bytes), "messages of {message_bytes} bytes");
    let mut message = vec![0u8; message_bytes];
    leader.tell(&Answer::Ready)?;
    loop {
        leader.recv_all(&mut message)?;
        if echo {
            leader.send_all(&message)?;
        }
        if message[0] == 1 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_control_message_arrives_and_a_closed_connection_is_no_message() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = Control::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
        let mut theirs = Control::new(listener.accept().unwrap().0).unwrap();
        ours.tell(&Command::Fill { bytes: 42 }).unwrap();
        assert!(matches!(theirs.hear().unwrap(), Some(Command::Fill { bytes: 42 })));
        theirs.tell(&Answer::Failed { error: "no disk".into() }).unwrap();
        assert!(ours.answer().unwrap_err().to_string().contains("no disk"));
        assert!(!theirs.closed_by_peer());
        ours.close();
        assert!(theirs.closed_by_peer());
        assert!(theirs.hear::<Command>().unwrap().is_none());
    }
}
