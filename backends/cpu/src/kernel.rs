//! The inner loops, written once over [`Lanes`](crate::lanes::Lanes) and compiled per instruction level. Everything above
//! works with a table of these functions, so no other file knows about instructions.

mod ahead;
mod bytes;
#[cfg(target_arch = "x86_64")]
mod bytes_vnni;
#[cfg(target_arch = "x86_64")]
mod coded_pairs;
mod codes;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod rows;
#[cfg(target_arch = "x86_64")]
mod scaled;
mod stream;
mod sweep;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;
#[cfg(target_arch = "x86_64")]
mod weigh;

use std::ops::Range;

use crate::lanes::LANES;
pub(crate) use bytes::{BLOCK, BLOCK_FLOATS, Bytes, Eighths, ORDER};
pub(crate) use codes::{Code, Decode, E4M3_SCALE, Form, MINIMA_GROUPS, Scale, Units, Zero};
pub(crate) use stream::Stream;
pub(crate) use sweep::{Layout, Soon, Sweep};

/// The kernels of one instruction level. Lengths count floats; `bf16` rounds results (and inputs, for which that is no
/// change unless they come unrounded from a product) to bf16.
///
/// All are unsafe: the level's instructions must exist, and pointers be valid for the stated lengths.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) sweep: unsafe fn(&Sweep),
    /// Where the level multiplies pairs of bf16 as such.
    pub(crate) pairs: Option<PairKernels>,
    /// Where the level multiplies codes that are whole numbers by whole numbers of 16 bits.
    pub(crate) whole: Option<WholeKernels>,
    /// The same for attention, whose rows see different positions.
    pub(crate) attend: Option<PairKernels>,
    pub(crate) decode: unsafe fn(&Decode<'_>),
    pub(crate) stream: unsafe fn(&Stream<'_>),
    /// Products of activations in 8 bits.
    pub(crate) bytes: unsafe fn(&Bytes<'_>),
    /// Blocks of 32 floats to 8 bits.
    pub(crate) quantise: unsafe fn(x: *const f32, blocks: usize, out: *mut Eighths),
    /// `out = x / rms(x) * weight` of `n` floats.
    pub(crate) norm:
        unsafe fn(x: *const f32, weight: *const f32, out: *mut f32, n: usize, eps: f32, bf16: bool),
    /// `x += y`, `n` floats.
    pub(crate) add: unsafe fn(x: *mut f32, y: *const f32, n: usize, bf16: bool),
    /// `out = silu(gate) * up`, `n` floats.
    pub(crate) silu: unsafe fn(gate: *const f32, up: *const f32, out: *mut f32, n: usize, bf16: bool),
    /// See [`backend::Glu::Clamped`], `n` floats.
    pub(crate) clamped: unsafe fn(
        gate: *const f32,
        up: *const f32,
        out: *mut f32,
        n: usize,
        limit: f32,
        slope: f32,
        bf16: bool,
    ),
    /// `out = round(x)`, `n` floats; `out` may be `x`.
    pub(crate) round: unsafe fn(x: *const f32, out: *mut f32, n: usize, bf16: bool),
    /// Rotates pairs `(x[i], x[i + n])` by the angles of `cos` and `sin`.
    pub(crate) rotate: unsafe fn(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, bf16: bool),
    /// `n` floats to bf16.
    pub(crate) narrow: unsafe fn(x: *const f32, out: *mut u16, n: usize),
    /// See [`Lanes::transpose`]. Starts bringing as many words of the rows of `ahead`.
    pub(crate) transpose:
        unsafe fn(rows: &[*const u8; LANES], words: usize, out: *mut u32, ahead: &[*const u8]),
    /// Scores to weights in place. Returns the largest score as an exponent of two, and the sum of the weights; minus
    /// infinity and 0 of no positions.
    pub(crate) softmax: unsafe fn(&Softmax) -> (f32, f32),
    /// `acc` becomes the sums over its positions and those of `part`, for each of `queries`, whose values are `width` floats.
    pub(crate) fold: unsafe fn(acc: &Sums, part: &Sums, queries: usize, width: usize),
    /// `acc = a * acc + b * part`, `n` floats.
    pub(crate) blend: unsafe fn(acc: *mut f32, part: *const f32, n: usize, a: f32, b: f32),
    /// `rows` rows of `n` floats, `from_stride` apart, to rows `to_stride` apart.
    pub(crate) place: unsafe fn(
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
        rows: usize,
        n: usize,
    ),
    /// `out = acc / total`, `n` floats.
    pub(crate) divide: unsafe fn(acc: *const f32, total: f32, out: *mut f32, n: usize, bf16: bool),
    /// See [`Lanes::exp`].
    pub(crate) exp: unsafe fn(f32) -> f32,
}

/// `scores[position]` becomes `exp(scale * (score - max))` for positions `own`, 0 for others within the lanes of `touched`, which
/// has these.
#[derive(Clone, Debug)]
pub(crate) struct Softmax {
    /// Of positions from a multiple of 16 on.
    pub(crate) scores: *mut f32,
    pub(crate) touched: Range<usize>,
    pub(crate) own: Range<usize>,
    /// Positive.
    pub(crate) scale: f32,
}

/// Softmax sums of some query rows over some positions: of each the largest score (as an exponent of two; minus infinity
/// where it has no position), the sum of its weights relative to that, and the weighted sum of values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    /// Whole lanes.
    pub(crate) peak: *mut f32,
    /// Whole lanes.
    pub(crate) total: *mut f32,
    /// `[queries][width]`, `width` whole lanes.
    pub(crate) value: *mut f32,
}

/// Products of bf16 by bf16 in bf16 steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairKernels {
    pub(crate) multiply: unsafe fn(&Pairs),
    pub(crate) coded: CodedPairs,
    /// Inputs that many rows pass by before the next, a multiple of 32: two panels of them stay in the first cache.
    pub(crate) inputs_block: usize,
    /// Inputs that make one turn of a sum: those that begin at multiples of so many have the same bits wherever zeros come before.
    pub(crate) turn: usize,
    /// `n` bf16 of two rows (zeros where null), side by side: `out[i / 16 * stride + i % 16 * 2]`, zeros up to whole 16. Starts bringing
    /// as many at `ahead`.
    pub(crate) interleave:
        unsafe fn(rows: [*const u16; 2], n: usize, out: *mut u16, stride: usize, ahead: [*const u16; 2]),
    /// Weighted values of few rows, as they lie in the cache; to the bit what `multiply` makes of them. `None`: that does it.
    pub(crate) weigh: Option<unsafe fn(&Weigh)>,
}

/// How quantised weights are multiplied by bf16, where not as whole numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CodedPairs {
    /// As [`Decode`] of E4M3, to [`Layout::Bf16Pairs`], rounded to bf16: [`PairKernels::multiply`] does the rest.
    Rounded(unsafe fn(&Decode<'_>)),
    /// E4M3 is multiplied as it is, and sums of groups scaled.
    Scaled(unsafe fn(&Scaled<'_>)),
}

/// Products of whole numbers in bf16 steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WholeKernels {
    pub(crate) product: unsafe fn(&Scaled<'_>),
    /// What rows become for it.
    pub(crate) inputs: unsafe fn(&WholeInputs),
    /// Where rows that are not few are multiplied byte by byte: takes `inputs` whole numbers of 16 bits apart, to all upper bytes and,
    /// behind them, all lower ones, each eight in [`ORDER`].
    pub(crate) apart: Option<unsafe fn(words: *const i32, inputs: usize, out: *mut u8)>,
}

/// Panels of a weight that follow each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    pub(crate) panel: usize,
    pub(crate) panels: usize,
    /// Where the panels are that the same thread reads after these, as far as can be told: few rows ask for what comes next, and a
    /// stream is slow to begin. Any address will do.
    pub(crate) soon: *const u8,
}

/// Rows times some panels of codes; as [`Stream`], from zero on, `x` being pairs of whole numbers, or of bf16 for E4M3.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaled<'a> {
    pub(crate) form: &'a Form,
    pub(crate) units: Units,
    pub(crate) panel: *const u8,
    /// Bytes from one panel to the next.
    pub(crate) panel_bytes: usize,
    pub(crate) panels: usize,
    /// What is read after them, as few rows ask ahead: see [`Stretch`].
    pub(crate) soon: *const u8,
    /// Those of the first range.
    pub(crate) octets: (usize, usize),
    /// Ranges of as many octets that follow each other and are summed apart; one, but for up to [`Scaled::ROWS_RANGES`] rows.
    pub(crate) ranges: usize,
    /// `[rows][pair]` from the first octet on, rows `x_stride` pairs apart.
    pub(crate) x: *const i32,
    pub(crate) x_stride: usize,
    /// What the units of each row have ([`Units::words`]), rows `x_stride` words apart too, ranges so many words; not read where
    /// inputs are bf16.
    pub(crate) known: *const i32,
    pub(crate) known_range: usize,
    /// The same inputs as bytes ([`WholeKernels::apart`]), rows `x_stride` words apart too: the lower ones lie `bytes_range / 2` behind, and
    /// the next range's `bytes_range`. Not read where the level does not take them.
    pub(crate) bytes: *const u8,
    pub(crate) bytes_range: usize,
    pub(crate) rows: usize,
    /// `[ranges][rows][panels * 16]`, ranges `acc_range` and rows `acc_stride` apart.
    pub(crate) acc: *mut f32,
    pub(crate) acc_range: usize,
    pub(crate) acc_stride: usize,
    /// Room for [`Scaled::BUFFER_FLOATS`], from a cache line on.
    pub(crate) buffer: *mut f32,
}

impl Scaled<'_> {
    /// Rows up to which several ranges are summed at once.
    pub(crate) const ROWS_RANGES: usize = 8;
    /// Inputs that may share a scale: groups must divide them, and units.
    pub(crate) const UNIT_MAX: usize = 256;
    pub(crate) const PARTS_MAX: usize = 16;
    /// A unit of two panels as words of pairs, or up to four as bytes, their scales and the offsets of their groups, and 16 tiles of sums.
    pub(crate) const BUFFER_FLOATS: usize =
        (Self::UNIT_MAX + 4 * 2 + 2 * Self::PARTS_MAX + 16 * LANES) * LANES;
}

/// Inputs `[octets.0 * 8, octets.1 * 8)` as whole numbers, by units that are cut at their multiples.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WholeInputs {
    /// bf16 all, from the first octet on.
    pub(crate) x: *const f32,
    pub(crate) octets: (usize, usize),
    pub(crate) units: Units,
    /// Pairs of whole numbers, the first of a pair in the lower half.
    pub(crate) out: *mut i32,
    /// [`Units::words`] per unit, or part of one at either end.
    pub(crate) known: *mut i32,
}

/// `acc[row][panel * 16 + lane]` plus the sums over pairs of inputs, of bf16 by bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs {
    /// `[rows][pair]`, rows `x_stride` pairs apart; the first of a pair in the lower half.
    pub(crate) x: *const i32,
    pub(crate) x_stride: usize,
    pub(crate) rows: usize,
    /// [`Layout::Bf16Pairs`] of panel 0 at the first pair.
    pub(crate) w: *const u16,
    /// Elements from one panel to the next.
    pub(crate) panel_stride: usize,
    pub(crate) panels: usize,
    pub(crate) pairs: usize,
    /// `[rows][panels * 16]`, rows `acc_stride` apart.
    pub(crate) acc: *mut f32,
    pub(crate) acc_stride: usize,
    /// Begin at zero instead of what `acc` holds.
    pub(crate) fresh: bool,
}

/// `acc[row][panel * 16 + lane]` plus the sums over pairs of positions of weight times value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weigh {
    /// Weights, `[rows][pair]`, rows `x_stride` pairs apart; the first of a pair in the lower half.
    pub(crate) x: *const i32,
    pub(crate) x_stride: usize,
    pub(crate) rows: usize,
    /// bf16 of the first pair's first position, positions `v_stride` apart.
    pub(crate) v: *const u16,
    pub(crate) v_stride: usize,
    pub(crate) panels: usize,
    pub(crate) pairs: usize,
    /// Whether the very first and the very last position are nobody's: their values count as zeros and are not read.
    pub(crate) without: (bool, bool),
    /// `[rows][panels * 16]`, rows `acc_stride` apart.
    pub(crate) acc: *mut f32,
    pub(crate) acc_stride: usize,
}

/// Compiles every kernel for one level, as a module of that name.
macro_rules! level {
    ($level:ident, $lanes:ty $(, $features:literal)?) => {
        pub(crate) mod $level {
            use super::{Bytes, Decode, Eighths, Kernels, LANES, Softmax, Stream, Sums, Sweep};

            pub(crate) const KERNELS: Kernels = Kernels { sweep, pairs: None, whole: None, attend: None, decode, stream, bytes, quantise, norm, add, silu, clamped, round, rotate, narrow, transpose, softmax, fold, blend, place, divide, exp };

            $(#[target_feature(enable = $features)])?
            unsafe fn sweep(s: &Sweep) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::sweep::sweep::<$lanes>(s) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn decode(d: &Decode<'_>) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::codes::decode::<$lanes>(d) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn stream(s: &Stream<'_>) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::stream::stream::<$lanes>(s) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn bytes(s: &Bytes<'_>) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::bytes::bytes::<$lanes>(s) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn quantise(x: *const f32, blocks: usize, out: *mut Eighths) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::bytes::quantise::<$lanes>(x, blocks, out) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn norm(x: *const f32, weight: *const f32, out: *mut f32, n: usize, eps: f32, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::norm::<$lanes>(x, weight, out, n, eps, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn add(x: *mut f32, y: *const f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::add::<$lanes>(x, y, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn silu(gate: *const f32, up: *const f32, out: *mut f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::silu::<$lanes>(gate, up, out, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn clamped(
                gate: *const f32,
                up: *const f32,
                out: *mut f32,
                n: usize,
                limit: f32,
                slope: f32,
                bf16: bool,
            ) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::clamped::<$lanes>(gate, up, out, n, limit, slope, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn round(x: *const f32, out: *mut f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::round::<$lanes>(x, out, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn rotate(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::rotate::<$lanes>(x, cos, sin, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn narrow(x: *const f32, out: *mut u16, n: usize) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::narrow::<$lanes>(x, out, n) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn transpose(rows: &[*const u8; LANES], words: usize, out: *mut u32, ahead: &[*const u8]) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::transpose::<$lanes>(rows, words, out, ahead) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(s: &Softmax) -> (f32, f32) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::softmax::<$lanes>(s) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn fold(acc: &Sums, part: &Sums, queries: usize, width: usize) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::fold::<$lanes>(acc, part, queries, width) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn blend(acc: *mut f32, part: *const f32, n: usize, a: f32, b: f32) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::blend::<$lanes>(acc, part, n, a, b) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn place(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize, rows: usize, n: usize) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::place::<$lanes>(from, from_stride, to, to_stride, rows, n) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn divide(acc: *const f32, total: f32, out: *mut f32, n: usize, bf16: bool) {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::divide::<$lanes>(acc, total, out, n, bf16) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exp(x: f32) -> f32 {
                // SAFETY: the caller's promise; the instructions are those of this level.
                unsafe { super::rows::exp::<$lanes>(x) }
            }
        }
    };
}

level!(portable, crate::lanes::portable::Portable);
#[cfg(target_arch = "x86_64")]
level!(avx2, crate::lanes::avx2::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
level!(avx512, crate::lanes::avx512::Avx512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");

/// AVX2 with products of whole numbers.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX2: Kernels = Kernels {
    whole: Some(WholeKernels { product: scaled::words_avx2, inputs: scaled::inputs_avx2, apart: None }),
    ..avx2::KERNELS
};

/// The same with AVX-VNNI.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX_VNNI: Kernels = Kernels {
    whole: Some(WholeKernels {
        product: scaled::words_avx_vnni,
        inputs: scaled::inputs_avx_vnni,
        apart: None,
    }),
    ..avx2::KERNELS
};

/// AVX-512 with products of whole numbers, of bytes too.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX512_VNNI: Kernels = Kernels {
    bytes: bytes_vnni::bytes,
    whole: Some(WholeKernels { product: scaled::words_vnni, inputs: scaled::inputs_vnni, apart: None }),
    ..avx512::KERNELS
};

/// The same with products of bf16.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX512_BF16: Kernels =
    Kernels { pairs: Some(BF16_PAIRS), attend: Some(BF16_PAIRS), ..AVX512_VNNI };

#[cfg(target_arch = "x86_64")]
const BF16_PAIRS: PairKernels = PairKernels {
    multiply: pairs::pairs,
    coded: CodedPairs::Scaled(scaled::halves),
    inputs_block: 256,
    turn: 2,
    interleave: pairs::interleave,
    weigh: Some(weigh::weigh),
};

/// AVX-512 with tiles for products.
#[cfg(target_arch = "x86_64")]
pub(crate) static AMX: Kernels = Kernels {
    bytes: bytes_vnni::bytes,
    whole: Some(WholeKernels {
        product: scaled::words_amx,
        inputs: scaled::inputs_vnni,
        apart: Some(scaled::bytes_vnni),
    }),
    pairs: Some(TILES),
    attend: Some(TILES),
    ..avx512::KERNELS
};

#[cfg(target_arch = "x86_64")]
const TILES: PairKernels = PairKernels {
    multiply: tiles::pairs,
    coded: CodedPairs::Rounded(coded_pairs::decode),
    inputs_block: 512,
    turn: tiles::INPUTS,
    weigh: None,
    ..BF16_PAIRS
};

#[cfg(test)]
mod tests {
    use super::{LANES, Layout, Softmax, Sums, Sweep};
    use crate::level::Level;

    /// A row's weights and sums over pieces of its positions, folded, against 64-bit floats: whatever lies beside its own
    /// positions, which may be none.
    #[test]
    fn softmax_folds_to_that_of_all_positions() {
        const WIDTH: usize = LANES;
        let score = |n: usize| ((n * 37 % 101) as f32 - 50.0) * 0.9;
        let value = |n: usize, lane: usize| ((n * 7 + lane * 3) % 19) as f32 - 9.0;
        let scale = 0.7f32;
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            for (own, cut) in
                [(0..256, 96), (3..200, 64), (17..18, 16), (100..131, 128), (5..9, 32), (40..80, 32)]
            {
                let mut floats = [0.0f32; 2 * (2 * LANES + WIDTH)];
                let (acc, part) = floats.split_at_mut(2 * LANES + WIDTH);
                let sums = |at: &mut [f32]| {
                    at[..LANES].fill(f32::NEG_INFINITY);
                    at[LANES..].fill(0.0);
                    let at = at.as_mut_ptr();
                    Sums { peak: at, total: at.wrapping_add(LANES), value: at.wrapping_add(2 * LANES) }
                };
                let (acc, part) = (sums(acc), sums(part));
                for piece in [0..cut, cut..256] {
                    let mut scores: Vec<f32> = (0..256).map(score).collect();
                    let own = own.start.max(piece.start)..own.end.min(piece.end);
                    let touched = piece.clone();
                    // SAFETY: the level is available; 256 scores, and sums of one query.
                    unsafe {
                        let softmax = Softmax { scores: scores.as_mut_ptr(), touched, own, scale };
                        (*part.peak, *part.total) = (level.kernels().softmax)(&softmax);
                        for lane in 0..WIDTH {
                            *part.value.add(lane) = piece.clone().map(|n| scores[n] * value(n, lane)).sum();
                        }
                        (level.kernels().fold)(&acc, &part, 1, WIDTH);
                    }
                }
                let weights: Vec<f64> =
                    own.clone().map(|n| (f64::from(score(n)) * f64::from(scale)).exp()).collect();
                let total: f64 = weights.iter().sum();
                for lane in 0..WIDTH {
                    let want: f64 =
                        own.clone().zip(&weights).map(|(n, w)| w * f64::from(value(n, lane))).sum();
                    // SAFETY: as above.
                    let got = unsafe { *acc.value.add(lane) / *acc.total };
                    assert!(
                        (f64::from(got) - want / total).abs() < 2e-5,
                        "{level}, {own:?}: {got} {}",
                        want / total
                    );
                }
            }
        }
    }

    /// The error that `exp` documents, over all arguments that matter: 2 units in the last place, and a clean zero below.
    #[test]
    fn exp_is_within_its_bound() {
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            // SAFETY: the level is available.
            let exp = |x: f32| unsafe { (level.kernels().exp)(x) };
            let mut worst = 0f64;
            for step in 0..400_000 {
                let x = -87.3 + step as f32 * (175.3 / 400_000.0);
                let want = f64::from(x).exp();
                worst = worst.max((f64::from(exp(x)) - want).abs() / want);
            }
            assert!(worst <= 2.0 * f64::from(f32::EPSILON), "{level}: {worst:e}");
            assert_eq!(exp(0.0), 1.0, "{level}");
            assert_eq!([exp(-88.0), exp(f32::NEG_INFINITY)], [0.0, 0.0], "{level}");
            assert!(exp(f32::INFINITY).is_finite() && exp(f32::NAN).is_nan(), "{level}");
        }
    }

    /// Rounding to bf16 is to nearest even, keeps infinities, and never turns not-a-number into a number.
    #[test]
    fn bf16_is_rounded_to_nearest_even() {
        let patterns = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_7fff, 0x1_8000, 0x1_8001];
        let exponents = [0u32, 0x3f80_0000, 0x7f00_0000, 0x7f7e_0000, 0x7f80_0000, 0xff80_0000];
        let all: Vec<f32> =
            exponents.iter().flat_map(|e| patterns.iter().map(move |p| f32::from_bits(e | p))).collect();
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            let mut got = vec![0.0f32; all.len()];
            let mut narrow = vec![0u16; all.len()];
            // SAFETY: the level is available; all three have equal length.
            unsafe {
                (level.kernels().round)(all.as_ptr(), got.as_mut_ptr(), all.len(), true);
                (level.kernels().narrow)(all.as_ptr(), narrow.as_mut_ptr(), all.len());
            }
            for ((x, got), narrow) in all.iter().zip(&got).zip(&narrow) {
                let want = half::bf16::from_f32(*x);
                let same =
                    |got: half::bf16| got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(
                    same(half::bf16::from_f32(*got)) && (got.is_nan() || *got == want.to_f32()),
                    "{level}: {x:e}"
                );
                assert!(same(half::bf16::from_bits(*narrow)), "{level}: {x:e}");
            }
        }
    }

    /// Every half is widened to exactly its value.
    #[test]
    fn halves_are_widened_exactly() {
        let halves: Vec<u16> = (0..=u16::MAX).collect();
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            let mut got = vec![0.0f32; halves.len()];
            let sweep = Sweep {
                x: [1.0f32].as_ptr(),
                x_stride: 1,
                rows: 1,
                layout: Layout::F16,
                w: halves.as_ptr().cast(),
                panel_stride: LANES,
                k_stride: LANES,
                panels: halves.len() / LANES,
                k: 1,
                acc: got.as_mut_ptr(),
                acc_stride: halves.len(),
                fresh: true,
                soon: None,
            };
            // SAFETY: one k of as many panels as halves fill, and as many sums.
            unsafe { (level.kernels().sweep)(&sweep) };
            for (half, got) in halves.iter().zip(&got) {
                let want = half::f16::from_bits(*half).to_f32();
                assert!(*got == want || (got.is_nan() && want.is_nan()), "{level}: {half:#x} gives {got:e}");
            }
        }
    }
}
