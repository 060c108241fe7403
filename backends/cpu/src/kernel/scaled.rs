//! Quantised weights where the level multiplies pairs of bf16: codes are multiplied as they are, and a group's sum is scaled
//! once. Panels are read one after the other, so that weights stream from memory as small as they are; codes are taken apart
//! in registers for up to 16 rows at once, and for few rows several groups are summed side by side, so that enough sums are
//! in flight. A row's bits depend on neither: within a group it adds pair after pair, then group after group `scale * sum`,
//! then `offset * (sum of the inputs)`, which rows bring along ([`sums`]).

use std::arch::x86_64::*;

use super::codes::{Code, Cursor, E4M3, Form, by_code, scale_of};
use super::pair_codes::{Table, pair_of};
use super::pairs::halves;
use super::{GroupSums, Scaled};
use crate::lanes::LANES;
use crate::lanes::avx512::Avx512;

/// Rows that share a code in registers.
const ROWS: usize = 16;
/// Up to so many rows keep what they add up to in registers, too.
const ROWS_HELD: usize = 8;
/// Octets that all panels pass by before the next, where rows are more than one tile's: 96 rows of them stay in the second
/// cache.
const OCTETS_DEEP: usize = Scaled::INPUTS_DEEP / 8;
/// Bytes that are asked for ahead of use.
const AHEAD_BYTES: usize = 4096;
const LINE_BYTES: usize = 64;

/// Runs a product.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn scaled(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, panels(s)) }
}

/// All panels and rows: panel after panel, and each for all rows while it is in the cache.
#[inline(always)]
unsafe fn panels<const CODE: usize>(s: &Scaled<'_>) {
    let group = s.form.group / 8;
    let mut octet = s.octets.0;
    while octet < s.octets.1 {
        let end = match s.rows <= ROWS {
            true => s.octets.1,
            false => s.octets.1.min((octet / OCTETS_DEEP + 1) * OCTETS_DEEP),
        };
        let (pairs, groups) = ((octet - s.octets.0) * 4, octet / group - s.octets.0 / group);
        for panel in 0..s.panels {
            let mut row = 0;
            while row < s.rows {
                let strided = row * s.x_stride;
                // SAFETY: rows and panels stay within the product, and groups divide what is passed by at once.
                unsafe {
                    let part = Part {
                        form: s.form,
                        panel: s.panel.add(panel * s.panel_bytes),
                        octets: (octet, end),
                        x: s.x.add(strided + pairs),
                        sums: s.sums.wrapping_add(strided + groups),
                        stride: s.x_stride,
                        acc: s.acc.add(row * s.acc_stride + panel * LANES),
                        acc_stride: s.acc_stride,
                        fresh: octet == s.octets.0,
                    };
                    row += match s.rows - row {
                        1 => tile::<CODE, 1, 8>(&part),
                        2 | 3 => tile::<CODE, 2, 8>(&part),
                        4..=7 => tile::<CODE, 4, 4>(&part),
                        8..=11 => tile::<CODE, 8, 2>(&part),
                        12..=15 | 20 | 24 => tile::<CODE, 12, 1>(&part),
                        _ => tile::<CODE, ROWS, 1>(&part),
                    };
                }
            }
        }
        octet = end;
    }
}

/// Some rows by one panel, over some octets.
struct Part<'a> {
    form: &'a Form,
    panel: *const u8,
    octets: (usize, usize),
    /// The first row's pairs at the first octet, and its sums of inputs of the groups from there on.
    x: *const i32,
    sums: *const f32,
    /// Words from one row to the next, of both.
    stride: usize,
    acc: *mut f32,
    acc_stride: usize,
    fresh: bool,
}

/// Where a tile is: octets that are left, and what comes next of the panel and of the rows.
struct At {
    left: usize,
    cursor: Cursor,
    x: *const i32,
    sums: *const f32,
}

/// `R` rows by one panel, `G` groups side by side; says how many rows that were.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn tile<const CODE: usize, const R: usize, const G: usize>(t: &Part<'_>) -> usize {
    let group = t.form.group / 8;
    let cursor = Cursor::new(t.form, t.octets.0);
    let mut at = At { left: t.octets.1 - t.octets.0, cursor, x: t.x, sums: t.sums };
    // SAFETY: the panel has these octets, x and sums the rows and inputs, acc the rows.
    unsafe {
        let table = Table::new::<CODE>();
        let mut held = Held::<R>::begin(t);
        while at.left > 0 {
            // Groups that begin here are nearly always whole, and are made of whole chunks or of a half: shifts are constants.
            let whole = if at.cursor.at.is_multiple_of(group) { at.left / group } else { 0 };
            let (chunks, halves) = (group.is_multiple_of(4), CODE == 6 && group == 2);
            match at.cursor.at % 4 {
                0 if chunks && G > 1 && whole >= G => {
                    groups::<CODE, R, G, 4, 0>(t, &mut at, table, &mut held)
                }
                0 if chunks && whole > 0 => groups::<CODE, R, 1, 4, 0>(t, &mut at, table, &mut held),
                0 if halves && G > 1 && whole >= G => {
                    groups::<CODE, R, G, 2, 0>(t, &mut at, table, &mut held)
                }
                0 if halves && whole > 0 => groups::<CODE, R, 1, 2, 0>(t, &mut at, table, &mut held),
                2 if halves && whole > 0 => groups::<CODE, R, 1, 2, 2>(t, &mut at, table, &mut held),
                _ => some_octets::<CODE, R>(t, &mut at, table, &mut held),
            }
        }
        held.end(t);
    }
    R
}

/// `G` groups, which are chunks (`COUNT` 4) or a half of one (`COUNT` 2); the first begins at octet `FROM` of a chunk.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and groups index sums and addresses alike
unsafe fn groups<const CODE: usize, const R: usize, const G: usize, const COUNT: usize, const FROM: usize>(
    t: &Part<'_>,
    at: &mut At,
    table: Table,
    held: &mut Held<R>,
) {
    let chunks = if COUNT == 4 { t.form.group / 32 } else { 1 };
    let chunk_bytes = const { chunk_bytes_of(CODE) };
    let pairs = COUNT * 4 * chunks;
    // SAFETY: the caller's groups.
    unsafe {
        let mut codes = [std::ptr::null::<u8>(); G];
        let mut scales = [(std::ptr::null::<u8>(), 0); G];
        for g in 0..G {
            let block = t.panel.add(at.cursor.base);
            codes[g] = block.add(t.form.scale_bytes() + at.cursor.at / 4 * chunk_bytes);
            scales[g] = (block, at.cursor.at_group);
            ahead_of_scales(t.form, block, at.cursor.at_group);
            at.cursor.pass(t.form, COUNT * chunks);
        }
        let mut sums = [[_mm512_setzero_ps(); G]; R];
        for chunk in 0..chunks {
            let x = at.x.add(chunk * 16);
            for g in 0..G {
                // The chunk's lines, or half of them.
                let first = (FROM + g * COUNT) % 4 * chunk_bytes / (4 * LINE_BYTES);
                for line in first..first + COUNT * chunk_bytes / (4 * LINE_BYTES) {
                    let bytes = chunk * chunk_bytes + AHEAD_BYTES + line * LINE_BYTES;
                    _mm_prefetch::<_MM_HINT_T0>(codes[g].wrapping_add(bytes).cast());
                }
            }
            for octet in 0..COUNT {
                for pair in 0..4 {
                    for g in 0..G {
                        // Two halves of a chunk follow each other.
                        let octet_of_chunk = (FROM + g * COUNT) % 4 + octet;
                        let codes = codes[g].add(chunk * chunk_bytes);
                        let weights = halves(pair_of::<CODE>(codes, octet_of_chunk, pair, table));
                        for r in 0..R {
                            let x = x.add(r * t.stride + g * pairs + octet * 4 + pair);
                            let factor = halves(_mm512_set1_epi32(*x));
                            sums[r][g] = _mm512_dpbf16_ps(sums[r][g], weights, factor);
                        }
                    }
                }
            }
        }
        for g in 0..G {
            let (block, group) = scales[g];
            let mut one = [_mm512_setzero_ps(); R];
            for r in 0..R {
                one[r] = sums[r][g];
            }
            check_sums::<CODE>(t, at.x.wrapping_add(g * pairs), at.sums.wrapping_add(g), COUNT * chunks);
            held.add::<CODE>(t, scale_of::<Avx512>(t.form, block, group), &one, at.sums.wrapping_add(g));
        }
        at.x = at.x.add(G * pairs);
        at.sums = at.sums.wrapping_add(G);
        at.left -= G * COUNT * chunks;
    }
}

/// What is left of a group, or the whole of one that is not made of chunks.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows index sums and addresses alike
unsafe fn some_octets<const CODE: usize, const R: usize>(
    t: &Part<'_>,
    at: &mut At,
    table: Table,
    held: &mut Held<R>,
) {
    let count = at.cursor.count(at.left);
    // SAFETY: the caller's octets.
    unsafe {
        let block = t.panel.add(at.cursor.base);
        let mut sums = [_mm512_setzero_ps(); R];
        for octet in 0..count {
            let of_block = at.cursor.at + octet;
            let chunk = block.add(t.form.scale_bytes() + of_block / 4 * t.form.chunk_bytes());
            for pair in 0..4 {
                let weights = halves(pair_of::<CODE>(chunk, of_block % 4, pair, table));
                for r in 0..R {
                    let factor = halves(_mm512_set1_epi32(*at.x.add(r * t.stride + octet * 4 + pair)));
                    sums[r] = _mm512_dpbf16_ps(sums[r], weights, factor);
                }
            }
        }
        check_sums::<CODE>(t, at.x, at.sums, count);
        held.add::<CODE>(t, scale_of::<Avx512>(t.form, block, at.cursor.at_group), &sums, at.sums);
    }
    at.x = at.x.wrapping_add(count * 4);
    at.sums = at.sums.wrapping_add(1);
    at.left -= count;
    at.cursor.pass(t.form, count);
}

/// What rows add up to: in registers, or where there are many rows in memory.
struct Held<const R: usize>([__m512; R]);

impl<const R: usize> Held<R> {
    #[inline(always)]
    unsafe fn begin(t: &Part<'_>) -> Self {
        // SAFETY: the part's rows.
        unsafe {
            let mut held = [_mm512_setzero_ps(); R];
            for (r, held) in held.iter_mut().enumerate() {
                let at = t.acc.add(r * t.acc_stride);
                match (R <= ROWS_HELD, t.fresh) {
                    (true, false) => *held = _mm512_loadu_ps(at),
                    (false, true) => _mm512_storeu_ps(at, *held),
                    _ => {}
                }
            }
            Held(held)
        }
    }

    /// Adds a group: its sums, and its offset times the sums of its inputs.
    #[inline(always)]
    unsafe fn add<const CODE: usize>(
        &mut self,
        t: &Part<'_>,
        (scale, offset): (Avx512, Avx512),
        sums: &[__m512; R],
        of_inputs: *const f32,
    ) {
        // SAFETY: the part's rows.
        unsafe {
            for (r, part) in sums.iter().enumerate() {
                let at = t.acc.add(r * t.acc_stride);
                let before = if R <= ROWS_HELD { self.0[r] } else { _mm512_loadu_ps(at) };
                let mut sum = _mm512_fmadd_ps(scale.0, *part, before);
                if CODE != E4M3 {
                    let of_inputs = _mm512_set1_ps(*of_inputs.add(r * t.stride));
                    sum = _mm512_fmadd_ps(offset.0, of_inputs, sum);
                }
                if R <= ROWS_HELD {
                    self.0[r] = sum;
                } else {
                    _mm512_storeu_ps(at, sum);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn end(&self, t: &Part<'_>) {
        if R <= ROWS_HELD {
            for (r, held) in self.0.iter().enumerate() {
                // SAFETY: the part's rows.
                unsafe { _mm512_storeu_ps(t.acc.add(r * t.acc_stride), *held) };
            }
        }
    }
}

/// Bytes of a chunk.
const fn chunk_bytes_of(code: usize) -> usize {
    if code <= 6 { code * 64 } else { 512 }
}

/// Asks for what lies as far behind a block's scales as is asked behind its codes, at the block's first group.
#[inline(always)]
unsafe fn ahead_of_scales(form: &Form, block: *const u8, group: usize) {
    if group == 0 {
        for line in 0..form.scale_bytes() / LINE_BYTES {
            // SAFETY: a prefetch of any address is harmless.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD_BYTES + line * LINE_BYTES).cast());
            }
        }
    }
}

/// Whether the sums of inputs that came along are those of this group: in debug builds.
#[inline(always)]
unsafe fn check_sums<const CODE: usize>(t: &Part<'_>, x: *const i32, sums: *const f32, octets: usize) {
    if cfg!(debug_assertions) && CODE != E4M3 {
        // SAFETY: the part's first row has these inputs, and a sum of them.
        let (told, own) = unsafe { (*sums, sum_of(x, octets)) };
        assert_eq!(told.to_bits(), own.to_bits(), "{told} for {own}, of octets {:?}", t.octets);
    }
}

/// Sums of a row's inputs by group.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn sums(s: &GroupSums) {
    let (mut x, mut out, mut octet) = (s.x, s.out, s.octets.0);
    while octet < s.octets.1 {
        let count = s.octets.1.min((octet / s.group + 1) * s.group) - octet;
        // SAFETY: the row's inputs and places.
        unsafe {
            *out = sum_of(x, count);
            (x, out) = (x.add(4 * count), out.add(1));
        }
        octet += count;
    }
}

/// The sum of `octets` times eight inputs.
#[inline(always)]
unsafe fn sum_of(x: *const i32, octets: usize) -> f32 {
    // SAFETY: the caller's inputs.
    unsafe {
        let ones = std::mem::transmute::<__m128i, __m128bh>(_mm_set1_epi16(0x3f80));
        let mut sums = _mm_setzero_ps();
        for octet in 0..octets {
            let four = _mm_loadu_si128(x.add(4 * octet).cast());
            sums = _mm_dpbf16_ps(sums, std::mem::transmute::<__m128i, __m128bh>(four), ones);
        }
        let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
        _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)))
    }
}
