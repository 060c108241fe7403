//! Steps write the cache where it lies.

use backend::{
    Attend, Backend, Batch, DType, DeviceOptions, Draw, Group, Out, Pending, Rope, RopeStyle, Rule, Step,
    TensorView, WeightSource,
};

use std::sync::{MutexGuard, PoisonError};

use super::*;
use crate::MlxBackend;

const A: SeqId = SeqId(1);
const B: SeqId = SeqId(2);

/// Inputs of a product that takes milliseconds.
const WIDE: usize = 30_000;

/// Memory is counted for the whole process: tests that take much of it come one after the other.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Rig {
    backend: MlxBackend,
    kv: MlxKv,
    table: crate::MlxWeight,
    /// `[WIDE, 384]` and back.
    mixer: [crate::MlxWeight; 2],
    /// `[384, 128]`, from attention to the next layer's q, k and v.
    widener: crate::MlxWeight,
    /// Whether large products come before every attention, so that a step is still under way when the next one begins.
    slow: bool,
    rope: Rope,
    _alone: MutexGuard<'static, ()>,
}

fn view(bytes: &[u8], rows: usize, cols: usize) -> TensorView<'_> {
    TensorView { name: "test", dtype: DType::F32, rows, cols, row_stride_bytes: cols * 4, bytes }
}

impl Rig {
    /// A store of 8192 tokens of one layer, two heads of 64 in f32: 2 MiB per bank and plane.
    fn new() -> Self {
        Self::of_layers(1)
    }

    fn of_layers(layers: usize) -> Self {
        let _alone = alone();
        let options =
            DeviceOptions { dtype: DType::F32, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
        let mut backend = MlxBackend::open(&options, Group::alone()).unwrap();
        let spec = KvSpec::gqa(layers, 2, 0..2, 64, DType::F32);
        let kv = backend.kv(&spec, 8192 * spec.token_bytes() as u64).unwrap();
        // Rows of q | k | v: 2 + 2 + 2 heads.
        // As many rows as a step's result is wide: any id drawn from it has one.
        let bytes: Vec<u8> =
            (0..128 * 384).flat_map(|i: u32| ((i % 101) as f32 / 50.0).to_le_bytes()).collect();
        let table = backend.load(&WeightSource::Embedding(view(&bytes, 128, 384).into())).unwrap();
        let zeros = vec![0u8; WIDE * 384 * 4];
        let mixer = [(WIDE, 384), (384, WIDE)].map(|(rows, cols)| {
            backend.load(&WeightSource::Embedding(view(&zeros, rows, cols).into())).unwrap()
        });
        let widener =
            backend.load(&WeightSource::Embedding(view(&zeros[..384 * 128 * 4], 384, 128).into())).unwrap();
        // Without rope the steps are so short that MLX takes a second one while the first runs.
        let rope = Rope { inv_freq: Vec::new().into(), factor: 1.0, style: RopeStyle::HalfSplit };
        Rig { backend, kv, table, mixer, widener, slow: false, rope, _alone }
    }

    fn step(&mut self, batch: &Batch) -> Box<dyn Pending<crate::MlxAct>> {
        self.step_for(batch, Out::Logits)
    }

    fn step_for(
        &mut self,
        batch: &Batch,
        out: impl FnOnce(crate::MlxAct) -> Out<crate::MlxAct>,
    ) -> Box<dyn Pending<crate::MlxAct>> {
        let attend = Attend {
            heads: 2,
            kv_heads: 2,
            head_dim: 64,
            scale: 0.125,
            rope: &self.rope,
            qk_norm: None,
            window: None,
            sinks: None,
        };
        let mut step = self.backend.step(&mut self.kv, batch);
        let mut attended = None;
        for layer in 0..step.kv.spec().layers {
            let mut qkv = step.embed(&self.table);
            if let Some(before) = attended.take() {
                // The layer below counts, though not its numbers.
                let before = step.linear(&before, &self.widener);
                qkv = step.add(qkv, before);
            }
            if self.slow {
                for weight in &self.mixer {
                    qkv = step.linear(&qkv, weight);
                }
            }
            attended = Some(step.attend(layer, qkv, &attend));
        }
        step.submit(out(attended.unwrap()))
    }

    /// Where the planes of the first bank lie. They have been evaluated.
    fn addresses(&self) -> Vec<usize> {
        let address = |(layer, plane)| {
            let array = self.kv.array(0, layer, plane);
            array.eval().unwrap();
            // SAFETY: an evaluated array of f32; the pointer is only compared.
            unsafe { mlx_sys::mlx_array_data_float32(array.as_ptr()) as usize }
        };
        self.kv.planes().into_iter().map(address).collect()
    }
}

/// One token for each of two sequences at `position`.
fn tokens(position: u32) -> Batch {
    let mut batch = Batch::default();
    batch.push(A, position, &[1]);
    batch.push(B, position, &[2]);
    batch
}

/// A step costs its own tokens, not a copy of the cache: chunks and tokens, with a lease in between, one step after the
/// other.
#[test]
fn steps_write_in_place() {
    let mut rig = Rig::new();
    rig.kv.open(A, 250).unwrap();
    rig.kv.open(B, 250).unwrap();
    let mut batch = Batch::default();
    batch.push(A, 0, &[0, 1, 2, 3]);
    batch.push(B, 0, &[0, 1, 2, 3]);
    rig.step(&batch).wait().unwrap();
    let before = rig.addresses();
    let export = rig.kv.export(A, 0, 0..4).unwrap();
    for position in 4..12 {
        rig.step(&tokens(position)).wait().unwrap();
        assert_eq!(rig.addresses(), before, "moved at position {position}");
    }
    drop(export);
}

/// Two steps in flight, `submit` waiting for neither: the cache is written where it lies, and no other memory of its size is
/// taken. (MLX alone would copy it: what runs holds its inputs.)
fn stays_in_place(layers: usize, mut submit: impl FnMut(&mut Rig, u32) -> Box<dyn Pending<crate::MlxAct>>) {
    let mut rig = Rig::of_layers(layers);
    rig.kv.open(A, 250).unwrap();
    rig.kv.open(B, 250).unwrap();
    submit(&mut rig, 0).wait().unwrap();
    let before = rig.addresses();
    let bank_bytes = rig.kv.array(0, 0, 0).nbytes();
    rig.slow = true;
    submit(&mut rig, 1).wait().unwrap();
    mlx_rs::memory::reset_peak_memory().unwrap();
    let held = mlx_rs::memory::active_memory().unwrap();
    let (mut overlapped, mut first) = (0, submit(&mut rig, 2));
    for position in 3..40 {
        let second = submit(&mut rig, position);
        overlapped += usize::from(!first.ready());
        first.wait().unwrap();
        first = second;
    }
    first.wait().unwrap();
    let more = mlx_rs::memory::peak_memory().unwrap() - held;
    assert_eq!(rig.addresses(), before);
    assert!(more < bank_bytes, "{more} bytes more, one array of the cache has {bank_bytes}");
    assert!(overlapped > 0, "every step had ended when the next was submitted");
}

/// Steps on ids that the host knows.
#[test]
fn overlapping_steps_write_in_place() {
    stays_in_place(1, |rig, position| rig.step(&tokens(position)));
}

/// Each step takes the tokens that the one before is still drawing.
#[test]
fn steps_on_tokens_in_flight_write_in_place() {
    stays_in_place(1, drawing());
}

/// Steps in halves: the first of one runs beside the second of the one before, on caches of other layers.
#[test]
fn halves_write_in_place() {
    stays_in_place(4, drawing());
}

/// Steps on tokens that the one before is still drawing.
fn drawing() -> impl FnMut(&mut Rig, u32) -> Box<dyn Pending<crate::MlxAct>> {
    let draw = |act| Out::Draw(act, vec![Draw::Token(Rule { temperature: 1.0, ..Rule::GREEDY }); 2]);
    move |rig, position| {
        let mut batch = tokens(position);
        if position > 0 {
            batch = Batch::default();
            batch.push_drawn(A, position, 0);
            batch.push_drawn(B, position, 1);
        }
        rig.step_for(&batch, draw)
    }
}

/// Steps that nobody waits for, with a sequence that comes, a lease and one that grows in between.
#[test]
fn what_comes_between_waits_its_turn() {
    let mut rig = Rig::new();
    rig.kv.open(A, 250).unwrap();
    rig.kv.open(B, 250).unwrap();
    let mut running = Vec::new();
    for position in 0..6 {
        rig.slow = position > 3;
        running.push(rig.step(&tokens(position)));
    }
    let export = rig.kv.export(A, 0, 0..6).unwrap();
    rig.kv.fork(A, SeqId(3), 0, Fork::Share).unwrap();
    rig.kv.grow(A, 300).unwrap();
    running.push(rig.step(&tokens(6)));
    let after = rig.kv.export(A, 0, 0..6).unwrap();
    let read = |export: MlxExport| {
        use backend::{KvExport, Piece};
        export.wait().unwrap();
        let mut bytes = Vec::new();
        export.read(&Piece { layer: 0, plane: 0, heads: 0..2, tokens: 0..6 }, &mut bytes).unwrap();
        bytes
    };
    let (before, after) = (read(export), read(after));
    assert!(before.iter().any(|byte| *byte != 0));
    assert_eq!(before, after);
    running.pop().unwrap().wait().unwrap();
}

/// A prefix that is copied costs its own bytes, not a copy of the bank that both sequences lie in.
#[test]
fn forks_copy_in_place() {
    let mut rig = Rig::new();
    rig.kv.open(A, 250).unwrap();
    rig.kv.open(B, 250).unwrap();
    let ids: Vec<u32> = (0..20).collect();
    let mut batch = Batch::default();
    batch.push(A, 0, &ids);
    batch.push(B, 0, &ids);
    rig.step(&batch).wait().unwrap();
    let before = rig.addresses();
    let (bank_bytes, token_bytes) = (rig.kv.array(0, 0, 0).nbytes(), rig.kv.spec.token_bytes() as u64);
    mlx_rs::memory::reset_peak_memory().unwrap();
    let held = mlx_rs::memory::active_memory().unwrap();
    rig.kv.fork(A, SeqId(3), 16, Fork::Share).unwrap();
    let read = |kv: &mut MlxKv, seq| {
        use backend::{KvExport, Piece};
        let export = kv.export(seq, 0, 0..16).unwrap();
        export.wait().unwrap();
        let mut bytes = Vec::new();
        export.read(&Piece { layer: 0, plane: 1, heads: 0..2, tokens: 0..16 }, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(read(&mut rig.kv, A), read(&mut rig.kv, SeqId(3)));
    assert_eq!(rig.addresses(), before);
    let more = mlx_rs::memory::peak_memory().unwrap() - held;
    assert!(more < bank_bytes / 2, "{more} bytes more, one array of the cache has {bank_bytes}");
    assert_eq!(rig.kv.copied.load(Ordering::Relaxed), 16 * token_bytes);
    rig.kv.fork(A, SeqId(4), 16, Fork::Move).unwrap();
    assert_eq!(rig.kv.copied.load(Ordering::Relaxed), 16 * token_bytes, "what is moved is not copied");
    assert_eq!(read(&mut rig.kv, SeqId(4)), read(&mut rig.kv, SeqId(3)));
}
