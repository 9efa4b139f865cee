//! Clusters of real processes: `testnode` members on loopback ports and a real disk, to be killed.

use anyhow::{Context, Result, bail, ensure};
use ringraft::runtime::Backend;
use ringraft::{ClusterId, MemberConfig, NodeId};
use socket2::{Domain, Socket, Type};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The settings of a test member that differ from the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineFlags {
    /// What runs the core.
    pub backend: Backend,
    /// Size of a log segment: the smallest that the configuration allows, so that tests roll over.
    pub segment_bytes: u64,
    /// Segments prepared ahead.
    pub segments_ahead: usize,
    /// The largest batch.
    pub batch_bytes_max: usize,
    /// The largest command.
    pub command_bytes_max: usize,
    /// After how many milliseconds a disk that does not answer stops the member.
    pub disk_stall_stop_ms: u64,
}

/// Small logs.
pub const ENGINE_FLAGS: EngineFlags = EngineFlags {
    backend: Backend::Glommio,
    segment_bytes: 48 << 20,
    segments_ahead: 1,
    batch_bytes_max: 256 << 10,
    command_bytes_max: 1 << 20,
    disk_stall_stop_ms: 30_000,
};

/// How long a test waits for what should take milliseconds before it gives up: no assertion of speed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The command line of a test member: `ID DIR FLAGS [join] ID=ADDRESS…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeArgs {
    /// The cluster.
    pub cluster: ClusterId,
    /// The member.
    pub id: NodeId,
    /// Its data directory.
    pub dir: PathBuf,
    /// All members.
    pub members: Vec<MemberConfig>,
    /// Its settings.
    pub engine: EngineFlags,
    /// It is to be added to a cluster that exists.
    pub join: bool,
}

impl NodeArgs {
    /// Reads the command line of this process.
    ///
    /// # Errors
    /// When it is not as above.
    pub fn from_env() -> Result<Self> {
        Self::parse(std::env::args().skip(1))
    }

    /// Reads a command line, without the program's name.
    ///
    /// # Errors
    /// When it is not as above.
    pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let id = NodeId(args.next().context("the id is missing")?.parse()?);
        let dir = PathBuf::from(args.next().context("the directory is missing")?);
        let engine = EngineFlags::parse(&args.next().context("the flags are missing")?)?;
        let mut args = args.peekable();
        let join = args.next_if_eq("join").is_some();
        let members = args.map(|arg| {
            let (id, address) = arg.split_once('=').context("a member is ID=ADDRESS")?;
            Ok(MemberConfig { id: NodeId(id.parse()?), address: address.parse()? })
        });
        let members = members.collect::<Result<_>>()?;
        Ok(Self { cluster: ClusterId(0x7e57), id, dir, members, engine, join })
    }

    fn to_args(&self) -> Vec<String> {
        let members = self.members.iter().map(|member| format!("{}={}", member.id, member.address));
        let head = [self.id.to_string(), self.dir.display().to_string(), self.engine.to_arg()];
        let join = self.join.then(|| "join".to_owned());
        head.into_iter().chain(join).chain(members).collect()
    }
}

impl EngineFlags {
    fn to_arg(self) -> String {
        let Self {
            backend,
            segment_bytes,
            segments_ahead,
            batch_bytes_max,
            command_bytes_max,
            disk_stall_stop_ms,
        } = self;
        let backend = match backend {
            Backend::Glommio => "glommio",
            Backend::Uring => "uring",
        };
        format!(
            "{backend},{segment_bytes},{segments_ahead},{batch_bytes_max},{command_bytes_max},{disk_stall_stop_ms}"
        )
    }

    fn parse(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split(',').collect();
        let [backend, segment_bytes, segments_ahead, batch_bytes_max, command_bytes_max, disk_stall_stop_ms] =
            parts[..]
        else {
            bail!("flags are a backend and five numbers, not {text:?}")
        };
        Ok(Self {
            backend: match backend {
                "glommio" => Backend::Glommio,
                "uring" => Backend::Uring,
                _ => bail!("there is no backend {backend:?}"),
            },
            segment_bytes: segment_bytes.parse()?,
            segments_ahead: segments_ahead.parse()?,
            batch_bytes_max: batch_bytes_max.parse()?,
            command_bytes_max: command_bytes_max.parse()?,
            disk_stall_stop_ms: disk_stall_stop_ms.parse()?,
        })
    }
}

/// What runs members: a program that takes [`NodeArgs`] behind some arguments of its own.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// Its own arguments.
    pub leading: Vec<String>,
}

/// What members have said of the load: which commands are acknowledged, and which may be anywhere.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Acknowledged (stream, sequence).
    pub acked: BTreeSet<(u64, u64)>,
    /// Of unknown outcome.
    pub unknown: BTreeSet<(u64, u64)>,
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Follower, PreCandidate, Candidate or Leader.
    pub role: String,
    /// Its term.
    pub term: u64,
    /// The leader it knows; 0 for none.
    pub leader: u64,
    /// The end of its log.
    pub last: u64,
    /// Commit index.
    pub commit: u64,
    /// Applied index.
    pub applied: u64,
    /// Chain at the applied index.
    pub chain: String,
}

/// What a member has applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberJournal {
    /// Index of the last command.
    pub index: u64,
    /// Chain at its batch.
    pub chain: String,
    /// (stream, sequence) in log order.
    pub commands: Vec<(u64, u64)>,
}

/// An acknowledged command that a member does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The member.
    pub member: u64,
    /// How many.
    pub count: usize,
    /// The first of them.
    pub examples: Vec<(u64, u64)>,
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { member, count, examples } = self;
        write!(f, "member {member} has lost {count} acknowledged commands, such as {examples:?}")
    }
}

impl std::error::Error for Lost {}

/// A cluster of processes. Dropping it kills them, and removes their directories if [`Cluster::start`] made them.
pub struct Cluster {
    program: Program,
    engine: EngineFlags,
    members: Vec<MemberConfig>,
    /// They keep the ports for the members.
    _ports: Vec<Socket>,
    directory: PathBuf,
    _scratch: Option<tempfile::TempDir>,
    running: BTreeMap<u64, Member>,
    ledger: Arc<Mutex<Ledger>>,
}

struct Member {
    child: Child,
    orders: ChildStdin,
    answers: Arc<Answers>,
    reader: Option<std::thread::JoinHandle<()>>,
}

/// Lines of a member that are not of the load, to be waited for.
#[derive(Default)]
struct Answers {
    lines: Mutex<(VecDeque<String>, bool)>,
    changed: Condvar,
}

impl Cluster {
    /// Starts `count` members of the program `binary`, with their data in a new directory under `parent`, which is on
    /// a real disk.
    ///
    /// # Errors
    /// When a member does not come up.
    pub fn start(binary: &str, engine: EngineFlags, parent: &str, count: u64) -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("cluster-").tempdir_in(parent)?;
        let program = Program { path: binary.into(), leading: Vec::new() };
        let mut cluster = Self::stopped(program, engine, scratch.path(), count)?;
        cluster._scratch = Some(scratch);
        for id in 1..=count {
            cluster.spawn(id)?;
        }
        for id in 1..=count {
            cluster.wait_ready(id)?;
        }
        Ok(cluster)
    }

    /// A cluster of `count` members, none of which runs yet, with their data under `directory`, which may come and go.
    ///
    /// # Errors
    /// When there are no ports for them.
    pub fn stopped(program: Program, engine: EngineFlags, directory: &Path, count: u64) -> Result<Self> {
        let (addresses, ports) = reserve_addresses(count)?;
        let member = |(address, id)| MemberConfig { id: NodeId(id), address };
        Ok(Self {
            program,
            engine,
            members: addresses.into_iter().zip(1..).map(member).collect(),
            _ports: ports,
            directory: directory.into(),
            _scratch: None,
            running: BTreeMap::new(),
            ledger: Arc::default(),
        })
    }

    /// Where member `id` listens.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn address(&self, id: u64) -> SocketAddr {
        let member = self.members.iter().find(|member| member.id.get() == id);
        member.expect("an address is set aside for every id").address
    }

    /// What is started from now on runs with these settings.
    pub fn set_engine(&mut self, engine: EngineFlags) {
        self.engine = engine;
    }

    /// Starts member `id`, again or for the first time, and waits until it has recovered.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self, id: u64) -> Result<()> {
        self.spawn(id)?;
        self.wait_ready(id)
    }

    /// Starts member `id`, and does not wait until it has recovered.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, id: u64) -> Result<()> {
        self.spawn_as(id, self.members.clone(), false)
    }

    /// Starts member `id` with that list of members, or to join them, and waits until it has recovered.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_as(&mut self, id: u64, members: &[u64], join: bool) -> Result<()> {
        let members = self.members.iter().filter(|member| members.contains(&member.id.get())).cloned();
        self.spawn_as(id, members.collect(), join)?;
        self.wait_ready(id)
    }

    /// Asks member `id` for other members: words such as `add=2,3` and `remove=1`. Returns the index at which it is done.
    ///
    /// # Errors
    /// When it is refused, or nothing comes of it.
    pub fn change(&mut self, id: u64, words: &[&str]) -> Result<u64> {
        let mut order = "change".to_owned();
        for word in words {
            let (what, ids) = word.split_once('=').context("what=ids")?;
            let with_address = |id: &str| -> Result<String> {
                let number: u64 = id.parse()?;
                let member = self.members.iter().find(|member| member.id.get() == number);
                let address = member.context("an address is set aside for every id")?.address;
                Ok(if what == "add" { format!("{id}@{address}") } else { id.to_owned() })
            };
            let ids: Vec<String> = ids.split(',').map(with_address).collect::<Result<_>>()?;
            order.push_str(&format!(" {what}={}", ids.join(",")));
        }
        self.order(id, &order)?;
        let line = self.member(id)?.answers.wait("changed")?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["changed", "at", index] => Ok(index.parse()?),
            _ => bail!("{line}"),
        }
    }

    fn spawn_as(&mut self, id: u64, members: Vec<MemberConfig>, join: bool) -> Result<()> {
        ensure!(!self.running.contains_key(&id), "member {id} is running");
        let args = NodeArgs {
            cluster: ClusterId(0),
            id: NodeId(id),
            dir: self.data_dir(id),
            members,
            engine: self.engine,
            join,
        };
        let path = &self.program.path;
        let mut child = Command::new(path)
            .args(&self.program.leading)
            .args(args.to_args())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {}", path.display()))?;
        let orders = child.stdin.take().context("standard input is piped")?;
        let out = child.stdout.take().context("standard output is piped")?;
        let answers = Arc::new(Answers::default());
        let (sink, ledger) = (Arc::clone(&answers), Arc::clone(&self.ledger));
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                sink.take(line, &ledger);
            }
            sink.end();
        });
        self.running.insert(id, Member { child, orders, answers, reader: Some(reader) });
        Ok(())
    }

    /// Waits until member `id` has recovered.
    ///
    /// # Errors
    /// When it ends, or does not for a very long time.
    pub fn wait_ready(&mut self, id: u64) -> Result<()> {
        self.member(id)?.answers.wait("ready").with_context(|| format!("member {id} does not come up"))?;
        Ok(())
    }

    /// The data directory of member `id`.
    #[must_use]
    pub fn data_dir(&self, id: u64) -> PathBuf {
        self.directory.join(format!("node-{id}"))
    }

    /// The running members.
    #[must_use]
    pub fn running(&self) -> Vec<u64> {
        self.running.keys().copied().collect()
    }

    fn member(&mut self, id: u64) -> Result<&mut Member> {
        self.running.get_mut(&id).with_context(|| format!("member {id} is not running"))
    }

    /// Sends an order to member `id`.
    ///
    /// # Errors
    /// When it is not running.
    pub fn order(&mut self, id: u64, order: &str) -> Result<()> {
        writeln!(self.member(id)?.orders, "{order}").with_context(|| format!("member {id} takes no orders"))
    }

    /// Ends the load on member `id` and waits until its last command has an outcome.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn stop_load(&mut self, id: u64) -> Result<()> {
        self.order(id, "stop")?;
        self.member(id)?.answers.wait("stopped")?;
        Ok(())
    }

    /// Kills member `id` as `kill -9` does, and takes in what it had said until then.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self, id: u64) -> Result<()> {
        let mut member = self.running.remove(&id).with_context(|| format!("member {id} is not running"))?;
        member.child.kill()?;
        member.child.wait()?;
        member.join_reader();
        Ok(())
    }

    /// Kills all running members at once, and does not wait until they have ended, nor forgets them.
    ///
    /// # Errors
    /// When one cannot be killed.
    pub fn signal_all(&mut self) -> Result<()> {
        self.running.values_mut().try_for_each(|member| Ok(member.child.kill()?))
    }

    /// Waits for a line of member `id` that begins so.
    ///
    /// # Errors
    /// When it ends before, or does not say so for a very long time.
    pub fn wait_line(&mut self, id: u64, prefix: &str) -> Result<String> {
        self.member(id)?.answers.wait(prefix).with_context(|| format!("member {id}"))
    }

    /// Waits until member `id` ends by itself, and takes in what it had said until then.
    ///
    /// # Errors
    /// When it does not for a very long time.
    pub fn wait_exit(&mut self, id: u64) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.member(id)?.child.try_wait()? {
                if let Some(mut member) = self.running.remove(&id) {
                    member.join_reader();
                }
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "member {id} does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills all running members at once, and takes in what they had said until then.
    ///
    /// # Errors
    /// When one cannot be killed.
    pub fn kill_all(&mut self) -> Result<()> {
        for member in self.running.values_mut() {
            member.child.kill()?;
        }
        for mut member in std::mem::take(&mut self.running).into_values() {
            member.child.wait()?;
            member.join_reader();
        }
        Ok(())
    }

    /// Asks member `id` for its status.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&mut self, id: u64) -> Result<MemberStatus> {
        self.order(id, "status")?;
        let line = self.member(id)?.answers.wait("status")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, role, term, leader, last, commit, applied, chain] = words[..] else {
            bail!("odd answer {line:?}")
        };
        Ok(MemberStatus {
            role: role.to_owned(),
            term: term.parse()?,
            leader: leader.parse()?,
            last: last.parse()?,
            commit: commit.parse()?,
            applied: applied.parse()?,
            chain: chain.to_owned(),
        })
    }

    /// Waits until one of the running members leads.
    ///
    /// # Errors
    /// When none does for a very long time.
    pub fn wait_leader(&mut self) -> Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let mut leaders = Vec::new();
            for id in self.running() {
                let status = self.status(id)?;
                if status.role == "Leader" {
                    leaders.push((status.term, id));
                }
            }
            if let Some((_, id)) = leaders.into_iter().max() {
                return Ok(id);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("no leader among {:?}", self.running())
    }

    /// Waits until so many more commands have been acknowledged.
    ///
    /// # Errors
    /// When they are not for a very long time.
    pub fn wait_acks(&self, more: usize) -> Result<()> {
        let wanted = self.ledger().acked.len() + more;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.ledger().acked.len() >= wanted {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("{} acknowledged, {wanted} wanted", self.ledger().acked.len())
    }

    /// Waits until all running members have applied the same, with nothing left to commit.
    ///
    /// # Errors
    /// When they do not for a very long time.
    pub fn wait_converged(&mut self) -> Result<MemberStatus> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            seen.clear();
            for id in self.running() {
                seen.push(self.status(id)?);
            }
            let first = &seen[0];
            // A new leader may not know yet that what its log has of an earlier term is committed.
            let same = |status: &MemberStatus| {
                status.applied == status.commit
                    && status.commit == status.last
                    && (status.applied, &status.chain) == (first.applied, &first.chain)
            };
            if first.applied > 0 && seen.iter().all(same) {
                return Ok(first.clone());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("not converged: {seen:?}")
    }

    /// What member `id` has applied.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn journal(&mut self, id: u64) -> Result<MemberJournal> {
        self.order(id, "applied")?;
        let answers = Arc::clone(&self.member(id)?.answers);
        let head = answers.wait("applied")?;
        let words: Vec<&str> = head.split_whitespace().collect();
        let [_, index, chain, count] = words[..] else { bail!("odd answer {head:?}") };
        let mut commands = Vec::new();
        for _ in 0..count.parse::<usize>()? {
            let line = answers.wait("at ")?;
            let (stream, sequence) = line[3..].split_once(' ').context("two numbers")?;
            commands.push((stream.parse()?, sequence.parse()?));
        }
        Ok(MemberJournal { index: index.parse()?, chain: chain.to_owned(), commands })
    }

    /// What the load of all members so far has come to.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().expect("no holder panics").clone()
    }

    /// Checks that nothing acknowledged is lost or doubled, and that all members have the same.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify(&mut self) -> Result<()> {
        self.wait_converged()?;
        let ledger = self.ledger();
        let mut journals = Vec::new();
        for id in self.running() {
            let journal = self.journal(id)?;
            let present: BTreeSet<_> = journal.commands.iter().copied().collect();
            ensure!(present.len() == journal.commands.len(), "member {id} has applied a command twice");
            let lost: Vec<_> = ledger.acked.difference(&present).copied().collect();
            if !lost.is_empty() {
                let examples = lost.iter().copied().take(5).collect();
                return Err(Lost { member: id, count: lost.len(), examples }.into());
            }
            journals.push(journal);
        }
        ensure!(
            journals.windows(2).all(|pair| pair[0] == pair[1]),
            "the members have applied different commands"
        );
        Ok(())
    }

    /// Stops member `id` in good order.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub fn quit(&mut self, id: u64) -> Result<()> {
        self.order(id, "quit")?;
        let mut member = self.running.remove(&id).with_context(|| format!("member {id} is not running"))?;
        let status = member.child.wait()?;
        member.join_reader();
        ensure!(status.success(), "member {id} ended with {status}");
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in self.running.values_mut() {
            // Already gone is as good.
            let _ = member.child.kill();
            let _ = member.child.wait();
            member.join_reader();
        }
    }
}

impl Member {
    fn join_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
    }
}

impl Answers {
    fn take(&self, line: String, ledger: &Mutex<Ledger>) {
        let pair = |rest: &str| {
            let (stream, sequence) = rest.split_once(' ')?;
            Some((stream.parse().ok()?, sequence.parse().ok()?))
        };
        if let Some(command) = line.strip_prefix("ack ").and_then(pair) {
            ledger.lock().expect("no holder panics").acked.insert(command);
        } else if let Some(command) = line.strip_prefix("unknown ").and_then(pair) {
            ledger.lock().expect("no holder panics").unknown.insert(command);
        } else if line != "lost" {
            self.lines.lock().expect("no holder panics").0.push_back(line);
            self.changed.notify_all();
        }
    }

    fn end(&self) {
        self.lines.lock().expect("no holder panics").1 = true;
        self.changed.notify_all();
    }

    /// The next line that begins with `prefix`.
    fn wait(&self, prefix: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lines.lock().expect("no holder panics");
        loop {
            if let Some(position) = lines.0.iter().position(|line| line.starts_with(prefix)) {
                return lines.0.remove(position).context("a line has just been there");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!lines.1, "the member ended before it said {prefix:?}");
            ensure!(!left.is_zero(), "the member does not say {prefix:?}");
            lines = self.changed.wait_timeout(lines, left).expect("no holder panics").0;
        }
    }
}

/// Loopback addresses with ports that the system gave, and sockets that keep them: bound, but not listening, they leave the
/// port to a member, which sets SO_REUSEADDR as well, and to nobody else: no connection that goes out gets it as its own port
/// while the member is down.
fn reserve_addresses(count: u64) -> Result<(Vec<SocketAddr>, Vec<Socket>)> {
    let mut sockets = Vec::new();
    let mut addresses = Vec::new();
    for _ in 0..count {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
        addresses.push(socket.local_addr()?.as_socket().context("an address of the internet")?);
        sockets.push(socket);
    }
    Ok((addresses, sockets))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_reserved_port_is_for_a_listener_that_reuses_addresses_only() {
        let (addresses, _sockets) = reserve_addresses(2).expect("two ports");
        assert_ne!(addresses[0], addresses[1]);
        let plain = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        assert_eq!(
            plain.bind(&addresses[0].into()).map_err(|error| error.kind()),
            Err(std::io::ErrorKind::AddrInUse)
        );
        for _ in 0..2 {
            // Sets SO_REUSEADDR.
            let listener = TcpListener::bind(addresses[0]).expect("the port is free for a member");
            assert_eq!(listener.local_addr().expect("an address"), addresses[0]);
        }
    }
}
