//! `POST /v1/chat/completions`: parse, render, tokenize, run, reply.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::extract::{Request, State};
use axum::response::Response;
use proto::PREDICTION_TOKENS_MAX;
use serde_json::{Map, Value, json};

use super::Gateway;
use super::body::read_body;
use super::chat_format::ChatFormat;
use super::error::ApiError;
use super::fields::Fields;
use super::form::{self, CallRule, Form, read_form};
use super::head::Head;
use super::messages::{ToolChoice, broken_arguments, content, read_messages, read_tools};
use super::params::{Params, TIER, TOP_LOGPROBS_MAX};
use super::prompt_scores::ScoresWanted;
use super::reply;
use super::run::{Asker, Prompt, Reading, random, start};
use crate::text::answer::{self, Opening, Types};
use crate::text::{Beginning, Conversation, TemplateError, gpt_oss, template};

/// What OpenAI or vLLM serve under these names, and this server does not.
const UNSUPPORTED: [&str; 8] = [
    "audio",
    "documents",
    "functions",
    "mm_processor_kwargs",
    "reasoning",
    "return_tokens_as_token_ids",
    "web_search_options",
    "suffix",
];

/// A checked request.
#[derive(Debug)]
pub struct ChatRequest {
    params: Params,
    conversation: Conversation,
    choice: ToolChoice,
    parallel: bool,
    /// What answers must look like.
    pub form: Option<Form>,
    hide_reasoning: bool,
    logprobs: Option<u32>,
    /// Text that the answer is expected to have.
    prediction: Option<String>,
}

/// The handler.
pub async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let asker = Asker::of(&request);
    let body = read_body(request, &gateway.config.limits).await?;
    let arrived = Instant::now();
    let (params, prompt, reading) = gateway
        .on_text_thread(move |gateway| prepare(gateway, parse(gateway, Fields::parse(&body)?)?))
        .await?;
    let params = &params;
    let mut head = Head::new("chatcmpl-", random()?, SystemTime::now(), Arc::clone(&gateway.model));
    head.service_tier = params.names_tier.then_some(TIER);
    let scored = reading.scores.list.map(|top| (Arc::clone(&prompt.tokens), top));
    let mut answer = start(&gateway, params, &[prompt], &reading, &head, arrived, &asker)?;
    let pieces = Arc::clone(gateway.text.tokenizer.pieces());
    let format = ChatFormat::new(head, pieces, params.usage, scored);
    if params.stream {
        answer.admitted().await?;
        Ok(reply::stream(answer, format))
    } else {
        reply::complete(answer, format).await
    }
}

/// The prompt of a request, and how its answers are read. Runs on a text thread.
pub fn prepare(gateway: &Gateway, request: ChatRequest) -> Result<(Params, Prompt, Reading), ApiError> {
    let mut conversation = request.conversation;
    let definitions = conversation.tools.clone();
    let tools = gateway.tool_family.filter(|_| !definitions.is_empty());
    let tools = tools.map(|family| (family, Types::new(&definitions)));
    // What holds us to the schema is not for the model's eyes.
    let functions = conversation.tools.iter_mut().filter_map(|tool| tool["function"].as_object_mut());
    functions.for_each(|function| _ = function.shift_remove("strict"));
    let text = render(gateway, conversation)?;
    let tokens = gateway.encode(&text, false, "messages")?;
    let context = gateway.config.context_tokens;
    let default = gateway.text.defaults.max_new_tokens;
    let max_tokens = request.params.output_tokens(tokens.len(), context, default, "messages")?;
    let reasons = gateway.reasons || gateway.has_channels();
    let opening = reasons.then(|| Opening::of_prompt(&text, gateway.family));
    let calls = tools.is_some().then(|| CallRule {
        tools: definitions.iter().collect(),
        choice: &request.choice,
        parallel: request.parallel,
    });
    let ends = !request.params.stop_ids.is_empty();
    let grammar = form::grammar(gateway, request.form.as_ref(), calls, opening, ends)?;
    let reads_marks = tools.is_some() || gateway.has_channels();
    let reading = Reading {
        grammar,
        beginning: Beginning::Text,
        marks: if reads_marks { Arc::clone(&gateway.marks) } else { Arc::default() },
        answer: answer::Reading { tools, reasoning: opening, family: gateway.family },
        single_call: !request.parallel,
        hide_reasoning: request.hide_reasoning,
        logprobs: request.logprobs,
        scores: ScoresWanted { echo: None, list: request.params.prompt_logprobs },
    };
    let prediction = predicted(gateway, request.prediction.as_deref().unwrap_or_default())?;
    let prompt = Prompt { tokens: tokens.into(), max_tokens, echo: None, prediction: prediction.into() };
    Ok((request.params, prompt, reading))
}

/// Ids of what an answer is expected to be.
fn predicted(gateway: &Gateway, text: &str) -> Result<Vec<u32>, ApiError> {
    let most = PREDICTION_TOKENS_MAX.min(gateway.config.context_tokens);
    let too_long = |tokens: usize| {
        let (expected, got) = (format!("at most {most} tokens"), format!("{tokens} or more"));
        Err(ApiError::wrong_value("prediction", expected, got))
    };
    // Longer than the longest token for every place: known to be too long without tokenizing it.
    let least = text.len().div_ceil(gateway.text.tokenizer.pieces().longest());
    if least > most {
        return too_long(least);
    }
    let ids = gateway.encode_any(text, false)?;
    if ids.len() > most { too_long(ids.len()) } else { Ok(ids) }
}

/// Checks a request; also for the interfaces that are written over as chats.
pub fn parse(gateway: &Gateway, mut fields: Fields) -> Result<ChatRequest, ApiError> {
    gateway.need_model(&mut fields)?;
    let params = Params::read(&mut fields, &gateway.rules(), &["max_completion_tokens", "max_tokens"], 1)?;
    let (conversation, choice, parallel) = read_conversation(gateway, &mut fields)?;
    let form = read_form(&mut fields)?;
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = "The parameter 'top_logprobs' is allowed only together with 'logprobs': true.";
        return Err(ApiError::bad("top_logprobs", "invalid_value", message));
    }
    let prediction = read_prediction(&mut fields)?;
    let hide_reasoning = !fields.boolean("include_reasoning")?.unwrap_or(true);
    fields.only("best_of", &json!(params.n), "is not supported here: it must equal n")?;
    fields.only("function_call", &json!("auto"), "is not supported: use 'tool_choice'")?;
    fields.only("verbosity", &json!("medium"), "is not supported")?;
    fields.only("echo", &json!(false), "is not supported here")?;
    fields.only("modalities", &json!(["text"]), "is not supported: this model writes text only")?;
    fields.refuse(&UNSUPPORTED, "is not supported")?;
    fields.finish()?;
    let logprobs = logprobs.then(|| top.unwrap_or(0) as u32);
    Ok(ChatRequest { params, conversation, choice, parallel, form, hide_reasoning, logprobs, prediction })
}

/// `prediction`, such as `{"type": "content", "content": "..."}`.
fn read_prediction(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(mut prediction) = fields.object("prediction")? else { return Ok(None) };
    if prediction.word("type", &["content"])?.is_none() {
        return Err(ApiError::missing("prediction.type"));
    }
    let text = content("prediction.content", prediction.take("content"))?;
    prediction.finish()?;
    text.ok_or_else(|| ApiError::missing("prediction.content")).map(Some)
}

/// Reads messages, tools and what else a template sees; also for `/tokenize`. With whether calls must come, and whether
/// they may be parallel.
pub fn read_conversation(
    gateway: &Gateway,
    fields: &mut Fields,
) -> Result<(Conversation, ToolChoice, bool), ApiError> {
    let messages = read_messages(fields, gateway.knows_developer)?;
    let tools = read_tools(fields)?;
    if !tools.definitions.is_empty() && gateway.tool_family.is_none() {
        let why =
            "is not supported with this model: its chat template has no form of calls that this server reads";
        return Err(ApiError::unsupported("tools", why));
    }
    fields.refuse(&["chat_template"], "is not allowed: only the model's own template is used")?;
    let continues = fields.boolean("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    let may_go_on = |last: &Value| last["role"] == "assistant" && last.get("tool_calls").is_none();
    if continues && (add_generation_prompt == Some(true) || !messages.last().is_some_and(may_go_on)) {
        let expected = "false, unless the last message is the assistant's, without calls, and 'add_generation_prompt' is not";
        return Err(ApiError::wrong_value("continue_final_message", expected, "true"));
    }
    let mut variables = template_variables(fields)?;
    reasoning_effort(gateway, fields, &mut variables)?;
    let conversation = Conversation {
        messages,
        tools: tools.definitions,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continues),
        continues,
        variables,
    };
    Ok((conversation, tools.choice, tools.parallel))
}

/// `chat_template_kwargs`, such as `{"enable_thinking": false}`.
fn template_variables(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let Some(mut variables) = fields.object("chat_template_kwargs")? else { return Ok(Map::new()) };
    variables.refuse(&template::RESERVED, "cannot be set here")?;
    Ok(variables.rest())
}

/// Templates know the effort by its name, or only whether to think at all.
fn reasoning_effort(
    gateway: &Gateway,
    fields: &mut Fields,
    variables: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    const WORDS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];
    let Some(effort) = fields.word("reasoning_effort", &WORDS)? else { return Ok(()) };
    let switches = ["enable_thinking", "thinking"];
    // gpt-oss knows three.
    let effort = match effort {
        "none" if gateway.has_channels() => {
            let why = "of 'none' is not supported: this model always reasons";
            return Err(ApiError::unsupported("reasoning_effort", why));
        }
        "minimal" if gateway.has_channels() => "low",
        "xhigh" if gateway.has_channels() => "high",
        effort => effort,
    };
    if gateway.text.template_has("reasoning_effort") {
        variables.entry("reasoning_effort").or_insert(effort.into());
    } else if let Some(switch) = switches.into_iter().find(|switch| gateway.text.template_has(switch)) {
        variables.entry(switch).or_insert((effort != "none").into());
    } else if effort != "none" || gateway.reasons {
        // A model that does not think gives what "none" asks for.
        return Err(ApiError::unsupported("reasoning_effort", "has no effect with this model"));
    }
    Ok(())
}

/// The text of a conversation. Runs on a text thread.
pub fn render(gateway: &Gateway, mut conversation: Conversation) -> Result<String, ApiError> {
    if !gateway.text.templates.exist() {
        let message = "This model has no chat template; use /v1/completions.";
        return Err(ApiError::bad("messages", "no_chat_template", message));
    }
    // A template repeats a conversation at most: tools are indented, messages wrapped.
    let bytes_max = 4 * gateway.config.limits.body_bytes;
    let broken = broken_arguments(&conversation.messages);
    if gateway.has_channels() {
        gpt_oss::arrange(&mut conversation).map_err(|at| {
            let why = "is not supported: this model has instructions at the beginning of a conversation only";
            ApiError::unsupported(format!("messages[{at}]"), why)
        })?;
    }
    match (gateway.text.templates.render(conversation, SystemTime::now(), bytes_max), broken) {
        (Err(TemplateError::Failed(_)), Some(path)) => {
            let expected = "a JSON object, as this model's chat template wants it";
            Err(ApiError::wrong_value(&path, expected, "a string that is none"))
        }
        (rendered, _) => Ok(rendered?),
    }
}
