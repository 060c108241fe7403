//! Conversations as the chat template of gpt-oss wants them. It shows instructions at the beginning only and one call of a
//! message, and passes over the others; it has reasoning by another name, and in a message with a call either that or words.
//! Pure. Called by `api::chat` before rendering.

use std::mem::take;

use serde_json::{Value, json};

use super::Conversation;

/// Rewrites a conversation so that the template shows all of it. Errors with the place of the first message that it cannot
/// show: instructions behind the beginning.
pub fn arrange(conversation: &mut Conversation) -> Result<(), usize> {
    let instructs = |message: &Value| message["role"] == "system" || message["role"] == "developer";
    let messages = &mut conversation.messages;
    let begin = messages.iter().position(|message| !instructs(message)).unwrap_or(messages.len());
    if let Some(at) = messages[begin..].iter().position(instructs) {
        return Err(begin + at);
    }
    let mut rest = messages.split_off(begin).into_iter().peekable();
    if messages.len() > 1 {
        let texts: Vec<&str> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
        *messages = vec![json!({"role": "developer", "content": texts.join("\n\n")})];
    }
    while let Some(mut message) = rest.next() {
        reasoning(&mut message);
        let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
        if calls.len() < 2 {
            messages.push(message);
            continue;
        }
        // One after the other, each with its result.
        let mut results = Vec::new();
        while let Some(result) = rest.next_if(|next| next["role"] == "tool") {
            results.push(result);
        }
        for call in calls {
            let id = call["id"].clone();
            message["tool_calls"] = json!([call]);
            messages.push(std::mem::replace(&mut message, json!({"role": "assistant", "content": ""})));
            let own = results.iter().position(|result| result["tool_call_id"] == id);
            messages.extend(own.map(|at| results.remove(at)));
        }
        messages.append(&mut results);
    }
    // The template fails without.
    let functions = conversation.tools.iter_mut().filter_map(|tool| tool["function"].as_object_mut());
    functions.for_each(|function| _ = function.entry("description").or_insert("".into()));
    Ok(())
}

/// Reasoning by its name there. Words beside a call are shown as reasoning, so they follow it.
fn reasoning(message: &mut Value) {
    let Some(fields) = message.as_object_mut() else { return };
    let Some(Value::String(mut thinking)) = fields.remove("reasoning_content") else { return };
    if fields.contains_key("tool_calls")
        && let Some(Value::String(words)) = fields.get_mut("content").filter(|words| **words != "")
    {
        if !thinking.is_empty() {
            thinking.push_str("\n\n");
        }
        thinking.push_str(&take(words));
    }
    if !thinking.is_empty() {
        fields.insert("thinking".into(), thinking.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arranged(messages: Value) -> Result<Vec<Value>, usize> {
        let Value::Array(messages) = messages else { panic!("a list") };
        let mut conversation = Conversation { messages, ..Conversation::default() };
        arrange(&mut conversation).map(|()| conversation.messages)
    }

    fn call(id: &str) -> Value {
        json!({"id": id, "function": {"name": id, "arguments": {}}})
    }

    /// Protects: the template shows a message's first call only, and names results by the call before them.
    #[test]
    fn calls_come_one_by_one_each_with_its_result() {
        let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": id});
        let got = arranged(json!([
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "words", "reasoning_content": "hm", "tool_calls": [call("a"), call("b"), call("c")]},
            result("b"), result("x"), result("a"),
            {"role": "assistant", "content": "done", "reasoning_content": ""},
        ]));
        let expected = json!([
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "thinking": "hm\n\nwords", "tool_calls": [call("a")]}, result("a"),
            {"role": "assistant", "content": "", "tool_calls": [call("b")]}, result("b"),
            {"role": "assistant", "content": "", "tool_calls": [call("c")]}, result("x"),
            {"role": "assistant", "content": "done"},
        ]);
        assert_eq!(got.map(Value::from), Ok(expected));
    }

    #[test]
    fn instructions_are_one_and_at_the_beginning() {
        let got = arranged(json!([{"role": "system", "content": "a"}, {"role": "developer", "content": "b"},
            {"role": "user", "content": "u"}]));
        let expected =
            [json!({"role": "developer", "content": "a\n\nb"}), json!({"role": "user", "content": "u"})];
        assert_eq!(got, Ok(expected.into()));
        let later = json!([{"role": "system", "content": "a"}, {"role": "user", "content": "u"},
            {"role": "system", "content": "b"}]);
        assert_eq!(arranged(later), Err(2));
    }

    #[test]
    fn words_beside_a_call_stay_where_there_is_no_reasoning() {
        let message = json!({"role": "assistant", "content": "words", "tool_calls": [call("a")]});
        assert_eq!(arranged(json!([message])), Ok(vec![message]));
    }

    #[test]
    fn tools_have_descriptions() {
        let tools = vec![json!({"function": {"name": "f"}})];
        let mut conversation = Conversation { tools, ..Conversation::default() };
        assert_eq!(arrange(&mut conversation), Ok(()));
        assert_eq!(conversation.tools[0]["function"]["description"], "");
    }
}
