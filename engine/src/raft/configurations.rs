//! The configurations of a node's log: the one in force is the newest, committed or not (Raft, section 6: "a server
//! always uses the latest configuration in its log, regardless of whether the entry is committed").
//!
//! So a truncation takes back what it cuts off, and a start finds them all in the log again. Of a batch that cannot be
//! read it is only known that there is one: then nobody knows who decides, and the node stands aside.

use super::Configuration;
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// The configuration as of the log's start, or of a commit index known at the start, with its place, which may lie before
/// either, and those behind it in the log, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Configurations {
    base: (LogIndex, Configuration),
    /// That is an older one: what was in force there cannot be read.
    guessed: bool,
    /// None where the batch cannot be read.
    later: VecDeque<(LogIndex, Option<Configuration>)>,
}

impl Configurations {
    /// `base` stands at `index` of the log.
    pub(super) fn new(index: LogIndex, base: Configuration) -> Self {
        Self { base: (index, base), guessed: false, later: VecDeque::new() }
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
            (None, false) => (!self.guessed).then_some(&self.base.1),
            (Some(slot), false) => slot?.1.as_ref(),
        }
    }

    /// Where the newest stands, readable or not.
    pub(super) fn index(&self) -> LogIndex {
        self.later.back().map_or(self.base.0, |(index, _)| *index)
    }

    /// The first one was read nowhere: it stands for one that cannot be read until a snapshot tells what was in force.
    pub(super) fn guess(&mut self) {
        self.guessed = true;
    }

    /// Whether the newest is only a guess, or cannot be read.
    pub(super) fn is_uncertain(&self) -> bool {
        self.is_unknown() || (self.guessed && self.later.is_empty())
    }

    /// Whether the newest cannot be read.
    pub(super) fn is_unknown(&self) -> bool {
        self.later.back().is_some_and(|(_, configuration)| configuration.is_none())
    }

    /// The one that was in force at `index`, and where it stands; none before the first that is known, or where it cannot be
    /// read.
    pub(super) fn at(&self, index: LogIndex) -> Option<(LogIndex, &Configuration)> {
        let after = self.later.partition_point(|(at, _)| *at <= index);
        match after.checked_sub(1).and_then(|at| self.later.get(at)) {
            Some((at, configuration)) => configuration.as_ref().map(|configuration| (*at, configuration)),
            None => (self.base.0 <= index && !self.guessed).then_some((self.base.0, &self.base.1)),
        }
    }

    /// Those that are known, with their places, oldest first; the first one included.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (LogIndex, &Configuration)> {
        let later = self.later.iter().filter_map(|(at, configuration)| Some((*at, configuration.as_ref()?)));
        std::iter::once((self.base.0, &self.base.1)).chain(later)
    }

    /// Whether all of them are known, and `holds` of each.
    pub(super) fn all(&self, holds: impl Fn(&Configuration) -> bool) -> bool {
        let later = |configuration: &Option<Configuration>| configuration.as_ref().is_some_and(&holds);
        !self.guessed
            && holds(&self.base.1)
            && self.later.iter().all(|(_, configuration)| later(configuration))
    }

    /// The places of those behind the first, readable or not.
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

    /// A snapshot up to `last` says what was in force there, and that it stands at `index`. True if that could not be read.
    pub(super) fn known_at(&mut self, last: LogIndex, index: LogIndex, configuration: Configuration) -> bool {
        let upto = self.later.partition_point(|(at, _)| *at <= last);
        match upto.checked_sub(1).and_then(|at| self.later.get_mut(at)) {
            Some((at, missed @ None)) if *at == index => *missed = Some(configuration),
            None if self.guessed && self.base.0 <= last => {
                (self.base, self.guessed) = ((index, configuration), false);
            }
            _ => return false,
        }
        true
    }

    /// The log now starts after `start`, which is applied and hence readable: what was in force there stays known, with its
    /// place, and what lies behind.
    pub(super) fn start_behind(&mut self, start: LogIndex) {
        let behind = self.later.partition_point(|(at, _)| *at <= start);
        for (index, configuration) in self.later.drain(..behind) {
            if let Some(configuration) = configuration {
                (self.base, self.guessed) = ((index, configuration), false);
            }
        }
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
        all.start_behind(LogIndex(4));
        assert_eq!([0, 4, 5].map(|index| at(&all, index)), [Some((0, 1)), Some((0, 1)), Some((5, 2))]);
        all.start_behind(LogIndex(7));
        assert_eq!(
            [4, 7, 8, 9].map(|index| at(&all, index)),
            [None, Some((5, 2)), Some((5, 2)), Some((9, 3))]
        );
        all.truncate_after(LogIndex(7));
        assert_eq!((all.current().members().len(), all.index()), (2, LogIndex(5)));
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
        all.push(LogIndex(6), None);
        all.push(LogIndex(8), None);
        assert!(!all.known_at(LogIndex(7), LogIndex(5), of(3)), "the log has another one there");
        assert!(all.known_at(LogIndex(7), LogIndex(6), of(3)));
        assert!(!all.known_at(LogIndex(7), LogIndex(6), of(1)), "it is known by now");
        assert_eq!([6, 7, 8].map(|index| at(&all, index)), [Some((6, 3)), Some((6, 3)), None]);
        assert!(all.known_at(LogIndex(9), LogIndex(8), of(4)));
        assert_eq!((at(&all, 8), at(&all, 6)), (Some((8, 4)), Some((6, 3))));
    }

    #[test]
    fn a_guess_is_replaced_by_what_a_snapshot_tells() {
        let mut all = Configurations::new(LogIndex(3), of(1));
        all.guess();
        assert!(all.is_uncertain() && at(&all, 4).is_none());
        all.push(LogIndex(6), Some(of(3)));
        assert!(!all.is_uncertain() && at(&all, 5).is_none() && all.previous().is_none());
        assert!(all.known_at(LogIndex(5), LogIndex(1), of(2)));
        assert_eq!(
            [0, 1, 5, 6].map(|index| at(&all, index)),
            [None, Some((1, 2)), Some((1, 2)), Some((6, 3))]
        );
        assert!(!all.known_at(LogIndex(5), LogIndex(1), of(4)));
    }
}
