use super::testing::{Bench, Errors, IN_ENVELOPE, IN_IMAGE, PATIENCE_NS, Said, TERM};
use crate::raft::{Configuration, LogId, Member, MemberRole};
use crate::wire::{FetchMessage, Fetched};
use ringraft_block::{AlignedBuf, Block, Incarnation, LogIndex, NodeId};
use ringraft_wal::format::{BatchInfo, Chain};
use std::collections::{BTreeMap, BTreeSet};

const MILLISECOND_NS: u64 = 1_000_000;

/// Batches 1 to `count`, of which the first is committed, on the disk only.
fn with_batches(count: u64) -> Bench {
    let mut bench = Bench::new();
    bench.append(count, 1);
    bench.forget_recent();
    bench
}

fn waiting_for(bench: &Bench) -> Vec<u64> {
    let raft = bench.driver.raft().expect("it runs");
    bench.driver.damage_status(raft).waiting_for.iter().map(|id| id.get()).collect()
}

fn damaged(bench: &Bench) -> Vec<u64> {
    bench.driver.wal.damaged_firsts().map(LogIndex::get).collect()
}

fn announced(info: &BatchInfo) -> Fetched {
    Fetched::Batch { end: LogId { term: info.term, index: info.last }, chain: info.chain }
}

/// What another member would send for a question about a batch of this log.
fn copy_of(bench: &mut Bench, question: &FetchMessage) -> (Block<AlignedBuf>, BatchInfo) {
    bench.batch(TERM.get(), question.first.get(), question.previous_chain, 700)
}

fn give(bench: &mut Bench, from: u64, question: &FetchMessage) {
    let (block, info) = copy_of(bench, question);
    let image = Some((block, info.image_bytes as usize));
    bench.try_answer(from, question.token, announced(&info), image).expect("it goes on");
    bench.settle();
}

#[test]
fn whose_answers_leave_in_doubt_what_is_missing_is_told_until_it_is_settled() {
    let mut bench = with_batches(5);
    bench.lose_leader();
    bench.damage(3);
    bench.settle();
    let mut told = BTreeSet::new();
    for _ in 0..400 {
        for (to, question) in bench.questions() {
            bench.answer(to, question.token, Fetched::Unclear);
        }
        told.insert(waiting_for(&bench));
        bench.wait(10 * MILLISECOND_NS);
    }
    assert_eq!(told, [vec![], vec![2, 3]].into(), "not at once, and then all the time");
    assert_eq!(waiting_for(&bench), [2, 3]);
    let (to, question) = loop {
        bench.wait(10 * MILLISECOND_NS);
        if let Some(asked) = bench.questions().pop() {
            break asked;
        }
    };
    give(&mut bench, to, &question);
    assert_eq!((damaged(&bench), waiting_for(&bench)), (vec![], vec![]));
}

/// The log was cut before a batch that nobody knows, and one behind it was kept: any member that claims to have the kept one
/// is believed about the missing one, as far as its bytes go.
#[test]
fn an_image_of_an_earlier_term_than_what_it_follows_closes_the_link_and_does_not_stop_the_node() {
    let bench = with_batches(5);
    bench.memory.borrow_mut().rot(4, IN_ENVELOPE);
    let mut bench = bench.restart();
    let end = |bench: &Bench| bench.driver.raft().expect("it runs").last().index.get();
    assert_eq!(end(&bench), 3, "cut before the damage");
    bench.wait(2 * PATIENCE_NS);
    let (to, question) = bench.questions().pop().expect("it asks for what it lacks");
    assert_eq!(question.first, LogIndex(4));
    let (block, info) = bench.batch(TERM.get() - 1, 4, question.previous_chain, 700);
    let image = Some((block, info.image_bytes as usize));
    let errors = Errors::default();
    tracing::subscriber::with_default(errors.clone(), || {
        bench.try_answer(to, question.token, announced(&info), image).expect("the node goes on");
    });
    bench.settle();
    assert_eq!(end(&bench), 3, "nothing was taken");
    let told = errors.told();
    assert!(told.contains("peer disconnected") && told.contains("earlier term"), "{told}");

    // The real one is.
    bench.wait(2 * PATIENCE_NS);
    let (to, question) = bench.questions().pop().expect("it asks again");
    give(&mut bench, to, &question);
    assert_eq!(end(&bench), 5, "with what was kept");
}

/// A connection went on over which a flipped bit had come, since nobody looked at what was not needed any more.
#[test]
fn an_answer_that_came_too_late_and_was_garbled_on_its_way_closes_the_link() {
    let mut bench = with_batches(5);
    let previous = bench.driver.chain_at(LogIndex(2)).expect("a batch end");
    for (garbled, what) in [(false, "a whole one is passed over"), (true, "a garbled one is refused")] {
        let (mut block, info) = bench.batch(TERM.get(), 3, previous, 700);
        block[IN_IMAGE] ^= if garbled { 4 } else { 0 };
        let errors = Errors::default();
        tracing::subscriber::with_default(errors.clone(), || {
            let image = Some((block, info.image_bytes as usize));
            bench.try_answer(2, 4_711, announced(&info), image).expect("the node goes on");
        });
        let told = errors.told();
        assert_eq!(told.contains("peer disconnected") && told.contains("damaged"), garbled, "{what}: {told}");
    }
}

#[test]
fn what_rots_on_the_disk_and_is_still_in_memory_is_handed_out_and_mended_without_the_others() {
    let mut bench = Bench::new();
    bench.append(5, 1);
    bench.memory.borrow_mut().is_full = true;
    bench.damage(3);
    bench.settle();
    assert_eq!(damaged(&bench), [3], "there is no space for its segment's copy");
    bench.ask(2, 70, 3);
    let said = bench.said();
    let [(2, Said::Answer(reply, Some(batch)))] = &said[..] else { panic!("not handed out") };
    assert_eq!((reply.token, batch.first, reply.outcome), (70, LogIndex(3), announced(batch)));

    bench.memory.borrow_mut().is_full = false;
    bench.driver.wal.retry_space();
    bench.settle();
    assert_eq!(damaged(&bench), [] as [u64; 0]);
    assert!(bench.questions().is_empty(), "nobody is asked");
}

/// Two questions that the answers do not settle: the answer to one was taken as the moment to ask the other anew, and so on, as
/// fast as the network carried it.
#[test]
fn what_the_answers_do_not_settle_is_asked_again_at_a_bounded_rate() {
    let mut bench = with_batches(8);
    bench.lose_leader();
    for first in 3..=6 {
        bench.damage(first);
    }
    let mut asked: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for _ in 0..10_000 {
        bench.wait(MILLISECOND_NS);
        for (to, question) in bench.questions() {
            *asked.entry((to, question.first.get())).or_default() += 1;
            bench.answer(to, question.token, Fetched::Unclear);
        }
    }
    // Ten seconds: four rests in each, and two rounds between two of them.
    assert_eq!(asked.len(), 8, "both members about all four: {asked:?}");
    for (what, count) in asked {
        assert!((20..=80).contains(&count), "{what:?} {count} times");
    }
}

#[test]
fn a_batch_that_a_member_is_too_busy_to_give_keeps_no_other_from_being_asked_for() {
    let mut bench = with_batches(6);
    bench.disconnect(3);
    for first in 2..=5 {
        bench.damage(first);
    }
    for _ in 0..200 {
        bench.wait(MILLISECOND_NS);
        for (to, question) in bench.questions() {
            match question.first.get() {
                2 => bench.answer(to, question.token, Fetched::Busy),
                _ => give(&mut bench, to, &question),
            }
        }
    }
    assert_eq!(damaged(&bench), [2]);
}

#[test]
fn more_batches_than_are_searched_for_at_a_time_all_have_their_turn_when_the_first_ones_get_nowhere() {
    let count = 2 * super::SEARCHES_MAX as u64 + 1;
    let mut bench = with_batches(count + 1);
    bench.disconnect(3);
    for first in 2..=count + 1 {
        bench.damage(first);
    }
    let (mut asked, mut named) = (BTreeSet::new(), Vec::new());
    for _ in 0..2_000 {
        bench.wait(10 * MILLISECOND_NS);
        assert!(bench.driver.repair.searches.len() <= super::SEARCHES_MAX);
        for (to, question) in bench.questions() {
            asked.insert(question.first.get());
            // Whoever has them is not there.
            bench.answer(to, question.token, Fetched::None);
        }
        named.push(waiting_for(&bench));
    }
    assert_eq!(asked, (2..=count + 1).collect());
    named.dedup();
    assert_eq!(named, [vec![], vec![3]], "also when others have just got their turn");
}

#[test]
fn one_member_that_asks_and_asks_makes_this_node_hold_and_read_one_batch_for_it() {
    let mut bench = Bench::new();
    bench.append(30, 1);
    for first in 2..=20 {
        bench.ask(2, first, first);
    }
    let said = bench.said();
    let [(2, Said::Answer(reply, Some(batch)))] = &said[..] else { panic!("{} answers", said.len()) };
    assert_eq!((reply.token, batch.first), (20, LogIndex(20)), "the last one; the others were given up");

    bench.forget_recent();
    bench.memory.borrow_mut().bytes_read = 0;
    for first in 2..=20 {
        bench.ask(2, first, first);
    }
    let busy = bench.said();
    let [(2, Said::Answer(reply, None))] = &busy[..] else { panic!("{} answers", busy.len()) };
    assert_eq!((reply.token, reply.outcome), (20, Fetched::Busy));
    bench.settle();
    let read = bench.said();
    let [(2, Said::Answer(reply, Some(batch)))] = &read[..] else { panic!("{} answers", read.len()) };
    assert_eq!((reply.token, batch.first), (2, LogIndex(2)));
    assert_eq!(bench.memory.borrow().bytes_read, batch.slot_bytes());
}

#[test]
fn what_was_being_read_for_a_session_that_is_over_answers_nobody_in_the_next() {
    let mut bench = with_batches(5);
    bench.memory.borrow_mut().holds_reads = true;
    bench.ask(2, 1, 3);
    bench.settle();
    bench.disconnect(2);
    bench.connect(2);
    bench.memory.borrow_mut().holds_reads = false;
    bench.settle();
    assert!(bench.said().is_empty());
    // A new process counts its questions anew.
    bench.ask(2, 1, 4);
    bench.settle();
    let said = bench.said();
    let [(2, Said::Answer(reply, Some(batch)))] = &said[..] else { panic!("{} answers", said.len()) };
    assert_eq!((reply.token, batch.first), (1, LogIndex(4)));
}

#[test]
fn an_answer_of_a_session_that_is_over_is_void() {
    let mut bench = with_batches(5);
    bench.disconnect(3);
    bench.damage(3);
    bench.settle();
    let (to, question) = bench.questions().pop().expect("it asks");
    bench.disconnect(to);
    bench.connect(to);
    bench.settle();
    assert_eq!(bench.questions().len(), 1, "asked again at once");
    give(&mut bench, to, &question);
    assert_eq!(damaged(&bench), [3]);
    assert!(bench.driver.repair.asked.contains_key(&NodeId(to)), "the new question stands");
    assert_ne!(question.previous_chain, Chain::default());
}

/// Whoever lacks a change of the voters asks those of before it: how far they reach says nothing about what the others committed.
#[test]
fn how_far_a_member_reaches_proves_nothing_to_one_that_lacks_a_change_of_the_voters() {
    for (role, expected) in [(MemberRole::Voter, [2, 3, 4].as_slice()), (MemberRole::Learner, &[])] {
        let mut bench = with_batches(3);
        let members = bench.driver.raft().expect("it runs").configuration().members().to_vec();
        let address = "127.0.0.1:7004".to_owned();
        let added = Member { id: NodeId(4), incarnation: Incarnation(4), address, role };
        let members = members.into_iter().chain([added]).collect();
        bench.append_configuration(&Configuration::new(members).expect("valid"));
        bench.append(2, 4);
        bench.forget_recent();
        let mut in_doubt = Vec::new();
        for first in 2..=6 {
            bench.ask(2, first, first);
            bench.settle();
            let said = bench.said();
            let [(2, Said::Answer(reply, Some(_)))] = &said[..] else { panic!("{} answers", said.len()) };
            in_doubt.extend(reply.reach.in_doubt.then_some(first));
        }
        assert_eq!(in_doubt, expected, "{role:?}");
    }
}
