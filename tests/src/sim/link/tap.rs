//! Listens in on what arrives at one end of a connection: the simulator knows who was told what, whatever nodes say of that.

use ringraft::{TOLD_TO_CAMPAIGN, told_to_campaign};
use ringraft_block::Term;
use ringraft_net::frame::{HEADER_BYTES, Header};
use ringraft_net::handshake::{HANDSHAKE_BYTES, Handshake, HandshakeKind};

/// Something that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// A node asks whom to turn to, and perhaps says where it listens.
    Question { introduces: bool },
    /// It is told of somebody.
    Referral,
    /// A leader tells the node to campaign.
    Campaign { term: Term },
}

/// How far one direction of a connection has been heard.
pub(super) struct Tap {
    part: Part,
    /// What is to come of it,
    left: usize,
    /// and what has come, where that matters.
    kept: Vec<u8>,
}

enum Part {
    Handshake,
    Header,
    Body {
        kind: u16,
        attachment_bytes: usize,
    },
    Attachment,
    /// What came was none of all that: it has been damaged, or is no node's.
    Noise,
}

impl Default for Tap {
    fn default() -> Self {
        Self { part: Part::Handshake, left: HANDSHAKE_BYTES, kept: Vec::new() }
    }
}

impl Tap {
    /// More has arrived.
    pub(super) fn hear(&mut self, mut bytes: &[u8], mut told: impl FnMut(Heard)) {
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(self.left.min(bytes.len()));
            match self.part {
                Part::Handshake | Part::Header | Part::Body { kind: TOLD_TO_CAMPAIGN, .. } => {
                    self.kept.extend_from_slice(part);
                }
                Part::Body { .. } | Part::Attachment | Part::Noise => {}
            }
            (self.left, bytes) = (self.left - part.len(), rest);
            while self.left == 0 {
                self.next(&mut told);
                self.kept.clear();
            }
        }
    }

    /// A part is complete.
    fn next(&mut self, told: &mut impl FnMut(Heard)) {
        (self.part, self.left) = match self.part {
            Part::Handshake => match self.kept.first_chunk().map(Handshake::decode) {
                Some(Ok(handshake)) => {
                    match handshake.kind {
                        HandshakeKind::Ask(address) => {
                            told(Heard::Question { introduces: address.is_some() })
                        }
                        HandshakeKind::Referral(Some(_)) => told(Heard::Referral),
                        _ => {}
                    }
                    (Part::Header, HEADER_BYTES)
                }
                _ => (Part::Noise, usize::MAX),
            },
            Part::Header => match self.kept.first_chunk().map(Header::decode) {
                Some(Ok(Header { kind, body_bytes, attachment_bytes, .. })) => {
                    let attachment_bytes = attachment_bytes as usize;
                    (Part::Body { kind, attachment_bytes }, body_bytes as usize)
                }
                _ => (Part::Noise, usize::MAX),
            },
            Part::Body { kind, attachment_bytes } => {
                if let Some(term) = told_to_campaign(kind, &self.kept) {
                    told(Heard::Campaign { term });
                }
                (Part::Attachment, attachment_bytes)
            }
            Part::Attachment => (Part::Header, HEADER_BYTES),
            Part::Noise => (Part::Noise, usize::MAX),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringraft_block::{ClusterId, GroupId, Incarnation, NodeId, crc32c};
    use ringraft_net::{Referral, Session};

    fn handshake(kind: HandshakeKind) -> Vec<u8> {
        let handshake = Handshake {
            kind,
            version_min: 1,
            version_max: 1,
            lane: 0,
            format_fingerprint: 1,
            cluster: ClusterId(1),
            from: NodeId(1),
            to: NodeId(2),
            incarnation: Incarnation(1),
            incarnation_expected: Incarnation(0),
            session: Session(1),
            features: 0,
        };
        handshake.encode().to_vec()
    }

    /// A frame, and what a tap is to make of it.
    fn frame(kind: u16, body: &[u8], attachment: &[u8]) -> Vec<u8> {
        let header = Header {
            version: 1,
            kind,
            group: GroupId(0),
            body_bytes: body.len() as u32,
            attachment_bytes: attachment.len() as u32,
            sequence: 0,
            session: Session(1),
            body_crc: crc32c(body),
        };
        [&header.encode(), body, attachment].concat()
    }

    fn heard(stream: &[u8], chunk: usize) -> Vec<Heard> {
        let (mut tap, mut heard) = (Tap::default(), Vec::new());
        stream.chunks(chunk).for_each(|bytes| tap.hear(bytes, |what| heard.push(what)));
        heard
    }

    #[test]
    fn a_tap_hears_what_arrives_however_it_is_cut() {
        let campaign = |term: u64| frame(TOLD_TO_CAMPAIGN, &term.to_le_bytes(), &[]);
        let hello = handshake(HandshakeKind::Hello);
        let frames = [frame(17, &[1; 30], &[]), campaign(7), frame(16, &[2; 50], &[3; 700]), campaign(9)];
        let stream = [hello, frames.concat()].concat();
        for chunk in 1..stream.len() {
            let told = [7, 9].map(|term| Heard::Campaign { term: Term(term) });
            assert_eq!(heard(&stream, chunk), told, "chunks of {chunk}");
        }
        let address = "10.0.0.1:7000".parse().unwrap();
        for (kind, what) in [
            (HandshakeKind::Ask(None), Some(Heard::Question { introduces: false })),
            (HandshakeKind::Ask(Some(address)), Some(Heard::Question { introduces: true })),
            (HandshakeKind::Referral(None), None),
            (HandshakeKind::Referral(Some(Referral { node: NodeId(3), address })), Some(Heard::Referral)),
        ] {
            assert_eq!(heard(&handshake(kind), 50), Vec::from_iter(what));
        }
        let mut damaged = stream;
        damaged[HANDSHAKE_BYTES + 3] ^= 1;
        assert_eq!(heard(&damaged, 100), []);
    }
}
