//! One directory of `tests/golden/`: a tiny checkpoint with what transformers computed from it.

use std::path::{Path, PathBuf};

use backend::{DType, DeviceOptions, SeqId};
use models::Checkpoint;
use safetensors::SafeTensors;
use serde_json::Value;

/// The sequence of a prompt.
pub const SEQ: SeqId = SeqId(1);

/// A device with small blocks, so that prompts take several.
pub fn options(dtype: DType) -> DeviceOptions {
    DeviceOptions { dtype, threads: 1, block_tokens: 16, ..DeviceOptions::default() }
}

pub struct Fixture {
    pub checkpoint: Checkpoint,
    pub prompts: Vec<Prompt>,
    reference: Vec<u8>,
}

/// Ids to feed, and the reference's own deviation in bf16.
pub struct Prompt {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    pub bf16_kl_median: f64,
}

/// The fixtures, at the workspace root.
pub fn root() -> PathBuf {
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("tests/golden"));
    above.filter(|dir| dir.join("README.md").exists()).last().unwrap()
}

impl Fixture {
    pub fn open(case: &str) -> Fixture {
        let dir = root().join(case);
        let golden: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let ids =
            |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let prompts = golden["cases"].as_array().unwrap().iter().map(|case| Prompt {
            prompt: ids(&case["prompt"]),
            greedy: ids(&case["greedy"]),
            bf16_kl_median: case["bf16"]["kl_median"].as_f64().unwrap(),
        });
        Fixture {
            checkpoint: Checkpoint::open(&dir).unwrap(),
            prompts: prompts.collect(),
            reference: std::fs::read(dir.join("golden.safetensors")).unwrap(),
        }
    }

    pub fn vocab(&self) -> usize {
        self.checkpoint.config().vocab_size
    }

    /// Values and shape of a reference tensor.
    pub fn reference(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.reference).unwrap();
        let tensor = file.tensor(name).unwrap();
        (floats(tensor.data()), tensor.shape().to_vec())
    }

    /// `[steps, vocabulary]` of prompt `i`.
    pub fn logits(&self, i: usize) -> Vec<f32> {
        self.reference(&format!("p{i}.logits")).0
    }
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}
