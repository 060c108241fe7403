//! Weights as the kernels read them: panels of 16 outputs, K-major, packed once at load. bf16 stays bf16 in pairs along
//! K (the layout of AMX and AVX-512 BF16 tiles too), f16 stays f16, f32 stays f32.

use backend::weight::widen;
use backend::{BackendError, DType, KSum, Linear, MatrixView, TensorView, WeightSource};
use half::{bf16, f16};

use crate::heads::PackedHeads;
use crate::kernel::{Kernels, Layout};
use crate::lanes::LANES;
use crate::memory::Memory;
use crate::pool::Pool;

/// A weight of the CPU backend.
#[derive(Debug)]
pub struct CpuWeight(pub(crate) Kind);

#[derive(Debug)]
pub(crate) enum Kind {
    Product(Packed),
    Heads(PackedHeads),
    Table(Table),
    /// A norm's scale or a bias, rounded to the step's dtype.
    Vector(Vec<f32>),
}

/// A product's weight.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) layout: Layout,
    /// Ranges of K that are summed apart: 1, or the tree's.
    pub(crate) ranges: usize,
    pub(crate) bias: Option<Vec<f32>>,
    memory: Memory,
}

/// An embedding table in the checkpoint's type, row by row.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    dtype: DType,
    bytes: Vec<u8>,
}

impl Packed {
    /// Inputs of one range.
    pub(crate) fn range_inputs(&self) -> usize {
        self.inputs / self.ranges
    }

    /// Panels of 16 outputs; the last may be padded.
    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    fn element_bytes(&self) -> usize {
        if self.layout == Layout::F32 { 4 } else { 2 }
    }

    /// Elements of one range of one panel. An odd range of bf16 is padded to whole pairs.
    fn range_elements(&self) -> usize {
        let inputs = self.range_inputs();
        LANES * if self.layout == Layout::Bf16Pairs { inputs.next_multiple_of(2) } else { inputs }
    }

    /// Elements from one panel to the next.
    pub(crate) fn panel_elements(&self) -> usize {
        self.ranges * self.range_elements()
    }

    /// Where input `k` (even) of range `range` of `panel` lies.
    pub(crate) fn at(&self, panel: usize, range: usize, k: usize) -> *const u8 {
        let elements = panel * self.panel_elements() + range * self.range_elements() + k * LANES;
        self.memory.at(elements * self.element_bytes())
    }

    /// The inputs' weights of one output, as floats.
    pub(crate) fn output(&self, output: usize, out: &mut [f32]) {
        let (panel, lane) = (output / LANES, output % LANES);
        for (range, out) in out.chunks_exact_mut(self.range_inputs()).enumerate() {
            let at = self.at(panel, range, 0);
            for (k, x) in out.iter_mut().enumerate() {
                // SAFETY: the element of (k, lane) lies within this panel's range, written by `pack`.
                *x = unsafe {
                    match self.layout {
                        Layout::Bf16Pairs => {
                            let pair = at.cast::<u16>().add((k & !1) * LANES + lane * 2);
                            bf16::from_bits(*pair.add(k & 1)).to_f32()
                        }
                        Layout::F16 => f16::from_bits(*at.cast::<u16>().add(k * LANES + lane)).to_f32(),
                        Layout::Bf16 | Layout::F32 => *at.cast::<f32>().add(k * LANES + lane),
                    }
                };
            }
        }
    }

    pub(crate) fn pack(linear: &Linear<'_>, kernels: &Kernels, pool: &Pool) -> Result<Self, BackendError> {
        let Some(first) = linear.parts.first() else {
            return Err(weight_error("", "a linear layer without parts".to_owned()));
        };
        let first = plain(std::slice::from_ref(first))?[0];
        let parts = plain(&linear.parts)?;
        for part in &parts {
            if part.cols != first.cols {
                let reason = format!("{} columns beside {} of {}", part.cols, first.cols, first.name);
                return Err(weight_error(part.name, reason));
            }
        }
        let (ranges, tree) = match linear.sum {
            KSum::Ascending => (1, false),
            KSum::Tree { ranges } => (ranges, true),
        };
        if ![1, 2, 4, 8].contains(&ranges) || first.cols % ranges != 0 {
            return Err(weight_error(first.name, format!("{} columns in {ranges} ranges", first.cols)));
        }
        if tree && linear.bias.is_some() {
            return Err(weight_error(first.name, "a bias belongs after the join of a tree".to_owned()));
        }
        let same = parts.iter().all(|part| part.dtype == first.dtype);
        let layout = match first.dtype {
            DType::BF16 if same => Layout::Bf16Pairs,
            DType::F16 if same => Layout::F16,
            _ => Layout::F32,
        };
        let outputs = parts.iter().map(|part| part.rows).sum();
        let bias = linear.bias.as_ref().map(|parts| stacked_bias(parts, outputs)).transpose()?;
        let inputs = first.cols;
        let mut packed = Packed { outputs, inputs, layout, ranges, bias, memory: Memory::unwritten(0)? };
        let bytes = packed.panels() * packed.panel_elements() * packed.element_bytes();
        packed.memory = Memory::unwritten(bytes)?;
        let rows: Vec<(&TensorView<'_>, usize)> =
            parts.iter().flat_map(|part| (0..part.rows).map(move |row| (part, row))).collect();
        pool.run(packed.panels(), usize::MAX, |panel, _| {
            let end = rows.len().min((panel + 1) * LANES);
            packed.pack_panel(panel, &rows[panel * LANES..end], kernels);
        });
        Ok(packed)
    }

    fn pack_panel(&self, panel: usize, rows: &[(&TensorView<'_>, usize)], kernels: &Kernels) {
        let inputs = self.range_inputs();
        let padded = inputs.next_multiple_of(2);
        for range in 0..self.ranges {
            let out = self.at(panel, range, 0).cast_mut();
            // One range of up to 16 rows in this layout's type, then turned K-major. Missing rows are zeros.
            match self.layout {
                Layout::Bf16Pairs => {
                    let mut lines = vec![0u16; LANES * padded];
                    for (line, (part, row)) in lines.chunks_exact_mut(padded).zip(rows) {
                        let bytes = &part.row(*row)[range * inputs * 2..][..inputs * 2];
                        for (x, pair) in line.iter_mut().zip(bytes.as_chunks::<2>().0) {
                            *x = u16::from_le_bytes(*pair);
                        }
                    }
                    let rows = std::array::from_fn(|row| lines[row * padded..].as_ptr().cast::<u8>());
                    // SAFETY: each row has padded / 2 words, and `out` room for 16 times as many: this panel's range,
                    // which no other task writes.
                    unsafe { (kernels.transpose)(&rows, padded / 2, out.cast()) };
                }
                Layout::F16 => {
                    for (lane, k) in (0..LANES).flat_map(|lane| (0..inputs).map(move |k| (lane, k))) {
                        let half = rows.get(lane).map_or(0, |(part, row)| {
                            let at = (range * inputs + k) * 2;
                            let bytes = part.row(*row);
                            u16::from_le_bytes([bytes[at], bytes[at + 1]])
                        });
                        // SAFETY: [k][lane] of this panel's range, which no other task writes.
                        unsafe { *out.cast::<u16>().add(k * LANES + lane) = half };
                    }
                }
                Layout::Bf16 | Layout::F32 => {
                    let mut lines = vec![0f32; LANES * inputs];
                    for (line, (part, row)) in lines.chunks_exact_mut(inputs).zip(rows) {
                        let size = part.dtype.bytes();
                        widen(part.dtype, &part.row(*row)[range * inputs * size..][..inputs * size], line);
                    }
                    let rows = std::array::from_fn(|row| lines[row * inputs..].as_ptr().cast::<u8>());
                    // SAFETY: each row has `inputs` words, and `out` room for 16 times as many: this panel's range,
                    // which no other task writes.
                    unsafe { (kernels.transpose)(&rows, inputs, out.cast()) };
                }
            }
        }
    }
}

impl Table {
    /// Row `row` as floats.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.cols * self.dtype.bytes();
        widen(self.dtype, &self.bytes[row * bytes..][..bytes], out);
    }
}

impl CpuWeight {
    pub(crate) fn load(
        source: &WeightSource<'_>,
        kernels: &Kernels,
        pool: &Pool,
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let kind = match source {
            WeightSource::Linear(linear) => Kind::Product(Packed::pack(linear, kernels, pool)?),
            WeightSource::Embedding(view) => {
                let view = plain(std::slice::from_ref(view))?[0];
                let mut bytes = Vec::with_capacity(view.rows * view.cols * view.dtype.bytes());
                (0..view.rows).for_each(|row| bytes.extend_from_slice(view.row(row)));
                Kind::Table(Table { rows: view.rows, cols: view.cols, dtype: view.dtype, bytes })
            }
            WeightSource::Norm(view) | WeightSource::Bias(view) | WeightSource::Exact(view) => {
                view.check()?;
                if view.rows != 1 {
                    return Err(weight_error(
                        view.name,
                        format!("{} rows where a vector is needed", view.rows),
                    ));
                }
                let mut vector = vec![0.0; view.cols];
                widen(view.dtype, view.row(0), &mut vector);
                if dtype == DType::BF16 && !matches!(source, WeightSource::Exact(_)) {
                    vector.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
                }
                Kind::Vector(vector)
            }
            WeightSource::Heads(heads) => Kind::Heads(PackedHeads::pack(heads, kernels, pool, dtype)?),
            WeightSource::Experts(_) => {
                return Err(weight_error("", "experts are not supported yet".to_owned()));
            }
        };
        Ok(CpuWeight(kind))
    }
}

fn stacked_bias(parts: &[TensorView<'_>], outputs: usize) -> Result<Vec<f32>, BackendError> {
    let mut bias = Vec::with_capacity(outputs);
    for part in parts {
        part.check()?;
        let mut floats = vec![0.0; part.cols];
        widen(part.dtype, part.row(0), &mut floats);
        bias.extend(floats);
    }
    if bias.len() != outputs {
        let name = parts.first().map_or("", |part| part.name);
        return Err(weight_error(name, format!("{} biases for {outputs} outputs", bias.len())));
    }
    Ok(bias)
}

/// Matrices of numbers, checked.
fn plain<'a>(parts: &[MatrixView<'a>]) -> Result<Vec<TensorView<'a>>, BackendError> {
    let one = |part: &MatrixView<'a>| match part {
        MatrixView::Plain(view) => view.check().map(|()| *view),
        MatrixView::Quantised(view) => {
            Err(weight_error(view.name, format!("{} is not supported yet", view.format)))
        }
    };
    parts.iter().map(one).collect()
}

pub(crate) fn weight_error(name: &str, reason: String) -> BackendError {
    BackendError::Weight { name: name.to_owned(), reason }
}
