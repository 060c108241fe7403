//! The families, one file each: which fields of `config.json` they have and what their layers are made of. The layers
//! themselves are written once, in `decoder`; the tensor names in `tensors`.

mod deepseek_v3;
mod glm4_moe;
mod gpt_oss;
mod kimi_k2;
mod llama;
mod minimax_m2;
mod mistral;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use crate::fields::Fields;
use crate::{Config, ModelError};

/// Reads the fields of one family.
type Read = fn(&mut Fields) -> Result<Config, ModelError>;

/// By `model_type`.
const FAMILIES: &[(&str, Read)] = &[
    ("deepseek_v3", deepseek_v3::read),
    ("glm4_moe", glm4_moe::read),
    ("gpt_oss", gpt_oss::read),
    ("kimi_k2", kimi_k2::read),
    ("kimi_k25", kimi_k2::read_text),
    ("llama", llama::read),
    ("minimax_m2", minimax_m2::read),
    ("mistral", mistral::read),
    ("qwen2", qwen2::read),
    ("qwen3", qwen3::read),
    ("qwen3_moe", qwen3_moe::read),
];

/// Reads the configuration of the family `model_type`.
pub(crate) fn read(model_type: &str, fields: &mut Fields) -> Result<Config, ModelError> {
    match FAMILIES.iter().find(|(name, _)| *name == model_type) {
        Some((_, read)) => read(fields),
        None => Err(ModelError::Architecture {
            path: fields.path().into(),
            model_type: model_type.into(),
            supported: FAMILIES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
        }),
    }
}
