//! The suite that every backend passes: generic cases over [`crate::Backend`], each against a plain f64 reference, and
//! for exact backends ([`crate::Caps::exact`]) against themselves, bit by bit.
//!
//! A backend's test opens it and calls [`Suite::run`]. Inputs enter a step through [`crate::Step::embed`], results leave
//! as logits, so the suite needs nothing that models do not use.

mod attention;
mod cache;
mod coded;
mod draws;
mod exact;
mod experts;
mod latent;
mod operations;
mod projection;
mod quantised;
mod reference;

pub use coded::QUANTS;

use std::io;

use half::{bf16, f16};

use crate::{
    Backend, BackendError, Batch, DType, DeviceOptions, Group, KSum, KvSpec, KvStore, Linear, Out, Output,
    Quant, SeqId, Step, TensorView, WeightSource,
};

/// Opens a backend as one rank of a group.
pub type Open<'a, B> = &'a (dyn Fn(&DeviceOptions, Group) -> Result<B, BackendError> + Sync);

/// Makes the ranks of a group of so many: those that this process is to be, in order. None where ranks are processes of
/// their own and this one is not of such a group.
pub type MakeGroup = fn(usize) -> io::Result<Vec<Group>>;

/// The suite for one backend.
pub struct Suite<'a, B: Backend> {
    /// Opens the backend; groups are as [`Suite::group`] makes them.
    pub open: Open<'a, B>,
    /// How far results may be from the reference.
    pub tolerance: Tolerance,
    /// Activation types to test.
    pub dtypes: &'a [DType],
    /// Makes the links of a group of so many ranks, in order of rank; `None`: groups are not tested.
    pub group: Option<MakeGroup>,
    /// Formats of [`QUANTS`] that the backend multiplies by; the others it must refuse.
    pub quants: &'a [Quant],
    /// Activation types with which experts of plain numbers are tested (MLX's CPU library has them in f32 only).
    pub plain_experts: &'a [DType],
}

/// Largest error of a result, as a part of the largest magnitude in the reference.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// With f32 activations.
    pub f32: f64,
    /// With bf16 activations.
    pub bf16: f64,
}

/// What the CPU keeps at every instruction level.
pub const TIGHT: Tolerance = Tolerance { f32: 3e-6, bf16: 2e-2 };

type Case<'a, B> = (&'static str, fn(&Suite<'a, B>, DType));

impl<'a, B: Backend> Suite<'a, B> {
    /// Runs every case with every dtype.
    ///
    /// # Panics
    /// When a case fails; the case is named on standard output before it begins.
    pub fn run(&self) {
        for dtype in self.dtypes {
            for (name, case) in self.cases() {
                println!("conformance: {name}, {dtype}");
                case(self, *dtype);
            }
        }
    }

    /// All cases by name.
    pub fn cases(&self) -> Vec<Case<'a, B>> {
        [
            operations::cases(),
            draws::cases(),
            attention::cases(),
            projection::cases(),
            latent::cases(),
            quantised::cases(),
            experts::cases(),
            cache::cases(),
            exact::cases(),
        ]
        .concat()
    }

    fn options(&self, dtype: DType) -> DeviceOptions {
        DeviceOptions { dtype, threads: 2, block_tokens: 16, ..DeviceOptions::default() }
    }

    fn rig(&self, dtype: DType) -> Rig<B> {
        // Operations without attention need a cache all the same, to begin a step.
        self.rig_with(&self.options(dtype), Group::alone(), &KvSpec::gqa(1, 1, 0..1, 8, dtype), 64)
    }

    /// A backend with a store of at least `tokens`.
    fn rig_with(&self, options: &DeviceOptions, group: Group, spec: &KvSpec, tokens: u32) -> Rig<B> {
        let mut backend = (self.open)(options, group).unwrap_or_else(|error| panic!("open: {error}"));
        let bytes = u64::from(tokens.next_multiple_of(options.block_tokens)) * spec.token_bytes() as u64;
        let kv = backend.kv(spec, bytes).unwrap_or_else(|error| panic!("kv: {error}"));
        Rig { backend, kv }
    }

    fn limit(&self, dtype: DType) -> f64 {
        if dtype == DType::F32 { self.tolerance.f32 } else { self.tolerance.bf16 }
    }

    /// Asserts that `got` is within tolerance of `want`.
    fn close(&self, dtype: DType, what: &str, got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{what}: length");
        let scale = want.iter().fold(1e-30, |scale: f64, x| scale.max(x.abs()));
        let worst = got.iter().zip(want).enumerate().fold((0, 0.0), |worst, (at, (g, w))| {
            let error = (f64::from(*g) - w).abs() / scale;
            // Not-a-number is the worst.
            if error > worst.1 || error.is_nan() { (at, error) } else { worst }
        });
        assert!(
            worst.1 <= self.limit(dtype),
            "{what}: element {} is {}, expected {}: off by {:.2e} of the largest",
            worst.0,
            got[worst.0],
            want[worst.0],
            worst.1
        );
    }
}

/// An open backend with a store.
struct Rig<B: Backend> {
    backend: B,
    kv: B::Kv,
}

impl<B: Backend> Rig<B> {
    /// Runs one step and returns the activation that `body` makes, through the logits.
    fn step(&mut self, batch: &Batch, body: impl FnOnce(&mut B::Step<'_>) -> B::Act) -> Vec<f32> {
        match self.try_step(batch, body) {
            Ok(Output::Logits(logits)) => logits,
            Ok(_) => Vec::new(),
            Err(error) => panic!("step: {error}"),
        }
    }

    fn try_step(
        &mut self,
        batch: &Batch,
        body: impl FnOnce(&mut B::Step<'_>) -> B::Act,
    ) -> Result<Output<B::Hidden>, BackendError> {
        let mut step = self.backend.step(&mut self.kv, batch);
        let act = body(&mut step);
        step.submit(Out::Logits(act)).wait()
    }

    /// Runs `body` on the rows of `x` without attention.
    fn rows(&mut self, x: &Tensor, body: impl FnOnce(&mut B::Step<'_>, B::Act) -> B::Act) -> Vec<f32> {
        let table = self.embedding(x);
        let batch = rows_batch(x.rows);
        self.step(&batch, |step| {
            let x = step.embed(&table);
            body(step, x)
        })
    }

    fn embedding(&mut self, x: &Tensor) -> B::Weight {
        self.load(&WeightSource::Embedding(x.view().into()))
    }

    fn norm(&mut self, x: &Tensor) -> B::Weight {
        self.load(&WeightSource::Norm(x.view()))
    }

    fn linear(&mut self, parts: &[&Tensor], sum: KSum) -> B::Weight {
        let parts = parts.iter().map(|part| part.view().into()).collect();
        self.load(&WeightSource::Linear(Linear { parts, bias: None, sum }))
    }

    fn load(&mut self, source: &WeightSource<'_>) -> B::Weight {
        self.backend.load(source).unwrap_or_else(|error| panic!("load: {error}"))
    }

    fn open(&mut self, seq: SeqId, tokens: u32) {
        self.kv.open(seq, tokens).unwrap_or_else(|error| panic!("open sequence {seq}: {error}"));
    }
}

/// A batch of `rows` rows with ids `0, 1, ..`, one short sequence each; for steps without attention.
fn rows_batch(rows: usize) -> Batch {
    let mut batch = Batch::default();
    (0..rows).for_each(|row| batch.push(SeqId(row as u64), 0, &[row as u32]));
    batch
}

/// A matrix of a test: values of `dtype`, as bytes and as floats.
#[derive(Clone)]
struct Tensor {
    dtype: DType,
    rows: usize,
    cols: usize,
    /// Values, exactly representable in `dtype`.
    values: Vec<f64>,
    bytes: Vec<u8>,
}

impl Tensor {
    /// Values of a bell-like distribution with deviation `scale`.
    fn random(seed: u64, dtype: DType, rows: usize, cols: usize, scale: f64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self::new(dtype, rows, cols, (0..rows * cols).map(|_| random.bell() * scale))
    }

    fn new(dtype: DType, rows: usize, cols: usize, values: impl Iterator<Item = f64>) -> Self {
        let mut bytes = Vec::new();
        let values: Vec<f64> = values
            .map(|x| match dtype {
                DType::F32 => {
                    bytes.extend((x as f32).to_le_bytes());
                    f64::from(x as f32)
                }
                DType::F16 => {
                    bytes.extend(f16::from_f64(x).to_le_bytes());
                    f16::from_f64(x).to_f64()
                }
                DType::BF16 => {
                    let rounded = bf16::from_f32(x as f32);
                    bytes.extend(rounded.to_le_bytes());
                    rounded.to_f64()
                }
            })
            .collect();
        assert_eq!(values.len(), rows * cols);
        Tensor { dtype, rows, cols, values, bytes }
    }

    fn view(&self) -> TensorView<'_> {
        TensorView {
            name: "test",
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            row_stride_bytes: self.cols * self.dtype.bytes(),
            bytes: &self.bytes,
        }
    }

    /// Columns `[from, to)` of the same bytes: rows further apart than they are long.
    fn columns(&self, from: usize, to: usize) -> TensorView<'_> {
        let view = self.view();
        TensorView { cols: to - from, bytes: &self.bytes[from * self.dtype.bytes()..], ..view }
    }

    /// Rows `[from, to)` of the same bytes.
    fn part(&self, from: usize, to: usize) -> TensorView<'_> {
        let view = self.view();
        TensorView { rows: to - from, bytes: &self.bytes[from * view.row_stride_bytes..], ..view }
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }
}

/// Xorshift: tests need no more.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The sum of four uniform values, scaled to deviation 1.
    fn bell(&mut self) -> f64 {
        ((0..4).map(|_| self.unit()).sum::<f64>() - 2.0) * 3f64.sqrt()
    }
}
