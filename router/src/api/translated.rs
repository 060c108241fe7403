//! A chat that is made of another interface's request, piece by piece, with where each piece came from: what is wrong with the
//! chat is told in the words of the request. Made by `responses` and `anthropic`.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// The chat so far.
#[derive(Debug, Default)]
pub struct Translated {
    fields: Map<String, Value>,
    messages: Vec<Value>,
    origins: Vec<Origin>,
}

/// A place of the chat, and of the request.
#[derive(Debug)]
struct Origin {
    chat: String,
    request: String,
    /// What lies below this place has its names from the chat; the request has nothing there.
    whole: bool,
}

impl Translated {
    /// Sets a field of the chat that the request has as `request`.
    pub fn set(&mut self, name: &str, value: Value, request: &str) {
        self.fields.insert(name.into(), value);
        if name != request {
            self.same(name, request);
        }
    }

    /// Fields that chats have too.
    pub fn extend(&mut self, fields: impl IntoIterator<Item = (String, Value)>) {
        self.fields.extend(fields);
    }

    /// Appends a message that the request has as `request`.
    pub fn message(&mut self, message: Value, request: &str) {
        self.same(&format!("messages[{}]", self.messages.len()), request);
        self.messages.push(message);
    }

    /// A field of the last message, which the request has elsewhere.
    pub fn part(&mut self, name: &str, request: &str) {
        if let Some(last) = self.messages.len().checked_sub(1) {
            self.same(&format!("messages[{last}].{name}"), request);
        }
    }

    /// Appends a message that the request only names.
    pub fn kept_message(&mut self, message: Value, request: &str) {
        let chat = format!("messages[{}]", self.messages.len());
        self.origins.push(Origin { chat, request: request.into(), whole: true });
        self.messages.push(message);
    }

    /// Appends a call to the last message, which is the assistant's. `id`, `name`, `arguments`: of the call. `names`: what the
    /// request, which has it as `request`, calls these.
    pub fn call(&mut self, id: String, name: String, arguments: Value, request: &str, names: [&str; 3]) {
        let Some(last) = self.messages.len().checked_sub(1) else { return };
        let calls = &mut self.messages[last]["tool_calls"];
        let path = format!("messages[{last}].tool_calls[{}]", calls.as_array().map_or(0, Vec::len));
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        match calls.as_array_mut() {
            Some(calls) => calls.push(call),
            None => *calls = json!([call]),
        }
        self.same(&path, request);
        for (chat, name) in ["id", "function.name", "function.arguments"].iter().zip(names) {
            self.same(&format!("{path}.{chat}"), &format!("{request}.{name}"));
        }
    }

    /// Appends a tool that the request has flat, as `request`. `parameters`: its name for those.
    pub fn tool(&mut self, function: Map<String, Value>, request: &str, parameters: &str) {
        let tools = self.fields.entry("tools").or_insert_with(|| json!([]));
        let path = format!("tools[{}].function", tools.as_array().map_or(0, Vec::len));
        if let Some(tools) = tools.as_array_mut() {
            tools.push(json!({"type": "function", "function": function}));
        }
        self.same(&path, request);
        self.same(&format!("{path}.parameters"), &format!("{request}.{parameters}"));
    }

    /// What lies at and below `chat` is called as at and below `request`.
    pub fn same(&mut self, chat: &str, request: &str) {
        self.origins.push(Origin { chat: chat.into(), request: request.into(), whole: false });
    }

    /// Whether a field of the chat has this value.
    pub fn is(&self, name: &str, value: &str) -> bool {
        self.fields.get(name).is_some_and(|given| given == value)
    }

    /// The messages so far.
    pub fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// The message at the end, where it is the assistant's.
    pub fn assistant(&mut self) -> Option<&mut Value> {
        self.messages.last_mut().filter(|last| last["role"] == "assistant")
    }

    /// Does with the chat what `serve` does. Errors name what the request has.
    pub fn serve<T>(self, serve: impl FnOnce(Fields) -> Result<T, ApiError>) -> Result<T, ApiError> {
        let Self { mut fields, messages, origins } = self;
        fields.insert("messages".into(), messages.into());
        serve(Fields::top(fields)).map_err(|error| in_words_of(&origins, error))
    }
}

/// The same error, about the request.
fn in_words_of(origins: &[Origin], error: ApiError) -> ApiError {
    let Some(chat) = &error.param else { return error };
    let below = |origin: &Origin| {
        let rest = chat.strip_prefix(&origin.chat)?;
        (rest.is_empty() || rest.starts_with(['.', '['])).then_some(rest.len())
    };
    // The narrowest place that is known; of one place what was said last.
    let nearest = origins.iter().rev().filter_map(|origin| Some((below(origin)?, origin)));
    let Some((rest, origin)) = nearest.min_by_key(|(rest, _)| *rest) else { return error };
    let rest = if origin.whole { "" } else { &chat[chat.len() - rest..] };
    let request = format!("{}{rest}", origin.request);
    let message = error.message.replacen(&format!("'{chat}'"), &format!("'{request}'"), 1);
    ApiError { message, param: Some(request), ..error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_place_has_the_name_of_the_narrowest_known_one_around_it() {
        let mut chat = Translated::default();
        chat.set("max_tokens", json!(1), "max_output_tokens");
        chat.kept_message(json!({"role": "assistant"}), "previous_response_id");
        chat.call("a".into(), "f".into(), json!(""), "input[0]", ["call_id", "name", "arguments"]);
        chat.message(json!({"role": "user"}), "input[1]");
        chat.tool(Map::new(), "tools[0]", "input_schema");
        for (place, named) in [
            ("max_tokens", "max_output_tokens"),
            ("max_tokens_of_others", "max_tokens_of_others"),
            ("messages[0].content", "previous_response_id"),
            ("messages[0].tool_calls[0].id", "input[0].call_id"),
            ("messages[0].tool_calls[0].function.arguments", "input[0].arguments"),
            ("messages[1].content[2].text", "input[1].content[2].text"),
            ("messages[10]", "messages[10]"),
            ("tools[0].function.name", "tools[0].name"),
            ("tools[0].function.parameters", "tools[0].input_schema"),
        ] {
            let error = in_words_of(&chat.origins, ApiError::missing(place));
            assert_eq!(error, ApiError::missing(named));
        }
    }
}
