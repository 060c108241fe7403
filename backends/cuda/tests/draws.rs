//! Tokens drawn on the (emulated) device are those that a host draws from the same logits: filters, ties at their edges, rows in
//! which all ids are alike.

use backend::draw::draw;
use backend::{
    Backend, Batch, DType, DeviceOptions, Draw, Drawn, Group, KvSpec, KvStore, Out, Output, Rule, SeqId,
    Step, TensorView, WeightSource,
};
use backend_cuda::EmulatedBackend;

/// More than one id for each of a block's threads.
const VOCABULARY: usize = 2500;

/// Logits of a row: `levels` different ones, so that most ids have others beside them; the last row is flat.
fn logits(rows: usize, levels: u32) -> Vec<f32> {
    let mut state = 9u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % levels
    };
    let scale = 12.0 / levels as f32;
    let mut all: Vec<f32> = (0..rows * VOCABULARY).map(|_| number() as f32 * scale - 9.0).collect();
    all[(rows - 1) * VOCABULARY..].fill(-2.5);
    all
}

#[test]
fn a_device_draws_what_a_host_does() {
    let options = DeviceOptions { dtype: DType::F32, ..DeviceOptions::default() };
    let mut backend = EmulatedBackend::open(&options, Group::alone()).unwrap();
    let plain = Rule { temperature: 0.9, ..Rule::GREEDY };
    let kinds = [
        Rule::GREEDY,
        plain,
        Rule { top_k: 1, ..plain },
        Rule { top_k: 7, ..plain },
        Rule { top_k: 900, ..plain },
        Rule { top_p: 0.001, ..plain },
        Rule { top_p: 0.5, ..plain },
        Rule { top_p: 0.95, temperature: 3.0, ..plain },
        Rule { min_p: 0.3, ..plain },
        // As makers of models recommend.
        Rule { top_k: 20, top_p: 0.8, temperature: 0.7, ..plain },
        Rule { top_k: 500, top_p: 0.9, min_p: 0.02, temperature: 1.3, ..plain },
    ];
    for levels in [3, 40, 1 << 20] {
        let rows = kinds.len() + 1;
        let values = logits(rows, levels);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let row_stride_bytes = VOCABULARY * 4;
        let view = TensorView {
            name: "test",
            dtype: DType::F32,
            rows,
            cols: VOCABULARY,
            row_stride_bytes,
            bytes: &bytes,
        };
        let table = backend.load(&WeightSource::Embedding(view.into())).unwrap();
        let spec = KvSpec::gqa(1, 1, 0..1, 2, DType::F32);
        let mut kv = backend.kv(&spec, 64 * 1024).unwrap();
        // Every rule on a row of its own, and on the one where all are alike.
        for flat in [false, true] {
            let mut batch = Batch::default();
            let mut draws = Vec::new();
            for (at, kind) in kinds.iter().enumerate() {
                let row = if flat { rows - 1 } else { at };
                let seq = SeqId(at as u64);
                kv.open(seq, 1).unwrap();
                batch.push(seq, 0, &[row as u32]);
                draws.push((row, Rule { seed: 77 + at as u64, position: u64::from(levels), ..*kind }));
            }
            let mut step = backend.step(&mut kv, &batch);
            let x = step.embed(&table);
            let asked = draws.iter().map(|(_, rule)| Draw::Token(*rule)).collect();
            let Output::Drawn(drawn) = step.submit(Out::Draw(x, asked)).wait().unwrap() else {
                panic!("the step drew nothing")
            };
            for ((row, rule), got) in draws.iter().zip(drawn) {
                let want = draw(&values[row * VOCABULARY..(row + 1) * VOCABULARY], rule).unwrap();
                assert_eq!(got, Drawn::Token(want), "{rule:?}, {levels} levels, flat: {flat}");
            }
            (0..kinds.len() as u64).for_each(|seq| kv.close(SeqId(seq)).unwrap());
        }
    }
}
