//! Units where panels are read: what makes groups of them, and what their sums are scaled by.

use super::super::Scaled;
use super::super::codes::{Scale, scale_of, scaled_form, unit_scale};
use super::PANELS;
use super::multiply::{Multiply, Words};
use crate::lanes::{E2M1, IQ4, LANES, Lanes};

/// Where scales and offsets lie in the buffer, behind the codes of a unit: a line per panel, and one per group and panel.
pub(super) const SCALES: usize = Scaled::UNIT_MAX / 2 * PANELS * LANES;
pub(super) const OFFSETS: usize = SCALES + PANELS * LANES;
const _: () = assert!(OFFSETS + Scaled::PARTS_MAX * PANELS * LANES <= Scaled::BUFFER_FLOATS);

/// Whether there are forms of a code whose groups have whole numbers as scales.
pub(super) const fn has_scales(code: usize) -> bool {
    matches!(code, 2..=6 | IQ4)
}

/// Whether such codes count from a zero.
pub(super) const fn has_zero(code: usize) -> bool {
    matches!(scaled_form(code).scale, Scale::Signed(_))
}

/// Octets of a chunk that are taken together: all, or half where groups may be of 16. `scales`: of such forms, or of codes that are
/// [`halved`].
pub(super) const fn together(code: usize, scales: bool) -> usize {
    if code == 6 || scales && (scaled_form(code).group == 16 || halved(code)) { 2 } else { 4 }
}

/// Whether groups of such codes, which have no whole numbers as scales, may be of 16 as well as of whole chunks (NVFP4).
pub(super) const fn halved(code: usize) -> bool {
    code == E2M1
}

/// Octets `[from, to)` of a block, of one unit; its groups among them are `[parts.0, parts.1)` of the unit's.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    pub(super) octets: (usize, usize),
    pub(super) parts: (usize, usize),
}

impl Unit {
    /// The `count` octets from octet `at` of a block on.
    #[inline(always)]
    pub(super) fn new(s: &Scaled<'_>, at: usize, count: usize) -> Self {
        let shift = s.units.part_shift();
        let first = at & (s.units.unit / 8 - 1);
        let parts = (first >> shift, (first + count + (1 << shift) - 1) >> shift);
        Unit { octets: (at, at + count), parts }
    }

    /// Group `part` of the unit, in its block.
    #[inline(always)]
    pub(super) fn group(&self, s: &Scaled<'_>, part: usize) -> usize {
        (self.octets.0 >> s.units.part_shift() & !(s.units.parts() - 1)) + part
    }
}

/// What codes of a group become before they are multiplied, where units have several groups.
#[derive(Clone, Copy)]
pub(super) struct Change<W, const P: usize> {
    zero: W,
    scales: [W; P],
}

impl<W: Words, const P: usize> Change<W, P> {
    /// Nothing that anybody asks for.
    #[inline(always)]
    pub(super) unsafe fn none() -> Self {
        // SAFETY: register arithmetic of this level.
        unsafe { Change { zero: W::splat(0), scales: [W::splat(0); P] } }
    }

    /// That of group `group` of the blocks of some panels.
    #[inline(always)]
    pub(super) unsafe fn of<const CODE: usize>(s: &Scaled<'_>, block: *const u8, group: usize) -> Self {
        // A closure would be a function of its own, without these instructions.
        // SAFETY: the caller's blocks.
        unsafe {
            let mut scales = whole_scales::<W, CODE, P>(s, block, group);
            for scale in &mut scales {
                *scale = scale.twice();
            }
            Change { zero: W::splat(s.units.zero).twice(), scales }
        }
    }

    /// The codes of panel `p`, changed.
    #[inline(always)]
    pub(super) unsafe fn made<const CODE: usize, const SCALES: bool>(&self, codes: W, p: usize) -> W {
        // SAFETY: register arithmetic of this level.
        unsafe {
            match const { (SCALES, has_zero(CODE)) } {
                (true, true) => codes.halves_less(self.zero).halves_times(self.scales[p]),
                (true, false) => codes.halves_times(self.scales[p]),
                (false, _) => codes,
            }
        }
    }
}

/// The whole numbers that are scales of group `group` of the blocks of some panels.
#[inline(always)]
pub(super) unsafe fn whole_scales<W: Words, const CODE: usize, const P: usize>(
    s: &Scaled<'_>,
    block: *const u8,
    group: usize,
) -> [W; P] {
    let first = s.form.scale.first();
    // SAFETY: the caller's blocks.
    unsafe {
        let mut scales = [W::splat(0); P];
        for (p, scale) in scales.iter_mut().enumerate() {
            let scales = block.add(p * s.panel_bytes + first);
            let line = scales.wrapping_add(group * const { scaled_form(CODE).scale.stride() });
            *scale = match const { scaled_form(CODE).scale } {
                Scale::Signed(_) => W::bytes(line),
                Scale::Fours => W::four(line),
                _ => W::six(scales, group),
            };
        }
        scales
    }
}

/// Asks for the scales of a unit of `P` panels, `block` being where the first one's are.
#[inline(always)]
pub(super) unsafe fn ask_for_scales<M: Multiply, const P: usize>(
    s: &Scaled<'_>,
    unit: Unit,
    block: *const u8,
) {
    let stride = s.form.scale.stride();
    let at = s.form.scale.first() + unit.group(s, 0) * stride;
    for p in 0..P {
        for line in (0..s.units.parts() * stride).step_by(64) {
            // SAFETY: any address will do.
            unsafe { M::Floats::prefetch(block.wrapping_add(p * s.panel_bytes + at + line)) };
        }
    }
}

/// What the sums of a unit of the blocks of some panels are scaled by.
#[inline(always)]
pub(super) unsafe fn unit_scales<M: Multiply, const P: usize>(
    s: &Scaled<'_>,
    block: *const u8,
    unit: Unit,
) -> [M::Floats; P] {
    // A closure would be a function of its own, without these instructions.
    // SAFETY: the caller's blocks.
    unsafe {
        let mut scales = [M::Floats::splat(0.0); P];
        for (p, scale) in scales.iter_mut().enumerate() {
            let block = block.add(p * s.panel_bytes);
            *scale = unit_scale::<M::Floats>(s.form, block, unit.group(s, unit.parts.0), &s.units);
        }
        scales
    }
}

/// The offsets of group `group` of the blocks of some panels.
#[inline(always)]
pub(super) unsafe fn offsets<M: Multiply, const P: usize>(
    s: &Scaled<'_>,
    block: *const u8,
    group: usize,
) -> [M::Floats; P] {
    // SAFETY: the caller's blocks.
    unsafe {
        let mut offsets = [M::Floats::splat(0.0); P];
        for (p, offset) in offsets.iter_mut().enumerate() {
            (_, *offset) = scale_of::<M::Floats>(s.form, block.add(p * s.panel_bytes), group);
        }
        offsets
    }
}

/// Writes a unit's scales and offsets to the buffer.
#[inline(always)]
pub(super) unsafe fn scale_unit<M: Multiply, const P: usize>(s: &Scaled<'_>, block: *const u8, unit: Unit) {
    // SAFETY: the caller's blocks, and room for these.
    unsafe {
        for (p, scale) in unit_scales::<M, P>(s, block, unit).into_iter().enumerate() {
            scale.store(s.buffer.add(SCALES + p * LANES));
        }
        if s.units.offsets {
            for part in unit.parts.0..unit.parts.1 {
                let group = unit.group(s, part);
                for (p, offset) in offsets::<M, P>(s, block, group).into_iter().enumerate() {
                    offset.store(s.buffer.add(OFFSETS + (part * P + p) * LANES));
                }
            }
        }
    }
}
