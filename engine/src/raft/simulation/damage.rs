//! Damage in the model: batches that a restart, or a read, finds unreadable, and the part of the driver that gets them
//! back by asking the others, over a network of its own that delays, loses and reorders questions and answers.
//!
//! Within the contract's bound: what was durable at a quorum stays intact somewhere.

use super::*;

/// A batch kept aside, with what precedes it.
pub(super) type Kept = (LogId, BatchRun);

#[derive(Clone, Debug)]
pub(super) struct Question {
    token: u64,
    round: u8,
    /// Which batch: the one behind this position.
    previous: LogId,
    /// A batch further on that the asker kept: who has that one, too, has the same log before it.
    proof: Option<LogId>,
}

#[derive(Clone, Debug)]
pub(super) struct Reply {
    question: Question,
    batch: Option<BatchRun>,
    answer: Answer,
    proves: bool,
    /// The term in which the answering node leads.
    leads: Option<(Term, LogId)>,
    reach: Reach,
}

#[derive(Clone, Debug)]
pub(super) enum Talk {
    Question(Question),
    Reply(Reply),
}

/// What the driver of a damaged node is busy with.
#[derive(Debug)]
pub(super) struct Search {
    token: u64,
    previous: LogId,
    /// Of a known batch.
    want: Option<BatchRun>,
    inquiry: Inquiry,
}

impl Disk {
    pub(super) fn has_intact(&self, end: LogId) -> bool {
        let in_log = self.log.iter().any(|batch| batch.end() == end && !self.damaged.contains(&batch.first));
        in_log || self.kept.iter().any(|(_, batch)| batch.end() == end)
    }

    /// The batch that began with the last cut, if there is one and it took something away.
    fn position_of_cut(&self) -> Option<usize> {
        let position = self.log.partition_point(|batch| batch.first <= self.cut_after.index);
        let previous = position.checked_sub(1).map_or(self.start, |before| self.log[before].end());
        (!self.cut_off.is_empty() && position < self.log.len() && previous == self.cut_after)
            .then_some(position)
    }

    /// How far all that is here reaches.
    fn reach(&self, raft: &Raft) -> Reach {
        let Some(claim) = raft.restraint().claim else {
            return Reach { highest: raft.last(), in_doubt: false, claims: false };
        };
        let kept = self.kept.iter().map(|(_, batch)| batch.end()).max().unwrap_or_default();
        let highest = raft.last().max(kept).max(claim.end().unwrap_or_default());
        Reach { highest, in_doubt: !claim.certain, claims: true }
    }
}

impl Simulation {
    /// A moment at which a crash hurts most: what a leader has just committed may lie only in its memory.
    pub(super) fn after_commit(&mut self, at: usize) {
        let leads = self.nodes[at].life.as_ref().is_some_and(|life| life.raft.role() == Role::Leader);
        if self.damage == 0 || !leads {
            return;
        }
        let node = &self.nodes[at];
        let in_memory = node.life.as_ref().is_some_and(|life| life.raft.commit() > node.disk.last().index);
        match self.random.below(if in_memory { 3 } else { 24 }) {
            0 => self.doomed.push((at, false)),
            1 | 2 => {
                let other = self.random.below(self.nodes.len() as u64) as usize;
                self.doomed.push((other, other != at));
            }
            _ => {}
        }
    }

    /// Another: a node that is free again may be so too early.
    pub(super) fn after_release(&mut self, at: usize) {
        if self.damage == 0 {
            return;
        }
        let leader = self.nodes[at].life.as_ref().and_then(|life| life.raft.leader());
        let leader = self.nodes.iter().position(|node| Some(node.id) == leader);
        // Without a leader, who has most.
        let others = (0..self.nodes.len()).filter(|other| *other != at);
        let best = leader.or_else(|| others.max_by_key(|other| self.nodes[*other].disk.last()));
        match (self.random.below(4), best) {
            (0, _) => self.doomed.push((at, false)),
            (1 | 2, Some(best)) => self.doomed.push((best, false)),
            _ => {}
        }
    }

    fn is_unnoticed(&self, from: NodeId, to: NodeId) -> bool {
        self.unnoticed.contains(&(from, to)) || self.unnoticed.contains(&(to, from))
    }

    pub(super) fn is_cut_off(&self, from: NodeId, to: NodeId) -> bool {
        self.blocked.contains(&(from, to)) || self.is_unnoticed(from, to)
    }

    /// A node is back. Some of the others notice at once; until then they count on what it said before.
    pub(super) fn comes_back(&mut self, at: usize) -> Outcome {
        let id = self.nodes[at].id;
        for peer in (0..self.nodes.len()).filter(|peer| *peer != at) {
            let other = self.nodes[peer].id;
            if self.nodes[peer].life.is_some() && self.random.below(2) == 0 {
                // Nothing that was said to the life before reaches this one.
                self.network.retain(|(from, to, _)| (*from, *to) != (other, id));
                self.unnoticed.insert((id, other));
            } else {
                self.break_session(at, peer)?;
            }
        }
        Ok(())
    }

    /// Somebody notices.
    pub(super) fn notice(&mut self) -> Outcome {
        let count = self.unnoticed.len() as u64;
        if count == 0 || self.random.below(60) > 0 {
            return Ok(());
        }
        let chosen = self.random.below(count) as usize;
        let Some((id, other)) = self.unnoticed.iter().nth(chosen).copied() else { return Ok(()) };
        let at = |id| self.nodes.iter().position(|node| node.id == id);
        match (at(id), at(other)) {
            (Some(at), Some(peer)) => self.break_session(at, peer),
            _ => Ok(()),
        }
    }

    /// Those crashes; some nodes are back at once, with damage.
    pub(super) fn doom(&mut self) -> Outcome {
        for (at, damaged) in std::mem::take(&mut self.doomed) {
            if self.nodes[at].life.is_none() {
                continue;
            }
            self.crash(at);
            if damaged {
                self.inflict(at);
                self.boot(at);
                self.comes_back(at)?;
            }
        }
        Ok(())
    }

    /// Whether the copy of that batch at node `at` may be lost.
    fn may_lose(&self, at: usize, end: LogId) -> bool {
        // A copy that nobody asks for is none: learners are not asked.
        let elsewhere = self.nodes.iter().enumerate().any(|(other, node)| {
            other != at && self.configuration.is_voter(node.id) && node.disk.has_intact(end)
        });
        let had = |id: NodeId| {
            let node = self.nodes.iter().find(|node| node.id == id);
            self.lost.contains(&(id, end))
                || node.is_some_and(|node| node.disk.has_intact(end) || node.disk.holds(end))
        };
        elsewhere || !Quorum::of(&self.configuration).reached(had)
    }

    /// Something becomes unreadable while the node is down.
    pub(super) fn inflict(&mut self, at: usize) {
        self.rot(at);
        if let Some(trace) = &mut self.trace {
            let node = &self.nodes[at];
            trace.push(format!("{} {} starts over {:?}", self.now.0, node.id, node.disk));
        }
    }

    fn rot(&mut self, at: usize) {
        let count = self.nodes[at].disk.log.len() as u64;
        if count == 0 {
            return;
        }
        let position = self.nodes[at].disk.position_of_cut();
        if let Some(position) = position.filter(|_| self.random.below(3) > 0) {
            let end = self.nodes[at].disk.log[position].end();
            if self.may_lose(at, end) {
                self.lose_unknown(at, position);
            }
            return;
        }
        // Mostly near the end, where it matters.
        let back = self.random.below(count).min(self.random.below(8)).min(self.random.below(4));
        let position = (count - 1 - back) as usize;
        let batch = self.nodes[at].disk.log[position];
        if !self.may_lose(at, batch.end()) {
            return;
        }
        if self.random.below(2) == 0 {
            self.lose_known(at, batch);
        } else {
            self.lose_unknown(at, position);
        }
    }

    pub(super) fn lose_known(&mut self, at: usize, batch: BatchRun) {
        self.cover.mark("known damage");
        let node = &mut self.nodes[at];
        node.disk.damaged.insert(batch.first);
        self.lost.insert((node.id, batch.end()));
    }

    /// The batch at `position` is gone without a trace, and the log is cut before it.
    fn lose_unknown(&mut self, at: usize, position: usize) {
        let disk = self.nodes[at].disk.clone();
        let id = self.nodes[at].id;
        let mut kept = Vec::new();
        let mut lost = vec![disk.log[position].end()];
        for batch in &disk.log[position + 1..] {
            let unreadable = disk.damaged.contains(&batch.first)
                || (self.random.below(4) == 0 && self.may_lose(at, batch.end()));
            let previous = disk.log[..].iter().rev().find(|before| before.last < batch.first);
            match previous {
                Some(previous) if !unreadable => kept.push((previous.end(), *batch)),
                _ => lost.push(batch.end()),
            }
        }
        // Once the log has grown beyond an older cut, what was kept behind that is not what lies behind this one.
        let grew = disk.claim.is_some() && disk.last().index > disk.cut_at;
        if disk.claim.is_some() && !grew {
            kept.extend(disk.kept.iter().copied());
        } else {
            lost.extend(disk.kept.iter().map(|(_, batch)| batch.end()));
            if disk.kept.iter().any(|(_, batch)| !self.may_lose(at, batch.end())) {
                return;
            }
        }
        let term = disk.recovered_term().max(disk.claim.map_or(Term(0), |claim| claim.term));
        let whole_tail = kept.last().is_some_and(|(_, batch)| batch.end() == disk.last());
        let claim = match disk.claim {
            Some(claim) if claim.certain && !grew => claim,
            None if whole_tail && self.random.below(2) == 0 => {
                Claim { term: disk.last().term, last: disk.last().index, certain: true }
            }
            _ => {
                let first = disk.log[position].first;
                let proved = first.get() + self.random.below(disk.last().index.get() + 1 - first.get());
                let before =
                    disk.claim.filter(|claim| !claim.certain).map_or(LogIndex(0), |claim| claim.last);
                Claim { term, last: LogIndex(proved).max(before), certain: false }
            }
        };
        self.cover.mark(if claim.certain { "certain claim" } else { "uncertain claim" });
        // With what began with a cut the cut is forgotten, and what it took away ends the log as if nothing had happened.
        let begins_there = disk.position_of_cut() == Some(position);
        let forgets_cut = begins_there && disk.claim.is_none() && self.random.below(2) == 0;
        self.lost.extend(lost.into_iter().map(|end| (id, end)));
        let node = &mut self.nodes[at];
        let cut_at = match disk.cut_off.last() {
            Some(batch) if forgets_cut => batch.last,
            _ => disk.log[position].first.previous(),
        };
        // The start that cuts saves the highest term that it saw.
        if term > node.disk.term {
            (node.disk.term, node.disk.vote) = (term, None);
        }
        node.disk.log.truncate(position);
        node.disk.damaged.retain(|first| *first < disk.log[position].first);
        let cut_off = std::mem::take(&mut node.disk.cut_off);
        if forgets_cut {
            self.cover.mark("forgotten cut");
            node.disk.log.extend(cut_off);
        }
        node.disk.kept = kept;
        node.disk.claim = Some(claim);
        node.disk.cut_at = cut_at;
    }

    /// A read finds a batch unreadable at a node that runs.
    pub(super) fn find_damage(&mut self, at: usize) -> Outcome {
        let node = &self.nodes[at];
        let count = node.disk.log.len() as u64;
        if node.life.is_none() || count == 0 {
            return Ok(());
        }
        let batch = node.disk.log[self.random.below(count) as usize];
        // What is being cut off is no part of the log any more.
        let here = self.nodes[at].life.as_ref().is_some_and(|life| {
            life.raft.batch_starting_at(batch.first) == Some(batch) && batch.last <= life.raft.durable()
        });
        if !here || !self.may_lose(at, batch.end()) {
            return Ok(());
        }
        self.lose_known(at, batch);
        if let Some(life) = &mut self.nodes[at].life {
            life.found.entry(batch.first).or_insert(life.raft.term());
        }
        self.tell_damage(at)
    }

    fn tell_damage(&mut self, at: usize) -> Outcome {
        let node = &mut self.nodes[at];
        let Some(life) = &mut node.life else { return Ok(()) };
        let log = life.raft.log();
        // The disk may not have been told yet of what was cut off.
        let there = |first: &&LogIndex| {
            let damaged = node.disk.log.iter().find(|batch| batch.first == **first);
            damaged.is_some() && log.batch_starting_at(**first).as_ref() == damaged
        };
        let damaged: BTreeSet<LogIndex> = node.disk.damaged.iter().filter(there).copied().collect();
        life.found.retain(|first, _| damaged.contains(first));
        self.feed(at, Event::DamageChanged { damaged })
    }

    /// What a node says that it holds, it can read; or it found that it cannot in the term in which it says so, and may have said
    /// so before.
    pub(super) fn acknowledged(&mut self, at: usize, term: Term, matched: LogId) -> Outcome {
        let node = &self.nodes[at];
        let Some(life) = &node.life else { return Ok(()) };
        for first in node.disk.damaged.range(..=matched.index) {
            let excused = life.found.get(first) == Some(&term);
            if !excused && life.raft.batch_starting_at(*first).is_some() {
                return Err(format!("node {} acknowledges {matched:?} and cannot read {first}", node.id));
            }
            self.cover.mark("acknowledged before it rotted");
        }
        Ok(())
    }

    /// The driver of a damaged node does what is next.
    pub(super) fn search(&mut self, at: usize) -> Outcome {
        let node = &self.nodes[at];
        let Some(life) = &node.life else { return Ok(()) };
        let restraint = life.raft.restraint();
        let id = node.id;
        let want = restraint.damaged_from.and_then(|from| life.raft.batch_starting_at(from));
        let previous = match want {
            Some(batch) => life.raft.log().batch_end_at(batch.first.previous()),
            None => restraint.claim.map(|_| life.raft.last()),
        };
        let Some(previous) = previous else {
            if let Some(life) = &mut self.nodes[at].life {
                life.search = None;
            }
            return Ok(());
        };
        let leaderless = life.raft.leader().is_none();
        if want.is_none() && leaderless {
            let own = node.disk.kept.iter().find(|(before, _)| *before == previous);
            if let Some((_, batch)) = own.copied() {
                self.cover.mark("adopted what was kept");
                return self.feed(at, Event::Adopt { batch, configuration: None });
            }
        }
        let proof = node.disk.kept.iter().map(|(_, batch)| batch.end());
        let proof: Vec<LogId> = proof.filter(|end| end.index > previous.index).collect();
        let proof =
            if proof.is_empty() { None } else { Some(proof[self.random.below(proof.len() as u64) as usize]) };
        let reach = node.disk.reach(&life.raft);
        let token = self.random.next();
        let quorum = Quorum::of(&self.configuration);
        let Some(life) = &mut self.nodes[at].life else { return Ok(()) };
        let search = life.search.take().filter(|search| search.previous == previous && search.want == want);
        let mut search = search.unwrap_or_else(|| Search {
            token,
            previous,
            want,
            inquiry: Inquiry::new(id, &quorum, reach),
        });
        let verdict = search.inquiry.verdict();
        let open: Vec<NodeId> = search.inquiry.open().collect();
        let round = search.inquiry.round();
        let question = Question { token: search.token, round, previous, proof };
        // A verdict is that of the questions behind it; then all begins anew.
        life.search = verdict.is_none().then_some(search);
        for to in open {
            if !self.is_cut_off(id, to) {
                self.talk.push((id, to, Talk::Question(question.clone())));
            }
        }
        match verdict {
            Some(Verdict::Nowhere(elsewhere)) if leaderless => {
                self.feed(at, Event::NothingBehind { after: previous.index, elsewhere })?;
                let life = self.nodes[at].life.as_ref();
                let kept = want.is_none() && life.is_some_and(|life| life.raft.restraint().claim.is_some());
                self.cover.mark(match want {
                    Some(_) => "given up: known",
                    None if kept => "nothing behind an end that may be void",
                    None => "given up: claim",
                });
                if kept && proof.is_some() {
                    self.waiting.insert(id);
                }
                self.waits_for_more_than_there_is(at);
                self.tell_damage(at)
            }
            Some(Verdict::Unproved(elsewhere)) if want.is_none() => {
                self.cover.mark("all asked");
                if proof.is_some() {
                    self.waiting.insert(id);
                }
                if !elsewhere.believed {
                    self.cover.mark("all asked, and a quorum in doubt");
                    self.waiting.insert(id);
                }
                self.feed(at, Event::AllAsked { elsewhere })?;
                self.waits_for_more_than_there_is(at);
                Ok(())
            }
            Some(Verdict::Unproved(_)) => {
                // Who may have had the batch has to be mended first, and perhaps only a leader can do that.
                self.waiting.insert(id);
                Ok(())
            }
            Some(Verdict::AllCopiesGone) => {
                self.cover.mark("halt");
                self.halted = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Whether no log reaches what a node with a claim waits for, and a quorum had it, or may have.
    fn waits_for_more_than_there_is(&mut self, at: usize) {
        let restraint = |node: &Node| node.life.as_ref().map(|life| life.raft.restraint());
        let Some(restraint) = restraint(&self.nodes[at]).filter(|restraint| restraint.claim.is_some()) else {
            return;
        };
        let reaches = |node: &Node| {
            node.life
                .as_ref()
                .is_some_and(|life| restraint.vote_bar.is_some_and(|bar| life.raft.last() >= bar))
        };
        let had = |id: NodeId| {
            let node = self.nodes.iter().find(|node| node.id == id);
            let claim = node.and_then(|node| node.disk.claim);
            let holds =
                |bar| self.lost.contains(&(id, bar)) || node.is_some_and(|node| node.disk.has_intact(bar));
            claim.is_some_and(|claim| !claim.certain) || restraint.vote_bar.is_none_or(holds)
        };
        if !self.nodes.iter().any(reaches) && Quorum::of(&self.configuration).reached(had) {
            self.waiting.insert(self.nodes[at].id);
        }
    }

    pub(super) fn hear(&mut self, from: NodeId, to: NodeId, talk: Talk) -> Outcome {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{} {to} hears of {from}: {talk:?}", self.now.0));
        }
        let Some(at) = self.nodes.iter().position(|node| node.id == to) else { return Ok(()) };
        match talk {
            Talk::Question(question) => {
                let Some(reply) = self.reply(at, question) else { return Ok(()) };
                if !self.is_cut_off(to, from) {
                    self.talk.push((to, from, Talk::Reply(reply)));
                }
                Ok(())
            }
            Talk::Reply(reply) => self.heard(at, from, reply),
        }
    }

    /// What a node answers from all that it has; nothing while it cannot say.
    fn reply(&self, at: usize, question: Question) -> Option<Reply> {
        let node = &self.nodes[at];
        let raft = &node.life.as_ref()?.raft;
        let previous = question.previous;
        let in_log = (raft.log().batch_end_at(previous.index) == Some(previous))
            .then(|| raft.batch_starting_at(previous.index.next()))
            .flatten();
        let kept = node.disk.kept.iter().find(|(before, _)| *before == previous).map(|(_, batch)| *batch);
        let reaches = |claim: Claim| !claim.certain || claim.last > previous.index;
        let reaches = raft.restraint().claim.is_some_and(reaches);
        let (batch, answer) = match in_log {
            Some(batch) if node.disk.damaged.contains(&batch.first) => (None, Answer::Had),
            Some(batch) if batch.last > raft.durable() || !node.disk.holds(batch.end()) => return None,
            Some(batch) => (Some(batch), Answer::Other),
            None if kept.is_some() => (kept, Answer::Other),
            None if reaches && raft.last().index < previous.index => (None, Answer::Unclear),
            None if reaches && raft.last() == previous => (None, Answer::Had),
            None => (None, Answer::None),
        };
        let proves = question
            .proof
            .is_some_and(|end| raft.log().batch_end_at(end.index) == Some(end) || node.disk.has_intact(end));
        let leads = (raft.role() == Role::Leader).then(|| (raft.term(), raft.last()));
        let mut reach = node.disk.reach(raft);
        reach.in_doubt |= raft.has_other_voters_from(previous.index.next());
        Some(Reply { question, batch, answer, proves, leads, reach })
    }

    fn heard(&mut self, at: usize, from: NodeId, reply: Reply) -> Outcome {
        let node = &mut self.nodes[at];
        let Some(life) = &mut node.life else { return Ok(()) };
        let Some(search) = life.search.as_mut().filter(|search| search.token == reply.question.token) else {
            return Ok(());
        };
        let (previous, want) = (search.previous, search.want);
        let kept_next = |batch: &BatchRun| node.disk.kept.iter().any(|(before, _)| *before == batch.end());
        let mut answer = reply.answer;
        match (want, reply.batch) {
            (Some(want), Some(batch)) if want == batch => {
                life.search = None;
                node.disk.damaged.remove(&want.first);
                self.lost.remove(&(node.id, want.end()));
                self.cover.mark("repaired");
                return self.tell_damage(at);
            }
            (None, Some(batch)) => {
                let proved = reply.proves || kept_next(&batch);
                let current = life.raft.last() == previous && life.raft.leader().is_none();
                if proved {
                    life.search = None;
                    if !current {
                        return Ok(());
                    }
                    self.cover.mark(if reply.proves { "adopted by proof" } else { "adopted between" });
                    return self.feed(at, Event::Adopt { batch, configuration: None });
                }
                // What cannot precede the next batch that was kept is certainly another one.
                let next =
                    node.disk.kept.iter().map(|(_, kept)| kept).find(|kept| kept.first > previous.index);
                let other =
                    next.is_some_and(|kept| batch.last.next() >= kept.first || batch.term > kept.term);
                answer = if other { Answer::None } else { Answer::Other };
            }
            // Another one than the one that is known.
            (Some(_), Some(_)) => answer = Answer::None,
            (_, None) => {}
        }
        search.inquiry.answered(from, reply.question.round, answer, reply.reach);
        match reply.leads {
            Some((term, last)) => self.feed(at, Event::LeaderHolds { leader: from, term, last }),
            None => Ok(()),
        }
    }

    /// Questions and answers arrive, mostly the old ones first.
    pub(super) fn some_talk(&mut self) -> Outcome {
        let count = self.talk.len() as u64;
        if count == 0 {
            return Ok(());
        }
        let chosen = self.random.below(count).min(self.random.below(count)) as usize;
        let (from, to, talk) = self.talk.swap_remove(chosen);
        self.hear(from, to, talk)
    }
}

fn run(seed: u64, cover: &mut Cover) -> Outcome {
    let mut simulation = Simulation::new(seed);
    simulation.snapshots = 0;
    simulation.damage = 50 + simulation.random.below(500);
    let slow = simulation.random.below(2 * simulation.nodes.len() as u64) as usize;
    simulation.slow = (slow < simulation.nodes.len()).then_some(slow);
    simulation.weather.crash = simulation.weather.crash.max(3 + simulation.random.below(8));
    observe(simulation, cover)
}

/// As the runs without damage; `SEED=n` replays one run, `TRACE=1` with all its events; `SEEDS=n` runs more of them.
#[test]
fn damaged_logs_lose_nothing_that_was_committed_and_heal() {
    let mut cover = Cover::default();
    let (first, count) = match env("SEED", u64::MAX) {
        u64::MAX => (env("FIRST", 0), env("SEEDS", 4_000)),
        seed => (seed, 1),
    };
    for seed in first..first + count {
        if let Err(found) = run(seed, &mut cover) {
            panic!("seed {seed}: {found}\nreplay: SEED={seed} TRACE=1");
        }
    }
    if count < 1_000 {
        return;
    }
    // Most runs end whole: few in a stop because a quorum may have had what is gone. More wait, though all are back: in
    // doubt over several batches in a row, or over one that a quorum of damaged nodes may have had.
    let part = |what, of| cover.0.get(what).copied().unwrap_or_default() * of < count;
    assert!(part("halted", 20) && part("waits", 6), "{cover:?}");
    for what in [
        "known damage",
        "certain claim",
        "uncertain claim",
        "forgotten cut",
        "nothing behind an end that may be void",
        "repaired",
        "adopted what was kept",
        "adopted by proof",
        "adopted between",
        "given up: known",
        "given up: claim",
        "all asked",
        "released",
        "halted",
        "acknowledged before it rotted",
    ] {
        let count = cover.0.get(what).copied().unwrap_or_default();
        assert!(count >= 10, "{what:?} was exercised {count} times: {cover:?}");
    }
}

/// What must not happen at a damaged node is noticed when it does.
#[test]
fn every_known_bug_of_repair_is_caught_when_it_is_put_back() {
    let mut unnoticed = Vec::new();
    for mutant in Mutant::REPAIR {
        mutants::set(Some(mutant));
        let found = (0..env("SEEDS", 20_000)).find_map(|seed| {
            let found = run(seed, &mut Cover::default()).err()?;
            Some((seed, found.lines().next().unwrap_or_default().to_owned()))
        });
        mutants::set(None);
        println!("{mutant:?}: {found:?}");
        if found.is_none() {
            unnoticed.push(mutant);
        }
    }
    assert_eq!(unnoticed, []);
}
