//! The search, and what it is asked.

use super::*;
use crate::mutants::{self, Mutant};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Instant;

/// Which of the states that are known is looked at next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// A shortest run to what is wrong; all states of one depth are in memory.
    Breadth,
    /// Some run to it; only the states beside one run are in memory.
    Depth,
}

/// What a search found.
#[derive(Debug, Default)]
struct Found {
    states: usize,
    transitions: usize,
    /// Steps of the longest run that was followed.
    depth: u32,
    /// States with more messages under way than the bound, not followed.
    cut: usize,
    /// States in which batches of more than one term are committed.
    committed_in_two_terms: usize,
    /// States in which a configuration is committed that ends a change.
    members_changed: usize,
    /// Whether nothing within the bounds is left.
    complete: bool,
}

fn explore(bounds: &Bounds, order: Order) -> Result<Found, (String, Vec<Step>)> {
    let model = Model::new(bounds);
    let mut found = Found { complete: true, ..Found::default() };
    let mut reached: HashMap<u64, (u64, Step)> = HashMap::new();
    let mut frontier = VecDeque::new();
    let nodes = (bounds.voters + bounds.learners) as u8;
    let crashes: Vec<Option<u8>> = if bounds.crash { (0..nodes).map(Some).collect() } else { vec![None] };
    for crashes in crashes {
        let mut root = World::new(&model, crashes.map(usize::from));
        let print = root.print();
        reached.insert(print, (print, Step::Begin { crashes }));
        frontier.push_back((root, print, 0));
    }
    let (begun, mut told) = (Instant::now(), 0);
    while let Some((world, print, depth)) = match order {
        Order::Breadth => frontier.pop_front(),
        Order::Depth => frontier.pop_back(),
    } {
        found.depth = found.depth.max(depth);
        for step in world.steps(&model) {
            let mut next = world.clone();
            found.transitions += 1;
            if let Err(what) = next.take(&model, step) {
                return Err((what, run_to(&reached, print, step)));
            }
            if next.under_way() > bounds.messages {
                found.cut += 1;
                continue;
            }
            let print_of_next = next.print();
            if let Entry::Vacant(entry) = reached.entry(print_of_next) {
                entry.insert((print, step));
                let committed = &next.ledger.committed;
                let terms = committed.first().zip(committed.last());
                let two = terms.is_some_and(|((first, _), (last, _))| first.term != last.term);
                found.committed_in_two_terms += usize::from(two);
                let mut changes = committed.iter().filter_map(|(batch, _)| model.configuration_in(batch));
                found.members_changed += usize::from(changes.any(Configuration::is_settled));
                frontier.push_back((next, print_of_next, depth + 1));
            }
        }
        if reached.len() >= told + 5_000_000 {
            told = reached.len();
            println!("{told} states, {} to be looked at, {:?}", frontier.len(), begun.elapsed());
        }
        if reached.len() >= bounds.states {
            found.complete = frontier.is_empty();
            break;
        }
    }
    found.states = reached.len();
    Ok(found)
}

/// The steps that lead to `print`, and then `last`.
fn run_to(reached: &HashMap<u64, (u64, Step)>, mut print: u64, last: Step) -> Vec<Step> {
    let mut run = vec![last];
    while let Some((before, step)) = reached.get(&print) {
        run.push(*step);
        if *before == print {
            break;
        }
        print = *before;
    }
    run.reverse();
    run
}

/// One of three voters is removed, the leader perhaps.
const REMOVES: Bounds = Bounds {
    voters: 3,
    learners: 0,
    terms: 2,
    proposals: 0,
    changes: 1,
    wanted: &[Wanted::Remove(1), Wanted::Remove(2), Wanted::Remove(3)],
    crash: false,
    breaks: 0,
    notices: false,
    messages: 3,
    states: 100_000_000,
};

/// The third of three nodes becomes a voter, alone or in the place of another one.
const GROWS: Bounds = Bounds {
    voters: 2,
    learners: 1,
    wanted: &[
        Wanted::Promote(3),
        Wanted::Replace { leaves: 1, comes: 3 },
        Wanted::Replace { leaves: 2, comes: 3 },
    ],
    ..REMOVES
};

/// Nobody comes or goes.
const SETTLED: Bounds = Bounds { changes: 0, wanted: &[], proposals: 1, ..REMOVES };

/// What runs with the other tests, in seconds.
const SMALL: &[(&str, &Bounds)] = &[
    ("settled", &SETTLED),
    ("settled, a crash", &Bounds { crash: true, proposals: 0, ..SETTLED }),
    ("one is removed", &REMOVES),
    ("one is promoted or replaces another", &GROWS),
];

/// Two batches, a crash and a change of the members; then what else is worth a minute. States and steps between them on
/// 2026-11-21, at about seven microseconds a step: 16,663,318 and 52,967,054 of the first, 5,920,998 and 19,873,842 of the second.
const FULL: &[(&str, &Bounds)] = &[
    ("one is promoted or replaces another", &Bounds { proposals: 2, crash: true, ..GROWS }),
    ("one is removed", &Bounds { proposals: 1, crash: true, ..REMOVES }),
    ("one is removed, three terms", &Bounds { terms: 3, ..REMOVES }),
    ("one is promoted or replaces another, three terms", &Bounds { terms: 3, ..GROWS }),
    ("two changes", &Bounds { changes: 2, ..REMOVES }),
    ("a session breaks, and all is told", &Bounds { breaks: 1, notices: true, ..GROWS }),
];

fn passes(name: &str, bounds: &Bounds, order: Order) -> Found {
    let begun = Instant::now();
    match explore(bounds, order) {
        Ok(found) => {
            println!("{name}: {bounds:?}: {found:?} in {:?}", begun.elapsed());
            found
        }
        Err((what, run)) => panic!("{name}: {what}\nafter {run:?}"),
    }
}

/// `MODEL="grows proposals=2 crash messages=4"`: bounds of one's own, in words and numbers. What is not said is as in `SETTLED`;
/// `removes` and `grows` are the changes of `REMOVES` and `GROWS`, the latter with its members.
fn bounds_of(text: &str) -> Bounds {
    let mut bounds = SETTLED;
    for word in text.split_whitespace() {
        let (name, value) = word.split_once('=').unwrap_or((word, "1"));
        let number = || value.parse().unwrap_or_else(|_| panic!("{word:?}: not a number"));
        match name {
            "voters" => bounds.voters = number(),
            "learners" => bounds.learners = number(),
            "terms" => bounds.terms = number(),
            "proposals" => bounds.proposals = number() as u8,
            "removes" => (bounds.changes, bounds.wanted) = (1, REMOVES.wanted),
            "grows" => {
                (bounds.changes, bounds.wanted, bounds.voters, bounds.learners) = (1, GROWS.wanted, 2, 1)
            }
            "changes" => bounds.changes = number() as u8,
            "crash" => bounds.crash = number() > 0,
            "breaks" => bounds.breaks = number() as u8,
            "notices" => bounds.notices = number() > 0,
            "messages" => bounds.messages = number() as usize,
            "states" => bounds.states = number() as usize,
            _ => panic!("{word:?} is no bound"),
        }
    }
    bounds
}

/// `MODEL=full` goes as far as is asked of it: two batches, a crash, a change of the members. `MODEL="removes crash messages=4"`
/// goes as far as that says.
#[test]
fn no_run_of_a_small_cluster_breaks_an_invariant() {
    match std::env::var("MODEL").as_deref() {
        Ok("full") => {
            for (name, bounds) in FULL {
                let found = passes(name, bounds, Order::Depth);
                assert!(found.complete && found.members_changed > 0, "{name}: {found:?}");
            }
        }
        Ok(text) => drop(passes("as told", &bounds_of(text), Order::Depth)),
        Err(_) => {
            for (name, bounds) in SMALL {
                let found = passes(name, bounds, Order::Breadth);
                let changes = bounds.changes == 0 || found.members_changed > 0;
                assert!(found.complete && found.committed_in_two_terms > 0 && changes, "{name}: {found:?}");
            }
        }
    }
}

/// The search would notice. (What only shows with heartbeats, or with other numbers of voters, the random runs notice.)
#[test]
fn bugs_that_are_put_back_are_found_by_the_search() {
    let crashes = Bounds { crash: true, ..SETTLED };
    let twice = Bounds { changes: 2, ..REMOVES };
    let bugs = [
        (Mutant::VoteForgotten, SETTLED),
        (Mutant::SecondVoteInTerm, SETTLED),
        (Mutant::VoteForShorterLog, SETTLED),
        (Mutant::StaleReplyTakenForNewTerm, SETTLED),
        (Mutant::CommitOlderTermByCounting, SETTLED),
        (Mutant::StaleTermAppendTaken, SETTLED),
        (Mutant::MatchFromSent, SETTLED),
        (Mutant::AckBeforeDurable, crashes),
        (Mutant::VoteReplyBeforeSave, crashes),
        (Mutant::LateCompletionCounted, crashes),
        (Mutant::ChangeBeforeOwnTermCommit, REMOVES),
        (Mutant::ConfigurationNotReverted, REMOVES),
        (Mutant::JointLeftEarly, REMOVES),
        (Mutant::RemovedLeaderKeepsLeading, REMOVES),
        (Mutant::TwoChangesAtOnce, twice),
        (Mutant::QuorumOfIncomingOnly, GROWS),
        (Mutant::LearnerAckCounted, GROWS),
    ];
    let mut unnoticed = Vec::new();
    for (mutant, bounds) in bugs {
        let begun = Instant::now();
        mutants::set(Some(mutant));
        let found = explore(&bounds, Order::Breadth);
        mutants::set(None);
        match found {
            Err((what, run)) => println!("{mutant:?}, {:?}: {what}\n  after {run:?}", begun.elapsed()),
            Ok(found) => {
                println!("{mutant:?}, {:?}: not noticed in {found:?}", begun.elapsed());
                unnoticed.push(mutant);
            }
        }
    }
    assert_eq!(unnoticed, []);
}
