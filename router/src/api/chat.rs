//! `POST /v1/chat/completions`: parse, render, tokenize, run, reply.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::Gateway;
use super::body::read_body;
use super::chat_format::ChatFormat;
use super::choice::ToolMode;
use super::error::ApiError;
use super::fields::Fields;
use super::head::Head;
use super::messages::{read_messages, read_tools};
use super::params::{Params, TOP_LOGPROBS_MAX};
use super::reply;
use super::run::{Prompt, Reading, random, start};
use crate::text::{Beginning, Conversation, template};

/// What OpenAI or vLLM serve under these names, and this server does not.
const UNSUPPORTED: [&str; 14] = [
    "audio",
    "best_of",
    "documents",
    "function_call",
    "functions",
    "include_reasoning",
    "mm_processor_kwargs",
    "prediction",
    "reasoning",
    "reasoning_effort",
    "return_tokens_as_token_ids",
    "verbosity",
    "web_search_options",
    "suffix",
];

/// A checked request.
#[derive(Debug)]
struct ChatRequest {
    params: Params,
    conversation: Conversation,
    tools: ToolMode,
    logprobs: Option<u32>,
}

/// The handler.
pub async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let body = read_body(request, &gateway.config.limits).await?;
    let arrived = Instant::now();
    let (request, prompt) = gateway
        .on_text_thread(move |gateway| {
            let mut request = parse(gateway, &body)?;
            let tokens = render(gateway, std::mem::take(&mut request.conversation))?;
            let context = gateway.config.context_tokens;
            let default = gateway.text.defaults.max_new_tokens;
            let max_tokens = request.params.output_tokens(tokens.len(), context, default, "messages")?;
            Ok((request, Prompt { tokens: tokens.into(), max_tokens, echo: None }))
        })
        .await?;
    let params = &request.params;
    let head = Head::new("chatcmpl", random()?, SystemTime::now(), Arc::clone(&gateway.model));
    let reading = Reading { beginning: Beginning::Text, tools: request.tools, logprobs: request.logprobs };
    let mut answer = start(&gateway, params, &[prompt], reading, &head, arrived)?;
    let pieces = Arc::clone(gateway.text.tokenizer.pieces());
    let format = ChatFormat::new(head, pieces, params.include_usage);
    if params.stream {
        answer.admitted().await?;
        Ok(reply::stream(answer, format, params.include_usage))
    } else {
        reply::complete(answer, format).await
    }
}

fn parse(gateway: &Gateway, body: &[u8]) -> Result<ChatRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    gateway.check_model(&mut fields)?;
    let params = Params::read(&mut fields, &gateway.rules(), &["max_completion_tokens", "max_tokens"])?;
    let (conversation, parallel) = read_conversation(gateway, &mut fields)?;
    let tools = match (conversation.tools.is_empty(), parallel) {
        (true, _) => ToolMode::Off,
        (false, true) => ToolMode::Parallel,
        (false, false) => ToolMode::Single,
    };
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = "The parameter 'top_logprobs' is allowed only together with 'logprobs': true.";
        return Err(ApiError::bad("top_logprobs", "invalid_value", message));
    }
    fields.only("echo", &json!(false), "is not supported in chats")?;
    fields.only("modalities", &json!(["text"]), "is not supported: this model writes text only")?;
    fields.refuse(&UNSUPPORTED, "is not supported")?;
    fields.finish()?;
    Ok(ChatRequest { params, conversation, tools, logprobs: logprobs.then(|| top.unwrap_or(0) as u32) })
}

/// Reads messages, tools and what else a template sees; also for `/tokenize`. With whether calls may be parallel.
pub fn read_conversation(gateway: &Gateway, fields: &mut Fields) -> Result<(Conversation, bool), ApiError> {
    let messages = read_messages(fields, gateway.knows_developer)?;
    let tools = read_tools(fields)?;
    if !tools.definitions.is_empty() && !gateway.reads_tool_calls {
        let why =
            "is not supported with this model: its chat template has no form of calls that this server reads";
        return Err(ApiError::unsupported("tools", why));
    }
    fields.refuse(&["chat_template"], "is not allowed: only the model's own template is used")?;
    fields.only("continue_final_message", &json!(false), "is not supported")?;
    let conversation = Conversation {
        messages,
        tools: tools.definitions,
        add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
        variables: template_variables(fields)?,
    };
    Ok((conversation, tools.parallel))
}

/// `chat_template_kwargs`, such as `{"enable_thinking": false}`.
fn template_variables(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let Some(mut variables) = fields.object("chat_template_kwargs")? else { return Ok(Map::new()) };
    variables.refuse(&template::RESERVED, "cannot be set here")?;
    Ok(variables.rest())
}

/// The ids of a conversation. Runs on a text thread.
pub fn render(gateway: &Gateway, conversation: Conversation) -> Result<Vec<u32>, ApiError> {
    if !gateway.text.templates.exist() {
        let message = "This model has no chat template; use /v1/completions.";
        return Err(ApiError::bad("messages", "no_chat_template", message));
    }
    // A template repeats a conversation at most: tools are indented, messages wrapped.
    let bytes_max = 4 * gateway.config.limits.body_bytes;
    let text = gateway.text.templates.render(conversation, SystemTime::now(), bytes_max)?;
    gateway.encode(&text, false, "messages")
}
