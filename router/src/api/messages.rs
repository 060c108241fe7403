//! Checks the messages and tools of a chat and brings them into the form that chat templates expect: contents are texts,
//! arguments of tool calls are objects where they are whole. Pure. Called by `chat` and `tokens`.

use serde_json::{Map, Value, json};

use super::error::{ApiError, type_name};
use super::fields::{Fields, quoted};

const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Functions of one request.
const TOOLS_MAX: usize = 128;

/// Reads `messages`. `keep_developer`: the template knows the role; otherwise it is `system`, as OpenAI means it.
pub fn read_messages(fields: &mut Fields, keep_developer: bool) -> Result<Vec<Value>, ApiError> {
    let items = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    if items.is_empty() {
        return Err(ApiError::wrong_value("messages", "at least one message", "none"));
    }
    let read = |(i, item)| read_message(&format!("messages[{i}]"), item, keep_developer);
    items.into_iter().enumerate().map(read).collect()
}

fn read_message(path: &str, message: Value, keep_developer: bool) -> Result<Value, ApiError> {
    let mut fields = Fields::of(path, message)?;
    let mut role = fields.word("role", &ROLES)?.ok_or_else(|| ApiError::missing(&format!("{path}.role")))?;
    if role == "developer" && !keep_developer {
        role = "system";
    }
    // The older form of a result, which has only the function's name.
    let id = fields.string("tool_call_id")?;
    match role {
        "function" => role = "tool",
        "tool" if id.is_none() => return Err(ApiError::missing(&fields.name("tool_call_id"))),
        _ => {}
    }
    let mut out = Map::from_iter([("role".to_string(), Value::from(role))]);
    let content = content(&fields.name("content"), fields.take("content"))?;
    let calls = if role == "assistant" { tool_calls(&mut fields)? } else { None };
    match content {
        Some(text) => _ = out.insert("content".into(), text.into()),
        // Templates join texts: without this one they fail on null.
        None if role == "assistant" => _ = out.insert("content".into(), "".into()),
        None => return Err(ApiError::missing(&format!("{path}.content"))),
    }
    if let Some(calls) = calls {
        out.insert("tool_calls".into(), calls.into());
    }
    if let Some(id) = id {
        if role != "tool" {
            return Err(ApiError::unknown(fields.name("tool_call_id")));
        }
        out.insert("tool_call_id".into(), id.into());
    }
    for name in passed_on(role) {
        if let Some(text) = fields.string(name)? {
            // OpenAI's and vLLM's newer name of the same.
            let name = if *name == "reasoning" { "reasoning_content" } else { name };
            out.insert(name.into(), text.into());
        }
    }
    if role == "assistant" {
        refuse_what_clients_echo(&mut fields)?;
    }
    fields.finish()?;
    Ok(Value::Object(out))
}

/// Texts of a message that templates may use, beside its content.
fn passed_on(role: &str) -> &'static [&'static str] {
    match role {
        "assistant" => &["name", "reasoning", "reasoning_content"],
        _ => &["name"],
    }
}

/// A client sends answers back as it got them: what is empty there does no harm.
fn refuse_what_clients_echo(fields: &mut Fields) -> Result<(), ApiError> {
    fields.only("annotations", &json!([]), "is not supported")?;
    fields.string("refusal")?;
    fields.refuse(&["audio"], "is not supported")
}

/// A text, or a list of text parts, which are joined by line breaks as vLLM does.
pub(super) fn content(path: &str, value: Option<Value>) -> Result<Option<String>, ApiError> {
    let parts = match value {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(ApiError::wrong_type(path, "a string or an array of parts", &other)),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        if let Value::String(text) = part {
            texts.push(text);
            continue;
        }
        let mut fields = Fields::of(&path, part)?;
        let kind = fields.string("type")?.ok_or_else(|| ApiError::missing(&format!("{path}.type")))?;
        let name = match kind.as_str() {
            "text" => "text",
            "refusal" => "refusal",
            "image_url" | "input_image" | "input_audio" | "audio_url" | "video_url" | "file" => {
                let why = format!("of type '{kind}' is not supported: this model reads text only");
                return Err(ApiError::unsupported(path, &why));
            }
            other => {
                return Err(ApiError::wrong_value(&fields.name("type"), "'text'", quoted(other)));
            }
        };
        texts.push(fields.string(name)?.ok_or_else(|| ApiError::missing(&format!("{path}.{name}")))?);
        fields.finish()?;
    }
    Ok(Some(texts.join("\n")))
}

fn tool_calls(fields: &mut Fields) -> Result<Option<Vec<Value>>, ApiError> {
    let path = fields.name("tool_calls");
    // The older form: one call, without an id.
    let call = fields.object("function_call")?.map(|call| json!({"function": call.rest()}));
    let calls = fields.array("tool_calls")?;
    let with_ids = calls.as_ref().map_or(0, Vec::len);
    let calls = match (calls, call) {
        (None, None) => return Ok(None),
        (calls, call) => calls.unwrap_or_default().into_iter().chain(call).collect::<Vec<_>>(),
    };
    let read = |(i, call): (usize, Value)| {
        let path = format!("{path}[{i}]");
        let mut fields = Fields::of(&path, call)?;
        let id = fields.string("id")?;
        fields.word("type", &["function"])?;
        fields.integer("index", 0..=i64::MAX)?;
        let mut function =
            fields.object("function")?.ok_or_else(|| ApiError::missing(&format!("{path}.function")))?;
        let name = function.string("name")?.ok_or_else(|| ApiError::missing(&function.name("name")))?;
        let arguments = arguments(&function.name("arguments"), function.take("arguments"))?;
        function.finish()?;
        fields.finish()?;
        if id.is_none() && i < with_ids {
            return Err(ApiError::missing(&format!("{path}.id")));
        }
        let mut call = Map::new();
        id.into_iter().for_each(|id| _ = call.insert("id".into(), id.into()));
        call.insert("type".into(), "function".into());
        call.insert("function".into(), json!({"name": name, "arguments": arguments}));
        Ok(Value::Object(call))
    };
    let calls = calls.into_iter().enumerate().map(read).collect::<Result<Vec<_>, ApiError>>()?;
    Ok(Some(calls).filter(|calls| !calls.is_empty()))
}

/// OpenAI's clients send a text; templates want the object. What a model wrote that is none, such as a call that `max_tokens`
/// cut off, stays the text that it is.
fn arguments(path: &str, value: Option<Value>) -> Result<Value, ApiError> {
    match value {
        None => Ok(json!({})),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(json!({})),
        Some(Value::String(text)) => {
            Ok(serde_json::from_str(&text).ok().filter(Value::is_object).unwrap_or(Value::String(text)))
        }
        Some(value @ Value::Object(_)) => Ok(value),
        Some(other) => Err(ApiError::wrong_type(path, "an object, or a string of one", &other)),
    }
}

/// Where the first arguments are that are a text and no object.
pub fn broken_arguments(messages: &[Value]) -> Option<String> {
    messages.iter().enumerate().find_map(|(i, message)| {
        let calls = message["tool_calls"].as_array()?;
        let call = calls.iter().position(|call| call["function"]["arguments"].is_string())?;
        Some(format!("messages[{i}].tool_calls[{call}].function.arguments"))
    })
}

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`. Empty: the model is to answer in words.
pub fn read_tools(fields: &mut Fields) -> Result<Tools, ApiError> {
    let items = fields.array("tools")?.unwrap_or_default();
    if items.len() > TOOLS_MAX {
        return Err(ApiError::wrong_value("tools", format!("at most {TOOLS_MAX} tools"), items.len()));
    }
    let read = |(i, tool)| read_tool(&format!("tools[{i}]"), tool);
    let mut definitions = items.into_iter().enumerate().map(read).collect::<Result<Vec<_>, ApiError>>()?;
    let (choice, allowed) = tool_choice(fields, &definitions)?;
    if let Some(allowed) = allowed {
        definitions.retain(|tool| allowed.iter().any(|name| tool["function"]["name"] == name.as_str()));
    }
    if choice == ToolChoice::None {
        definitions.clear();
    }
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    Ok(Tools { definitions, choice, parallel })
}

/// With the names of the tools that may be called, where a client says so.
fn tool_choice(
    fields: &mut Fields,
    definitions: &[Value],
) -> Result<(ToolChoice, Option<Vec<String>>), ApiError> {
    let known = |(path, name): (String, Option<String>)| {
        let name = name.ok_or_else(|| ApiError::missing(&path))?;
        match definitions.iter().any(|tool| tool["function"]["name"] == name.as_str()) {
            true => Ok(name),
            false => Err(ApiError::wrong_value(&path, "the name of one of the tools", quoted(&name))),
        }
    };
    let mut allowed = None;
    let expected = "'auto', 'none', 'required' or a function";
    let choice = match fields.take("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            // llama.cpp's and LangChain's word.
            "required" | "any" => ToolChoice::Required,
            other => return Err(ApiError::wrong_value("tool_choice", expected, quoted(other))),
        },
        Some(object @ Value::Object(_)) => {
            let mut choice = Fields::of("tool_choice", object)?;
            let kind = choice.string("type")?.ok_or_else(|| ApiError::missing("tool_choice.type"))?;
            match kind.as_str() {
                "function" => {
                    let name = function_name(&mut choice, false)?;
                    choice.finish()?;
                    ToolChoice::Named(known(name)?)
                }
                "allowed_tools" => {
                    // `/v1/responses` has it one level higher, and names too.
                    let flat = choice.peek("allowed_tools").is_none();
                    let mut rule = choice.object("allowed_tools")?.unwrap_or(choice);
                    let mode = rule.word("mode", &["auto", "required"])?;
                    let path = rule.name("tools");
                    let tools = rule.array("tools")?.ok_or_else(|| ApiError::missing(&path))?;
                    rule.finish()?;
                    let name = |(i, tool)| {
                        let path = format!("{path}[{i}]");
                        let mut tool = Fields::of(&path, tool)?;
                        tool.word("type", &["function"])?;
                        let name = known(function_name(&mut tool, flat)?)?;
                        tool.finish()?;
                        Ok(name)
                    };
                    allowed = Some(tools.into_iter().enumerate().map(name).collect::<Result<_, ApiError>>()?);
                    if mode == Some("required") { ToolChoice::Required } else { ToolChoice::Auto }
                }
                _ => {
                    let why = format!("of type {} is not supported", quoted(&kind));
                    return Err(ApiError::unsupported("tool_choice", &why));
                }
            }
        }
        Some(other) => return Err(ApiError::wrong_value("tool_choice", expected, type_name(&other))),
    };
    if choice == ToolChoice::Required && allowed.as_ref().map_or(definitions.len(), Vec::len) == 0 {
        return Err(ApiError::wrong_value("tool_choice", "tools to choose from", "none"));
    }
    Ok((choice, allowed))
}

/// `{"function": {"name": ...}}`; `/v1/responses` has the name one level higher. With where it is, or where it is missed:
/// there if `flat`.
fn function_name(fields: &mut Fields, flat: bool) -> Result<(String, Option<String>), ApiError> {
    let Some(mut function) = fields.object("function")? else {
        let name = fields.string("name")?;
        let path = if flat || name.is_some() { "name" } else { "function.name" };
        return Ok((fields.name(path), name));
    };
    let name = function.string("name")?;
    let path = function.name("name");
    function.finish()?;
    Ok((path, name))
}

/// Whether and what a model calls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// What a model may call.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tools {
    /// As the client wrote them: models were trained on that form.
    pub definitions: Vec<Value>,
    /// Whether they must be called.
    pub choice: ToolChoice,
    /// More than one call in an answer.
    pub parallel: bool,
}

fn read_tool(path: &str, tool: Value) -> Result<Value, ApiError> {
    let mut fields = Fields::of(path, tool.clone())?;
    fields.word("type", &["function"])?.ok_or_else(|| ApiError::missing(&format!("{path}.type")))?;
    let mut function =
        fields.object("function")?.ok_or_else(|| ApiError::missing(&format!("{path}.function")))?;
    let name = function.string("name")?.ok_or_else(|| ApiError::missing(&function.name("name")))?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !(1..=64).contains(&name.len()) || !name.chars().all(allowed) {
        let expected = "1 to 64 letters, digits, '_', '-' or '.'";
        return Err(ApiError::wrong_value(&function.name("name"), expected, quoted(&name)));
    }
    function.string("description")?;
    function.object("parameters")?;
    function.boolean("strict")?;
    function.finish()?;
    fields.finish()?;
    let mut tool = tool;
    // Templates print a tool as it is; what is empty was never in their training.
    if let Some(function) = tool.get_mut("function").and_then(Value::as_object_mut) {
        function.retain(|name, value| (name != "strict" || *value == true) && !value.is_null());
    }
    Ok(tool)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(json: Value) -> Result<Vec<Value>, ApiError> {
        let mut fields = Fields::parse(json!({ "messages": json }).to_string().as_bytes())?;
        read_messages(&mut fields, false)
    }

    #[test]
    fn messages_take_the_form_that_templates_expect() {
        let read = messages(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
            {"role": "assistant", "content": null, "refusal": null, "annotations": [], "audio": null,
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ]));
        let expected = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb", "name": "x"},
            {"role": "assistant", "content": "", "tool_calls":
                [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
        ]);
        assert_eq!(read.map(Value::from), Ok(expected));
    }

    /// Protects: a client that sends back what a model wrote is answered, also where that was cut off.
    #[test]
    fn arguments_that_are_no_object_stay_as_they_were_written() {
        let call = |arguments: Value| {
            json!([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
                {"id": "a", "function": {"name": "f", "arguments": {}}},
                {"id": "b", "function": {"name": "f", "arguments": arguments}}]}])
        };
        for (given, kept) in [
            (json!("{\"city\": \"Ul"), json!("{\"city\": \"Ul")),
            (json!("[1]"), json!("[1]")),
            (json!("{\"x\": 1}"), json!({"x": 1})),
            (json!({"x": 1}), json!({"x": 1})),
            (json!(" "), json!({})),
            (Value::Null, json!({})),
        ] {
            let read = messages(call(given)).expect("served");
            assert_eq!(read[1]["tool_calls"][1]["function"]["arguments"], kept);
            let broken = kept.is_string().then(|| "messages[1].tool_calls[1].function.arguments".to_owned());
            assert_eq!(broken_arguments(&read), broken);
        }
    }

    #[test]
    fn what_is_wrong_in_a_message_is_named() {
        let user = |content: Value| json!([{"role": "user", "content": content}]);
        for (json, param) in [
            (json!([]), "messages"),
            (json!("hi"), "messages"),
            (json!(["hi"]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (json!([{"role": "robot", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (user(json!(7)), "messages[0].content"),
            (user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), "messages[0].content[0]"),
            (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
            (user(json!([{"type": "song", "text": ""}])), "messages[0].content[0].type"),
            (json!([{"role": "user", "content": "x", "mood": "good"}]), "messages[0].mood"),
            (json!([{"role": "user", "content": "x", "tool_calls": []}]), "messages[0].tool_calls"),
            (
                json!([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": [1]}}]}]),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]),
                "messages[0].tool_calls[0].id",
            ),
        ] {
            assert_eq!(messages(json.clone()).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }

    fn tools(json: Value) -> Result<Tools, ApiError> {
        let mut fields = Fields::parse(json.to_string().as_bytes())?;
        let tools = read_tools(&mut fields)?;
        fields.finish().map(|()| tools)
    }

    #[test]
    fn tools_reach_the_template_as_they_are() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": null}}});
        let given = json!({"type": "function", "function":
            {"name": "f", "description": null, "parameters": {"b": 1, "a": null}, "strict": false}});
        let read = tools(json!({"tools": [given], "tool_choice": "auto", "parallel_tool_calls": false}));
        assert_eq!(
            read,
            Ok(Tools { definitions: vec![tool.clone()], choice: ToolChoice::Auto, parallel: false })
        );
        assert_eq!(
            tools(json!({"tools": [tool], "tool_choice": "none"})).expect("valid").definitions,
            [] as [Value; 0]
        );
    }

    #[test]
    fn what_is_wrong_in_a_tool_is_named() {
        let function = |f: Value| json!({"tools": [{"type": "function", "function": f}]});
        for (json, param) in [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [{"type": "web"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (function(json!({})), "tools[0].function.name"),
            (function(json!({"name": "a b"})), "tools[0].function.name"),
            (function(json!({"name": "f", "parameters": []})), "tools[0].function.parameters"),
            (function(json!({"name": "f", "strict": "yes"})), "tools[0].function.strict"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tool_choice": {"type": "function"}}), "tool_choice.function.name"),
            (
                json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}),
                "tool_choice.function.name",
            ),
            (json!({"tool_choice": {"type": "allowed_tools"}}), "tool_choice.tools"),
            (json!({"tool_choice": {"type": "custom"}}), "tool_choice"),
            (
                json!({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}}),
                "tool_choice.tools[0].name",
            ),
            (json!({"tool_choice": 1}), "tool_choice"),
        ] {
            assert_eq!(tools(json.clone()).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }
}
