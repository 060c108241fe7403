//! Kimi K2, Instruct and Thinking: DeepSeek V3 with one group of 384 experts and fewer heads.
//! Source: <https://huggingface.co/moonshotai/Kimi-K2-Instruct>

use super::deepseek_v3;
use crate::fields::Fields;
use crate::{Config, ModelError};

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    deepseek_v3::family(fields, "kimi_k2")
}
