//! Who the members are, by the logs of all nodes.

use super::History;
use crate::sim::node::Members;

impl History {
    /// A node whose log is committed up to `commit` goes by these members. A log has one history of them: what is committed at
    /// their place, and what is not between that and the commit index, is so for all.
    pub(in crate::sim) fn goes_by(&mut self, node: usize, members: Members, commit: u64) {
        let index = members.index;
        let newer = self.configurations.range(index + 1..).next().filter(|(newer, _)| **newer <= commit);
        if let Some((&newer, _)) = newer {
            return self.fail(|| {
                format!(
                    "node {node} has committed up to {commit} and goes by the members of index {index}, not of {newer}"
                )
            });
        }
        // What the cluster was formed with, whoever joins does not know before it is told.
        if index == 0 || index > commit {
            return;
        }
        let before = self.configurations.range(..index).next_back();
        if let Some((&older, _)) = before.filter(|(_, (_, clear))| *clear >= index) {
            return self.fail(|| {
                format!("node {node} goes by the members of index {index}, which holds none: those of {older} are in force")
            });
        }
        let (known, clear) = self.configurations.entry(index).or_insert((members, commit));
        *clear = commit.max(*clear);
        if *known != members {
            let known = *known;
            self.fail(|| {
                format!("node {node} goes by {members:x?}, and at that index of the log another node has {known:x?}")
            });
        }
    }

    /// The end of what is committed so far.
    pub(in crate::sim) fn committed_end(&self) -> u64 {
        self.known.committed
    }

    /// The last of what had been committed in terms up to `term`, up to an index that was committed.
    pub(in crate::sim) fn committed_up_to(&self, index: u64, term: u64) -> Option<(u64, [u8; 16])> {
        let mut ends = self.committed.range(..=index).rev();
        ends.find(|(_, end)| end.term <= term).map(|(index, end)| (*index, end.chain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::context::Context;
    use crate::sim::trace::Trace;

    /// What is said of nodes that go by the members of an index, of so many voters, with so much committed.
    fn judged(nodes: &[(u64, u32, u64)]) -> Option<String> {
        let history = History::new(&Context::new(Trace::new(false)), 1);
        for (node, (index, voters, commit)) in nodes.iter().enumerate() {
            let members =
                Members { index: *index, incoming: (1 << voters) - 1, settled: true, ..Members::default() };
            history.borrow_mut().goes_by(node, members, *commit);
        }
        let history = history.borrow();
        history.failure().map(str::to_owned)
    }

    #[test]
    fn all_nodes_go_by_the_members_that_the_committed_log_holds() {
        assert_eq!(judged(&[(0, 3, 3), (4, 3, 9), (4, 3, 5)]), None);
        assert_eq!(
            judged(&[(4, 3, 9), (4, 3, 12), (20, 2, 12), (13, 2, 15)]),
            None,
            "one that is not committed is nobody's"
        );
        let told = |nodes: &[(u64, u32, u64)]| judged(nodes).unwrap_or_default();
        assert!(told(&[(4, 3, 9), (0, 3, 5)]).contains("not of 4"), "it was passed by");
        assert!(told(&[(4, 3, 9), (7, 2, 7)]).contains("holds none"), "it was cut off");
        assert!(told(&[(4, 3, 9), (4, 2, 9)]).contains("at that index"), "it is another one");
    }
}
