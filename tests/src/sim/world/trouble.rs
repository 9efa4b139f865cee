//! Trouble: what the nemesis does to machines, disks, links and clocks.

use super::*;
use crate::sim::disk::{Fault, On, Rot, Scheduled};
use ringraft_block::SECTOR_BYTES;

impl<C: Cluster> World<'_, C> {
    /// Lets the next trouble of the schedule happen, and plans the one after it.
    pub(super) fn scheduled_trouble(&mut self) {
        if self.plot.is_some() {
            let pause = self.nemesis.pause();
            return self.plan(pause, Plan::Trouble);
        }
        let number = self.number(0);
        let trouble = self.nemesis.choose();
        let nodes = self.machines.len();
        let node = self.nemesis.rng().index(nodes);
        let leader = self.machines.iter().position(|machine| machine.view.role == LEADER).unwrap_or(node);
        self.strike(number, trouble, node, leader);
        self.nemesis.begin(number ^ 1 << 40);
        let pause = self.nemesis.pause();
        self.plan(pause, Plan::Trouble);
    }

    /// A node has just been elected.
    pub(super) fn elected_trouble(&mut self, node: usize) {
        if self.plot_elected(node) {
            return;
        }
        let number = self.number(1);
        if let Some((trouble, another)) = self.nemesis.regicide() {
            self.strike(number, trouble, node, node);
            if another {
                let number = self.number(1);
                let other = self.nemesis.rng().index(self.machines.len());
                self.strike(number, Trouble::Kill, other, node);
            }
        }
    }

    /// A node has just entered a term, and perhaps voted in it.
    pub(super) fn voted_trouble(&mut self, node: usize) {
        if self.plot.is_some() {
            return;
        }
        let number = self.number(1);
        if let Some(trouble) = self.nemesis.perjury() {
            self.strike(number, trouble, node, node);
        }
    }

    pub(super) fn number(&mut self, series: usize) -> u64 {
        let number = self.next_trouble[series];
        self.next_trouble[series] += 1;
        self.nemesis.begin(number);
        number
    }

    pub(super) fn strike(&mut self, number: u64, trouble: Trouble, node: usize, leader: usize) {
        if self.options.keep.troubles.as_ref().is_some_and(|kept| !kept.contains(&number)) {
            return;
        }
        let of_leader = matches!(
            trouble,
            Trouble::KillLeader
                | Trouble::ShutdownLeader
                | Trouble::IsolateLeader
                | Trouble::StopLeadersCore
                | Trouble::Transfer
                | Trouble::TransferAndCut
                | Trouble::ChangeMembers
                | Trouble::Figure8
                | Trouble::ForgetfulVoter
                | Trouble::SlowAnswers
                | Trouble::LateVote
                | Trouble::StaleAnswer
                | Trouble::CutOffWrite
                | Trouble::Overtaken
                | Trouble::SlowLeadersDisk
        );
        let befell = if of_leader { leader } else { node };
        let time = self.context.now();
        self.progress.struck.borrow_mut().push(Struck { number, time, trouble, node: befell });
        let nodes = self.machines.len();
        let length = self.nemesis.length();
        let now = self.context.now();
        match trouble {
            Trouble::Kill => self.doom(node, Doom::One(Crash::Kill)),
            Trouble::KillVoter => {
                let turns = self.nemesis.rng().below(3);
                self.machines[node].doomed = Some((turns, Doom::One(Crash::PowerCut)));
            }
            Trouble::KillLeader => self.doom(leader, Doom::One(Crash::Kill)),
            Trouble::PowerCut => self.doom(node, Doom::One(Crash::PowerCut)),
            Trouble::PowerCutOfAll => self.doom(node, Doom::All),
            Trouble::Shutdown => self.doom(node, Doom::Shutdown),
            Trouble::ShutdownLeader => self.doom(leader, Doom::Shutdown),
            Trouble::Isolate => self.cut_where(length, |from, to| (from == node) != (to == node)),
            Trouble::IsolateLeader => {
                // What it has begun to write may be cut off before it is written.
                if self.nemesis.rng().chance(300_000) {
                    self.stall_write(leader, length);
                }
                self.doom(leader, Doom::Isolated);
            }
            Trouble::Split => {
                let side = self.nemesis.rng().bits();
                self.cut_where(length, |from, to| (side >> from & 1) != (side >> to & 1));
            }
            Trouble::OneWay => {
                let to = self.nemesis.rng().index(nodes);
                self.context.cover(Mark::PartialPartition);
                self.cut_where(length, |a, b| (a, b) == (node, to));
            }
            Trouble::Partial => {
                let bits = self.nemesis.rng().bits() & self.nemesis.rng().bits();
                self.context.cover(Mark::PartialPartition);
                self.cut_where(length, |from, to| bits >> ((from * nodes + to) & 63) & 1 == 1);
            }
            Trouble::Pause => {
                self.context.cover(Mark::Pause);
                self.context.record(node, What::Pause, now + length, 0);
                self.machines[node].paused_until = now + length;
            }
            Trouble::Transfer => self.hand_over(leader),
            Trouble::TransferAnywhere => self.hand_over(node),
            Trouble::TransferAndCut => {
                self.hand_over(leader);
                if !self.plot_successor_told(leader) {
                    self.doom(leader, Doom::Isolated);
                    self.watch(leader, 3);
                }
            }
            Trouble::LateVote => self.plot_late_vote(leader),
            Trouble::SlowAnswers => self.plot_slow_answers(leader),
            Trouble::StaleAnswer => self.plot_stale_answer(leader),
            Trouble::CutOffWrite => self.plot_cut_off_write(leader),
            Trouble::Overtaken => self.plot_overtaken(leader),
            Trouble::Figure8 => self.plot_figure_8(leader),
            Trouble::ForgetfulVoter => self.plot_forgetful_voter(leader),
            Trouble::StallWrite => self.stall_write(node, length),
            Trouble::StallVoter => {
                self.context.cover(Mark::StalledDisk);
                self.context.record(node, What::DiskSpeed, 0, now + length);
                self.machines[node].disk.borrow_mut().faults_mut().stalled_until = now + length;
            }
            Trouble::ChangeMembers => self.change_members(leader),
            Trouble::ChangeAtOnce => self.change_at_once(node),
            Trouble::CutOffAtStep => {
                let timeouts = self.nemesis.rng().between(2, 5);
                let length = timeouts * self.tuning.election_timeout_ms * MILLISECOND;
                self.cut_where(length, |from, to| (from == node) != (to == node));
            }
            Trouble::DivideJoint => self.divide_joint(node),
            Trouble::LastVoterRestarts => self.plot_last_voter(node),
            Trouble::StopCore => self.stop_core(node, now + length),
            Trouble::StopLeadersCore => self.stop_leaders_core(leader),
            Trouble::ClockJump => {
                let by = self.nemesis.rng().between(0, 7_200_000) as i64 - 3_600_000;
                self.context.cover(Mark::ClockJump);
                self.context.record(node, What::ClockJump, by as u64, 0);
                self.machines[node].clock.jump_ms(by);
            }
            Trouble::SlowDisk => {
                let factor = [3, 10, 100][self.nemesis.rng().index(3)];
                self.slow_disk(node, factor, length);
            }
            Trouble::SlowLeadersDisk => {
                let timeouts = self.nemesis.rng().between(2, 6);
                self.slow_disk(leader, 200, timeouts * self.tuning.election_timeout_ms * MILLISECOND);
            }
            Trouble::StallDisk => {
                self.context.cover(Mark::StalledDisk);
                self.context.record(node, What::DiskSpeed, 0, now + length);
                self.machines[node].disk.borrow_mut().faults_mut().stalled_until = now + length;
            }
            Trouble::Break => {
                let connections = self.fabric.borrow().connections();
                if connections > 0 {
                    let position = self.nemesis.rng().index(connections);
                    self.fabric.borrow_mut().break_connection(position);
                }
            }
            Trouble::DialFailures => {
                self.fabric.borrow_mut().config_mut().dial_failure_ppm = 500_000;
                self.plan(length, Plan::DialNormal);
            }
            Trouble::SlowLink => {
                let to = self.nemesis.rng().index(nodes);
                self.slow_links(length, |a, b| (a, b) == (node, to));
            }
            Trouble::SlowPeer => self.slow_links(length, |from, to| from == node || to == node),
            Trouble::ClockDrift => {
                let max = self.drift_max_ppm().min(100_000);
                let drift = self.nemesis.rng().between(0, 2 * max as u64) as i64 - max;
                self.context.cover(Mark::ClockDrift);
                self.drift(node, drift);
                self.plan(length, Plan::ClockNormal { node });
            }
            Trouble::Rot => self.rot(),
            Trouble::Misdirect => self.misdirect(),
            Trouble::FlipBits => {
                let often = [5_000, 30_000, 100_000][self.nemesis.rng().index(3)];
                self.fabric.borrow_mut().config_mut().flip_ppm = often;
                self.plan(length, Plan::WireNormal);
            }
            Trouble::FailDisk => {
                let (after, for_ever) = (self.nemesis.rng().below(50), self.nemesis.rng().chance(500_000));
                let mut disk = self.machines[node].disk.borrow_mut();
                disk.faults_mut().fail_after_ops = Some(after);
                disk.faults_mut().fail_for_ever = for_ever;
            }
            Trouble::ShortWrites => {
                self.machines[node].disk.borrow_mut().faults_mut().short_write_ppm = 300_000;
                self.plan(length, Plan::DiskNormal { node });
            }
            Trouble::NoSpace => {
                self.context.cover(Mark::DiskFault);
                self.machines[node].disk.borrow_mut().faults_mut().no_space = true;
                self.plan(length, Plan::DiskNormal { node });
            }
        }
    }

    fn hand_over(&mut self, node: usize) {
        let nodes = self.machines.len();
        let to = self.nemesis.rng().index(2 * nodes);
        self.transfer(node, (to < nodes).then_some(to));
    }

    fn slow_disk(&mut self, node: usize, factor: u64, length: Time) {
        self.context.cover(Mark::SlowDisk);
        self.context.record(node, What::DiskSpeed, factor, 0);
        self.machines[node].disk.borrow_mut().faults_mut().slow_factor = factor;
        self.plan(length, Plan::DiskNormal { node });
    }

    fn slow_links(&mut self, length: Time, slow: impl Fn(usize, usize) -> bool) {
        let nodes = self.machines.len();
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        // From what is hardly noticed to what looks like a loss.
        let by = election / [100, 10, 3, 1][self.nemesis.rng().index(4)];
        self.context.cover(Mark::SlowLink);
        for from in 0..nodes {
            for to in (0..nodes).filter(|to| *to != from && slow(from, *to)) {
                self.fabric.borrow_mut().slow_down(from, to, by);
                self.plan(length, Plan::LinkNormal { from, to });
            }
        }
    }

    /// A machine's clocks change their rate. It takes a turn, to wait by the new one.
    pub(super) fn drift(&mut self, node: usize, drift_ppm: i64) {
        let now = self.context.now();
        self.context.record(node, What::ClockDrift, drift_ppm as u64, 0);
        let machine = &mut self.machines[node];
        machine.clock.drift(now, drift_ppm);
        if machine.process.is_some() {
            machine.wake_at = machine.wake_at.min(now);
        }
    }

    /// A little of the log rots on the disk to which that happens, at rest or under a running process.
    fn rot(&mut self) {
        let Some(node) = self.allowed.rotting_disk else { return };
        let machine = &mut self.machines[node];
        let rot = match self.nemesis.rng().index(3) {
            0 => Rot::Flip(self.nemesis.rng().below(8) as u8),
            1 => Rot::Garbage(self.nemesis.rng().bits()),
            _ => Rot::Unreadable,
        };
        let mut disk = machine.disk.borrow_mut();
        // Of the hard state one copy, always the same, and only while both are whole: a second loss is beyond the bound.
        let copy = self.nemesis.rng().chance(300_000);
        if copy && (disk.writes_in_flight() > 0 || !machine.known.formed) {
            return;
        }
        // Of what was written last the first sector, so that nothing says what it was, or the next one.
        let tail = !copy && self.nemesis.rng().chance(400_000);
        let place = match (copy, tail) {
            (true, _) => Some(("hard-a".to_owned(), 0)),
            (_, true) => {
                let sector = self.nemesis.rng().below(2) * SECTOR_BYTES as u64;
                disk.last_place_in_log().map(|(name, offset)| (name, offset + sector))
            }
            _ => disk.place_in_log(self.nemesis.rng()),
        };
        if let Some((name, offset)) = place.filter(|(name, _)| disk.has_file(name)) {
            let bytes = self.nemesis.rng().between(1, 600);
            disk.damage(&name, offset, bytes as usize, &rot);
            drop(disk);
            self.context.record(node, What::Rot, offset, bytes);
            machine.rotten = true;
            // A start finds it before the log has gone on.
            if tail {
                machine.doomed = Some((0, Doom::One(Crash::Kill)));
            }
        }
    }

    /// One of the next batches goes to another place of the disk to which that happens: what was there is lost, and so is the batch.
    fn misdirect(&mut self) {
        let Some(node) = self.allowed.rotting_disk else { return };
        let skip = self.nemesis.rng().below(20);
        let machine = &mut self.machines[node];
        let fault = Scheduled { on: On::Batch, skip, fault: Fault::Misdirected };
        machine.disk.borrow_mut().faults_mut().scheduled.push(fault);
        machine.rotten = true;
    }

    pub(super) fn mend_disk(&mut self, node: usize) {
        let mut disk = self.machines[node].disk.borrow_mut();
        let faults = disk.faults_mut();
        *faults = DiskFaults { late_write_ppm: faults.late_write_ppm, ..DiskFaults::default() };
    }

    /// Ends a node after some more turns: they are close together when there is much going on, so that crashes fall
    /// between two effects more often than a moment chosen by the clock would.
    fn doom(&mut self, node: usize, doom: Doom) {
        let turns = self.nemesis.rng().below(40);
        self.machines[node].doomed = Some((turns, doom));
    }

    pub(super) fn cut_where(&mut self, length: Time, cut: impl Fn(usize, usize) -> bool) {
        let nodes = self.machines.len();
        for from in 0..nodes {
            for to in 0..nodes {
                if from != to && cut(from, to) {
                    self.fabric.borrow_mut().cut(from, to);
                    self.plan(length, Plan::Heal { from, to });
                }
            }
        }
    }
}
