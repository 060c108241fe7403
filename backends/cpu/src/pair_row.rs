//! How a row of pairs lies in memory: the pairs of bf16 of each range of inputs, where a weight's segments take such, and behind
//! them, for every way in which codes are multiplied as whole numbers, the pairs of whole numbers of each range; the same as bytes,
//! where the level multiplies those; then what their units have. Made once per row and product (`operand`), read by every task.

use crate::kernel::{Kernels, Units, WholeInputs};

/// Words of 4 bytes to a cache line.
const LINE: usize = 16;

/// What pairs a product takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairKind {
    Bf16,
    /// Whole numbers, in such units.
    Whole(Units),
}

/// The layout of a row, in words of 4 bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PairRow {
    /// Inputs of a range, and ranges.
    inputs: usize,
    ranges: usize,
    /// Whether there are pairs of bf16.
    bf16: bool,
    sets: Vec<Set>,
    /// From one row to the next: an odd number of cache lines, so that the same pair of several rows does not fall into the
    /// same places of the cache. 0 where nobody takes pairs.
    pub(crate) stride: usize,
}

/// A row's pairs of whole numbers of one kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Set {
    units: Units,
    /// Where the pairs of the first range begin, and what their units have; and how far it is to the next range's.
    pairs: usize,
    pairs_range: usize,
    /// Where the bytes of the first range begin, which take as much.
    bytes: Option<usize>,
    known: usize,
    pub(crate) known_range: usize,
}

impl Set {
    /// Where the pairs of range `range` begin. Each range is filled up to whole ones.
    pub(crate) fn pairs_of(&self, range: usize) -> usize {
        self.pairs + range * self.pairs_range
    }

    /// Where the bytes of range `range` begin, if there are any.
    pub(crate) fn bytes_of(&self, range: usize) -> Option<usize> {
        self.bytes.map(|first| first + range * self.pairs_range)
    }

    /// Bytes from one range's bytes to the next's.
    pub(crate) fn bytes_range(&self) -> usize {
        self.pairs_range * size_of::<i32>()
    }

    /// Where what the units of range `range` have begins.
    pub(crate) fn known_of(&self, range: usize) -> usize {
        self.known + range * self.known_range
    }
}

impl PairRow {
    /// For `ranges` ranges of `inputs` inputs, in all these kinds; `bytes`: whole numbers as such, too.
    pub(crate) fn new(
        inputs: usize,
        ranges: usize,
        kinds: impl Iterator<Item = PairKind>,
        bytes: bool,
    ) -> Self {
        let mut row = PairRow { inputs, ranges, ..PairRow::default() };
        for kind in kinds {
            match kind {
                PairKind::Bf16 => row.bf16 = true,
                PairKind::Whole(units) if row.whole(&units).is_some() => {}
                PairKind::Whole(units) => {
                    // A range may begin and end within a unit.
                    let known_range = (inputs.div_ceil(units.unit) + 1) * units.words();
                    let pairs_range = inputs.div_ceil(2);
                    let set = Set { units, pairs: 0, pairs_range, bytes: None, known: 0, known_range };
                    row.sets.push(set);
                }
            }
        }
        let mut words = if row.bf16 { row.pairs(ranges) } else { 0 };
        for set in &mut row.sets {
            set.pairs = words;
            words = set.pairs_of(ranges);
        }
        for set in row.sets.iter_mut().filter(|_| bytes) {
            set.bytes = Some(words);
            words += ranges * set.pairs_range;
        }
        for set in &mut row.sets {
            set.known = words;
            words = set.known_of(ranges);
        }
        row.stride = if words == 0 { 0 } else { words.next_multiple_of(2 * LINE) + LINE };
        row
    }

    /// Where the pairs of bf16 of range `range` begin. Each range is filled up to whole ones.
    pub(crate) fn pairs(&self, range: usize) -> usize {
        range * self.inputs.div_ceil(2)
    }

    /// Whether anybody takes whole numbers.
    pub(crate) fn has_whole(&self) -> bool {
        !self.sets.is_empty()
    }

    /// The pairs of whole numbers in such units; `None` where nobody takes them.
    pub(crate) fn whole(&self, units: &Units) -> Option<&Set> {
        self.sets.iter().find(|set| set.units == *units)
    }

    /// Writes a row.
    ///
    /// # Safety
    /// `x` holds the inputs of all ranges, bf16 all, and `out` room for a row.
    pub(crate) unsafe fn fill(&self, kernels: &Kernels, x: *const f32, out: *mut i32) {
        let inputs = self.inputs;
        for range in 0..self.ranges {
            // SAFETY: the caller's; the last pair is written whole before its first half.
            unsafe {
                let x = x.add(range * inputs);
                if self.bf16 {
                    let pairs = out.add(self.pairs(range));
                    *pairs.add(inputs.div_ceil(2) - 1) = 0;
                    (kernels.narrow)(x, pairs.cast(), inputs);
                }
                let Some(whole) = kernels.whole else { continue };
                let octets = (range * inputs / 8, (range + 1) * inputs / 8);
                for set in &self.sets {
                    let (words, known) = (out.add(set.pairs_of(range)), out.add(set.known_of(range)));
                    (whole.inputs)(&WholeInputs { x, octets, units: set.units, out: words, known });
                    if let Some((apart, bytes)) = whole.apart.zip(set.bytes_of(range)) {
                        apart(words, inputs, out.add(bytes).cast());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{PairKind, PairRow, Units};
    use crate::kernel::ORDER;
    use crate::level::Level;

    const UNITS: Units = Units { unit: 32, part: 32, scales: false, zero: 0, offsets: true, bits: 15 };

    /// Ranges that begin and end within units and groups: each has its own whole numbers, for all kinds and at all levels.
    #[test]
    fn units_are_those_of_each_range() {
        let (inputs, ranges) = (40, 4);
        let x: Vec<f32> = (0..inputs * ranges)
            .map(|at| (at % 13) as f32 - 5.0 + if at % 37 == 0 { 2000.0 } else { 0.0 })
            .map(|x| half::bf16::from_f32(x).to_f32())
            .collect();
        let all = [
            UNITS,
            Units { unit: 16, part: 16, bits: 12, ..UNITS },
            Units { unit: 64, part: 16, bits: 13, scales: true, ..UNITS },
            Units { unit: 64, part: 16, zero: 32, scales: true, offsets: false, ..UNITS },
        ];
        let kinds = all.into_iter().chain([UNITS]).map(PairKind::Whole).chain([PairKind::Bf16]);
        let row = PairRow::new(inputs, ranges, kinds, true);
        assert_eq!(row.stride % 32, 16);
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            if level.kernels().whole.is_none() {
                continue;
            }
            let apart = level.kernels().whole.is_some_and(|whole| whole.apart.is_some());
            let mut out = vec![0i32; row.stride];
            // SAFETY: the level is available, and both have the row's lengths.
            unsafe { row.fill(level.kernels(), x.as_ptr(), out.as_mut_ptr()) };
            for units in all {
                let set = row.whole(&units).unwrap();
                for range in 0..ranges {
                    let (from, to) = (range * inputs, (range + 1) * inputs);
                    let (words, bytes) = (set.pairs_of(range), set.bytes_of(range).unwrap());
                    let mut next = from;
                    for known in out[set.known_of(range)..].chunks(units.words()) {
                        let end = to.min((next / units.unit + 1) * units.unit);
                        let factor = f32::from_bits(known[0] as u32);
                        let largest = x[next..end].iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                        let most = (1 << units.bits) as f32;
                        assert!(
                            (most / 2.0..most).contains(&(largest / factor)),
                            "{level}: {factor} for {largest}"
                        );
                        let mut totals = vec![0i32; units.parts()];
                        for (k, x) in (next..end).zip(&x[next..end]) {
                            let half = out[words + (k - from) / 2] >> (k % 2 * 16) << 16 >> 16;
                            let at = format!("{level}, {units:?}, input {k}");
                            if apart {
                                let byte = |at: usize| (out[bytes + at / 4] >> (at % 4 * 8)) as u8;
                                let place = (k - from) / 8 * 8
                                    + ORDER.iter().position(|input| *input == (k - from) % 8).unwrap();
                                let (upper, lower) = (byte(place) as i8, byte(inputs + place));
                                assert_eq!(i32::from(upper) * 256 + i32::from(lower), half, "{at}");
                            }
                            assert!((half as f32 * factor - x).abs() <= factor / 2.0, "{at}");
                            let exact = x.abs() >= largest / (1 << (units.bits - 8)) as f32;
                            assert!(half as f32 * factor == *x || !exact, "{at}");
                            totals[k % units.unit / units.part] += half;
                        }
                        for part in next % units.unit / units.part..(end - 1) % units.unit / units.part + 1 {
                            let want = match units.zero {
                                0 => (totals[part] as f32 * factor).to_bits() as i32,
                                zero => -zero * totals[part],
                            };
                            assert_eq!(
                                known[1 + part],
                                want,
                                "{level}, {units:?}, range {range}, group {part}"
                            );
                        }
                        next = end;
                        if end == to {
                            break;
                        }
                    }
                }
            }
            // The pairs of bf16 lie before them.
            assert_eq!(out[row.pairs(1)] as u32, x[41].to_bits() & 0xffff_0000 | x[40].to_bits() >> 16);
        }
        assert_eq!(row.whole(&Units { part: 8, ..UNITS }), None);
    }

    /// What is not a number makes the first unit's factor none, which is part of all sums.
    #[test]
    fn no_number_becomes_one() {
        let row = PairRow::new(64, 1, [PairKind::Whole(UNITS)].into_iter(), false);
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                if level.kernels().whole.is_none() {
                    continue;
                }
                let mut x = [1.0f32; 64];
                x[40] = bad;
                let mut out = vec![0i32; row.stride];
                // SAFETY: the level is available, and both have the row's lengths.
                unsafe { row.fill(level.kernels(), x.as_ptr(), out.as_mut_ptr()) };
                let known = row.whole(&UNITS).unwrap().known_of(0);
                assert!(f32::from_bits(out[known] as u32).is_nan(), "{level}, {bad}");
            }
        }
    }

    /// Nothing to make where nobody takes pairs.
    #[test]
    fn rows_without_pairs_are_empty() {
        assert_eq!(PairRow::new(64, 1, std::iter::empty(), true).stride, 0);
    }
}
