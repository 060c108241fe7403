//! Tool calls in chats: definitions to the template, calls from the text.

use serde_json::{Value, json};

use crate::mock::{Gateway, content, encode, says};

const CHAT: &str = "/v1/chat/completions";
const ANSWER: &str = "Let me see.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Bern\"}}\n</tool_call>\n\
                      <tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>";

fn body() -> Value {
    json!({
        "messages": [{"role": "user", "content": "Weather in Bern?"}],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}],
    })
}

#[tokio::test]
async fn calls_come_as_calls() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let (status, answer) = gateway.ask(CHAT, &body()).await;
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Let me see."))
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    let functions: Vec<&Value> = calls.iter().map(|call| &call["function"]).collect();
    assert_eq!(functions[0], &json!({"name": "get_weather", "arguments": "{\"city\": \"Bern\"}"}));
    assert_eq!(functions[1]["arguments"], "{\"city\": \"Ulm\"}");
    assert!(calls[0]["id"].as_str().unwrap().starts_with("call_") && calls[0]["id"] != calls[1]["id"]);
    assert_eq!(calls[0]["type"], "function");
    let definition =
        r#"{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}"#;
    let prompt = crate::mock::tokenizer().decode(&gateway.last().tokens, false);
    assert!(prompt.contains(&format!("<tools>\n{definition}\n</tools>")), "{prompt}");
}

#[tokio::test]
async fn streamed_calls_carry_their_index() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let mut body = body();
    body["stream"] = true.into();
    let chunks = gateway.chunks(CHAT, &body).await;
    assert_eq!(content(&chunks), "Let me see.");
    let calls: Vec<&Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array())
        .flatten()
        .collect();
    let told = |index: u64| -> String {
        let of = calls.iter().filter(|call| call["index"] == index);
        of.filter_map(|call| call["function"]["arguments"].as_str()).collect()
    };
    assert_eq!([told(0), told(1)], ["{\"city\": \"Bern\"}", "{\"city\": \"Ulm\"}"]);
    assert!(calls.len() > 4, "arguments come piece by piece: {calls:?}");
    let begun: Vec<&Value> = calls.iter().filter_map(|call| call.get("id")).collect();
    assert!(begun.len() == 2 && begun[0] != begun[1], "{calls:?}");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn without_parallel_calls_the_first_ends_the_answer() {
    let mut gateway = Gateway::new(|_| says(ANSWER)).await;
    let mut body = body();
    body["parallel_tool_calls"] = false.into();
    let (_, answer) = gateway.ask(CHAT, &body).await;
    assert_eq!(answer["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert!(!gateway.gone().await.1, "the second is not generated");
}

/// Protects: a conversation goes on after a call that was cut off, where the template has a place for what there is of it.
#[tokio::test]
async fn a_call_that_was_cut_off_does_not_end_the_conversation() {
    let cut = |arguments: &str| {
        let mut body = body();
        let call = json!({"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": arguments}});
        body["messages"] = json!([{"role": "user", "content": "Weather?"}, {"role": "assistant", "tool_calls": [call]},
                                  {"role": "tool", "tool_call_id": "c", "content": "no JSON"}]);
        body
    };
    let gateway = Gateway::new(|_| says("I see.")).await;
    let (status, answer) = gateway.ask(CHAT, &cut("{\"city\": \"Be")).await;
    assert_eq!(status, 200, "{answer}");
    let prompt = crate::mock::tokenizer().decode(&gateway.last().tokens, false);
    assert!(prompt.contains(r#""arguments": "{\"city\": \"Be"}"#), "{prompt}");
    // This one goes through arguments by name.
    let config = router::GatewayConfig::new(crate::mock::fixture("minimax_m2"), "tiny", crate::mock::CONTEXT);
    let gateway = Gateway::with(config, |_| says("I see.")).await;
    let (status, answer) = gateway.ask(CHAT, &cut("{\"city\": \"Be")).await;
    let path = "messages[1].tool_calls[0].function.arguments";
    assert_eq!((status, &answer["error"]["param"]), (400, &json!(path)), "{answer}");
    let (status, answer) = gateway.ask(CHAT, &cut("{\"city\": \"Bern\"}")).await;
    assert_eq!(status, 200, "{answer}");
}

#[tokio::test]
async fn without_tools_all_is_text() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let mut body = body();
    body["tool_choice"] = "none".into();
    let (_, answer) = gateway.ask(CHAT, &body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], ANSWER);
    assert_eq!(
        *gateway.last().tokens,
        encode("<|im_start|>user\nWeather in Bern?<|im_end|>\n<|im_start|>assistant\n")
    );
}

#[tokio::test]
async fn a_conversation_with_results_goes_back_to_the_model() {
    let gateway = Gateway::new(|_| says("Sunny.")).await;
    let body = json!({"messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "refusal": null, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"city\":\"Bern\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]});
    assert_eq!(gateway.ask(CHAT, &body).await.0, 200);
    let prompt = crate::mock::tokenizer().decode(&gateway.last().tokens, false);
    let call = "<|im_start|>assistant\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Bern\"}}\n</tool_call><|im_end|>\n";
    let result = "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n";
    assert!(prompt.contains(call) && prompt.contains(result), "{prompt}");
}

#[tokio::test]
async fn a_model_whose_calls_we_cannot_read_refuses_tools() {
    let mut config = crate::mock::config();
    config.tool_parser = Some(None);
    let gateway = Gateway::with(config, |_| says("x")).await;
    let (status, answer) = gateway.ask(CHAT, &body()).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("tools")));
}

#[tokio::test]
async fn reasoning_has_a_place_and_a_count_of_its_own() {
    let gateway = Gateway::new(|_| says("<think>\nHm, hm.\n</think>\n\nYes.")).await;
    let mut body = json!({"messages": [{"role": "user", "content": "Really?"}]});
    let (_, answer) = gateway.ask(CHAT, &body).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm, hm."), &json!("Yes.")));
    let inside = encode("<think>\nHm, hm.\n</think>").len();
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], inside);
    body["stream"] = true.into();
    let chunks = gateway.chunks(CHAT, &body).await;
    let reasoning: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["reasoning_content"].as_str())
        .collect();
    assert_eq!((reasoning.as_str(), content(&chunks).as_str()), ("Hm, hm.", "Yes."));
    body["stream"] = false.into();
    body["include_reasoning"] = false.into();
    let (_, answer) = gateway.ask(CHAT, &body).await;
    assert_eq!(
        answer["choices"][0]["message"],
        json!({"role": "assistant", "content": "Yes.", "refusal": null})
    );
}

#[tokio::test]
async fn the_effort_none_closes_the_thought_in_the_prompt() {
    let gateway = Gateway::new(|_| says("Yes.")).await;
    let body = json!({"messages": [{"role": "user", "content": "?"}], "reasoning_effort": "none"});
    assert_eq!(gateway.ask(CHAT, &body).await.0, 200);
    let prompt = crate::mock::tokenizer().decode(&gateway.last().tokens, false);
    assert!(prompt.ends_with("<think>\n\n</think>\n\n"), "{prompt}");
}

#[tokio::test]
async fn what_is_demanded_reaches_the_cluster_as_a_grammar() {
    let gateway = Gateway::new(|_| says("x")).await;
    let seen = async |more: Value| {
        let mut body = body();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = gateway.ask(CHAT, &body).await;
        assert_eq!(status, 200, "{more}: {answer}");
        gateway.last().grammar.map(|grammar| grammar.to_string())
    };
    assert_eq!(seen(json!({})).await, None, "calls are the model's own affair");
    assert_eq!(seen(json!({"response_format": {"type": "text"}})).await, None);
    for demand in [
        json!({"tool_choice": "required"}),
        json!({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "parallel_tool_calls": false}),
        json!({"tools": [{"type": "function", "function": {"name": "f", "strict": true}}]}),
        json!({"response_format": {"type": "json_object"}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}}),
        json!({"guided_json": "{\"type\": \"integer\"}"}),
        json!({"structured_outputs": {"regex": "[ab]+/"}}),
        json!({"guided_choice": ["yes", "no"]}),
        json!({"guided_grammar": "root ::= \"a\" item*\nitem ::= [b-d]"}),
        json!({"guided_grammar": "start: word\nword: /[a-z]+/"}),
    ] {
        let grammar = seen(demand.clone()).await;
        assert!(grammar.is_some_and(|text| text.starts_with("start: thinking? answer")), "{demand}");
    }
}
