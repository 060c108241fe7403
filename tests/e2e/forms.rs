//! The form that a client demands of an answer holds, whoever computes it.

use serde_json::{Value, json};

use crate::harness::{Cluster, text_of};

/// The group dies in the middle of an answer that must be JSON of a schema: what goes on elsewhere goes on within the form.
#[tokio::test]
async fn json_stays_json_when_its_node_dies() {
    let cluster = Cluster::up(&["--tp=1"]).await;
    let row = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 100, "maximum": 999},
        "ok": {"type": "boolean"}}, "required": ["n", "ok"], "additionalProperties": false});
    let schema = json!({"type": "array", "items": row, "minItems": 20, "maxItems": 20});
    let body = json!({
        "messages": [{"role": "user", "content": "Numbers, please."}], "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "rows", "strict": true, "schema": schema}},
    });
    let mut stream = cluster.chat_begin(body).await;
    let mut events = Vec::new();
    // The role, and the first pieces of the answer.
    for _ in 0..6 {
        events.push(stream.next().await.expect("an event"));
    }
    cluster.kill("decode-0.0");
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    assert_eq!(events.last().expect("an end")["choices"][0]["finish_reason"], "stop");
    let rows: Value = serde_json::from_str(&text_of(&events)).expect("JSON");
    let rows = rows.as_array().expect("a list");
    assert_eq!(rows.len(), 20);
    for row in rows {
        assert!(
            row["n"].as_u64().is_some_and(|n| (100..=999).contains(&n)) && row["ok"].is_boolean(),
            "{row}"
        );
    }
    assert!(cluster.migrations("").await >= 1.0, "the node died too late");
}
