//! Chat templates: a conversation becomes the text that the model was trained on, character for character as Hugging
//! Face's `apply_chat_template` renders it. Templates come from the model's folder only, never from a client; even so
//! they run under caps of work, recursion, output and time. Callers run `render` on a blocking thread.

use std::fmt;
use std::io::{self, Write};
use std::time::{Duration, Instant, SystemTime};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use serde_json::{Map, Value as Json};

use super::json::{Style, dumps, dumps_with};
use super::python;
use super::strftime::strftime;

/// Instructions of one rendering. A conversation of 10,000 messages with tools takes about a tenth; of gpt-oss, whose template
/// looks at every call through all that follows, one of 2,000 calls and results takes most of them.
const FUEL: u64 = 20_000_000;

/// Nested macros, loops and includes.
const RECURSION: usize = 200;

/// Time of one rendering.
const TIME_MAX: Duration = Duration::from_secs(5);

/// The template that is used unless tools are given and `tool_use` exists.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Stands where a message ends that is gone on with, until the rest of the turn has been cut off.
const GOES_ON: &str = "\u{e000}goes on here\u{e000}";

/// Names in a template's context that a client cannot set.
pub const RESERVED: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "chat_template", "continue_final_message"];

/// Why a conversation could not be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The model's folder has none.
    #[error("the model has no chat template")]
    Missing,
    /// It does not parse.
    #[error("chat template `{name}` does not parse: {reason}")]
    Syntax {
        /// Of the template.
        name: String,
        /// With the line.
        reason: String,
    },
    /// The template itself refused the conversation, in its own words.
    #[error("{0}")]
    Raised(String),
    /// It failed on this conversation.
    #[error("chat template failed: {0}")]
    Failed(String),
    /// It was stopped.
    #[error("chat template stopped: more than {0}")]
    Cap(Cap),
}

/// What stops a rendering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cap {
    /// Instructions.
    Fuel,
    /// Bytes of text.
    Bytes(usize),
    /// Wall clock.
    Time,
}

impl fmt::Display for Cap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cap::Fuel => write!(f, "{FUEL} instructions"),
            Cap::Bytes(max) => write!(f, "{max} bytes of text"),
            Cap::Time => write!(f, "{} s", TIME_MAX.as_secs()),
        }
    }
}

/// One conversation, as a template sees it.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// As the client gave them, checked; arguments of tool calls are objects, or texts where the client's are no object.
    pub messages: Vec<Json>,
    /// Function definitions; empty: none.
    pub tools: Vec<Json>,
    /// Ends with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends within the last message, with which the model goes on. Its content is a text.
    pub continues: bool,
    /// `chat_template_kwargs`: variables such as `enable_thinking`. Not of `RESERVED` names.
    pub variables: Map<String, Json>,
}

/// The chat templates of one model.
pub struct Templates {
    environment: Environment<'static>,
    specials: Map<String, Json>,
    sources: Vec<(String, String)>,
}

impl fmt::Debug for Templates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sources.iter().map(|(name, _)| name)).finish()
    }
}

impl Templates {
    /// `sources`: names and texts, `default` among them. `specials`: `bos_token` and the like, by name.
    pub fn new(sources: Vec<(String, String)>, specials: Map<String, Json>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| failed(&error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_recursion_limit(RECURSION);
        environment.set_fuel(Some(FUEL));
        python::add(&mut environment);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        for (name, source) in &sources {
            environment
                .add_template_owned(name.clone(), without_generation_tags(source))
                .map_err(|error| TemplateError::Syntax { name: name.clone(), reason: describe(&error) })?;
        }
        Ok(Self { environment, specials, sources })
    }

    /// No template: chats are refused, completions work.
    pub fn none() -> Self {
        Self { environment: Environment::new(), specials: Map::new(), sources: Vec::new() }
    }

    /// True if there is a template to render with.
    pub fn exist(&self) -> bool {
        !self.sources.is_empty()
    }

    /// The text of the template for a conversation with or without tools.
    pub fn source(&self, with_tools: bool) -> Option<&str> {
        let name = self.choose(with_tools);
        self.sources.iter().find(|(n, _)| n == name).map(|(_, source)| source.as_str())
    }

    fn choose(&self, with_tools: bool) -> &'static str {
        let has_tool_use = self.sources.iter().any(|(name, _)| name == TOOL_USE);
        if with_tools && has_tool_use { TOOL_USE } else { DEFAULT }
    }

    /// Renders a conversation into at most `bytes_max` bytes. `now` is what `strftime_now` tells, in UTC. Some templates
    /// (DeepSeek V3's) put arguments of tool calls together with texts: one that fails on objects gets them as JSON.
    pub fn render(
        &self,
        mut conversation: Conversation,
        now: SystemTime,
        bytes_max: usize,
    ) -> Result<String, TemplateError> {
        let last = conversation.messages.last_mut().filter(|_| conversation.continues);
        if let Some(Json::String(content)) = last.and_then(|last| last.get_mut("content")) {
            content.push_str(GOES_ON);
        }
        let continues = conversation.continues;
        let spelled = spelled_out(&conversation);
        let mut rendered = match (self.attempt(conversation, now, bytes_max), spelled) {
            (Err(TemplateError::Failed(reason)), Some(spelled)) => {
                self.attempt(spelled, now, bytes_max).map_err(|_| TemplateError::Failed(reason))?
            }
            (rendered, _) => rendered?,
        };
        if continues {
            let reason = || TemplateError::Failed("it does not show the last message".into());
            rendered.truncate(rendered.rfind(GOES_ON).ok_or_else(reason)?);
        }
        Ok(rendered)
    }

    fn attempt(
        &self,
        conversation: Conversation,
        now: SystemTime,
        bytes_max: usize,
    ) -> Result<String, TemplateError> {
        let with_tools = !conversation.tools.is_empty();
        let template =
            self.environment.get_template(self.choose(with_tools)).map_err(|_| TemplateError::Missing)?;
        // Hugging Face's order: the special tokens are weaker than a caller's variables.
        let mut context = self.specials.clone();
        context.extend(conversation.variables);
        context.insert("messages".into(), Json::Array(conversation.messages));
        context.insert("tools".into(), if with_tools { Json::Array(conversation.tools) } else { Json::Null });
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), Json::Bool(conversation.add_generation_prompt));
        let context = minijinja::context! {
            strftime_now => Value::from_function(move |format: String| strftime(&format, now).map_err(|directive| {
                Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know `{directive}`"))
            })),
            ..Value::from(Serde(&context))
        };
        let mut output =
            Output { text: Vec::new(), bytes_max, deadline: Instant::now() + TIME_MAX, hit: None };
        let rendered = template.render_captured_to(context, &mut output).map(drop);
        match rendered {
            Ok(()) => {
                String::from_utf8(output.text).map_err(|error| TemplateError::Failed(error.to_string()))
            }
            Err(error) => Err(match output.hit {
                Some(cap) => TemplateError::Cap(cap),
                None => failed(&error),
            }),
        }
    }
}

/// The conversation with the arguments of tool calls as JSON; `None` where there are none.
fn spelled_out(conversation: &Conversation) -> Option<Conversation> {
    let calls = |message: &Json| message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    let mut spelled = conversation.messages.iter().any(calls).then(|| conversation.clone())?;
    let calls =
        spelled.messages.iter_mut().filter_map(|message| message.get_mut("tool_calls")?.as_array_mut());
    for call in calls.flatten() {
        let arguments = call.get_mut("function").and_then(|function| function.get_mut("arguments"));
        if let Some(arguments) = arguments.filter(|arguments| arguments.is_object()) {
            *arguments = dumps(arguments).into();
        }
    }
    Some(spelled)
}

/// Collects a rendering, within its caps.
struct Output {
    text: Vec<u8>,
    bytes_max: usize,
    deadline: Instant,
    hit: Option<Cap>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.bytes_max {
            self.hit = Some(Cap::Bytes(self.bytes_max));
        } else if Instant::now() > self.deadline {
            self.hit = Some(Cap::Time);
        }
        if self.hit.is_some() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The words of `raise_exception`, carried through the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// Hugging Face's `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(_: &State, value: &Value, args: &[Value], kwargs: Kwargs) -> Result<Value, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match args.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(1, "indent")?
        .map(|value| usize::try_from(value).map(|indent| indent.min(16)))
        .transpose()?;
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let mut style = Style { ensure_ascii, sort_keys, ..Style::python(indent) };
    if let Some(pair) = separators {
        let part = |index: usize| pair.get_item_by_index(index).map(|value| value.to_string());
        style.separators = (part(0)?, part(1)?);
    }
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "an undefined value is no JSON"));
    }
    let json = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(error)
    })?;
    Ok(Value::from(dumps_with(&json, &style)))
}

fn failed(error: &Error) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::Cap(Cap::Fuel);
    }
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref::<Raised>() {
            return TemplateError::Raised(message.clone());
        }
        source = inner.source();
    }
    TemplateError::Failed(describe(error))
}

/// Kind, detail and line, without the excerpt of the template.
fn describe(error: &Error) -> String {
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    format!("{}{detail}{line}", error.kind())
}

/// `{% generation %}` marks what training computes a loss on; for rendering it is a block without effect.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let word = tag[2..end - 2].trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        match word {
            "generation" => out.push_str(&tag[..end].replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag[..end].replace("endgeneration", "endif")),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: Json) -> Result<String, TemplateError> {
        let templates = Templates::new(vec![(DEFAULT.into(), source.into())], Map::new())?;
        let Json::Array(messages) = messages else { panic!("a list") };
        let conversation = Conversation { messages, add_generation_prompt: true, ..Conversation::default() };
        templates.render(conversation, SystemTime::UNIX_EPOCH, 1 << 16)
    }

    #[test]
    fn values_print_as_python_prints_them() {
        let text =
            render("{{ messages[0].a }} {{ none }} {{ messages[0].b ~ true }} {{ messages[0].nothing }}|", {
                json!([{"a": true, "b": [1, "x", null]}])
            });
        assert_eq!(text.as_deref(), Ok("True None [1, 'x', None]True |"));
    }

    #[test]
    fn tojson_takes_hugging_faces_arguments() {
        let source = "{{ messages[0] | tojson }}{{ messages[0] | tojson(true) }}\
                      {{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}{{ messages[0]|tojson(indent=1) }}";
        assert_eq!(
            render(source, json!([{"b": "<ü>", "a": 1}])).as_deref(),
            Ok(
                "{\"b\": \"<ü>\", \"a\": 1}{\"b\": \"<\\u00fc>\", \"a\": 1}{\"a\":1,\"b\":\"<ü>\"}{\n \"b\": \"<ü>\",\n \"a\": 1\n}"
            )
        );
    }

    #[test]
    fn what_the_template_raises_reaches_the_client_in_its_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert_eq!(error, TemplateError::Raised("roles must alternate".into()));
    }

    #[test]
    fn the_date_is_the_callers() {
        let text = render("{{ strftime_now('%d %b %Y') }}", json!([]));
        assert_eq!(text.as_deref(), Ok("01 Jan 1970"));
        assert!(matches!(render("{{ strftime_now('%Q') }}", json!([])), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn endless_work_endless_text_and_endless_recursion_are_stopped() {
        let loops =
            "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}";
        assert_eq!(render(loops, json!([])), Err(TemplateError::Cap(Cap::Fuel)));
        let text = "{% for a in range(9999) %}{{ '0123456789' }}{% endfor %}";
        assert_eq!(render(text, json!([])), Err(TemplateError::Cap(Cap::Bytes(1 << 16))));
        let recursion = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        assert!(matches!(render(recursion, json!([])), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn training_marks_change_nothing() {
        let source =
            "a {%- generation -%} {{ 'b' }} {%- endgeneration -%} c{# {% #}{% if true %}d{% endif %}";
        assert_eq!(render(source, json!([])).as_deref(), Ok("abcd"));
    }

    #[test]
    fn arguments_are_objects_or_the_text_that_a_template_wants() {
        let call = json!([{"tool_calls": [{"function": {"name": "f", "arguments": {"a": "ü", "n": 1}}}]}]);
        let with = |rest: &str| {
            render(
                &format!("{{% set f = messages[0].tool_calls[0].function %}}{{{{ {rest} }}}}"),
                call.clone(),
            )
        };
        assert_eq!(with("f.name ~ f.arguments.n").as_deref(), Ok("f1"));
        assert_eq!(with("f.name + f.arguments").as_deref(), Ok("f{\"a\": \"ü\", \"n\": 1}"));
        assert!(matches!(with("f.name + 1"), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn a_message_that_is_gone_on_with_stays_open() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</end>{% endfor %}";
        let templates =
            Templates::new(vec![(DEFAULT.into(), source.into())], Map::new()).expect("a template");
        let goes_on = |content: &str| {
            let messages =
                vec![json!({"role": "u", "content": "end"}), json!({"role": "a", "content": content})];
            let conversation = Conversation { messages, continues: true, ..Conversation::default() };
            templates.render(conversation, SystemTime::UNIX_EPOCH, 1 << 16)
        };
        assert_eq!(goes_on("I am").as_deref(), Ok("<u>end</end><a>I am"));
        assert_eq!(goes_on("end").as_deref(), Ok("<u>end</end><a>end"));
        assert_eq!(goes_on("").as_deref(), Ok("<u>end</end><a>"));
    }

    #[test]
    fn syntax_errors_name_the_template_and_the_line() {
        let error = render("{% if %}", json!([])).unwrap_err();
        let TemplateError::Syntax { name, reason } = error else { panic!("{error}") };
        assert_eq!(name, DEFAULT);
        assert!(reason.contains("line 1"), "{reason}");
    }
}
