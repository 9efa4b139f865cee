use super::*;
use crate::sim::context::SECOND;
use crate::sim::trace::Trace;

const PORT: u16 = 7000;

/// Some hosts, each with a listening process.
struct Net {
    context: Rc<Context>,
    fabric: Rc<RefCell<Fabric>>,
    links: Vec<SimLink>,
    listeners: Vec<ListenerId>,
    next_id: u64,
    done: Vec<Vec<LinkDone<SimBuf>>>,
}

impl Net {
    fn new(seed: u64, hosts: usize, config: LinkConfig) -> Self {
        let context = Context::new(Trace::new(false));
        let fabric = Fabric::new(&context, hosts, Rng::new(seed), config);
        let links = (0..hosts).map(|host| SimLink::new(&fabric, host)).collect();
        let done = (0..hosts).map(|_| Vec::new()).collect();
        let mut net = Self { context, fabric, links, listeners: Vec::new(), next_id: 0, done };
        net.listeners = (0..hosts).map(|host| net.listen(host)).collect();
        net
    }

    fn listen(&mut self, host: usize) -> ListenerId {
        let id = self.submit(host, LinkOp::Listen { address: SocketAddr::new(address_of(host), PORT) });
        match self.outcome(host, id).unwrap() {
            LinkOutput::Listening { listener, .. } => listener,
            _ => panic!("not listening"),
        }
    }

    fn submit(&mut self, host: usize, op: LinkOp<SimBuf>) -> LinkOpId {
        self.next_id += 1;
        self.links[host].submit(LinkOpId(self.next_id), op);
        LinkOpId(self.next_id)
    }

    /// One event, and what it completed. False when nothing is left to happen.
    fn step(&mut self) -> bool {
        let due = self.fabric.borrow().next_due();
        if let Some(due) = due {
            self.context.advance_to(due);
            self.fabric.borrow_mut().step();
        }
        for (link, done) in self.links.iter_mut().zip(&mut self.done) {
            link.poll(done);
        }
        due.is_some()
    }

    fn taken(&mut self, host: usize, id: LinkOpId) -> Option<Result<LinkOutput<SimBuf>, LinkErrorKind>> {
        let position = self.done[host].iter().position(|done| done.id == id)?;
        Some(self.done[host].remove(position).result.map_err(|error| error.kind))
    }

    fn outcome(&mut self, host: usize, id: LinkOpId) -> Result<LinkOutput<SimBuf>, LinkErrorKind> {
        loop {
            let more = self.step();
            if let Some(result) = self.taken(host, id) {
                return result;
            }
            assert!(more, "the operation completes");
        }
    }

    fn dial(&mut self, from: usize, to: usize) -> Result<ConnectionId, LinkErrorKind> {
        let id = self.submit(from, LinkOp::Dial { address: SocketAddr::new(address_of(to), PORT) });
        self.outcome(from, id).map(|output| match output {
            LinkOutput::Dialed { connection } => connection,
            _ => panic!("not dialed"),
        })
    }

    fn connect(&mut self, from: usize, to: usize) -> (ConnectionId, ConnectionId) {
        let dialed = self.dial(from, to).unwrap();
        let id = self.submit(to, LinkOp::Accept { listener: self.listeners[to] });
        match self.outcome(to, id).unwrap() {
            LinkOutput::Accepted { connection, .. } => (dialed, connection),
            _ => panic!("not accepted"),
        }
    }

    fn send(&mut self, host: usize, connection: ConnectionId, bytes: &[u8]) -> LinkOpId {
        let (head, tail) = bytes.split_at(bytes.len() / 3);
        let parts = vec![SendPart::Bytes(head.to_vec()), SendPart::Bytes(tail.to_vec())];
        self.submit(host, LinkOp::Send { connection, parts })
    }

    fn recv(&mut self, host: usize, connection: ConnectionId, bytes: usize) -> LinkOpId {
        let into = RecvInto::Bytes { bytes: vec![0; bytes].into(), range: 0..bytes };
        self.submit(host, LinkOp::Recv { connection, into })
    }

    /// Receives until the end or a failure.
    fn recv_all(&mut self, host: usize, connection: ConnectionId) -> (Vec<u8>, Option<LinkErrorKind>) {
        let mut all = Vec::new();
        loop {
            let id = self.recv(host, connection, 1000);
            match self.outcome(host, id) {
                Ok(output) => match received(output) {
                    bytes if bytes.is_empty() => return (all, None),
                    bytes => all.extend(bytes),
                },
                Err(kind) => return (all, Some(kind)),
            }
        }
    }
}

fn received(output: LinkOutput<SimBuf>) -> Vec<u8> {
    match output {
        LinkOutput::Received { into: RecvInto::Bytes { bytes, range }, bytes: count } => {
            bytes[range][..count].to_vec()
        }
        _ => panic!("not received"),
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|position| (position * 7 + position / 251) as u8).collect()
}

#[test]
fn bytes_arrive_in_order_in_chunks_of_any_size_and_then_the_end() {
    let (mut orderly, mut reset) = (0, 0);
    for seed in 0..40 {
        let mut net = Net::new(seed, 2, LinkConfig::default());
        let (near, far) = net.connect(0, 1);
        let bytes = pattern(50_000);
        net.send(0, near, &bytes);
        net.submit(0, LinkOp::Close { connection: near });
        match net.recv_all(1, far) {
            (all, None) => {
                assert_eq!(all, bytes);
                orderly += 1;
            }
            (all, Some(kind)) => {
                assert_eq!(kind, LinkErrorKind::Disconnected);
                assert_eq!(all, bytes[..all.len()]);
                reset += 1;
            }
        }
    }
    assert!(orderly > 0 && reset > 0, "{orderly} {reset}");
}

#[test]
fn a_send_completes_only_when_its_last_byte_fits() {
    let mut net = Net::new(1, 2, LinkConfig { pipe_bytes_max: 10_000, ..LinkConfig::default() });
    let (near, far) = net.connect(0, 1);
    let bytes = pattern(25_000);
    let send = net.send(0, near, &bytes);
    while net.step() {}
    assert!(net.taken(0, send).is_none());
    let mut all = Vec::new();
    while all.len() < bytes.len() {
        if net.taken(0, send).is_some() {
            assert!(all.len() >= 15_000, "{}", all.len());
        }
        let id = net.recv(1, far, 999);
        all.extend(received(net.outcome(1, id).unwrap()));
    }
    assert_eq!(all, bytes);
    assert!(net.context.coverage().of(Mark::SendWaited) > 0);
}

#[test]
fn a_cut_link_stalls_its_bytes_and_not_those_of_the_other_direction() {
    let quiet = LinkConfig { silence_timeout: 10 * SECOND..=10 * SECOND, ..LinkConfig::default() };
    let mut net = Net::new(1, 2, quiet);
    let (near, far) = net.connect(0, 1);
    net.fabric.borrow_mut().cut(0, 1);
    net.send(0, near, b"there");
    net.send(1, far, b"back");
    let there = net.recv(1, far, 100);
    let mut back = Vec::new();
    while back.len() < 4 {
        let recv = net.recv(0, near, 100);
        back.extend(received(net.outcome(0, recv).unwrap()));
    }
    assert_eq!(back, b"back");
    while net.context.now() < SECOND && net.fabric.borrow().next_due() < Some(SECOND) {
        net.step();
    }
    assert!(net.taken(1, there).is_none(), "stalled");
    net.fabric.borrow_mut().heal(0, 1);
    assert!(b"there".starts_with(&received(net.outcome(1, there).unwrap())));
}

#[test]
fn a_cut_link_resets_each_end_in_its_own_time() {
    let mut net = Net::new(1, 2, LinkConfig::default());
    let (near, far) = net.connect(0, 1);
    net.fabric.borrow_mut().cut(0, 1);
    assert_eq!(net.recv_all(0, near).1, Some(LinkErrorKind::Disconnected));
    assert_eq!(net.recv_all(1, far).1, Some(LinkErrorKind::Disconnected));
    assert_eq!(net.dial(0, 1), Err(LinkErrorKind::Disconnected), "and it cannot be made again");
    net.fabric.borrow_mut().heal(0, 1);
    assert!(net.dial(0, 1).is_ok());
}

#[test]
fn a_broken_connection_delivers_a_prefix() {
    let mut lengths = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let mut net = Net::new(seed, 2, LinkConfig::default());
        let (near, far) = net.connect(0, 1);
        let bytes = pattern(5_000);
        net.send(0, near, &bytes);
        net.fabric.borrow_mut().break_connection(0);
        let (all, end) = net.recv_all(1, far);
        assert_eq!(end, Some(LinkErrorKind::Disconnected));
        assert_eq!(all, bytes[..all.len()]);
        lengths.insert(all.len());
        assert_eq!(net.recv_all(0, near).1, Some(LinkErrorKind::Disconnected));
    }
    assert!(lengths.len() > 10, "{lengths:?}");
}

#[test]
fn close_ends_the_operations_of_its_connection_before_itself() {
    let mut net = Net::new(1, 2, LinkConfig { pipe_bytes_max: 100, ..LinkConfig::default() });
    let (near, _far) = net.connect(0, 1);
    let send = net.send(0, near, &pattern(1_000));
    let recv = net.recv(0, near, 10);
    let close = net.submit(0, LinkOp::Close { connection: near });
    while net.step() {}
    let order: Vec<_> = net.done[0].iter().map(|done| done.id).collect();
    assert_eq!(order.last(), Some(&close));
    for id in [send, recv] {
        assert_eq!(net.taken(0, id).unwrap().err(), Some(LinkErrorKind::Closed));
    }
    let late = net.recv(0, near, 10);
    assert_eq!(net.outcome(0, late).err(), Some(LinkErrorKind::Other));
}

#[test]
fn a_killed_process_is_told_of_and_its_machine_refuses() {
    let mut net = Net::new(1, 2, LinkConfig::default());
    let (near, _far) = net.connect(0, 1);
    net.fabric.borrow_mut().crash(1, Crash::Kill);
    net.links[1] = SimLink::new(&net.fabric, 1);
    let start = net.context.now();
    net.recv_all(0, near);
    assert!(net.context.now() < start + 10 * MILLISECOND);
    assert_eq!(net.dial(0, 1), Err(LinkErrorKind::Disconnected));
    assert!(net.context.now() < start + 20 * MILLISECOND, "refused, not timed out");
    net.listen(1);
    assert!(net.dial(0, 1).is_ok());
}

#[test]
fn a_machine_without_power_is_silent_and_after_its_return_resets_what_reaches_it() {
    let patient = LinkConfig { silence_timeout: 50 * SECOND..=50 * SECOND, ..LinkConfig::default() };
    let mut net = Net::new(1, 2, patient);
    let (near, _far) = net.connect(0, 1);
    net.fabric.borrow_mut().crash(1, Crash::PowerCut);
    net.links[1] = SimLink::new(&net.fabric, 1);
    net.send(0, near, b"anybody there?");
    let recv = net.recv(0, near, 10);
    while net.fabric.borrow().next_due() < Some(SECOND) {
        net.step();
    }
    assert!(net.taken(0, recv).is_none());
    net.fabric.borrow_mut().boot(1);
    assert_eq!(net.outcome(0, recv).err(), Some(LinkErrorKind::Disconnected));
    assert!(net.context.now() < SECOND);
}

/// Two hosts that send each other a known sequence of bytes over whatever connection there is, while links are cut
/// and mended, connections break and processes crash: whatever arrives is a prefix, on each connection.
#[test]
fn whatever_happens_to_a_connection_what_arrives_is_a_prefix() {
    let mut arrived_in_all = 0;
    for seed in 0..300 {
        let mut rng = Rng::new(seed ^ 0xfab);
        let mut net = Net::new(seed, 2, LinkConfig { pipe_bytes_max: 3_000, ..LinkConfig::default() });
        for _ in 0..10 {
            net.fabric.borrow_mut().heal_all();
            for host in 0..2 {
                if !net.fabric.borrow().hosts[host].up {
                    net.fabric.borrow_mut().boot(host);
                }
            }
            let Ok(near) = net.dial(0, 1) else { continue };
            let accept = net.submit(1, LinkOp::Accept { listener: net.listeners[1] });
            let far = match net.outcome(1, accept).unwrap() {
                LinkOutput::Accepted { connection, .. } => connection,
                _ => panic!("not accepted"),
            };
            let bytes = pattern(20_000);
            let mut ends = [Talk::new(0, near), Talk::new(1, far)];
            for _ in 0..rng.between(50, 600) {
                net.step();
                for talk in &mut ends {
                    talk.go_on(&mut net, &bytes, &mut rng);
                }
                match rng.below(400) {
                    0 => net.fabric.borrow_mut().cut(0, 1),
                    1 => net.fabric.borrow_mut().cut(1, 0),
                    2 | 3 => net.fabric.borrow_mut().heal_all(),
                    4 if net.fabric.borrow().connections() > 0 => net.fabric.borrow_mut().break_connection(0),
                    5 => {
                        let talk = &mut ends[rng.index(2)];
                        if !talk.over {
                            net.submit(talk.host, LinkOp::Close { connection: talk.connection });
                            talk.over = true;
                        }
                    }
                    _ => {}
                }
            }
            arrived_in_all += ends[0].received + ends[1].received;
            let how = if rng.chance(500_000) { Crash::Kill } else { Crash::PowerCut };
            for host in 0..2 {
                net.fabric.borrow_mut().crash(host, how);
                net.fabric.borrow_mut().boot(host);
                net.links[host] = SimLink::new(&net.fabric, host);
                net.done[host].clear();
                net.listeners[host] = net.listen(host);
            }
            assert_eq!(net.fabric.borrow().connections(), 0, "both ends of each are gone");
        }
    }
    assert!(arrived_in_all > 1_000_000, "{arrived_in_all}");
}

/// One end of a connection, sending and checking what it receives.
struct Talk {
    host: usize,
    connection: ConnectionId,
    sending: Option<LinkOpId>,
    sent: usize,
    receiving: Option<LinkOpId>,
    received: usize,
    over: bool,
}

impl Talk {
    fn new(host: usize, connection: ConnectionId) -> Self {
        Self { host, connection, sending: None, sent: 0, receiving: None, received: 0, over: false }
    }

    fn go_on(&mut self, net: &mut Net, bytes: &[u8], rng: &mut Rng) {
        if let Some(result) = self.receiving.and_then(|id| net.taken(self.host, id)) {
            self.receiving = None;
            match result {
                Ok(output) => {
                    let chunk = received(output);
                    assert_eq!(chunk, bytes[self.received..self.received + chunk.len()]);
                    self.received += chunk.len();
                    self.over |= chunk.is_empty();
                }
                Err(_) => self.over = true,
            }
        }
        if self.sending.is_some_and(|id| net.taken(self.host, id).is_some()) {
            self.sending = None;
        }
        if self.over {
            return;
        }
        if self.receiving.is_none() {
            self.receiving = Some(net.recv(self.host, self.connection, 1 + rng.index(2_000)));
        }
        if self.sending.is_none() && self.sent < bytes.len() {
            let count = (1 + rng.index(4_000)).min(bytes.len() - self.sent);
            self.sending = Some(net.send(self.host, self.connection, &bytes[self.sent..self.sent + count]));
            self.sent += count;
        }
    }
}
