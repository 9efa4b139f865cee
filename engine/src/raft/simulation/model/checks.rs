//! What must hold between the nodes: what no single one can see.

use super::*;

impl World {
    /// After every event at a node. Log matching (Raft, figure 3), and which members decide here: those of the newest
    /// configuration of this node's log, which is all that it may go by.
    pub(super) fn check(&self, model: &Model, at: usize) -> Outcome {
        let raft = &self.nodes[at].raft;
        let id = raft.id();
        let in_force = model.in_force(raft.log().iter());
        if raft.configuration() != in_force {
            return Err(format!("node {id} goes by {:?}, its log says {in_force:?}", raft.configuration()));
        }
        let committed = self.ledger.committed.last().map_or(LogIndex(0), |(batch, _)| batch.last);
        let open = raft.log().iter().filter(|batch| batch.last > committed);
        let open = open.filter(|batch| model.configuration_in(batch).is_some()).count();
        if open > 1 {
            return Err(format!("node {id} has {open} configurations that are not committed"));
        }
        for other in self.nodes.iter().filter(|other| other.raft.id() != id) {
            let pairs = || raft.log().iter().zip(other.raft.log().iter());
            let alike = pairs().enumerate().filter(|(_, (one, other))| one.end() == other.end()).last();
            let alike = alike.map_or(0, |(at, _)| at + 1);
            if let Some((one, other)) = pairs().take(alike).find(|(one, other)| one != other) {
                return Err(format!("log matching: {one:?} at node {id}, {other:?} elsewhere"));
            }
        }
        Ok(())
    }

    /// Election safety and leader completeness (Raft, figure 3), and that a quorum's votes are durable.
    pub(super) fn elected(&mut self, model: &Model, at: usize, term: Term) -> Outcome {
        let node = &self.nodes[at];
        let id = node.raft.id();
        match self.ledger.leaders.iter().find(|(of, _)| *of == term) {
            Some((_, known)) if *known != id => {
                return Err(format!("election safety: {known} and {id} lead term {term}"));
            }
            Some(_) => {}
            None => {
                self.ledger.leaders.push((term, id));
                self.ledger.leaders.sort();
            }
        }
        let log = node.raft.log();
        let lost =
            |(batch, by): &&(BatchRun, Term)| *by < term && log.batch_end_at(batch.last) != Some(batch.end());
        if let Some((batch, by)) = self.ledger.committed.iter().find(lost) {
            return Err(format!(
                "leader completeness: {id} leads {term} without {batch:?}, committed in {by}"
            ));
        }
        // Whoever is in a later term by now may have voted in this one.
        let voted = |disk: &Disk| disk.term > term || (disk.term, disk.vote) == (term, Some(id));
        let voted = |voter: NodeId| voted(&self.nodes[position(voter)].disk);
        if !Quorum::of(model.in_force(log.iter())).reached(voted) {
            return Err(format!("node {id} leads {term} without the durable votes of a quorum"));
        }
        Ok(())
    }

    /// State machine safety, and that a quorum has made durable what is committed.
    pub(super) fn committed(&mut self, model: &Model, at: usize, from: LogIndex, up_to: LogIndex) -> Outcome {
        let node = Rc::clone(&self.nodes[at]);
        let (id, log) = (node.raft.id(), node.raft.log());
        for batch in log.iter().filter(|batch| batch.first > from && batch.last <= up_to) {
            let known = self.ledger.committed.iter().find(|(known, _)| known.first == batch.first);
            match known {
                Some((known, by)) if *known != batch => {
                    return Err(format!("node {id} commits {batch:?}; {known:?} was committed in {by}"));
                }
                Some(_) => {}
                None => {
                    let holds = |holder: NodeId| self.nodes[position(holder)].disk.log.contains(&batch);
                    if !Quorum::of(model.in_force(log.iter())).reached(holds) {
                        return Err(format!("node {id} commits {batch:?}, not durable at a quorum"));
                    }
                    self.ledger.committed.push((batch, node.raft.term()));
                }
            }
        }
        Ok(())
    }

    /// A change that is told to be over is.
    pub(super) fn changed(&self, at: usize, changed: &Changed) -> Outcome {
        let raft = &self.nodes[at].raft;
        if changed.index <= raft.commit() && raft.configuration().is_settled() {
            return Ok(());
        }
        Err(format!("node {} ends a change at {} that is not over", raft.id(), changed.index))
    }
}
