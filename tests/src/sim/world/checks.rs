//! What is checked while a run goes on.

use super::*;

impl<C: Cluster> World<'_, C> {
    pub(super) fn changed(&mut self, node: usize, before: &View, after: &View) {
        if (before.role, before.term) != (after.role, after.term) {
            self.context.record(node, What::Role, u64::from(after.role), after.term);
        }
        self.history.borrow_mut().see(node, before, after);
        if before.role != after.role {
            self.plot_role(node, after.role);
        }
        if before.leader != after.leader {
            self.plot_leader(node, after.leader);
        }
        let leads = (before.role, before.term) == (LEADER, after.term) && after.role == LEADER;
        if leads && before.commit != after.commit {
            // By counting: something of its own term.
            self.history.borrow_mut().committed_in(after.term);
        }
        self.plot_overtakes(node, after);
        self.check_members(node, before, after);
        self.members_trouble(node, before, after);
        self.check_after_truncation(node, before, after);
        if let Some(Err(broken)) = self.machines[node].process.as_ref().map(SimNode::check) {
            self.history.borrow_mut().fail(|| format!("node {node}: {broken}"));
        }
        // It may have voted just now.
        if after.term > before.term && before.formed && after.role == 0 && self.phase == Phase::Trouble {
            self.voted_trouble(node);
        }
        if after.role >= CANDIDATE && before.role < CANDIDATE {
            self.check_campaign(node, after.term);
        }
        if after.role == LEADER && before.role != LEADER {
            let Some(process) = &self.machines[node].process else { return };
            self.check_votes(node, after);
            let start = process.log_start();
            self.history.borrow_mut().elected(node, after, start, |index| process.chain_at(index));
            if self.phase == Phase::Trouble {
                self.elected_trouble(node);
            }
        }
        if before.commit != after.commit {
            self.context.record(node, What::Commit, after.commit, after.term);
        }
        let news = before.commit.min(before.written) != after.commit.min(after.written);
        if news && after.commit <= after.written {
            let Some(process) = &self.machines[node].process else { return };
            let chain = process.chain_at(after.commit);
            let news = after.commit > process.log_start()
                && self.history.borrow_mut().committed(node, after.term, after.commit, chain);
            // Who counts is the leader's to say.
            if news && (!self.changes || after.role == LEADER) {
                self.check_durable(node, after, chain);
                self.commits_seen += 1;
                if self.options.image_check_every > 0 && self.commits_seen >= self.image_check_at {
                    // Recovery reads the whole log, so the checks become rarer as it grows.
                    self.image_check_at += self.options.image_check_every + self.commits_seen / 8;
                    self.check_images(node, after.commit, chain);
                }
            }
        }
    }

    /// What a node does about what its disk has lost: it acknowledges nothing anew that it cannot read, and is sure of its log
    /// again only when that holds whatever the node may have acknowledged and forgotten.
    pub(super) fn check_lack(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        let Some(process) = machine.process.as_ref().filter(|_| machine.rotten) else { return };
        let now = process.lack();
        let was = std::mem::replace(&mut machine.lack, now.clone());
        let counted = if now.term > was.term { 0 } else { was.acked.min(now.acked) };
        let mut both = now.unread.iter().filter(|first| was.unread.contains(first));
        if let Some(first) = both.find(|first| (counted + 1..=now.acked).contains(first)) {
            self.history.borrow_mut().fail(|| {
                format!("node {node} acknowledges {}, and cannot read what begins at {first}", now.acked)
            });
        }
        let Some(term) = was.claim.filter(|_| now.claim.is_none()) else { return };
        // A leader of a later term holds what was committed before it, and so do all logs that any voter has.
        let lost = self.history.borrow().committed_up_to(machine.committed_at_boot, term);
        let Some((index, chain)) = lost else { return };
        let holds = process.log_start() >= index || process.chain_at(index) == Some(chain);
        if !holds {
            let last = process.view().last;
            self.history.borrow_mut().fail(|| {
                format!(
                    "node {node} is sure of its log up to {last} again, and lacks index {index}, which it may have acknowledged"
                )
            });
        }
    }

    /// Who campaigns in `term` has the pre-votes of a quorum, or was told to.
    pub(super) fn check_campaign(&self, node: usize, term: u64) {
        // A pre-vote needs a quorum's answers, and lasts one and a half election time-outs, by a clock that may be slow.
        let time = self.tuning.election_timeout_ms * MILLISECOND * 5 / 2;
        if self.machines[node].process.as_ref().is_some_and(SimNode::was_told_to_campaign) {
            if !self.was_told_to_campaign(node, term) {
                self.history.borrow_mut().fail(|| {
                    format!("node {node} campaigns in term {term} as one that was told to, and no leader did")
                });
            }
        } else if !self.has_heard_quorum(node, time) {
            self.history.borrow_mut().fail(|| format!("node {node} campaigns without a quorum's pre-votes"));
        }
    }

    /// Whether the leader of the term before `term` told a node to campaign in that.
    ///
    /// Such a campaign begins without pre-votes (thesis, section 3.10): the one message suffices, and the node need not
    /// have heard anybody else for long. A leader whose disk has stopped answering chooses by what *it* hears, and cannot
    /// know what the other hears. Whether the candidate wins is decided by votes. So what must hold is that the message has
    /// arrived, and that the leader has left its office since, or is handing it over.
    fn was_told_to_campaign(&self, node: usize, term: u64) -> bool {
        let Some(before) = term.checked_sub(1) else { return false };
        self.history.borrow().leader_of(before).is_some_and(|by| {
            let leader = &self.machines[by];
            let leads_on = (leader.view.role, leader.view.term) == (LEADER, before);
            let hands_over = leader.process.as_ref().is_some_and(SimNode::hands_over);
            (hands_over || !leads_on) && self.fabric.borrow().has_told_to_campaign(by, node, before)
        })
    }

    /// Whether a quorum could be heard within the last `time`, the node itself among them.
    fn has_heard_quorum(&self, node: usize, time: Time) -> bool {
        self.could_hear_quorum(node, self.members_of(node), time)
    }

    /// The same, where the voters are those of `members`.
    pub(super) fn could_hear_quorum(&self, node: usize, members: Members, time: Time) -> bool {
        members.reached(|other| other == node || self.could_hear(node, other, time))
    }

    /// Whether another node could be heard within the last `time`. What was said before a node woke or was started may have
    /// been waiting for it.
    pub(super) fn could_hear(&self, node: usize, other: usize, time: Time) -> bool {
        let since = self.context.now().saturating_sub(time);
        let audible_until = self.fabric.borrow().audible_until(other, node);
        audible_until.max(self.machines[node].woke_at) >= since
    }

    /// Check-quorum (thesis, section 6.2): a leader that has heard no quorum for an election time-out steps down. Twice that,
    /// because what was under way when a link was cut may have been read later, and clocks drift. Members that it has just been
    /// given have as long to be heard; until then those count that they took the place of. One that only waits for its disk before
    /// it stops leads nobody: it sends nothing, and admits nothing.
    pub(super) fn check_leader_is_heard(&self, node: usize) {
        let time = 2 * self.tuning.election_timeout_ms * MILLISECOND + 50 * MILLISECOND;
        let (before, changed_at) = self.machines[node].members_changed;
        let changed = self.changes && changed_at >= self.context.now().saturating_sub(time);
        let heard =
            self.has_heard_quorum(node, time) || changed && self.could_hear_quorum(node, before, time);
        if !heard && !self.machines[node].process.as_ref().is_some_and(SimNode::is_closing) {
            self.history
                .borrow_mut()
                .fail(|| format!("node {node} leads, and has not heard a quorum for long"));
        }
    }

    /// What is newly committed is durable on a quorum, as far as the nodes themselves say, dead ones by their last words; and a
    /// leader takes nobody's log for longer than that one is durable.
    fn check_durable(&self, node: usize, view: &View, chain: Option<[u8; 16]>) {
        let index = view.commit;
        let holds = |machine: &&Machine<C::Node>| {
            let same = machine.process.as_ref().is_none_or(|process| {
                // A node that is starting, or has gone on beyond the batch, need not tell.
                let held = process.chain_at(index);
                held.is_none() || held == chain
            });
            machine.rotten || (machine.known.durable >= index && same)
        };
        let holders = self.machines.iter().filter(holds).count();
        let counts = |node: usize| holds(&&self.machines[node]);
        let before = if self.changes { self.machines[node].members_before } else { Members::default() };
        if !self.members_of(node).reached(counts) && (before == Members::default() || !before.reached(counts))
        {
            self.history.borrow_mut().fail(|| {
                format!(
                    "node {node} committed index {index}, which {holders} of {} nodes say is durable",
                    self.machines.len()
                )
            });
        }
        self.check_matches(node, view);
    }

    /// A candidate wins by the votes of a quorum in its own term (Raft, section 5.2). Who has entered a later one since may have
    /// voted before.
    fn check_votes(&self, node: usize, view: &View) {
        let voted = |other: usize| {
            let known = self.machines[other].known;
            known.term > view.term || (known.term, known.vote) == (view.term, Some(node))
        };
        if !self.members_of(node).reached(voted) {
            self.history
                .borrow_mut()
                .fail(|| format!("node {node} leads term {} without the votes of a quorum", view.term));
        }
    }

    fn check_matches(&self, node: usize, view: &View) {
        let Some(process) = self.machines[node].process.as_ref().filter(|_| view.role == LEADER) else {
            return;
        };
        for (peer, machine) in self.machines.iter().enumerate().filter(|(peer, _)| *peer != node) {
            let Some(matched) = process.matched(peer) else { continue };
            let told = matched <= machine.known.durable || machine.wiped;
            if !told && machine.known.term <= view.term && !machine.rotten {
                let durable = machine.known.durable;
                self.history.borrow_mut().fail(|| {
                    format!(
                        "leader {node} takes node {peer} to be durable to {matched}, and it is to {durable}"
                    )
                });
            }
        }
    }

    pub(super) fn sweep(&mut self) {
        let mut history = self.history.borrow_mut();
        for (node, machine) in self.machines.iter().enumerate() {
            let Some(process) = &machine.process else { continue };
            history.sweep(node, &machine.view, process.log_start(), |index| process.chain_at(index));
            if let Err(broken) = process.check() {
                history.fail(|| format!("node {node}: {broken}"));
            }
        }
        drop(history);
        for (node, machine) in self.machines.iter().enumerate() {
            self.check_matches(node, &machine.view);
        }
    }

    /// What is committed is on a quorum of disks, in a form that recovery finds.
    fn check_images(&mut self, by: usize, index: u64, chain: Option<[u8; 16]>) {
        self.context.cover(Mark::ImageChecked);
        let mut holders = 0_u32;
        let mut told = String::new();
        // What the images are asked must not show in the run's own trace and counters.
        let aside = Context::new(Trace::new(false));
        let nodes = self.machines.len();
        let from = self.commits_seen as usize % nodes;
        for node in (0..nodes).map(|at| (from + at) % nodes) {
            // A recovery costs as much as a thousand events.
            if self.members_of(by).reached(|node| holders >> node & 1 == 1) {
                break;
            }
            let machine = &self.machines[node];
            if machine.rotten {
                holders |= 1 << node;
                continue;
            }
            let image = machine.disk.borrow().durable_image(&aside);
            let recover = || self.cluster.recover(node, self.founders, &self.tuning, SimDisk::new(&image));
            match recover() {
                Ok(log) => {
                    // Recovery is idempotent: what it left is recovered to the same log.
                    if self.commits_seen.is_multiple_of(4) {
                        image.borrow_mut().crash(Crash::PowerCut);
                        let again = recover().map(|log| (log.last, log.chains));
                        if again.as_ref() != Ok(&(log.last, log.chains.clone())) {
                            self.history.borrow_mut().fail(|| {
                                format!(
                                    "node {node}'s disk gives another log at the second recovery: {again:?}"
                                )
                            });
                        }
                    }
                    let held = log.chains.iter().find(|(end, _)| *end == index).map(|(_, chain)| *chain);
                    if held.is_some() && held == chain || index <= log.start {
                        holders |= 1 << node;
                    } else {
                        told += &format!("; node {node} holds up to {}", log.last);
                    }
                }
                Err(error) => told += &format!("; node {node}: {error}"),
            }
        }
        let (now, before) = (self.members_of(by), self.machines[by].members_before);
        let holds = |node: usize| holders >> node & 1 == 1;
        let held =
            now.reached(holds) || self.changes && before != Members::default() && before.reached(holds);
        if !held {
            let holders = holders.count_ones();
            self.history.borrow_mut().fail(|| {
                format!(
                    "index {index} is committed and durable on {holders} of {} nodes{told}",
                    self.machines.len()
                )
            });
        }
    }
}
