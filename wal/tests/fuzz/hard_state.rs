//! The hard state: every byte up to the length that it names is covered; the padding of its last block is not, and is not read.

use crate::alloc::allocated;
use crate::seal::{field, number};
use crate::sweep::{corpus, sweep, sweep_bytes};
use bolero::TypeGenerator;
use ringraft_block::{BLOCK_BYTES, ClusterId, GroupId, Incarnation, LogIndex, NodeId, Term, crc32c};
use ringraft_wal::format::{
    CONFIGURATION_BYTES_MAX, Chain, Claim, Cut, HARD_STATE_FILE_BYTES, HardState, LogStart, read_hard_state,
    write_hard_state,
};

#[derive(Debug, TypeGenerator)]
struct Parts {
    cluster: u128,
    node: u64,
    incarnation: u128,
    boot: u64,
    sequence: u64,
    group: u32,
    term: u64,
    vote: u64,
    epoch: u64,
    cut: (u64, u32, u64),
    generation: u32,
    start: (u64, u64, [u8; 16]),
    witness: u64,
    claim: Option<(u64, u64, bool)>,
    configuration_bytes: u16,
    configuration: u8,
    altered_at: u16,
    altered_by: u8,
}

impl Parts {
    fn claim(&self) -> Option<Claim> {
        let claim = self.claim.filter(|_| self.epoch > 0);
        claim.map(|(term, last, certain)| Claim { term: Term(term), last: LogIndex(last), certain })
    }

    fn state(&self) -> HardState {
        let (cut_index, cut_generation, offset) = self.cut;
        let (start_index, start_term, start_chain) = self.start;
        HardState {
            cluster: ClusterId(self.cluster),
            node: NodeId(self.node),
            incarnation: Incarnation(self.incarnation),
            boot: self.boot,
            sequence: self.sequence,
            group: GroupId(self.group),
            term: Term(self.term),
            vote: (self.vote != 0).then_some(NodeId(self.vote)),
            epoch: self.epoch,
            cut: Cut { index: LogIndex(cut_index), generation: cut_generation.min(self.generation), offset },
            generation: self.generation,
            start: LogStart {
                index: LogIndex(start_index),
                term: Term(start_term),
                chain: Chain(start_chain),
            },
            start_generation: self.generation >> 1,
            witness: LogIndex(self.witness),
            claim: self.claim(),
            claim_epoch: self.claim().map_or(0, |_| self.epoch),
            claim_cut: LogIndex(self.claim().map_or(0, |_| cut_index >> 2)),
            claim_may_settle: self.claim().is_some_and(|claim| !claim.certain) && self.boot.is_multiple_of(2),
            configuration: vec![
                self.configuration;
                usize::from(self.configuration_bytes) % (CONFIGURATION_BYTES_MAX + 1)
            ],
        }
    }
}

fn written(state: &HardState) -> Vec<u8> {
    let mut bytes = vec![0xa5; HARD_STATE_FILE_BYTES];
    let count = write_hard_state(&mut bytes, state);
    assert!(count.is_multiple_of(BLOCK_BYTES));
    bytes.truncate(count);
    bytes
}

fn total(bytes: &[u8]) -> usize {
    number(bytes, field("hard state file header", "total_bytes")) as usize
}

fn reseal(bytes: &mut [u8]) {
    let crc = field("hard state file header", "crc");
    if bytes.len() < crc.end {
        return;
    }
    let total = total(bytes).min(bytes.len());
    if let Some(covered) = bytes.get_mut(..total)
        && covered.len() >= crc.end
    {
        covered[crc.clone()].fill(0);
        let sum = crc32c(covered);
        covered[crc].copy_from_slice(&sum.to_le_bytes());
    }
}

fn round_trip(parts: &Parts) {
    let state = parts.state();
    let mut bytes = written(&state);
    assert_eq!(read_hard_state(&bytes), Ok(state.clone()));
    let mut again = bytes.clone();
    reseal(&mut again);
    assert_eq!(again, bytes, "the checksum covers the bytes up to the total");
    let total = total(&bytes);
    assert!(read_hard_state(&bytes[..total - 1]).is_err(), "a part of it is refused");
    if parts.altered_by != 0 {
        let at = usize::from(parts.altered_at) % bytes.len();
        bytes[at] ^= parts.altered_by;
        let read = read_hard_state(&bytes);
        if at < total {
            read.expect_err("an altered byte is noticed");
        } else {
            // Padding, which the header's length excludes.
            assert_eq!(read, Ok(state));
        }
    }
}

/// One way to write each value, and no more memory than the longest configuration.
fn canonical(bytes: &[u8]) {
    let (read, memory) = allocated(|| read_hard_state(bytes));
    assert!(memory.bytes <= CONFIGURATION_BYTES_MAX.min(bytes.len()), "{memory:?} for {} bytes", bytes.len());
    if let Ok(state) = read {
        let again = written(&state);
        let total = total(bytes);
        assert_eq!(again[..total], bytes[..total]);
        assert!(again[total..].iter().all(|byte| *byte == 0));
    }
}

fn valid() -> [Vec<u8>; 2] {
    let state = HardState {
        cluster: ClusterId(0xc1),
        node: NodeId(3),
        incarnation: Incarnation(0x99),
        boot: 3,
        sequence: 21,
        group: GroupId(0),
        term: Term(5),
        vote: Some(NodeId(2)),
        epoch: 4,
        cut: Cut { index: LogIndex(99), generation: 6, offset: 532_480 },
        generation: 7,
        start: LogStart { index: LogIndex(50), term: Term(2), chain: Chain([0x44; 16]) },
        start_generation: 5,
        witness: LogIndex(99),
        claim: Some(Claim { term: Term(5), last: LogIndex(120), certain: true }),
        claim_epoch: 4,
        claim_cut: LogIndex(99),
        claim_may_settle: false,
        configuration: b"three members".to_vec(),
    };
    let mut short = written(&state);
    short.truncate(total(&short));
    let unformed = HardState {
        vote: None,
        claim: None,
        claim_epoch: 0,
        claim_cut: LogIndex(0),
        claim_may_settle: false,
        configuration: Vec::new(),
        ..state
    };
    [short, written(&unformed)]
}

#[test]
fn what_is_written_is_read_and_an_altered_byte_is_refused() {
    bolero::check!().with_iterations(0).with_type::<Parts>().for_each(round_trip);
    sweep(1000, round_trip);
}

#[test]
fn what_is_read_has_one_encoding() {
    let [formed, unformed] = valid();
    let mut huge = unformed.clone();
    huge[field("hard state file header", "total_bytes")].fill(0xff);
    let mut huge_configuration = formed.clone();
    let at = 128 + field("hard state group record", "configuration_bytes").start;
    huge_configuration[at..at + 4].fill(0xff);
    reseal(&mut huge_configuration);
    let files = [
        ("formed".to_owned(), formed),
        ("unformed".to_owned(), unformed),
        ("claims-4-gib".to_owned(), huge),
        ("claims-a-configuration-of-4-gib".to_owned(), huge_configuration),
    ];
    corpus("hard_state__what_is_read_has_one_encoding", &files);
    bolero::check!().with_iterations(0).for_each(canonical);
    for (_, bytes) in &files[2..] {
        assert!(read_hard_state(bytes).is_err());
    }
    sweep_bytes(20_000, &valid(), reseal, canonical);
}

#[test]
fn every_altered_byte_of_a_hard_state_is_refused() {
    let [valid, _] = valid();
    for at in 0..valid.len() {
        for by in 1..=u8::MAX {
            let mut bytes = valid.clone();
            bytes[at] ^= by;
            assert!(read_hard_state(&bytes).is_err(), "byte {at} altered by {by:#x}");
        }
    }
}
