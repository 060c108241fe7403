//! Promise: `baton chat` talks, one question or a conversation, and says in one line why it cannot.

use std::fs::File;

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
