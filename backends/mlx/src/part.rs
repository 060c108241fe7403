//! One matrix, or one per expert, as MLX multiplies by it: plain numbers, MLX's affine codes, or small floats of groups of
//! 32 that share a power of two (MXFP4, MXFP8). Other formats become affine at load where that says the same numbers
//! ([`backend::Quant::wide_affine`]): GGUF's blocks but Q2_K and Q6_K, INT4, and FP4 with other scales.
//!
//! Scales and biases have the step's dtype where that is exact and the device sums in f32 all the same, else f32; the
//! product is then computed in f32 and rounded once.

use std::ffi::CStr;

use backend::{AffineForm, DType, GgufBlock, Quant, QuantView, TensorView};
use mlx_rs::ops;
use mlx_rs::{Array, Dtype, Stream};
use mlx_sys::{mlx_optional_dtype, mlx_optional_int};

use crate::calls::raw;
use crate::graph::{Failure, Recorded, int, mlx_type};
use crate::platform;

/// Columns that share a scale in MLX, widest first.
const GROUPS: [usize; 3] = [128, 64, 32];
/// Bits of MLX's codes.
const BITS: [usize; 6] = [2, 3, 4, 5, 6, 8];

/// `[rows, cols]`, or `[experts, rows, cols]`.
#[derive(Debug)]
pub(crate) enum Part {
    Plain {
        rows: Array,
        /// The same memory as `[.., cols, rows]`.
        turned: Array,
    },
    Affine {
        /// `[.., rows, cols * bits / 32]`.
        codes: Array,
        /// `[.., rows, cols / group]`.
        scales: Array,
        biases: Array,
        bits: i32,
        group: i32,
    },
    Micro {
        /// `[.., rows, cols * bits / 32]`.
        codes: Array,
        /// Exponents, `[.., rows, cols / 32]`.
        scales: Array,
        micro: Micro,
    },
}

/// Small floats of 32 columns that share a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Micro {
    /// E2M1.
    Four,
    /// E4M3.
    Eight,
}

impl Micro {
    const GROUP: usize = 32;

    /// MLX's name of the mode.
    fn mode(self) -> &'static CStr {
        match self {
            Micro::Four => c"mxfp4",
            Micro::Eight => c"mxfp8",
        }
    }

    /// Columns of a group and bits of a code, as mlx-c takes them.
    fn sizes(self) -> [mlx_optional_int; 2] {
        let bits = if self == Micro::Four { 4 } else { 8 };
        [int(Self::GROUP), bits].map(|value| mlx_optional_int { value, has_value: true })
    }

    /// The numbers in f32.
    fn decoded(self, codes: &Array, scales: &Array) -> Recorded {
        let [group, bits] = self.sizes();
        let dtype = mlx_optional_dtype { value: Dtype::Float32.into(), has_value: true };
        let (none, stream) = (absent(), Stream::thread_local_or_default());
        // SAFETY: live handles; the result is a fresh array.
        raw(|result| unsafe {
            mlx_sys::mlx_dequantize(
                result,
                codes.as_ptr(),
                scales.as_ptr(),
                none.as_ptr(),
                group,
                bits,
                self.mode().as_ptr(),
                none.as_ptr(),
                dtype,
                stream.as_ptr(),
            )
        })
    }

    /// What `view` is such numbers of, with its codes and exponents, as MLX has them.
    fn of(view: &QuantView<'_>) -> Option<(Micro, Vec<u8>, Vec<u8>)> {
        if !view.cols.is_multiple_of(Self::GROUP) || view.origin != (0, 0) {
            return None;
        }
        let rows = 0..view.rows;
        let micro = match view.format {
            Quant::Fp4 { group: Self::GROUP } => Micro::Four,
            Quant::Fp8 { rows: 1, cols: Self::GROUP } => Micro::Eight,
            Quant::Gguf(GgufBlock::Mxfp4) => {
                // Blocks of an exponent and 16 bytes, whose lower halves are the first sixteen codes.
                let mut codes = Vec::with_capacity(view.rows * view.cols / 2);
                let mut exponents = Vec::with_capacity(view.rows * view.cols / Self::GROUP);
                for block in rows.flat_map(|row| view.codes(row).chunks_exact(17)) {
                    exponents.push(block[0]);
                    for shift in [0, 4] {
                        let pairs = block[1..].as_chunks::<2>().0.iter();
                        codes.extend(pairs.map(|[a, b]| a >> shift & 15 | (b >> shift & 15) << 4));
                    }
                }
                return Some((Micro::Four, codes, exponents));
            }
            _ => return None,
        };
        let scales = view.scales?;
        let exponents: Option<Vec<u8>> = scales.floats().into_iter().map(exponent).collect();
        Some((micro, rows.flat_map(|row| view.codes(row)).copied().collect(), exponents?))
    }
}

/// What mlx-c takes for an array that is not there.
fn absent() -> Array {
    // SAFETY: a fresh handle, which the array owns.
    unsafe { Array::from_ptr(mlx_sys::mlx_array_new()) }
}

/// Inputs in a type by which the device sums in f32.
fn summed_wide(x: &Array) -> Recorded {
    Ok(if platform::SUMS_ARE_WIDE { x.clone() } else { x.as_dtype(Dtype::Float32)? })
}

/// The byte of E8M0 that means `scale`, where there is one.
fn exponent(scale: f32) -> Option<u8> {
    const LEAST: f32 = f32::from_bits(1 << 22);
    match scale.to_bits() {
        _ if scale == LEAST => Some(0),
        bits if bits << 9 == 0 && (1..255).contains(&(bits >> 23)) => Some((bits >> 23) as u8),
        _ => None,
    }
}

impl Part {
    pub(crate) fn plain(rows: Array) -> Self {
        // A view: nothing to fail on an array of two axes or more.
        let turned = rows.swap_axes(-1, -2).unwrap_or_else(|_| rows.clone());
        Part::Plain { rows, turned }
    }

    /// The same numbers in one of MLX's forms of codes; `None` where there is none.
    pub(crate) fn coded(view: &QuantView<'_>) -> Option<Result<Self, Failure>> {
        let Some((micro, codes, exponents)) = Micro::of(view) else { return Part::affine(view) };
        let shape = |bytes: &[u8]| [view.rows, bytes.len() / view.rows.max(1)].map(int);
        let scales = Array::from_slice(&exponents, &shape(&exponents));
        let codes = Array::from_slice(&codes, &shape(&codes)).view_dtype(Dtype::Uint32);
        Some(codes.map(|codes| Part::Micro { codes, scales, micro }).map_err(Failure::from))
    }

    /// The same numbers in MLX's affine form, scales in f32; `None` where there is no such form.
    fn affine(view: &QuantView<'_>) -> Option<Result<Self, Failure>> {
        let AffineForm { bits, group: shared } = view.format.wide_affine()?;
        let group = GROUPS.into_iter().find(|group| shared.is_multiple_of(*group))?;
        if !BITS.contains(&bits)
            || !view.cols.is_multiple_of(32)
            || [view.rows, view.cols].iter().any(|n| int(*n) == i32::MAX)
        {
            return None;
        }
        let made = match view.format {
            Quant::Affine { .. } if group == shared => as_stored(view),
            _ => repacked(view, bits, shared, group),
        };
        Some(made.map(|[codes, scales, biases]| Part::Affine {
            codes,
            scales,
            biases,
            bits: int(bits),
            group: int(group),
        }))
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match self {
            Part::Plain { rows, turned } => vec![rows, turned],
            Part::Affine { codes, scales, biases, .. } => vec![codes, scales, biases],
            Part::Micro { codes, scales, .. } => vec![codes, scales],
        }
    }

    /// The arrays that make it, each once.
    pub(crate) fn columns(&self) -> Vec<&Array> {
        match self {
            Part::Plain { rows, .. } => vec![rows],
            Part::Affine { codes, scales, biases, .. } => vec![codes, scales, biases],
            Part::Micro { codes, scales, .. } => vec![codes, scales],
        }
    }

    /// A part of this kind, of other [`Part::columns`].
    pub(crate) fn with(&self, columns: Vec<Array>) -> Result<Self, Failure> {
        let mut columns = columns.into_iter();
        match (self, [columns.next(), columns.next(), columns.next()]) {
            (Part::Plain { .. }, [Some(rows), None, None]) => Ok(Part::plain(rows)),
            (Part::Affine { bits, group, .. }, [Some(codes), Some(scales), Some(biases)]) => {
                Ok(Part::Affine { codes, scales, biases, bits: *bits, group: *group })
            }
            (Part::Micro { micro, .. }, [Some(codes), Some(scales), None]) => {
                Ok(Part::Micro { codes, scales, micro: *micro })
            }
            _ => Err(Failure("arrays of another kind".to_owned())),
        }
    }

    /// Scales and biases in `dtype` if that loses nothing and the device sums in f32 whatever they are.
    pub(crate) fn narrowed(self, dtype: Dtype) -> Result<Self, Failure> {
        let Part::Affine { codes, scales, biases, bits, group } = self else { return Ok(self) };
        let narrow = [scales.as_dtype(dtype)?, biases.as_dtype(dtype)?];
        let same = |narrow: &Array, wide: &Array| -> Result<bool, Failure> {
            Ok(narrow.as_dtype(Dtype::Float32)?.eq_exact(wide)?)
        };
        let [scales, biases] =
            if platform::SUMS_ARE_WIDE && same(&narrow[0], &scales)? && same(&narrow[1], &biases)? {
                narrow
            } else {
                [scales, biases]
            };
        Ok(Part::Affine { codes, scales, biases, bits, group })
    }

    /// Number of rows (outputs).
    pub(crate) fn rows(&self) -> usize {
        let array = match self {
            Part::Plain { rows, .. } => rows,
            Part::Affine { codes, .. } | Part::Micro { codes, .. } => codes,
        };
        array.dim(-2) as usize
    }

    /// `x W^T` in the type of `x`.
    pub(crate) fn product(&self, x: &Array) -> Recorded {
        let product = match self {
            Part::Plain { turned, .. } => x.matmul(turned)?,
            Part::Affine { codes, scales, biases, bits, group } => {
                let wide = x.as_dtype(scales.dtype())?;
                ops::quantized_matmul(wide, codes, scales, biases, true, *group, *bits)?
            }
            Part::Micro { codes, scales, micro } => {
                let (x, [group, bits]) = (summed_wide(x)?, micro.sizes());
                let (none, stream) = (absent(), Stream::thread_local_or_default());
                // SAFETY: live handles; the result is a fresh array.
                raw(|result| unsafe {
                    mlx_sys::mlx_quantized_matmul(
                        result,
                        x.as_ptr(),
                        codes.as_ptr(),
                        scales.as_ptr(),
                        none.as_ptr(),
                        true,
                        group,
                        bits,
                        micro.mode().as_ptr(),
                        stream.as_ptr(),
                    )
                })?
            }
        };
        Ok(product.as_dtype(x.dtype())?)
    }

    /// `x W^T` with the matrix of expert `experts[i]` for `x[i] = [.., rows, cols]`, in the type of `x`. `sorted`: the
    /// experts are in ascending order.
    pub(crate) fn gathered(&self, x: &Array, experts: &Array, sorted: bool) -> Recorded {
        let product = match self {
            Part::Plain { turned, .. } => {
                ops::gather_mm(x.as_dtype(turned.dtype())?, turned, None, experts, sorted)?
            }
            Part::Affine { codes, scales, biases, bits, group } => {
                let wide = x.as_dtype(scales.dtype())?;
                ops::gather_qmm(wide, codes, scales, biases, None, experts, true, *group, *bits, sorted)?
            }
            Part::Micro { codes, scales, micro } => {
                let (x, [group, bits]) = (summed_wide(x)?, micro.sizes());
                let (none, stream) = (absent(), Stream::thread_local_or_default());
                // SAFETY: live handles; the result is a fresh array.
                raw(|result| unsafe {
                    mlx_sys::mlx_gather_qmm(
                        result,
                        x.as_ptr(),
                        codes.as_ptr(),
                        scales.as_ptr(),
                        none.as_ptr(),
                        none.as_ptr(),
                        experts.as_ptr(),
                        true,
                        group,
                        bits,
                        micro.mode().as_ptr(),
                        sorted,
                        stream.as_ptr(),
                    )
                })?
            }
        };
        Ok(product.as_dtype(x.dtype())?)
    }

    /// Rows `ids` in `dtype`.
    pub(crate) fn take(&self, ids: &Array, dtype: Dtype) -> Recorded {
        let rows = match self {
            Part::Plain { rows, .. } => rows.take_axis(ids, 0)?,
            Part::Affine { codes, scales, biases, bits, group } => {
                let [codes, scales, biases] =
                    [codes.take_axis(ids, 0)?, scales.take_axis(ids, 0)?, biases.take_axis(ids, 0)?];
                ops::dequantize(codes, scales, &biases, *group, *bits)?
            }
            Part::Micro { codes, scales, micro } => {
                micro.decoded(&codes.take_axis(ids, 0)?, &scales.take_axis(ids, 0)?)?
            }
        };
        Ok(rows.as_dtype(dtype)?)
    }

    /// The numbers.
    pub(crate) fn decoded(&self) -> Recorded {
        Ok(match self {
            Part::Plain { rows, .. } => rows.clone(),
            Part::Affine { codes, scales, biases, bits, group } => {
                ops::dequantize(codes, scales, biases, *group, *bits)?
            }
            Part::Micro { codes, scales, micro } => micro.decoded(codes, scales)?,
        })
    }

    pub(crate) fn alike(&self, other: &Part) -> bool {
        match (self, other) {
            (Part::Plain { rows: a, .. }, Part::Plain { rows: b, .. }) => a.dtype() == b.dtype(),
            (Part::Affine { bits, group, scales, .. }, Part::Affine { bits: b, group: g, scales: s, .. }) => {
                bits == b && group == g && scales.dtype() == s.dtype()
            }
            (Part::Micro { micro: a, .. }, Part::Micro { micro: b, .. }) => a == b,
            _ => false,
        }
    }
}

/// Neighbours of one kind as one part, stacked by rows.
pub(crate) fn merged(parts: Vec<Part>) -> Result<Vec<Part>, Failure> {
    let runs: Vec<&[Part]> = parts.chunk_by(Part::alike).collect();
    if runs.len() == parts.len() {
        return Ok(parts);
    }
    runs.into_iter().map(|run| join(run, |arrays| Ok(ops::concatenate(arrays, -2)?))).collect()
}

/// Joins parts of one kind, array by array.
fn join(parts: &[Part], join: impl Fn(&[&Array]) -> Recorded) -> Result<Part, Failure> {
    let Some(first) = parts.first() else { return Err(Failure("no parts".to_owned())) };
    let column = |at: usize| -> Recorded {
        let arrays: Vec<&Array> = parts.iter().filter_map(|part| part.columns().get(at).copied()).collect();
        join(&arrays)
    };
    first.with((0..first.columns().len()).map(column).collect::<Result<_, _>>()?)
}

/// MLX's own codes, as the checkpoint has them.
fn as_stored(view: &QuantView<'_>) -> Result<[Array; 3], Failure> {
    let row_bytes = view.format.code_bytes(view.cols);
    let bytes: Vec<u8> = (0..view.rows).flat_map(|row| view.codes(row)).copied().collect();
    let codes = Array::from_slice(&bytes, &[int(view.rows), int(row_bytes)]).view_dtype(Dtype::Uint32)?;
    let numbers = |numbers: Option<TensorView<'_>>| -> Recorded {
        let Some(numbers) = numbers else { return Err(Failure("codes without scales".to_owned())) };
        let bytes: Vec<u8> = (0..numbers.rows).flat_map(|row| numbers.row(row)).copied().collect();
        let raw = Array::from_slice(&bytes, &[int(numbers.rows), int(numbers.cols * numbers.dtype.bytes())]);
        Ok(raw.view_dtype(mlx_type(numbers.dtype))?.as_dtype(mlx_type(DType::F32))?)
    };
    Ok([codes, numbers(view.scales)?, numbers(view.biases)?])
}

/// Codes of any affine form, as MLX packs them; a scale that more columns share than MLX's is repeated.
fn repacked(view: &QuantView<'_>, bits: usize, shared: usize, group: usize) -> Result<[Array; 3], Failure> {
    let (rows, cols) = (view.rows, view.cols);
    let groups = cols / group;
    let mut stream = Vec::with_capacity(rows * cols * bits / 8);
    let (mut scales, mut biases) = (Vec::with_capacity(rows * groups), Vec::with_capacity(rows * groups));
    let (mut codes, mut scale, mut bias) =
        (vec![0; cols], vec![0.0; cols / shared], vec![0.0; cols / shared]);
    for row in 0..rows {
        view.wide_affine_row(row, &mut codes, &mut scale, &mut bias);
        // Eight codes are `bits` bytes.
        for codes in codes.chunks_exact(8) {
            let packed =
                codes.iter().enumerate().fold(0u64, |all, (i, code)| all | u64::from(*code) << (i * bits));
            stream.extend_from_slice(&packed.to_le_bytes()[..bits]);
        }
        for at in 0..groups {
            scales.push(scale[at * group / shared]);
            biases.push(bias[at * group / shared]);
        }
    }
    let codes = Array::from_slice(&stream, &[int(rows), int(cols * bits / 8)]).view_dtype(Dtype::Uint32)?;
    let shape = [int(rows), int(groups)];
    Ok([codes, Array::from_slice(&scales, &shape), Array::from_slice(&biases, &shape)])
}
