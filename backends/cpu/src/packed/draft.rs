//! From a checkpoint's views to packed weights: checks a linear layer, cuts it into segments of one format each, and
//! writes their panels. Called by `packed`.

use std::sync::atomic::{AtomicBool, Ordering};

use backend::weight::widen;
use backend::{BackendError, DType, ExpertSource, KSum, Linear, MatrixView, TensorView};

use super::{Packed, Panels, Segment, weight_error};
use crate::coded::Coded;
use crate::kernel::Kernels;
use crate::lanes::LANES;
use crate::memory::Place;
use crate::pair_row::PairRow;
use crate::plain::Plain;
use crate::pool::Pool;

/// What a linear layer becomes: its numbers, and its segments, which have no place yet.
pub(super) struct Draft<'a> {
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
    pub(super) fn sizes(&self) -> Vec<usize> {
        self.segments.iter().map(|draft| draft.segment.bytes()).collect()
    }

    /// Writes all panels to one place per segment. Errors when codes are not numbers.
    pub(super) fn fill(
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
pub(super) fn draft<'a>(linear: &Linear<'a>) -> Result<Draft<'a>, BackendError> {
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
    let ranges = match linear.sum {
        KSum::Ascending => 1,
        KSum::Tree { ranges } => ranges,
    };
    if ![1, 2, 4, 8].contains(&ranges) || !inputs.is_multiple_of(ranges) {
        return Err(weight_error(first.name(), format!("{inputs} columns in {ranges} ranges")));
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
pub(super) fn lay_out_rows(weights: &mut [Packed], kernels: &Kernels) {
    let Some((inputs, ranges)) = weights.first().map(|weight| (weight.range_inputs(), weight.ranges)) else {
        return;
    };
    let segments = weights.iter().flat_map(|weight| &weight.segments);
    let kinds = segments.filter_map(|segment| segment.pairs(kernels, ranges));
    let bytes = kernels.whole.is_some_and(|whole| whole.apart.is_some());
    let row = PairRow::new(inputs, ranges, kinds, bytes);
    weights.iter_mut().for_each(|weight| weight.pair_row = row.clone());
}

/// Packs products of one shape, experts of a mixture or heads, each as it comes.
pub(crate) fn pack_all(
    source: &dyn ExpertSource,
    kernels: &Kernels,
    pool: &Pool,
) -> Result<Vec<Packed>, BackendError> {
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
        if !same || !packed.is_cut_as(first) || packed.bias.is_some() != first.bias.is_some() {
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
    lay_out_rows(&mut all, kernels);
    Ok(all)
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
