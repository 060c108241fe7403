//! Promise: a handoff changes nothing, whatever the family and whatever the format of its weights: a prompt that one
//! process computes and two others go on from gives the tokens and log probabilities of a process that does it all.

use serde_json::{Value, json};

use crate::parts::Parts;

/// Ids of the golden cases are below this.
const VOCAB: u32 = 160;

/// Every case that the project carries, as `--model` takes it: all families, and all formats of each.
const DENSE: &[&str] =
    &["llama-base-s1", "llama-gqa_tied-s1", "llama-mqa_bias-s1", "mistral-swa-s1", "qwen2-yarn-s1"];
const NORMED: &[&str] = &["qwen3-base-s1", "qwen3-tied_sharded-s1", "llama-mlx_widths", "qwen3-gguf-q5_k_m"];
const EXPERTS: &[&str] = &[
    "qwen3_moe-mixed",
    "qwen3_moe-unnormed",
    "minimax_m2-base",
    "glm4_moe-base",
    "glm4_moe-plain",
    "gpt_oss-base",
];
const LATENTS: &[&str] = &["deepseek_v3-mscale", "deepseek_v3-no_q_lora", "kimi_k2-base"];
const QUANTISED: &[&str] =
    &["llama-nvfp4", "llama-fp8_channel", "llama-w8a8", "llama-gptq", "qwen2-awq", "qwen2-int_mixed"];
const QUANTISED_EXPERTS: &[&str] = &[
    "qwen3_moe-mlx",
    "qwen3_moe-mlx_micro",
    "qwen3_moe-fp8_tensor",
    "qwen3_moe-gptq_8",
    "minimax_m2-fp8",
    "minimax_m2-mlx",
    "gpt_oss-mxfp4",
    "gpt_oss-mlx",
];
const QUANTISED_LATENTS: &[&str] =
    &["deepseek_v3-fp8", "deepseek_v3-nvfp4", "deepseek_v3-mlx", "deepseek_v3-awq", "kimi_k2-int4"];
const GGUF: &[&str] = &[
    "llama-gguf-q4_0",
    "llama-gguf-q2_k",
    "llama-gguf-q4_k_m/model-q4_k_m.gguf",
    "qwen2-gguf-mixed/model-mixed-00001-of-00002.gguf",
    "qwen3_moe-gguf-q4_0/model-q4_0.gguf",
    "deepseek_v3-gguf-q8_0",
    "gpt_oss-gguf-mxfp4",
];

/// Its 5 blocks of 32 columns make 3 and 2 on two ranks: other sums, which round otherwise. In f32 the tokens are the same.
const UNEVEN: &str = "llama-gguf-q4_0";

#[test]
fn no_case_is_left_out() {
    let plain = [DENSE, NORMED, EXPERTS, LATENTS].concat();
    let lists = [&plain[..], QUANTISED, QUANTISED_EXPERTS, QUANTISED_LATENTS, GGUF].concat();
    let mut listed: Vec<&str> = lists.iter().map(|case| case.split('/').next().unwrap_or(case)).collect();
    listed.sort_unstable();
    let root = format!("{}/tests/golden", env!("CARGO_MANIFEST_DIR"));
    let entries = std::fs::read_dir(root).expect("the cases").map(|entry| entry.expect("an entry"));
    let cases = entries.filter(|entry| entry.path().join("golden.json").exists());
    let mut cases: Vec<String> =
        cases.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    cases.sort_unstable();
    assert_eq!(listed, cases);
}

#[tokio::test]
async fn dense_models_go_on_after_a_handoff() {
    handoffs(DENSE).await;
}

#[tokio::test]
async fn models_with_normed_heads_go_on_after_a_handoff() {
    handoffs(NORMED).await;
}

#[tokio::test]
async fn experts_go_on_after_a_handoff() {
    handoffs(EXPERTS).await;
}

#[tokio::test]
async fn latents_go_on_after_a_handoff() {
    handoffs(LATENTS).await;
}

#[tokio::test]
async fn quantised_models_go_on_after_a_handoff() {
    handoffs(QUANTISED).await;
}

#[tokio::test]
async fn quantised_experts_go_on_after_a_handoff() {
    handoffs(QUANTISED_EXPERTS).await;
}

#[tokio::test]
async fn quantised_latents_go_on_after_a_handoff() {
    handoffs(QUANTISED_LATENTS).await;
}

#[tokio::test]
async fn gguf_models_go_on_after_a_handoff() {
    handoffs(GGUF).await;
}

async fn handoffs(cases: &[&str]) {
    for case in cases {
        let model = format!("--model={}/tests/golden/{case}", env!("CARGO_MANIFEST_DIR"));
        let dtype: &[&str] = if *case == UNEVEN { &["--dtype=f32"] } else { &[] };
        let with = |flags: &[&'static str]| [&[model.as_str()], dtype, flags].concat();
        let mut one = Parts::router(&["--disaggregation=never", &model, "--context=1024"]);
        one.decode("one", 1, &with(&[]));
        one.wait_until_ready(&["one.0"]).await;
        let wanted = answers(&one).await;
        drop(one);

        let mut cut = Parts::router(&["--disaggregation=always", &model, "--context=1024"]);
        cut.prefill("p", 1, &with(&["--chunk-tokens=37", "--block-tokens=16"]));
        cut.decode("d", 2, &with(&["--block-tokens=32"]));
        cut.wait_until_ready(&["p.0", "d.0"]).await;
        let (mut wanted, mut found) = (wanted, answers(&cut).await);
        if *case == UNEVEN {
            let tokens = |answer: &mut Value| *answer = answer["logprobs"]["tokens"].take();
            wanted.iter_mut().chain(&mut found).for_each(tokens);
        }
        assert_eq!(found, wanted, "{case}");
        let nodes = cut.wait_until_idle().await;
        let group = nodes.iter().find(|node| node["name"] == "d.0").expect("the group");
        assert_eq!(group["counters"]["prompt_tokens"], 0, "{case}: the group computed prompts");
        assert!(group["counters"]["kv_bytes"].as_u64() > Some(0), "{case}: nothing travelled");
    }
}

/// What a cluster says to prompts of several lengths, greedy and sampled.
async fn answers(parts: &Parts) -> Vec<Value> {
    let mut answers = Vec::new();
    for (len, sampling) in [
        (1, json!({ "temperature": 0 })),
        (17, json!({ "temperature": 0 })),
        (150, json!({ "temperature": 1.0, "seed": 3 })),
    ] {
        let prompt: Vec<u32> = (0..len).map(|i: u32| 4 + (i * i * 7 + len) % (VOCAB - 4)).collect();
        let mut body = sampling;
        body["prompt"] = json!(prompt);
        body["max_tokens"] = json!(16);
        body["ignore_eos"] = json!(true);
        body["logprobs"] = json!(5);
        answers.push(parts.complete(&body).await);
    }
    answers
}
