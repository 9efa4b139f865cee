//! Which segment a file is whose header does not say, or says what another file's header says too: its envelopes tell.
//!
//! The happy path: every such file is read and heard ([`Testimony`]), and when all have been, each is given the youngest generation
//! that its envelopes name and that no other file has.
//!
//! A file may hold envelopes that are not its own: those of a former life, which are older than its own, and some that were
//! misdirected here from another segment, which may be younger. So where two files name one generation it goes to the one
//! that holds more of it, and the other is what the rest of it says. When that leaves a doubt, it is told, and nothing that
//! the log claims is certain.

use super::prior;
use super::scan::{SegmentBytes, belongs};
use crate::format::{HardState, PriorContent, SegmentHeader, SegmentOrigin};
use crate::segment::SegmentName;
use ringraft_block::BLOCK_BYTES;

/// A file in service, or that should be unused, without a header that can be believed.
pub(super) struct Suspect {
    pub(super) name: SegmentName,
    pub(super) length: u64,
    /// Intact, but another file has the same, or holds what belongs to it.
    pub(super) header: Option<SegmentHeader>,
    /// What its slots say, once it has been read.
    pub(super) testimony: Option<Testimony>,
}

/// What the slots of a file say of it.
pub(super) enum Testimony {
    /// No batch was ever written here.
    Unused,
    Voices(Vec<Voice>),
}

/// Envelopes that agree on the segment for which they were written.
pub(super) struct Voice {
    slots: usize,
    header: SegmentHeader,
}

/// What a suspect turned out to be.
pub(super) enum Identity {
    /// No batch was ever written to it.
    Unused,
    /// The segment that its intact header names.
    Headed(SegmentHeader),
    /// The segment that its envelopes name.
    Voiced(SegmentHeader),
    /// Nobody can tell.
    Unknown,
}

impl Suspect {
    pub(super) fn new(name: SegmentName, length: u64, header: Option<SegmentHeader>) -> Self {
        Self { name, length, header, testimony: None }
    }

    fn voices(&self) -> &[Voice] {
        match &self.testimony {
            Some(Testimony::Voices(voices)) => voices,
            Some(Testimony::Unused) | None => &[],
        }
    }

    /// Whether it holds a slot that was written under `header`.
    pub(super) fn names(&self, header: &SegmentHeader) -> bool {
        self.slots_of(header) > 0
    }

    fn slots_of(&self, header: &SegmentHeader) -> usize {
        self.voices().iter().find(|voice| is_one_life(&voice.header, header)).map_or(0, |voice| voice.slots)
    }

    /// The generations that it may be, besides this one.
    fn alternatives(&self, generation: u32, taken: impl Fn(u32) -> bool) -> usize {
        let other = |voice: &&Voice| voice.header.generation != generation && !taken(voice.header.generation);
        self.voices().iter().filter(other).count()
    }
}

fn is_one_life(one: &SegmentHeader, other: &SegmentHeader) -> bool {
    (one.nonce, one.generation, one.epoch, one.boot)
        == (other.nonce, other.generation, other.epoch, other.boot)
}

impl Testimony {
    pub(super) fn of(bytes: &SegmentBytes<'_>, hard_state: &HardState) -> Self {
        if prior::is_unused(bytes) { Self::Unused } else { Self::Voices(voices(bytes, hard_state)) }
    }
}

/// Says what all suspects are, in their order, and of which the answer leaves a doubt. `is_taken`: the generation lies before the log's
/// start, or a file that is no suspect has it.
pub(super) fn identify(suspects: &[Suspect], is_taken: impl Fn(u32) -> bool) -> Vec<(Identity, bool)> {
    let unknown = |suspect: &Suspect| match suspect.testimony {
        Some(Testimony::Unused) => (Identity::Unused, false),
        _ => (Identity::Unknown, false),
    };
    let mut found: Vec<(Identity, bool)> = suspects.iter().map(unknown).collect();
    let mut given: Vec<u32> = Vec::new();
    loop {
        let taken = |generation| is_taken(generation) || given.contains(&generation);
        let open = (0..suspects.len()).filter(|at| matches!(found[*at].0, Identity::Unknown));
        let wishes: Vec<(usize, SegmentHeader)> =
            open.filter_map(|at| Some((at, youngest(suspects[at].voices(), taken)?))).collect();
        let Some(header) = wishes.iter().map(|(_, header)| *header).max_by_key(|header| header.generation)
        else {
            return found;
        };
        let generation = header.generation;
        let rivals = || wishes.iter().filter(|(_, wish)| wish.generation == generation).map(|(at, _)| *at);
        // As many slots in both: one of them may have nothing else to be.
        let rank = |at: usize| {
            let suspect = &suspects[at];
            (suspect.slots_of(&header), std::cmp::Reverse((suspect.alternatives(generation, taken), at)))
        };
        let Some(winner) = rivals().max_by_key(|at| rank(*at)) else { return found };
        let own = wishes.iter().find(|(at, _)| *at == winner).map_or(header, |(_, own)| *own);
        for loser in rivals().filter(|at| *at != winner) {
            found[loser].1 = true;
        }
        let intact = suspects[winner].header.filter(|header| is_one_life(header, &own));
        found[winner].0 = intact.map_or(Identity::Voiced(own), Identity::Headed);
        given.push(generation);
    }
}

/// All segments that the envelopes in a file name.
fn voices(bytes: &SegmentBytes<'_>, hard_state: &HardState) -> Vec<Voice> {
    let mut voices: Vec<Voice> = Vec::new();
    for at in (0..bytes.bytes.len()).step_by(BLOCK_BYTES) {
        let Some(envelope) = bytes.envelope(at) else { continue };
        if envelope.cluster != hard_state.cluster
            || envelope.group != hard_state.group
            || envelope.generation == 0
        {
            continue;
        }
        if let Some(voice) = voices.iter_mut().find(|voice| belongs(&envelope, &voice.header, at)) {
            voice.slots += 1;
            continue;
        }
        let header = SegmentHeader {
            cluster: envelope.cluster,
            node: hard_state.node,
            incarnation: hard_state.incarnation,
            segment_bytes: bytes.bytes.len() as u64,
            nonce: envelope.nonce,
            epoch: envelope.epoch,
            boot: envelope.boot,
            generation: envelope.generation,
            group: envelope.group,
            // Nobody knows what a former life left here: what is not blank is never taken for it.
            prior_content: PriorContent::Zeros,
            // Nobody knows; generation 0 is no segment's.
            origin: SegmentOrigin::Rollover { previous: 0 },
        };
        voices.push(Voice { slots: 1, header });
    }
    voices
}

/// The youngest generation that is not `taken`, by majority. A recycled file still holds envelopes of its former lives, perhaps more
/// than of the present one, which is the youngest. `None` when they do not tell.
fn youngest(voices: &[Voice], taken: impl Fn(u32) -> bool) -> Option<SegmentHeader> {
    let free = || voices.iter().filter(|voice| !taken(voice.header.generation));
    let generation = free().map(|voice| voice.header.generation).max()?;
    let of_it = || free().filter(|voice| voice.header.generation == generation);
    let most = of_it().map(|voice| voice.slots).max()?;
    let mut loudest = of_it().filter(|voice| voice.slots == most);
    let header = loudest.next()?.header;
    loudest.next().is_none().then_some(header)
}

/// Whether the envelopes in a file name a segment that is not `taken`.
pub(super) fn names_another(
    bytes: &SegmentBytes<'_>,
    hard_state: &HardState,
    taken: impl Fn(u32) -> bool,
) -> bool {
    youngest(&voices(bytes, hard_state), taken).is_some()
}

/// Whether one slot at least was written under this header, which shows that it is the segment's own.
pub(super) fn has_own_slot(bytes: &SegmentBytes<'_>, header: &SegmentHeader) -> bool {
    (0..bytes.bytes.len())
        .step_by(BLOCK_BYTES)
        .any(|at| bytes.envelope(at).is_some_and(|envelope| belongs(&envelope, header, at)))
}
