//! Weights as this backend keeps them, packed once at load. A product is one or several segments of panels, each of one
//! format: quantised parts stay quantised, parts of different formats lie beside each other.

use std::sync::atomic::{AtomicBool, Ordering};

use backend::weight::widen;
use backend::{BackendError, DType, ExpertSource, KSum, Linear, MatrixView, TensorView, WeightSource};
use half::bf16;

use crate::coded::Coded;
use crate::heads::PackedHeads;
use crate::kernel::{Kernels, Layout};
use crate::lanes::LANES;
use crate::memory::Place;
use crate::operand::Inputs;
use crate::pair_row::PairRow;
use crate::plain::Plain;
use crate::pool::Pool;

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

    /// Whether a level's products of bf16 pairs are for some of these weights.
    pub(crate) fn has_pairs(&self) -> bool {
        self.segments.iter().any(|segment| segment.has_pairs(self.ranges))
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
        let draft = draft(linear)?;
        let places = Place::cut(&draft.sizes())?;
        let mut packed = draft.fill(places, kernels, pool)?;
        lay_out_rows(std::slice::from_mut(&mut packed));
        Ok(packed)
    }
}

impl Segment {
    /// Panels of 16 outputs; the last may be padded.
    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Whether a level's products of bf16 pairs are for these weights.
    fn has_pairs(&self, ranges: usize) -> bool {
        match &self.panels {
            Panels::Plain(plain) => plain.layout == Layout::Bf16Pairs,
            Panels::Coded(coded) => coded.has_pairs(ranges),
        }
    }

    /// Sums of range `range` of `[0, ranges)` over its inputs: `acc[row][panel * 16 + lane]` for `panels` panels from
    /// `panel` on. `inputs` begin at the range's first.
    ///
    /// # Safety
    /// `inputs` and `acc` are valid for the rows and panels, `buffer` for [`crate::coded::DECODED_FLOATS`].
    #[allow(clippy::too_many_arguments)] // the operands of one product, named by its two callers
    pub(crate) unsafe fn sum(
        &self,
        kernels: &Kernels,
        (range, ranges): (usize, usize),
        panels: (usize, usize),
        inputs: Inputs<'_>,
        rows: usize,
        acc: *mut f32,
        buffer: *mut f32,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match &self.panels {
                Panels::Plain(plain) => plain.sum(kernels, range, panels, inputs, rows, acc),
                Panels::Coded(coded) => {
                    let each = coded.inputs / ranges;
                    let summed = (range * each, (range + 1) * each);
                    if let Some(x) = inputs.bytes.filter(|_| coded.has_bytes(ranges)) {
                        return coded.sum_bytes(kernels, summed, panels, x, rows, acc);
                    }
                    match (kernels.pairs, inputs.pairs) {
                        (Some(pairs), Some(x)) if coded.has_pairs(ranges) => {
                            coded.sum_pairs(&pairs, summed, panels, x, rows, acc, buffer);
                        }
                        _ => coded.sum(kernels, summed, panels, inputs.x, inputs.stride, rows, acc, buffer),
                    }
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

    /// The size of groups whose sums of inputs the products of pairs want.
    fn sums_group(&self, ranges: usize) -> Option<usize> {
        match &self.panels {
            Panels::Coded(coded) if coded.has_pairs(ranges) && coded.form.has_offsets() => {
                Some(coded.form.group)
            }
            _ => None,
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

/// What a linear layer becomes: its numbers, and its segments, which have no place yet.
struct Draft<'a> {
    packed: Packed,
    segments: Vec<DraftSegment<'a>>,
}

/// A segment and the parts it is made of.
struct DraftSegment<'a> {
    segment: Segment,
    parts: Vec<MatrixView<'a>>,
}

impl Draft<'_> {
    /// Bytes of the places of its segments.
    fn sizes(&self) -> Vec<usize> {
        self.segments.iter().map(|draft| draft.segment.bytes()).collect()
    }

    /// Writes all panels to one place per segment. Errors when codes are not numbers.
    fn fill(
        self,
        places: impl IntoIterator<Item = Place>,
        kernels: &Kernels,
        pool: &Pool,
    ) -> Result<Packed, BackendError> {
        let Draft { mut packed, segments } = self;
        for (mut draft, place) in segments.into_iter().zip(places) {
            draft.segment.put(place);
            draft.fill(kernels, pool)?;
            packed.segments.push(draft.segment);
        }
        Ok(packed)
    }
}

impl DraftSegment<'_> {
    fn fill(&self, kernels: &Kernels, pool: &Pool) -> Result<(), BackendError> {
        let rows: Vec<(&MatrixView<'_>, usize)> =
            self.parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (part, row))).collect();
        let numbers = AtomicBool::new(true);
        pool.run(self.segment.panels(), usize::MAX, |panel, _| {
            let rows = &rows[panel * LANES..rows.len().min((panel + 1) * LANES)];
            match &self.segment.panels {
                Panels::Plain(plain) => plain.pack_panel(panel, rows, kernels),
                Panels::Coded(coded) => {
                    if !coded.pack_panel(panel, rows) {
                        numbers.store(false, Ordering::Relaxed);
                    }
                }
            }
        });
        match (numbers.into_inner(), self.parts.first()) {
            (false, Some(part)) => Err(weight_error(part.name(), "codes that are not numbers".to_owned())),
            _ => Ok(()),
        }
    }

    fn takes(&self, part: &MatrixView<'_>, ranges: usize) -> bool {
        match (&self.segment.panels, panels(part, ranges)) {
            (Panels::Plain(own), Panels::Plain(other)) => own.layout == other.layout,
            (Panels::Coded(own), Panels::Coded(other)) => own.form == other.form,
            _ => false,
        }
    }
}

/// Checks a linear layer.
fn draft<'a>(linear: &Linear<'a>) -> Result<Draft<'a>, BackendError> {
    let Some(first) = linear.parts.first() else {
        return Err(weight_error("", "a linear layer without parts".to_owned()));
    };
    let inputs = first.cols();
    for part in &linear.parts {
        part.check()?;
        if part.cols() != inputs {
            let reason = format!("{} columns beside {inputs} of {}", part.cols(), first.name());
            return Err(weight_error(part.name(), reason));
        }
    }
    let (ranges, tree) = match linear.sum {
        KSum::Ascending => (1, false),
        KSum::Tree { ranges } => (ranges, true),
    };
    if ![1, 2, 4, 8].contains(&ranges) || !inputs.is_multiple_of(ranges) {
        return Err(weight_error(first.name(), format!("{inputs} columns in {ranges} ranges")));
    }
    if tree && linear.bias.is_some() {
        return Err(weight_error(first.name(), "a bias belongs after the join of a tree".to_owned()));
    }
    let mut drafts: Vec<DraftSegment<'a>> = Vec::new();
    let mut outputs = 0;
    for part in &linear.parts {
        // Parts of one format share panels.
        match drafts.last_mut().filter(|draft| draft.takes(part, ranges)) {
            Some(draft) => {
                draft.parts.push(*part);
                draft.segment.outputs += part.rows();
            }
            None => {
                let segment = Segment { first: outputs, outputs: part.rows(), panels: panels(part, ranges) };
                drafts.push(DraftSegment { segment, parts: vec![*part] });
            }
        }
        outputs += part.rows();
    }
    for draft in &mut drafts {
        match &mut draft.segment.panels {
            Panels::Plain(plain) => plain.outputs = draft.segment.outputs,
            Panels::Coded(coded) => coded.outputs = draft.segment.outputs,
        }
    }
    let bias = linear.bias.as_ref().map(|parts| stacked_bias(parts, outputs)).transpose()?;
    let pair_row = PairRow::default();
    let packed = Packed { outputs, inputs, ranges, bias, pair_row, segments: Vec::new() };
    Ok(Draft { packed, segments: drafts })
}

/// Panels for `part` alone, without a place.
fn panels(part: &MatrixView<'_>, ranges: usize) -> Panels {
    let (outputs, inputs) = (part.rows(), part.cols());
    match part {
        MatrixView::Plain(view) => Panels::Plain(Plain::new(outputs, inputs, ranges, view.dtype)),
        MatrixView::Quantised(view) => match Coded::new(view) {
            Some(coded) => Panels::Coded(coded),
            // Scales that change from one input to the next are no smaller than numbers.
            None => Panels::Plain(Plain::new(outputs, inputs, ranges, DType::F32)),
        },
    }
}

/// Gives weights of one shape rows of pairs of one layout: rows are made once for all of them.
fn lay_out_rows(weights: &mut [Packed]) {
    let Some((inputs, ranges)) = weights.first().map(|weight| (weight.range_inputs(), weight.ranges)) else {
        return;
    };
    let segments = weights.iter().flat_map(|weight| &weight.segments);
    let row = PairRow::new(inputs, ranges, segments.filter_map(|segment| segment.sums_group(ranges)));
    weights.iter_mut().for_each(|weight| weight.pair_row = row.clone());
}

/// Packs the experts of a mixture, each as it comes.
fn experts(source: &dyn ExpertSource, kernels: &Kernels, pool: &Pool) -> Result<Vec<Packed>, BackendError> {
    let count = source.count();
    let mut all: Vec<Packed> = Vec::with_capacity(count);
    // Places for experts that are as the first.
    let (mut sizes, mut places) = (Vec::new(), Vec::new().into_iter());
    source.each(&mut |linear| {
        let name = linear.parts.first().map_or("", |part| part.name());
        let draft = draft(linear)?;
        if all.is_empty() {
            sizes = draft.sizes();
            places = Place::cut(&sizes.repeat(count))?.into_iter();
        }
        let packed = match draft.sizes() {
            same if same == sizes => draft.fill(places.by_ref().take(sizes.len()), kernels, pool)?,
            other => draft.fill(Place::cut(&other)?, kernels, pool)?,
        };
        let first = all.first().unwrap_or(&packed);
        let same = (packed.inputs, packed.ranges) == (first.inputs, first.ranges);
        if !same || !packed.is_cut_as(first) || packed.bias.is_some() {
            let shape = |packed: &Packed| format!("{} x {}", packed.outputs, packed.inputs);
            let reason = format!("expert {} of {} beside {}", all.len(), shape(&packed), shape(first));
            return Err(weight_error(name, reason));
        }
        all.push(packed);
        Ok(())
    })?;
    if all.len() != count || all.is_empty() {
        return Err(weight_error("", format!("{} experts in a mixture of {count}", all.len())));
    }
    lay_out_rows(&mut all);
    Ok(all)
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
            WeightSource::Experts(source) => Kind::Experts(experts(*source, kernels, pool)?),
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

pub(crate) fn weight_error(name: &str, reason: String) -> BackendError {
    BackendError::Weight { name: name.to_owned(), reason }
}
