//! What is remembered of a peer between its connections.

use crate::config::NetLimits;
use crate::frame::Session;
use crate::handshake::Known;
use ringraft_block::{Incarnation, NodeId};
use std::net::{IpAddr, SocketAddr};

/// At so many addresses a peer is looked for at the most ([`crate::Network::set_addresses`]).
pub const ADDRESSES_MAX: usize = 8;

/// A node to have a session with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its id. The node with the higher id dials, the other accepts.
    pub id: NodeId,
    /// Where it listens; [`crate::Network::set_addresses`] says where else it may.
    pub address: SocketAddr,
    /// Its incarnation, once it is known; another is refused then.
    pub incarnation: Option<Incarnation>,
}

pub(crate) struct Peer {
    /// Where it may listen, never nowhere.
    addresses: Vec<SocketAddr>,
    /// Which of these are hearsay.
    hearsay: Vec<SocketAddr>,
    /// Which of these is dialed next.
    next: usize,
    pub(crate) pinned: Option<Incarnation>,
    /// The newest session accepted from it, and the incarnation that it was with.
    pub(crate) newest: Option<(Incarnation, Session)>,
    /// Its connection: being dialed, in its handshake if dialed here, or open.
    pub(crate) slot: Option<usize>,
    /// The engine wants nothing from it for now.
    pub(crate) paused: bool,
    /// When it was last heard, and last sent to, in the sessions that have ended.
    pub(crate) active_ns: Option<(u64, u64)>,
    /// When it may be dialed.
    pub(crate) dial_at_ns: u64,
    /// Dials and sessions that failed since the last success.
    failures: u32,
}

impl Peer {
    pub(crate) fn new(config: &PeerConfig) -> Self {
        Self {
            addresses: vec![config.address],
            hearsay: Vec::new(),
            next: 0,
            pinned: config.incarnation,
            newest: None,
            slot: None,
            paused: false,
            active_ns: None,
            dial_at_ns: 0,
            failures: 0,
        }
    }

    pub(crate) fn known(&self) -> Known {
        Known { pinned: self.pinned, newest: self.newest }
    }

    /// Where it is dialed next.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[self.next]
    }

    /// Whether it may be there by more than hearsay: a stranger can name an address of its own as a peer's.
    pub(crate) fn has_ip(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|address| address.ip() == ip && !self.hearsay.contains(address))
    }

    /// Which of its addresses are hearsay.
    pub(crate) fn set_hearsay(&mut self, hearsay: &[SocketAddr]) {
        self.hearsay.clear();
        self.hearsay.extend(hearsay.iter().filter(|address| self.addresses.contains(address)));
    }

    /// It is looked for at these addresses. Whether it is to be dialed at the first of them at once, as if nothing had failed: when
    /// that is another one than before. Of the others the turn comes: whoever keeps naming new ones must not keep this node from those
    /// that it had before.
    pub(crate) fn move_to(&mut self, addresses: &[SocketAddr]) -> bool {
        let addresses = &addresses[..addresses.len().min(ADDRESSES_MAX)];
        let Some(first) = addresses.first() else { return false };
        let moves = self.addresses.first() != Some(first);
        if moves {
            (self.next, self.failures, self.dial_at_ns) = (0, 0, 0);
        }
        if self.addresses != addresses {
            self.addresses = addresses.to_vec();
            self.next = self.next.min(addresses.len() - 1);
        }
        moves
    }

    /// A session lasted: the next failure is the first again, and it is looked for where it was.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// A dial led to no session, or to none that lasted: whoever is there may not be the peer.
    pub(crate) fn try_next_address(&mut self) {
        self.next = (self.next + 1) % self.addresses.len();
    }

    /// A dial or a session failed: when all addresses have been tried, the next dial waits twice as long as the last one did, less up
    /// to half of it at random, so that nodes which lost each other at the same moment do not come back at the same moment.
    pub(crate) fn failed(&mut self, now: u64, limits: &NetLimits, jitter: &mut Jitter) {
        let rounds = self.failures / self.addresses.len() as u32;
        let factor = 1u64.checked_shl(rounds.min(63)).unwrap_or(u64::MAX);
        let delay = limits.reconnect_delay_min_ns.saturating_mul(factor);
        let delay = delay.min(limits.reconnect_delay_max_ns);
        let delay = delay - jitter.up_to(delay / 2);
        self.failures = self.failures.saturating_add(1);
        self.dial_at_ns = now.saturating_add(delay);
    }
}

/// Random numbers for spreading things out (splitmix64): no secret depends on them.
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number from 0 to `most`, both included.
    fn up_to(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let span = u128::from(most) + 1;
        ((u128::from(z) * span) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_its_bound_with_up_to_half_off_and_a_success_resets_it() {
        let limits =
            NetLimits { reconnect_delay_min_ns: 100, reconnect_delay_max_ns: 1000, ..NetLimits::default() };
        let config = PeerConfig { id: NodeId(1), address: "127.0.0.1:1".parse().unwrap(), incarnation: None };
        let mut jitter = Jitter::new(7);
        let mut peer = Peer::new(&config);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..20 {
            for full in [100, 200, 400, 800, 1000, 1000] {
                peer.failed(5_000, &limits, &mut jitter);
                let delay = peer.dial_at_ns - 5_000;
                assert!((full / 2..=full).contains(&delay), "{delay} of {full}");
                seen.insert(delay);
            }
            peer.succeeded();
        }
        assert!(seen.len() > 50, "the waits are spread: {seen:?}");
        for _ in 0..200 {
            peer.failed(u64::MAX - 10, &limits, &mut jitter);
        }
        assert_eq!(peer.dial_at_ns, u64::MAX);
    }

    #[test]
    fn all_addresses_have_their_turn_before_the_wait_doubles() {
        let limits =
            NetLimits { reconnect_delay_min_ns: 100, reconnect_delay_max_ns: 1000, ..NetLimits::default() };
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let mut peer = Peer::new(&PeerConfig { id: NodeId(1), address: at(1), incarnation: None });
        let mut jitter = Jitter::new(7);
        assert!(!peer.move_to(&[at(1), at(2), at(3)]), "the first one is the same");
        for full in [100, 200, 400, 800, 1000] {
            for port in 1..=3 {
                assert_eq!(peer.address(), at(port));
                peer.try_next_address();
                peer.failed(5_000, &limits, &mut jitter);
                let delay = peer.dial_at_ns - 5_000;
                assert!((full / 2..=full).contains(&delay), "{delay} of {full}");
            }
        }
        // More or fewer of the others change neither the turn nor the wait.
        peer.try_next_address();
        assert!(!peer.move_to(&[at(1), at(4), at(2), at(3)]));
        assert_eq!((peer.address(), peer.dial_at_ns > 5_000), (at(4), true));
        assert!(!peer.move_to(&[]), "it must be somewhere");
        assert!(!peer.move_to(&[at(1)]));
        assert_eq!((peer.address(), peer.dial_at_ns > 5_000), (at(1), true));
        assert!(peer.move_to(&[at(9), at(1)]));
        assert_eq!((peer.address(), peer.dial_at_ns), (at(9), 0));
        let many: Vec<SocketAddr> = (9..90).map(at).collect();
        assert!(!peer.move_to(&many));
        assert_eq!(peer.addresses, many[..ADDRESSES_MAX]);
    }
}
