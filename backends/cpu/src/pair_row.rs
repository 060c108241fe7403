//! How a row of pairs lies in memory: the pairs of bf16 of each range of inputs, where a weight's segments take such, and behind
//! them, for every size of groups whose codes are multiplied as whole numbers, the pairs of whole numbers of each range and
//! what its groups have. Made once per row and product (`operand`), read by every task.

use crate::kernel::{Group, Kernels, WholeInputs};

/// Words of 4 bytes to a cache line.
const LINE: usize = 16;
/// Words of what a group has.
const GROUP: usize = size_of::<Group>() / size_of::<i32>();

/// What pairs a product takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairKind {
    Bf16,
    /// Whole numbers, by groups of so many inputs.
    Whole(usize),
}

/// The layout of a row, in words of 4 bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PairRow {
    /// Inputs of a range, and ranges.
    inputs: usize,
    ranges: usize,
    /// Whether there are pairs of bf16.
    bf16: bool,
    /// Inputs of a group, by size of groups.
    groups: Vec<usize>,
    /// Where the groups begin, and how many places those of one range and one size have.
    first_group: usize,
    pub(crate) range_groups: usize,
    /// From one row to the next: an odd number of cache lines, so that the same pair of several rows does not fall into the
    /// same places of the cache. 0 where nobody takes pairs.
    pub(crate) stride: usize,
}

impl PairRow {
    /// For `ranges` ranges of `inputs` inputs, in all these kinds.
    pub(crate) fn new(inputs: usize, ranges: usize, kinds: impl Iterator<Item = PairKind>) -> Self {
        let (mut bf16, mut groups) = (false, Vec::new());
        for kind in kinds {
            match kind {
                PairKind::Bf16 => bf16 = true,
                PairKind::Whole(group) => groups.push(group),
            }
        }
        groups.sort_unstable();
        groups.dedup();
        let sets = usize::from(bf16) + groups.len();
        let first_group = sets * ranges * inputs.div_ceil(2);
        // A range may begin and end within a group.
        let range_groups = groups.first().map_or(0, |smallest| inputs.div_ceil(*smallest) + 1);
        let words = first_group + groups.len() * ranges * range_groups * GROUP;
        let stride = if sets == 0 { 0 } else { words.next_multiple_of(2 * LINE) + LINE };
        PairRow { inputs, ranges, bf16, groups, first_group, range_groups, stride }
    }

    /// Where the pairs of bf16 of range `range` begin. Each range is filled up to whole ones.
    pub(crate) fn pairs(&self, range: usize) -> usize {
        range * self.inputs.div_ceil(2)
    }

    /// Where the pairs of whole numbers of range `range` by groups of `group` inputs begin, and what those groups have; `None`
    /// where nobody takes them.
    pub(crate) fn whole(&self, range: usize, group: usize) -> Option<(usize, usize)> {
        let size = self.groups.iter().position(|size| *size == group)?;
        let words = (usize::from(self.bf16) + size) * self.ranges + range;
        let groups = (size * self.ranges + range) * self.range_groups;
        Some((self.pairs(words), self.first_group + groups * GROUP))
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
                for group in &self.groups {
                    let Some((words, groups)) = self.whole(range, *group) else { continue };
                    let (out, groups) = (out.add(words), out.add(groups).cast());
                    (whole.inputs)(&WholeInputs { x, octets, group: group / 8, out, groups });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Group, PairKind, PairRow};
    use crate::level::Level;

    /// Ranges that begin and end within groups: each has its own whole numbers, for all sizes of groups and at all levels.
    #[test]
    fn groups_are_those_of_each_range() {
        let (inputs, ranges) = (40, 4);
        let x: Vec<f32> = (0..inputs * ranges)
            .map(|at| (at % 13) as f32 - 5.0 + if at % 37 == 0 { 2000.0 } else { 0.0 })
            .map(|x| half::bf16::from_f32(x).to_f32())
            .collect();
        let kinds = [PairKind::Whole(32), PairKind::Bf16, PairKind::Whole(16), PairKind::Whole(32)];
        let row = PairRow::new(inputs, ranges, kinds.into_iter());
        assert_eq!(row.stride % 32, 16);
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            if level.kernels().whole.is_none() {
                continue;
            }
            let mut out = vec![0i32; row.stride];
            // SAFETY: the level is available, and both have the row's lengths.
            unsafe { row.fill(level.kernels(), x.as_ptr(), out.as_mut_ptr()) };
            for group in [16, 32] {
                for range in 0..ranges {
                    let (from, to) = (range * inputs, (range + 1) * inputs);
                    let (words, groups) = row.whole(range, group).unwrap();
                    let mut next = from;
                    for at in 0.. {
                        let end = to.min((next / group + 1) * group);
                        let told = &out[groups + at * 2..][..2];
                        let [factor, sum] = [0, 1].map(|at| f32::from_bits(told[at] as u32));
                        let largest = x[next..end].iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                        assert!(
                            (8192.0..32768.0).contains(&(largest / factor)),
                            "{level}: {factor} for {largest}"
                        );
                        let mut total = 0i32;
                        for (k, x) in (next..end).zip(&x[next..end]) {
                            let half = out[words + (k - from) / 2] >> (k % 2 * 16) << 16 >> 16;
                            let at = format!("{level}, group of {group}, input {k}");
                            assert!((half as f32 * factor - x).abs() <= factor / 2.0, "{at}");
                            assert!(half as f32 * factor == *x || x.abs() < largest / 128.0, "{at}");
                            total += half;
                        }
                        assert_eq!(Group { factor, sum }.sum, total as f32 * factor);
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
        assert_eq!(row.whole(0, 64), None);
    }

    /// What is not a number stays so for the whole row.
    #[test]
    fn no_number_becomes_one() {
        let row = PairRow::new(64, 1, [PairKind::Whole(32)].into_iter());
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
                let (_, groups) = row.whole(0, 32).unwrap();
                let factors = [0, 2].map(|at| f32::from_bits(out[groups + at] as u32));
                assert!(factors.iter().all(|factor| factor.is_nan()), "{level}, {bad}");
            }
        }
    }

    /// Nothing to make where nobody takes pairs.
    #[test]
    fn rows_without_pairs_are_empty() {
        assert_eq!(PairRow::new(64, 1, std::iter::empty()).stride, 0);
    }
}
