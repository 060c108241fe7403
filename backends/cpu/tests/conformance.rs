//! The CPU backend keeps the meaning and the arithmetic contract of the seam at every instruction level of this machine.

use backend::conformance::{QUANTS, Suite, TIGHT, Tolerance};
use backend::{
    Activations, Backend, Batch, CpuOptions, DType, DeviceOptions, Group, KSum, KvSpec, Linear, Out, Output,
    Quant, QuantView, SeqId, Step, TensorView, WeightSource,
};
use backend_cpu::{CpuBackend, Level};

/// The suite at a level, if this machine has it.
fn conforms_as(level: Level, activations: Activations, tolerance: Tolerance) {
    if !level.available() {
        println!("this machine has no {level}: not tested");
        return;
    }
    let open = |options: &DeviceOptions, group: Group| {
        let cpu = CpuOptions { activations, ..CpuOptions::default() };
        CpuBackend::with_level(&DeviceOptions { cpu, ..options.clone() }, group, level)
    };
    let (dtypes, group) = (&[DType::F32, DType::BF16], Some(Group::local as _));
    Suite { open: &open, tolerance, dtypes, group, quants: QUANTS, plain_experts: dtypes }.run();
}

fn conforms(level: Level) {
    conforms_as(level, Activations::Exact, TIGHT);
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
fn avx_vnni() {
    conforms(Level::AvxVnni);
}

#[test]
fn avx512() {
    conforms(Level::Avx512);
}

#[test]
fn avx512_vnni() {
    conforms(Level::Avx512Vnni);
}

#[test]
fn avx512_bf16() {
    conforms(Level::Avx512Bf16);
}

#[test]
fn amx() {
    conforms(Level::Amx);
}

/// Activations in 8 bits: within the error of those, and exact where the contract wants it (rows, chunks, ranks).
fn conforms_in_bytes(level: Level) {
    conforms_as(level, Activations::Int8, Tolerance { f32: 3e-2, bf16: 4e-2 });
}

#[test]
fn avx2_in_bytes() {
    conforms_in_bytes(Level::Avx2);
}

#[test]
fn avx512_bf16_in_bytes() {
    conforms_in_bytes(Level::Avx512Bf16);
}

/// Whole numbers are exact, so what multiplies them does not matter: levels differ in the rounding of f32 sums only.
#[test]
fn levels_agree_in_bytes() {
    products_agree(Activations::Int8, DType::F32, 2e-6);
}

/// Where inputs become whole numbers of 16 bits, products are those of the inputs themselves.
#[test]
fn levels_agree_in_bf16() {
    products_agree(Activations::Exact, DType::BF16, 3e-5);
}

/// Products with quantised weights are those of the portable level, within a part of the largest, and the same for a row alone.
fn products_agree(activations: Activations, dtype: DType, within: f32) {
    use backend::GgufBlock::{Iq4Nl, Iq4Xs, Mxfp4, Q2K, Q3K, Q4_0, Q4K, Q5_1, Q5K, Q6K, Q8_0};
    // More rows than a tile has.
    let (rows, inputs, outputs) = (19, 512, 50);
    let mut state = 7u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let x: Vec<u8> =
        (0..rows * inputs).flat_map(|_| (f32::from(next()) * 0.01 - 1.2).to_le_bytes()).collect();
    let formats: [(_, &[usize]); _] = [
        (Q4_0, &[0]),
        (Q5_1, &[0, 2]),
        (Q8_0, &[0]),
        (Q2K, &[80, 82]),
        (Q3K, &[108]),
        (Q4K, &[0, 2]),
        (Q5K, &[0, 2]),
        (Q6K, &[208]),
        (Iq4Nl, &[0]),
        (Iq4Xs, &[0]),
        (Mxfp4, &[]),
    ];
    for (block, halves) in formats {
        let count = outputs * inputs / block.cols();
        let mut bytes: Vec<u8> = (0..count * block.bytes()).map(|_| next()).collect();
        for stored in bytes.chunks_exact_mut(block.bytes()) {
            if block == Mxfp4 {
                stored[0] = 121;
            }
            halves
                .iter()
                .for_each(|at| stored[*at..at + 2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes()));
        }
        let view = QuantView {
            name: "test",
            format: Quant::Gguf(block),
            rows: outputs,
            cols: inputs,
            row_stride_bytes: inputs / block.cols() * block.bytes(),
            bytes: &bytes,
            scales: None,
            biases: None,
            origin: (0, 0),
        };
        let run = |level: Level, run: std::ops::Range<u32>| {
            let cpu = CpuOptions { activations, ..CpuOptions::default() };
            let options = DeviceOptions { dtype, cpu, ..DeviceOptions::default() };
            let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
            let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, dtype), 1 << 16).unwrap();
            let table = TensorView {
                name: "x",
                dtype: DType::F32,
                rows,
                cols: inputs,
                row_stride_bytes: inputs * 4,
                bytes: &x,
            };
            let table = backend.load(&WeightSource::Embedding(table.into())).unwrap();
            let linear = Linear { parts: vec![view.into()], bias: None, sum: KSum::Ascending };
            let linear = backend.load(&WeightSource::Linear(linear)).unwrap();
            let mut batch = Batch::default();
            run.for_each(|row| batch.push(SeqId(row.into()), 0, &[row]));
            let mut step = backend.step(&mut kv, &batch);
            let x = step.embed(&table);
            let x = step.linear(&x, &linear);
            match step.submit(Out::Logits(x)).wait().unwrap() {
                Output::Logits(logits) => logits,
                _ => panic!("no logits"),
            }
        };
        let plain = run(Level::Portable, 0..rows as u32);
        let largest = plain.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let mut whole = None;
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            let all = run(level, 0..rows as u32);
            // Whole numbers are scaled by the same floats, whatever instructions or tiles made them.
            let floats = matches!(level, Level::Portable | Level::Avx512);
            if activations == Activations::Exact && !floats {
                assert_eq!(whole.get_or_insert_with(|| all.clone()), &all, "{level}, {}", block.name());
            }
            for (a, b) in plain.iter().zip(&all) {
                assert!((a - b).abs() <= within * largest, "{level}, {}: {b}, portable {a}", block.name());
            }
            assert_eq!(
                all[2 * outputs..3 * outputs],
                run(level, 2..3),
                "{level}, {}: a row alone",
                block.name()
            );
        }
    }
}

/// A level by name: what this machine lacks and what nobody knows is refused in words.
#[test]
fn levels_are_forced_by_name() {
    let open = |name: &str| {
        let cpu = CpuOptions { level: Some(name.to_owned()), ..CpuOptions::default() };
        CpuBackend::open(&DeviceOptions { cpu, ..DeviceOptions::default() }, Group::alone())
    };
    assert_eq!(open("portable").unwrap().level(), Level::Portable);
    let unknown = open("sse9").unwrap_err().to_string();
    assert!(unknown.contains("\"sse9\"") && unknown.contains("avx512"), "{unknown}");
    for level in Level::ALL.into_iter().filter(|level| !level.available()) {
        let refused = open(level.name()).unwrap_err().to_string();
        assert!(refused.contains(&format!("this machine has no {level} instructions")), "{refused}");
    }
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
