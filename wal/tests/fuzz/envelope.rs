//! The envelope: 512 bytes, all of them covered by its checksum, so no altered byte passes.

use crate::alloc::{Allocated, allocated};
use crate::seal::reseal_struct;
use crate::sweep::{corpus, sweep, sweep_bytes};
use bolero::TypeGenerator;
use ringraft_block::{ClusterId, GroupId, LogIndex, Term};
use ringraft_wal::format::{
    Chain, ENVELOPE_BYTES, Envelope, IMAGE_BYTES_MAX, IMAGE_BYTES_MIN, read_envelope, write_envelope,
};

#[derive(Debug, TypeGenerator)]
struct Parts {
    cluster: u128,
    nonce: u64,
    generation: u32,
    group: u32,
    offset: u64,
    epoch: u64,
    boot: u64,
    durable_through: u64,
    term: u64,
    first: u64,
    more: u16,
    chain: [u8; 16],
    image_bytes: u32,
    altered_at: u16,
    altered_by: u8,
}

impl Parts {
    fn envelope(&self) -> Envelope {
        let first = self.first.clamp(1, u64::MAX - u64::from(self.more));
        let lengths = (IMAGE_BYTES_MAX - IMAGE_BYTES_MIN + 1) as u32;
        Envelope {
            cluster: ClusterId(self.cluster),
            nonce: self.nonce,
            generation: self.generation,
            group: GroupId(self.group),
            offset: self.offset,
            epoch: self.epoch,
            boot: self.boot,
            durable_through: LogIndex(self.durable_through % first),
            term: Term(self.term),
            first: LogIndex(first),
            last: LogIndex(first + u64::from(self.more)),
            chain: Chain(self.chain),
            image_bytes: IMAGE_BYTES_MIN as u32 + self.image_bytes % lengths,
        }
    }
}

fn round_trip(parts: &Parts) {
    let envelope = parts.envelope();
    let mut bytes = [0xa5; ENVELOPE_BYTES];
    write_envelope(&mut bytes, &envelope);
    assert_eq!(read_envelope(&bytes), Ok(envelope));
    let mut again = bytes;
    reseal_struct(&mut again, "envelope");
    assert_eq!(again, bytes, "the checksum covers all bytes");
    if parts.altered_by != 0 {
        bytes[usize::from(parts.altered_at) % ENVELOPE_BYTES] ^= parts.altered_by;
        read_envelope(&bytes).expect_err("an altered byte is noticed");
    }
}

/// No padding and one way to write each value: what is read is written to the same bytes.
fn canonical(bytes: &[u8]) {
    let (read, memory) = allocated(|| read_envelope(bytes));
    assert_eq!(memory, Allocated::default());
    if let Ok(envelope) = read {
        let mut again = [0; ENVELOPE_BYTES];
        write_envelope(&mut again, &envelope);
        assert_eq!(again, bytes[..ENVELOPE_BYTES]);
        assert!((IMAGE_BYTES_MIN..=IMAGE_BYTES_MAX).contains(&(envelope.image_bytes as usize)));
        assert!(envelope.durable_through < envelope.first && envelope.first <= envelope.last);
    }
}

fn valid() -> Vec<u8> {
    let envelope = Envelope {
        cluster: ClusterId(0xc1),
        nonce: 0xfeed_face,
        generation: 7,
        group: GroupId(0),
        offset: 528_384,
        epoch: 4,
        boot: 3,
        durable_through: LogIndex(98),
        term: Term(5),
        first: LogIndex(100),
        last: LogIndex(102),
        chain: Chain([0x22; 16]),
        image_bytes: 256,
    };
    let mut bytes = vec![0; ENVELOPE_BYTES];
    write_envelope(&mut bytes, &envelope);
    bytes
}

#[test]
fn what_is_written_is_read_and_an_altered_byte_is_refused() {
    bolero::check!().with_iterations(0).with_type::<Parts>().for_each(round_trip);
    sweep(4000, round_trip);
}

#[test]
fn what_is_read_has_one_encoding() {
    corpus("envelope__what_is_read_has_one_encoding", &[("valid".to_owned(), valid())]);
    bolero::check!().with_iterations(0).for_each(canonical);
    sweep_bytes(20_000, &[valid()], |bytes| reseal_struct(bytes, "envelope"), canonical);
}

#[test]
fn every_altered_byte_of_an_envelope_is_refused() {
    let valid = valid();
    for at in 0..ENVELOPE_BYTES {
        for by in 1..=u8::MAX {
            let mut bytes = valid.clone();
            bytes[at] ^= by;
            assert!(read_envelope(&bytes).is_err(), "byte {at} altered by {by:#x}");
        }
    }
}
