//! The configurations of a node's log: the one in force is the newest, committed or not (Raft, section 6: "a server
//! always uses the latest configuration in its log, regardless of whether the entry is committed").
//!
//! So a truncation takes back what it cuts off, and a start finds them all in the log again. Of a batch that cannot be
//! read it is only known that there is one: then nobody knows who decides, and the node stands aside.

use super::Configuration;
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// The configuration at the log's start, and those of the log, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Configurations {
    base: (LogIndex, Configuration),
    /// None where the batch cannot be read.
    later: VecDeque<(LogIndex, Option<Configuration>)>,
}

impl Configurations {
    pub(super) fn new(start: LogIndex, base: Configuration) -> Self {
        Self { base: (start, base), later: VecDeque::new() }
    }

    /// The newest that is known.
    pub(super) fn current(&self) -> &Configuration {
        self.later.iter().rev().find_map(|(_, configuration)| configuration.as_ref()).unwrap_or(&self.base.1)
    }

    /// The one before the newest, if both can be read.
    pub(super) fn previous(&self) -> Option<&Configuration> {
        let before = self.later.len().checked_sub(2).map(|at| self.later.get(at));
        match (before, self.later.is_empty()) {
            (_, true) => None,
            (None, false) => Some(&self.base.1),
            (Some(slot), false) => slot?.1.as_ref(),
        }
    }

    /// Where the newest stands, readable or not: the log's start, if the log has none.
    pub(super) fn index(&self) -> LogIndex {
        self.later.back().map_or(self.base.0, |(index, _)| *index)
    }

    /// Whether the newest cannot be read.
    pub(super) fn is_unknown(&self) -> bool {
        self.later.back().is_some_and(|(_, configuration)| configuration.is_none())
    }

    /// The one that was in force at `index`, and where it stands; none before the log's start, or where it cannot be read.
    pub(super) fn at(&self, index: LogIndex) -> Option<(LogIndex, &Configuration)> {
        let after = self.later.partition_point(|(at, _)| *at <= index);
        match after.checked_sub(1).and_then(|at| self.later.get(at)) {
            Some((at, configuration)) => configuration.as_ref().map(|configuration| (*at, configuration)),
            None => (self.base.0 <= index).then_some((self.base.0, &self.base.1)),
        }
    }

    /// Those that are known, with their places, oldest first; the one at the log's start included.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (LogIndex, &Configuration)> {
        let later = self.later.iter().filter_map(|(at, configuration)| Some((*at, configuration.as_ref()?)));
        std::iter::once((self.base.0, &self.base.1)).chain(later)
    }

    /// The places of those behind the log's start, readable or not.
    pub(super) fn indexes(&self) -> impl DoubleEndedIterator<Item = LogIndex> + '_ {
        self.later.iter().map(|(index, _)| *index)
    }

    /// A batch of the log at `index`, above all others, holds this one.
    pub(super) fn push(&mut self, index: LogIndex, configuration: Option<Configuration>) {
        self.later.push_back((index, configuration));
    }

    /// The batch at `index` can be read again. False if none was missed there.
    pub(super) fn found(&mut self, index: LogIndex, configuration: Configuration) -> bool {
        let Some((_, missed)) = self.later.iter_mut().find(|(at, found)| *at == index && found.is_none())
        else {
            return false;
        };
        *missed = Some(configuration);
        true
    }

    /// What lies after `after` is cut off. True if one of them was.
    pub(super) fn truncate_after(&mut self, after: LogIndex) -> bool {
        let kept = self.later.partition_point(|(at, _)| *at <= after);
        let cut = kept < self.later.len();
        self.later.truncate(kept);
        cut
    }

    /// The log now starts after `start`, with that configuration; what lies behind stays.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "nothing moves the start of a log before there are snapshots")
    )]
    pub(super) fn start_behind(&mut self, start: LogIndex, configuration: Configuration) {
        self.base = (start, configuration);
        self.later.retain(|(at, _)| *at > start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{Member, MemberRole};
    use ringraft_block::{Incarnation, NodeId};

    fn of(voters: u64) -> Configuration {
        let member = |id| Member {
            id: NodeId(id),
            incarnation: Incarnation(1),
            address: String::new(),
            role: MemberRole::Voter,
        };
        Configuration::new((1..=voters).map(member).collect()).expect("valid")
    }

    fn at(all: &Configurations, index: u64) -> Option<(u64, usize)> {
        all.at(LogIndex(index)).map(|(index, configuration)| (index.get(), configuration.members().len()))
    }

    #[test]
    fn the_newest_is_in_force_and_a_truncation_takes_it_back() {
        let mut all = Configurations::new(LogIndex(3), of(1));
        all.push(LogIndex(5), Some(of(2)));
        all.push(LogIndex(9), Some(of(3)));
        assert_eq!((all.current().members().len(), all.index()), (3, LogIndex(9)));
        assert_eq!(
            [2, 3, 4, 5, 8, 9, 99].map(|index| at(&all, index)),
            [None, Some((3, 1)), Some((3, 1)), Some((5, 2)), Some((5, 2)), Some((9, 3)), Some((9, 3))]
        );
        assert!(!all.truncate_after(LogIndex(9)));
        assert!(all.truncate_after(LogIndex(8)));
        assert_eq!((all.current().members().len(), all.index()), (2, LogIndex(5)));
    }

    #[test]
    fn a_purge_keeps_what_was_in_force_at_the_new_start() {
        let mut all = Configurations::new(LogIndex(0), of(1));
        all.push(LogIndex(5), Some(of(2)));
        all.push(LogIndex(9), Some(of(3)));
        let configuration = all.at(LogIndex(7)).expect("known").1.clone();
        all.start_behind(LogIndex(7), configuration);
        assert_eq!(
            [6, 7, 8, 9].map(|index| at(&all, index)),
            [None, Some((7, 2)), Some((7, 2)), Some((9, 3))]
        );
        all.truncate_after(LogIndex(7));
        assert_eq!((all.current().members().len(), all.index()), (2, LogIndex(7)));
    }

    #[test]
    fn one_that_cannot_be_read_is_unknown_until_it_is_found_or_cut_off() {
        let mut all = Configurations::new(LogIndex(0), of(1));
        all.push(LogIndex(5), None);
        assert!(all.is_unknown() && at(&all, 5).is_none());
        assert_eq!((all.current().members().len(), at(&all, 4)), (1, Some((0, 1))));
        let mut cut = all.clone();
        cut.truncate_after(LogIndex(4));
        assert!(!cut.is_unknown());
        assert!(!all.found(LogIndex(4), of(2)));
        assert!(all.found(LogIndex(5), of(2)));
        assert!(!all.is_unknown() && !all.found(LogIndex(5), of(3)));
        assert_eq!(at(&all, 5), Some((5, 2)));
    }
}
