//! The inner loops, written once over [`Lanes`] and compiled per instruction level. Everything above works with a
//! table of these functions, so no other file knows about instructions.

use crate::lanes::portable::Portable;
use crate::lanes::{LANES, Lanes};

/// Element format and layout of a product's second factor. Strides count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// bf16, `[panel][k / 2][16][2]`.
    Bf16Pairs,
    /// bf16, 16 consecutive outputs per k.
    Bf16,
    /// IEEE half, 16 consecutive outputs per k.
    F16,
    /// f32, 16 consecutive outputs per k.
    F32,
}

/// `acc[row][panel * 16 + lane] += sum over k, ascending, of x[row][k] * w[panel][k][lane]`.
///
/// The order of the sum is the same for every tile: one running accumulator per output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sweep {
    /// `[rows][k]`, rows `x_stride` apart.
    pub(crate) x: *const f32,
    pub(crate) x_stride: usize,
    pub(crate) rows: usize,
    pub(crate) layout: Layout,
    /// The weights of panel 0 at the first k.
    pub(crate) w: *const u8,
    /// Elements from one panel to the next.
    pub(crate) panel_stride: usize,
    /// Elements from one k to the next; of [`Layout::Bf16Pairs`] always 16 (two per pair and lane).
    pub(crate) k_stride: usize,
    pub(crate) panels: usize,
    pub(crate) k: usize,
    /// `[rows][panels * 16]`, rows `acc_stride` apart.
    pub(crate) acc: *mut f32,
    pub(crate) acc_stride: usize,
    /// Begin at zero instead of what `acc` holds.
    pub(crate) fresh: bool,
}

/// The kernels of one instruction level. Lengths count floats; `bf16` rounds results (and inputs, for which that is no
/// change unless they come unrounded from a product) to bf16.
///
/// All are unsafe: the level's instructions must exist, and pointers be valid for the stated lengths.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) sweep: unsafe fn(&Sweep),
    /// `out = x / rms(x) * weight` of `n` floats.
    pub(crate) norm:
        unsafe fn(x: *const f32, weight: *const f32, out: *mut f32, n: usize, eps: f32, bf16: bool),
    /// `x += y`, `n` floats.
    pub(crate) add: unsafe fn(x: *mut f32, y: *const f32, n: usize, bf16: bool),
    /// `out = silu(gate) * up`, `n` floats.
    pub(crate) silu: unsafe fn(gate: *const f32, up: *const f32, out: *mut f32, n: usize, bf16: bool),
    /// `out = round(x)`, `n` floats; `out` may be `x`.
    pub(crate) round: unsafe fn(x: *const f32, out: *mut f32, n: usize, bf16: bool),
    /// Rotates pairs `(x[i], x[i + n])` by the angles of `cos` and `sin`.
    pub(crate) rotate: unsafe fn(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, bf16: bool),
    /// `n` floats to bf16.
    pub(crate) narrow: unsafe fn(x: *const f32, out: *mut u16, n: usize),
    /// See [`Lanes::transpose`].
    pub(crate) transpose: unsafe fn(rows: &[*const u8; LANES], words: usize, out: *mut u32),
    /// Scores `[0, 256)` of a span to weights in place: `exp(scale * (score - max))` at `[from, to)`, 0 elsewhere within
    /// the touched lanes. Returns the largest scaled score and the sum of the weights.
    pub(crate) softmax: unsafe fn(scores: *mut f32, from: usize, to: usize, scale: f32) -> (f32, f32),
    /// `acc = a * acc + b * part`, `n` floats.
    pub(crate) blend: unsafe fn(acc: *mut f32, part: *const f32, n: usize, a: f32, b: f32),
    /// `out = acc / total`, `n` floats.
    pub(crate) divide: unsafe fn(acc: *const f32, total: f32, out: *mut f32, n: usize, bf16: bool),
    /// See [`Lanes::exp`].
    pub(crate) exp: unsafe fn(f32) -> f32,
}

/// A product's second factor as the tile reads it.
trait Panels<V: Lanes>: Copy {
    /// 16 outputs of `panel` at an even distance `k` from the start.
    unsafe fn even(self, panel: usize, k: usize) -> V;
    /// The same at `k + 1`.
    unsafe fn odd(self, panel: usize, k: usize) -> V;
    /// Starts bringing what lies some lines behind `k`.
    unsafe fn ahead(self, panel: usize, k: usize);
}

#[derive(Clone, Copy)]
struct Pairs {
    w: *const u16,
    panel: usize,
}

/// Bytes that a streaming product asks for ahead of use.
const AHEAD_BYTES: usize = 1024;

// SAFETY (all blocks of the four impls): the sweep's weights cover the panels and k that the tile asks for.
impl<V: Lanes> Panels<V> for Pairs {
    #[inline(always)]
    unsafe fn even(self, panel: usize, k: usize) -> V {
        // SAFETY: see above.
        unsafe { V::load_bf16_even(self.w.add(panel * self.panel + k * LANES)) }
    }

    #[inline(always)]
    unsafe fn odd(self, panel: usize, k: usize) -> V {
        // SAFETY: see above.
        unsafe { V::load_bf16_odd(self.w.add(panel * self.panel + k * LANES)) }
    }

    #[inline(always)]
    unsafe fn ahead(self, panel: usize, k: usize) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe {
            V::prefetch(
                self.w.wrapping_add(panel * self.panel + k * LANES).cast::<u8>().wrapping_add(AHEAD_BYTES),
            )
        }
    }
}

#[derive(Clone, Copy)]
struct Wide {
    w: *const f32,
    panel: usize,
    k: usize,
}

impl<V: Lanes> Panels<V> for Wide {
    #[inline(always)]
    unsafe fn even(self, panel: usize, k: usize) -> V {
        // SAFETY: see above.
        unsafe { V::load(self.w.add(panel * self.panel + k * self.k)) }
    }

    #[inline(always)]
    unsafe fn odd(self, panel: usize, k: usize) -> V {
        // SAFETY: see above.
        unsafe { V::load(self.w.add(panel * self.panel + (k + 1) * self.k)) }
    }

    #[inline(always)]
    unsafe fn ahead(self, panel: usize, k: usize) {
        let at = self.w.wrapping_add(panel * self.panel + k * self.k).cast::<u8>();
        // SAFETY: a prefetch of any address is harmless.
        unsafe {
            V::prefetch(at.wrapping_add(AHEAD_BYTES));
            V::prefetch(at.wrapping_add(AHEAD_BYTES + 64));
        }
    }
}

/// Consecutive 16-bit elements, `HALF`: IEEE halves, else bf16.
#[derive(Clone, Copy)]
struct Narrow<const HALF: bool> {
    w: *const u16,
    panel: usize,
    k: usize,
}

impl<V: Lanes, const HALF: bool> Panels<V> for Narrow<HALF> {
    #[inline(always)]
    unsafe fn even(self, panel: usize, k: usize) -> V {
        // SAFETY: see above.
        unsafe {
            let at = self.w.add(panel * self.panel + k * self.k);
            if HALF { V::load_f16(at) } else { V::load_bf16(at) }
        }
    }

    #[inline(always)]
    unsafe fn odd(self, panel: usize, k: usize) -> V {
        // SAFETY: see above.
        unsafe { <Self as Panels<V>>::even(self, panel, k + 1) }
    }

    #[inline(always)]
    unsafe fn ahead(self, panel: usize, k: usize) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe {
            V::prefetch(
                self.w.wrapping_add(panel * self.panel + k * self.k).cast::<u8>().wrapping_add(AHEAD_BYTES),
            )
        }
    }
}

/// `R` rows by `P` panels in registers over all of k.
///
/// # Safety
/// As for the sweep, restricted to rows `[row, row + R)` and panels `[panel, panel + P)`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, factors and addresses alike
unsafe fn tile<V: Lanes, W: Panels<V>, const R: usize, const P: usize>(
    s: &Sweep,
    w: W,
    row: usize,
    panel: usize,
) {
    // SAFETY: the caller's sweep is valid for these rows and panels.
    unsafe {
        let x = s.x.add(row * s.x_stride);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[V::splat(0.0); P]; R];
        if !s.fresh {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = V::load(out.add(r * s.acc_stride + p * LANES));
                }
            }
        }
        let mut k = 0;
        while k + 2 <= s.k {
            if R <= ROWS_STREAMING {
                for p in 0..P {
                    w.ahead(panel + p, k);
                }
            }
            let (mut even, mut odd) = ([V::splat(0.0); P], [V::splat(0.0); P]);
            for p in 0..P {
                even[p] = w.even(panel + p, k);
                odd[p] = w.odd(panel + p, k);
            }
            // Both k of a row together: otherwise the compiler loads the second early and spills it.
            for r in 0..R {
                let (first, second) =
                    (V::splat(*x.add(r * s.x_stride + k)), V::splat(*x.add(r * s.x_stride + k + 1)));
                for p in 0..P {
                    acc[r][p] = acc[r][p].madd(first, even[p]);
                }
                for p in 0..P {
                    acc[r][p] = acc[r][p].madd(second, odd[p]);
                }
            }
            k += 2;
        }
        if k < s.k {
            for p in 0..P {
                let last = w.even(panel + p, k);
                for r in 0..R {
                    acc[r][p] = acc[r][p].madd(V::splat(*x.add(r * s.x_stride + k)), last);
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                acc[r][p].store(out.add(r * s.acc_stride + p * LANES));
            }
        }
    }
}

/// Up to so many rows a product is as fast as its weights stream.
const ROWS_STREAMING: usize = 2;

/// Whether `r` rows by `p` panels of sums leave registers for the operands: two k of every panel, except for one row,
/// where each is used once and gone.
const fn fits(r: usize, p: usize, registers: usize) -> bool {
    r * p + if r == 1 { 2 } else { 2 * p } <= registers
}

/// Panels `[from, to)` for rows `[row, row + R)`: as many at once as registers allow, so that a single row still has
/// enough independent sums in flight.
#[inline(always)]
unsafe fn rows<V: Lanes, W: Panels<V>, const R: usize>(s: &Sweep, w: W, row: usize, from: usize, to: usize) {
    let mut panel = from;
    // SAFETY: the caller's sweep covers rows [row, row + R) and panels [from, to).
    unsafe {
        if const { fits(R, 8, V::REGISTERS) } {
            while panel + 8 <= to {
                tile::<V, W, R, 8>(s, w, row, panel);
                panel += 8;
            }
        }
        if const { fits(R, 4, V::REGISTERS) } {
            while panel + 4 <= to {
                tile::<V, W, R, 4>(s, w, row, panel);
                panel += 4;
            }
        }
        if const { fits(R, 2, V::REGISTERS) } {
            while panel + 2 <= to {
                tile::<V, W, R, 2>(s, w, row, panel);
                panel += 2;
            }
        }
        while panel < to {
            tile::<V, W, R, 1>(s, w, row, panel);
            panel += 1;
        }
    }
}

/// Panels that all row tiles visit before the next: two of 256 k in bf16 are 16 KiB, which stay in the first cache.
const PANELS_WITH_MANY_ROWS: usize = 2;
/// Up to here rows are few and weights stream: visit all panels with each row tile.
const ROWS_FEW: usize = 4;

#[inline(always)]
unsafe fn sweep_panels<V: Lanes, W: Panels<V>>(s: &Sweep, w: W) {
    let group = if s.rows <= ROWS_FEW { s.panels } else { PANELS_WITH_MANY_ROWS };
    let mut from = 0;
    while from < s.panels {
        let to = (from + group).min(s.panels);
        let mut row = 0;
        // SAFETY: rows and panels stay within the sweep.
        unsafe {
            if const { fits(12, 1, V::REGISTERS) } {
                while row + 12 <= s.rows {
                    rows::<V, W, 12>(s, w, row, from, to);
                    row += 12;
                }
            }
            if const { fits(8, 1, V::REGISTERS) } {
                while row + 8 <= s.rows {
                    rows::<V, W, 8>(s, w, row, from, to);
                    row += 8;
                }
            }
            if const { fits(6, 1, V::REGISTERS) } {
                while row + 6 <= s.rows {
                    rows::<V, W, 6>(s, w, row, from, to);
                    row += 6;
                }
            }
            if const { fits(4, 1, V::REGISTERS) } {
                while row + 4 <= s.rows {
                    rows::<V, W, 4>(s, w, row, from, to);
                    row += 4;
                }
            }
            if const { fits(2, 1, V::REGISTERS) } {
                while row + 2 <= s.rows {
                    rows::<V, W, 2>(s, w, row, from, to);
                    row += 2;
                }
            }
            while row < s.rows {
                rows::<V, W, 1>(s, w, row, from, to);
                row += 1;
            }
        }
        from = to;
    }
}

#[inline(always)]
unsafe fn sweep<V: Lanes>(s: &Sweep) {
    let (panel, k) = (s.panel_stride, s.k_stride);
    // SAFETY: the caller's sweep is valid.
    unsafe {
        match s.layout {
            Layout::Bf16Pairs => sweep_panels::<V, _>(s, Pairs { w: s.w.cast(), panel }),
            Layout::Bf16 => sweep_panels::<V, _>(s, Narrow::<false> { w: s.w.cast(), panel, k }),
            Layout::F16 => sweep_panels::<V, _>(s, Narrow::<true> { w: s.w.cast(), panel, k }),
            Layout::F32 => sweep_panels::<V, _>(s, Wide { w: s.w.cast(), panel, k }),
        }
    }
}

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
unsafe fn norm<V: Lanes>(x: *const f32, weight: *const f32, out: *mut f32, n: usize, eps: f32, bf16: bool) {
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
unsafe fn add<V: Lanes>(x: *mut f32, y: *const f32, n: usize, bf16: bool) {
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
unsafe fn silu<V: Lanes>(gate: *const f32, up: *const f32, out: *mut f32, n: usize, bf16: bool) {
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
unsafe fn round<V: Lanes>(x: *const f32, out: *mut f32, n: usize, bf16: bool) {
    // SAFETY: n floats at each pointer.
    unsafe {
        each_16!(n, |at, left| {
            V::load_first(x.add(at), left).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
unsafe fn rotate<V: Lanes>(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, bf16: bool) {
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
unsafe fn narrow<V: Lanes>(x: *const f32, out: *mut u16, n: usize) {
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
unsafe fn transpose<V: Lanes>(rows: &[*const u8; LANES], words: usize, out: *mut u32) {
    // SAFETY: the caller's.
    unsafe { V::transpose(rows, words, out) }
}

#[inline(always)]
unsafe fn softmax<V: Lanes>(scores: *mut f32, from: usize, to: usize, scale: f32) -> (f32, f32) {
    // Lanes are positions modulo 16, whatever `from` is: a row's sums do not depend on which rows came along.
    let first = from / LANES * LANES;
    let scale = {
        // SAFETY: register arithmetic of this level.
        unsafe { V::splat(scale) }
    };
    // SAFETY: the floats of [first, to rounded up to 16) at scores.
    unsafe {
        let mut peak = V::splat(f32::NEG_INFINITY);
        let mut at = first;
        while at < to {
            let score = V::load(scores.add(at)).mul(scale);
            let score = score.only(from.saturating_sub(at), to - at, f32::NEG_INFINITY);
            score.store(scores.add(at));
            peak = score.at_least(peak);
            at += LANES;
        }
        let max = peak.peak();
        let (shift, mut sum) = (V::splat(max), V::splat(0.0));
        let mut at = first;
        while at < to {
            let weight = V::load(scores.add(at)).sub(shift).exp().only(from.saturating_sub(at), to - at, 0.0);
            weight.store(scores.add(at));
            sum = sum.add(weight);
            at += LANES;
        }
        (max, sum.total())
    }
}

#[inline(always)]
unsafe fn blend<V: Lanes>(acc: *mut f32, part: *const f32, n: usize, a: f32, b: f32) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let (a, b) = (V::splat(a), V::splat(b));
        each_16!(n, |at, left| {
            let old = V::load_first(acc.add(at), left).mul(a);
            old.madd(V::load_first(part.add(at), left), b).store_first(acc.add(at), left);
        });
    }
}

#[inline(always)]
unsafe fn divide<V: Lanes>(acc: *const f32, total: f32, out: *mut f32, n: usize, bf16: bool) {
    // SAFETY: n floats at each pointer.
    unsafe {
        let total = V::splat(total);
        each_16!(n, |at, left| {
            V::load_first(acc.add(at), left).div(total).rounded(bf16).store_first(out.add(at), left);
        });
    }
}

#[inline(always)]
unsafe fn exp<V: Lanes>(x: f32) -> f32 {
    let mut out = [0.0; LANES];
    // SAFETY: 16 floats at out.
    unsafe { V::splat(x).exp().store(out.as_mut_ptr()) };
    out[0]
}

/// Compiles every kernel for one level, as a module of that name.
macro_rules! level {
    ($level:ident, $lanes:ty $(, $features:literal)?) => {
        pub(crate) mod $level {
            use super::{Kernels, LANES, Sweep};

            pub(crate) static KERNELS: Kernels = Kernels { sweep, norm, add, silu, round, rotate, narrow, transpose, softmax, blend, divide, exp };

            $(#[target_feature(enable = $features)])?
            unsafe fn sweep(s: &Sweep) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::sweep::<$lanes>(s) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn norm(x: *const f32, weight: *const f32, out: *mut f32, n: usize, eps: f32, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::norm::<$lanes>(x, weight, out, n, eps, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn add(x: *mut f32, y: *const f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::add::<$lanes>(x, y, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn silu(gate: *const f32, up: *const f32, out: *mut f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::silu::<$lanes>(gate, up, out, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn round(x: *const f32, out: *mut f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::round::<$lanes>(x, out, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn rotate(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rotate::<$lanes>(x, cos, sin, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn narrow(x: *const f32, out: *mut u16, n: usize) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::narrow::<$lanes>(x, out, n) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn transpose(rows: &[*const u8; LANES], words: usize, out: *mut u32) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::transpose::<$lanes>(rows, words, out) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(scores: *mut f32, from: usize, to: usize, scale: f32) -> (f32, f32) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::softmax::<$lanes>(scores, from, to, scale) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn blend(acc: *mut f32, part: *const f32, n: usize, a: f32, b: f32) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::blend::<$lanes>(acc, part, n, a, b) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn divide(acc: *const f32, total: f32, out: *mut f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::divide::<$lanes>(acc, total, out, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exp(x: f32) -> f32 {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::exp::<$lanes>(x) }
            }
        }
    };
}

level!(portable, super::Portable);
#[cfg(target_arch = "x86_64")]
level!(avx2, crate::lanes::avx2::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
level!(avx512, crate::lanes::avx512::Avx512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");
