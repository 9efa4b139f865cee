//! The fixed inputs that every test run tries, and the committed corpus.

use bolero::TypeGenerator;
use bolero::generator::bolero_generator::driver::{ByteSliceDriver, Options};
use std::fmt::Debug;
use std::path::Path;

/// Random bytes for one input; the generators take what they need.
const INPUT_BYTES: usize = 1024;

/// SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// The input bytes with this number.
pub(crate) fn input(number: u64) -> Vec<u8> {
    Rng(number.wrapping_mul(0x2545_f491_4f6c_dd1d)).bytes(INPUT_BYTES)
}

/// The value that an engine would make of `bytes`.
fn decode<T: TypeGenerator>(bytes: &[u8]) -> Option<T> {
    T::generate(&mut ByteSliceDriver::new(bytes, &Options::default()))
}

/// Tries `property` on the first `inputs` values.
pub(crate) fn sweep<T: TypeGenerator + Debug>(inputs: u64, property: impl Fn(&T)) {
    for number in 0..inputs {
        sweep_one(number, &property);
    }
}

/// Tries `property` on one of the values.
pub(crate) fn sweep_one<T: TypeGenerator + Debug, R>(
    number: u64,
    property: impl FnOnce(&T) -> R,
) -> Option<R> {
    let value = decode::<T>(&input(number))?;
    let told = Tell(number, &value);
    let result = property(&value);
    drop(told);
    Some(result)
}

/// Tries `property` on alterations of `valid` encodings: some bytes changed, or the end cut off, and in half of them the checksums made to
/// fit again by `reseal`, so that the rules behind them are reached.
pub(crate) fn sweep_bytes(
    inputs: u64,
    valid: &[Vec<u8>],
    reseal: impl Fn(&mut [u8]),
    property: impl Fn(&[u8]),
) {
    for number in 0..inputs {
        let mut rng = Rng(number);
        let mut bytes = valid[rng.below(valid.len())].clone();
        if rng.below(8) == 0 {
            bytes.truncate(rng.below(bytes.len() + 1));
        }
        // Most fields are near the start.
        let near = if rng.below(2) == 0 { bytes.len().min(160) } else { bytes.len() };
        for _ in 0..rng.below(4) {
            if let Some(byte) = bytes.get_mut(rng.below(near)) {
                *byte = match rng.below(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => *byte ^ 1 << rng.below(8),
                    _ => rng.next() as u8,
                };
            }
        }
        if rng.below(2) == 0 {
            reseal(&mut bytes);
        }
        let told = Tell(number, &bytes);
        property(&bytes);
        drop(told);
    }
}

/// Says which input it was when the property panics.
struct Tell<'a, T: Debug>(u64, &'a T);

impl<T: Debug> Drop for Tell<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("input {}: {:?}", self.0, self.1);
        }
    }
}

/// Compares a target's committed corpus with what `files` would make it; `UPDATE_CORPUS=1` writes it. Files of other names, such as what an
/// engine has found, are left alone. That the engine replays the directory is the engine's contract; this pins that
/// it is where the engine looks, and not stale.
pub(crate) fn corpus(target: &str, files: &[(String, Vec<u8>)]) {
    let directory =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/__fuzz__").join(target).join("corpus");
    for (name, bytes) in files {
        let path = directory.join(name);
        if std::env::var_os("UPDATE_CORPUS").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
        let found = std::fs::read(&path).unwrap_or_default();
        assert!(found == *bytes, "{} is missing or stale; UPDATE_CORPUS=1 writes it", path.display());
    }
}
