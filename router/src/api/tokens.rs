//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use super::Gateway;
use super::body::read_body;
use super::chat::{read_conversation, render};
use super::completions::ids;
use super::error::ApiError;
use super::fields::Fields;

/// The ids of a text or of a chat.
pub async fn tokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body = read_body(request, &gateway.config.limits).await?;
    let answer = gateway.on_text_thread(move |gateway| {
        let mut fields = Fields::parse(&body)?;
        gateway.check_model(&mut fields)?;
        let with_names = fields.boolean("return_token_strs")?.unwrap_or(false);
        let add_special = fields.boolean("add_special_tokens")?;
        let tokens = match fields.string("prompt")? {
            Some(text) => {
                fields.finish()?;
                gateway.encode_any(&text, add_special.unwrap_or(true))?
            }
            None if fields.peek("messages").is_none() => return Err(ApiError::missing("prompt")),
            None => {
                let (conversation, ..) = read_conversation(gateway, &mut fields)?;
                fields.finish()?;
                gateway.encode(&render(gateway, conversation)?, false, "messages")?
            }
        };
        let names = with_names.then(|| -> Vec<_> {
            tokens.iter().map(|&id| gateway.text.tokenizer.name(id).unwrap_or_default()).collect()
        });
        let context = gateway.config.context_tokens;
        Ok(Json(
            json!({"count": tokens.len(), "max_model_len": context, "tokens": tokens, "token_strs": names}),
        ))
    });
    answer.await
}

/// The text of ids, markup included.
pub async fn detokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body = read_body(request, &gateway.config.limits).await?;
    let answer = gateway.on_text_thread(move |gateway| {
        let mut fields = Fields::parse(&body)?;
        gateway.check_model(&mut fields)?;
        let items = fields.array("tokens")?.ok_or_else(|| ApiError::missing("tokens"))?;
        fields.finish()?;
        let tokenizer = &gateway.text.tokenizer;
        let ids = ids("tokens", &items, tokenizer.pieces().len())?;
        Ok(Json(json!({"prompt": tokenizer.decode(&ids, false)})))
    });
    answer.await
}
