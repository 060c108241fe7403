//! Kimi K2, Instruct and Thinking: DeepSeek V3 with one group of 384 experts and fewer heads.
//! Source: <https://huggingface.co/moonshotai/Kimi-K2-Instruct>

use super::deepseek_v3;
use crate::fields::Fields;
use crate::{Config, ModelError, Quantisation};

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    deepseek_v3::family(fields, "kimi_k2")
}

/// Reads the configuration of the text model of Kimi K2.5 and later, which see pictures besides; those are not supported.
/// Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/kimi_k25>
pub(super) fn read_text(fields: &mut Fields) -> Result<Config, ModelError> {
    let Some(mut text) = fields.opt_model("text_config")? else {
        return Err(fields.error("text_config", "missing"));
    };
    text.one_of("model_type", &["kimi_k2", "deepseek_v3"])?;
    let config = deepseek_v3::family(&mut text, "kimi_k2")?;
    text.finish()?;
    let outer = Quantisation::read(fields)?;
    // Of the pictures, and of the whole; the text model has its own word on tied tables.
    fields.harmless(&["vision_config", "projection_hidden_size", "projection_layer_norm_eps"]);
    fields.harmless(&["image_token_id", "video_token_id", "media_placeholder_token_id", "ignore_index"]);
    fields.harmless(&["vision_start_token_id", "vision_end_token_id", "video_placeholder"]);
    fields.harmless(&["use_unified_vision_chunk", "tie_word_embeddings"]);
    let quantisation = config.quantisation.clone().or(outer);
    Ok(Config { quantisation, names_front: "language_model.", ..config })
}
