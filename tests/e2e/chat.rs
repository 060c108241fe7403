//! Promise: `baton chat` talks, one question or a conversation, and says in one line why it cannot.

use std::fs::File;

use serde_json::{Value, json};

use crate::client::MODEL;
use crate::harness::{Cluster, baton, folder, free_port, output};

/// A conversation from a pipe: an answer for each line until `/exit`; what follows is not asked.
#[tokio::test]
async fn a_conversation() {
    let cluster = Cluster::up(&["--tp=1"]).await;
    let folder = folder("conversation");
    let lines = folder.join("lines");
    std::fs::write(&lines, "Who are you?\n\nWhat is baton?\n/exit\nHello\n").expect("writes");
    let url = cluster.url("");
    let mut command = baton(&["chat", "--url", &url, "--temperature=0", "--max-tokens=16"]);
    command.stdin(File::open(&lines).expect("opens"));
    let (ok, said, stderr) = output(&mut command);
    assert!(ok, "{stderr}");
    assert!(said.lines().count() >= 2, "{said}");
    let asked = cluster.metric("baton_http_responses_total", "path=\"/v1/chat/completions\"").await;
    assert_eq!(asked, 2.0);
    // What is no text is not passed over.
    std::fs::write(&lines, b"caf\xe9\n").expect("writes");
    let mut command = baton(&["chat", "--url", &url]);
    let (ok, said, stderr) = output(command.stdin(File::open(&lines).expect("opens")));
    assert!(!ok && said.is_empty() && stderr.starts_with("baton: cannot read standard input: "), "{stderr}");

    // A model that does not think is asked for nothing by "none", and for what it cannot do by more.
    let ask = json!({ "model": MODEL, "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 2 });
    let with = |name: &str, value: Value| {
        let mut ask = ask.clone();
        ask[name] = value;
        ask
    };
    let (chats, messages) = ("/v1/chat/completions", "/v1/messages");
    let thinking = |kind: &str| with("thinking", json!({ "type": kind }));
    assert_eq!(cluster.post(chats, &with("reasoning_effort", json!("none"))).await.0, 200);
    assert_eq!(cluster.post(messages, &thinking("disabled")).await.0, 200);
    let (status, refused) = cluster.post(chats, &with("reasoning_effort", json!("low"))).await;
    assert_eq!((status, &refused["error"]["param"]), (400, &json!("reasoning_effort")));
    let (status, refused) = cluster.post(messages, &thinking("enabled")).await;
    let message = refused["error"]["message"].as_str().unwrap_or_default();
    assert!(status == 400 && message.contains("'thinking'"), "{refused}");

    let (ok, said, stderr) = output(&mut baton(&["chat", "--url", &url, "--model=gpt", "Hello"]));
    assert!(!ok && said.is_empty());
    assert!(stderr.starts_with("baton: ") && stderr.contains("gpt"), "{stderr}");
    std::fs::remove_dir_all(folder).expect("cleans up");
}

#[test]
fn nobody_there() {
    let url = format!("http://127.0.0.1:{}", free_port());
    let (ok, _, stderr) = output(&mut baton(&["chat", "--url", &url, "Hello"]));
    assert!(!ok);
    assert_eq!(stderr, format!("baton: {url}: nobody answers there (is `baton up` running?)\n"));
}
