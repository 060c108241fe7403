//! gpt-oss: answers in channels, whose marks are tokens that no client may see, and a template with words of its own.

use std::sync::Arc;

use grammar::Compiler;
use router::GatewayConfig;
use router::inference::FinishReason;
use router::text::Tokenizer;
use serde_json::{Value, json};
use vocab::Vocab;

use crate::mock::{Gateway, Step, content, fixture, script};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

const THOUGHT: &str = "<|channel|>analysis<|message|>Hm, hm.<|end|><|start|>assistant";
const CALL: &str = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>";

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&fixture("gpt_oss").join("tokenizer.json")).unwrap()
}

fn said(text: &str, reason: FinishReason) -> Vec<Step> {
    script(&tokenizer().encode(text, false).unwrap(), reason)
}

/// A model that says this.
async fn says(text: String) -> Gateway {
    let config = GatewayConfig::new(fixture("gpt_oss"), "tiny", 4000);
    Gateway::with(config, move |_| said(&text, FinishReason::Stop)).await
}

fn prompt(gateway: &Gateway) -> String {
    tokenizer().decode(&gateway.last().tokens, false)
}

fn chat() -> Value {
    json!({"messages": [{"role": "user", "content": "Really?"}]})
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]})
}

/// Protects: channels are told apart whatever a client asks for, and their marks are never words.
#[tokio::test]
async fn channels_never_leak() {
    let gateway = says(format!("{THOUGHT}<|channel|>final<|message|>Yes.<|return|>")).await;
    for more in [json!({}), json!({"skip_special_tokens": false}), json!({"n": 2}), tools()] {
        let body = with(chat(), more);
        let (status, answer) = gateway.ask(CHAT, &body).await;
        assert_eq!(status, 200, "{answer}");
        let message =
            json!({"role": "assistant", "content": "Yes.", "refusal": null, "reasoning_content": "Hm, hm."});
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!((&choice["message"], &choice["finish_reason"]), (&message, &json!("stop")), "{body}");
        }
        let chunks = gateway.chunks(CHAT, &with(body, json!({"stream": true, "n": 1}))).await;
        let reasoning: String =
            chunks.iter().filter_map(|c| c["choices"][0]["delta"]["reasoning_content"].as_str()).collect();
        assert_eq!((content(&chunks).as_str(), reasoning.as_str()), ("Yes.", "Hm, hm."));
    }
    let (_, answer) =
        gateway.ask(CHAT, &with(chat(), json!({"include_reasoning": false, "logprobs": true}))).await;
    let inside = tokenizer().encode("<|message|>Hm, hm.<|end|>", false).unwrap().len();
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], inside);
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Yes.", "refusal": null}));
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len() as u64, answer["usage"]["completion_tokens"].as_u64().unwrap());
}

/// Protects: an operator who wants no calls and no reasoning told apart still gets no markup.
#[tokio::test]
async fn channels_are_read_whatever_is_set() {
    let mut config = GatewayConfig::new(fixture("gpt_oss"), "tiny", 4000);
    (config.tool_parser, config.reasoning_parser) = (Some(None), Some(false));
    let said = |_: &_| said(&format!("{THOUGHT}<|channel|>final<|message|>Yes."), FinishReason::Stop);
    let gateway = Gateway::with(config, said).await;
    let (_, answer) = gateway.ask(CHAT, &chat()).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("Yes."), &json!("Hm, hm.")));
    let (status, answer) = gateway.ask(CHAT, &with(chat(), tools())).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("tools")));
}

#[tokio::test]
async fn a_call_is_one_in_every_interface() {
    let gateway = says(format!("{THOUGHT}{CALL}")).await;
    let (_, answer) = gateway.ask(CHAT, &with(chat(), tools())).await;
    let choice = &answer["choices"][0];
    let call = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(
        (call, &choice["finish_reason"]),
        (&json!({"name": "f", "arguments": "{\"a\": 1}"}), &json!("tool_calls"))
    );
    assert_eq!(choice["message"]["content"], Value::Null);
    let chunks = gateway.chunks(CHAT, &with(with(chat(), tools()), json!({"stream": true}))).await;
    let arguments: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str())
        .collect();
    assert_eq!(arguments, "{\"a\": 1}");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    let flat = json!([{"type": "function", "name": "f", "parameters": {"type": "object"}}]);
    let (_, first) = gateway.ask(RESPONSES, &json!({"input": "Hi", "tools": flat})).await;
    let output = first["output"].as_array().unwrap();
    let kinds: Vec<&Value> = output.iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "function_call"]);
    let result = json!([{"type": "function_call_output", "call_id": output[1]["call_id"], "output": "r"}]);
    let body = json!({"input": result, "tools": flat, "previous_response_id": first["id"], "reasoning": {"effort": "high"}});
    assert_eq!(gateway.ask(RESPONSES, &body).await.0, 200);
    let pending = "<|start|>assistant<|channel|>analysis<|message|>Hm, hm.<|end|><|start|>assistant\
                   <|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>\
                   <|start|>functions.f to=assistant<|channel|>commentary<|message|>r<|end|><|start|>assistant";
    assert!(prompt(&gateway).ends_with(pending), "{}", prompt(&gateway));
    assert!(prompt(&gateway).contains("\nReasoning: high\n"));

    let user = json!({"role": "user", "content": "Hi"});
    let tools = json!([{"name": "f", "input_schema": {"type": "object"}}]);
    let body = json!({"max_tokens": 99, "messages": [user], "tools": tools});
    let (_, first) = gateway.ask(MESSAGES, &body).await;
    let blocks: Vec<&Value> =
        first["content"].as_array().unwrap().iter().map(|block| &block["type"]).collect();
    assert_eq!(
        (blocks, &first["stop_reason"]),
        (vec![&json!("thinking"), &json!("tool_use")], &json!("tool_use"))
    );
    let result = json!({"type": "tool_result", "tool_use_id": first["content"][1]["id"], "content": "r"});
    let messages = json!([user, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]);
    let (status, _) = gateway.ask(MESSAGES, &with(body, json!({"messages": messages}))).await;
    assert!(status == 200 && prompt(&gateway).ends_with(pending), "{}", prompt(&gateway));
}

/// Protects: all that led to a call goes back to the model with its result.
#[tokio::test]
async fn a_kept_response_keeps_every_thought() {
    let preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant";
    let gateway = says(format!("{THOUGHT}{preamble}{THOUGHT}{CALL}")).await;
    let tools = json!([{"type": "function", "name": "f", "parameters": {"type": "object"}}]);
    let (_, first) = gateway.ask(RESPONSES, &json!({"input": "Hi", "tools": tools})).await;
    let kinds: Vec<&Value> = first["output"].as_array().unwrap().iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "message", "reasoning", "function_call"]);
    let result =
        json!([{"type": "function_call_output", "call_id": first["output"][3]["call_id"], "output": "r"}]);
    let body = json!({"input": result, "tools": tools, "previous_response_id": first["id"]});
    assert_eq!(gateway.ask(RESPONSES, &body).await.0, 200);
    let thought =
        format!("<|channel|>analysis<|message|>Hm, hm.\n\nHm, hm.\n\nI look.<|end|><|start|>assistant{CALL}");
    assert!(prompt(&gateway).contains(&thought), "{}", prompt(&gateway));
}

/// Protects: without tools there is no call to wait for, and what the model wrote to one is no answer.
#[tokio::test]
async fn without_tools_a_call_is_none() {
    let gateway = says(format!("{THOUGHT}{CALL}")).await;
    let (_, answer) = gateway.ask(CHAT, &chat()).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["message"]["tool_calls"], &choice["finish_reason"]), (&Value::Null, &json!("stop")));
    assert_eq!(choice["message"]["reasoning_content"], "Hm, hm.\n\n{\"a\": 1}");
}

#[tokio::test]
async fn a_header_that_is_cut_off_is_no_text() {
    let config = GatewayConfig::new(fixture("gpt_oss"), "tiny", 4000);
    let cut = |_: &_| {
        said(&format!("{THOUGHT}<|channel|>commentary to=functions.f <|constrain|>js"), FinishReason::Length)
    };
    let gateway = Gateway::with(config, cut).await;
    let (_, answer) = gateway.ask(CHAT, &with(chat(), tools())).await;
    let choice = &answer["choices"][0];
    let message =
        json!({"role": "assistant", "content": null, "refusal": null, "reasoning_content": "Hm, hm."});
    assert_eq!((&choice["message"], &choice["finish_reason"]), (&message, &json!("length")));
    // A stop string may end it there, too.
    let (_, answer) = gateway.ask(CHAT, &with(chat(), json!({"stop": ["assist"]}))).await;
    assert_eq!(
        (&answer["choices"][0]["message"], &answer["choices"][0]["finish_reason"]),
        (&message, &json!("stop"))
    );
}

/// Protects: an answer ends with the token that ends it, and with no message before, whatever a model's files list.
#[tokio::test]
async fn what_ends_a_message_does_not_end_an_answer() {
    let folder =
        std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("ends-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("gpt_oss").join(file), folder.join(file)).unwrap();
    }
    let [end, ret, call] = ["<|end|>", "<|return|>", "<|call|>"].map(|name| tokenizer().id(name).unwrap());
    std::fs::write(folder.join("generation_config.json"), json!({"eos_token_id": [end, ret]}).to_string())
        .unwrap();
    let gateway =
        Gateway::with(GatewayConfig::new(folder, "tiny", 4000), |_| said("a", FinishReason::Stop)).await;
    assert_eq!(gateway.ask(CHAT, &chat()).await.0, 200);
    assert_eq!(gateway.last().stop_ids, [ret, call]);
}

#[tokio::test]
async fn efforts_are_the_models_own() {
    let gateway = says(String::new()).await;
    for (effort, told) in
        [("minimal", "low"), ("low", "low"), ("medium", "medium"), ("high", "high"), ("xhigh", "high")]
    {
        assert_eq!(gateway.ask(CHAT, &with(chat(), json!({"reasoning_effort": effort}))).await.0, 200);
        assert!(
            prompt(&gateway).contains(&format!("\nReasoning: {told}\n")),
            "{effort}: {}",
            prompt(&gateway)
        );
    }
    let (status, answer) = gateway.ask(CHAT, &with(chat(), json!({"reasoning_effort": "none"}))).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("reasoning_effort")), "{answer}");
    let body = with(chat(), json!({"max_tokens": 9, "thinking": {"type": "disabled"}}));
    let (status, answer) = gateway.ask(MESSAGES, &body).await;
    assert!(status == 400 && answer["error"]["message"].as_str().unwrap().contains("'thinking'"), "{answer}");
}

#[tokio::test]
async fn what_the_template_would_drop_is_refused_or_shown() {
    let gateway = says(String::new()).await;
    let messages = json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]);
    let (status, answer) = gateway.ask(CHAT, &json!({"messages": messages})).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("messages[1]")), "{answer}");
    let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": id, "arguments": "{}"}});
    let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": id});
    let messages = json!([{"role": "user", "content": "u"},
        {"role": "assistant", "reasoning": "Both.", "tool_calls": [call("f"), call("g")]}, result("g"), result("f")]);
    assert_eq!(gateway.ask(CHAT, &json!({"messages": messages})).await.0, 200);
    let call = |name: &str| {
        format!(
            "<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{{}}<|call|>\
             <|start|>functions.{name} to=assistant<|channel|>commentary<|message|>{name}<|end|>"
        )
    };
    let expected =
        format!("<|channel|>analysis<|message|>Both.<|end|>{}{}<|start|>assistant", call("f"), call("g"));
    assert!(prompt(&gateway).ends_with(&expected), "{}", prompt(&gateway));
}

#[tokio::test]
async fn a_message_that_was_begun_is_gone_on_with() {
    let gateway = says(" you.<|return|>".into()).await;
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "I see"}]);
    let body = json!({"messages": messages, "continue_final_message": true, "guided_regex": "[a-z .]+"});
    let (_, answer) = gateway.ask(CHAT, &body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], " you.");
    assert!(
        prompt(&gateway).ends_with("<|start|>assistant<|channel|>final<|message|>I see"),
        "{}",
        prompt(&gateway)
    );
    assert!(gateway.last().grammar.unwrap().contains("answer: /[a-z .]+/"));
}

/// Protects: what the sampler is held to is what the model was trained to write, token by token.
#[tokio::test]
async fn forms_are_of_the_final_message_and_calls_of_their_channel() {
    let gateway = says(String::new()).await;
    let vocab = Vocab::read(&fixture("gpt_oss")).unwrap();
    let compiler = Compiler::new(Arc::new(vocab)).unwrap();
    let said = "<|channel|>final<|message|>{\"a\": 1}";
    let constrained = "<|channel|>final <|constrain|>json<|message|>{\"a\": 1}";
    let called = CALL.strip_suffix("<|call|>").unwrap();
    let from_role = " to=functions.f<|channel|>commentary json<|message|>{\"a\": 1}";
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "f"}}});
    let strict = json!([{"type": "function", "function": {"name": "f", "strict": true}}]);
    for (more, fit, others) in [
        (json!({"response_format": {"type": "json_object"}}), vec![said, constrained], vec![called, "{}"]),
        (json!({"guided_regex": "[{}a1: \"]+"}), vec![said], vec![called]),
        (with(tools(), json!({"tool_choice": "required"})), vec![called, from_role], vec![said]),
        (with(tools(), named), vec![called, from_role], vec![said]),
        (json!({"tools": strict}), vec![called, said], vec![called.strip_suffix('}').unwrap()]),
    ] {
        let (status, answer) = gateway.ask(CHAT, &with(chat(), more.clone())).await;
        assert_eq!(status, 200, "{answer}");
        let grammar = gateway.last().grammar.unwrap();
        let fits = |answer: &str| {
            let ids = tokenizer().encode(answer, false).unwrap();
            compiler.compile(&grammar).unwrap().next(&ids).is_ok_and(|mask| mask.may_end)
        };
        for answer in fit {
            assert!(fits(answer) && fits(&format!("{THOUGHT}{answer}")), "{more}: {answer}\n{grammar}");
        }
        for answer in others {
            assert!(!fits(answer), "{more}: {answer}\n{grammar}");
        }
    }
}
