//! The CPU backend keeps the meaning and the arithmetic contract of the seam at every instruction level of this machine.

use backend::conformance::{QUANTS, Suite, TIGHT};
use backend::{
    Backend, Batch, DType, DeviceOptions, Group, KSum, KvSpec, Linear, Out, Output, SeqId, Step, TensorView,
    WeightSource,
};
use backend_cpu::{CpuBackend, Level};

fn conforms(level: Level) {
    if !level.available() {
        println!("this machine has no {level}: not tested");
        return;
    }
    let open = |options: &DeviceOptions, group: Group| CpuBackend::with_level(options, group, level);
    let dtypes = &[DType::F32, DType::BF16];
    Suite {
        open: &open,
        tolerance: TIGHT,
        dtypes,
        group: Some(Group::local),
        quants: QUANTS,
        plain_experts: dtypes,
    }
    .run();
}

#[test]
fn portable() {
    conforms(Level::Portable);
}

#[test]
fn avx2() {
    conforms(Level::Avx2);
}

#[test]
fn avx512() {
    conforms(Level::Avx512);
}

#[test]
fn avx512_bf16() {
    conforms(Level::Avx512Bf16);
}

/// Levels differ in rounding only.
#[test]
fn levels_agree() {
    let (rows, inputs, outputs) = (5, 300, 70);
    let floats = |count: usize, factor: f32| -> Vec<u8> {
        (0..count).flat_map(|at| (((at * 37 % 101) as f32 - 50.0) * factor).to_le_bytes()).collect()
    };
    let (x, w, scale) = (floats(rows * inputs, 0.02), floats(outputs * inputs, 0.003), floats(inputs, 0.01));
    let view = |bytes, rows, cols| TensorView {
        name: "test",
        dtype: DType::F32,
        rows,
        cols,
        row_stride_bytes: cols * 4,
        bytes,
    };
    let run = |level: Level| {
        let options = DeviceOptions { dtype: DType::F32, ..DeviceOptions::default() };
        let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
        assert!(backend.caps().device.starts_with(level.name()));
        let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, DType::F32), 1 << 16).unwrap();
        let table = backend.load(&WeightSource::Embedding(view(&x, rows, inputs).into())).unwrap();
        let norm = backend.load(&WeightSource::Norm(view(&scale, 1, inputs))).unwrap();
        let parts = vec![view(&w, outputs, inputs).into()];
        let linear = Linear { parts, bias: None, sum: KSum::Ascending };
        let linear = backend.load(&WeightSource::Linear(linear)).unwrap();
        let mut batch = Batch::default();
        (0..rows as u32).for_each(|row| batch.push(SeqId(row.into()), 0, &[row]));
        let mut step = backend.step(&mut kv, &batch);
        let x = step.embed(&table);
        let x = step.norm(&x, &norm, 1e-6);
        let x = step.linear(&x, &linear);
        match step.submit(Out::Logits(x)).wait().unwrap() {
            Output::Logits(logits) => logits,
            _ => panic!("no logits"),
        }
    };
    let plain = run(Level::Portable);
    let largest = plain.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for level in Level::ALL.into_iter().filter(|level| level.available()) {
        for (a, b) in plain.iter().zip(run(level)) {
            assert!((a - b).abs() <= 2e-6 * largest, "{level}: {b}, portable {a}");
        }
    }
}

/// Rows of one sequence in two runs would write and read the same cache at once: the step is refused, not raced.
#[test]
fn a_sequence_runs_once_per_step() {
    let mut backend = CpuBackend::open(&DeviceOptions::default(), Group::alone()).unwrap();
    let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, DType::BF16), 1 << 16).unwrap();
    let mut batch = Batch::default();
    batch.push(SeqId(3), 0, &[0]);
    batch.push(SeqId(3), 1, &[0]);
    let refused = backend.step(&mut kv, &batch).submit(Out::Nothing).wait();
    let error = refused.err().map(|error| error.to_string());
    assert_eq!(error.as_deref(), Some("device: two runs of sequence 3 in one step"));
}
