//! Snapshots in the random runs: taken, purged behind, sent late, twice or never, and installed.
//!
//! A snapshot is its last entry; whoever has one durably holds all that was committed up to there.

use super::*;

/// A snapshot under way.
#[derive(Clone, Debug)]
pub(super) struct Transfer {
    from: NodeId,
    /// Its life.
    boots: u64,
    to: NodeId,
    last: LogId,
}

impl Transfer {
    pub(super) fn is_of(&self, id: NodeId) -> bool {
        self.from == id || self.to == id
    }

    pub(super) fn is_between(&self, one: NodeId, other: NodeId) -> bool {
        [(one, other), (other, one)].contains(&(self.from, self.to))
    }
}

impl Disk {
    /// What a start makes of a log and a snapshot that do not fit together: an install was interrupted.
    pub(super) fn reconcile(&mut self) {
        if self.snapshot.index > self.start.index
            && !self.log.iter().any(|batch| batch.end() == self.snapshot)
        {
            self.log.clear();
            self.start = self.snapshot;
            self.epoch = Epoch(self.epoch.0 + 1);
        }
    }

    pub(super) fn start_behind(&mut self, start: LogId) {
        self.log.retain(|batch| batch.last > start.index);
        self.start = start;
    }
}

impl Simulation {
    pub(super) fn some_snapshot(&mut self, at: usize) -> Outcome {
        match self.random.below(12) {
            0..2 => self.take_snapshot(at),
            2..4 => return self.purge(at),
            // One that was deposed and does not know it, too.
            dice @ 8..10
                if self.nodes[at].life.as_ref().is_some_and(|life| life.raft.can_accept_proposals()) =>
            {
                return self.propose(at, dice - 7, 60);
            }
            // Sent to somebody else long ago, or by a leader of old.
            10.. => {
                let to = self.random.below(self.nodes.len() as u64) as usize;
                if to != at && self.nodes[at].disk.snapshot != LogId::default() {
                    let to = self.nodes[to].id;
                    self.send_snapshot(at, to);
                }
            }
            _ if self.transfers.is_empty() => {}
            dice => {
                let at = self.random.below(self.transfers.len() as u64) as usize;
                let transfer = self.transfers[at].clone();
                if dice != 7 {
                    self.transfers.swap_remove(at);
                }
                let lost = self.random.below(6) == 0 || self.is_cut_off(transfer.from, transfer.to);
                return self.transferred(transfer, lost);
            }
        }
        Ok(())
    }

    fn take_snapshot(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let Some(life) = &node.life else { return };
        let applied = life.raft.commit().min(life.raft.durable());
        let behind = self.random.below(3);
        let Some(applied) = life.raft.log().floor(LogIndex(applied.get().saturating_sub(behind))) else {
            return;
        };
        if let Some(last) =
            life.raft.log().batch_end_at(applied).filter(|last| last.index > node.disk.snapshot.index)
        {
            self.cover.mark("snapshot");
            node.disk.snapshot = last;
        }
    }

    fn purge(&mut self, at: usize) -> Outcome {
        let node = &self.nodes[at];
        let Some(life) = &node.life else { return Ok(()) };
        let bound = node.disk.snapshot.index.min(life.raft.durable()).min(life.raft.commit());
        let Some(through) = life.raft.log().floor(bound) else { return Ok(()) };
        if through <= life.raft.log_start().index {
            return Ok(());
        }
        self.cover.mark("purge");
        self.feed(at, Event::Purged { through })?;
        if let Some(life) = &mut self.nodes[at].life {
            let start = life.raft.log_start();
            life.writes.push_back(Write::Start { start, epoch: None });
        }
        Ok(())
    }

    pub(super) fn send_snapshot(&mut self, at: usize, to: NodeId) {
        let node = &self.nodes[at];
        self.cover.mark("snapshot sent");
        self.transfers.push(Transfer { from: node.id, boots: node.boots, to, last: node.disk.snapshot });
    }

    /// It has arrived, or is lost; the sender hears of either, if it still is who it was.
    pub(super) fn transferred(&mut self, transfer: Transfer, lost: bool) -> Outcome {
        let Transfer { from, boots, to, last } = transfer;
        let position = |id| self.nodes.iter().position(|node| node.id == id);
        let (Some(sender), Some(receiver)) = (position(from), position(to)) else { return Ok(()) };
        let mut arrives = !lost && self.nodes[receiver].life.is_some();
        if arrives {
            let disk = &mut self.nodes[receiver].disk;
            disk.snapshot = if last.index > disk.snapshot.index { last } else { disk.snapshot };
            // The process may die between the two.
            if self.random.below(10) == 0 && self.weather.crash > 0 {
                self.cover.mark("crash before an install");
                self.crash(receiver);
                arrives = false;
            } else {
                let (configuration_index, configuration) = self.configuration_as_of(last.index);
                let received = Event::SnapshotReceived { last, configuration, configuration_index };
                self.feed(receiver, received)?;
            }
        }
        if self.nodes[sender].boots == boots && !self.is_foreign(sender, to) {
            self.feed(sender, Event::SnapshotEnded { to, installed: arrives.then_some(last) })?;
        }
        Ok(())
    }

    pub(super) fn installed(&mut self, at: usize, last: LogId, epoch: Option<Epoch>) -> Outcome {
        let id = self.nodes[at].id;
        if !self.ledger.committed.iter().any(|(batch, _)| batch.end() == last) {
            return Err(format!("node {id} installs {last:?}, which nobody has committed"));
        }
        self.cover.mark(if epoch.is_some() { "install" } else { "install that keeps the log" });
        if let Some(life) = &mut self.nodes[at].life {
            if epoch.is_some() && !life.writes.is_empty() {
                self.cover.mark("install over pending writes");
            }
            if epoch.is_some() {
                life.writes.push_back(Write::Start { start: last, epoch });
            }
        }
        Ok(())
    }
}

fn run(seed: u64, strict: bool, cover: &mut Cover) -> Outcome {
    let mut simulation = Simulation::new(seed);
    simulation.snapshots = 60 + simulation.random.below(150);
    simulation.strict = strict;
    observe(simulation, cover)
}

/// `SEED=n` replays one run, `TRACE=1` with all its events; `SEEDS=n` runs more of them.
#[test]
fn logs_that_are_purged_behind_snapshots_lose_nothing_and_heal() {
    let mut cover = Cover::default();
    let (first, count) = match env("SEED", u64::MAX) {
        u64::MAX => (0, env("SEEDS", 800)),
        seed => (seed, 1),
    };
    for seed in first..first + count {
        if let Err(found) = run(seed, true, &mut cover) {
            panic!("seed {seed}: {found}\nreplay: SEED={seed} TRACE=1");
        }
    }
    if count < 800 {
        return;
    }
    for what in [
        "crash before an install",
        "install",
        "install over pending writes",
        "install that keeps the log",
        "purge",
        "snapshot",
        "snapshot sent",
    ] {
        let count = cover.0.get(what).copied().unwrap_or_default();
        assert!(count >= 20, "{what:?} was exercised {count} times: {cover:?}");
    }
}

#[test]
fn every_known_bug_of_snapshots_is_caught_when_it_is_put_back() {
    for mutant in Mutant::SNAPSHOT {
        for strict in [true, false] {
            mutants::set(Some(mutant));
            let found =
                (0..1_500).find_map(|seed| Some((seed, run(seed, strict, &mut Cover::default()).err()?)));
            mutants::set(None);
            let line = found.as_ref().map(|(seed, found)| (seed, found.lines().next().unwrap_or_default()));
            println!("{mutant:?}, strict {strict}: {line:?}");
            assert!(found.is_some(), "{mutant:?} was not noticed");
        }
    }
}
