//! How a thread waits for what a core tells it: it looks for that for a while, as an adaptive core looks for work, and then
//! sleeps.
//!
//! A thread that sleeps costs the core a system call when there is something for it, and comes when a processor has woken for
//! it. So one that looks has its outcome sooner, and it gives way with every look. Of many that wait only one looks: the others
//! would only be in its way, and in that of the core. While the core would not look either, since commands take long, no
//! thread does, and none for a while after others have kept one away.

use crate::runtime::{GivingWay, IdlePolicy, monotonic_ns};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::Duration;

/// Locked by the thread of this process that looks, whatever the node.
static LOOKING: Mutex<GivingWay> = Mutex::new(GivingWay::of_any_thread());

/// For how long threads look that wait for a core, and for commands as the core says.
#[derive(Debug)]
pub(crate) struct Patience {
    span: Duration,
    /// Commands take so long that nobody looks for what becomes of them.
    is_over: AtomicBool,
}

impl Patience {
    pub(crate) fn new(idle: IdlePolicy) -> Self {
        let span = match idle {
            IdlePolicy::Adaptive { spin_us } => Duration::from_micros(spin_us),
            // A core that never sleeps has a processor of its own, which says nothing of those of other threads.
            IdlePolicy::Spin | IdlePolicy::Park => Duration::ZERO,
        };
        Self { span, is_over: AtomicBool::new(false) }
    }

    /// Whether commands take so long for now that nobody is to look.
    pub(crate) fn set_over(&self, is_over: bool) {
        // Other threads read it: it is written when it changes.
        if self.is_over.load(Ordering::Relaxed) != is_over {
            self.is_over.store(is_over, Ordering::Relaxed);
        }
    }

    /// For reads that wait for no command: however long those take.
    pub(crate) fn span_of_reads(&self) -> Duration {
        self.span
    }

    /// For commands, for now.
    pub(crate) fn span(&self) -> Duration {
        if self.is_over.load(Ordering::Relaxed) { Duration::ZERO } else { self.span }
    }
}

/// Looks for as long as `span` whether there is something, unless another thread does. True if it has looked for all of that time,
/// in vain.
pub(crate) fn look(span: Duration, there_is: impl FnMut() -> bool) -> bool {
    #[cfg(test)]
    ASKED.with(|asked| asked.set(asked.get() + usize::from(!span.is_zero())));
    look_as(&LOOKING, span, there_is)
}

fn look_as(place: &Mutex<GivingWay>, span: Duration, mut there_is: impl FnMut() -> bool) -> bool {
    if span.is_zero() || there_is() {
        return false;
    }
    let mut giving_way = match place.try_lock() {
        Ok(giving_way) => giving_way,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return false,
    };
    let mut now_ns = monotonic_ns();
    let until_ns = now_ns.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX));
    while now_ns < until_ns && !giving_way.abstains(now_ns) {
        now_ns = giving_way.give_way(now_ns);
        if there_is() {
            return false;
        }
    }
    now_ns >= until_ns
}

#[cfg(test)]
thread_local! {
    /// How often this thread has wanted to look.
    static ASKED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
pub(crate) fn asked() -> usize {
    ASKED.with(std::cell::Cell::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_thread_looks_until_there_is_something() {
        let fresh = || Mutex::new(GivingWay::of_any_thread());
        for wanted in [2, 10] {
            let mut looks = 0;
            let in_vain = look_as(&fresh(), LONG, || {
                looks += 1;
                looks >= wanted
            });
            // Kept away for long, as beside those who compute, it stops earlier.
            assert!(!in_vain && (2..=wanted).contains(&looks), "{looks} of {wanted}");
        }
        let mut looks = 0;
        assert!(look_as(&fresh(), Duration::from_micros(50), || {
            looks += 1;
            false
        }));
        assert!(looks >= 2, "{looks}");
    }

    #[test]
    fn of_all_threads_one_looks_and_none_without_patience() {
        let place = Mutex::new(GivingWay::of_any_thread());
        let looking = place.lock().unwrap();
        let mut looks = 0;
        assert!(!look_as(&place, LONG, || {
            looks += 1;
            false
        }));
        assert_eq!(looks, 1, "it may be there already");
        drop(looking);
        assert!(!look_as(&place, Duration::ZERO, || unreachable!("without patience")));
        assert!(!look_as(&place, LONG, || true));
    }

    #[test]
    fn patience_is_that_of_an_adaptive_core_that_would_look() {
        let adaptive = IdlePolicy::Adaptive { spin_us: 70 };
        let patience = Patience::new(adaptive);
        assert_eq!(patience.span(), Duration::from_micros(70));
        patience.set_over(true);
        assert_eq!(patience.span(), Duration::ZERO);
        assert_eq!(patience.span_of_reads(), Duration::from_micros(70), "they wait for no command");
        patience.set_over(false);
        assert_eq!(patience.span(), Duration::from_micros(70));
        for idle in [IdlePolicy::Park, IdlePolicy::Spin] {
            let patience = Patience::new(idle);
            assert_eq!(
                (patience.span(), patience.span_of_reads()),
                (Duration::ZERO, Duration::ZERO),
                "{idle:?}"
            );
        }
    }
}
