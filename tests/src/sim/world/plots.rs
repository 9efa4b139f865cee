//! Plots: troubles that follow one another, each when the one before has come to what it was for. They make schedules that
//! independent troubles would hardly ever come by. While one is under way, nothing else goes wrong.

use super::*;
use crate::sim::disk::{Fault, On, Scheduled};
use crate::sim::node::PRE_CANDIDATE;

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plot {
    /// Figure 8 of the Raft paper. First a leader is cut off with what only it holds.
    LeaderCutOff { first: usize },
    /// Its successor is, as soon as it is elected, and the first one is back.
    SuccessorCutOff { first: usize, second: usize },
    /// The first one leads again, and dies while it sends on what only it held: the second one is back.
    FirstToDie { first: usize, second: usize },
    /// A voter that has promised a leader to elect nobody else is started anew just before another one campaigns, which cannot hear
    /// that leader. From then on nobody hears the leader, which may still have its lease.
    ///
    /// Of those who are to be deaf (bit n is node n) one can win only with a log that lacks nothing: before, clients only read.
    VoterRestarts { voter: usize, leader: usize, deaf: u32, elected: bool },
    /// A vote of an earlier term is under way to a candidate of a later one. First the leader is cut off.
    CandidateAwaited { leader: usize },
    /// One voter's word to the candidate is slow, and two others do not hear it.
    VoteUnderWay { candidate: usize, voter: usize, others: [usize; 2] },
    /// The candidate asks the two whether it could win: they say so, and one of them votes.
    SecondCandidacy { candidate: usize, others: [usize; 2] },
    /// What followers answer the leader is slow; then the leader is not heard any more.
    SlowAnswers { leader: usize },
    /// What the leader answers one node is slow; then it hands over, and its successor is not heard by that node any more.
    StaleAnswer { leader: usize, reader: usize, next: usize },
    /// The leader hands over, and hears nobody from when its successor campaigns.
    SuccessorTold { leader: usize },
    /// A leader is cut off while a write of it hangs; then it follows another one.
    CutOffWrite { leader: usize },
    /// A leader is cut off with what only it holds.
    LeftBehind { leader: usize },
    /// As soon as its successor has committed something, that is asked for a snapshot. When its log begins behind what the one
    /// left behind knows to be committed, they hear each other again.
    Overtakes { behind: usize, successor: usize, asked: bool },
    /// It has cut that write off. Once what takes its place is under way, the write hangs no more.
    CutOffWriteLands { node: usize },
}

impl<C: Cluster> World<'_, C> {
    /// Whether a plot against this leader may begin: one of three voters at least, who are not being changed. All links are
    /// mended then.
    fn opens_plot(&mut self, leader: usize) -> bool {
        let view = &self.machines[leader].view;
        let members = self.members_of(leader);
        let settled = members.settled && members.index <= view.commit && !self.operator.waits_for_change();
        let leads = view.role == LEADER && members.is_voter(leader);
        let opens = leads && self.plot.is_none() && settled && members.incoming.count_ones() >= 3;
        if opens {
            self.fabric.borrow_mut().heal_all();
        }
        opens
    }

    /// The other voters, from the one that follows the leader on.
    fn other_voters(&self, leader: usize) -> Vec<usize> {
        let (nodes, members) = (self.machines.len(), self.members_of(leader));
        (1..nodes).map(|at| (leader + at) % nodes).filter(|node| members.is_voter(*node)).collect()
    }

    fn begin_plot(&mut self, plot: Plot, timeouts: u64) {
        self.context.cover(Mark::PlotBegun);
        self.plots += 1;
        self.plot = Some(plot);
        let patience = timeouts * self.tuning.election_timeout_ms * MILLISECOND;
        self.plan(patience, Plan::EndPlot { number: self.plots });
    }

    /// Ends a plot that has not come to its end by itself.
    pub(super) fn end_plot(&mut self, number: u64) {
        if number == self.plots && self.plot.take().is_some() {
            self.fabric.borrow_mut().heal_all();
        }
    }

    /// Figure 8: entries of an older term are on a quorum, and another node may win without them.
    pub(super) fn plot_figure_8(&mut self, leader: usize) {
        if !self.opens_plot(leader) {
            return;
        }
        self.begin_plot(Plot::LeaderCutOff { first: leader }, 20);
        self.sever(|from, to| (from == leader) != (to == leader));
    }

    /// Clients only read for a while, and somebody cannot hear the leader. When that one is about to ask whether it could win, a
    /// voter is started anew, and the leader is not heard any more: the voter is up again when it is asked.
    pub(super) fn plot_forgetful_voter(&mut self, leader: usize) {
        if !self.opens_plot(leader) {
            return;
        }
        let others = self.other_voters(leader);
        let deaf = others[self.nemesis.rng().index(others.len())];
        // Of two nodes the later one dials, and one that has just been started does so at once. (A session that begins before
        // its core does is too early: what it is asked then is lost.)
        let Some(voter) = others.iter().copied().filter(|node| *node != deaf).max() else { return };
        // Of more than three, those that are left cannot hear the leader either: the voter's word decides.
        let majority = others.len().div_ceil(2);
        let mut rest: Vec<usize> = others.into_iter().filter(|node| ![voter, deaf].contains(node)).collect();
        rest.sort_unstable();
        let deaf = rest[majority - 1..].iter().fold(1 << deaf, |deaf, node| deaf | 1 << node);
        self.begin_plot(Plot::VoterRestarts { voter, leader, deaf, elected: false }, 5);
        self.watch(leader, 5);
        let number = self.plots;
        self.plan(self.tuning.election_timeout_ms * MILLISECOND / 5, Plan::CutOff { number });
    }

    /// Whether a client is to leave the log as it is. Those who go on asking a leader that was cut off read from it.
    pub(super) fn only_reads(&self, client: usize) -> bool {
        let Some(Plot::VoterRestarts { deaf, elected, .. }) = self.plot else { return false };
        deaf != 0 && (client % 2 == 1 || !elected)
    }

    /// Answers that were given long ago reach a leader that nobody hears any more.
    pub(super) fn plot_slow_answers(&mut self, leader: usize) {
        let nodes = self.machines.len();
        if !self.opens_plot(leader) {
            return;
        }
        self.begin_plot(Plot::SlowAnswers { leader }, 6);
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        let by = election / 100 * self.nemesis.rng().between(60, 90);
        for from in (0..nodes).filter(|from| *from != leader) {
            self.fabric.borrow_mut().slow_down(from, leader, by);
        }
        let number = self.plots;
        self.plan(2 * election, Plan::CutOff { number });
        self.watch(leader, 6);
    }

    /// An answer of a leader is under way to a follower that asks its successor meanwhile.
    pub(super) fn plot_stale_answer(&mut self, leader: usize) {
        if !self.opens_plot(leader) {
            return;
        }
        let others = self.other_voters(leader);
        let first = self.nemesis.rng().index(others.len());
        let second = (first + 1 + self.nemesis.rng().index(others.len() - 1)) % others.len();
        let [reader, next] = [first, second].map(|at| others[at]);
        self.begin_plot(Plot::StaleAnswer { leader, reader, next }, 3);
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        let by = election / 100 * self.nemesis.rng().between(50, 75);
        self.fabric.borrow_mut().slow_down(leader, reader, by);
        self.watch(reader, 3);
        let number = self.plots;
        self.plan(by / 2, Plan::CutOff { number });
    }

    /// A node has come to know another leader, or none.
    pub(super) fn plot_leader(&mut self, node: usize, leader: Option<usize>) {
        if let Some(Plot::StaleAnswer { reader, next, .. }) = self.plot
            && (node, leader) == (reader, Some(next))
        {
            self.sever(|from, to| (from, to) == (next, reader));
        }
    }

    /// A leader that is handing over is cut off as soon as its successor campaigns. False if that is not to be.
    pub(super) fn plot_successor_told(&mut self, leader: usize) -> bool {
        let leads = self.machines[leader].view.role == LEADER;
        if self.plot.is_some() || self.machines.len() < 3 || !leads || self.nemesis.rng().chance(300_000) {
            return false;
        }
        self.begin_plot(Plot::SuccessorTold { leader }, 4);
        true
    }

    /// A write that is cut off lands when what took its place is under way.
    pub(super) fn plot_cut_off_write(&mut self, leader: usize) {
        if !self.opens_plot(leader) {
            return;
        }
        self.begin_plot(Plot::CutOffWrite { leader }, 10);
        self.sever(|from, to| (from == leader) != (to == leader));
        let length = 12 * self.tuning.election_timeout_ms * MILLISECOND;
        let stall = Scheduled { on: On::Write, skip: 0, fault: Fault::Stall(length) };
        self.machines[leader].disk.borrow_mut().faults_mut().scheduled.push(stall);
        self.context.cover(Mark::StalledWrite);
    }

    /// What only a leader holds that is cut off stands where a snapshot ends that it is then sent.
    pub(super) fn plot_overtaken(&mut self, leader: usize) {
        // Where nothing is kept of the log for those who are behind.
        if self.tuning.log_retention_bytes > 0 || !self.opens_plot(leader) {
            return;
        }
        self.begin_plot(Plot::LeftBehind { leader }, 15);
        self.sever(|from, to| (from == leader) != (to == leader));
    }

    /// A node's view has changed.
    pub(super) fn plot_overtakes(&mut self, node: usize, after: &View) {
        let Some(Plot::Overtakes { behind, successor, asked }) = self.plot else { return };
        let machine = &mut self.machines[node];
        let Some(process) = machine.process.as_mut().filter(|_| node == successor) else { return };
        if !asked && after.role == LEADER && self.history.borrow().has_committed_in(after.term) {
            let asked = process.snapshot();
            (machine.wake_at, machine.called) = (0, true);
            self.plot = Some(Plot::Overtakes { behind, successor, asked });
        } else if asked && process.log_start() > self.machines[behind].known.commit {
            self.context.cover(Mark::Overtaken);
            self.fabric.borrow_mut().heal_all();
        }
    }

    /// The only voter that there is now is started anew. Whoever led it hears nobody.
    pub(super) fn plot_last_voter(&mut self, voter: usize) {
        let led = |machine: &Machine<C::Node>| machine.view.role == LEADER;
        let Some(leader) = self.machines.iter().position(led) else { return };
        if self.plot.is_some() || leader == voter {
            return;
        }
        self.begin_plot(Plot::VoterRestarts { voter, leader, deaf: 0, elected: false }, 3);
        self.sever(|from, to| (from == voter) != (to == voter));
        self.watch(leader, 3);
        self.plan(0, Plan::RestartNow { node: voter });
    }

    /// The next part of a plot that goes by time.
    pub(super) fn cut_off(&mut self, number: u64) {
        match self.plot {
            // From now on nobody hears the leader; it still hears the others.
            Some(Plot::SlowAnswers { leader }) if number == self.plots => {
                self.sever(|from, _| from == leader);
            }
            Some(Plot::VoterRestarts { voter, leader, deaf, .. }) if number == self.plots => {
                let is_deaf = |node: usize| deaf >> node & 1 == 1;
                self.sever(|from, to| (from == leader && is_deaf(to)) || (to == leader && is_deaf(from)));
                let Tuning { election_timeout_ms, heartbeat_ms, .. } = self.tuning;
                self.plan(
                    (election_timeout_ms + heartbeat_ms) * MILLISECOND,
                    Plan::RestartNow { node: voter },
                );
            }
            // The voter has voted, and hears of no other term.
            Some(Plot::VoteUnderWay { candidate, voter, .. }) if number == self.plots => {
                self.sever(|from, to| (from, to) == (candidate, voter));
            }
            Some(Plot::StaleAnswer { leader, next, .. }) if number == self.plots => {
                self.transfer(leader, Some(next));
            }
            _ => {}
        }
    }

    /// An old vote reaches a candidate of a later term.
    pub(super) fn plot_late_vote(&mut self, leader: usize) {
        // The first five.
        if self.members_of(leader).incoming != 0b1_1111 || !self.opens_plot(leader) {
            return;
        }
        self.begin_plot(Plot::CandidateAwaited { leader }, 10);
        self.sever(|from, to| (from == leader) != (to == leader));
    }

    /// A node's role has changed.
    pub(super) fn plot_role(&mut self, node: usize, role: u8) {
        self.strand(node, role);
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        match self.plot {
            Some(Plot::SuccessorTold { leader }) if role == CANDIDATE && node != leader => {
                self.sever(|from, to| (from == leader) != (to == leader));
                self.watch(leader, 3);
            }
            Some(Plot::VoterRestarts { leader, .. }) if role == CANDIDATE && node != leader => {
                self.sever(|from, to| (from == leader) != (to == leader));
            }
            Some(Plot::CandidateAwaited { leader }) if role == CANDIDATE && node != leader => {
                let mut rest = (0..5).filter(|other| ![leader, node].contains(other));
                let (Some(voter), Some(one), Some(two)) = (rest.next(), rest.next(), rest.next()) else {
                    return;
                };
                self.plot = Some(Plot::VoteUnderWay { candidate: node, voter, others: [one, two] });
                // Whoever is none of the two that may hear one another hears nobody.
                self.sever(|from, to| ![(node, voter), (voter, node)].contains(&(from, to)));
                self.fabric.borrow_mut().slow_down(voter, node, election * 22 / 10);
                let number = self.plots;
                self.plan(election / 20, Plan::CutOff { number });
            }
            Some(Plot::VoteUnderWay { candidate, others, .. })
                if role == PRE_CANDIDATE && node == candidate =>
            {
                self.plot = Some(Plot::SecondCandidacy { candidate, others });
                for other in others {
                    self.fabric.borrow_mut().heal(candidate, other);
                    self.fabric.borrow_mut().heal(other, candidate);
                }
            }
            Some(Plot::SecondCandidacy { candidate, others: [_, two] })
                if role == CANDIDATE && node == candidate =>
            {
                self.context.cover(Mark::LateVote);
                self.sever(|from, to| [(node, two), (two, node)].contains(&(from, to)));
            }
            _ => {}
        }
    }

    /// Odd clients read from this node for some election time-outs, wherever the leader is.
    pub(super) fn watch(&mut self, node: usize, timeouts: u64) {
        let until = self.context.now() + timeouts * self.tuning.election_timeout_ms * MILLISECOND;
        self.watched = Some((node, until));
    }

    /// The core of a leader stands still for long, and it hears of nobody when it wakes.
    pub(super) fn stop_leaders_core(&mut self, leader: usize) {
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        let length = election / 10 * self.nemesis.rng().between(5, 40);
        if self.nemesis.rng().chance(700_000) {
            self.cut_where(length + election / 10, |from, to| (from == leader) != (to == leader));
        }
        self.watch(leader, 5);
        self.stop_core(leader, self.context.now() + length);
    }

    /// Kills a process, which is started again at once.
    pub(super) fn restart_now(&mut self, node: usize) {
        let Some(Plot::VoterRestarts { leader, deaf, .. }) =
            self.plot.filter(|plot| matches!(plot, Plot::VoterRestarts { voter, .. } if *voter == node))
        else {
            return;
        };
        if deaf != 0 {
            self.sever(|from, to| (from == leader) != (to == leader));
        }
        self.crash(node, Crash::Kill);
        self.plan(0, Plan::Restart { node });
    }

    fn sever(&mut self, cut: impl Fn(usize, usize) -> bool) {
        let nodes = self.machines.len();
        for from in 0..nodes {
            for to in (0..nodes).filter(|to| *to != from) {
                if cut(from, to) {
                    self.fabric.borrow_mut().cut(from, to);
                }
            }
        }
    }

    /// A node has been elected. True if that is part of a plot.
    pub(super) fn plot_elected(&mut self, node: usize) -> bool {
        match self.plot {
            Some(Plot::LeaderCutOff { first }) if node != first => {
                self.plot = Some(Plot::SuccessorCutOff { first, second: node });
                self.fabric.borrow_mut().heal_all();
                self.sever(|from, to| (from == node) != (to == node));
            }
            Some(Plot::SuccessorCutOff { first, second }) if node == first => {
                self.plot = Some(Plot::FirstToDie { first, second });
                let turns = self.nemesis.rng().below(30);
                self.machines[first].doomed = Some((turns, Doom::One(Crash::Kill)));
                self.context.cover(Mark::Figure8);
            }
            Some(Plot::CutOffWrite { leader }) if node != leader => self.fabric.borrow_mut().heal_all(),
            // Half of the clients hear of it.
            Some(Plot::VoterRestarts { voter, leader, deaf, .. }) if node != leader => {
                self.plot = Some(Plot::VoterRestarts { voter, leader, deaf, elected: true });
                self.clients.iter_mut().step_by(2).for_each(|client| client.believed = node);
            }
            Some(Plot::LeftBehind { leader }) if node != leader => {
                self.plot = Some(Plot::Overtakes { behind: leader, successor: node, asked: false });
            }
            Some(_) => {}
            None => return false,
        }
        true
    }

    /// A process is gone.
    pub(super) fn plot_crashed(&mut self, node: usize) {
        if let Some(Plot::FirstToDie { first, .. }) = self.plot
            && first == node
        {
            self.fabric.borrow_mut().heal_all();
            self.sever(|from, to| (from == node) != (to == node));
        }
    }

    /// One write of a disk takes far longer than those around it.
    pub(super) fn stall_write(&mut self, node: usize, length: Time) {
        let skip = self.nemesis.rng().below(6);
        let mut disk = self.machines[node].disk.borrow_mut();
        disk.faults_mut().scheduled.push(Scheduled { on: On::Write, skip, fault: Fault::Stall(length) });
        self.context.cover(Mark::StalledWrite);
    }

    /// After a truncation the first few durabilities are compared with what a recovery would find.
    pub(super) fn check_after_truncation(&mut self, node: usize, before: &View, after: &View) {
        let cut = before.formed && after.epoch != before.epoch;
        match self.plot {
            Some(Plot::CutOffWrite { leader }) if cut && leader == node => {
                self.plot = Some(Plot::CutOffWriteLands { node });
                self.truncation_checks += 1;
            }
            Some(Plot::CutOffWriteLands { node: cutter })
                if cutter == node && after.written > before.written =>
            {
                self.plot = None;
                self.machines[node].disk.borrow_mut().end_stalls();
            }
            _ => {}
        }
        let machine = &mut self.machines[node];
        if machine.rotten {
            // Since then, perhaps: what a recovery finds there is judged by what repairs it.
            machine.suspect = 0;
        } else if cut && self.truncation_checks > 0 {
            self.truncation_checks -= 1;
            machine.suspect = 4;
        }
        if machine.suspect == 0 || after.durable <= before.durable || !before.formed {
            return;
        }
        // What a snapshot covers need not be in the log.
        if machine.process.as_ref().is_none_or(|process| process.log_start() >= after.durable) {
            return;
        }
        machine.suspect -= 1;
        let aside = Context::new(Trace::new(false));
        let image = machine.disk.borrow().durable_image(&aside);
        let recovered = self.cluster.recover(node, self.founders, &self.tuning, SimDisk::new(&image));
        let found = recovered.as_ref().map_or(0, |log| log.last);
        if found < after.durable {
            let error = recovered.err().unwrap_or_default();
            self.history.borrow_mut().fail(|| {
                format!(
                    "node {node} says {} is durable, and its disk holds up to {found}{error}",
                    after.durable
                )
            });
        }
    }
}
