//! Promise: `baton batch` has every line of a file answered, in its order, whoever dies meanwhile.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::builder;
use crate::harness::{Cluster, PATIENCE, baton, folder, output, signal};
use crate::parts::Parts;

/// Runs `baton batch` with these arguments: (succeeded, standard output, standard error).
fn batch(url: &str, arguments: &[&str]) -> (bool, String, String) {
    output(baton(&["batch"]).args(arguments).args(["--url", url]))
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("reads");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// `count` completions of a few tokens each, and what their ids are.
fn input(path: &Path, count: usize) {
    let line = |i: usize| {
        let body = json!({ "model": "baton-demo", "prompt": format!("Line {i}:"), "max_tokens": 8, "temperature": 0 });
        json!({ "custom_id": format!("id-{i}"), "method": "POST", "url": "/v1/completions", "body": body })
    };
    let text: String = (0..count).map(|i| format!("{}\n", line(i))).collect();
    fs::write(path, text).expect("writes");
}

/// Ctrl-C while the lines go to a server, here one that never answers, ends the command and leaves no file of its own.
#[test]
fn ctrl_c_in_the_upload_leaves_nothing() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let url = format!("http://{}", server.local_addr().expect("an address"));
    let folder = folder("interrupted");
    fs::write(folder.join("prompts"), "Who are you?\n").expect("writes");
    for arguments in [&["run", "-i", "prompts", "-o", "answers"][..], &["submit", "prompts"]] {
        let mut command = baton(&["batch"]);
        command
            .args(arguments)
            .args(["--model=m", "--url", &url])
            .current_dir(&folder)
            .env("TMPDIR", &folder);
        let child = command.stderr(Stdio::piped()).spawn().expect("the executable runs");
        // Connected: the file has been made.
        let held = server.accept().expect("a client");
        assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 2, "{arguments:?}");
        signal(child.id(), libc::SIGINT);
        let ended = child.wait_with_output().expect("ends");
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "baton: interrupted\n");
        assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 1, "{arguments:?}");
        drop(held);
    }
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Ctrl-C is heard while a long input is read, whose end would be refused.
#[test]
fn ctrl_c_is_heard_while_an_input_is_read() {
    let folder = folder("interrupted-reading");
    fs::write(folder.join("long"), format!("{{\"prompt\": \"x\"}}\n{}x", "\n".repeat(64 << 20)))
        .expect("writes");
    let files = || fs::read_dir(&folder).expect("a folder").count();
    for arguments in [&["run", "-i", "long", "-o", "answers"][..], &["submit", "long"]] {
        let mut command = baton(&["batch"]);
        command
            .args(arguments)
            .args(["--model=m", "--url=http://127.0.0.1:9"])
            .current_dir(&folder)
            .env("TMPDIR", &folder);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the executable runs");
        wait_until("the lines are on their way", || {
            fs::read_dir(&folder).expect("a folder").flatten().any(|file| {
                let name = file.file_name().to_string_lossy().into_owned();
                name == "answers.asked" || name.starts_with("baton-batch-")
            })
        });
        signal(child.id(), libc::SIGINT);
        wait_until("the command ends", || child.try_wait().expect("waits").is_some());
        let ended = child.wait_with_output().expect("ends");
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "baton: interrupted\n", "{arguments:?}");
        assert_eq!(files(), 1, "{arguments:?}");
    }
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Nothing is asked for whose answers could not be kept, and no pipe is read, which could not be read again.
#[test]
fn what_cannot_be_kept_is_not_asked_for() {
    let folder = folder("unkept");
    input(&folder.join("lines"), 1);
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    server.set_nonblocking(true).expect("a socket");
    let url = format!("http://{}", server.local_addr().expect("an address"));
    for (from, to, part) in [
        ("lines", "nowhere/answers", "cannot write nowhere/answers.part: No such file"),
        ("lines", ".", ". is no file"),
        ("lines", "/dev/null", "/dev/null is no file"),
        ("/dev/null", "answers", "/dev/null is no file"),
    ] {
        let run = ["batch", "run", "-i", from, "-o", to, "--url", &url];
        let (ok, _, stderr) = output(baton(&run).current_dir(&folder));
        assert!(!ok && stderr.contains(part), "{stderr}");
        assert!(server.accept().is_err(), "{to}: something was asked for");
    }
    assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 1);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Relays connections to `server`. The answer to what begins a batch is withheld once, and told to the channel.
fn withholding(server: SocketAddr) -> (String, mpsc::Receiver<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let (told, answered) = mpsc::channel();
    let withhold = Arc::new(AtomicBool::new(true));
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let server = TcpStream::connect(server).expect("the server");
            let (mut asks, mut hears) =
                (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
            let (mut client, mut server, told) = (client, server, told.clone());
            let (begins, withhold) = (Arc::new(AtomicBool::new(false)), withhold.clone());
            let begin = begins.clone();
            thread::spawn(move || {
                let mut piece = [0; 4096];
                while let Ok(read @ 1..) = asks.read(&mut piece) {
                    begin.fetch_or(piece[..read].starts_with(b"POST /v1/batches "), Ordering::SeqCst);
                    server.write_all(&piece[..read]).expect("the server reads");
                }
            });
            thread::spawn(move || {
                let mut piece = [0; 4096];
                while let Ok(read @ 1..) = hears.read(&mut piece) {
                    if begins.load(Ordering::SeqCst) && withhold.swap(false, Ordering::SeqCst) {
                        return told.send(()).expect("the test waits");
                    }
                    if client.write_all(&piece[..read]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (url, answered)
}

/// Killed when its batch has begun and before it knows, the same command finds it and asks for nothing twice.
#[tokio::test]
async fn a_batch_that_nobody_heard_of_is_found() {
    let folder = folder("batch-unheard");
    let mut parts = Parts::router(&["--disaggregation=never"]);
    parts.decode("d", 1, &[]);
    parts.wait_until_ready(&["d.0"]).await;
    input(&folder.join("in"), 3);
    let server =
        parts.url("").trim_start_matches("http://").trim_end_matches('/').parse().expect("an address");
    let (url, answered) = withholding(server);
    let run = ["batch", "run", "-i", "in", "-o", "out", "--url", &url];
    let mut child = baton(&run).current_dir(&folder).spawn().expect("the executable runs");
    answered.recv_timeout(PATIENCE).expect("a batch");
    child.kill().expect("runs");
    child.wait().expect("ends");
    let (ok, _, stderr) = output(baton(&run).current_dir(&folder));
    assert!(ok && stderr.contains("going on with batch_"), "{stderr}");
    assert_eq!(lines(&folder.join("out")).len(), 3);
    let (_, list, _) = batch(&url, &["list"]);
    assert_eq!(list.lines().count(), 1, "{list}");
    assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 2, "no file is left");
    drop(parts);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Fails the test when it is not so for too long.
fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Prompts become answers in their order; what is there is not asked again, what was refused is; and the single steps do the
/// same.
#[tokio::test]
async fn a_file_is_answered() {
    let cluster = Cluster::up(&["--tp=1"]).await;
    let url = cluster.url("");
    let folder = folder("batch");
    let (prompts, answers) = (folder.join("prompts.txt"), folder.join("answers.jsonl"));
    let (input_path, answers_path) = (prompts.display().to_string(), answers.display().to_string());
    fs::write(&prompts, "Who are you?\n\nWhat is baton?\nHello\n").expect("writes");
    let run = ["run", "-i", &input_path, "-o", &answers_path, "--max-tokens=8", "--temperature=0"];
    let (ok, _, stderr) = batch(&url, &run);
    assert!(ok && stderr.contains("completed: 3 of 3 lines"), "{stderr}");
    let got = lines(&answers);
    let ids = |lines: &[Value]| -> Vec<String> {
        lines.iter().map(|line| line["custom_id"].as_str().expect("an id").to_owned()).collect()
    };
    let whole = ids(&got);
    let begins = ["line-1-", "line-3-", "line-4-"];
    assert!(
        whole.len() == 3 && whole.iter().zip(begins).all(|(id, begin)| id.starts_with(begin)),
        "{whole:?}"
    );
    assert!(got.iter().all(|line| line["response"]["body"]["choices"][0]["message"]["content"].is_string()));
    // Whose lines are refused learns why.
    let none = folder.join("none.jsonl").display().to_string();
    let (ok, _, stderr) = batch(&url, &["run", "-i", &input_path, "-o", &none, "--max-tokens=0"]);
    assert!(!ok && stderr.contains("0 of 3 lines") && stderr.contains("'max_tokens'"), "{stderr}");
    let asked = cluster.metric("baton_batch_lines_total", "").await;
    let (ok, _, stderr) = batch(&url, &run);
    assert!(ok && stderr.contains("all lines are answered already"), "{stderr}");
    // What is no file of answers is not written over.
    for (path, part) in [(&prompts, "is the input"), (&folder.join("notes.txt"), "holds no answers")] {
        fs::write(folder.join("notes.txt"), "mine\n").expect("writes");
        let kept = fs::read_to_string(path).expect("reads");
        let (ok, _, stderr) = batch(&url, &["run", "-i", &input_path, "-o", &path.display().to_string()]);
        assert!(!ok && stderr.contains(part), "{stderr}");
        assert_eq!(fs::read_to_string(path).expect("reads"), kept);
    }
    // One answer is lost: one line is asked again, and the file is whole again.
    let text = fs::read_to_string(&answers).expect("reads");
    let without: Vec<&str> = text.lines().filter(|line| !line.contains("line-3")).collect();
    fs::write(&answers, without.join("\n") + "\n{\"custom_id\": \"li").expect("writes");
    let (ok, _, stderr) = batch(&url, &run);
    assert!(ok, "{stderr}");
    assert_eq!(cluster.metric("baton_batch_lines_total", "").await, asked + 1.0);
    assert_eq!(ids(&lines(&answers)), whole);
    // A prompt was changed: its answer is asked for anew, and the one to what it was is gone.
    fs::write(&prompts, "Who are you?\n\nTell me a story.\nHello\n").expect("writes");
    let (ok, _, stderr) = batch(&url, &run);
    assert!(ok, "{stderr}");
    assert_eq!(cluster.metric("baton_batch_lines_total", "").await, asked + 2.0);
    let changed = ids(&lines(&answers));
    assert!(changed.len() == 3 && changed[1] != whole[1] && changed[2] == whole[2], "{changed:?}");

    // Step by step; a line that cannot be served shows in the exit code and in the results.
    let two = folder.join("two.jsonl");
    input(&two, 2);
    let text = fs::read_to_string(&two).expect("reads").replacen("\"max_tokens\":8", "\"max_tokens\":0.5", 1);
    fs::write(&two, text).expect("writes");
    let (ok, id, stderr) = batch(&url, &["submit", &two.display().to_string()]);
    assert!(ok && id.starts_with("batch_"), "{stderr}");
    let id = id.trim();
    let (ok, shown, _) = batch(&url, &["status", id, "--wait"]);
    assert!(!ok && shown.contains("completed") && shown.contains("1 of 2, 1 failed"), "{shown}");
    let (ok, results, _) = batch(&url, &["results", id]);
    assert!(!ok && results.lines().count() == 2 && results.contains("max_tokens"), "{results}");
    let (ok, list, _) = batch(&url, &["list"]);
    assert!(ok && list.lines().next().is_some_and(|line| line.contains(id)), "{list}");
    // Nothing that is no id becomes part of an address.
    let (ok, _, stderr) = batch(&url, &["status", "../models"]);
    assert!(!ok && stderr.contains("a batch's id is"), "{stderr}");
    let (ok, _, stderr) = batch(&url, &["cancel", id]);
    assert!(!ok && stderr.contains("completed"), "{stderr}");
    fs::write(&two, "{\"custom_id\": 1, \"url\": \"/v1/completions\", \"body\": {}}\n").expect("writes");
    let (ok, _, stderr) = batch(&url, &["submit", &two.display().to_string(), "--wait"]);
    assert!(!ok && stderr.contains("custom_id"), "{stderr}");
    // Where nothing is asked no file is made. A byte order mark is no part of the first line.
    input(&two, 1);
    let (line, nothing) = (fs::read_to_string(&two).expect("reads"), folder.join("nothing.jsonl"));
    let run = ["run", "-i", &two.display().to_string(), "-o", &nothing.display().to_string()];
    fs::write(&two, line.repeat(2)).expect("writes");
    let (ok, _, stderr) = batch(&url, &run);
    assert!(!ok && stderr.contains("line 2: The custom_id \"id-0\"") && !nothing.exists(), "{stderr}");
    fs::write(&two, format!("\u{feff}{line}")).expect("writes");
    let (ok, _, stderr) = batch(&url, &run);
    assert!(ok && lines(&nothing)[0]["custom_id"] == "id-0", "{stderr}");
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Lines of the newest batch that have answers; none while the router is away.
async fn answered(parts: &Parts) -> usize {
    let asked = builder().build().expect("a client").get(parts.url("/v1/batches?limit=1")).send().await;
    let Ok(answer) = asked else { return 0 };
    let list: Value = answer.json().await.unwrap_or_default();
    list["data"][0]["request_counts"]["completed"].as_u64().unwrap_or(0) as usize
}

/// The router is killed again and again while a batch runs: `baton batch run` waits for it, and every line is answered once, as
/// it would have been.
#[tokio::test]
async fn a_batch_survives_its_router() {
    const LINES: usize = 240;
    const KILLS: usize = 6;
    let folder = folder("batch-kills");
    let kept = folder.join("kept").display().to_string();
    let mut parts = Parts::router(&["--disaggregation=never", &format!("--batch-dir={kept}")]);
    parts.decode("d", 1, &[]);
    parts.wait_until_ready(&["d.0"]).await;
    let (input_path, answers) = (folder.join("in.jsonl"), folder.join("out.jsonl"));
    input(&input_path, LINES);
    let url = parts.url("");
    let (of, to) = (input_path.display().to_string(), answers.display().to_string());
    let run = tokio::task::spawn_blocking(move || batch(&url, &["run", "-i", &of, "-o", &to]));
    let mut hits = 0;
    for kill in 0..KILLS {
        while !run.is_finished() && answered(&parts).await <= kill * LINES / KILLS {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if run.is_finished() {
            break;
        }
        parts.kill("router");
        parts.restart("router");
        hits += 1;
    }
    let (ok, _, stderr) = tokio::time::timeout(PATIENCE, run).await.expect("ends").expect("runs");
    assert!(ok && hits > 0, "{hits} kills: {stderr}\n{}", parts.log());
    let got = lines(&answers);
    let ids: Vec<_> = got.iter().map(|line| line["custom_id"].as_str().expect("an id").to_owned()).collect();
    assert_eq!(ids, (0..LINES).map(|i| format!("id-{i}")).collect::<Vec<_>>());
    // The same as over HTTP: the model is greedy.
    parts.wait_until_ready(&["d.0"]).await;
    let text = |line: &Value| line["response"]["body"]["choices"][0]["text"].clone();
    for i in [0, LINES - 1] {
        let body = json!({ "prompt": format!("Line {i}:"), "max_tokens": 8, "temperature": 0 });
        assert_eq!(text(&got[i]), parts.complete(&body).await["text"], "line {i}");
    }
    drop(parts);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Sets how large files of a process may be; beyond, its disk is full. `None`: as large as they like.
#[cfg(target_os = "linux")]
fn room(pid: u32, bytes: Option<u64>) {
    let limit =
        libc::rlimit { rlim_cur: bytes.unwrap_or(libc::RLIM_INFINITY), rlim_max: libc::RLIM_INFINITY };
    // SAFETY: reads one struct; changes a limit of another process.
    let set = unsafe { libc::prlimit(pid as libc::pid_t, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// A disk without room: clients hear 507 and nothing else is lost; a batch that runs says what it waits for, and goes on by itself.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_is_said_and_passes() {
    const LINES: usize = 300;
    let folder = folder("batch-full");
    let kept = folder.join("kept").display().to_string();
    let mut parts = Parts::router(&["--disaggregation=never", &format!("--batch-dir={kept}")]);
    parts.decode("d", 1, &[]);
    parts.wait_until_ready(&["d.0"]).await;
    let path = folder.join("in.jsonl");
    input(&path, LINES);
    let lines_text = fs::read_to_string(&path).expect("reads");
    let (status, file) = parts.upload(&lines_text).await;
    assert_eq!(status, 200, "{file}");
    let file = file["id"].as_str().expect("an id");
    let router = parts.pid("router");

    // Below all that is there: nothing can be written.
    room(router, Some(1024));
    for _ in 0..2 {
        let (status, error) = parts.upload(&lines_text).await;
        assert_eq!((status, &error["error"]["code"]), (507, &json!("insufficient_storage")), "{error}");
        let (status, error) = parts.begin_batch(file).await;
        assert_eq!((status, &error["error"]["code"]), (507, &json!("insufficient_storage")), "{error}");
    }
    // Reading goes on, and so do other requests.
    let (status, content) = parts.get(&format!("/v1/files/{file}/content")).await;
    assert_eq!((status, content.as_str()), (200, lines_text.as_str()));
    parts.complete(&json!({ "prompt": "a", "max_tokens": 1 })).await;

    room(router, None);
    let (status, batch) = parts.begin_batch(file).await;
    assert_eq!(status, 200, "{batch}");
    let id = batch["id"].as_str().expect("an id").to_owned();
    let until = async |what: &str, is_so: &dyn Fn(&Value) -> bool| {
        let begun = std::time::Instant::now();
        loop {
            let batch = parts.batch(&id).await;
            if is_so(&batch) {
                return batch;
            }
            assert!(begun.elapsed() < PATIENCE, "not {what}: {batch}\n{}", parts.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let completed = |batch: &Value| batch["request_counts"]["completed"].as_u64().unwrap_or(0) as usize;
    until("begun", &|batch| completed(batch) > 0).await;
    room(router, Some(1024));
    let stuck = until("stuck", &|batch| {
        batch["baton_waits_for"].as_str().is_some_and(|why| why.contains("disk is full"))
    })
    .await;
    assert!(completed(&stuck) < LINES, "{stuck}");
    room(router, None);
    let ended = until("completed", &|batch| batch["status"] == "completed").await;
    assert_eq!(completed(&ended), LINES, "{ended}");
    let output = ended["output_file_id"].as_str().expect("an output file");
    let (_, text) = parts.get(&format!("/v1/files/{output}/content")).await;
    let mut ids: Vec<String> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["custom_id"].as_str().expect("an id").into()
        })
        .collect();
    ids.sort();
    let mut wanted: Vec<_> = (0..LINES).map(|i| format!("id-{i}")).collect();
    wanted.sort();
    assert_eq!(ids, wanted);
    drop(parts);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Most memory that a process ever had, in bytes.
#[cfg(target_os = "linux")]
fn memory_most(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a number");
    line.trim_end_matches("kB").trim().parse::<u64>().expect("kB") << 10
}

/// A file larger than anything that the router may hold goes to the disk as it comes, and back as it is read.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn large_files_are_streamed() {
    const BYTES: usize = 160 << 20;
    const HELD: u64 = 48 << 20;
    let folder = folder("batch-large");
    let kept = folder.join("kept").display().to_string();
    let mut parts = Parts::router(&[&format!("--batch-dir={kept}")]);
    let begun = std::time::Instant::now();
    while !parts.is_ok("/v1/models").await {
        assert!(begun.elapsed() < PATIENCE, "no router:\n{}", parts.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (status, small) = parts.upload("{}\n").await;
    assert_eq!(status, 200, "{small}");
    let router = parts.pid("router");
    let before = memory_most(router);
    let line = format!("{}\n", "x".repeat(1023));
    let text = line.repeat(BYTES / line.len());
    let (status, file) = parts.upload(&text).await;
    assert_eq!((status, file["bytes"].as_u64()), (200, Some(BYTES as u64)), "{file}");
    let path = format!("/v1/files/{}/content", file["id"].as_str().expect("an id"));
    let (status, content) = parts.get(&path).await;
    assert!(status == 200 && content == text, "{status}, {} bytes", content.len());
    let grown = memory_most(router) - before;
    assert!(grown < HELD, "{} MiB more for a file of {} MiB", grown >> 20, BYTES >> 20);
    drop(parts);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// A router that makes its own certificate is trusted by clients on its machine, without a word.
#[tokio::test]
async fn an_own_certificate_is_trusted_here() {
    let mut parts = Parts::router(&["--tls-self-signed", "--disaggregation=never"]);
    parts.decode("d", 1, &[]);
    let url = parts.url("").replace("http:", "https:");
    let begun = std::time::Instant::now();
    loop {
        let (ok, answer, stderr) = output(&mut baton(&["chat", "--url", &url, "--max-tokens=4", "Hello"]));
        if ok {
            assert!(!answer.trim().is_empty(), "{stderr}");
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{stderr}\n{}", parts.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Over https: with a certificate that is named, and not without; OpenSSL and curl agree.
#[tokio::test]
async fn over_https() {
    let folder = folder("https");
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    fs::write(&cert, made.cert.pem()).expect("writes");
    fs::write(&key, made.signing_key.serialize_pem()).expect("writes");
    let (cert, key) = (cert.display().to_string(), key.display().to_string());
    let flags = [&format!("--tls-cert={cert}"), &format!("--tls-key={key}"), "--disaggregation=never"];
    let mut parts = Parts::router(&flags);
    parts.decode("d", 1, &[]);
    let url = parts.url("").replace("http:", "https:");
    let chat = |more: &[&str]| output(baton(&["chat", "--url", &url, "--max-tokens=4", "Hello"]).args(more));
    let begun = std::time::Instant::now();
    while !chat(&["--ca", &cert]).0 {
        assert!(begun.elapsed() < PATIENCE, "{:?}\n{}", chat(&["--ca", &cert]), parts.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (ok, _, stderr) = chat(&[]);
    assert!(!ok && stderr.contains("not trusted"), "{stderr}");
    let (ok, _, stderr) = output(&mut baton(&["chat", "--url", &parts.url(""), "Hello"]));
    assert!(!ok && stderr.contains("no plain HTTP there: try https://"), "{stderr}");
    let prompts = folder.join("prompts");
    fs::write(&prompts, "Hello\n").expect("writes");
    let out = folder.join("out").display().to_string();
    let (ok, _, stderr) = batch(
        &url,
        &["run", "-i", &prompts.display().to_string(), "-o", &out, "--ca", &cert, "--max-tokens=4"],
    );
    assert!(ok, "{stderr}");

    let address = url.trim_start_matches("https://");
    let curl = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--fail",
            "--noproxy",
            "*",
            "--cacert",
            &cert,
            &format!("{url}/v1/models"),
        ])
        .output();
    match curl {
        Ok(curl) => {
            let text = String::from_utf8_lossy(&curl.stdout);
            assert!(curl.status.success() && text.contains("baton-demo"), "{curl:?}");
        }
        Err(error) => println!("skipped: curl: {error}"),
    }
    for version in ["-tls1_2", "-tls1_3"] {
        let openssl = Command::new("openssl")
            .args([
                "s_client",
                "-connect",
                address,
                "-CAfile",
                &cert,
                "-verify_return_error",
                "-brief",
                version,
            ])
            .stdin(std::process::Stdio::null())
            .output();
        match openssl {
            Ok(openssl) => {
                let text = String::from_utf8_lossy(&openssl.stderr);
                assert!(openssl.status.success() && text.contains("Verification: OK"), "{version}: {text}");
            }
            Err(error) => println!("skipped: openssl: {error}"),
        }
    }
    drop(parts);
    fs::remove_dir_all(folder).expect("cleans up");
}
