//! Products by activations of 8 bits: 32 inputs of a row share a scale, codes and inputs are multiplied as whole numbers,
//! and every 32 inputs (16 where a weight's scale changes) are scaled and added up in ascending K. Whole numbers are exact, so
//! a row's bits depend on the f32 sums alone, whatever multiplies.

use super::codes::{Code, Form, ahead, by_code, octet_of, scale_of};
use crate::lanes::{LANES, Lanes};

/// Inputs that share a scale.
pub(crate) const BLOCK: usize = 32;

/// 32 inputs of a row.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Eighths {
    /// Whole numbers in `[-127, 127]`, each eight in the order [`ORDER`].
    pub(crate) codes: [i8; BLOCK],
    pub(crate) scale: f32,
    /// `scale` times the sum of all codes, of the first 16 and of the last.
    pub(crate) sum: f32,
    pub(crate) halves: [f32; 2],
}

/// Words that a block takes among floats.
pub(crate) const BLOCK_FLOATS: usize = size_of::<Eighths>() / size_of::<f32>();

/// Which input of eight lies where: those whose codes of 4 bits are the lower halves of bytes come first.
pub(crate) const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Rows times some panels; see [`super::Stream`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<'a> {
    pub(crate) form: &'a Form,
    pub(crate) panel: *const u8,
    /// Bytes from one panel to the next.
    pub(crate) panel_bytes: usize,
    pub(crate) panels: usize,
    /// Blocks of 32 inputs.
    pub(crate) blocks: (usize, usize),
    /// `[rows][block]` from the first block on, rows `x_stride` blocks apart.
    pub(crate) x: *const Eighths,
    pub(crate) x_stride: usize,
    pub(crate) rows: usize,
    /// `[rows][panels * 16]`, rows `acc_stride` apart.
    pub(crate) acc: *mut f32,
    pub(crate) acc_stride: usize,
    /// Begin at zero instead of what `acc` holds.
    pub(crate) fresh: bool,
}

impl Form {
    /// Whether codes are whole numbers, and scales such that blocks can be multiplied.
    pub(crate) fn has_blocks(&self) -> bool {
        self.is_whole() && (self.group == 16 || self.group.is_multiple_of(BLOCK))
    }
}

/// All panels and rows of a product: four rows at once, or one.
#[inline(always)]
unsafe fn panels<V: Lanes, const CODE: usize>(s: &Bytes<'_>) {
    for panel in 0..s.panels {
        let mut row = 0;
        // SAFETY: rows and panels stay within the product.
        unsafe {
            while row + 4 <= s.rows {
                tile::<V, CODE, 4>(s, row, panel);
                row += 4;
            }
            while row < s.rows {
                tile::<V, CODE, 1>(s, row, panel);
                row += 1;
            }
        }
    }
}

/// Runs a product.
///
/// # Safety
/// Pointers are valid for what the fields say, the form is whole, and the level's instructions exist.
#[inline(always)]
pub(super) unsafe fn bytes<V: Lanes>(s: &Bytes<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, panels<V>(s)) }
}

/// Where block `block` of a panel is: its scales, the first group of them, and its codes.
#[inline(always)]
pub(super) fn at(form: &Form, block: usize) -> (usize, usize, usize) {
    let per = form.span / BLOCK;
    let base = block / per * form.block_bytes();
    let within = block % per;
    (base, within * BLOCK / form.group, base + form.scale_bytes() + within * form.chunk_bytes())
}

#[inline(always)]
unsafe fn tile<V: Lanes, const CODE: usize, const R: usize>(s: &Bytes<'_>, row: usize, panel: usize) {
    // SAFETY: the panels have these blocks, x the rows and blocks, acc the rows and panels.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [V::splat(0.0); R];
        if !s.fresh {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(out.add(r * s.acc_stride));
            }
        }
        let parts = if s.form.group == 16 { 2 } else { 1 };
        let chunk_bytes = s.form.chunk_bytes();
        for block in s.blocks.0..s.blocks.1 {
            let x = s.x.add(row * s.x_stride + block - s.blocks.0);
            let (base, group, codes) = at(s.form, block);
            for part in 0..parts {
                let mut dots = [V::splat(0.0); R];
                for octet in part * 4 / parts..(part + 1) * 4 / parts {
                    let chunk = first.add(codes);
                    ahead::<V>(chunk, chunk_bytes / 4, octet);
                    let values = octet_of::<V, CODE>(chunk, octet);
                    for (r, dot) in dots.iter_mut().enumerate() {
                        let x = &(*x.add(r * s.x_stride)).codes;
                        for (at, k) in ORDER.into_iter().enumerate() {
                            *dot = dot.madd(values[k], V::splat(f32::from(x[octet * 8 + at])));
                        }
                    }
                }
                let (scale, offset) = scale_of::<V>(s.form, first.add(base), group + part);
                for r in 0..R {
                    let x = &*x.add(r * s.x_stride);
                    let sum = if parts == 1 { x.sum } else { x.halves[part] };
                    let scaled = scale.mul(V::splat(x.scale));
                    acc[r] = acc[r].madd(dots[r], scaled).madd(offset, V::splat(sum));
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            acc.store(out.add(r * s.acc_stride));
        }
    }
}

/// Makes whole numbers of `blocks` times 32 floats.
///
/// # Safety
/// So many floats at `x` and blocks at `out`; the level's instructions exist.
#[inline(always)]
pub(super) unsafe fn quantise<V: Lanes>(x: *const f32, blocks: usize, out: *mut Eighths) {
    for block in 0..blocks {
        // SAFETY: the caller's.
        unsafe {
            let x = x.add(block * BLOCK);
            let zero = V::splat(0.0);
            let (low, high) = (V::load(x), V::load(x.add(LANES)));
            let largest = low.at_least(zero.sub(low)).at_least(high.at_least(zero.sub(high))).peak();
            let (scale, inverse) = match largest {
                // A row of zeros, or smaller than anything that matters.
                ..1e-30 => (0.0, 0.0),
                largest => (largest / 127.0, 127.0 / largest),
            };
            let mut held = [0f32; BLOCK];
            low.mul(V::splat(inverse)).nearest().store(held.as_mut_ptr());
            high.mul(V::splat(inverse)).nearest().store(held.as_mut_ptr().add(LANES));
            let mut codes = [0i8; BLOCK];
            for (octet, eight) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                for (code, k) in eight.iter_mut().zip(ORDER) {
                    // Not-a-number becomes 0 here; the scale keeps it.
                    *code = held[octet * 8 + k] as i8;
                }
            }
            let sum = |codes: &[i8]| codes.iter().map(|code| i32::from(*code)).sum::<i32>() as f32 * scale;
            let (first, last) = codes.split_at(BLOCK / 2);
            let (sum, halves) = (sum(&codes), [sum(first), sum(last)]);
            out.add(block).write(Eighths { codes, scale, sum, halves });
        }
    }
}
