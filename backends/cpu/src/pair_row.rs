//! How a row of pairs of bf16 lies in memory: the pairs of each range of inputs, and behind them, for every size of groups
//! that the weight's segments have, the sums of each range's inputs by group, which offsets are multiplied by. Made once per
//! row and product (`operand`), read by every task.

use crate::kernel::{CodedPairs, GroupSums, Kernels};

/// Words of 4 bytes to a cache line.
const LINE: usize = 16;

/// The layout of a row, in words: pairs are words, and sums are floats.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PairRow {
    /// Inputs of a range, and ranges.
    inputs: usize,
    ranges: usize,
    /// Inputs of a group, by size of groups.
    groups: Vec<usize>,
    /// Where the sums begin, and how many places those of one range and one size of groups have.
    first_sum: usize,
    pub(crate) range_sums: usize,
    /// From one row to the next: an odd number of cache lines, so that the same pair of several rows does not fall into the
    /// same places of the cache.
    pub(crate) stride: usize,
}

impl PairRow {
    /// For `ranges` ranges of `inputs` inputs, with sums by groups of these sizes.
    pub(crate) fn new(inputs: usize, ranges: usize, groups: impl Iterator<Item = usize>) -> Self {
        let mut groups: Vec<usize> = groups.collect();
        groups.sort_unstable();
        groups.dedup();
        let first_sum = ranges * inputs.div_ceil(2);
        // A range may begin and end within a group.
        let range_sums = groups.first().map_or(0, |smallest| inputs.div_ceil(*smallest) + 1);
        let words = first_sum + groups.len() * ranges * range_sums;
        let stride = words.next_multiple_of(2 * LINE) + LINE;
        PairRow { inputs, ranges, groups, first_sum, range_sums, stride }
    }

    /// Where the pairs of range `range` begin. Each range is filled up to whole ones.
    pub(crate) fn pairs(&self, range: usize) -> usize {
        range * self.inputs.div_ceil(2)
    }

    /// Where the sums of range `range` by groups of `group` inputs begin; `None` where nobody asked for them.
    pub(crate) fn sums(&self, range: usize, group: usize) -> Option<usize> {
        let size = self.groups.iter().position(|size| *size == group)?;
        Some(self.first_sum + (size * self.ranges + range) * self.range_sums)
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
                let pairs = out.add(self.pairs(range));
                *pairs.add(inputs.div_ceil(2) - 1) = 0;
                (kernels.narrow)(x.add(range * inputs), pairs.cast(), inputs);
                let Some(CodedPairs::Scaled { sums, .. }) = kernels.pairs.map(|pairs| pairs.coded) else {
                    continue;
                };
                let octets = (range * inputs / 8, (range + 1) * inputs / 8);
                for group in &self.groups {
                    let Some(at) = self.sums(range, *group) else { continue };
                    sums(&GroupSums { x: pairs, octets, group: group / 8, out: out.add(at).cast() });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::PairRow;
    use crate::level::Level;

    /// Ranges that begin and end within groups: each has the sums of its own part of each group, for all sizes of groups.
    #[test]
    fn sums_are_of_each_range_by_group() {
        if !Level::Avx512Bf16.available() {
            return;
        }
        let (inputs, ranges) = (40, 4);
        let x: Vec<f32> = (0..inputs * ranges).map(|at| (at % 13) as f32 - 5.0).collect();
        let row = PairRow::new(inputs, ranges, [32, 16, 32].into_iter());
        assert_eq!(row.stride % 32, 16);
        let mut out = vec![0i32; row.stride];
        // SAFETY: the level is available, and both have the row's lengths.
        unsafe { row.fill(Level::Avx512Bf16.kernels(), x.as_ptr(), out.as_mut_ptr()) };
        for group in [16, 32] {
            for range in 0..ranges {
                let (from, to) = (range * inputs, (range + 1) * inputs);
                let at = row.sums(range, group).unwrap();
                let mut next = from;
                for told in &out[at..] {
                    let end = to.min((next / group + 1) * group);
                    let sum: f32 = x[next..end].iter().sum();
                    assert_eq!(f32::from_bits(*told as u32), sum, "group of {group}, [{next}, {end})");
                    next = end;
                    if end == to {
                        break;
                    }
                }
                assert_eq!(next, to);
            }
        }
        assert_eq!(row.sums(0, 64), None);
    }
}
