//! Cases of the operations that see one row at a time.

use super::{Case, Suite, Tensor, reference, rows_batch};
use crate::{Backend, DType, Glu, KSum, Linear, Out, Output, Step, WeightSource};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("norm", norm),
        ("linear", linear),
        ("linear, stacked parts with bias", stacked),
        ("linear, tree sums", tree),
        ("linear, columns cut away", cut),
        ("embed", embed),
        ("embed from a linear weight", embed_tied),
        ("embed of an unknown id", embed_unknown),
        ("add and bias", add),
        ("glu", glu),
        ("rows", rows),
        ("hidden kept between steps", hidden),
        ("weights of wrong shape", shapes),
    ]
}

const WEIGHT_TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn norm<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for width in [8, 20, 256] {
        let mut rig = suite.rig(dtype);
        let x = Tensor::random(1, dtype, 3, width, 2.0);
        let scale = Tensor::random(2, dtype, 1, width, 1.0);
        let weight = rig.norm(&scale);
        let got = rig.rows(&x, |step, x| step.norm(&x, &weight, 1e-5));
        let want: Vec<f64> =
            (0..3).flat_map(|row| reference::norm(x.row(row), &scale.values, 1e-5)).collect();
        suite.close(dtype, &format!("width {width}"), &got, &want);
    }
}

fn linear<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    // Widths that fill no panel, rows that fill no tile.
    for (inputs, outputs, rows) in [(8, 16, 1), (7, 33, 5), (64, 1, 2), (320, 130, 29), (600, 48, 110)] {
        for weights in WEIGHT_TYPES {
            let mut rig = suite.rig(dtype);
            let x = Tensor::random(1, dtype, rows, inputs, 1.0);
            let w = Tensor::random(2, weights, outputs, inputs, 0.1);
            let weight = rig.linear(&[&w], KSum::Ascending);
            let got = rig.rows(&x, |step, x| step.linear(&x, &weight));
            let want: Vec<f64> =
                (0..rows).flat_map(|row| reference::linear(x.row(row), &w.values, None)).collect();
            suite.close(dtype, &format!("{rows} x {inputs} by {outputs} of {weights}"), &got, &want);
        }
    }
}

fn stacked<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, 3, 24, 1.0);
    // The last part has another type than the first two.
    let parts = [(40, DType::BF16), (8, DType::BF16), (9, dtype)];
    let w: Vec<Tensor> =
        parts.iter().zip(2..).map(|((rows, of), seed)| Tensor::random(seed, *of, *rows, 24, 0.2)).collect();
    let bias: Vec<Tensor> =
        parts.iter().zip(7..).map(|((rows, of), seed)| Tensor::random(seed, *of, 1, *rows, 0.5)).collect();
    let weight = rig.load(&WeightSource::Linear(Linear {
        parts: w.iter().map(|w| w.view().into()).collect(),
        bias: Some(bias.iter().map(Tensor::view).collect()),
        sum: KSum::Ascending,
    }));
    let got = rig.rows(&x, |step, x| step.linear(&x, &weight));
    let product = |row: usize, part: usize| {
        reference::linear(x.row(row), &w[part].values, Some(bias[part].values.as_slice()))
    };
    let want: Vec<f64> = (0..3).flat_map(|row| (0..3).flat_map(move |part| product(row, part))).collect();
    suite.close(dtype, "three parts", &got, &want);
}

fn tree<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for (ranges, inputs) in [(8, 64), (8, 24), (4, 600), (2, 18), (1, 17)] {
        let mut rig = suite.rig(dtype);
        let x = Tensor::random(1, dtype, 3, inputs, 1.0);
        let w = Tensor::random(2, DType::BF16, 21, inputs, 0.2);
        let weight = rig.linear(&[&w], KSum::Tree { ranges });
        let got = rig.rows(&x, |step, x| {
            let partial = step.linear(&x, &weight);
            step.all_reduce(partial)
        });
        let want: Vec<f64> = (0..3).flat_map(|row| reference::linear(x.row(row), &w.values, None)).collect();
        suite.close(dtype, &format!("{inputs} inputs in {ranges} ranges"), &got, &want);
    }
}

fn cut<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, 2, 10, 1.0);
    for weights in WEIGHT_TYPES {
        let w = Tensor::random(2, weights, 20, 31, 0.2);
        let parts = vec![w.columns(7, 17).into()];
        let weight =
            rig.load(&WeightSource::Linear(Linear { parts, bias: None, sum: KSum::Tree { ranges: 2 } }));
        let got = rig.rows(&x, |step, x| {
            let partial = step.linear(&x, &weight);
            step.all_reduce(partial)
        });
        let own: Vec<f64> = (0..20).flat_map(|row| w.row(row)[7..17].to_vec()).collect();
        let want: Vec<f64> = (0..2).flat_map(|row| reference::linear(x.row(row), &own, None)).collect();
        suite.close(dtype, &format!("columns of {weights}"), &got, &want);
    }
}

fn embed<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for weights in WEIGHT_TYPES {
        let mut rig = suite.rig(dtype);
        let table = Tensor::random(1, weights, 5, 9, 1.0);
        let got = rig.rows(&table, |_, x| x);
        suite.close(dtype, &format!("table of {weights}"), &got, &table.values);
    }
}

fn embed_tied<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for weights in WEIGHT_TYPES {
        let mut rig = suite.rig(dtype);
        let table = Tensor::random(1, weights, 37, 9, 1.0);
        let weight = rig.linear(&[&table], KSum::Ascending);
        let batch = rows_batch(37);
        let got = rig.step(&batch, |step| step.embed(&weight));
        suite.close(dtype, &format!("tied table of {weights}"), &got, &table.values);
    }
}

fn embed_unknown<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let weight = rig.embedding(&Tensor::random(1, dtype, 5, 8, 1.0));
    let batch = rows_batch(6);
    assert!(rig.try_step(&batch, |step| step.embed(&weight)).is_err(), "id 5 of 5 was accepted");
    let batch = rows_batch(5);
    assert!(rig.try_step(&batch, |step| step.embed(&weight)).is_ok(), "an error stayed behind its step");
}

fn add<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let (x, y) = (Tensor::random(1, dtype, 3, 37, 1.0), Tensor::random(2, dtype, 3, 37, 1.0));
    let b = Tensor::random(3, dtype, 1, 37, 1.0);
    let other = rig.embedding(&y);
    let bias = rig.load(&WeightSource::Bias(b.view()));
    let got = rig.rows(&x, |step, x| {
        let y = step.embed(&other);
        let sum = step.add(x, y);
        step.bias(sum, &bias)
    });
    let sum = |at: usize| x.values[at] + y.values[at] + b.values[at % 37];
    let want: Vec<f64> = (0..3 * 37).map(sum).collect();
    suite.close(dtype, "x + y + bias", &got, &want);
}

fn glu<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, 3, 2 * 21, 4.0);
    // Values reach 4: some gates and ups are beyond the limit.
    for kind in [Glu::Silu, Glu::Clamped { limit: 2.5, slope: 1.702 }] {
        let got = rig.rows(&x, |step, x| step.glu(x, kind));
        let want: Vec<f64> = (0..3).flat_map(|row| reference::glu(x.row(row), kind)).collect();
        suite.close(dtype, &format!("{kind:?}"), &got, &want);
    }
    // Far out the gate is the identity on one side and zero on the other.
    let far = Tensor::new(dtype, 1, 4, [200.0, -200.0, 1.0, 1.0].into_iter());
    let got = rig.rows(&far, |step, x| step.glu(x, Glu::Silu));
    suite.close(dtype, "silu far out", &got, &[200.0, 0.0]);
    let far = Tensor::new(dtype, 1, 6, [200.0, -200.0, 1.0, 200.0, 1.0, -200.0].into_iter());
    let got = rig.rows(&far, |step, x| step.glu(x, Glu::Clamped { limit: 7.0, slope: 50.0 }));
    suite.close(dtype, "clamped far out", &got, &[56.0, 0.0, -6.0]);
    // A limit makes no number of what is none: a request that is spoiled has to fail.
    let spoiled = Tensor::new(dtype, 1, 4, [f64::NAN, 1.0, 1.0, f64::NAN].into_iter());
    let got = rig.rows(&spoiled, |step, x| step.glu(x, Glu::Clamped { limit: 7.0, slope: 1.702 }));
    assert!(got.iter().all(|x| x.is_nan()), "{dtype}: {got:?}");
}

fn rows<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, 6, 10, 1.0);
    let got = rig.rows(&x, |step, x| step.rows(x, &[4, 0, 4]));
    let want: Vec<f64> = [4, 0, 4].iter().flat_map(|row| x.row(*row).to_vec()).collect();
    suite.close(dtype, "rows 4, 0, 4", &got, &want);
    // A step whose rows all belong to unfinished prompts wants no logits.
    let scale = rig.norm(&Tensor::random(2, dtype, 1, 10, 1.0));
    let head = rig.linear(&[&Tensor::random(3, dtype, 20, 10, 1.0)], KSum::Ascending);
    let none = rig.rows(&x, |step, x| {
        let x = step.rows(x, &[]);
        let x = step.norm(&x, &scale, 1e-6);
        step.linear(&x, &head)
    });
    assert!(none.is_empty(), "{} logits for no rows", none.len());
}

fn hidden<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, 6, 10, 1.0);
    let table = rig.embedding(&x);
    let batch = rows_batch(6);
    let mut step = rig.backend.step(&mut rig.kv, &batch);
    let act = step.embed(&table);
    let Ok(Output::Hidden(kept)) = step.submit(Out::Hidden(act)).wait() else {
        panic!("the step gave no hidden activation")
    };
    let got = rig.step(&batch, |step| step.resume(kept));
    suite.close(dtype, "resumed", &got, &x.values);
}

fn shapes<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let (a, b) = (Tensor::random(1, dtype, 4, 8, 1.0), Tensor::random(1, dtype, 4, 7, 1.0));
    let linear = |parts, sum| WeightSource::Linear(Linear { parts, bias: None, sum });
    let refused = [
        linear(vec![a.view().into(), b.view().into()], KSum::Ascending),
        linear(vec![b.view().into()], KSum::Tree { ranges: 2 }),
        linear(Vec::new(), KSum::Ascending),
        linear(vec![crate::TensorView { bytes: &a.bytes[1..], ..a.view() }.into()], KSum::Ascending),
        WeightSource::Norm(a.view()),
    ];
    for source in refused {
        assert!(rig.backend.load(&source).is_err(), "accepted {source:?}");
    }
}
