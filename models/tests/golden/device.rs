//! Whole models through the seam on one device, for the backends' own tests: the references of Hugging Face transformers, and
//! caches that change hands between two devices.

use backend::{Backend, DType, Group, KvExport, KvLanding, KvStore, Piece};
use models::replay::Rank;

use crate::compare::{Limits, check, f32_error};
use crate::fixture::{Fixture, Prompt, SEQ, options, root};

/// Two f32 implementations of one model, in standard deviations of a row.
pub const NEAR: f64 = 2e-4;

/// Tests of every case, of which none is left out, and of a directory's: they call `is_the_reference(case, dtype)`.
macro_rules! every_case {
    () => {
        crate::device::cases! {
            llama_base: "llama-base-s1",
            llama_tied: "llama-gqa_tied-s1",
            llama_mqa_bias: "llama-mqa_bias-s1",
            llama_mlx_widths: "llama-mlx_widths",
            llama_nvfp4: "llama-nvfp4",
            qwen3_moe_mlx_micro: "qwen3_moe-mlx_micro",
            deepseek_v3_nvfp4: "deepseek_v3-nvfp4",
            llama_fp8_channel: "llama-fp8_channel",
            llama_w8a8: "llama-w8a8",
            llama_gptq: "llama-gptq",
            llama_q4_0: "llama-gguf-q4_0",
            llama_q2_k: "llama-gguf-q2_k",
            llama_q4_k_m: "llama-gguf-q4_k_m",
            qwen3_base: "qwen3-base-s1",
            qwen3_tied_sharded: "qwen3-tied_sharded-s1",
            mistral_window: "mistral-swa-s1",
            qwen2_yarn: "qwen2-yarn-s1",
            qwen2_mixed: "qwen2-gguf-mixed",
            qwen2_int_mixed: "qwen2-int_mixed",
            qwen2_awq: "qwen2-awq",
            qwen3_q5_k_m: "qwen3-gguf-q5_k_m",
            qwen3_moe_fp8_tensor: "qwen3_moe-fp8_tensor",
            qwen3_moe_gptq_8: "qwen3_moe-gptq_8",
            qwen3_moe_mixed: "qwen3_moe-mixed",
            qwen3_moe_unnormed: "qwen3_moe-unnormed",
            qwen3_moe_mlx: "qwen3_moe-mlx",
            qwen3_moe_q4_0: "qwen3_moe-gguf-q4_0",
            deepseek_v3_mscale: "deepseek_v3-mscale",
            deepseek_v3_no_q_lora: "deepseek_v3-no_q_lora",
            deepseek_v3_fp8: "deepseek_v3-fp8",
            deepseek_v3_mlx: "deepseek_v3-mlx",
            deepseek_v3_awq: "deepseek_v3-awq",
            deepseek_v3_q8_0: "deepseek_v3-gguf-q8_0",
            kimi_k2_base: "kimi_k2-base",
            kimi_k2_int4: "kimi_k2-int4",
            minimax_m2_base: "minimax_m2-base",
            minimax_m2_fp8: "minimax_m2-fp8",
            minimax_m2_mlx: "minimax_m2-mlx",
            glm4_moe_base: "glm4_moe-base",
            glm4_moe_plain: "glm4_moe-plain",
            gpt_oss_base: "gpt_oss-base",
            gpt_oss_mxfp4: "gpt_oss-mxfp4",
            gpt_oss_mlx: "gpt_oss-mlx",
            gpt_oss_gguf: "gpt_oss-gguf-mxfp4",
        }
    };
}
pub(crate) use every_case;

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

        /// A case that is added for the other backends is one for this.
        #[test]
        fn no_case_is_left_out() {
            crate::device::none_is_left_out(CASES);
        }

        #[test]
        #[ignore = "needs cases in the directory that BATON_GOLDEN names"]
        fn every_case_of_a_directory() {
            crate::device::every_case_of_directory(is_the_reference);
        }
    };
}
pub(crate) use cases;

/// Asserts that `cases` are all that there are.
pub fn none_is_left_out(cases: &[&str]) {
    let mut all: Vec<_> = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|dir| dir.join("golden.json").exists() && !cases.iter().any(|case| dir.ends_with(case)));
    assert!(all.is_empty(), "{all:?}");
}

pub fn open<B: Backend>(fixture: &Fixture, dtype: DType, tokens: usize) -> Rank<B> {
    Rank::open(&options(dtype), Group::alone(), &fixture.checkpoint, tokens).unwrap()
}

/// Logits after the prompt at positions `start..`, in chunks, and after each id of `greedy` but the last.
pub fn replay<B: Backend>(rank: &mut Rank<B>, prompt: &Prompt, start: usize, chunk: usize) -> Vec<f32> {
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

/// Every prompt of a case, in chunks of these sizes.
pub fn is_reference_on<B: Backend>(case: &str, dtype: DType, chunks: &[usize]) {
    let fixture = Fixture::open(case);
    for (i, prompt) in fixture.prompts.iter().enumerate() {
        let tokens = prompt.prompt.len() + prompt.greedy.len();
        let limits = match dtype {
            DType::F32 => Limits::f32(),
            _ => Limits::bf16(prompt.bf16_kl_median),
        };
        for chunk in chunks {
            let mut rank = open::<B>(&fixture, dtype, tokens);
            rank.begin(SEQ, tokens).unwrap();
            let got = replay(&mut rank, prompt, 0, *chunk);
            let what = format!("{case} {dtype} p{i} in chunks of {chunk}");
            check(&what, &fixture.logits(i), &got, fixture.vocab(), &limits);
        }
    }
}

/// Every case of the directory that `BATON_GOLDEN` names, as `tests/golden/generate.py` makes them; one line each.
pub fn every_case_of_directory(is_the_reference: fn(&str, DType)) {
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
pub fn handed_over<A: Backend, B: Backend>(case: &str) {
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
