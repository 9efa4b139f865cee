//! How a node finds a leader that its own configuration does not name.
//!
//! **A node that joins.**
//! The leader has sessions with the members and with those whom it is adding. Of two nodes the one with the higher id dials, so
//! that the two meet only if each of them knows the other: the leader is told of the newcomer by whoever asks for the change,
//! the newcomer need only know some member. It asks one after the other whom to turn to, whichever id is the higher: that
//! takes no session, and changes nothing there (`ringraft_net::Network::ask`). A member refers it to the leader that it
//! follows; from then on the newcomer dials the leader, or lets it in when it dials.
//!
//! **A member that was away for long.** All whom its configuration names may have left meanwhile, or do not lead, and the
//! leader may be one that it has never heard of. It asks around as one that joins does.
//!
//! There may be no leader because this member's vote is wanted by a candidate that it does not know. So a member that hears no
//! leader asks all whom it knows, and says with the question where it listens itself; one that is asked and hears no leader
//! either takes up with it. (Votes are given to candidates outside the own configuration: Raft, section 4.1 of Ongaro's
//! thesis.)
//!
//! A leader, too, asks members that it has no session with, for them to learn of it: such a member may have slept through all
//! that made it the leader, and nobody be left who follows it and could refer the member to it.
//!
//! Nothing depends on the answer, or on the introduction, being true: it is one more place to look for the cluster, until a
//! configuration names this node or a leader is heard. Hearsay replaces no address that an operator or a configuration gave: it
//! adds to them, since whoever was away knows only where the others were, and they may have moved meanwhile. Nor does it replace older
//! hearsay: whoever names ever new places of a node has each of them tried after those that were known before. If the one that must
//! dial is the one that was away, nobody but who has moved can tell it where to: that is what the introductions are for.
//!
//! **How often.** Who has left may not know it, and who joins may never be added: nobody would ever answer them otherwise than
//! before. So after each round of all whom it knows a node that seeks waits twice as long, up to a bound, until there is news.
//! Whoever asks it is asked back before that; and a leader asks also those whom it has been told to add.

use super::membership::put_first;
use super::{Driver, Life, Peer};
use crate::error::StopError;
use crate::state_machine::StateMachine;
use ringraft_block::NodeId;
use ringraft_net::link::Link;
use ringraft_net::{PeerConfig, Referral};
use ringraft_wal::disk::Disk;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Bound;

/// The next one is asked after so long.
const ASK_INTERVAL_NS: u64 = 500_000_000;

/// The longest wait between two rounds of questions.
const ASK_PAUSE_NS_MAX: u64 = 8_000_000_000;

/// Who was asked so recently is not asked back: two that seek would go on asking each other.
const ASK_BACK_NS: u64 = 4 * ASK_INTERVAL_NS;

/// So many places are remembered that are in no configuration here; the newest is forgotten for a new one.
const ACQUAINTANCES_MAX: usize = 32;

/// So many of them of one node: whoever tells many that it is not at pushes out neither those of others nor those heard before.
pub(super) const HEARSAY_EACH_MAX: usize = 3;

/// Somebody, where it may be.
type At = (NodeId, SocketAddr);

#[derive(Default)]
pub(super) struct Referrals {
    ask_at_ns: u64,
    /// Whether this node looks for others, as the last turn has found it.
    seeks: bool,
    /// Who was asked last in the round, and where.
    asked: Option<At>,
    /// When each was asked there.
    asked_ns: BTreeMap<At, u64>,
    /// How long is waited after this round.
    pause_ns: u64,
    /// Who has asked this node, and is asked next.
    asker: Option<At>,
    /// Whom this node was referred to last.
    told: Option<Referral>,
    /// Whom it refers others to.
    given: Option<Referral>,
    /// Of a member that hears no leader: whom it was referred to, and who introduced themselves, the oldest first.
    acquaintances: Vec<At>,
    /// How many there have been.
    met: u64,
}

/// What is asked next.
struct Question {
    to: At,
    place: Place,
}

enum Place {
    /// It has asked this node.
    Back,
    /// In a round of all who are known.
    Amid,
    /// At the end of one.
    Last,
}

impl Referrals {
    /// When the next member is to be asked, after a turn.
    pub(super) fn next_deadline(&self) -> u64 {
        if self.seeks { self.ask_at_ns } else { u64::MAX }
    }

    /// Whom to look for the cluster at, besides those known otherwise.
    pub(super) fn told(&self) -> Option<At> {
        self.told.map(|to| (to.node, to.address))
    }

    /// Who may be members of a configuration that is not known here, and where members may be that moved, the oldest first.
    pub(super) fn acquaintances(&self) -> impl Iterator<Item = At> + '_ {
        self.acquaintances.iter().copied()
    }

    /// Has no more to do with acquaintances that `which` is true of.
    pub(super) fn forget(&mut self, which: impl Fn(NodeId, SocketAddr) -> bool) {
        self.acquaintances.retain(|(id, address)| !which(*id, *address));
    }

    /// There is news for one that seeks: it asks as often as at first.
    pub(super) fn begin_anew(&mut self, now_ns: u64) {
        self.pause_ns = 0;
        self.ask_at_ns = self.ask_at_ns.min(now_ns.saturating_add(ASK_INTERVAL_NS));
    }

    fn has_asked(&mut self, question: Question, now_ns: u64) {
        if self.asked_ns.len() > ACQUAINTANCES_MAX {
            self.asked_ns.clear();
        }
        self.asked_ns.insert(question.to, now_ns);
        match question.place {
            Place::Back => self.asker = None,
            Place::Amid => self.asked = Some(question.to),
            Place::Last => {
                self.asked = Some(question.to);
                self.pause_ns = (2 * self.pause_ns).clamp(ASK_INTERVAL_NS, ASK_PAUSE_NS_MAX);
                self.ask_at_ns = now_ns.saturating_add(self.pause_ns);
            }
        }
    }

    /// One that this node may not know seeks, or leads: it is asked back, unless this node has just asked it.
    fn asked_by(&mut self, by: At, now_ns: u64) {
        let asked_ns = self.asked_ns.get(&by).map_or(0, |asked_ns| asked_ns.saturating_add(ASK_BACK_NS));
        if now_ns >= asked_ns && self.asker.is_none() {
            self.asker = Some(by);
            let last_ns = self.asked_ns.values().max().copied().unwrap_or(0);
            self.ask_at_ns = self.ask_at_ns.min(last_ns.saturating_add(ASK_INTERVAL_NS));
        }
    }

    /// Whether that is news.
    fn meet(&mut self, id: NodeId, address: SocketAddr) -> bool {
        if self.acquaintances.contains(&(id, address)) {
            return false;
        }
        let of_it = self.acquaintances.iter().filter(|(known, _)| *known == id).count();
        let newest = match of_it < HEARSAY_EACH_MAX {
            true => self.acquaintances.len().checked_sub(1).filter(|last| *last + 1 >= ACQUAINTANCES_MAX),
            false => self.acquaintances.iter().rposition(|(known, _)| *known == id),
        };
        if let Some(newest) = newest {
            self.acquaintances.remove(newest);
        }
        self.acquaintances.push((id, address));
        self.met += 1;
        true
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Asks the next member, if it is time to, and keeps what this node tells others up to date.
    pub(super) fn ask_around(&mut self) {
        let leader = self.leader_hint().map(|hint| Referral { node: hint.id, address: hint.address });
        let now_ns = self.now.monotonic_ns;
        self.referrals.seeks = self.seeks();
        let due = self.referrals.next_deadline() <= now_ns;
        let next = if due { self.whom_to_ask() } else { None };
        let Some(network) = &mut self.network else { return };
        if self.referrals.given != leader {
            self.referrals.given = leader;
            network.refer_to(leader);
        }
        if !self.referrals.seeks {
            (self.referrals.pause_ns, self.referrals.asker) = (0, None);
        }
        if due {
            self.referrals.ask_at_ns = now_ns.saturating_add(ASK_INTERVAL_NS);
        }
        let Some(question) = next else { return };
        let own = self.config.node;
        let configured =
            self.config.members.iter().find(|member| member.id == own).map(|member| member.address);
        // What an operator says of this node is newer than what an old log does.
        network.introduce_at(configured.or_else(|| self.members.address_of(own)));
        let (to, address) = question.to;
        if network.ask(to, address, &mut self.link) {
            self.referrals.has_asked(question, now_ns);
        }
    }

    /// A session with `peer` begins that this node has dialed `at`. Where only hearsay had it, that was true, and it is newer than what
    /// is known otherwise, until that changes.
    pub(super) fn met_at(&mut self, peer: NodeId, at: Option<SocketAddr>) {
        let is_told = |at| matches!(self.life, Life::Forming(_)) && self.referrals.told() == Some((peer, at));
        let is_heard = |at| self.referrals.acquaintances().any(|heard| heard == (peer, at)) || is_told(at);
        let instead_of = self.known_address_of(peer);
        let moved_to = at.filter(|at| instead_of != Some(*at) && is_heard(*at)).map(|at| (at, instead_of));
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.moved_to = moved_to;
        }
    }

    /// Whether there is a member to look for.
    fn seeks(&self) -> bool {
        let seeks = match &self.life {
            Life::Forming(_) => self.config.join,
            Life::Running(raft) if raft.leader() == Some(self.config.node) => self.unmet().next().is_some(),
            Life::Running(raft) => {
                let met = raft.leader().is_some_and(|leader| self.has_session_with(leader));
                let strange = !self.members.view().is_member || !self.members.pins();
                strange && !met
            }
            _ => false,
        };
        seeks && !self.closing && self.network.is_some()
    }

    /// Members of the configuration in force, and who is being added, that there is no session with.
    fn unmet(&self) -> impl Iterator<Item = NodeId> + '_ {
        let members = self.raft().map(|raft| raft.configuration().members()).unwrap_or_default();
        let ids = members.iter().map(|member| member.id).chain(self.members.guests().map(|(id, _)| id));
        ids.filter(|id| *id != self.config.node && !self.has_session_with(*id))
    }

    /// How often this node, as a member that heard no leader, has taken up with somebody whom no configuration names, or names
    /// elsewhere.
    pub fn acquaintances_met(&self) -> u64 {
        self.referrals.met
    }

    fn leads_now(&self) -> bool {
        self.raft().is_some_and(|raft| raft.leader() == Some(self.config.node))
    }

    /// Who has asked this node; otherwise the next one in the order of ids, of all who are known and wherever they may be, and of a
    /// leader, of those whom it misses.
    fn whom_to_ask(&self) -> Option<Question> {
        let leads = self.leads_now();
        if let Some(to) = self.referrals.asker.filter(|_| !leads) {
            return Some(Question { to, place: Place::Back });
        }
        let mut known: BTreeSet<At> =
            self.config.members.iter().map(|member| (member.id, member.address)).collect();
        known.extend(self.members.addresses());
        known.extend(self.members.guests());
        known.extend(self.referrals.acquaintances().chain(self.referrals.told()));
        known.retain(|(id, _)| *id != self.config.node);
        if leads {
            let unmet: Vec<NodeId> = self.unmet().collect();
            known.retain(|(id, _)| unmet.contains(id));
        }
        let behind = |asked| known.range((Bound::Excluded(asked), Bound::Unbounded)).next();
        let next = self.referrals.asked.and_then(behind);
        let to = *next.or_else(|| known.first())?;
        // A leader is the one that those whom it misses wait for.
        let is_last = !leads && known.last() == Some(&to);
        Some(Question { to, place: if is_last { Place::Last } else { Place::Amid } })
    }

    /// A member has answered.
    pub(super) fn referred(&mut self, by: NodeId, to: Option<Referral>) -> Result<(), StopError> {
        let Some(to) = to.filter(|to| to.node != self.config.node) else { return Ok(()) };
        if !self.seeks() || self.leads_now() {
            return Ok(());
        }
        let met = !matches!(self.life, Life::Forming(_)) && self.take_up_with(to.node, to.address);
        if self.referrals.told == Some(to) && !met {
            return Ok(());
        }
        tracing::info!(node = %self.config.node, %by, leader = %to.node, address = %to.address, "the leader is looked for there");
        self.referrals.begin_anew(self.now.monotonic_ns);
        let before = self.referrals.told.replace(to);
        if !matches!(self.life, Life::Forming(_)) {
            // The peers are those of the configuration, and this one.
            self.members.changed();
            return Ok(());
        }
        let listed =
            |node| self.config.members.iter().find(|member| member.id == node).map(|member| member.address);
        let before = before.filter(|before| before.node != to.node && listed(before.node).is_none());
        let mut addresses: Vec<SocketAddr> = listed(to.node).into_iter().collect();
        put_first(&mut addresses, to.address);
        let hearsay: Vec<SocketAddr> =
            Some(to.address).filter(|told| listed(to.node) != Some(*told)).into_iter().collect();
        if let Some(before) = before {
            self.forget_peer(before.node)?;
        }
        let Some(network) = &mut self.network else { return Ok(()) };
        if let Entry::Vacant(vacant) = self.peers.entry(to.node) {
            match network.add_peer(PeerConfig { id: to.node, address: to.address, incarnation: None }) {
                Ok(()) => drop(vacant.insert(Peer::new())),
                Err(error) => tracing::error!(peer = %to.node, %error, "not added"),
            }
        }
        network.set_addresses(to.node, &addresses, &hearsay);
        Ok(())
    }

    /// Another node has asked this one, and said where it listens. To a member that hears no leader it may be the candidate that
    /// lacks this vote.
    pub(super) fn introduced(&mut self, by: NodeId, address: SocketAddr) {
        if self.seeks() && by != self.config.node {
            self.referrals.asked_by((by, address), self.now.monotonic_ns);
        }
        let leaderless = self.raft().is_some_and(|raft| raft.leader().is_none()) && !self.members.pins();
        if !leaderless || self.closing || by == self.config.node {
            return;
        }
        if self.take_up_with(by, address) {
            tracing::info!(node = %self.config.node, peer = %by, %address, "met where no configuration here has it");
            self.members.changed();
        }
    }

    /// Remembers one that no configuration has there; false if one does, or there is nothing new.
    fn take_up_with(&mut self, id: NodeId, address: SocketAddr) -> bool {
        !self.members.may_be_at(id, address) && self.referrals.meet(id, address)
    }
}

#[cfg(test)]
mod tests {
    use super::super::repair::testing::Bench;
    use super::*;

    fn asked(bench: &mut Bench, now_ns: u64) -> (u64, u16, bool) {
        let question = bench.driver.whom_to_ask().expect("somebody is known");
        let (id, address) = question.to;
        let is_last = matches!(question.place, Place::Last);
        bench.driver.referrals.has_asked(question, now_ns);
        (id.get(), address.port(), is_last)
    }

    /// What a referral said of a member that the operator had named was asked from then on instead, and nobody at the named
    /// address any more. Then it was not asked at all, and a member that had moved was never found.
    #[test]
    fn all_are_asked_where_they_were_configured_and_where_hearsay_has_them() {
        let mut bench = Bench::new();
        let elsewhere: SocketAddr = "127.0.0.9:9".parse().expect("an address");
        let referrals = &mut bench.driver.referrals;
        referrals.told = Some(Referral { node: NodeId(3), address: elsewhere });
        referrals.meet(NodeId(7), elsewhere);
        let round = [(2, 7_002, false), (3, 7_003, false), (3, 9, false), (7, 9, true)];
        for _ in 0..2 {
            assert_eq!(round.map(|_| asked(&mut bench, 0)), round);
        }
        // Who asks is asked back where it says; not one that this node has just asked there.
        for asker in [2, 8] {
            for again in [false, true] {
                bench.driver.referrals.asked_by((NodeId(asker), elsewhere), ASK_BACK_NS);
                let expected = if again { (2, 7_002) } else { (asker, 9) };
                bench.driver.referrals.asked = None;
                let (id, port, _) = asked(&mut bench, ASK_BACK_NS);
                assert_eq!((id, port), expected);
            }
        }
    }

    /// It named the address of the log, where the leader was before it moved and this member slept.
    #[test]
    fn a_leader_that_was_found_where_hearsay_has_it_is_named_there_until_the_configuration_changes() {
        let mut bench = Bench::new();
        bench.append(1, 1);
        bench.driver.keep_members().expect("it goes on");
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 9], port));
        let named = |bench: &Bench| bench.driver.leader_hint().map(|hint| hint.address.port());
        assert_eq!(named(&bench), Some(7_002));
        // That somebody says so is nothing yet, and where nobody says it is, it may be by chance.
        assert!(bench.driver.take_up_with(NodeId(2), at(9)));
        bench.driver.members.changed();
        bench.driver.keep_members().expect("it goes on");
        assert_eq!(named(&bench), Some(7_002));
        for (dialed_at, expected) in [
            (None, 7_002),
            (Some(at(8)), 7_002),
            (Some(at(9)), 9),
            (Some(SocketAddr::from(([127, 0, 0, 1], 7_002))), 7_002),
        ] {
            bench.driver.met_at(NodeId(2), dialed_at);
            assert_eq!(named(&bench), Some(expected));
        }
        bench.driver.met_at(NodeId(2), Some(at(9)));
        let mut members = bench.driver.raft().expect("it runs").configuration().members().to_vec();
        members[1].address = at(10).to_string();
        let configuration = crate::raft::Configuration::new(members).expect("valid");
        let index = bench.driver.raft().expect("it runs").configuration_index();
        assert_eq!(index, ringraft_block::LogIndex(0));
        bench.append_configuration(&configuration);
        bench.driver.keep_members().expect("it goes on");
        assert_eq!(named(&bench), Some(10), "the configuration in force is newer");
    }

    /// The newest came first, and pushed out the oldest: whoever named ever new places of a node that no configuration here names had
    /// this node look for it there alone.
    #[test]
    fn of_one_node_and_of_all_so_many_places_are_remembered_and_what_was_known_first_stays_first() {
        let mut referrals = Referrals::default();
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 9], port));
        let ports = |referrals: &Referrals, of: u64| -> Vec<u16> {
            let of_it = referrals.acquaintances().filter(|(id, _)| *id == NodeId(of));
            of_it.map(|(_, address)| address.port()).collect()
        };
        assert!(referrals.meet(NodeId(7), at(1)));
        assert!(!referrals.meet(NodeId(7), at(1)), "nothing new");
        assert!(referrals.meet(NodeId(8), at(1)));
        for port in 2..100 {
            assert!(referrals.meet(NodeId(7), at(port)));
        }
        assert_eq!((ports(&referrals, 7), ports(&referrals, 8)), (vec![1, 2, 99], vec![1]));
        for id in 100..200 {
            assert!(referrals.meet(NodeId(id), at(1)));
        }
        assert_eq!(referrals.acquaintances().count(), ACQUAINTANCES_MAX);
        assert_eq!((ports(&referrals, 7), ports(&referrals, 8)), (vec![1, 2, 99], vec![1]));
        assert_eq!((ports(&referrals, 198), ports(&referrals, 199)), (vec![], vec![1]));
    }
}
