//! Hostile files: seeds are mutated, and every reader must answer each with a value or an error, never a panic, and take
//! memory in proportion to the file. Everything follows from one number, so a failure can be repeated. Needs nothing but
//! stable Rust. `tests/readers.rs` runs it for a moment, the binary for as long as it is told.

mod memory;
mod mutate;
pub mod targets;
// Writes good files; that of the reader's own tests.
#[path = "../../models/gguf/tests/gguf/writer.rs"]
#[allow(dead_code, missing_docs)]
mod writer;

use std::time::{Duration, Instant};

use mutate::Mutator;
pub use targets::{TARGETS, Target};

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// After so many files.
    Files(u64),
    /// After this time.
    Time(Duration),
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Files tried.
    pub files: u64,
    /// Of them, those that the reader took.
    pub accepted: u64,
    /// Most bytes that a reading held, over those of its file.
    pub bytes_peak: u64,
}

/// Tries mutations of the target's seeds, from number `seed` on. Panics, naming the number of the file, where a reader
/// panics or takes more memory than [`Target::bytes_max`] allows.
pub fn run(target: &Target, seed: u64, budget: Budget) -> Report {
    let seeds = (target.seeds)();
    let began = Instant::now();
    let mut report = Report::default();
    loop {
        let more = match budget {
            Budget::Files(count) => report.files < count,
            Budget::Time(time) => began.elapsed() < time,
        };
        if !more {
            return report;
        }
        let number = seed.wrapping_add(report.files);
        one(target, &seeds, number, &mut report);
    }
}

/// File `number`.
fn one(target: &Target, seeds: &[Vec<u8>], number: u64, report: &mut Report) {
    let mut mutator = Mutator::new(number);
    let file = mutator.mutate(seeds);
    let len = mutator.file_len(file.len());
    let tried = std::panic::catch_unwind(|| memory::peak(|| (target.read)(&file, len)));
    match tried {
        Ok((accepted, peak)) => {
            let max = target.bytes_max(file.len() as u64);
            assert!(
                peak <= max,
                "{}: file {number} of {} bytes took {peak} bytes, at most {max}",
                target.name,
                file.len()
            );
            report.files += 1;
            report.accepted += u64::from(accepted);
            report.bytes_peak = report.bytes_peak.max(peak);
        }
        Err(_) => panic!("{}: file {number} of {} bytes makes it panic", target.name, file.len()),
    }
}
