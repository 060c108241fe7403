//! What a client demands of the form of an answer: `response_format`, vLLM's `guided_*` and `structured_outputs`,
//! llama.cpp's `grammar` and `json_schema`, and calls of tools that must come or must fit. All become one grammar, which is
//! compiled here, before anything is reserved, and again by whoever samples. Called by `chat` and `completions`.

use std::sync::{Arc, OnceLock};

use grammar::{Compiler, GRAMMAR_BYTES_MAX, GrammarError, gbnf, lark};
use serde_json::{Value, json};
use vocab::Vocab;

use super::Gateway;
use super::error::{ApiError, type_name};
use super::fields::Fields;
use super::messages::ToolChoice;
use crate::text::answer::{Frame, Opening, forced};
use crate::text::pieces::Piece;

/// Levels of a schema.
const SCHEMA_DEPTH_MAX: usize = 64;

/// Entries of a choice.
const CHOICES_MAX: usize = 1024;

/// A form, from one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    /// Where it came from, for errors.
    param: String,
    /// The right side of a rule.
    body: String,
}

/// What calls an answer may or must have.
#[derive(Debug, Clone)]
pub struct CallRule<'a> {
    /// The tools that may be called.
    pub tools: Vec<&'a Value>,
    /// Which of them, and whether.
    pub choice: &'a ToolChoice,
    /// More than one call.
    pub parallel: bool,
}

/// Reads what a request says of the form of its answers; at most one of all the parameters may.
pub fn read_form(fields: &mut Fields) -> Result<Option<Form>, ApiError> {
    let mut forms = Vec::new();
    forms.extend(response_format(fields)?);
    for (name, kind) in [
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("grammar", "grammar"),
        ("json_schema", "json"),
    ] {
        forms.extend(of_kind(fields, name, kind)?);
    }
    if let Some(mut outputs) = fields.object("structured_outputs")? {
        for kind in ["json", "regex", "choice", "grammar"] {
            forms.extend(of_kind(&mut outputs, kind, kind)?);
        }
        if outputs.boolean("json_object")? == Some(true) {
            let body = lark::json(&json!({"type": "object"}));
            forms.push(Form { param: outputs.name("json_object"), body });
        }
        for name in ["disable_any_whitespace", "disable_additional_properties", "disable_fallback"] {
            outputs.only(name, &json!(false), "is not supported")?;
        }
        outputs.refuse(&["whitespace_pattern", "structural_tag"], "is not supported")?;
        outputs.finish()?;
    }
    let mut forms = forms.into_iter();
    match (forms.next(), forms.next()) {
        (_, Some(second)) => Err(ApiError::unsupported(
            second.param,
            "comes beside another form of the answer: one may be given",
        )),
        (form, _) => Ok(form),
    }
}

/// OpenAI's.
fn response_format(fields: &mut Fields) -> Result<Option<Form>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let kinds = ["text", "json_object", "json_schema"];
    let kind = format.word("type", &kinds)?.ok_or_else(|| ApiError::missing("response_format.type"))?;
    let form = match kind {
        "text" => None,
        "json_object" => {
            // llama.cpp takes a schema here.
            let schema = format.take("schema").unwrap_or_else(|| json!({"type": "object"}));
            Some(schema_form("response_format".into(), &schema, true)?)
        }
        _ => {
            let path = "response_format.json_schema";
            let mut inner = format.object("json_schema")?.ok_or_else(|| ApiError::missing(path))?;
            inner.string("name")?.ok_or_else(|| ApiError::missing(&format!("{path}.name")))?;
            inner.string("description")?;
            let strict = inner.boolean("strict")?.unwrap_or(false);
            let schema = inner.take("schema").unwrap_or_else(|| json!({"type": "object"}));
            inner.finish()?;
            Some(schema_form(format!("{path}.schema"), &schema, strict)?)
        }
    };
    format.finish()?;
    Ok(form)
}

fn of_kind(fields: &mut Fields, name: &str, kind: &str) -> Result<Option<Form>, ApiError> {
    let param = fields.name(name);
    let Some(value) = fields.take(name) else { return Ok(None) };
    let text = |value: &Value| match value {
        Value::String(text) if !text.is_empty() && text.len() <= GRAMMAR_BYTES_MAX => Ok(text.clone()),
        Value::String(text) => {
            let expected = format!("1 to {GRAMMAR_BYTES_MAX} bytes");
            Err(ApiError::wrong_value(&param, expected, format!("{} bytes", text.len())))
        }
        other => Err(ApiError::wrong_type(&param, "a string", other)),
    };
    let body = match kind {
        "json" => {
            // A schema, or the text of one.
            let schema = match &value {
                Value::String(text) => serde_json::from_str(text).map_err(|error| {
                    ApiError::wrong_value(&param, "a JSON schema", format!("no JSON ({error})"))
                })?,
                other => other.clone(),
            };
            return Ok(Some(schema_form(param, &schema, true)?));
        }
        "regex" => lark::regex(&text(&value)?),
        "grammar" => {
            let text = text(&value)?;
            let wrong = |error: GrammarError| ApiError::wrong_value(&param, "a grammar", error);
            lark::nested(&if gbnf::is(&text) { gbnf::to_lark(&text).map_err(wrong)? } else { text })
        }
        _ => lark::choice(&choices(&param, &value)?),
    };
    Ok(Some(Form { param, body }))
}

fn choices(param: &str, value: &Value) -> Result<Vec<String>, ApiError> {
    let Value::Array(items) = value else {
        return Err(ApiError::wrong_type(param, "an array of strings", value));
    };
    if items.is_empty() || items.len() > CHOICES_MAX {
        let expected = format!("1 to {CHOICES_MAX} strings");
        return Err(ApiError::wrong_value(param, expected, items.len()));
    }
    let text = |(i, item): (usize, &Value)| match item.as_str() {
        Some(text) if !text.is_empty() => Ok(text.to_string()),
        Some(_) => Err(ApiError::wrong_value(&format!("{param}[{i}]"), "a text", "an empty string")),
        None => Err(ApiError::wrong_type(&format!("{param}[{i}]"), "a string", item)),
    };
    items.iter().enumerate().map(text).collect()
}

fn schema_form(param: String, schema: &Value, strict: bool) -> Result<Form, ApiError> {
    if !schema.is_object() {
        return Err(ApiError::wrong_value(&param, "a JSON schema, which is an object", type_name(schema)));
    }
    check_depth(&param, schema)?;
    let body = if strict { lark::json(schema) } else { lark::json_leniently(schema) };
    Ok(Form { param, body })
}

fn check_depth(param: &str, schema: &Value) -> Result<(), ApiError> {
    if depth(schema) > SCHEMA_DEPTH_MAX {
        let expected = format!("a schema of at most {SCHEMA_DEPTH_MAX} levels");
        return Err(ApiError::wrong_value(param, expected, "a deeper one"));
    }
    Ok(())
}

/// The parser of JSON has bounded it already: recursion is safe.
fn depth(value: &Value) -> usize {
    let inner = match value {
        Value::Array(items) => items.iter().map(depth).max(),
        Value::Object(map) => map.values().map(depth).max(),
        _ => return 0,
    };
    1 + inner.unwrap_or(0)
}

/// The compiler of the model's vocabulary, made for the first request that needs it.
#[derive(Debug, Default)]
pub struct Compilers(OnceLock<Result<Compiler, GrammarError>>);

impl Compilers {
    fn get(&self, gateway: &Gateway) -> Result<&Compiler, ApiError> {
        let make = || {
            let vocab = Vocab::read(&gateway.config.model_dir);
            Compiler::new(Arc::new(vocab.map_err(|error| GrammarError::Vocabulary(error.to_string()))?))
        };
        self.0.get_or_init(make).as_ref().map_err(|error| {
            tracing::error!("no grammars: {error}");
            ApiError::internal("the server cannot use this model's vocabulary for grammars")
        })
    }
}

/// The grammar of an answer, compiled once to see that it can be; `None`: any text will do. `opening`: of reasoning, which
/// stays free. Runs on a text thread.
pub fn grammar(
    gateway: &Gateway,
    form: Option<&Form>,
    calls: Option<CallRule<'_>>,
    opening: Option<Opening>,
    ends: bool,
) -> Result<Option<Arc<str>>, ApiError> {
    let mark = |name: &str| mark(gateway, name);
    let frame = Frame::new(gateway.family, opening, &mark);
    let calls = calls.map(|rule| call_grammar(gateway, &rule, &frame)).transpose()?.flatten();
    let (param, body, rules) = match (form, calls) {
        (None, None) => return Ok(None),
        (Some(form), None) => (form.param.as_str(), frame.words(&form.body), String::new()),
        (None, Some(calls)) => ("tools", calls.body, calls.rules),
        (Some(_), Some(calls)) if calls.demanded => ("tools", calls.body, calls.rules),
        (Some(form), Some(calls)) => {
            (form.param.as_str(), format!("{} | {}", frame.words(&form.body), calls.calls), calls.rules)
        }
    };
    if !ends {
        let why = "needs a token that ends the answer: this request or this model has none";
        return Err(ApiError::unsupported(param, why));
    }
    let text = format!("start: {} answer\nanswer: {body}\n{rules}{}", frame.before, frame.rules);
    let compiler = gateway.compilers.get(gateway)?;
    match compiler.compile(&text) {
        Ok(_) => Ok(Some(text.into())),
        Err(error) => {
            let message = format!("Invalid value for '{param}': answers cannot be held to it: {error}.");
            Err(ApiError::bad(param, "invalid_value", message))
        }
    }
}

struct CallGrammar {
    body: String,
    /// The calls alone.
    calls: String,
    rules: String,
    demanded: bool,
}

/// What tools ask of an answer; `None`: nothing, calls are the model's own affair.
fn call_grammar(
    gateway: &Gateway,
    rule: &CallRule<'_>,
    frame: &Frame,
) -> Result<Option<CallGrammar>, ApiError> {
    let Some(family) = gateway.tool_family else { return Ok(None) };
    let strict = rule.tools.iter().any(|tool| tool["function"]["strict"] == true);
    let demanded = matches!(rule.choice, ToolChoice::Required | ToolChoice::Named(_));
    if !(strict || demanded) || matches!(rule.choice, ToolChoice::None) {
        return Ok(None);
    }
    for (i, tool) in rule.tools.iter().enumerate() {
        check_depth(&format!("tools[{i}].function.parameters"), tool)?;
    }
    let tools: Vec<&Value> = match rule.choice {
        ToolChoice::Named(name) => {
            rule.tools.iter().copied().filter(|tool| tool["function"]["name"] == name.as_str()).collect()
        }
        _ => rule.tools.clone(),
    };
    let several = rule.parallel && !matches!(rule.choice, ToolChoice::Named(_));
    let fenced = gateway.text.template_has("```json");
    let mark = |name: &str| mark(gateway, name);
    let forced = forced::calls(family, &tools, several, fenced, &mark);
    let calls = frame.calls(&forced.calls);
    let body = match (demanded, forced.among_words) {
        (true, _) => calls.clone(),
        (false, Some(words)) => frame.among_words(&forced.calls, words),
        (false, None) => {
            let why = "is supported with this model only where tool_choice demands a call";
            let first = rule.tools.iter().position(|tool| tool["function"]["strict"] == true);
            let param = format!("tools[{}].function.strict", first.unwrap_or_default());
            return Err(ApiError::unsupported(param, why));
        }
    };
    Ok(Some(CallGrammar { body, calls, rules: forced.rules, demanded }))
}

/// A mark in a grammar: text, unless its token is special.
fn mark(gateway: &Gateway, name: &str) -> String {
    let tokenizer = &gateway.text.tokenizer;
    let special =
        tokenizer.id(name).is_some_and(|id| matches!(tokenizer.pieces().get(id), Piece::Special(_)));
    if special { name.to_string() } else { lark::literal(name) }
}
