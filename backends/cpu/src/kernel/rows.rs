//! Inner loops over single rows: norms, sums, gates, rotations, softmax. Lengths count floats and need not be whole lanes.

use std::ops::Range;

use super::{Softmax, Sums};
use crate::lanes::{LANES, Lanes};

/// Calls the body with `at` and the number of lanes left for every 16 floats of `n`.
macro_rules! each_16 {
    ($n:expr, |$at:ident, $left:ident| $body:block) => {
        let mut $at = 0;
        while $at < $n {
            let $left = ($n - $at).min(LANES);
            $body
            $at += LANES;
        }
    };
}

#[inline(always)]
pub(super) unsafe fn norm<V: Lanes>(
    x: *const f32,
    weight: *const f32,
    out: *mut f32,
    n: usize,
    eps: f32,
    bf16: bool,
) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let mut squares = V::splat(0.0);
        each_16!(n, |at, left| {
            let v = V::load_first(x.add(at), left).rounded(bf16);
            squares = squares.madd(v, v);
        });
        let scale = V::splat(1.0 / (squares.total() / n as f32 + eps).sqrt());
        each_16!(n, |at, left| {
            let v = V::load_first(x.add(at), left).rounded(bf16).mul(scale).rounded(bf16);
            v.mul(V::load_first(weight.add(at), left)).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn add<V: Lanes>(x: *mut f32, y: *const f32, n: usize, bf16: bool) {
    // SAFETY: n floats at each pointer.
    unsafe {
        each_16!(n, |at, left| {
            let a = V::load_first(x.add(at), left).rounded(bf16);
            let b = V::load_first(y.add(at), left).rounded(bf16);
            a.add(b).rounded(bf16).store_first(x.add(at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn silu<V: Lanes>(gate: *const f32, up: *const f32, out: *mut f32, n: usize, bf16: bool) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let (zero, one) = (V::splat(0.0), V::splat(1.0));
        each_16!(n, |at, left| {
            let g = V::load_first(gate.add(at), left).rounded(bf16);
            let u = V::load_first(up.add(at), left).rounded(bf16);
            let act = g.div(one.add(zero.sub(g).exp())).rounded(bf16);
            act.mul(u).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn clamped<V: Lanes>(
    gate: *const f32,
    up: *const f32,
    out: *mut f32,
    n: usize,
    limit: f32,
    slope: f32,
    bf16: bool,
) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let (zero, one, slope) = (V::splat(0.0), V::splat(1.0), V::splat(slope));
        let (high, low) = (V::splat(limit), V::splat(-limit));
        each_16!(n, |at, left| {
            let g = V::load_first(gate.add(at), left).rounded(bf16).at_most(high);
            let u = V::load_first(up.add(at), left).rounded(bf16).at_most(high).at_least(low);
            let opened = one.div(one.add(zero.sub(g.mul(slope).rounded(bf16)).exp())).rounded(bf16);
            let act = g.mul(opened).rounded(bf16);
            u.add(one).rounded(bf16).mul(act).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn round<V: Lanes>(x: *const f32, out: *mut f32, n: usize, bf16: bool) {
    // SAFETY: n floats at each pointer.
    unsafe {
        each_16!(n, |at, left| {
            V::load_first(x.add(at), left).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn rotate<V: Lanes>(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, bf16: bool) {
    // SAFETY: 2 n floats at x, n at cos and sin.
    unsafe {
        each_16!(n, |at, left| {
            let a = V::load_first(x.add(at), left);
            let b = V::load_first(x.add(n + at), left);
            let c = V::load_first(cos.add(at), left).rounded(bf16);
            let s = V::load_first(sin.add(at), left).rounded(bf16);
            // Each product is rounded, as the eager form `x * cos + rotate_half(x) * sin` does.
            let first = a.mul(c).rounded(bf16).sub(b.mul(s).rounded(bf16)).rounded(bf16);
            let second = b.mul(c).rounded(bf16).add(a.mul(s).rounded(bf16)).rounded(bf16);
            first.store_first(x.add(at), left);
            second.store_first(x.add(n + at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn narrow<V: Lanes>(x: *const f32, out: *mut u16, n: usize) {
    // SAFETY: n floats at x, n halves at out.
    unsafe {
        each_16!(n, |at, left| {
            let v = V::load_first(x.add(at), left).round_bf16();
            if left == LANES {
                v.store_bf16(out.add(at));
            } else {
                let mut held = [0u16; LANES];
                v.store_bf16(held.as_mut_ptr());
                std::ptr::copy_nonoverlapping(held.as_ptr(), out.add(at), left);
            }
        });
    }
}

#[inline(always)]
pub(super) unsafe fn transpose<V: Lanes>(
    rows: &[*const u8; LANES],
    words: usize,
    out: *mut u32,
    ahead: &[*const u8],
) {
    // SAFETY: the caller's; a prefetch of any address is harmless.
    unsafe {
        for (row, line) in
            ahead.iter().flat_map(|row| (0..words * 4).step_by(64).map(move |line| (row, line)))
        {
            V::prefetch(row.wrapping_add(line));
        }
        V::transpose(rows, words, out)
    }
}

#[inline(always)]
pub(super) unsafe fn softmax<V: Lanes>(s: &Softmax) -> (f32, f32) {
    let lines = |of: &Range<usize>| (of.start / LANES * LANES, of.end.next_multiple_of(LANES));
    let ((before, behind), (first, last)) = (lines(&s.touched), lines(&s.own));
    let (scores, own) = (s.scores, &s.own);
    // SAFETY: the floats of whole lanes that are touched, at scores.
    unsafe {
        if own.is_empty() {
            std::ptr::write_bytes(scores.add(before), 0, behind - before);
            return (f32::NEG_INFINITY, 0.0);
        }
        std::ptr::write_bytes(scores.add(before), 0, first - before);
        std::ptr::write_bytes(scores.add(last), 0, behind - last);
        // Lanes are positions modulo 16, whatever is touched: a row's sums do not depend on which rows came along.
        for at in [first, last - LANES] {
            let score = V::load(scores.add(at));
            score.only(own.start.saturating_sub(at), own.end - at, f32::NEG_INFINITY).store(scores.add(at));
        }
        let mut peaks = [V::splat(f32::NEG_INFINITY); 4];
        let mut at = first;
        while at + peaks.len() * LANES <= last {
            for (n, peak) in peaks.iter_mut().enumerate() {
                *peak = V::load(scores.add(at + n * LANES)).at_least(*peak);
            }
            at += peaks.len() * LANES;
        }
        while at < last {
            peaks[0] = V::load(scores.add(at)).at_least(peaks[0]);
            at += LANES;
        }
        // Weights are powers of two: one product less than those of e.
        let scale = s.scale * std::f32::consts::LOG2_E;
        let max = peaks[0].at_least(peaks[1]).at_least(peaks[2].at_least(peaks[3])).peak() * scale;
        let (shift, scale, mut sum) = (V::splat(-max), V::splat(scale), V::splat(0.0));
        for at in (first..last).step_by(LANES) {
            let weight = shift.madd(V::load(scores.add(at)), scale).exp2();
            weight.store(scores.add(at));
            sum = sum.add(weight);
        }
        (max, sum.total())
    }
}

#[inline(always)]
pub(super) unsafe fn fold<V: Lanes>(acc: &Sums, part: &Sums, queries: usize, width: usize) {
    // SAFETY: both sums have whole lanes of peaks and totals, and a line of values per query.
    unsafe {
        each_16!(queries, |from, count| {
            let (old, new) = (V::load(acc.peak.add(from)), V::load(part.peak.add(from)));
            // Not minus infinity, from which nothing can be told apart.
            let peak = new.at_least(old).at_least(V::splat(f32::MIN));
            let (a, b) = (old.sub(peak).exp2(), new.sub(peak).exp2());
            let total = V::load(acc.total.add(from)).mul(a).madd(V::load(part.total.add(from)), b);
            peak.store(acc.peak.add(from));
            total.store(acc.total.add(from));
            let (mut factors, mut others) = ([0.0; LANES], [0.0; LANES]);
            a.store(factors.as_mut_ptr());
            b.store(others.as_mut_ptr());
            for (query, (a, b)) in factors.iter().zip(&others).take(count).enumerate() {
                let at = (from + query) * width;
                let (value, new) = (acc.value.add(at), part.value.add(at));
                let (a, b) = (V::splat(*a), V::splat(*b));
                each_16!(width, |at, _left| {
                    let old = V::load(value.add(at)).mul(a);
                    old.madd(V::load(new.add(at)), b).store(value.add(at));
                });
            }
        });
    }
}

#[inline(always)]
pub(super) unsafe fn blend<V: Lanes>(acc: *mut f32, part: *const f32, n: usize, a: f32, b: f32) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let (a, b) = (V::splat(a), V::splat(b));
        each_16!(n, |at, left| {
            let old = V::load_first(acc.add(at), left).mul(a);
            old.madd(V::load_first(part.add(at), left), b).store_first(acc.add(at), left);
        });
    }
}

/// Rows whose places are asked for ahead: they lie far apart, so the processor does not.
const PLACES_AHEAD: usize = 6;

#[inline(always)]
pub(super) unsafe fn place<V: Lanes>(
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
    rows: usize,
    n: usize,
) {
    // SAFETY: n floats of each row at both; a prefetch of any address is harmless.
    unsafe {
        for row in 0..rows + PLACES_AHEAD {
            if row < rows {
                let to = to.add(row * to_stride);
                each_16!(n, |at, _left| {
                    V::prefetch(to.add(at).cast_const().cast());
                });
            }
            if let Some(row) = row.checked_sub(PLACES_AHEAD) {
                let (from, to) = (from.add(row * from_stride), to.add(row * to_stride));
                each_16!(n, |at, left| {
                    V::load_first(from.add(at), left).store_first(to.add(at), left);
                });
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn divide<V: Lanes>(acc: *const f32, total: f32, out: *mut f32, n: usize, bf16: bool) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let total = V::splat(total);
        each_16!(n, |at, left| {
            V::load_first(acc.add(at), left).div(total).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
pub(super) unsafe fn exp<V: Lanes>(x: f32) -> f32 {
    let mut out = [0.0; LANES];
    // SAFETY: 16 floats at out.
    unsafe { V::splat(x).exp().store(out.as_mut_ptr()) };
    out[0]
}
