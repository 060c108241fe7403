//! Whole models through the seam on MLX: the references of Hugging Face transformers in f32 and bf16, one layer beside the
//! CPU backend, and caches that change hands between the two.
#![cfg(feature = "mlx")]

#[path = "../../../models/tests/golden/compare.rs"]
#[allow(dead_code)]
mod compare;
#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use backend::{
    Backend, Batch, DType, DeviceOptions, Fork, Group, KvExport, KvLanding, KvStore, Out, Output, Piece,
    SeqId, Step,
};
use backend_cpu::CpuBackend;
use backend_mlx::MlxBackend;
use models::replay::Rank;

use crate::compare::{Limits, check, f32_error};
use crate::fixture::{Fixture, Prompt};

const SEQ: SeqId = SeqId(1);
/// Two f32 implementations of one model, in standard deviations of a row.
const NEAR: f64 = 2e-4;

fn open<B: Backend>(fixture: &Fixture, dtype: DType, tokens: usize) -> Rank<B> {
    let options = DeviceOptions { dtype, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
    Rank::open(&options, Group::alone(), &fixture.checkpoint, tokens).unwrap()
}

/// Logits after the prompt at positions `start..`, in chunks, and after each id of `greedy` but the last.
fn replay<B: Backend>(rank: &mut Rank<B>, prompt: &Prompt, start: usize, chunk: usize) -> Vec<f32> {
    let len = prompt.prompt.len();
    let mut logits = Vec::new();
    if start < len {
        logits.extend(rank.feed(SEQ, start as u32, &prompt.prompt[start..], chunk).unwrap().unwrap());
    }
    for (at, id) in (len as u32..).zip(&prompt.greedy[..prompt.greedy.len() - 1]) {
        logits.extend(rank.feed(SEQ, at, &[*id], 1).unwrap().unwrap());
    }
    logits
}

fn is_the_reference(case: &str, dtype: DType) {
    let fixture = Fixture::open(case);
    for (i, prompt) in fixture.prompts.iter().enumerate() {
        let tokens = prompt.prompt.len() + prompt.greedy.len();
        let limits = match dtype {
            DType::F32 => Limits::f32(),
            _ => Limits::bf16(prompt.bf16_kl_median),
        };
        for chunk in [512, 7] {
            let mut rank = open::<MlxBackend>(&fixture, dtype, tokens);
            rank.begin(SEQ, tokens).unwrap();
            let got = replay(&mut rank, prompt, 0, chunk);
            let what = format!("{case} {dtype} p{i} in chunks of {chunk}");
            check(&what, &fixture.logits(i), &got, fixture.vocab(), &limits);
        }
    }
}

macro_rules! cases {
    ($($name:ident: $case:literal,)*) => {
        const CASES: &[&str] = &[$($case),*];
        $(mod $name {
            use super::*;

            #[test]
            fn f32_is_the_reference() {
                is_the_reference($case, DType::F32);
            }

            #[test]
            fn bf16_is_as_near_as_bf16_can_be() {
                is_the_reference($case, DType::BF16);
            }
        })*
    };
}

// MLX's own formats, GGUF's and int4 as MLX's codes; FP8 and Q6_K as the numbers that they mean.
cases! {
    llama_base: "llama-base-s1",
    llama_tied: "llama-gqa_tied-s1",
    llama_mqa_bias: "llama-mqa_bias-s1",
    llama_mlx_widths: "llama-mlx_widths",
    llama_q4_0: "llama-gguf-q4_0",
    llama_q4_k_m: "llama-gguf-q4_k_m",
    qwen3_base: "qwen3-base-s1",
    qwen3_tied_sharded: "qwen3-tied_sharded-s1",
    mistral_window: "mistral-swa-s1",
    qwen2_yarn: "qwen2-yarn-s1",
    qwen2_mixed: "qwen2-gguf-mixed",
    qwen3_q5_k_m: "qwen3-gguf-q5_k_m",
    qwen3_moe_mixed: "qwen3_moe-mixed",
    qwen3_moe_unnormed: "qwen3_moe-unnormed",
    qwen3_moe_mlx: "qwen3_moe-mlx",
    qwen3_moe_q4_0: "qwen3_moe-gguf-q4_0",
    deepseek_v3_mscale: "deepseek_v3-mscale",
    deepseek_v3_no_q_lora: "deepseek_v3-no_q_lora",
    deepseek_v3_fp8: "deepseek_v3-fp8",
    deepseek_v3_mlx: "deepseek_v3-mlx",
    deepseek_v3_q8_0: "deepseek_v3-gguf-q8_0",
    kimi_k2_base: "kimi_k2-base",
    kimi_k2_int4: "kimi_k2-int4",
    minimax_m2_base: "minimax_m2-base",
    minimax_m2_fp8: "minimax_m2-fp8",
    minimax_m2_mlx: "minimax_m2-mlx",
    glm4_moe_base: "glm4_moe-base",
    glm4_moe_plain: "glm4_moe-plain",
}

/// A case that is added for the other backends is one for this.
#[test]
fn no_case_is_left_out() {
    let all = std::fs::read_dir(fixture::root()).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = all.filter(|dir| dir.join("golden.json").exists()).collect();
    all.retain(|dir| !CASES.iter().any(|case| dir.ends_with(case)));
    assert!(all.is_empty(), "{all:?}");
}

/// Every case of the directory that `BATON_GOLDEN` names, as `tests/golden/generate.py` makes them; one line each.
#[test]
#[ignore = "needs cases in the directory that BATON_GOLDEN names"]
fn every_case_of_a_directory() {
    let dir = std::path::PathBuf::from(std::env::var_os("BATON_GOLDEN").expect("BATON_GOLDEN"));
    let mut cases: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.join("golden.json").exists());
    cases.sort();
    let mut failed = 0;
    for case in cases.iter().map(|case| case.to_str().unwrap()) {
        for dtype in [DType::F32, DType::BF16] {
            let passes = std::panic::catch_unwind(|| is_the_reference(case, dtype)).is_ok();
            println!("{} {dtype} {case}", if passes { "ok  " } else { "FAIL" });
            failed += usize::from(!passes);
        }
    }
    assert!(failed == 0 && !cases.is_empty(), "{failed} failures in {} cases", cases.len());
}

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

/// Gives the cache of `[from, to)` of every layer from one store to another, head by head.
fn hand_over<A: Backend, B: Backend>(source: &mut Rank<A>, sink: &mut Rank<B>, from: u32, to: u32) {
    let mut landing = sink.kv.land(SEQ, from..to).unwrap();
    let spec = source.model.kv_spec().clone();
    for layer in 0..spec.layers {
        let export = source.kv.export(SEQ, layer, from..to).unwrap();
        export.wait().unwrap();
        for (plane, head) in spec.planes.iter().enumerate().flat_map(|(i, p)| p.heads().map(move |h| (i, h)))
        {
            let piece = Piece { layer, plane, heads: head..head + 1, tokens: from..to };
            let mut bytes = Vec::new();
            export.read(&piece, &mut bytes).unwrap();
            landing.write(&piece, &bytes).unwrap();
        }
    }
    sink.kv.commit(landing).unwrap();
}

/// A prompt computed by `A` goes on on `B` as it would have on `A`.
fn handed_over<A: Backend, B: Backend>(case: &str) {
    let fixture = Fixture::open(case);
    for prompt in &fixture.prompts {
        let (len, tokens) = (prompt.prompt.len(), prompt.prompt.len() + prompt.greedy.len());
        let (mut a, mut b) =
            (open::<A>(&fixture, DType::F32, tokens), open::<B>(&fixture, DType::F32, tokens));
        a.begin(SEQ, tokens).unwrap();
        a.feed(SEQ, 0, &prompt.prompt, 512).unwrap();
        b.begin(SEQ, tokens).unwrap();
        hand_over(&mut a, &mut b, 0, len as u32);
        let (want, got) = (replay(&mut a, prompt, len, 512), replay(&mut b, prompt, len, 512));
        for (want, got) in want.chunks(fixture.vocab()).zip(got.chunks(fixture.vocab())) {
            let error = f32_error(want, got);
            assert!(error <= NEAR, "{case}: off by {error} deviations after a handover");
        }
    }
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
