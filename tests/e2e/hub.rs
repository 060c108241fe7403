//! Promise: a model can be named as on the Hugging Face hub; it is fetched once, a killed download goes on, and what is in
//! the cache serves without a network.

#[path = "../../hub/tests/pull/server.rs"]
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Cluster, LOOK, PATIENCE, baton, folder, free_port, model, output};
use server::{Content, Server};

/// The bundled model under another name.
fn hub() -> Server {
    let files =
        fs::read_dir(model()).expect("the bundled model").map(|entry| entry.expect("an entry").path());
    let content = |path: PathBuf| {
        let bytes = fs::read(&path).expect("a file");
        let tag = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, Content { tag, bytes, linked: true })
    };
    let server = Server::start("org/demo", []);
    for (name, content) in files.filter(|path| path.is_file()).map(content) {
        server.put(&name, content);
    }
    server
}

fn with_hub<'c>(command: &'c mut Command, server: &Server, home: &Path) -> &'c mut Command {
    command.env("HF_HOME", home).env("HF_ENDPOINT", &server.endpoint)
}

/// `baton pull`, killed in the middle, run again: the rest is fetched, and the path is all that is printed. Then a whole
/// cluster serves the model by its name with the hub gone.
#[tokio::test]
async fn pulled_killed_pulled_and_served() {
    let (server, home) = (hub(), folder("hub"));
    server.faults(|faults| faults.stall = 1);
    let mut killed = with_hub(&mut baton(&["pull", "org/demo"]), &server, &home)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the executable runs");
    let blobs = home.join("hub/models--org--demo/blobs");
    let begun = Instant::now();
    // Half of a file has come, no more will.
    let half = loop {
        let entries = fs::read_dir(&blobs).into_iter().flatten().flatten();
        let half = entries.filter(|entry| entry.path().extension().is_some_and(|end| end == "incomplete"));
        let arrived =
            half.filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).max().unwrap_or(0);
        if arrived > 0 && server_is_idle(&server) {
            break arrived;
        }
        assert!(begun.elapsed() < PATIENCE, "nothing arrives");
        tokio::time::sleep(LOOK).await;
    };
    killed.kill().expect("kills");
    killed.wait().expect("ends");
    assert!(half > 0);
    server.take_requests();

    let (ok, stdout, stderr) = output(with_hub(&mut baton(&["pull", "org/demo"]), &server, &home));
    assert!(ok, "{stderr}");
    let snapshot = home.join("hub/models--org--demo/snapshots").join(server::COMMIT);
    assert_eq!(stdout, format!("{}\n", snapshot.display()));
    assert!(stderr.contains("org/demo: fetching "), "{stderr}");
    let starts = server.take_starts();
    assert!(starts.iter().any(|start| *start > 0), "nothing went on where it stopped: {starts:?}");
    let (mine, theirs) = (model().join("model.safetensors"), snapshot.join("model.safetensors"));
    assert!(fs::read(mine).expect("reads") == fs::read(theirs).expect("reads"));

    drop(server);
    let home_text = home.display().to_string();
    let cluster = Cluster::up_with(
        &["--model=org/demo", "--tp=1"],
        &[("HF_HOME", &home_text), ("HF_HUB_OFFLINE", "1")],
    )
    .await;
    let answer = cluster
        .chat(json!({ "model": "demo", "messages": [{ "role": "user", "content": "Who are you?" }], "max_tokens": 4 }))
        .await;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    drop(cluster);
    fs::remove_dir_all(home).expect("cleans up");
}

/// Nobody has asked for anything since the last look.
fn server_is_idle(server: &Server) -> bool {
    std::thread::sleep(LOOK * 5);
    server.take_requests().is_empty()
}

/// A model on the hub is described from its headers, the same as from its files; nothing of it is kept. What does not fit is
/// said with its sums, and by the exit status.
#[test]
fn inspected_without_being_fetched() {
    let (server, home) = (hub(), folder("hub-inspect"));
    let here = model().display().to_string();
    let inspect = |what: &str, more: &[&str]| {
        let arguments = [&["inspect", what, "--json", "--context=512"], more].concat();
        let (ok, stdout, stderr) = output(with_hub(&mut baton(&arguments), &server, &home));
        let facts: Value =
            serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
        (ok, facts)
    };
    let (ok, mut local) = inspect(&here, &["--ranks=2", "--memory=1"]);
    let (_, mut remote) = inspect("org/demo", &["--ranks=2", "--memory=1"]);
    assert!(ok, "{local}");
    assert_eq!(local["fetched"], true);
    assert_eq!((remote["fetched"].clone(), remote["commit"].clone()), (json!(false), json!(server::COMMIT)));
    // Every piece of content was asked for by range.
    let content = |request: &server::Request| request.method == "GET" && request.path.starts_with("/cdn/");
    assert!(
        server
            .take_requests()
            .iter()
            .filter(|request| content(request))
            .all(|request| request.range.is_some())
    );
    for facts in [&mut local, &mut remote] {
        let facts = facts.as_object_mut().expect("an object");
        for key in ["model", "commit", "fetched"] {
            facts.remove(key);
        }
    }
    assert_eq!(local, remote);
    assert!(fs::read_dir(&home).expect("a folder").next().is_none(), "something was kept");

    let weights = fs::metadata(model().join("model.safetensors")).expect("weights").len();
    let (total, kv) =
        (local["weight_bytes"].as_u64().expect("bytes"), local["kv"]["token_bytes"].as_u64().expect("bytes"));
    assert!(total < weights && total > weights * 9 / 10, "{total} of {weights}");
    for rank in local["ranks"].as_array().expect("ranks") {
        assert_eq!(rank["kv_bytes"], kv / 2 * 512);
        let bytes = rank["weight_bytes"].as_u64().expect("bytes");
        assert!(bytes > total / 2 && bytes < total, "{bytes} of {total}");
    }
    // What ModelOpt writes beside the configuration is looked at, too.
    let bytes = br#"{"quantization": {"quant_algo": "W4A8_AWQ"}}"#.to_vec();
    server.put("hf_quant_config.json", Content { tag: "f".repeat(64), bytes, linked: true });
    let (ok, _, stderr) = output(with_hub(&mut baton(&["inspect", "org/demo"]), &server, &home));
    assert!(
        !ok && stderr.contains("hf_quant_config.json: quantization.quant_algo: \"W4A8_AWQ\""),
        "{stderr}"
    );
    let (ok, small) = inspect(&here, &["--memory=5MB"]);
    assert!(!ok && small["fits"] == false && small["ranks"][0]["fits"] == false, "{small}");
    let (ok, stdout, _) = output(&mut baton(&["inspect", &here, "--memory=5MB"]));
    assert!(!ok && stdout.contains("does not fit: "), "{stdout}");
    fs::remove_dir_all(home).expect("cleans up");
}

/// What cannot be had is said in one line, by every command that takes a name.
#[test]
fn errors_say_what_to_do() {
    let (server, home) = (hub(), folder("hub-errors"));
    let refused = |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = baton(arguments);
        let (ok, _, stderr) = output(with_hub(&mut command, &server, &home).envs(variables.iter().copied()));
        assert!(!ok, "{arguments:?}");
        let line = stderr.lines().last().unwrap_or_default().to_owned();
        assert!(line.starts_with("baton: ") && !stderr.contains("panicked"), "{stderr}");
        line
    };
    let line = refused(&["pull", "org/other"], &[]);
    assert!(line.contains("org/other is not at http://127.0.0.1:") && line.contains("HF_TOKEN"), "{line}");
    let line = refused(&["pull", "org/demo", "--file=*.gguf"], &[]);
    assert_eq!(line, "baton: org/demo: no file matches *.gguf");
    let port = format!("--port={}", free_port());
    let line = refused(&["up", "--model=org/demo", &port], &[("HF_HUB_OFFLINE", "1")]);
    assert!(
        line.contains(
            "model org/demo (no file or directory of this name is here): org/demo is not in the cache at"
        ),
        "{line}"
    );
    server.faults(|faults| faults.locked = Some(("secret".into(), true)));
    let line = refused(&["pull", "org/demo"], &[("HF_TOKEN", "wrong-token")]);
    assert!(line.contains("org/demo is gated") && !line.contains("wrong-token"), "{line}");
    let (ok, _, stderr) = output(&mut baton(&["pull", "not-a-name"]));
    assert!(!ok && stderr.contains("expected ORG/NAME"), "{stderr}");
    fs::remove_dir_all(home).expect("cleans up");
}
