//! CRC32C of payloads.

#[cfg(target_arch = "x86_64")]
mod fold;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use backend::checksum::Further;

use crate::sync::lock;

static OFF: AtomicBool = AtomicBool::new(false);

/// Payloads are neither summed nor compared any more, in this process: only for measuring what that costs, beside peers that do
/// not do it either. Both ends have to say so.
pub fn off() {
    OFF.store(true, Ordering::Relaxed);
}

/// Whether it was called.
pub(crate) fn is_off() -> bool {
    OFF.load(Ordering::Relaxed)
}

/// The checksum of what `crc` is of, followed by `bytes`.
pub(crate) fn append(crc: u32, bytes: &[u8]) -> u32 {
    if is_off() { 0 } else { sum(crc, bytes) }
}

/// The checksum of rows of `row_bytes` each, of each of which it is known.
pub(crate) fn of_rows(sums: &[u32], row_bytes: usize) -> u32 {
    if is_off() {
        return 0;
    }
    let further = further(row_bytes);
    sums.iter().copied().reduce(|crc, sum| further.of(crc) ^ sum).unwrap_or(0)
}

/// Tables for rows of this length; a model has few.
fn further(row_bytes: usize) -> Arc<Further> {
    static MADE: Mutex<BTreeMap<usize, Arc<Further>>> = Mutex::new(BTreeMap::new());
    const LENGTHS_MAX: usize = 64;
    let mut made = lock(&MADE);
    if made.len() >= LENGTHS_MAX && !made.contains_key(&row_bytes) {
        made.pop_first();
    }
    made.entry(row_bytes).or_insert_with(|| Arc::new(Further::new(row_bytes as u64))).clone()
}

/// From so many bytes on it is worth to fold.
#[cfg(target_arch = "x86_64")]
const FOLDED_MIN: usize = 4 * fold::ROUND;

fn sum(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= FOLDED_MIN && fold::can() {
        let (rounds, rest) = bytes.split_at(bytes.len() / fold::ROUND * fold::ROUND);
        // SAFETY: the processor can.
        return crc32c::crc32c_append(unsafe { fold::append(crc, rounds) }, rest);
    }
    crc32c::crc32c_append(crc, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..9000u32).map(|at| ((at * at) >> 3) as u8).collect();
        let whole = crc32c::crc32c(&bytes);
        for cut in [0, 1, 255, 1023, 1024, 1025, 5000, 8999] {
            assert_eq!(sum(sum(0, &bytes[..cut]), &bytes[cut..]), whole, "cut at {cut}");
        }
    }

    #[test]
    fn rows_have_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..9000u32).map(|at| ((at * at) >> 3) as u8).collect();
        for (row_bytes, rows) in [(2, 1), (4, 7), (900, 10), (36, 250)] {
            let whole = &bytes[..rows * row_bytes];
            let sums: Vec<u32> = whole.chunks(row_bytes).map(crc32c::crc32c).collect();
            assert_eq!(of_rows(&sums, row_bytes), crc32c::crc32c(whole), "{rows} rows of {row_bytes} bytes");
        }
    }

    /// Prints GB/s of bytes in the cache and of bytes in memory.
    #[test]
    #[ignore = "measures"]
    fn how_fast() {
        let bytes = vec![7u8; 512 << 20];
        for _ in 0..3 {
            for (name, piece) in [("cache", 256 << 10), ("memory", bytes.len())] {
                let part = &bytes[..piece];
                let rounds = bytes.len() / piece;
                for (how, sum) in [("here", sum as fn(u32, &[u8]) -> u32), ("crc32c", crc32c::crc32c_append)]
                {
                    let begun = std::time::Instant::now();
                    let crc = (0..rounds).fold(0, |crc, _| sum(crc, std::hint::black_box(part)));
                    let s = begun.elapsed().as_secs_f64();
                    eprintln!("{name} {how}: {:.1} GB/s ({crc:08x})", bytes.len() as f64 / s / 1e9);
                }
            }
        }
    }
}
