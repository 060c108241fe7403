//! Cases of quantised weights, against f64 products of the numbers that the codes mean.

use super::coded::{Coded, QUANTS};
use super::exact::{bits, is_exact};
use super::{Case, Rig, Suite, Tensor, reference, rows_batch};
use crate::{
    Backend, BackendError, DType, KSum, Linear, MatrixView, Quant, QuantView, Step, TensorView, WeightSource,
};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("quantised, products", products),
        ("quantised, formats beside each other", mixed),
        ("quantised, tree sums that cut groups", tree),
        ("quantised, parts cut out", cut),
        ("quantised, embedding", embedding),
        ("quantised, exact", exact),
        ("quantised, refused", refused),
    ]
}

/// Columns that make a matrix of `format` with some groups in a row, the last chunk incomplete where that can be.
fn columns(format: Quant) -> usize {
    match format {
        Quant::Fp8 { .. } => 203,
        _ => 3 * format.align_cols(),
    }
}

fn linear<'a>(view: QuantView<'a>, sum: KSum) -> WeightSource<'a> {
    WeightSource::Linear(Linear { parts: vec![view.into()], bias: None, sum })
}

fn product<B: Backend>(rig: &mut Rig<B>, x: &Tensor, source: &WeightSource<'_>) -> Vec<f32> {
    let tree = matches!(source, WeightSource::Linear(linear) if matches!(linear.sum, KSum::Tree { .. }));
    let weight = rig.load(source);
    rig.rows(x, |step, x| {
        let y = step.linear(&x, &weight);
        if tree { step.all_reduce(y) } else { y }
    })
}

fn expected(x: &Tensor, values: &[f64]) -> Vec<f64> {
    (0..x.rows).flat_map(|row| reference::linear(x.row(row), values, None)).collect()
}

/// Every format that the backend has; the others it refuses.
fn products<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for format in QUANTS {
        let cols = columns(*format);
        let mut rig = suite.rig(dtype);
        if !suite.quants.contains(format) {
            let w = Coded::random(2, *format, DType::F16, 21, cols);
            let loaded = rig.backend.load(&linear(w.view(), KSum::Ascending));
            assert!(
                matches!(loaded, Err(BackendError::Weight { .. })),
                "{format} is not listed, nor refused"
            );
            continue;
        }
        for (rows, outputs, scales) in [
            (1, 150, DType::F16),
            (3, 33, DType::BF16),
            (7, 130, DType::F32),
            (29, 1, DType::F16),
            (110, 48, DType::BF16),
        ] {
            let x = Tensor::random(1, dtype, rows, cols, 1.0);
            let w = Coded::random(2, *format, scales, outputs, cols);
            let got = product(&mut rig, &x, &linear(w.view(), KSum::Ascending));
            let what = format!("{rows} rows by {outputs} of {format}, scales {scales}");
            suite.close(dtype, &what, &got, &expected(&x, &w.values));
        }
    }
}

/// Parts of several formats, plain ones among them, with biases.
fn mixed<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let cols = 768;
    let x = Tensor::random(1, dtype, 5, cols, 1.0);
    let plain = Tensor::random(2, DType::BF16, 19, cols, 0.1);
    for pair in suite.quants.windows(2) {
        let first = Coded::random(3, pair[0], DType::F16, 40, cols);
        let second = Coded::random(4, pair[1], DType::F16, 24, cols);
        let again = Coded::random(5, pair[1], DType::F16, 7, cols);
        let parts: Vec<MatrixView<'_>> =
            vec![first.view().into(), second.view().into(), again.view().into(), plain.view().into()];
        let biases = [40, 24, 7, 19].map(|rows| Tensor::random(rows as u64, dtype, 1, rows, 1.0));
        let source = WeightSource::Linear(Linear {
            parts,
            bias: Some(biases.iter().map(Tensor::view).collect()),
            sum: KSum::Ascending,
        });
        let got = product(&mut suite.rig(dtype), &x, &source);
        let values = [&first.values[..], &second.values, &again.values, &plain.values].concat();
        let bias: Vec<f64> = biases.iter().flat_map(|bias| bias.values.clone()).collect();
        let want: Vec<f64> =
            (0..5).flat_map(|row| reference::linear(x.row(row), &values, Some(&bias))).collect();
        suite.close(dtype, &format!("{} beside {}", pair[0], pair[1]), &got, &want);
    }
}

/// Ranges of K end within groups, some within eight inputs.
fn tree<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for format in suite.quants {
        for (ranges, groups) in [(8, 1), (8, 3), (4, 1), (2, 5), (1, 1)] {
            let cols = groups * if format.align_cols() == 1 { 40 } else { format.align_cols() };
            for rows in [3, 20] {
                let x = Tensor::random(1, dtype, rows, cols, 1.0);
                let w = Coded::random(2, *format, DType::BF16, 21, cols);
                let got = product(&mut suite.rig(dtype), &x, &linear(w.view(), KSum::Tree { ranges }));
                let what = format!("{cols} inputs of {format} in {ranges} ranges");
                suite.close(dtype, &what, &got, &expected(&x, &w.values));
            }
        }
    }
}

/// Rows and columns of a matrix, as a rank gets them.
fn cut<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for format in suite.quants {
        let align = format.align_cols();
        let (cols, all) = if align == 1 { (37..170, 203) } else { (align..3 * align, 4 * align) };
        let w = Coded::random(2, *format, DType::F16, 70, all);
        let view = w.view().cut(13..54, cols.clone()).unwrap_or_else(|error| panic!("cut: {error}"));
        let x = Tensor::random(1, dtype, 4, cols.len(), 1.0);
        let got = product(&mut suite.rig(dtype), &x, &linear(view, KSum::Ascending));
        suite.close(dtype, &format!("part of {format}"), &got, &expected(&x, &w.part(13..54, cols)));
    }
}

/// Rows of a quantised table, by itself and tied to the head.
fn embedding<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for format in suite.quants {
        let table = Coded::random(1, *format, DType::F16, 37, columns(*format));
        let tied = linear(table.view(), KSum::Ascending);
        for source in [WeightSource::Embedding(table.view().into()), tied] {
            let mut rig = suite.rig(dtype);
            let weight = rig.load(&source);
            let batch = rows_batch(37);
            let got = rig.step(&batch, |step| step.embed(&weight));
            suite.close(dtype, &format!("table of {format}"), &got, &table.values);
        }
    }
}

/// A row has the same bits alone and among others, and two ranks' sums join to those of one.
fn exact<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    if !is_exact(suite, dtype) {
        return;
    }
    for format in suite.quants {
        let cols = if format.align_cols() == 1 { 272 } else { 2 * format.align_cols() };
        let x = Tensor::random(1, dtype, 120, cols, 1.0);
        let w = Coded::random(2, *format, DType::BF16, 77, cols);
        let rows = |rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, sum: KSum| {
            let values = rows.clone().flat_map(|row| x.row(row)[columns.clone()].to_vec());
            let x = Tensor::new(dtype, rows.len(), columns.len(), values);
            let view = w.view().cut(0..77, columns).unwrap_or_else(|error| panic!("cut: {error}"));
            let mut rig = suite.rig(DType::F32);
            product(&mut rig, &x, &linear(view, sum))
        };
        for sum in [KSum::Ascending, KSum::Tree { ranges: 8 }] {
            let all = bits(&rows(0..120, 0..cols, sum));
            for part in [0..1, 5..7, 20..33, 100..120] {
                let own = bits(&rows(part.clone(), 0..cols, sum));
                assert!(all[part.start * 77..part.end * 77] == own, "{format}, {sum:?}: rows {part:?}");
            }
        }
        let whole = rows(0..9, 0..cols, KSum::Tree { ranges: 8 });
        let halves = [0..cols / 2, cols / 2..cols].map(|half| rows(0..9, half, KSum::Tree { ranges: 4 }));
        let joined: Vec<f32> = halves[0].iter().zip(&halves[1]).map(|(a, b)| a + b).collect();
        assert_eq!(bits(&whole), bits(&joined), "{format}: two ranks");
    }
}

fn refused<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    for format in suite.quants {
        let w = Coded::random(2, *format, DType::F16, 20, columns(*format));
        let view = w.view();
        let narrow = Tensor::random(1, dtype, 4, 8, 1.0);
        let mut bad = vec![
            linear(QuantView { bytes: &w.bytes[1..], ..view }, KSum::Ascending),
            linear(QuantView { rows: 21, ..view }, KSum::Ascending),
            WeightSource::Embedding(QuantView { rows: 21, ..view }.into()),
            WeightSource::Linear(Linear {
                parts: vec![view.into(), narrow.view().into()],
                bias: None,
                sum: KSum::Ascending,
            }),
        ];
        if let Some(scales) = view.scales {
            let short = TensorView { rows: scales.rows - 1, ..scales };
            bad.push(linear(QuantView { scales: None, ..view }, KSum::Ascending));
            bad.push(linear(QuantView { scales: Some(short), ..view }, KSum::Ascending));
        }
        for source in bad {
            assert!(rig.backend.load(&source).is_err(), "accepted {source:?}");
        }
    }
}
