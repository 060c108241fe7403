//! Whole numbers in tiles of bytes (AMX), of more rows than are few: inputs come as their upper and their lower bytes, and codes that were
//! multiplied by whole scales are taken apart likewise. The products of such bytes, each moved to its place, add up to the very whole
//! numbers of [`super::words`], so rows have the same bits here and there.
//!
//! Some units of two panels at a time become tiles of weights in the first cache, by which all rows pass, 16 after 16. Sums of
//! tiles go through memory to be scaled, which a processor may do while it multiplies the next.

use std::arch::x86_64::*;

use super::super::ahead::behind;
use super::super::bytes::ORDER;
use super::super::bytes_vnni::octet_of;
use super::super::codes::Cursor;
use super::super::tiles::{self, ROW_BYTES, ROWS, Shape};
use super::few::most;
use super::multiply::Words;
use super::tile::factored;
use super::unit::{Change, Unit, ask_for_scales, has_scales, offsets, unit_scales};
use super::words::WordsVnni;
use super::{AHEAD_BYTES, OCTETS_DEEP, PANELS, Scaled, clear, each_row, few_rows};
use crate::lanes::avx512::Avx512;
use crate::lanes::{LANES, Lanes};

/// Units that rows pass by at once at most, which are a unit's inputs together at most: sums of the tiles of all stay in the first cache.
const UNITS: usize = 4;
/// The same where scales are whole numbers, which make more sums.
const UNITS_SCALES: usize = 2;

/// Bytes of the weights of one panel: all lower bytes, and where scales are whole numbers all upper ones behind them.
const PLANE: usize = Scaled::UNIT_MAX * LANES;
const PANEL: usize = 2 * PLANE;
/// Where things lie in the buffer, in words, behind the weights: of each unit a line of scales per panel; of each group one of offsets; and of
/// each unit and panel the tiles of sums, those of the most significant bytes first.
const SCALE_LINES: usize = PANELS * PANEL / size_of::<f32>();
const OFFSET_LINES: usize = SCALE_LINES + UNITS * PANELS * LANES;
const SUMS: usize = OFFSET_LINES + Scaled::PARTS_MAX * PANELS * LANES;
/// Words of a tile of sums.
const TILE: usize = ROWS * LANES;
const _: () = assert!(SUMS + UNITS * PANELS * 2 * TILE <= Scaled::BUFFER_FLOATS);
const _: () = assert!(UNITS_SCALES * 3 <= UNITS * 2);

/// A unit among those that rows pass by together.
#[derive(Clone, Copy)]
struct Turn {
    /// Its inputs, and the first one's place behind the first unit's first.
    inputs: usize,
    first: usize,
    /// Where its weights begin, as an input's place.
    weights: usize,
    /// Groups of it.
    parts: (usize, usize),
}

/// All rows by all panels, on `tiles`.
#[inline(always)]
pub(super) unsafe fn by_tiles<U: tiles::Unit, const CODE: usize>((tiles, s): (&mut U, &Scaled<'_>)) {
    // SAFETY: the caller's.
    unsafe {
        if s.rows <= most::<WordsVnni>(s.form) {
            return few_rows::<WordsVnni, CODE>(s);
        }
        let rows = s.rows.min(ROWS);
        tiles.configure(&Shape::new(rows, rows, depth(s) / 4));
        for range in 0..s.ranges {
            for (part, fresh) in s.range(range).deep(OCTETS_DEEP) {
                match const { has_scales(CODE) } && s.units.scales {
                    true => panels::<U, CODE, true>(tiles, &part, fresh),
                    false => panels::<U, CODE, false>(tiles, &part, fresh),
                }
            }
        }
        tiles.release();
    }
}

/// Inputs of a tile: a unit's, or as many as a row of a tile has bytes.
fn depth(s: &Scaled<'_>) -> usize {
    s.units.unit.min(ROW_BYTES)
}

/// All panels, two at a time while there are so many. `fresh`: from zero on.
#[inline(always)]
unsafe fn panels<U: tiles::Unit, const CODE: usize, const SCALES: bool>(
    tiles: &mut U,
    s: &Scaled<'_>,
    fresh: bool,
) {
    // SAFETY: panels stay within the product.
    unsafe {
        for panel in (0..s.panels).step_by(PANELS) {
            match s.panels - panel {
                1 => strip::<U, CODE, SCALES, 1>(tiles, s, fresh, panel),
                _ => strip::<U, CODE, SCALES, PANELS>(tiles, s, fresh, panel),
            }
        }
    }
}

/// All rows by `P` panels, some units after some units.
#[inline(always)]
unsafe fn strip<U: tiles::Unit, const CODE: usize, const SCALES: bool, const P: usize>(
    tiles: &mut U,
    s: &Scaled<'_>,
    fresh: bool,
    panel: usize,
) {
    let together = (Scaled::UNIT_MAX / s.units.unit).min(const { if SCALES { UNITS_SCALES } else { UNITS } });
    let mut cursor = Cursor::by(s.form, s.units.unit, s.octets.0);
    let mut left = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, bytes the rows and inputs, acc the rows and panels, the buffer room for so many units.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let out = s.acc.add(panel * LANES);
        if fresh {
            clear::<WordsVnni, P>(s, out);
        }
        let (mut x, mut known) = (s.bytes, s.known);
        let mut turns = [Turn { inputs: 0, first: 0, weights: 0, parts: (0, 0) }; UNITS];
        while left > 0 {
            let (mut units, mut inputs) = (0, 0);
            while units < together && left > 0 {
                let count = cursor.count(left);
                let unit = Unit::new(s, cursor.at, count);
                let base = first.add(cursor.base);
                let behind = behind(s.panel_bytes, P * s.panel_bytes, cursor.base, AHEAD_BYTES / P);
                ask_for_scales::<WordsVnni, P>(s, unit, base.wrapping_add(behind));
                let turn = Turn {
                    inputs: count * 8,
                    first: inputs,
                    weights: units * s.units.unit,
                    parts: unit.parts,
                };
                take_apart::<CODE, SCALES, P>(s, base, behind, unit, turn.weights);
                take_scales::<P>(s, base, unit, units);
                turns[units] = turn;
                (units, inputs, left) = (units + 1, inputs + turn.inputs, left - count);
                cursor.pass(s.form, count);
            }
            let turns = turns.get_unchecked(..units);
            let mut row = 0;
            while row < s.rows {
                // A last tile has rows of the one before, too, so that all tiles are of one size.
                let (top, end) = (row.min(s.rows.saturating_sub(ROWS)), s.rows.min(row + ROWS));
                let x = x.add(top * s.x_stride * size_of::<i32>());
                multiply::<U, SCALES, P>(tiles, s, x, turns);
                let (known, out) = (s.row_of(known, row), s.sums_of(out, row));
                scale::<SCALES, P>(s, turns, (row - top, end - row), known, out);
                row = end;
            }
            x = x.add(inputs);
            known = known.wrapping_add(units * s.units.words());
        }
    }
}

/// Takes the codes of a unit apart into tiles, which are filled up with zeros: of each panel all fours of inputs, of 16 outputs each, from
/// input `at` of the buffer on. Codes count from their zero.
#[inline(always)]
unsafe fn take_apart<const CODE: usize, const SCALES: bool, const P: usize>(
    s: &Scaled<'_>,
    base: *const u8,
    behind: usize,
    unit: Unit,
    at: usize,
) {
    let (chunk_bytes, scale_bytes) = (s.form.chunk_bytes(), s.form.scale_bytes());
    let (first, end) = unit.octets;
    // SAFETY: the panels have these octets, the buffer room for them.
    unsafe {
        let out = s.buffer.cast::<u8>().add(at * LANES);
        let zero = _mm512_set1_epi8(s.units.zero as u8 as i8);
        let mut octet = first;
        while octet < end {
            let group = octet >> s.units.part_shift();
            let change = match const { SCALES } {
                true => Change::of::<CODE>(s, base, group),
                false => Change::none(),
            };
            let last = end.min((group + 1) << s.units.part_shift());
            for octet in octet..last {
                for p in 0..P {
                    let chunk = base.add(p * s.panel_bytes + scale_bytes + octet / 4 * chunk_bytes);
                    if octet % 4 == 0 {
                        let ahead = chunk.wrapping_add(behind);
                        for line in (0..chunk_bytes).step_by(64) {
                            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast());
                        }
                    }
                    let out = out.add(p * PANEL + (octet - first) * 2 * ROW_BYTES);
                    for (half, codes) in octet_of::<CODE>(chunk, octet % 4).into_iter().enumerate() {
                        let out = out.add(half * ROW_BYTES);
                        match const { SCALES } {
                            true => {
                                let (upper, lower) = scaled::<CODE, P>(&change, codes, p);
                                _mm512_store_si512(out.cast(), lower);
                                _mm512_store_si512(out.add(PLANE).cast(), upper);
                            }
                            false => _mm512_store_si512(out.cast(), _mm512_sub_epi8(codes, zero)),
                        }
                    }
                }
            }
            octet = last;
        }
        let fours = (end - first) * 2;
        for line in fours..fours.next_multiple_of(depth(s) / 4) {
            for plane in (0..P * PANEL).step_by(const { if SCALES { PLANE } else { PANEL } }) {
                _mm512_store_si512(out.add(plane + line * ROW_BYTES).cast(), _mm512_setzero_si512());
            }
        }
    }
}

/// The upper and the lower bytes of codes of panel `p` times their scales.
#[inline(always)]
unsafe fn scaled<const CODE: usize, const P: usize>(
    change: &Change<__m512i, P>,
    codes: __m512i,
    p: usize,
) -> (__m512i, __m512i) {
    /// Bits of the mask from the first, the others from the second.
    const SELECT: i32 = 0xca;
    // SAFETY: register arithmetic of this level.
    unsafe {
        let low = _mm512_set1_epi16(0xff);
        let even = change.made::<CODE, true>(_mm512_and_si512(codes, low), p);
        let odd = change.made::<CODE, true>(_mm512_srli_epi16::<8>(codes), p);
        (
            _mm512_ternarylogic_epi32::<SELECT>(low, _mm512_srli_epi16::<8>(even), odd),
            _mm512_ternarylogic_epi32::<SELECT>(low, even, _mm512_slli_epi16::<8>(odd)),
        )
    }
}

/// Puts what a unit's sums are scaled by, and the offsets of its groups, into the buffer as those of unit `at`.
#[inline(always)]
unsafe fn take_scales<const P: usize>(s: &Scaled<'_>, base: *const u8, unit: Unit, at: usize) {
    // SAFETY: the caller's blocks, and room for these.
    unsafe {
        for (p, scale) in unit_scales::<WordsVnni, P>(s, base, unit).into_iter().enumerate() {
            scale.store(s.buffer.add(SCALE_LINES + (at * P + p) * LANES));
        }
        if s.units.offsets {
            for part in unit.parts.0..unit.parts.1 {
                let offsets = offsets::<WordsVnni, P>(s, base, unit.group(s, part));
                for (p, offset) in offsets.into_iter().enumerate() {
                    offset
                        .store(s.buffer.add(OFFSET_LINES + ((at * s.units.parts() + part) * P + p) * LANES));
                }
            }
        }
    }
}

/// Products of a tile of rows, whose upper bytes are at `x`, by the units in the buffer: tiles of sums.
#[inline(always)]
unsafe fn multiply<U: tiles::Unit, const SCALES: bool, const P: usize>(
    tiles: &mut U,
    s: &Scaled<'_>,
    x: *const u8,
    turns: &[Turn],
) {
    // SAFETY: bytes have these rows and inputs. What is read behind a unit's, less than a line, is multiplied by zeros, and rows have that
    // much behind their last.
    unsafe {
        let mut sums = s.buffer.add(SUMS).cast::<u8>();
        for turn in turns {
            let (x, w) = (x.add(turn.first), s.buffer.cast::<u8>().cast_const().add(turn.weights * LANES));
            sums = match const { SCALES } {
                true => two_planes::<U, P>(tiles, s, x, w, turn.inputs, sums),
                // Codes that count from a zero have signs then.
                false if s.units.zero == 0 => one_plane::<U, P, false>(tiles, s, x, w, turn.inputs, sums),
                false => one_plane::<U, P, true>(tiles, s, x, w, turn.inputs, sums),
            };
        }
    }
}

/// Products by a unit whose weights are bytes; returns what lies behind its sums.
#[inline(always)]
unsafe fn one_plane<U: tiles::Unit, const P: usize, const SIGNED: bool>(
    tiles: &mut U,
    s: &Scaled<'_>,
    x: *const u8,
    w: *const u8,
    inputs: usize,
    sums: *mut u8,
) -> *mut u8 {
    let (stride, lower) = (s.x_stride * size_of::<i32>(), s.bytes_range / 2);
    let tile = const { TILE * size_of::<i32>() };
    // SAFETY: the caller's.
    unsafe {
        tiles.zero::<0>();
        tiles.zero::<1>();
        if const { P > 1 } {
            tiles.zero::<2>();
            tiles.zero::<3>();
        }
        let mut k = 0;
        while k < inputs {
            let (x, w) = (x.add(k), w.add(k * LANES));
            k += depth(s);
            tiles.load::<4>(x, stride);
            tiles.load::<5>(x.add(lower), stride);
            tiles.load::<6>(w, ROW_BYTES);
            tiles.multiply_bytes::<0, 4, 6, true, SIGNED>();
            tiles.multiply_bytes::<1, 5, 6, false, SIGNED>();
            if const { P > 1 } {
                tiles.load::<7>(w.add(PANEL), ROW_BYTES);
                tiles.multiply_bytes::<2, 4, 7, true, SIGNED>();
                tiles.multiply_bytes::<3, 5, 7, false, SIGNED>();
            }
        }
        tiles.store::<0>(sums, ROW_BYTES);
        tiles.store::<1>(sums.add(tile), ROW_BYTES);
        if const { P > 1 } {
            tiles.store::<2>(sums.add(2 * tile), ROW_BYTES);
            tiles.store::<3>(sums.add(3 * tile), ROW_BYTES);
        }
        sums.add(2 * P * tile)
    }
}

/// Products by a unit whose weights are words of two bytes; returns what lies behind its sums.
#[inline(always)]
unsafe fn two_planes<U: tiles::Unit, const P: usize>(
    tiles: &mut U,
    s: &Scaled<'_>,
    x: *const u8,
    w: *const u8,
    inputs: usize,
    mut sums: *mut u8,
) -> *mut u8 {
    let (stride, lower) = (s.x_stride * size_of::<i32>(), s.bytes_range / 2);
    let tile = const { TILE * size_of::<i32>() };
    // SAFETY: the caller's.
    unsafe {
        for p in 0..P {
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            let mut k = 0;
            while k < inputs {
                let (x, w) = (x.add(k), w.add(p * PANEL + k * LANES));
                k += depth(s);
                tiles.load::<4>(x, stride);
                tiles.load::<6>(w.add(PLANE), ROW_BYTES);
                tiles.multiply_bytes::<0, 4, 6, true, true>();
                tiles.load::<7>(w, ROW_BYTES);
                tiles.multiply_bytes::<1, 4, 7, true, false>();
                tiles.load::<5>(x.add(lower), stride);
                tiles.multiply_bytes::<2, 5, 7, false, false>();
                tiles.multiply_bytes::<1, 5, 6, false, true>();
            }
            tiles.store::<0>(sums, ROW_BYTES);
            tiles.store::<1>(sums.add(tile), ROW_BYTES);
            tiles.store::<2>(sums.add(2 * tile), ROW_BYTES);
            sums = sums.add(3 * tile);
        }
        sums
    }
}

/// Scales the sums of `count` rows from row `first` of the tiles on, and adds them to the totals at `out`.
#[inline(always)]
unsafe fn scale<const SCALES: bool, const P: usize>(
    s: &Scaled<'_>,
    turns: &[Turn],
    (first, count): (usize, usize),
    known: *const i32,
    out: *mut f32,
) {
    /// As many as stay in registers.
    const TOGETHER: usize = 4;
    let mut row = 0;
    while row < count {
        // SAFETY: the caller's rows, and the buffer's sums.
        unsafe {
            let (known, out) = (s.row_of(known, row), s.sums_of(out, row));
            let sums = s.buffer.add(SUMS + (first + row) * LANES);
            row += match count - row {
                TOGETHER.. => scale_rows::<SCALES, TOGETHER, P>(s, turns, known, out, sums),
                _ => scale_rows::<SCALES, 1, P>(s, turns, known, out, sums),
            };
        }
    }
}

/// Scales the sums of `R` rows; says how many those are. As [`super::tile::finish`], unit after unit.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // panels index totals, scales and addresses alike
unsafe fn scale_rows<const SCALES: bool, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    turns: &[Turn],
    mut known: *const i32,
    out: *mut f32,
    sums: *const f32,
) -> usize {
    let kinds = const { if SCALES { 3 } else { 2 } };
    // SAFETY: the caller's.
    unsafe {
        let mut totals = [[Avx512::splat(0.0); P]; R];
        each_row!(R, r => {
            for (p, total) in totals[r].iter_mut().enumerate() {
                *total = Avx512::load(s.sums_of(out, r).add(p * LANES));
            }
        });
        for (at, turn) in turns.iter().enumerate() {
            for p in 0..P {
                let scale = Avx512::load(s.buffer.add(SCALE_LINES + (at * P + p) * LANES));
                let sums = sums.add((at * P + p) * kinds * TILE);
                each_row!(R, r => {
                    let mut sum = <__m512i as Words>::load(sums.add(r * LANES));
                    for kind in 1..kinds {
                        let next = <__m512i as Words>::load(sums.add(kind * TILE + r * LANES));
                        sum = _mm512_slli_epi32::<8>(sum).added(next);
                    }
                    totals[r][p] = totals[r][p].madd(scale, factored::<WordsVnni>(sum, s.row_of(known, r)));
                });
            }
            if s.units.offsets {
                for part in turn.parts.0..turn.parts.1 {
                    let offsets = s.buffer.add(OFFSET_LINES + (at * s.units.parts() + part) * P * LANES);
                    each_row!(R, r => {
                        let inputs = Avx512::splat(*s.row_of(known, r).add(1 + part).cast());
                        for (p, total) in totals[r].iter_mut().enumerate() {
                            *total = total.madd(Avx512::load(offsets.add(p * LANES)), inputs);
                        }
                    });
                }
            }
            known = known.wrapping_add(s.units.words());
        }
        each_row!(R, r => {
            for (p, total) in totals[r].iter().enumerate() {
                total.store(s.sums_of(out, r).add(p * LANES));
            }
        });
    }
    R
}

/// See [`super::super::WholeKernels::apart`].
#[inline(always)]
pub(super) unsafe fn bytes(words: *const i32, inputs: usize, out: *mut u8) {
    /// Of 64 words in two registers those bytes, upper (1) or lower (0).
    const fn places(byte: usize) -> [u8; 64] {
        let mut places = [0; 64];
        let mut at = 0;
        while at < 64 {
            places[at] = (2 * (at / 8 * 8 + ORDER[at % 8]) + byte) as u8;
            at += 1;
        }
        places
    }
    const PLACES: [[u8; 64]; 2] = [places(1), places(0)];
    let words = words.cast::<i16>();
    // SAFETY: the caller's words, whole octets of them, and room for as many bytes twice.
    unsafe {
        let places = PLACES.each_ref().map(|places| _mm512_loadu_si512(places.as_ptr().cast()));
        for at in (0..inputs).step_by(64) {
            let left = inputs - at;
            // As many as are left, first or last.
            let first = |count: usize| if count < 32 { (1u32 << count) - 1 } else { u32::MAX };
            let low = _mm512_maskz_loadu_epi16(first(left), words.add(at));
            let high = _mm512_maskz_loadu_epi16(first(left.saturating_sub(32)), words.wrapping_add(at + 32));
            let mask = if left < 64 { (1u64 << left) - 1 } else { u64::MAX };
            for (half, places) in places.into_iter().enumerate() {
                let bytes = _mm512_permutex2var_epi8(low, places, high);
                _mm512_mask_storeu_epi8(out.add(half * inputs + at).cast(), mask, bytes);
            }
        }
    }
}
