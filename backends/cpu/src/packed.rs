//! Weights as this backend keeps them, packed once at load. A product is one or several segments of panels, each of one
//! format: quantised parts stay quantised, parts of different formats lie beside each other.

mod draft;

use std::ops::Range;

use backend::weight::widen;
use backend::{BackendError, DType, KSum, Linear, MatrixView, WeightSource};
use half::bf16;

use crate::coded::Coded;
use crate::heads::PackedHeads;
use crate::kernel::{Kernels, Layout, Stretch};
use crate::lanes::LANES;
use crate::memory::Place;
use crate::operand::{Inputs, Operand};
use crate::pair_row::{PairKind, PairRow};
use crate::plain::Plain;
use crate::pool::Pool;

pub(crate) use draft::pack_all;

/// A weight of the CPU backend.
#[derive(Debug)]
pub struct CpuWeight(pub(crate) Kind);

#[derive(Debug)]
pub(crate) enum Kind {
    Product(Packed),
    /// A product per expert: equal shapes, sums and cuts into segments. Where formats are equal too, all are in one block
    /// of memory.
    Experts(Vec<Packed>),
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
    /// Ranges of K that are summed apart: 1, or the tree's.
    pub(crate) ranges: usize,
    pub(crate) bias: Option<Vec<f32>>,
    /// How rows of pairs lie that this is multiplied by.
    pub(crate) pair_row: PairRow,
    pub(crate) segments: Vec<Segment>,
}

/// Consecutive outputs in panels of one format.
#[derive(Debug)]
pub(crate) struct Segment {
    /// First output.
    pub(crate) first: usize,
    pub(crate) outputs: usize,
    panels: Panels,
}

#[derive(Debug)]
enum Panels {
    Plain(Plain),
    Coded(Coded),
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

    /// Whether products of activations in 8 bits are for some of these weights.
    pub(crate) fn has_bytes(&self) -> bool {
        self.segments.iter().any(|segment| segment.has_bytes(self.ranges))
    }

    /// The inputs' weights of one output, as floats.
    pub(crate) fn output(&self, kernels: &Kernels, output: usize, out: &mut [f32]) {
        let holds = |segment: &&Segment| output < segment.first + segment.outputs;
        let Some(segment) = self.segments.iter().find(holds) else { return };
        match &segment.panels {
            Panels::Plain(plain) => plain.output(output - segment.first, out),
            Panels::Coded(coded) => coded.output(kernels, output - segment.first, out),
        }
    }

    /// Whether segments begin and end where those of `other` do: panels of both can be walked side by side.
    pub(crate) fn is_cut_as(&self, other: &Packed) -> bool {
        self.cuts().eq(other.cuts())
    }

    fn cuts(&self) -> impl Iterator<Item = (usize, usize)> {
        self.segments.iter().map(|segment| (segment.first, segment.outputs))
    }

    fn pack(linear: &Linear<'_>, kernels: &Kernels, pool: &Pool) -> Result<Self, BackendError> {
        if let (KSum::Tree { .. }, Some(_), Some(part)) = (linear.sum, &linear.bias, linear.parts.first()) {
            return Err(weight_error(part.name(), "a bias belongs after the join of a tree".to_owned()));
        }
        let draft = draft::draft(linear)?;
        let places = Place::cut(&draft.sizes())?;
        let mut packed = draft.fill(places, kernels, pool)?;
        draft::lay_out_rows(std::slice::from_mut(&mut packed), kernels);
        Ok(packed)
    }
}

impl Segment {
    /// Panels of 16 outputs; the last may be padded.
    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// What rows of pairs a level's products with these weights take.
    fn pairs(&self, kernels: &Kernels, ranges: usize) -> Option<PairKind> {
        match &self.panels {
            Panels::Plain(plain) => {
                (kernels.pairs.is_some() && plain.layout == Layout::Bf16Pairs).then_some(PairKind::Bf16)
            }
            Panels::Coded(coded) => coded.pairs(kernels, ranges),
        }
    }

    /// Where a panel begins.
    pub(crate) fn start(&self, panel: usize) -> *const u8 {
        match &self.panels {
            Panels::Plain(plain) => plain.at(panel, 0, 0),
            Panels::Coded(coded) => coded.start(panel),
        }
    }

    /// Sums of some of the operand's ranges over their inputs: `acc[range][row][panel * 16 + lane]` for the panels of a
    /// stretch, ranges `acc_range` apart. Up to [`crate::kernel::Scaled::ROWS_RANGES`] rows, whose weights stream from
    /// memory, read panels from end to end through all ranges: what kernels ask for ahead is used next.
    ///
    /// # Safety
    /// `x` and `acc` are valid for the ranges, rows and panels, `buffer` for [`crate::coded::DECODED_FLOATS`].
    #[allow(clippy::too_many_arguments)] // the operands of one product, named by its two callers
    pub(crate) unsafe fn sum(
        &self,
        kernels: &Kernels,
        ranges: Range<usize>,
        stretch: Stretch,
        x: Operand<'_>,
        rows: usize,
        acc: *mut f32,
        acc_range: usize,
        buffer: *mut f32,
    ) {
        let all = x.weight.ranges;
        let panels = (stretch.panel, stretch.panels);
        // SAFETY: the caller's.
        unsafe {
            let coded = match &self.panels {
                Panels::Plain(plain) => {
                    return plain.sum(kernels, ranges, panels, x, rows, (acc, acc_range));
                }
                Panels::Coded(coded) => coded,
            };
            let Inputs { pairs, bytes, .. } = x.inputs(ranges.start);
            let bytes = bytes.is_some() && coded.has_bytes(all);
            if let Some((kind, inputs)) = coded.pairs(kernels, all).zip(pairs)
                && !bytes
            {
                return coded.sum_pairs(
                    kernels,
                    kind,
                    (ranges, all),
                    stretch,
                    inputs,
                    rows,
                    (acc, acc_range),
                    buffer,
                );
            }
            let each = coded.inputs / all;
            for (at, range) in ranges.enumerate() {
                let (summed, inputs) = ((range * each, (range + 1) * each), x.inputs(range));
                let acc = acc.add(at * acc_range);
                match inputs.bytes.filter(|_| bytes) {
                    Some(x) => coded.sum_bytes(kernels, summed, panels, x, rows, acc),
                    None => coded.sum(kernels, summed, stretch, inputs.x, inputs.stride, rows, acc, buffer),
                }
            }
        }
    }

    /// Sums of panels over the inputs of the only range: rows of floats so many apart.
    ///
    /// # Safety
    /// As for [`Segment::sum`].
    pub(crate) unsafe fn sum_floats(
        &self,
        kernels: &Kernels,
        stretch: Stretch,
        (x, stride): (*const f32, usize),
        rows: usize,
        acc: *mut f32,
        buffer: *mut f32,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match &self.panels {
                Panels::Plain(plain) => {
                    let inputs = Inputs { x, stride, pairs: None, bytes: None };
                    let panels = (stretch.panel, stretch.panels);
                    plain.sum_range(kernels, 0, panels, inputs, rows, (acc, panels.1 * LANES));
                }
                Panels::Coded(coded) => {
                    let summed = (0, coded.inputs);
                    coded.sum(kernels, summed, stretch, x, stride, rows, acc, buffer);
                }
            }
        }
    }

    /// Whether products of activations in 8 bits are for these weights.
    fn has_bytes(&self, ranges: usize) -> bool {
        match &self.panels {
            Panels::Plain(_) => false,
            Panels::Coded(coded) => coded.has_bytes(ranges),
        }
    }

    fn bytes(&self) -> usize {
        match &self.panels {
            Panels::Plain(plain) => plain.bytes(),
            Panels::Coded(coded) => coded.bytes(),
        }
    }

    fn put(&mut self, place: Place) {
        match &mut self.panels {
            Panels::Plain(plain) => plain.place = place,
            Panels::Coded(coded) => coded.place = place,
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
            WeightSource::Embedding(MatrixView::Plain(view)) => {
                view.check()?;
                let mut bytes = Vec::with_capacity(view.rows * view.cols * view.dtype.bytes());
                (0..view.rows).for_each(|row| bytes.extend_from_slice(view.row(row)));
                Kind::Table(Table { rows: view.rows, cols: view.cols, dtype: view.dtype, bytes })
            }
            // Rows are decoded on use, as those of a tied table are.
            WeightSource::Embedding(table @ MatrixView::Quantised(_)) => {
                let linear = Linear { parts: vec![*table], bias: None, sum: KSum::Ascending };
                Kind::Product(Packed::pack(&linear, kernels, pool)?)
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
            WeightSource::Experts(source) => Kind::Experts(pack_all(*source, kernels, pool)?),
        };
        Ok(CpuWeight(kind))
    }
}

pub(crate) fn weight_error(name: &str, reason: String) -> BackendError {
    BackendError::Weight { name: name.to_owned(), reason }
}
