//! Promise: a node that does not belong to the cluster ends with one line that names both values; the cluster goes on.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Cluster, baton, folder, model, output};

/// Runs `baton prefill` with these flags against `cluster` until it is refused; its last line must hold all of `parts`.
fn refused(cluster: &Cluster, model: &Path, flags: &[&str], parts: &[&str]) {
    let model = model.display().to_string();
    // The bundled model's name, so that only what the test changes differs.
    let mut command = baton(&["prefill", "--model", &model, "--served-name=baton-demo", "--log=off"]);
    command.args(flags).env("BATON_CONFIG", cluster.run_file());
    let (ok, _, stderr) = output(&mut command);
    assert!(!ok, "{flags:?} was let in");
    let last = stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("baton: "), "{stderr}");
    for part in parts {
        assert!(last.contains(part), "no {part:?} in: {stderr}");
    }
    assert!(!stderr.contains("panic"), "{stderr}");
}

/// A copy of the bundled model in which `change` was made.
fn changed(name: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let copy = folder(name);
    for entry in fs::read_dir(model()).expect("the bundled model") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("copies");
    }
    change(&copy);
    copy
}

fn edit(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).expect("reads")).expect("JSON");
    edit(&mut json);
    fs::write(path, json.to_string()).expect("writes");
}

#[tokio::test]
async fn a_node_that_does_not_belong() {
    let cluster = Cluster::up(&["--tp=1"]).await;

    refused(&cluster, &model(), &["--dtype=f32"], &["dtype", "f32", "bf16"]);
    refused(&cluster, &model(), &["--served-name=other"], &["model", "other", "baton-demo"]);
    let token = "0".repeat(64);
    let token_file = folder("wrong-token").join("token");
    fs::write(&token_file, token).expect("writes");
    let router = format!("--router={}", cluster.router());
    let token_flag = format!("--token-file={}", token_file.display());
    // Without the cluster's own file, which holds the right token.
    refused_without_file(&model(), &[&router, &token_flag], "wrong cluster token");

    let graph = changed("other-graph", |copy| {
        edit(&copy.join("config.json"), |config| config["rope_theta"] = json!(12345.0));
    });
    refused(&cluster, &graph, &[], &["graph"]);
    let vocab = changed("other-vocab", |copy| {
        edit(&copy.join("tokenizer.json"), |tokenizer| {
            let added = tokenizer["added_tokens"].as_array_mut().expect("special tokens");
            added[0]["content"] = json!("<|other|>");
        });
    });
    refused(&cluster, &vocab, &[], &["vocab"]);
    let weights = changed("other-weights", |copy| {
        let path = copy.join("model.safetensors");
        let mut bytes = fs::read(&path).expect("reads");
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        bytes[header..].iter_mut().for_each(|byte| *byte ^= 1);
        fs::write(&path, bytes).expect("writes");
    });
    refused(&cluster, &weights, &[], &["weights", "--allow-mixed-weights"]);

    let answer =
        cluster.chat(json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4 })).await;
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
}

/// As [`refused`], but with no settings file.
fn refused_without_file(model: &Path, flags: &[&str], part: &str) {
    let mut command = baton(&["prefill", "--served-name=baton-demo", "--log=off", "--model"]);
    let (ok, _, stderr) = output(command.arg(model).args(flags));
    assert!(!ok && stderr.starts_with("baton: ") && stderr.contains(part), "{stderr}");
}

/// Weights that are not there or cut short are named before anything is served.
#[test]
fn damaged_weights_are_named() {
    let refused = |model: &Path, parts: &[&str]| {
        let token = "0".repeat(64);
        let mut command = baton(&["prefill", "--log=off", "--model"]);
        let (ok, _, stderr) = output(command.arg(model).env("BATON_TOKEN", token));
        assert!(!ok && stderr.lines().count() == 1, "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "no {part:?} in: {stderr}");
        }
    };
    let missing = changed("no-weights", |copy| {
        fs::remove_file(copy.join("model.safetensors")).expect("removes");
    });
    refused(&missing, &["safetensors"]);
    let cut = changed("cut-weights", |copy| {
        let file = fs::OpenOptions::new().write(true).open(copy.join("model.safetensors")).expect("opens");
        file.set_len(100_000).expect("cuts");
    });
    refused(&cut, &["model.safetensors"]);
    refused(Path::new("/nowhere"), &["/nowhere"]);
}
