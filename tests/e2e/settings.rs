//! Promise: a wrong setting ends the command at once, with one line that names it; precedence is as documented.

use std::fs;

use crate::harness::{baton, folder, free_port, model, output};

/// A failing command writes one line, which contains all of `parts`.
fn refused(arguments: &[&str], parts: &[&str]) {
    let (ok, _, stderr) = output(&mut baton(arguments));
    assert!(!ok, "{arguments:?} succeeded");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{arguments:?} does not say {part:?}: {stderr}");
    }
    if stderr.starts_with("baton: ") {
        assert_eq!(stderr.trim_end().lines().count(), 1, "more than a line: {stderr}");
    }
}

#[test]
fn wrong_flags_and_values_are_named() {
    refused(&["up", "--prefil", "2"], &["unexpected argument '--prefil'", "--prefill"]);
    refused(&["up", "--prefill=two"], &["baton: prefill = \"two\" (--prefill): expected a whole number"]);
    refused(&["up", "--tp=0"], &["baton: tp is 0"]);
    refused(&["up", "--model=a", "b"], &["'--model <MODEL>' cannot be used with", "MODEL"]);
    for name in ["", "two\nlines", &"m".repeat(257)] {
        let says = "(--served-name): expected a name of 1 to 256 characters in one line";
        refused(&["up", "--served-name", name], &[says]);
    }
    refused(&["up", "--dtype=int3"], &["dtype", "expected one of bf16, f32"]);
    refused(&["router"], &["model is not set: give --model, BATON_MODEL, or model in baton.toml"]);
    refused(
        &["router", "--model=.", "--host=0.0.0.0"],
        &["refusing to serve 0.0.0.0:8000 without API keys", "baton key create"],
    );
    refused(
        &["router", "--model=.", "--host=0.0.0.0", "--api-key=k"],
        &["refusing to serve 0.0.0.0:8000 in clear", "--tls-self-signed", "--insecure"],
    );
    refused(&["router", "--model=.", "--tls-cert=x"], &["tls-cert and tls-key belong together"]);
    refused(&["decode", "--model=.", "--tp=2", "--rank=2"], &["rank 2 is not below tp 2"]);
    refused(&["decode", "--model=.", "--tp=2"], &["tp 2 needs --leader"]);
    refused(&["up", "--draft-max=0", "--draft-model=m"], &["draft-model with draft-max 0"]);
    refused(&["prefill", "--model=."], &["no cluster token: give --token-file"]);
    refused(&["prefill", "--model=.", "--token=hunter2"], &["64 hex digits", "7 characters"]);
    refused(&["status", "--up=1"], &["no `baton up` runs on port 1"]);
    refused(&["chat", "--url=ftp://x", "hi"], &["ftp://x: expected http://host:port"]);
}

#[test]
fn missing_files_are_named() {
    for arguments in
        [&["up", "--model=qwen3"][..], &["up", "qwen3"], &["inspect", "qwen3"], &["router", "qwen3"]]
    {
        refused(arguments, &["model qwen3: no such file or directory", "named ORG/NAME"]);
    }
    for arguments in [&["up", "."][..], &["inspect", "."]] {
        refused(arguments, &["baton: model .: no config.json and no GGUF file in this directory"]);
    }
    refused(&["up", "--config=/nowhere/baton.toml"], &["cannot read /nowhere/baton.toml"]);
    refused(&["prefill", "--model=.", "--token-file=/nowhere/token"], &["/nowhere/token"]);
    let endless = "cannot read /dev/zero: more than 65536 bytes";
    refused(&["prefill", "--model=.", "--token-file=/dev/zero"], &[endless]);
    refused(&["up", "--config=/dev/zero"], &["cannot read /dev/zero: more than 4194304 bytes"]);
}

#[test]
fn unknown_keys_of_the_file_are_named() {
    let folder = folder("unknown-keys");
    let file = folder.join("mine.toml");
    fs::write(&file, "[decode]\nkv-memry = \"1GiB\"\n").expect("writes");
    let file = file.display().to_string();
    refused(&["decode", "--config", &file], &["unknown key kv-memry in [decode]", &file]);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Flag over environment over file over default, each named in `config show`; secrets are not shown.
#[test]
fn precedence() {
    let folder = folder("precedence");
    let file = folder.join("baton.toml");
    fs::write(&file, "max-batch = 5\nthreads = 3\ndtype = \"f32\"\nmodel = \"m\"\ntoken = \"5ec7e7\"\n")
        .expect("writes");
    let mut command = baton(&["config", "show", "decode", "--max-batch=7", "--kv-memory", "3GiB", "mine"]);
    command.current_dir(&folder).env("BATON_MAX_BATCH", "6").env("BATON_THREADS", "4");
    let (ok, stdout, stderr) = output(&mut command);
    assert!(ok, "{stderr}");
    let line = |key: &str| {
        let line = stdout.lines().find(|line| line.starts_with(&format!("{key} = ")));
        let line = line.unwrap_or_else(|| panic!("no {key} in {stdout}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("max-batch"), "max-batch = 7 # --max-batch");
    assert_eq!(line("kv-memory"), "kv-memory = \"3GiB\" # --kv-memory");
    assert_eq!(line("threads"), "threads = 4 # BATON_THREADS");
    assert_eq!(line("dtype"), "dtype = \"f32\" # baton.toml");
    assert_eq!(line("model"), "model = \"mine\" # --model");
    assert_eq!(line("block-tokens"), "block-tokens = 32 # default");
    assert_eq!(line("# token"), "# token = (set) # baton.toml");
    assert!(!stdout.contains("5ec7e7"), "{stdout}");
    fs::remove_dir_all(folder).expect("cleans up");
}

/// `--help` of every command fits a screen's reading: it exists, names its flags, and succeeds.
#[test]
fn help() {
    for (command, flag) in [
        ("up", "--prefill"),
        ("router", "--disaggregation"),
        ("prefill", "--chunk-tokens"),
        ("decode", "--leader"),
        ("chat", "--temperature"),
        ("status", "--json"),
    ] {
        let (ok, stdout, _) = output(&mut baton(&[command, "--help"]));
        assert!(ok && stdout.contains(flag), "{stdout}");
    }
}

/// What does not fit is refused before it is loaded, with the arithmetic: by a node for its rank, by `up` for all together.
#[test]
fn too_large_models_are_refused() {
    let model = format!("--model={}", model().display());
    let token = format!("--token={}", "5e".repeat(32));
    let sums =
        ["does not fit", " MiB of weights and 9313.2 GiB of KV cache are 9313.2 GiB, this machine has "];
    let large = "--kv-memory=10000GB";
    let mut parts = sums.to_vec();
    parts.push("rank 0 of 1");
    refused(&["prefill", &model, &token, large], &parts);
    parts[2] = "prefill nodes: 1, decode groups: 1 of 2 ranks";
    let port = format!("--port={}", free_port());
    refused(
        &["up", &model, "--kv-memory=3333.3333GB", &port],
        &["does not fit", parts[2], " of KV cache are 9313.2 GiB"],
    );
}
