//! The families against float32 and bfloat16 references of Hugging Face transformers, number for number, on the CPU
//! backend: logits, caches and hidden states; and the arithmetic contract: tensor parallel, chunked, incremental and
//! handed-over runs give the same bits. Fixtures: `tests/golden/` at the workspace root.

mod compare;
mod fixture;
mod ranks;

use std::path::PathBuf;

use backend::{Backend, Batch, DType, Group, KSum, KvExport, KvStore, Out, Output, Piece, SeqId, Step};
use backend_cpu::CpuBackend;
use half::{bf16, f16};
use models::replay::Rank;
use models::{Checkpoint, ModelError, shards};
use safetensors::{Dtype, SafeTensors};

use crate::compare::{Limits, check, f32_error};
use crate::fixture::{Fixture, SEQ, options};
use crate::ranks::Run;

/// Logits of a case as the references have them.
fn logits(case: &str, dtype: DType) {
    let fixture = Fixture::open(case);
    for (i, prompt) in fixture.prompts.iter().enumerate() {
        let got = Run::new(dtype).logits(&fixture.checkpoint, prompt);
        let limits = match dtype {
            DType::F32 => Limits::f32(),
            _ => Limits::bf16(prompt.bf16_kl_median),
        };
        check(&format!("{case} {dtype} p{i}"), &fixture.logits(i), &got, fixture.vocab(), &limits);
    }
}

/// Splits, chunks, single tokens and handovers of a case give the bits of the plain run. Splits into parts that are not
/// whole branches of the sum tree are as near as the reference has to be.
fn same_bits(case: &str, dtype: DType) {
    let fixture = Fixture::open(case);
    let checkpoint = &fixture.checkpoint;
    for (i, prompt) in fixture.prompts.iter().enumerate() {
        let plain = Run::new(dtype).logits(checkpoint, prompt);
        let same = |what: &str, run: Run| {
            let what = format!("{case} {dtype} p{i}: {what}");
            match split(checkpoint, run.world) {
                Split::Exact => {
                    assert!(run.logits(checkpoint, prompt) == plain, "{what} gives other bits");
                }
                Split::Near if dtype == DType::F32 => {
                    let got = run.logits(checkpoint, prompt);
                    check(&what, &plain, &got, fixture.vocab(), &Limits::f32());
                }
                Split::Near => {
                    let got = run.logits(checkpoint, prompt);
                    let limits = Limits::bf16(prompt.bf16_kl_median);
                    check(&what, &fixture.logits(i), &got, fixture.vocab(), &limits);
                }
                Split::Refused => {}
            }
        };
        same("tp 2", Run { world: 2, ..Run::new(dtype) });
        same("tp 4", Run { world: 4, chunk: 5, ..Run::new(dtype) });
        for chunk in [1, 7, 16] {
            same(&format!("chunks of {chunk}"), Run { chunk, ..Run::new(dtype) });
        }
        same("a handover", Run { handoff: true, ..Run::new(dtype) });
        same("a handover to tp 2", Run { handoff: true, world: 2, ..Run::new(dtype) });
        same("a handover to tp 4", Run { handoff: true, world: 4, chunk: 9, ..Run::new(dtype) });
    }
}

/// How a model divides over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Into branches of one sum tree.
    Exact,
    /// Into other parts.
    Near,
    /// A rank would have nothing.
    Refused,
}

fn split(checkpoint: &Checkpoint, world: usize) -> Split {
    let config = checkpoint.config();
    let shards = match shards(config, world) {
        Ok(shards) => shards,
        Err(ModelError::Groups { .. } | ModelError::Split { .. }) => return Split::Refused,
        Err(error) => panic!("{error}"),
    };
    let mut sums = vec![shards[0].o_sum];
    sums.extend(config.has_dense_layers().then_some(shards[0].down_sum));
    sums.extend(config.experts.is_some().then_some(shards[0].experts_sum));
    let branch = KSum::Tree { ranges: 8 / world };
    if sums.iter().all(|sum| *sum == branch) { Split::Exact } else { Split::Near }
}

/// No case passes by being refused, or by being compared loosely.
#[test]
fn cases_divide_as_they_were_made_to() {
    let of = |case: &str, world| split(&Fixture::open(case).checkpoint, world);
    for case in EVERY_CASE {
        // Quantisation groups are cut where ranks are more than they.
        for world in [1, 2, 4] {
            assert_eq!(of(case, world), Split::Exact, "{case} at tp {world}");
        }
    }
}

macro_rules! cases {
    ($list:ident $($name:ident: $case:literal,)*) => {
        const $list: &[&str] = &[$($case),*];
        $(mod $name {
            use super::*;

            #[test]
            fn f32_is_the_reference() {
                logits($case, DType::F32);
            }

            #[test]
            fn bf16_is_as_near_as_bf16_can_be() {
                logits($case, DType::BF16);
            }

            #[test]
            fn every_way_gives_the_same_bits() {
                same_bits($case, DType::F32);
                same_bits($case, DType::BF16);
            }

            #[test]
            fn cache_and_hidden_states_are_the_reference() {
                cache_and_hidden_states($case);
            }
        })*
    };
}

cases! {
    EVERY_CASE
    llama_base: "llama-base-s1",
    llama_tied: "llama-gqa_tied-s1",
    llama_mqa_bias: "llama-mqa_bias-s1",
    qwen3_base: "qwen3-base-s1",
    qwen3_tied_sharded: "qwen3-tied_sharded-s1",
    mistral_window: "mistral-swa-s1",
    qwen2_yarn: "qwen2-yarn-s1",
    llama_mlx_widths: "llama-mlx_widths",
    llama_nvfp4: "llama-nvfp4",
    qwen3_moe_mlx_micro: "qwen3_moe-mlx_micro",
    deepseek_v3_nvfp4: "deepseek_v3-nvfp4",
    llama_fp8_channel: "llama-fp8_channel",
    qwen3_moe_fp8_tensor: "qwen3_moe-fp8_tensor",
    qwen2_int_mixed: "qwen2-int_mixed",
    llama_w8a8: "llama-w8a8",
    qwen2_awq: "qwen2-awq",
    deepseek_v3_awq: "deepseek_v3-awq",
    llama_gptq: "llama-gptq",
    qwen3_moe_gptq_8: "qwen3_moe-gptq_8",
    qwen3_moe_mixed: "qwen3_moe-mixed",
    qwen3_moe_unnormed: "qwen3_moe-unnormed",
    qwen3_moe_mlx: "qwen3_moe-mlx",
    deepseek_v3_mscale: "deepseek_v3-mscale",
    deepseek_v3_no_q_lora: "deepseek_v3-no_q_lora",
    deepseek_v3_fp8: "deepseek_v3-fp8",
    deepseek_v3_mlx: "deepseek_v3-mlx",
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
}

// Blocks of 32 and 256 columns do not divide as far as models this small.
cases! {
    GGUF_CASES
    llama_q4_0: "llama-gguf-q4_0",
    llama_q4_k_m: "llama-gguf-q4_k_m",
    llama_q2_k: "llama-gguf-q2_k",
    qwen2_mixed: "qwen2-gguf-mixed",
    qwen3_q5_k_m: "qwen3-gguf-q5_k_m",
    deepseek_v3_q8_0: "deepseek_v3-gguf-q8_0",
    qwen3_moe_q4_0: "qwen3_moe-gguf-q4_0",
    gpt_oss_gguf: "gpt_oss-gguf-mxfp4",
}

/// Activations in 8 bits, a setting, are as near as those of llama.cpp have to be, and keep the contract.
#[test]
fn activations_in_8_bits_are_near() {
    let quantised = ["llama-mlx_widths", "qwen3_moe-mlx", "kimi_k2-int4", "deepseek_v3-mlx"];
    for case in quantised.iter().chain(GGUF_CASES) {
        let fixture = Fixture::open(case);
        for (i, prompt) in fixture.prompts.iter().enumerate() {
            let run = Run { int8: true, ..Run::new(DType::BF16) };
            let got = run.logits(&fixture.checkpoint, prompt);
            let limits = Limits::loose(prompt.bf16_kl_median);
            check(&format!("{case} int8 p{i}"), &fixture.logits(i), &got, fixture.vocab(), &limits);
            let chunked = Run { chunk: 7, ..run }.logits(&fixture.checkpoint, prompt);
            assert!(got == chunked, "{case} int8 p{i}: chunks give other bits");
        }
    }
}

/// A GGUF model has the numbers of its Hugging Face original, whatever words its file has for them, and one rank at least.
#[test]
fn gguf_graphs_are_those_of_the_originals() {
    let graph = |case: &str| models::identity::graph(Fixture::open(case).checkpoint.config());
    let original =
        |json: &str| models::identity::graph(&models::Config::parse("c", json.as_bytes()).unwrap());
    let sizes = r#""vocab_size": 512, "intermediate_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 32"#;
    let llama = original(&format!(
        r#"{{"model_type": "llama", {sizes}, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": {{
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
            "rope_type": "llama3"}}}}"#
    ));
    assert_eq!(graph("llama-gguf-q4_0"), llama);
    let qwen = original(&format!(
        r#"{{"model_type": "qwen3_moe", {sizes}, "num_attention_heads": 4, "num_key_value_heads": 2,
            "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": true,
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0}}"#
    ));
    assert_eq!(graph("qwen3_moe-gguf-q4_0"), qwen);
    for case in GGUF_CASES {
        assert_eq!(split(&Fixture::open(case).checkpoint, 1), Split::Exact, "{case}");
    }
}

/// The reference holds cache and hidden states of prompt 1.
fn cache_and_hidden_states(case: &str) {
    let fixture = Fixture::open(case);
    let config = fixture.checkpoint.config();
    let ids = &fixture.prompts[1].prompt;
    let mut rank =
        Rank::<CpuBackend>::open(&options(DType::F32), Group::alone(), &fixture.checkpoint, 64).unwrap();
    for layers in 0..config.layers {
        rank.begin(SEQ, ids.len()).unwrap();
        let mut batch = Batch::default();
        batch.push(SEQ, 0, ids);
        let mut step = rank.backend.step(&mut rank.kv, &batch);
        let x = rank.model.embed(&mut step);
        let x = rank.model.layers(&mut step, x, 0..layers, &mut |_, _| {});
        let Output::Logits(hidden) = step.submit(Out::Logits(x)).wait().unwrap() else { panic!("no output") };
        let (want, _) = fixture.reference(&format!("p1.hidden.{layers}"));
        let error = f32_error(&want, &hidden);
        assert!(error <= 2e-4, "{case}: input of layer {layers} is off by {error} of its deviation");
        rank.end(SEQ).unwrap();
    }
    rank.begin(SEQ, ids.len()).unwrap();
    rank.feed(SEQ, 0, ids, 512).unwrap();
    let len = ids.len() as u32;
    for layer in 0..config.layers {
        let export = rank.kv.export(SEQ, layer, 0..len).unwrap();
        for (plane, name) in ["k", "v"].into_iter().enumerate() {
            // The reference is [head][token][dim], of the last tokens only where a window slides.
            let (want, shape) = fixture.reference(&format!("p1.kv.{layer}.{name}"));
            let first = len - shape[1] as u32;
            for head in 0..rank.model.kv_spec().planes[plane].heads_total {
                let mut bytes = Vec::new();
                let piece = Piece { layer, plane, heads: head..head + 1, tokens: first..len };
                export.read(&piece, &mut bytes).unwrap();
                let size = shape[1] * shape[2];
                let error = f32_error(&want[head * size..(head + 1) * size], &fixture::floats(&bytes));
                assert!(error <= 2e-4, "{case}: {name} of head {head} in layer {layer} is off by {error}");
            }
        }
    }
}

/// A batch of several sequences gives each the bits that it has alone.
#[test]
fn neighbours_in_a_batch_do_not_matter() {
    let fixture = Fixture::open("qwen3-base-s1");
    for dtype in [DType::F32, DType::BF16] {
        let mut rank =
            Rank::<CpuBackend>::open(&options(dtype), Group::alone(), &fixture.checkpoint, 256).unwrap();
        let mut alone = Vec::new();
        let mut batch = Batch::default();
        for (seq, prompt) in (10..).map(SeqId).zip(&fixture.prompts) {
            rank.begin(seq, prompt.prompt.len()).unwrap();
            alone.extend(rank.feed(seq, 0, &prompt.prompt, 512).unwrap().unwrap());
            batch.push(seq, 0, &prompt.prompt);
        }
        let mut step = rank.backend.step(&mut rank.kv, &batch);
        let out = rank.model.forward(&mut step, &batch.last_rows(), &mut |_, _| {});
        let Output::Logits(together) = step.submit(Out::Logits(out)).wait().unwrap() else {
            panic!("no logits")
        };
        assert!(together == alone, "{dtype}: a batch gives other bits");
    }
}

/// The pieces (embed, layers, head) are the whole.
#[test]
fn layer_by_layer_is_the_whole_model() {
    let fixture = Fixture::open("llama-base-s1");
    let ids = &fixture.prompts[1].prompt;
    let mut rank =
        Rank::<CpuBackend>::open(&options(DType::BF16), Group::alone(), &fixture.checkpoint, 64).unwrap();
    rank.begin(SEQ, ids.len()).unwrap();
    let whole = rank.feed(SEQ, 0, ids, 512).unwrap().unwrap();
    let mut batch = Batch::default();
    batch.push(SEQ, 0, ids);
    let mut order = Vec::new();
    let mut step = rank.backend.step(&mut rank.kv, &batch);
    let mut x = rank.model.embed(&mut step);
    for layer in 0..rank.model.config().layers {
        x = rank.model.layer(&mut step, x, layer, &mut |_, layer| order.push(layer));
    }
    let x = rank.model.head(&mut step, x, &batch.last_rows());
    let Output::Logits(pieces) = step.submit(Out::Logits(x)).wait().unwrap() else { panic!("no logits") };
    assert!(pieces == whole);
    assert_eq!(order, [0, 1, 2]);
}

/// Random weights of every family load on any split, give the same bits, and sane logits.
#[test]
fn dummy_weights_run() {
    let families = [
        "llama-base-s1",
        "mistral-swa-s1",
        "qwen2-yarn-s1",
        "qwen3-base-s1",
        "qwen3_moe-mixed",
        "deepseek_v3-mscale",
        "kimi_k2-int4",
        "minimax_m2-fp8",
        "glm4_moe-base",
    ];
    for case in families {
        let dir = fixture::root().join(case);
        let checkpoint = Checkpoint::dummy(&dir, 7).unwrap();
        let prompt = fixture::Prompt { prompt: vec![1, 2, 3], greedy: vec![4, 5], bf16_kl_median: 0.0 };
        let plain = Run::new(DType::BF16).logits(&checkpoint, &prompt);
        let split = Run { world: 2, ..Run::new(DType::BF16) }.logits(&checkpoint, &prompt);
        assert!(plain == split, "{case}: tp 2 gives other bits");
        let row = &plain[..checkpoint.config().vocab_size];
        let deviation = compare::deviation(row);
        assert!((0.3..3.0).contains(&deviation), "{case}: deviation {deviation}");
        let other = Checkpoint::dummy(&dir, 8).unwrap();
        assert!(plain != Run::new(DType::BF16).logits(&other, &prompt), "{case}: the seed does nothing");
    }
}

/// The same numbers in bf16, f16 and f32 files are the same model, to the bit.
#[test]
fn plain_types_differ_in_nothing_but_size() {
    let source = fixture::root().join("qwen3_moe-mixed");
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    let wide = |bytes: &[u8]| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    // Numbers that all three types have: the smallest are below what f16 has.
    let kept = |x: f32| if f16::from_f32(x).to_f32() == x { x } else { 0.0 };
    let logits = |dtype: Dtype| {
        let store = |x: f32| match dtype {
            Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let stored: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|(name, tensor)| {
                assert_eq!(tensor.dtype(), Dtype::BF16, "{name}");
                let numbers = tensor.data().chunks_exact(2).map(|bytes| kept(wide(bytes)));
                (name, tensor.shape().to_vec(), numbers.flat_map(store).collect())
            })
            .collect();
        let views = stored.iter().map(|(name, shape, bytes)| {
            (*name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        let name = dtype.to_string().to_lowercase();
        safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), &config).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.formats().iter().all(|(format, _)| *format == name), "{:?}", checkpoint.formats());
        let prompt = fixture::Prompt { prompt: vec![5, 99, 3, 7], greedy: vec![1, 9], bf16_kl_median: 0.0 };
        [1, 2].map(|world| Run { world, ..Run::new(DType::F32) }.logits(&checkpoint, &prompt))
    };
    let narrow = logits(Dtype::BF16);
    assert!(narrow[0] == narrow[1], "two ranks give other bits");
    for dtype in [Dtype::F16, Dtype::F32] {
        assert!(logits(dtype) == narrow, "{dtype} gives other bits");
    }
}

/// Nodes compare these when they meet: same numbers, same ids, same weights, each seen apart from the others.
#[test]
fn identities_tell_models_apart() {
    let identity = |case| models::Identity::read(&Fixture::open(case).checkpoint).unwrap();
    let (base, tied) = (identity("llama-base-s1"), identity("llama-gqa_tied-s1"));
    assert_eq!(base, identity("llama-base-s1"));
    assert_eq!((&base.graph, &base.vocab), (&tied.graph, &tied.vocab));
    assert_ne!(base.weights, tied.weights);
    let other = identity("qwen3-base-s1");
    assert_ne!(base.graph, other.graph);
    assert_ne!(base.vocab, other.vocab);
    assert!([&base.graph, &base.vocab, &base.weights].iter().all(|hash| hash.len() == 64), "{base:?}");
}

/// Ranks with unequal heads and columns, and ranks that share a KV head, compute the same model: to the rounding of f32,
/// since their sums have no common tree.
#[test]
fn uneven_splits_agree_within_rounding() {
    let sizes = r#""vocab_size": 101, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64"#;
    let latent = r#""qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "kv_lora_rank": 32,
        "q_lora_rank": 20, "n_routed_experts": 6, "moe_intermediate_size": 40, "n_shared_experts": 1"#;
    let experts = r#""num_local_experts": 6, "num_experts_per_tok": 2"#;
    for (model_type, more) in [
        ("qwen2", r#""intermediate_size": 160"#.into()),
        (
            "deepseek_v3",
            format!(r#""intermediate_size": 72, "first_k_dense_replace": 1, {latent}, {experts}"#),
        ),
        ("minimax_m2", format!(r#""intermediate_size": 40, "head_dim": 16, "rotary_dim": 8, {experts}"#)),
    ] {
        let mut config = format!(r#"{{"model_type": "{model_type}", {sizes}, {more}}}"#);
        if model_type == "deepseek_v3" {
            config =
                config.replace("\"num_key_value_heads\": 3, ", "").replace("\"num_local_experts\": 6, ", "");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let checkpoint = Checkpoint::dummy(dir.path(), 1).unwrap();
        let prompt =
            fixture::Prompt { prompt: vec![5, 99, 3, 7], greedy: vec![1, 100, 2], bf16_kl_median: 0.0 };
        let plain = Run::new(DType::F32).logits(&checkpoint, &prompt);
        for world in [2, 3, 4, 5, 6] {
            for handoff in [false, true] {
                let split = Run { world, handoff, ..Run::new(DType::F32) }.logits(&checkpoint, &prompt);
                let what = format!("{model_type} tp {world}, handover {handoff}");
                check(&what, &plain, &split, 101, &Limits::f32());
            }
        }
    }
}

/// Every case of the directory that `BATON_GOLDEN` names, as `generate.py` makes them; one line each.
#[test]
#[ignore = "needs cases in the directory that BATON_GOLDEN names"]
fn every_case_of_a_directory() {
    let dir = PathBuf::from(std::env::var_os("BATON_GOLDEN").expect("BATON_GOLDEN"));
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.join("golden.json").exists());
    cases.sort();
    let mut failed = 0;
    for case in &cases {
        let case = case.to_str().unwrap();
        let passes = std::panic::catch_unwind(|| {
            for dtype in [DType::F32, DType::BF16] {
                logits(case, dtype);
                same_bits(case, dtype);
            }
        });
        println!("{} {case}", if passes.is_ok() { "ok  " } else { "FAIL" });
        failed += usize::from(passes.is_err());
    }
    assert!(failed == 0 && !cases.is_empty(), "{failed} of {} cases failed", cases.len());
}
