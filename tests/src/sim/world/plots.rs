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
    /// A voter that has promised a leader to elect nobody else is started anew, while another one cannot hear that leader.
    VoterRestarts { voter: usize },
    /// A vote of an earlier term is under way to a candidate of a later one. First the leader is cut off.
    CandidateAwaited { leader: usize },
    /// One voter's word to the candidate is slow, and two others do not hear it.
    VoteUnderWay { candidate: usize, voter: usize, others: [usize; 2] },
    /// The candidate asks the two whether it could win: they say so, and one of them votes.
    SecondCandidacy { candidate: usize, others: [usize; 2] },
    /// What followers answer the leader is slow; then the leader is not heard any more.
    SlowAnswers { leader: usize },
}

impl<C: Cluster> World<'_, C> {
    fn begin_plot(&mut self, plot: Plot, timeouts: u64) {
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
        let leads = self.machines[leader].view.role == LEADER;
        if self.plot.is_some() || self.founders < 3 || self.changes || !leads {
            return;
        }
        self.context.cover(Mark::PlotBegun);
        self.fabric.borrow_mut().heal_all();
        self.begin_plot(Plot::LeaderCutOff { first: leader }, 20);
        self.sever(|from, to| (from == leader) != (to == leader));
    }

    /// A voter is started anew, perhaps more than once, when another one is about to campaign.
    pub(super) fn plot_forgetful_voter(&mut self, leader: usize) {
        let nodes = self.machines.len();
        let leads = self.machines[leader].view.role == LEADER;
        if self.plot.is_some() || nodes < 3 || self.changes || !leads {
            return;
        }
        let rng = self.nemesis.rng();
        let deaf = (leader + 1 + rng.index(nodes - 1)) % nodes;
        let Some(voter) = (0..nodes).find(|node| *node != leader && *node != deaf) else { return };
        self.context.cover(Mark::PlotBegun);
        self.fabric.borrow_mut().heal_all();
        self.begin_plot(Plot::VoterRestarts { voter }, 4);
        self.watch(leader, 4);
        // Of more than three, those that are left cannot hear the leader either: the voter's word decides.
        let majority = nodes / 2;
        let rest = (0..nodes).filter(|node| ![leader, voter, deaf].contains(node));
        let loyal: Vec<usize> = rest.take(majority - 1).collect();
        let hears = |node: usize| node == leader || node == voter || loyal.contains(&node);
        self.sever(|from, to| (from == leader && !hears(to)) || (to == leader && !hears(from)));
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        for part in 0..6 {
            let delay = election * (10 + 2 * part) / 10 + self.nemesis.rng().below(election / 5);
            self.plan(delay, Plan::RestartNow { node: voter });
        }
    }

    /// Answers that were given long ago reach a leader that nobody hears any more.
    pub(super) fn plot_slow_answers(&mut self, leader: usize) {
        let nodes = self.machines.len();
        let leads = self.machines[leader].view.role == LEADER;
        if self.plot.is_some() || nodes < 3 || self.changes || !leads {
            return;
        }
        self.context.cover(Mark::PlotBegun);
        self.fabric.borrow_mut().heal_all();
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

    /// The next part of a plot that goes by time.
    pub(super) fn cut_off(&mut self, number: u64) {
        match self.plot {
            // From now on nobody hears the leader; it still hears the others.
            Some(Plot::SlowAnswers { leader }) if number == self.plots => {
                self.sever(|from, _| from == leader);
            }
            // The voter has voted, and hears of no other term.
            Some(Plot::VoteUnderWay { candidate, voter, .. }) if number == self.plots => {
                self.sever(|from, to| (from, to) == (candidate, voter));
            }
            _ => {}
        }
    }

    /// An old vote reaches a candidate of a later term.
    pub(super) fn plot_late_vote(&mut self, leader: usize) {
        let leads = self.machines[leader].view.role == LEADER;
        if self.plot.is_some() || self.founders != 5 || self.changes || !leads {
            return;
        }
        self.context.cover(Mark::PlotBegun);
        self.fabric.borrow_mut().heal_all();
        self.begin_plot(Plot::CandidateAwaited { leader }, 10);
        self.sever(|from, to| (from == leader) != (to == leader));
    }

    /// A node's role has changed.
    pub(super) fn plot_role(&mut self, node: usize, role: u8) {
        self.strand(node, role);
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        match self.plot {
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
        if !matches!(self.plot, Some(Plot::VoterRestarts { voter }) if voter == node) {
            return;
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
        let machine = &mut self.machines[node];
        if before.formed && after.epoch != before.epoch && self.truncation_checks > 0 && !machine.rotten {
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
