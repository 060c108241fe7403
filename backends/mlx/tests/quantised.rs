//! Quantised weights on MLX are the numbers of their decoder: as a product, as a table and as experts.
#![cfg(feature = "mlx")]

use backend::{
    Backend, Batch, DType, DeviceOptions, GgufBlock, Glu, Group, KSum, KvSpec, Linear, MatrixView, Moe, Out,
    Output, Quant, QuantView, Routing, Score, SeqId, Step, TensorView, WeightSource,
};
use backend_mlx::MlxBackend;

const COLS: usize = 512;

/// Bytes of a quantised matrix whose numbers are small, whatever its format.
struct Made {
    format: Quant,
    rows: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Made {
    fn new(format: Quant, rows: usize) -> Self {
        let bytes = rows * format.code_bytes(COLS);
        // Without the highest exponents of halves and without FP8's not-a-number.
        let codes = (0..bytes).map(|i| ((i * 37 + i / 5 + 11 * rows) as u8) & 0x9f).collect();
        // Groups of 32 that share a power of two have a form of their own.
        let powers = [Quant::Fp4 { group: 32 }, Quant::Fp8 { rows: 1, cols: 32 }].contains(&format);
        let scale = |i: usize| if powers { 0.5f32.powi(3 + i as i32 % 5) } else { 0.01 + i as f32 * 0.0007 };
        let scales = (0..rows * 16).flat_map(|i| scale(i).to_le_bytes()).collect();
        Made { format, rows, codes, scales }
    }

    fn view(&self) -> MatrixView<'_> {
        let (rows, cols) = match self.format {
            Quant::Affine { group, .. } | Quant::Int4 { group } | Quant::Fp4 { group } => {
                (self.rows, COLS / group)
            }
            Quant::Fp8 { rows, cols } => (self.rows.div_ceil(rows), COLS / cols),
            Quant::Gguf(_) => (0, 0),
        };
        let scales = TensorView {
            name: "scales",
            dtype: DType::F32,
            rows,
            cols,
            row_stride_bytes: 64,
            bytes: &self.scales,
        };
        MatrixView::Quantised(QuantView {
            name: "codes",
            format: self.format,
            rows: self.rows,
            cols: COLS,
            row_stride_bytes: self.format.code_bytes(COLS),
            bytes: &self.codes,
            scales: (rows > 0).then_some(scales),
            biases: matches!(self.format, Quant::Affine { .. }).then_some(scales),
            origin: (0, 0),
        })
    }

    fn row(&self, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; COLS];
        self.view().decode(row, 0..COLS, &mut out);
        out
    }
}

fn formats() -> Vec<Quant> {
    let gguf = GgufBlock::ALL.map(Quant::Gguf);
    let affine = [(2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 64)];
    let affine = affine.map(|(bits, group)| Quant::Affine { bits, group });
    let fours = [32, 256]
        .map(|group| Quant::Int4 { group })
        .into_iter()
        .chain([32, 64].map(|group| Quant::Fp4 { group }));
    let eights = [(2, 128), (1, 32)].map(|(rows, cols)| Quant::Fp8 { rows, cols });
    let others = fours.chain(eights);
    gguf.into_iter().chain(affine).chain(others).collect()
}

struct Rig {
    backend: MlxBackend,
    kv: <MlxBackend as Backend>::Kv,
    dtype: DType,
}

impl Rig {
    fn new(dtype: DType) -> Self {
        let options = DeviceOptions { dtype, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
        let mut backend = MlxBackend::open(&options, Group::alone()).unwrap();
        let kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, dtype), 1 << 20).unwrap();
        Rig { backend, kv, dtype }
    }

    fn load(&mut self, source: &WeightSource<'_>) -> <MlxBackend as Backend>::Weight {
        self.backend.load(source).unwrap()
    }

    /// Rows of `x` through `body`.
    fn run<'a>(
        &'a mut self,
        table: &<MlxBackend as Backend>::Weight,
        rows: usize,
        batch: &'a mut Batch,
        body: impl FnOnce(
            &mut <MlxBackend as Backend>::Step<'_>,
            <MlxBackend as Backend>::Act,
        ) -> <MlxBackend as Backend>::Act,
    ) -> Vec<f32> {
        (0..rows).for_each(|row| batch.push(SeqId(row as u64), 0, &[row as u32]));
        let mut step = self.backend.step(&mut self.kv, batch);
        let x = step.embed(table);
        let out = body(&mut step, x);
        match step.submit(Out::Logits(out)).wait().unwrap() {
            Output::Logits(logits) => logits,
            _ => panic!("no output"),
        }
    }

    fn limit(&self) -> f64 {
        if self.dtype == DType::F32 { 1e-5 } else { 1.2e-2 }
    }

    fn close(&self, what: &str, got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{what}");
        let scale = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        for (at, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs() / scale;
            assert!(error <= self.limit(), "{what}, {}: element {at} is {got}, expected {want}", self.dtype);
        }
    }
}

/// Inputs that every dtype holds exactly: `[rows, COLS]` in f32.
fn inputs(rows: usize) -> (Vec<u8>, Vec<Vec<f64>>) {
    let value = |row: usize, col: usize| ((row * 7 + col * 5) % 17) as f32 / 8.0 - 1.0;
    let bytes = (0..rows * COLS).flat_map(|i| value(i / COLS, i % COLS).to_le_bytes()).collect();
    let rows = (0..rows).map(|row| (0..COLS).map(|col| f64::from(value(row, col))).collect());
    (bytes, rows.collect())
}

fn table(bytes: &[u8], rows: usize, cols: usize) -> MatrixView<'_> {
    let view = TensorView { name: "x", dtype: DType::F32, rows, cols, row_stride_bytes: cols * 4, bytes };
    view.into()
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// Products by two parts of unlike format, and a table, for every format.
#[test]
fn products_and_tables_are_the_decoders_numbers() {
    let plain: Vec<u8> = (0..3 * COLS).flat_map(|i| ((i % 13) as f32 / 16.0).to_le_bytes()).collect();
    for dtype in [DType::F32, DType::BF16] {
        for format in formats() {
            let mut rig = Rig::new(dtype);
            let made = Made::new(format, 6);
            let parts = vec![made.view(), made.view(), table(&plain, 3, COLS)];
            let weight = rig.load(&WeightSource::Linear(Linear { parts, bias: None, sum: KSum::Ascending }));
            let (bytes, rows) = inputs(3);
            let x = rig.load(&WeightSource::Embedding(table(&bytes, 3, COLS)));
            let got = rig.run(&x, 3, &mut Batch::default(), |step, x| step.linear(&x, &weight));
            let plain = |row: usize| -> Vec<f32> {
                (0..COLS).map(|col| ((row * COLS + col) % 13) as f32 / 16.0).collect()
            };
            let all: Vec<Vec<f32>> = (0..12).map(|row| made.row(row % 6)).chain((0..3).map(plain)).collect();
            let want: Vec<f64> = rows.iter().flat_map(|x| all.iter().map(|w| dot(x, w))).collect();
            rig.close(&format!("{format}, product"), &got, &want);

            let tied = rig.load(&WeightSource::Embedding(made.view()));
            let got = rig.run(&tied, 6, &mut Batch::default(), |_, x| x);
            let want: Vec<f64> = (0..6).flat_map(|row| made.row(row)).map(f64::from).collect();
            rig.close(&format!("{format}, table"), &got, &want);
        }
    }
}

/// Experts of every format, few rows and so many that they are sorted by expert.
#[test]
fn experts_are_the_decoders_numbers() {
    const EXPERTS: usize = 4;
    for (format, odd, rows) in formats()
        .into_iter()
        .map(|format| (format, format, 3))
        .chain(
            [Quant::Affine { bits: 4, group: 64 }, Quant::Gguf(GgufBlock::Q6K)]
                .map(|format| (format, format, 40)),
        )
        // One expert of another format: all are decoded.
        .chain([(Quant::Gguf(GgufBlock::Q4K), Quant::Gguf(GgufBlock::Q6K), 3)])
    {
        let of = |expert: usize| if expert == 2 { odd } else { format };
        let mut rig = Rig::new(DType::F32);
        let up: Vec<Made> = (0..EXPERTS).map(|expert| Made::new(of(expert), 2 * COLS + expert)).collect();
        let down: Vec<Made> = (0..EXPERTS).map(|expert| Made::new(of(expert), 8 + expert)).collect();
        let load = |rig: &mut Rig, all: &[Made], rows: usize, sum: KSum| {
            // Another part of the bytes for every expert.
            let mut owned = Vec::new();
            for (expert, made) in all.iter().enumerate() {
                let start = expert.min(made.rows - rows);
                owned.push(made.view().cut(start..start + rows, 0..COLS).unwrap());
            }
            let experts: Vec<Linear<'_>> =
                owned.iter().map(|view| Linear { parts: vec![*view], bias: None, sum }).collect();
            let weight = rig.load(&WeightSource::Experts(&experts.as_slice()));
            let numbers: Vec<Vec<Vec<f32>>> = owned
                .iter()
                .map(|view| {
                    let row = |row| {
                        let mut out = vec![0.0; COLS];
                        view.decode(row, 0..COLS, &mut out);
                        out
                    };
                    (0..rows).map(row).collect()
                })
                .collect();
            (weight, numbers)
        };
        let (gate_up, up) = load(&mut rig, &up, 2 * COLS, KSum::Ascending);
        let (down, last) = load(&mut rig, &down, 8, KSum::Tree { ranges: 8 });
        // The router likes expert `row % EXPERTS` best and the next one second.
        let scores: Vec<u8> = (0..EXPERTS * COLS)
            .flat_map(|i| (((i / COLS) * 31 + i % COLS * 3) as f32 % 11.0 / 40.0).to_le_bytes())
            .collect();
        let router = rig.load(&WeightSource::Linear(Linear {
            parts: vec![table(&scores, EXPERTS, COLS)],
            bias: None,
            sum: KSum::Ascending,
        }));
        let routing = Routing {
            experts: EXPERTS,
            top_k: 2,
            score: Score::Softmax,
            groups: None,
            normalise: true,
            normalise_eps: 0.0,
            scale: 0.5,
        };
        let moe = Moe {
            router: &router,
            routing: &routing,
            choice_bias: None,
            gate_up: &gate_up,
            down: &down,
            shared: None,
            glu: Glu::Silu,
        };
        let (bytes, xs) = inputs(rows);
        let x = rig.load(&WeightSource::Embedding(table(&bytes, rows, COLS)));
        let got = rig.run(&x, rows, &mut Batch::default(), |step, x| {
            let x = step.moe(&x, &moe);
            step.all_reduce(x)
        });
        let score = |x: &[f64], expert: usize| -> f64 {
            let row: Vec<f32> = (0..COLS).map(|col| ((expert * 31 + col * 3) as f32) % 11.0 / 40.0).collect();
            dot(x, &row)
        };
        let mut want = Vec::new();
        for x in &xs {
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|a, b| score(x, *b).total_cmp(&score(x, *a)));
            let best = score(x, order[0]);
            let weight = |expert: usize| (score(x, expert) - best).exp();
            let total = weight(order[0]) + weight(order[1]);
            let mut out = vec![0.0; 8];
            for expert in &order[..2] {
                let inner: Vec<f64> = (0..COLS)
                    .map(|i| {
                        let (gate, up) = (dot(x, &up[*expert][i]), dot(x, &up[*expert][COLS + i]));
                        gate / (1.0 + (-gate).exp()) * up
                    })
                    .collect();
                for (out, row) in out.iter_mut().zip(&last[*expert]) {
                    *out += 0.5 * weight(*expert) / total * dot(&inner, row);
                }
            }
            want.extend(out);
        }
        rig.close(&format!("{format}, experts, {rows} rows"), &got, &want);
    }
}
