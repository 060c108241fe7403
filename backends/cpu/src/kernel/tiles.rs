//! Products of bf16 by bf16 in tiles (AMX): 16 rows of x by 16 outputs, 16 pairs of inputs at once, two by two tiles of sums
//! in registers. Panels are K-major pairs already, so a tile of weights is a kilobyte of a panel as it lies; a tile of x is 16
//! rows of pairs as they lie. One order of sums for any number of rows: 16 pairs after 16 pairs from a sum's first input.
//! Whole numbers are multiplied in tiles by [`super::scaled`].
//!
//! The blocking is written once over a [`Unit`]: the processor's, reached by `asm!` as stable Rust has no intrinsics, and
//! a model of it after Intel's description, by which tests run anywhere. With the feature `amx-emulator` the model answers
//! for the processor's instructions, too.

#[cfg(all(feature = "amx-emulator", target_os = "linux"))]
mod emulator;
#[cfg(any(test, feature = "amx-emulator"))]
pub(super) mod model;
pub(super) mod processor;

use super::Pairs;
use crate::lanes::LANES;
pub(crate) use processor::available;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Pairs of inputs of a tile, and inputs.
const PAIRS: usize = 16;
pub(super) const INPUTS: usize = 2 * PAIRS;
/// Bytes of a row of a tile.
pub(super) const ROW_BYTES: usize = 64;
/// Bytes that are asked for ahead of use.
const AHEAD_BYTES: usize = 4096;

/// What has eight tiles. `D`, `A` and `B` are numbers of tiles.
///
/// # Safety
/// Memory must be valid for the rows and bytes per row that tile has; the unit must be configured first.
pub(super) trait Unit {
    /// Gives tiles their sizes, and zeros all.
    unsafe fn configure(&mut self, shape: &Shape);
    unsafe fn zero<const D: usize>(&mut self);
    unsafe fn load<const D: usize>(&mut self, from: *const u8, stride_bytes: usize);
    unsafe fn store<const D: usize>(&mut self, to: *mut u8, stride_bytes: usize);
    /// `D += A B` of f32 and pairs of bf16.
    unsafe fn multiply<const D: usize, const A: usize, const B: usize>(&mut self);
    /// `D += A B` of 32 bits and fours of bytes, with signs or without.
    unsafe fn multiply_bytes<
        const D: usize,
        const A: usize,
        const B: usize,
        const A_SIGNED: bool,
        const B_SIGNED: bool,
    >(
        &mut self,
    );
    /// Ends the use of tiles.
    unsafe fn release(&mut self);
}

/// Sizes of tiles, as the instruction reads them.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}
const _: () = assert!(size_of::<Shape>() == 64);

impl Shape {
    /// Tiles 0 to 3: sums of `low`, `low`, `high` and `high` rows. 4 and 5: `low` and `high` rows of x. 6 and 7: weights.
    /// Sums over `words` pairs, or fours of bytes.
    pub(super) fn new(low: usize, high: usize, words: usize) -> Self {
        let mut shape = Shape { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        // A tile of no rows is not used, but may not have none.
        let high = high.max(1);
        for (tile, rows) in [low, low, high, high].into_iter().enumerate() {
            (shape.rows[tile], shape.row_bytes[tile]) = (rows as u8, ROW_BYTES as u16);
        }
        for (tile, rows) in [(4, low), (5, high)] {
            (shape.rows[tile], shape.row_bytes[tile]) = (rows as u8, (words * 4) as u16);
        }
        for tile in [6, 7] {
            (shape.rows[tile], shape.row_bytes[tile]) = (words as u8, ROW_BYTES as u16);
        }
        shape
    }
}

/// Runs a product of pairs on the processor's tiles.
///
/// # Safety
/// Pointers are valid for what the fields say, and [`available`] said yes.
pub(super) unsafe fn pairs(s: &Pairs) {
    // SAFETY: the caller's.
    unsafe { product(&mut processor::Tiles, s) }
}

/// Runs a product of pairs.
///
/// # Safety
/// Pointers are valid for what the fields say.
unsafe fn product<U: Unit>(unit: &mut U, s: &Pairs) {
    let (whole, rest) = (s.pairs / PAIRS, s.pairs % PAIRS);
    let mut held = None;
    // SAFETY: rows, panels and pairs stay within the product.
    unsafe {
        // The part of K that fills tiles, then what is left: sizes change, so sums pass through memory.
        for (from, tiles, pairs) in [(0, whole, PAIRS), (whole * PAIRS, 1, rest)] {
            if tiles * pairs == 0 {
                continue;
            }
            let fresh = s.fresh && from == 0;
            let mut row = 0;
            while row < s.rows {
                let (low, high) = ((s.rows - row).min(ROWS), (s.rows - row).saturating_sub(ROWS).min(ROWS));
                if held != Some((low, high, pairs)) {
                    unit.configure(&Shape::new(low, high, pairs));
                    held = Some((low, high, pairs));
                }
                for panel in (0..s.panels).step_by(2) {
                    let block = Block { s, row, panel, from, tiles, fresh };
                    match (high > 0, panel + 1 < s.panels) {
                        (true, true) => block.run::<U, true, true>(unit),
                        (true, false) => block.run::<U, true, false>(unit),
                        (false, true) => block.run::<U, false, true>(unit),
                        (false, false) => block.run::<U, false, false>(unit),
                    }
                }
                row += low + high;
            }
        }
        unit.release();
    }
}

/// Up to two tiles of rows by up to two panels, over `tiles` tiles of K from pair `from` on.
struct Block<'a> {
    s: &'a Pairs,
    row: usize,
    panel: usize,
    from: usize,
    tiles: usize,
    fresh: bool,
}

impl Block<'_> {
    /// `HIGH`: there are more than 16 rows; `WIDE`: there are two panels.
    #[inline(always)]
    unsafe fn run<U: Unit, const HIGH: bool, const WIDE: bool>(&self, unit: &mut U) {
        let s = self.s;
        // SAFETY: the product has these rows, panels and pairs; strides are those of its fields, in bytes.
        unsafe {
            let acc = |high: usize, wide: usize| -> *mut u8 {
                s.acc.add((self.row + high * ROWS) * s.acc_stride + (self.panel + wide) * LANES).cast()
            };
            let acc_bytes = s.acc_stride * size_of::<f32>();
            if self.fresh {
                unit.zero::<0>();
                unit.zero::<1>();
                unit.zero::<2>();
                unit.zero::<3>();
            } else {
                unit.load::<0>(acc(0, 0), acc_bytes);
                if WIDE {
                    unit.load::<1>(acc(0, 1), acc_bytes);
                }
                if HIGH {
                    unit.load::<2>(acc(1, 0), acc_bytes);
                }
                if HIGH && WIDE {
                    unit.load::<3>(acc(1, 1), acc_bytes);
                }
            }
            let x_bytes = s.x_stride * size_of::<i32>();
            let mut x = s.x.add(self.row * s.x_stride + self.from).cast::<u8>();
            let mut w = s.w.add(self.panel * s.panel_stride + self.from * 2 * LANES).cast::<u8>();
            let panel_bytes = s.panel_stride * size_of::<u16>();
            for _ in 0..self.tiles {
                if !HIGH {
                    // Weights stream from memory when rows are few.
                    for line in 0..PAIRS {
                        prefetch(w.wrapping_add(AHEAD_BYTES + line * ROW_BYTES));
                        if WIDE {
                            prefetch(w.wrapping_add(panel_bytes + AHEAD_BYTES + line * ROW_BYTES));
                        }
                    }
                }
                unit.load::<4>(x, x_bytes);
                unit.load::<6>(w, ROW_BYTES);
                unit.multiply::<0, 4, 6>();
                if WIDE {
                    unit.load::<7>(w.add(panel_bytes), ROW_BYTES);
                    unit.multiply::<1, 4, 7>();
                }
                if HIGH {
                    unit.load::<5>(x.add(ROWS * x_bytes), x_bytes);
                    unit.multiply::<2, 5, 6>();
                }
                if HIGH && WIDE {
                    unit.multiply::<3, 5, 7>();
                }
                x = x.wrapping_add(PAIRS * size_of::<i32>());
                w = w.wrapping_add(PAIRS * ROW_BYTES);
            }
            unit.store::<0>(acc(0, 0), acc_bytes);
            if WIDE {
                unit.store::<1>(acc(0, 1), acc_bytes);
            }
            if HIGH {
                unit.store::<2>(acc(1, 0), acc_bytes);
            }
            if HIGH && WIDE {
                unit.store::<3>(acc(1, 1), acc_bytes);
            }
        }
    }
}

#[inline(always)]
fn prefetch(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch of any address is harmless.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
}

/// A product whose sums are known: what a unit makes of it, and the same in f64.
struct Trial {
    panels: usize,
    pairs: usize,
    /// Pairs between rows of x.
    stride: usize,
    x: Vec<i32>,
    w: Vec<u16>,
}

impl Trial {
    fn new(rows: usize, panels: usize, pairs: usize) -> Self {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Numbers of either sign between a half and two.
            (state >> 40) as u16 & 0x80ff | 0x3f00
        };
        let stride = pairs + 3;
        let x = (0..rows * stride).map(|_| i32::from(next()) | i32::from(next()) << 16).collect();
        let w = (0..panels * pairs * 2 * LANES).map(|_| next()).collect();
        Trial { panels, pairs, stride, x, w }
    }

    /// Rows `[from, to)` on `unit`, K in two calls cut at pair `cut`.
    fn run<U: Unit>(&self, unit: &mut U, (from, to): (usize, usize), cut: usize) -> Vec<f32> {
        let width = self.panels * LANES;
        let mut acc = vec![f32::NAN; (to - from) * width];
        for (first, last) in [(0, cut), (cut, self.pairs)] {
            if first == last {
                continue;
            }
            // SAFETY: x, w and acc have the sizes that the fields say.
            unsafe {
                product(
                    unit,
                    &Pairs {
                        x: self.x.as_ptr().add(from * self.stride + first),
                        x_stride: self.stride,
                        rows: to - from,
                        w: self.w.as_ptr().add(first * 2 * LANES),
                        panel_stride: self.pairs * 2 * LANES,
                        panels: self.panels,
                        pairs: last - first,
                        acc: acc.as_mut_ptr(),
                        acc_stride: width,
                        fresh: first == 0,
                    },
                );
            }
        }
        acc
    }

    /// The sum of `row` and `output`, and of the sizes of what is added.
    fn expected(&self, row: usize, output: usize) -> (f64, f64) {
        let wide = |half: u16| f64::from(f32::from_bits(u32::from(half) << 16));
        let panel = output / LANES * self.pairs;
        (0..self.pairs).fold((0.0, 0.0), |(sum, size), pair| {
            let x = self.x[row * self.stride + pair] as u32;
            let w = &self.w[((panel + pair) * LANES + output % LANES) * 2..][..2];
            let (a, b) = (wide(x as u16) * wide(w[0]), wide((x >> 16) as u16) * wide(w[1]));
            (sum + a + b, size + a.abs() + b.abs())
        })
    }

    /// Whether all sums of all rows are right to f32.
    fn is_right(&self, got: &[f32]) -> bool {
        let width = self.panels * LANES;
        got.iter().enumerate().all(|(at, got)| {
            let (sum, size) = self.expected(at / width, at % width);
            (f64::from(*got) - sum).abs() <= 1e-6 * size
        })
    }
}

/// Whether products of bytes, of all four kinds, are right, some rows by some fours.
fn bytes_are_right<U: Unit>(unit: &mut U) -> bool {
    const WORDS: usize = 12;
    let (rows, mut state) = (13, 0x2545_f491_4f6c_dd1d_u64);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as u8
    };
    let x: Vec<u8> = (0..rows * WORDS * 4).map(|_| next()).collect();
    let w: Vec<u8> = (0..WORDS * ROW_BYTES).map(|_| next()).collect();
    let mut sums = [const { vec![] }; 4];
    // SAFETY: x, w and sums have the sizes that tiles have.
    unsafe {
        unit.configure(&Shape::new(rows, rows, WORDS));
        unit.zero::<0>();
        unit.zero::<1>();
        unit.zero::<2>();
        unit.zero::<3>();
        unit.load::<4>(x.as_ptr(), WORDS * 4);
        unit.load::<6>(w.as_ptr(), ROW_BYTES);
        unit.multiply_bytes::<0, 4, 6, false, false>();
        unit.multiply_bytes::<1, 4, 6, false, true>();
        unit.multiply_bytes::<2, 4, 6, true, false>();
        unit.multiply_bytes::<3, 4, 6, true, true>();
        sums.iter_mut().for_each(|sums| sums.resize(rows * LANES, 0i32));
        unit.store::<0>(sums[0].as_mut_ptr().cast(), ROW_BYTES);
        unit.store::<1>(sums[1].as_mut_ptr().cast(), ROW_BYTES);
        unit.store::<2>(sums[2].as_mut_ptr().cast(), ROW_BYTES);
        unit.store::<3>(sums[3].as_mut_ptr().cast(), ROW_BYTES);
        unit.release();
    }
    let number = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
    let expected = |row: usize, output: usize, signed: (bool, bool)| -> i32 {
        (0..WORDS * 4)
            .map(|k| {
                let (x, w) = (x[row * WORDS * 4 + k], w[k / 4 * ROW_BYTES + output * 4 + k % 4]);
                number(x, signed.0) * number(w, signed.1)
            })
            .sum()
    };
    sums.iter().zip([(false, false), (false, true), (true, false), (true, true)]).all(|(sums, signed)| {
        sums.iter().enumerate().all(|(at, sum)| *sum == expected(at / LANES, at % LANES, signed))
    })
}

#[cfg(test)]
mod tests {
    use super::model::Tiles;
    use super::*;

    /// The blocking gives right sums for rows, panels and pairs that fill tiles and that do not.
    #[test]
    fn sums_are_right() {
        for rows in [1, 2, 15, 16, 17, 31, 32, 33, 49] {
            for panels in [1, 2, 3] {
                for pairs in [1, 15, 16, 17, 32, 50] {
                    let trial = Trial::new(rows, panels, pairs);
                    let got = trial.run(&mut Tiles::new(), (0, rows), 0);
                    assert!(trial.is_right(&got), "{rows} rows, {panels} panels, {pairs} pairs");
                }
            }
        }
    }

    /// A row has the same bits alone and among others, in one call and in several that cut K at whole tiles.
    #[test]
    fn rows_do_not_meet() {
        let trial = Trial::new(40, 3, 75);
        let all = trial.run(&mut Tiles::new(), (0, 40), 0);
        for (from, to, cut) in [(0, 1, 0), (3, 19, 16), (7, 40, 64), (39, 40, 32)] {
            let part = trial.run(&mut Tiles::new(), (from, to), cut);
            assert_eq!(part, all[from * 48..to * 48], "rows {from} to {to}, cut at {cut}");
        }
    }

    /// So are those of bytes.
    #[test]
    fn whole_numbers_are_right() {
        assert!(bytes_are_right(&mut Tiles::new()));
    }

    /// What a processor that has tiles makes of it, where this is one.
    #[test]
    fn the_processor_agrees_with_the_model() {
        if !available() {
            let emulated = cfg!(all(feature = "amx-emulator", target_os = "linux"));
            assert!(!emulated, "tiles that are emulated compute wrongly");
            println!("this machine has no tiles: not tested");
            return;
        }
        for (rows, panels, pairs) in [(45, 5, 75), (1, 1, 1), (16, 2, 16), (17, 3, 48), (33, 1, 7)] {
            let trial = Trial::new(rows, panels, pairs);
            let model = trial.run(&mut Tiles::new(), (0, rows), 0);
            assert_eq!(trial.run(&mut processor::Tiles, (0, rows), 0), model);
        }
        #[cfg(all(feature = "amx-emulator", target_os = "linux"))]
        assert!(emulator::count() > 0 || processor::has_tiles(), "nothing was emulated");
    }
}
