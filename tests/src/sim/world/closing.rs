//! Nodes that stop in good order: between being asked and having stopped they finish what they began, and everything
//! that they had handed to the disk is there for the next process.

use super::*;

impl<C: Cluster> World<'_, C> {
    pub(super) fn shut_down(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        let Some(process) = machine.process.as_mut().filter(|_| !machine.closing) else { return };
        self.context.record(node, What::Shutdown, machine.lives, 0);
        process.shutdown();
        machine.closing = true;
        machine.asked_in_term = if machine.view.role == LEADER { machine.view.term } else { 0 };
        machine.wake_at = 0;
        machine.called = true;
    }

    /// The node has stopped as it was asked to.
    pub(super) fn closed(&mut self, node: usize) {
        self.context.cover(Mark::OrderlyStop);
        let machine = &self.machines[node];
        let led = self.history.borrow().leader_of(machine.asked_in_term) == Some(node);
        if led && machine.view.leader.is_some_and(|leader| leader != node) {
            self.context.cover(Mark::HandedOverAtStop);
        }
        self.context.record(node, What::Closed, machine.lives, 0);
        let writes = machine.disk.borrow().writes_in_flight();
        if writes > 0 {
            self.fail(|| format!("node {node} stopped in good order with {writes} writes in flight"));
        }
        self.check_left(node);
        // Its connections end as its kernel sees fit. Nothing is under way to the disk that could be torn.
        self.take_down(node, Crash::Kill);
    }

    /// A power cut right now would take nothing of the log that the node has left.
    fn check_left(&self, node: usize) {
        let machine = &self.machines[node];
        // What is left of a rotten log has to be repaired first; and a recovery costs as much as a thousand events.
        if machine.rotten || !(machine.lives + node as u64).is_multiple_of(3) {
            return;
        }
        let aside = Context::new(Trace::new(false));
        let image = machine.disk.borrow().durable_image(&aside);
        let end = machine.view.written;
        let chain = machine.process.as_ref().and_then(|process| process.chain_at(end));
        match self.cluster.recover(node, self.founders, &self.tuning, SimDisk::new(&image)) {
            Ok(log) => {
                let found = log.chains.last().map(|(_, chain)| *chain);
                let same = log.last == end && (log.chains.is_empty() || found == chain);
                if machine.view.formed && !same {
                    self.fail(|| {
                        format!(
                            "node {node} stopped in good order at index {end} and left a log up to {}",
                            log.last
                        )
                    });
                }
            }
            Err(error) => {
                self.fail(|| format!("node {node} stopped in good order and left no log: {error}"));
            }
        }
    }

    fn fail(&self, why: impl FnOnce() -> String) {
        self.history.borrow_mut().fail(why);
    }
}
