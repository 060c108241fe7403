//! Makes hostile files of good ones: numbers that lie, bytes that are gone, repeated or another's.

/// A stream of choices that follows from one number (SplitMix64).
pub(crate) struct Mutator {
    state: u64,
}

/// Changes of one file at most.
const CHANGES_MAX: u64 = 6;

/// Files do not grow beyond this by repetition.
const FILE_BYTES_MAX: usize = 1 << 16;

/// Numbers at which arithmetic breaks.
const NUMBERS: [u64; 16] = [
    0,
    1,
    7,
    8,
    31,
    255,
    65_535,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffe0,
    0xffff_ffff_ffff_fff8,
    0xffff_ffff_ffff_ffff,
];

/// What a reader of texts may stumble over.
const TEXTS: [&str; 12] = [
    "18446744073709551615",
    "-1",
    "1e999",
    "null",
    "[[[[[[[[",
    "{\"a\":{\"a\":{",
    "\"\\ud800\"",
    "\"",
    "F32",
    "data_offsets",
    "0.1",
    "\u{2581}",
];

impl Mutator {
    pub(crate) fn new(number: u64) -> Mutator {
        Mutator { state: number.wrapping_mul(0x9e37_79b9_7f4a_7c15) }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.state;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Below `end`; 0 where that is 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// Length to claim of a file of which `bytes` are there: mostly that.
    pub(crate) fn file_len(&mut self, bytes: usize) -> u64 {
        match self.below(8) {
            0 => bytes as u64 + self.next() % 4096,
            1 => self.next() >> self.below(64),
            _ => bytes as u64,
        }
    }

    /// One of the seeds, changed.
    pub(crate) fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let pick = self.below(seeds.len());
        let mut file = seeds.get(pick).cloned().unwrap_or_default();
        // Half of the files have one lie only, and so reach what is behind the first check.
        let changes = if self.below(2) == 0 { 1 } else { 1 + self.next() % CHANGES_MAX };
        for _ in 0..changes {
            self.change(&mut file, seeds);
        }
        // A safetensors header of another length would rarely be read at all.
        if self.below(2) == 0 && file.get(8) == Some(&b'{') && !file.starts_with(b"GGUF") {
            let len = (file.len() as u64 - 8).min(self.next() % 2 * 64 + file.len() as u64 - 8);
            file[..8].copy_from_slice(&len.to_le_bytes());
        }
        file
    }

    fn change(&mut self, file: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(file.len());
        let end = (at + 1 + self.below(40)).min(file.len());
        match self.below(9) {
            0 => {
                if let Some(byte) = file.get_mut(at) {
                    *byte ^= 1 << (self.next() % 8);
                }
            }
            1 => {
                if let Some(byte) = file.get_mut(at) {
                    *byte = self.next() as u8;
                }
            }
            2 | 3 => {
                let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][self.below(4)];
                let width = width.min(file.len() - at.min(file.len()));
                file[at..at + width].copy_from_slice(&number[..width]);
            }
            4 => file.truncate(at),
            5 => drop(file.drain(at.min(end)..end)),
            6 if file.len() < FILE_BYTES_MAX => {
                let part = file[at.min(end)..end].to_vec();
                let times = 1 + self.below(8);
                let part = part.repeat(times);
                file.splice(at..at, part);
            }
            7 => {
                let text = TEXTS[self.below(TEXTS.len())].bytes();
                file.splice(at.min(end)..end, text);
            }
            _ => {
                let other = self.below(seeds.len());
                let Some(other) = seeds.get(other) else { return };
                let from = self.below(other.len());
                let part = other[from..(from + end.saturating_sub(at)).min(other.len())].to_vec();
                file.splice(at.min(end)..end, part);
            }
        }
    }
}
