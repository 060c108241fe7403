//! Whole models through the seam on MLX: the references of Hugging Face transformers in f32 and bf16, one layer beside the
//! CPU backend, and caches that change hands between the two.
#![cfg(feature = "mlx")]

#[path = "../../../models/tests/golden/compare.rs"]
#[allow(dead_code)]
mod compare;
#[path = "../../../models/tests/golden/device.rs"]
mod device;
#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use backend::{Backend, Batch, DType, Fork, KvStore, Out, Output, SeqId, Step};
use backend_cpu::CpuBackend;
use backend_mlx::MlxBackend;

use crate::compare::f32_error;
use crate::device::{NEAR, every_case, handed_over, is_reference_on, open};
use crate::fixture::{Fixture, SEQ};

fn is_the_reference(case: &str, dtype: DType) {
    is_reference_on::<MlxBackend>(case, dtype, &[512, 7]);
}

// MLX's own formats, GGUF's and int4 as MLX's codes; FP8 and Q6_K as the numbers that they mean.
every_case!();

/// One Llama layer, row by row, on two backends through the same seam.
#[test]
fn one_llama_layer_is_that_of_the_cpu() {
    fn layer<B: Backend>(fixture: &Fixture, ids: &[u32]) -> Vec<f32> {
        let mut rank = open::<B>(fixture, DType::F32, 64);
        rank.begin(SEQ, ids.len()).unwrap();
        let mut batch = Batch::default();
        batch.push(SEQ, 0, ids);
        let mut step = rank.backend.step(&mut rank.kv, &batch);
        let x = rank.model.embed(&mut step);
        let x = rank.model.layer(&mut step, x, 0, &mut |_, _| {});
        let Output::Logits(x) = step.submit(Out::Logits(x)).wait().unwrap() else { panic!("no output") };
        x
    }
    let fixture = Fixture::open("llama-base-s1");
    let ids = &fixture.prompts[1].prompt;
    let (cpu, mlx) = (layer::<CpuBackend>(&fixture, ids), layer::<MlxBackend>(&fixture, ids));
    let error = f32_error(&cpu, &mlx);
    assert!(error <= 2e-5, "off by {error} deviations");
}

/// The reason for all this: a CPU (or CUDA) node reads the prompt, MLX generates.
#[test]
fn cpu_prompts_go_on_on_mlx() {
    for case in ["llama-base-s1", "qwen3-base-s1", "mistral-swa-s1", "deepseek_v3-mscale", "minimax_m2-base"]
    {
        handed_over::<CpuBackend, MlxBackend>(case);
    }
}

/// And back, as a migration would.
#[test]
fn mlx_prompts_go_on_on_the_cpu() {
    for case in ["llama-gqa_tied-s1", "qwen2-yarn-s1", "deepseek_v3-mlx"] {
        handed_over::<MlxBackend, CpuBackend>(case);
    }
}

/// Several sequences of unlike length, chunks beside single tokens: each gets what it gets alone.
#[test]
fn neighbours_in_a_batch_do_not_matter() {
    let fixture = Fixture::open("mistral-swa-s1");
    let mut rank = open::<MlxBackend>(&fixture, DType::F32, 512);
    let texts: Vec<&[u32]> = fixture.prompts.iter().map(|prompt| prompt.prompt.as_slice()).collect();
    let mut want = Vec::new();
    for text in &texts {
        rank.begin(SEQ, text.len()).unwrap();
        want.push(rank.feed(SEQ, 0, text, 512).unwrap().unwrap());
        rank.end(SEQ).unwrap();
    }
    let seqs: Vec<SeqId> = (10..).map(SeqId).take(texts.len()).collect();
    for (seq, text) in seqs.iter().zip(&texts) {
        rank.begin(*seq, text.len()).unwrap();
    }
    // All but the last token of each, in two steps; then the last of the first half beside a chunk, then of all.
    let mut done = vec![0; texts.len()];
    for part in 0..3 {
        let mut batch = Batch::default();
        for (at, (seq, text)) in seqs.iter().zip(&texts).enumerate().rev() {
            let end = match part {
                0 if at % 2 == 0 => text.len() - 1,
                0 => text.len() / 2,
                1 if at % 2 == 0 => continue,
                1 => text.len() - 1,
                _ => text.len(),
            };
            if end > done[at] {
                batch.push(*seq, done[at] as u32, &text[done[at]..end]);
                done[at] = end;
            }
        }
        let mut step = rank.backend.step(&mut rank.kv, &batch);
        let out = rank.model.forward(&mut step, &batch.last_rows(), &mut |_, _| {});
        let Output::Logits(got) = step.submit(Out::Logits(out)).wait().unwrap() else { panic!("no logits") };
        if part == 2 {
            for (got, want) in got.chunks(fixture.vocab()).zip(want.iter().rev()) {
                let error = f32_error(want, got);
                assert!(error <= NEAR, "off by {error} deviations among others");
            }
        }
    }
}

/// A sequence that outgrows its slot moves with what it holds, and a fork is a copy of its own.
#[test]
fn growing_and_forked_sequences_keep_their_cache() {
    let fixture = Fixture::open("llama-base-s1");
    let ids: Vec<u32> = (0..600).map(|i| (i * 37 + 11) % fixture.vocab() as u32).collect();
    let mut cpu = open::<CpuBackend>(&fixture, DType::F32, 1024);
    cpu.begin(SEQ, ids.len()).unwrap();
    let mut rank = open::<MlxBackend>(&fixture, DType::F32, 2048);
    let mut room = 16;
    rank.begin(SEQ, room).unwrap();
    let forked = SeqId(2);
    for (start, end) in [(0, 200), (200, 256), (256, 257), (257, 540), (540, 600)] {
        while room < end {
            room += 16;
            rank.kv.grow(SEQ, room as u32).unwrap();
        }
        let want = cpu.feed(SEQ, start as u32, &ids[start..end], 512).unwrap().unwrap();
        let got = rank.feed(SEQ, start as u32, &ids[start..end], 512).unwrap().unwrap();
        let error = f32_error(&want, &got);
        assert!(error <= NEAR, "after {end} tokens: off by {error} deviations");
        if end == 540 {
            rank.kv.fork(SEQ, forked, 528, Fork::Share).unwrap();
            rank.kv.grow(forked, 600).unwrap();
        }
        if end == 600 {
            rank.kv.truncate(SEQ, 0).unwrap();
            rank.kv.grow(SEQ, 600).unwrap();
            rank.feed(SEQ, 0, &ids[60..], 512).unwrap();
            let got = rank.feed(forked, 528, &ids[528..], 512).unwrap().unwrap();
            let error = f32_error(&want, &got);
            assert!(error <= NEAR, "forked: off by {error} deviations");
        }
    }
    let usage = rank.kv.usage();
    assert_eq!((usage.used, usage.quarantined), (2 * 38, 0));
}
