//! Which lines of a batch are answered: one bit each, kept in chunks so that a commit writes little. Used by `job`.

/// Lines of one chunk: 512 bytes in the database.
pub const CHUNK_LINES: usize = 4096;
const CHUNK_WORDS: usize = CHUNK_LINES / 64;

/// A bit per line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
    lines: usize,
    set: usize,
    /// All lines before are set.
    first_clear: usize,
}

impl Bits {
    /// None of `lines` is answered.
    pub fn new(lines: usize) -> Bits {
        Bits { words: vec![0; lines.div_ceil(CHUNK_LINES) * CHUNK_WORDS], lines, set: 0, first_clear: 0 }
    }

    /// Takes a chunk as it was kept; bits beyond the last line are dropped.
    pub fn load(&mut self, chunk: usize, bytes: &[u8]) {
        let begin = chunk * CHUNK_WORDS;
        for (word, bytes) in self.words.iter_mut().skip(begin).take(CHUNK_WORDS).zip(bytes.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
        (self.lines..self.words.len() * 64).for_each(|line| self.words[line / 64] &= !(1 << (line % 64)));
        self.set = self.words.iter().map(|word| word.count_ones() as usize).sum();
        self.first_clear = 0;
    }

    /// A chunk as it is kept.
    pub fn chunk(&self, chunk: usize) -> Vec<u8> {
        let words = self.words.iter().skip(chunk * CHUNK_WORDS).take(CHUNK_WORDS);
        words.flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Whether a line is answered; lines that do not exist are.
    pub fn get(&self, line: usize) -> bool {
        line >= self.lines || self.words[line / 64] >> (line % 64) & 1 == 1
    }

    /// Marks a line; false: it was marked, or does not exist.
    pub fn set(&mut self, line: usize) -> bool {
        if self.get(line) {
            return false;
        }
        self.words[line / 64] |= 1 << (line % 64);
        self.set += 1;
        true
    }

    /// Lines marked.
    pub fn count(&self) -> usize {
        self.set
    }

    /// The first line at or behind `from` that is not marked.
    pub fn next_clear(&mut self, from: usize) -> Option<usize> {
        while self.first_clear < self.lines && self.get(self.first_clear) {
            self.first_clear += 1;
        }
        (from.max(self.first_clear)..self.lines).find(|&line| !self.get(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_kept_by_chunk() {
        let lines = CHUNK_LINES + 70;
        let mut bits = Bits::new(lines);
        for line in [0, 1, 63, 64, CHUNK_LINES, lines - 1] {
            assert!(bits.set(line) && !bits.set(line), "{line}");
        }
        assert!(!bits.set(lines), "a line that does not exist");
        assert_eq!((bits.count(), bits.next_clear(0), bits.next_clear(63)), (6, Some(2), Some(65)));
        let mut read = Bits::new(lines);
        (0..2).for_each(|chunk| read.load(chunk, &bits.chunk(chunk)));
        assert_eq!((read.count(), read.chunk(0), read.chunk(1)), (6, bits.chunk(0), bits.chunk(1)));
        (0..lines).for_each(|line| _ = read.set(line));
        assert_eq!((read.count(), read.next_clear(0)), (lines, None));
    }

    /// A damaged chunk marks no line that does not exist.
    #[test]
    fn only_lines_that_exist_count() {
        let mut bits = Bits::new(3);
        bits.load(0, &[0xff; CHUNK_LINES / 8]);
        assert_eq!((bits.count(), bits.next_clear(0)), (3, None));
    }
}
