//! Signals: a request to stop is a flag that every wait looks at, so that the guards which end processes and
//! remove directories run on every way out.

use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The first of the signals that arrived; 0 for none.
static SIGNALLED: AtomicI32 = AtomicI32::new(0);
static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// A wait looks at the flag this often.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The program was asked to stop.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted by {}", name(*.signal))]
pub(crate) struct Interrupted {
    pub(crate) signal: i32,
}

fn name(signal: i32) -> String {
    match Signal::from_named_raw(signal) {
        Some(Signal::INT) => "SIGINT".to_owned(),
        Some(Signal::TERM) => "SIGTERM".to_owned(),
        Some(Signal::HUP) => "SIGHUP".to_owned(),
        _ => format!("signal {signal}"),
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    // Only atomic operations here: a signal handler may do little else.
    let _ = SIGNALLED.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    if let Some(stop) = STOP.get() {
        stop.store(true, Ordering::Relaxed);
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP set the flag instead of ending the process. System calls that they
/// interrupt return, so that a blocking wait notices.
pub(crate) fn catch_signals() -> std::io::Result<()> {
    STOP.get_or_init(Default::default);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: an all-zero sigaction is valid: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
        // SAFETY: `action` lives across the call, and the handler does only what a handler may.
        if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Becomes true with the first signal.
pub(crate) fn stop_flag() -> Arc<AtomicBool> {
    Arc::clone(STOP.get_or_init(Default::default))
}

/// The signal that asked to stop, if one did.
pub(crate) fn signalled() -> Option<i32> {
    Some(SIGNALLED.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
}

/// Fails when the program was asked to stop.
pub(crate) fn check() -> Result<(), Interrupted> {
    signalled().map_or(Ok(()), |signal| Err(Interrupted { signal }))
}

/// Sleeps, unless the program is asked to stop.
pub(crate) fn sleep(duration: Duration) -> Result<(), Interrupted> {
    let end = Instant::now() + duration;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK_AGAIN));
    }
}
