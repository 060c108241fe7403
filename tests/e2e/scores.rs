//! Promise: the log probabilities of a prompt's tokens are those that Hugging Face's logits give, whoever computes the
//! prompt, in whatever chunks, and whatever caches hold.

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::parts::Parts;

const CASE: &str = "qwen3-base-s1";

/// A prompt of a golden case with the ids that were fed after it, and the reference's logits before each of those.
struct Golden {
    prompt: Vec<u32>,
    fed: Vec<u32>,
    rows: Vec<Vec<f32>>,
}

impl Golden {
    fn all() -> Vec<Golden> {
        let folder = format!("{}/tests/golden/{CASE}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(format!("{folder}/golden.json")).expect("a golden case");
        let cases: Value = serde_json::from_str(&text).expect("JSON");
        let bytes = std::fs::read(format!("{folder}/golden.safetensors")).expect("its logits");
        let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
        let cases = cases["cases"].as_array().expect("cases").iter().enumerate();
        let golden = |(number, case): (usize, &Value)| {
            let ids = |name: &str| -> Vec<u32> { serde_json::from_value(case[name].clone()).expect("ids") };
            let logits = tensors.tensor(&format!("p{number}.logits")).expect("logits");
            let values: Vec<f32> =
                logits.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let rows = values.chunks_exact(logits.shape()[1]).map(<[f32]>::to_vec).collect();
            Golden { prompt: ids("prompt"), fed: ids("greedy"), rows }
        };
        cases.map(golden).collect()
    }

    fn tokens(&self) -> Vec<u32> {
        [&self.prompt[..], &self.fed].concat()
    }

    /// Log probability of `id` in row `row` of the reference.
    fn logprob(&self, row: usize, id: u32) -> f64 {
        let logits = &self.rows[row];
        let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        f64::from(logits[id as usize]) - max - sum.ln()
    }

    /// The ids fed after the prompt are scored as the reference scores them.
    fn check(&self, listed: &Value) {
        let listed = listed.as_array().expect("a list");
        assert_eq!(listed.len(), self.prompt.len() + self.fed.len());
        assert!(listed[0].is_null() && listed[1..].iter().all(Value::is_object), "{listed:?}");
        for (row, &id) in self.fed.iter().enumerate().filter(|(row, _)| *row < self.rows.len()) {
            let entries = listed[self.prompt.len() + row].as_object().expect("by id");
            let own = &entries[&id.to_string()];
            for (id, entry) in entries {
                let (got, wanted) = (
                    entry["logprob"].as_f64().expect("a number"),
                    self.logprob(row, id.parse().expect("an id")),
                );
                assert!((got - wanted).abs() < 1e-3, "row {row}, id {id}: {got}, not {wanted}");
            }
            let better = self.rows[row].iter().filter(|x| **x > self.rows[row][id as usize]).count();
            assert_eq!(own["rank"], 1 + better, "row {row}, id {id}");
            assert!((3..=4).contains(&entries.len()), "{entries:?}");
        }
    }
}

#[tokio::test]
async fn prompts_are_scored_as_the_reference_scores_them() {
    let model = format!("--model={}/tests/golden/{CASE}", env!("CARGO_MANIFEST_DIR"));
    let goldens = Golden::all();
    let mut seen: Vec<Vec<Value>> = Vec::new();
    for policy in ["always", "never"] {
        let mut parts = Parts::router(&[&format!("--disaggregation={policy}"), &model, "--context=1024"]);
        parts.prefill("p", 1, &[&model, "--dtype=f32", "--chunk-tokens=37"]);
        parts.decode("d", 2, &[&model, "--dtype=f32", "--block-tokens=16"]);
        parts.wait_until_ready(&["p.0", "d.0"]).await;
        let mut said = Vec::new();
        for golden in &goldens {
            // One token is the prefill node's alone; with more the cache travels, and the second time it is there.
            for max_tokens in [0, 1, 3, 3] {
                let body = json!({
                    "prompt": golden.tokens(), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
                    "echo": true, "logprobs": 2, "prompt_logprobs": 3,
                });
                let choice = parts.complete(&body).await;
                golden.check(&choice["prompt_logprobs"]);
                let listed = choice["prompt_logprobs"].as_array().expect("a list");
                let legacy = choice["logprobs"]["token_logprobs"].as_array().expect("a list");
                assert_eq!(legacy.len(), listed.len() + max_tokens);
                for ((entry, logprob), id) in listed.iter().zip(legacy).zip(golden.tokens()) {
                    assert_eq!(&entry[id.to_string()]["logprob"], logprob);
                }
                said.push(choice["prompt_logprobs"].clone());
            }
        }
        parts.wait_until_idle().await;
        for same in said.chunks(4) {
            assert!(same.iter().all(|one| *one == same[0]), "{policy}: the cache changed something");
        }
        seen.push(said);
    }
    assert!(seen[0] == seen[1], "another node says otherwise");
}
