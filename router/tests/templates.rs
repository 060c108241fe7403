//! Constructs of real chat templates render as Hugging Face renders them. `fixtures/templates.json` holds what Jinja2 3.1 with
//! the settings and filters of transformers made of them.

use std::time::SystemTime;

use router::text::{Conversation, TemplateError, Templates};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct File {
    messages: Vec<Value>,
    tools: Vec<Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    source: String,
    variables: Map<String, Value>,
    rendered: Option<String>,
    raised: Option<String>,
}

#[test]
fn constructs_of_real_templates() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/templates.json");
    let file = std::fs::read(path).expect("a fixture");
    let file: File = serde_json::from_slice(&file).expect("a fixture");
    let specials = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().cloned().unwrap_or_default();
    let mut wrong = Vec::new();
    for case in file.cases {
        let conversation = Conversation {
            messages: file.messages.clone(),
            tools: file.tools.clone(),
            add_generation_prompt: true,
            continues: false,
            variables: case.variables,
        };
        let got = Templates::new(vec![("default".into(), case.source.clone())], specials.clone())
            .and_then(|templates| templates.render(conversation, SystemTime::UNIX_EPOCH, 1 << 20));
        let right = match (&case.rendered, &case.raised) {
            (Some(rendered), _) => got.as_ref() == Ok(rendered),
            (_, Some(raised)) => got.as_ref() == Err(&TemplateError::Raised(raised.clone())),
            _ => got.is_err(),
        };
        if !right {
            let want = case.rendered.or(case.raised);
            wrong.push(format!("{}\n got  {got:?}\n want {want:?}", case.source));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
