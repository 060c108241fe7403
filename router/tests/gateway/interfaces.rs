//! The same model behind other interfaces: OpenAI's responses and Anthropic's messages.

use router::inference::{FinishReason, InferenceError};
use serde_json::{Value, json};

use crate::mock::{Gateway, Step, encode, says, script, template_config};

const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";
const ANSWER: &str = "<think>\nHm.\n</think>\n\nLet me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";

fn kinds(items: &Value) -> Vec<&str> {
    items.as_array().unwrap().iter().map(|item| item["type"].as_str().unwrap()).collect()
}

fn prompt(gateway: &Gateway) -> String {
    crate::mock::tokenizer().decode(&gateway.last().tokens, false)
}

/// Names and data of the events of a stream.
async fn events(gateway: &Gateway, path: &str, body: &Value) -> Vec<(String, Value)> {
    let text = gateway.post(path, body).await.text().await.unwrap();
    let event = |event: &str| {
        let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        (name.to_string(), data)
    };
    text.split_terminator("\n\n").map(event).collect()
}

#[tokio::test]
async fn a_response_has_items_and_can_be_gone_on_with() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let tools = json!([{"type": "function", "name": "f", "parameters": {"type": "object"}}]);
    let body = json!({"input": "Hi", "instructions": "Be brief.", "tools": tools, "metadata": {"a": "b"}});
    let (status, first) = gateway.ask(RESPONSES, &body).await;
    assert_eq!(status, 200, "{first}");
    assert_eq!(kinds(&first["output"]), ["reasoning", "message", "function_call"]);
    assert_eq!(first["output"][0]["content"][0]["text"], "Hm.");
    assert_eq!(first["output"][1]["content"][0]["text"], "Let me see.");
    assert_eq!(
        (&first["output"][2]["name"], &first["output"][2]["arguments"]),
        (&json!("f"), &json!("{\"a\": 1}"))
    );
    assert_eq!((&first["status"], &first["metadata"]), (&json!("completed"), &json!({"a": "b"})));
    assert_eq!(first["usage"]["output_tokens"], encode(ANSWER).len() + 1);
    let id = first["id"].as_str().unwrap();
    assert!(id.starts_with("resp_"), "{id}");
    assert_eq!(gateway.get(&format!("{RESPONSES}/{id}")).await.json::<Value>().await.unwrap(), first);
    // A client that waits for events learns that there are none.
    for (query, status) in [("stream=true", 400), ("nonsense=1", 400), ("stream=false", 200)] {
        assert_eq!(gateway.get(&format!("{RESPONSES}/{id}?{query}")).await.status(), status, "{query}");
    }
    let call = &first["output"][2]["call_id"];
    let output = json!([{"type": "function_call_output", "call_id": call, "output": "42"}]);
    let next = json!({"input": output, "previous_response_id": id, "tools": tools, "store": false});
    let (status, second) = gateway.ask(RESPONSES, &next).await;
    assert_eq!((status, &second["previous_response_id"]), (200, &json!(id)), "{second}");
    let prompt = prompt(&gateway);
    assert!(!prompt.contains("Be brief."), "instructions are of one response only: {prompt}");
    for part in ["<|im_start|>user\nHi<|im_end|>", "Let me see.\n<tool_call>", "<tool_response>\n42\n"] {
        assert!(prompt.contains(part), "{part} is not in {prompt}");
    }
    let read = json!({"input": output, "previous_response_id": id, "tools": tools});
    let (_, count) = gateway.ask("/v1/responses/input_tokens", &read).await;
    assert_eq!(
        count,
        json!({"object": "response.input_tokens", "input_tokens": gateway.last().tokens.len()})
    );
    // The second was not to be kept.
    let second = second["id"].as_str().unwrap();
    assert_eq!(gateway.get(&format!("{RESPONSES}/{second}")).await.status(), 404);
    let (status, error) =
        gateway.ask(RESPONSES, &json!({"input": "x", "previous_response_id": second})).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("previous_response_id")));
    let url = format!("{}{RESPONSES}/{id}", gateway.url);
    assert_eq!(gateway.client.delete(&url).send().await.unwrap().status(), 200);
    assert_eq!(gateway.client.delete(&url).send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn a_streamed_response_tells_every_item_and_ends_with_the_whole() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let tools = json!([{"type": "function", "name": "f"}]);
    let events = events(&gateway, RESPONSES, &json!({"input": "Hi", "tools": tools, "stream": true})).await;
    let numbers: Vec<u64> =
        events.iter().map(|(_, data)| data["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let deltas = |kind: &str| -> String {
        let of_kind = events.iter().filter(|(name, _)| name == kind);
        of_kind.map(|(_, data)| data["delta"].as_str().unwrap()).collect()
    };
    assert_eq!(deltas("response.reasoning_text.delta"), "Hm.");
    assert_eq!(deltas("response.output_text.delta"), "Let me see.");
    assert_eq!(deltas("response.function_call_arguments.delta"), "{\"a\": 1}");
    let (first, last) = (&events[0], events.last().unwrap());
    assert_eq!((first.0.as_str(), last.0.as_str()), ("response.created", "response.completed"));
    assert_eq!(kinds(&last.1["response"]["output"]), ["reasoning", "message", "function_call"]);
    let done = events.iter().filter(|(name, _)| name == "response.output_item.done").count();
    assert_eq!(done, 3);
}

/// What was told before a failure, or before there was no more room, is in the response that the last event has; what the
/// answer broke off in is incomplete, and what came before is not.
#[tokio::test]
async fn a_response_that_ends_early_has_what_came_before() {
    let tools = json!([{"type": "function", "name": "f"}]);
    for (told, kind, last) in [
        (
            "<think>\nHm.\n</think>\n\nLet me",
            "message",
            json!([{"type": "output_text", "text": "Let me", "annotations": [], "logprobs": []}]),
        ),
        ("Hi.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\"", "function_call", json!("{\"a\"")),
    ] {
        for (fails, name, status) in
            [(true, "response.failed", "failed"), (false, "response.incomplete", "incomplete")]
        {
            let gateway = Gateway::new(move |_| {
                let mut steps = script(&encode(told), FinishReason::Length);
                if fails {
                    steps.pop();
                    steps.push(Step::Fail(InferenceError::Unavailable("gone".into())));
                }
                steps
            })
            .await;
            let events =
                events(&gateway, RESPONSES, &json!({"input": "Hi", "tools": tools, "stream": true})).await;
            let (event, data) = events.last().unwrap();
            let (response, items) = (&data["response"], data["response"]["output"].as_array().unwrap());
            assert_eq!((event.as_str(), &response["status"]), (name, &json!(status)));
            assert_eq!(response["error"].is_null(), !fails, "{response}");
            assert_eq!(items.len(), 2, "{response}");
            assert_eq!(items[0]["status"], "completed");
            assert_eq!((&items[1]["type"], &items[1]["status"]), (&json!(kind), &json!("incomplete")));
            assert_eq!(items[1].get("content").unwrap_or(&items[1]["arguments"]), &last);
            let done = events.iter().filter(|(name, _)| name == "response.output_item.done");
            let done: Vec<Value> = done.map(|(_, data)| data["item"].clone()).collect();
            assert_eq!(done, items[..2 - usize::from(fails)]);
        }
    }
}

#[tokio::test]
async fn a_message_has_blocks_and_takes_them_back() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let body = json!({
        "model": "tiny", "max_tokens": 100, "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Well.", "signature": ""},
                {"type": "text", "text": "So:"}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 0}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "41"}]},
                {"type": "text", "text": "Again."}]},
        ],
    });
    let (status, answer) = gateway.ask(MESSAGES, &body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(kinds(&answer["content"]), ["thinking", "text", "tool_use"]);
    assert_eq!(
        (&answer["content"][2]["input"], &answer["stop_reason"]),
        (&json!({"a": 1}), &json!("tool_use"))
    );
    let (input, cached) = (&answer["usage"]["input_tokens"], &answer["usage"]["cache_read_input_tokens"]);
    let tokens = gateway.last().tokens.len() as u64;
    assert_eq!(input.as_u64().unwrap() + cached.as_u64().unwrap(), tokens);
    let prompt = prompt(&gateway);
    for part in [
        "Be brief.",
        "So:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 0}}",
        "<tool_response>\n41\n",
        "Again.",
    ] {
        assert!(prompt.contains(part), "{part} is not in {prompt}");
    }
    let (_, count) = gateway
        .ask(
            "/v1/messages/count_tokens",
            &json!({"messages": body["messages"],
        "system": body["system"], "tools": body["tools"]}),
        )
        .await;
    assert_eq!(count, json!({"input_tokens": tokens}));
}

/// Protects: what the assistant has begun to say is gone on with, as Anthropic has it, and where a chat says so.
#[tokio::test]
async fn a_message_that_was_begun_is_gone_on_with() {
    let gateway = Gateway::new(|_| says("fine.")).await;
    let begun = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]);
    let ends = |end: &str| assert!(prompt(&gateway).ends_with(end), "{}", prompt(&gateway));
    let (status, answer) = gateway.ask(MESSAGES, &json!({"max_tokens": 9, "messages": begun})).await;
    assert_eq!((status, &answer["content"][0]["text"]), (200, &json!("fine.")), "{answer}");
    ends("<|im_start|>assistant\nI am");
    let chat = "/v1/chat/completions";
    let (status, answer) =
        gateway.ask(chat, &json!({"messages": begun, "continue_final_message": true})).await;
    assert_eq!((status, &answer["choices"][0]["message"]["content"]), (200, &json!("fine.")), "{answer}");
    ends("<|im_start|>assistant\nI am");
    assert_eq!(gateway.ask(chat, &json!({"messages": begun})).await.0, 200);
    ends("I am<|im_end|>\n<|im_start|>assistant\n");
    for fields in [
        json!({"messages": [begun[0]], "continue_final_message": true}),
        json!({"messages": begun, "continue_final_message": true, "add_generation_prompt": true}),
    ] {
        let (status, answer) = gateway.ask(chat, &fields).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!("continue_final_message")), "{answer}");
    }
}

#[tokio::test]
async fn an_answer_in_a_form_is_asked_for_in_anthropics_words() {
    let gateway = Gateway::new(|_| says("{}")).await;
    let ask = |schema: Value| {
        json!({"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}],
            "output_config": {"format": {"type": "json_schema", "schema": schema}}})
    };
    let (status, answer) = gateway.ask(MESSAGES, &ask(json!({"type": "object"}))).await;
    assert_eq!(status, 200, "{answer}");
    assert!(gateway.last().grammar.is_some());
    let (status, answer) = gateway.ask(MESSAGES, &ask(json!({"type": "nonsense"}))).await;
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(status == 400 && message.contains("'output_config.format.schema'"), "{answer}");
}

#[tokio::test]
async fn a_streamed_message_opens_and_closes_its_blocks() {
    let gateway = Gateway::new(|_| says(ANSWER)).await;
    let body = json!({"max_tokens": 100, "stream": true, "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}]});
    let events = events(&gateway, MESSAGES, &body).await;
    let mut shape: Vec<String> = events
        .iter()
        .map(|(name, data)| match data["delta"]["type"].as_str().or(data["content_block"]["type"].as_str()) {
            Some(kind) => format!("{name} {kind}"),
            None => name.clone(),
        })
        .collect();
    shape.dedup();
    assert_eq!(
        shape,
        [
            "message_start",
            "ping",
            "content_block_start thinking",
            "content_block_delta thinking_delta",
            "content_block_delta signature_delta",
            "content_block_stop",
            "content_block_start text",
            "content_block_delta text_delta",
            "content_block_stop",
            "content_block_start tool_use",
            "content_block_delta input_json_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    let last = &events[events.len() - 2].1;
    assert_eq!(
        (&last["delta"]["stop_reason"], &last["usage"]["output_tokens"]),
        (&json!("tool_use"), &json!(encode(ANSWER).len() + 1))
    );
}

#[tokio::test]
async fn each_interface_refuses_in_its_own_form() {
    let gateway = Gateway::new(|_| says("x")).await;
    let (status, error) =
        gateway.ask(MESSAGES, &json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(
        (status, &error["type"], &error["error"]["type"]),
        (400, &json!("error"), &json!("invalid_request_error"))
    );
    assert!(error["error"]["message"].as_str().unwrap().contains("max_tokens"), "{error}");
    let user = json!([{"role": "user", "content": "x"}]);
    for (path, body, named) in [
        (MESSAGES, json!({"max_tokens": 1, "messages": user, "mood": 1}), "mood"),
        (
            MESSAGES,
            json!({"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            "image",
        ),
        (
            MESSAGES,
            json!({"max_tokens": 1, "messages": user, "tools": [{"type": "web_search_20250305", "name": "w"}]}),
            "web_search",
        ),
        (RESPONSES, json!({}), "input"),
        (RESPONSES, json!({"input": "x", "mood": 1}), "mood"),
        (RESPONSES, json!({"input": "x", "background": true}), "background"),
        (RESPONSES, json!({"input": "x", "tools": [{"type": "web_search"}]}), "web_search"),
        (RESPONSES, json!({"input": [{"type": "item_reference", "id": "x"}]}), "item_reference"),
    ] {
        let (status, error) = gateway.ask(path, &body).await;
        assert_eq!(status, 400, "{body}");
        assert!(error["error"]["message"].as_str().unwrap().contains(named), "{error}");
    }
}

/// Protects: an error names what the client wrote, also where it is found in the chat that is made of that.
#[tokio::test]
async fn what_is_wrong_is_named_as_its_interface_has_it() {
    let gateway = Gateway::new(|_| says("x")).await;
    let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"});
    let tool = json!({"type": "function", "name": "f"});
    let longest = "word ".repeat(2000);
    let user = json!({"role": "user", "content": "x"});
    let format = |format: Value| json!({"input": "x", "text": {"format": format}});
    for (body, param) in [
        (json!({"input": "x", "instructions": longest}), "input"),
        (json!({"input": [user, {"role": "robot", "content": "x"}], "instructions": "x"}), "input[1].role"),
        (json!({"input": [call, {"role": "user", "content": 7}], "instructions": "x"}), "input[1].content"),
        (json!({"input": [{"type": "reasoning"}, {"role": "assistant", "content": 7}]}), "input[1].content"),
        (
            json!({"input": [user, {"type": "function_call_output", "call_id": "c", "output": 7}]}),
            "input[1].output",
        ),
        (json!({"input": "x", "tools": [tool, {"type": "function"}]}), "tools[1].name"),
        (json!({"input": "x", "tools": [{"type": "function", "name": "a b"}]}), "tools[0].name"),
        (
            json!({"input": "x", "tools": [{"type": "function", "name": "f", "parameters": 7}]}),
            "tools[0].parameters",
        ),
        (json!({"input": "x", "tools": [tool], "tool_choice": {"type": "function"}}), "tool_choice.name"),
        (
            json!({"input": "x", "tools": [tool], "tool_choice": {"type": "function", "name": "g"}}),
            "tool_choice.name",
        ),
        (
            json!({"input": "x", "tools": [tool],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}}),
            "tool_choice.tools[0].name",
        ),
        (json!({"input": "x", "reasoning": {"effort": "some"}}), "reasoning.effort"),
        (json!({"input": "x", "max_output_tokens": 10_000}), "input"),
        (format(json!({})), "text.format.type"),
        (format(json!({"type": "yaml"})), "text.format.type"),
        (format(json!({"type": "json_object", "name": "n"})), "text.format.name"),
        (format(json!({"type": "json_schema", "schema": {}})), "text.format.name"),
        (format(json!({"type": "json_schema", "name": "n"})), "text.format.schema"),
        (format(json!({"type": "json_schema", "name": "n", "schema": {"type": "x"}})), "text.format.schema"),
        (format(json!({"type": "json_schema", "name": "n", "schema": {}, "mood": 1})), "text.format.mood"),
        (
            json!({"input": "x", "text": {"format": {"type": "json_object"}}, "guided_regex": "x"}),
            "guided_regex",
        ),
    ] {
        let (status, error) = gateway.ask(RESPONSES, &body).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(param)), "{body} {error}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(
            error["error"]["code"] == "context_length_exceeded" || message.contains(&format!("'{param}'")),
            "{error}"
        );
    }
    let ask = |fields: Value| {
        let mut body = json!({"max_tokens": 9, "system": "Be brief.", "messages": [user]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": 7});
    let text = json!({"type": "text", "text": "x"});
    let tool = json!({"name": "f", "input_schema": {}});
    for (fields, named) in [
        (json!({"system": 7}), "'system'"),
        (json!({"system": [text, {"type": "image"}]}), "'system[1].type'"),
        (json!({"messages": [user, {"role": "user", "content": 7}]}), "'messages[1].content'"),
        (
            json!({"messages": [user, {"role": "user", "content": [text, result]}]}),
            "'messages[1].content[1].content'",
        ),
        (json!({"tools": [{"name": "f", "input_schema": 7}]}), "'tools[0].input_schema'"),
        (json!({"tools": [{"name": "a b", "input_schema": {}}]}), "'tools[0].name'"),
        (json!({"tools": [tool], "tool_choice": {"type": "tool", "name": "g"}}), "'tool_choice.name'"),
        (json!({"stop_sequences": ["x", ""]}), "'stop_sequences[1]'"),
        (json!({"output_config": {"effort": "some"}}), "'output_config.effort'"),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": 7}}}),
            "'output_config.format.schema'",
        ),
    ] {
        let (status, error) = gateway.ask(MESSAGES, &ask(fields)).await;
        let message = error["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(named), "{named}: {error}");
    }
}

/// Protects: an item is named also where only a template finds out.
#[tokio::test]
async fn a_call_that_a_template_cannot_print_is_named() {
    let template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x.y }}{% endfor %}{% endfor %}";
    let gateway = Gateway::with(template_config("calls", template), |_| says("x")).await;
    let call = |arguments: &str| json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments});
    let body = json!({"instructions": "x", "input": [{"role": "user", "content": "x"}, call("{\"x\": {}}"), call("{\"x")]});
    let (status, error) = gateway.ask(RESPONSES, &body).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("input[2].arguments")), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("'input[2].arguments'"), "{error}");
}

/// Protects: how hard to think is asked for in every interface, and refused in its words where that has no effect.
#[tokio::test]
async fn effort_has_a_name_in_every_interface() {
    let respond = |effort: &str| (RESPONSES, json!({"input": "x", "reasoning": {"effort": effort}}));
    let message = |fields: Value| {
        let mut body = json!({"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        (MESSAGES, body)
    };
    let output = |effort: &str| json!({"output_config": {"effort": effort}});
    let both =
        |kind: &str, effort: &str| json!({"thinking": {"type": kind}, "output_config": {"effort": effort}});
    let knows = Gateway::with(template_config("effort", "{{ reasoning_effort }}"), |_| says("x")).await;
    let plain = Gateway::with(template_config("plain", "x"), |_| says("x")).await;
    for ((path, body), effort, param) in [
        (respond("high"), "high", "reasoning.effort"),
        (message(output("low")), "low", "output_config.effort"),
        (message(output("max")), "xhigh", "output_config.effort"),
        (message(both("adaptive", "medium")), "medium", "output_config.effort"),
        (message(both("enabled", "low")), "low", "output_config.effort"),
        (message(json!({"thinking": {"type": "enabled"}})), "high", "thinking"),
        (message(both("disabled", "low")), "none", ""),
    ] {
        assert_eq!(knows.ask(path, &body).await.0, 200, "{body}");
        assert_eq!(prompt(&knows), effort, "{body}");
        let (status, answer) = plain.ask(path, &body).await;
        // What does not think gives what "none" asks for.
        assert_eq!(status, if effort == "none" { 200 } else { 400 }, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(&format!("'{param}' has no effect")) || status == 200, "{answer}");
    }
    let count = json!({"messages": [{"role": "user", "content": "x"}], "output_config": {"effort": "low"}});
    let (status, answer) = knows.ask("/v1/messages/count_tokens", &count).await;
    assert_eq!((status, &answer["input_tokens"]), (200, &json!(encode("low").len())), "{answer}");
}

#[tokio::test]
async fn a_text_format_is_a_grammar() {
    let gateway = Gateway::new(|_| says("{}")).await;
    let format = json!({"type": "json_schema", "name": "n", "strict": true, "schema": {"type": "object"}});
    let (status, answer) = gateway.ask(RESPONSES, &json!({"input": "x", "text": {"format": format}})).await;
    assert_eq!((status, &answer["text"]["format"]), (200, &format));
    assert!(gateway.last().grammar.is_some());
    let (status, _) = gateway.ask(RESPONSES, &json!({"input": "x", "guided_regex": "[a-z]+"})).await;
    assert_eq!((status, gateway.last().grammar.is_some()), (200, true), "vLLM's words hold here, too");
    let count = json!({"input": "x", "text": {"format": format}});
    assert_eq!(gateway.ask("/v1/responses/input_tokens", &count).await.0, 200);
}
