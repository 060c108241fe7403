//! The product's inner loop: tiles of rows by panels in registers, K in ascending order.

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

/// What a product asks for while it runs: rows of memory, a cache line for each two k of a panel, which are a line themselves in
/// bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Soon {
    pub(crate) at: *const u8,
    /// Lines of a row, as a power of two.
    pub(crate) lines: u32,
    /// Bytes from one row to the next.
    pub(crate) row: usize,
}

impl Soon {
    #[inline(always)]
    unsafe fn ask<V: Lanes>(&self, line: usize) {
        let row = (line >> self.lines).wrapping_mul(self.row);
        let line = line & ((1 << self.lines) - 1);
        // SAFETY: a prefetch of any address is harmless.
        unsafe { V::prefetch_far(self.at.wrapping_add(row).wrapping_add(line * 64)) }
    }
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
    /// What is asked for instead of weights that lie 1 KiB ahead.
    pub(crate) soon: Option<Soon>,
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
            // Weights stream from memory when rows are few; when they do not, asking costs next to nothing.
            for p in 0..P {
                match &s.soon {
                    Some(soon) if row == 0 => soon.ask::<V>((panel + p) * (s.k / 2) + k / 2),
                    _ => w.ahead(panel + p, k),
                }
            }
            let (mut even, mut odd) = ([V::splat(0.0); P], [V::splat(0.0); P]);
            for p in 0..P {
                even[p] = w.even(panel + p, k);
                odd[p] = w.odd(panel + p, k);
            }
            if R <= ROWS_STREAMING {
                // Few factors: one k of all panels after the other leaves room for more panels.
                for r in 0..R {
                    let factor = V::splat(*x.add(r * s.x_stride + k));
                    for p in 0..P {
                        acc[r][p] = acc[r][p].madd(factor, even[p]);
                    }
                }
                for r in 0..R {
                    let factor = V::splat(*x.add(r * s.x_stride + k + 1));
                    for p in 0..P {
                        acc[r][p] = acc[r][p].madd(factor, odd[p]);
                    }
                }
            } else {
                // Both k of a row together: otherwise the compiler loads the second early and spills it.
                for r in 0..R {
                    let first = V::splat(*x.add(r * s.x_stride + k));
                    let second = V::splat(*x.add(r * s.x_stride + k + 1));
                    for p in 0..P {
                        acc[r][p] = acc[r][p].madd(first, even[p]);
                    }
                    for p in 0..P {
                        acc[r][p] = acc[r][p].madd(second, odd[p]);
                    }
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

/// Whether `r` rows by `p` panels of sums leave registers for the operands: two k of every panel, one where rows are few,
/// and of a single row each weight is used once and gone.
const fn fits(r: usize, p: usize, registers: usize) -> bool {
    let operands = match r {
        1 => 2,
        2 => p,
        _ => 2 * p,
    };
    r * p + operands <= registers
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
/// Up to here rows are one or two tiles: visit all panels with each, so that even a last single row has many sums.
const ROWS_FEW: usize = 12;

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

/// Runs a sweep.
///
/// # Safety
/// Pointers are valid for what the fields say, and the level's instructions exist.
#[inline(always)]
pub(super) unsafe fn sweep<V: Lanes>(s: &Sweep) {
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
