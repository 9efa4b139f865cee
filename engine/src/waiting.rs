//! How a thread waits for what a core tells it: it looks for that for a while, as an adaptive core looks for work, and then
//! sleeps.
//!
//! A thread that sleeps costs the core a system call when there is something for it, and comes when a processor has woken for
//! it. So one that looks has its outcome sooner, and it gives way with every look. Of many that wait only one looks: the others
//! would only be in its way, and in that of the core. While the core itself does not look, since what it waits for takes
//! long, no thread does.

use crate::runtime::{GivingWay, IdlePolicy, monotonic_ns};
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A thread of this process looks, whatever the node.
static TAKEN: AtomicBool = AtomicBool::new(false);

thread_local! {
    static GIVING_WAY: RefCell<Option<GivingWay>> = const { RefCell::new(None) };
}

/// For how long threads look that wait for a core, as the core says.
#[derive(Debug)]
pub(crate) struct Patience {
    span_ns: AtomicU64,
}

impl Patience {
    pub(crate) fn new(idle: IdlePolicy) -> Self {
        Self { span_ns: AtomicU64::new(span_ns(idle)) }
    }

    /// The core looks for work itself, or not for now.
    pub(crate) fn set(&self, idle: IdlePolicy, core_looks: bool) {
        let span_ns = if core_looks { span_ns(idle) } else { 0 };
        if self.span_ns.load(Ordering::Relaxed) != span_ns {
            self.span_ns.store(span_ns, Ordering::Relaxed);
        }
    }

    /// For now.
    pub(crate) fn span(&self) -> Duration {
        Duration::from_nanos(self.span_ns.load(Ordering::Relaxed))
    }
}

/// A core that never sleeps has a processor of its own, of which it says nothing for other threads.
fn span_ns(idle: IdlePolicy) -> u64 {
    match idle {
        IdlePolicy::Adaptive { spin_us } => spin_us.saturating_mul(1_000),
        IdlePolicy::Spin | IdlePolicy::Park => 0,
    }
}

/// Looks for as long as `span` whether there is something, unless another thread does.
pub(crate) fn look(span: Duration, mut there_is: impl FnMut() -> bool) {
    if span.is_zero() || TAKEN.swap(true, Ordering::Relaxed) {
        return;
    }
    let _taken = Taken;
    // A thread that is ending sleeps at once.
    let _ = GIVING_WAY.try_with(|giving_way| {
        let Ok(mut giving_way) = giving_way.try_borrow_mut() else { return };
        let giving_way = giving_way.get_or_insert_with(GivingWay::of_this_thread);
        let mut now_ns = monotonic_ns();
        let until_ns = now_ns.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX));
        while now_ns < until_ns && !giving_way.abstains(now_ns) && !there_is() {
            now_ns = giving_way.give_way(now_ns);
        }
    });
}

struct Taken;

impl Drop for Taken {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Nobody else in this process looks meanwhile.
    fn alone<R>(test: impl FnOnce() -> R) -> R {
        static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        test()
    }

    const LONG: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_thread_looks_until_there_is_something_and_only_one_does() {
        alone(|| {
            let looks = Cell::new(0);
            look(LONG, || {
                looks.set(looks.get() + 1);
                look(LONG, || unreachable!("another one looks"));
                looks.get() == 1_000
            });
            assert_eq!(looks.get(), 1_000);
            look(Duration::ZERO, || unreachable!("without patience"));
            look(LONG, || looks.replace(0) > 0);
            assert_eq!(looks.get(), 0, "the place is free again");
        });
    }

    #[test]
    fn a_thread_that_finds_nothing_stops() {
        alone(|| look(Duration::from_micros(100), || false));
    }

    #[test]
    fn patience_is_that_of_an_adaptive_core_that_looks_itself() {
        let adaptive = IdlePolicy::Adaptive { spin_us: 70 };
        let patience = Patience::new(adaptive);
        assert_eq!(patience.span(), Duration::from_micros(70));
        patience.set(adaptive, false);
        assert_eq!(patience.span(), Duration::ZERO);
        patience.set(adaptive, true);
        assert_eq!(patience.span(), Duration::from_micros(70));
        for idle in [IdlePolicy::Park, IdlePolicy::Spin] {
            patience.set(idle, true);
            assert_eq!(patience.span(), Duration::ZERO, "{idle:?}");
        }
    }
}
