use super::*;
use crate::sim::kv::{Operation, Register};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

type KvCall = Call<Operation, u64>;

fn call(operation: Operation, reply: Option<u64>, invoked: u64, returned: u64) -> KvCall {
    Call { operation, reply, invoked, returned }
}

fn verdict(calls: &[KvCall]) -> Verdict {
    check::<Register>(calls, PAIRS_MAX)
}

#[test]
fn a_read_that_overlaps_a_write_may_see_it_or_not() {
    for seen in [0, 7] {
        let calls =
            [call(Operation::Put { value: 7 }, Some(0), 1, 4), call(Operation::Get, Some(seen), 2, 3)];
        assert_eq!(verdict(&calls), Verdict::Linearizable);
    }
}

#[test]
fn a_read_that_begins_after_a_write_has_returned_sees_it() {
    let calls = [call(Operation::Put { value: 7 }, Some(0), 1, 2), call(Operation::Get, Some(0), 3, 4)];
    let Verdict::Impossible(why) = verdict(&calls) else { panic!("a stale read passed") };
    assert!(why.contains("Get answered 0"), "{why}");
}

#[test]
fn two_reads_in_a_row_do_not_go_back() {
    let calls = [
        call(Operation::Put { value: 7 }, Some(0), 1, 10),
        call(Operation::Get, Some(7), 2, 3),
        call(Operation::Get, Some(0), 4, 5),
    ];
    assert!(matches!(verdict(&calls), Verdict::Impossible(_)));
}

#[test]
fn a_call_of_unknown_outcome_may_take_effect_late_or_never_but_not_twice() {
    let unknown = call(Operation::Append { item: 3 }, None, 1, 0);
    let once = crate::sim::kv::appended(0, 3);
    let twice = crate::sim::kv::appended(once, 3);
    let read = |seen, at| call(Operation::Get, Some(seen), at, at + 1);
    assert_eq!(verdict(&[unknown.clone(), read(0, 2), read(once, 4)]), Verdict::Linearizable);
    assert_eq!(verdict(&[unknown.clone(), read(0, 2), read(0, 4)]), Verdict::Linearizable);
    assert!(matches!(verdict(&[unknown.clone(), read(once, 2), read(0, 4)]), Verdict::Impossible(_)));
    assert!(matches!(verdict(&[unknown, read(twice, 2)]), Verdict::Impossible(_)));
}

#[test]
fn memory_is_bounded() {
    // All overlap and none fits: every subset of the appends is another pair.
    let mut calls: Vec<KvCall> =
        (0..30).map(|item| call(Operation::Append { item }, None, item + 1, 0)).collect();
    calls.push(call(Operation::Get, Some(12_345), 100, 101));
    assert_eq!(check::<Register>(&calls, 10_000), Verdict::Undecided);
}

#[test]
fn a_long_history_of_one_client_takes_one_pair_a_call() {
    let (mut value, mut calls) = (0, Vec::new());
    for at in 0..20_000_u64 {
        value = crate::sim::kv::appended(value, at);
        calls.push(call(Operation::Append { item: at }, Some(value), 2 * at, 2 * at + 1));
    }
    assert_eq!(check::<Register>(&calls, 20_000), Verdict::Linearizable);
}

/// Their subsets are tried where no answered call fits, not at every step.
#[test]
fn unknown_calls_that_never_took_effect_cost_nothing() {
    let mut calls: Vec<KvCall> =
        (0..30).map(|item| call(Operation::Append { item }, None, item + 1, 0)).collect();
    let mut value = 0;
    for at in 100..300 {
        value = crate::sim::kv::appended(value, at);
        calls.push(call(Operation::Append { item: at }, Some(value), 2 * at, 2 * at + 1));
    }
    assert_eq!(check::<Register>(&calls, 200), Verdict::Linearizable);
}

/// The same service for stateright's tester, which knows nothing of ours.
#[derive(Clone)]
struct Reference(u64);

impl SequentialSpec for Reference {
    type Op = Operation;
    type Ret = u64;

    fn invoke(&mut self, operation: &Operation) -> u64 {
        let (after, reply) = operation.apply(self.0);
        self.0 = after;
        reply
    }
}

/// A history that was made by really running the calls in some order, or spoilt in one reply.
fn random_history(rng: &mut Rng, spoil: bool) -> Vec<(usize, KvCall)> {
    let clients = 1 + rng.index(4);
    let mut clock = 0;
    let mut value = 0;
    // The call of each client: what, when invoked, and its reply once it has taken effect.
    let mut open: Vec<Option<(Operation, u64, Option<u64>)>> = vec![None; clients];
    let mut history = Vec::new();
    for _ in 0..rng.between(4, 40) {
        clock += 1;
        let client = rng.index(clients);
        match open[client].take() {
            None => {
                let small = |rng: &mut Rng| rng.below(3);
                let operation = match rng.below(4) {
                    0 => Operation::Get,
                    1 => Operation::Put { value: small(rng) },
                    2 => Operation::Cas { expected: small(rng), new: small(rng) },
                    _ => Operation::Append { item: small(rng) },
                };
                open[client] = Some((operation, clock, None));
            }
            Some((operation, invoked, None)) => {
                let (after, reply) = operation.apply(value);
                value = after;
                open[client] = Some((operation, invoked, Some(reply)));
            }
            Some((operation, invoked, Some(reply))) => {
                history.push((client, call(operation, Some(reply), invoked, clock)));
            }
        }
    }
    for (client, open) in open.into_iter().enumerate() {
        if let Some((operation, invoked, _)) = open {
            history.push((client, call(operation, None, invoked, 0)));
        }
    }
    if spoil && !history.is_empty() {
        let at = rng.index(history.len());
        if let Some(reply) = &mut history[at].1.reply {
            *reply = rng.below(3);
        }
    }
    history
}

fn reference_says(history: &[(usize, KvCall)]) -> bool {
    let mut order: Vec<(u64, bool, usize)> = Vec::new();
    for (at, (_, call)) in history.iter().enumerate() {
        order.push((call.invoked, false, at));
        if call.reply.is_some() {
            order.push((call.returned, true, at));
        }
    }
    order.sort_unstable();
    let mut tester = LinearizabilityTester::new(Reference(0));
    for (_, is_return, at) in order {
        let (client, call) = &history[at];
        if is_return {
            tester.on_return(*client, call.reply.expect("it returned")).expect("an open call");
        } else {
            tester.on_invoke(*client, call.operation).expect("one call at a time");
        }
    }
    tester.is_consistent()
}

#[test]
fn random_histories_are_judged_as_stateright_judges_them() {
    let mut rng = Rng::new(2_024);
    let mut judged = [0_u32; 2];
    for number in 0..6_000 {
        let history = random_history(&mut rng, number % 2 == 1);
        let calls: Vec<KvCall> = history.iter().map(|(_, call)| call.clone()).collect();
        let expected = reference_says(&history);
        let verdict = verdict(&calls);
        assert_eq!(verdict == Verdict::Linearizable, expected, "history {number}: {verdict:?}\n{history:#?}");
        judged[usize::from(expected)] += 1;
    }
    assert!(judged.iter().all(|count| *count > 1_000), "of both kinds: {judged:?}");
}
