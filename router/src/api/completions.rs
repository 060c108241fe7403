//! `POST /v1/completions`: one or several prompts, as text or as ids, each continued `n` times.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::Gateway;
use super::body::read_body;
use super::completion_format::{CompletionFormat, Echo};
use super::error::ApiError;
use super::fields::{Fields, integer};
use super::form::{self, Form, read_form};
use super::head::Head;
use super::params::{Params, TOP_LOGPROBS_MAX};
use super::prompt_scores::ScoresWanted;
use super::reply;
use super::run::{Asker, Prompt, Reading, random, start};
use crate::text::Beginning;

/// Output tokens where a request does not say; OpenAI's value.
const MAX_TOKENS_DEFAULT: u32 = 16;

const UNSUPPORTED: [&str; 3] = ["prompt_embeds", "return_tokens_as_token_ids", "tools"];

/// A prompt as the client gave it.
#[derive(Debug, Clone, PartialEq)]
enum Source {
    Text(String),
    Ids(Vec<u32>),
}

#[derive(Debug)]
struct CompletionRequest {
    params: Params,
    prompts: Vec<Source>,
    echo: bool,
    add_special: bool,
    logprobs: Option<u32>,
    form: Option<Form>,
}

/// The handler.
pub async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let asker = Asker::of(&request);
    let body = read_body(request, &gateway.config.limits).await?;
    let arrived = Instant::now();
    let (request, prompts, grammar) = gateway
        .on_text_thread(move |gateway| {
            let request = parse(gateway, &body)?;
            let prompts = request.prompts.iter().map(|source| prompt(gateway, &request, source));
            let prompts = prompts.collect::<Result<Vec<_>, ApiError>>()?;
            let ends = !request.params.stop_ids.is_empty();
            let grammar = form::grammar(gateway, request.form.as_ref(), None, None, ends)?;
            Ok((request, prompts, grammar))
        })
        .await?;
    let params = &request.params;
    let head = Head::new("cmpl-", random()?, SystemTime::now(), Arc::clone(&gateway.model));
    let scores =
        ScoresWanted { echo: request.logprobs.filter(|_| request.echo), list: params.prompt_logprobs };
    let reading = Reading { grammar, scores, ..Reading::plain(Beginning::Continuation, request.logprobs) };
    let mut answer = start(&gateway, params, &prompts, &reading, &head, arrived, &asker)?;
    let echo =
        |prompt: &Prompt| Echo { text: prompt.echo.clone(), tokens: Arc::clone(&prompt.tokens), scores };
    let echo = prompts.iter().flat_map(|prompt| vec![echo(prompt); params.n]).collect();
    let pieces = Arc::clone(gateway.text.tokenizer.pieces());
    let format = CompletionFormat::new(head, pieces, params.usage, echo);
    if params.stream {
        answer.admitted().await?;
        Ok(reply::stream(answer, format))
    } else {
        reply::complete(answer, format).await
    }
}

fn parse(gateway: &Gateway, body: &[u8]) -> Result<CompletionRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    gateway.need_model(&mut fields)?;
    let mut params = Params::read(&mut fields, &gateway.rules(), &["max_tokens"], 0)?;
    params.best_of = best_of(&mut fields, &params, gateway.config.limits.sequences)?;
    let prompts = read_prompts(fields.take("prompt"), gateway.text.tokenizer.pieces().len())?;
    let limit = gateway.config.limits.sequences;
    if prompts.len() * params.best_of > limit {
        let expected = format!("at most {limit} choices of one request");
        let got = format!("{} prompts with {} each", prompts.len(), params.best_of);
        return Err(ApiError::wrong_value("prompt", expected, got));
    }
    let request = CompletionRequest {
        params,
        prompts,
        echo: fields.boolean("echo")?.unwrap_or(false),
        add_special: fields.boolean("add_special_tokens")?.unwrap_or(true),
        logprobs: fields.integer("logprobs", 0..=TOP_LOGPROBS_MAX)?.map(|top| top as u32),
        form: read_form(&mut fields)?,
    };
    fields.only("suffix", &json!(""), "is not supported")?;
    fields.refuse(&UNSUPPORTED, "is not supported")?;
    fields.finish()?;
    Ok(request)
}

/// Choices to make of each prompt, of which the likeliest are given.
fn best_of(fields: &mut Fields, params: &Params, most: usize) -> Result<usize, ApiError> {
    let Some(best_of) = fields.integer("best_of", 1..=most as i64)? else { return Ok(params.n) };
    let best_of = best_of as usize;
    if best_of < params.n {
        let expected = format!("at least n, which is {}", params.n);
        return Err(ApiError::wrong_value("best_of", expected, best_of));
    }
    if best_of > params.n && params.stream {
        let why = "cannot be streamed: which choices are the best is known at the end";
        return Err(ApiError::unsupported("best_of", why));
    }
    Ok(best_of)
}

/// A string, an array of strings, an array of ids, or an array of arrays of ids.
fn read_prompts(value: Option<Value>, vocab: usize) -> Result<Vec<Source>, ApiError> {
    let expected = "a string, an array of strings, an array of token ids or an array of such arrays";
    let items = match value {
        None => return Err(ApiError::missing("prompt")),
        Some(Value::String(text)) => return Ok(vec![Source::Text(text)]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(ApiError::wrong_type("prompt", expected, &other)),
    };
    match items.first() {
        None => Err(ApiError::wrong_value("prompt", "at least one prompt", "an empty array")),
        Some(Value::Number(_)) => Ok(vec![Source::Ids(ids("prompt", &items, vocab)?)]),
        Some(_) => items
            .into_iter()
            .enumerate()
            .map(|(i, item)| match item {
                Value::String(text) => Ok(Source::Text(text)),
                Value::Array(items) => Ok(Source::Ids(ids(&format!("prompt[{i}]"), &items, vocab)?)),
                other => Err(ApiError::wrong_type(
                    &format!("prompt[{i}]"),
                    "a string or an array of token ids",
                    &other,
                )),
            })
            .collect(),
    }
}

/// Token ids below `vocab`; also for `/detokenize`.
pub fn ids(name: &str, items: &[Value], vocab: usize) -> Result<Vec<u32>, ApiError> {
    let read = |(i, item)| integer(&format!("{name}[{i}]"), item, 0..=vocab as i64 - 1).map(|id| id as u32);
    items.iter().enumerate().map(read).collect()
}

fn prompt(gateway: &Gateway, request: &CompletionRequest, source: &Source) -> Result<Prompt, ApiError> {
    let tokens = match source {
        Source::Text(text) => gateway.encode(text, request.add_special, "prompt")?,
        Source::Ids(ids) => ids.clone(),
    };
    if tokens.is_empty() {
        return Err(ApiError::wrong_value("prompt", "at least one token", "an empty prompt"));
    }
    let context = gateway.config.context_tokens;
    let max_tokens =
        request.params.output_tokens(tokens.len(), context, Some(MAX_TOKENS_DEFAULT), "prompt")?;
    let echo = request.echo.then(|| match source {
        Source::Text(text) => text.as_str().into(),
        Source::Ids(ids) => gateway.text.tokenizer.decode(ids, request.params.skip_special).into(),
    });
    Ok(Prompt { tokens: tokens.into(), max_tokens, echo, prediction: Arc::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_come_in_four_forms() {
        let text = |text: &str| Source::Text(text.into());
        let cases = [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Source::Ids(vec![1, 2])]),
            (json!([[1], [2, 3]]), vec![Source::Ids(vec![1]), Source::Ids(vec![2, 3])]),
        ];
        for (json, prompts) in cases {
            assert_eq!(read_prompts(Some(json), 4), Ok(prompts));
        }
        for (json, param) in [
            (json!(7), "prompt"),
            (json!([]), "prompt"),
            (json!([1, 4]), "prompt[1]"),
            (json!([1, "a"]), "prompt[1]"),
            (json!(["a", 1]), "prompt[1]"),
            (json!([[1, -1]]), "prompt[0][1]"),
        ] {
            assert_eq!(
                read_prompts(Some(json.clone()), 4).unwrap_err().param.as_deref(),
                Some(param),
                "{json}"
            );
        }
    }
}
