//! What the tests speak through: `Cluster::up` starts the executable as a user would, on ports of its own, and ends it.
//!
//! ```ignore
//! let cluster = Cluster::up(&["--decode=2"]).await;
//! let answer = cluster.chat(json!({ "messages": [{ "role": "user", "content": "Hi" }] })).await;
//! cluster.kill("decode-0.1");
//! cluster.wait_for_line("starting it again").await;
//! ```

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, EventStream, with_model};

/// A debug build on a busy machine needs some time; a cluster that is not there by then does not come.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How often a condition is looked at.
pub const LOOK: Duration = Duration::from_millis(20);

/// The executable under test, without the settings of whoever runs the tests.
pub fn baton(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    for (name, _) in std::env::vars_os() {
        let shown = name.to_string_lossy();
        if ["BATON_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"].iter().any(|own| shown.starts_with(own)) {
            command.env_remove(name);
        }
    }
    command
        .args(arguments)
        .current_dir(empty_folder())
        .env("XDG_CACHE_HOME", cache())
        .env("XDG_CONFIG_HOME", empty_folder())
        .env("XDG_DATA_HOME", cache().join("data"))
        .stdin(Stdio::null());
    command
}

/// Runs `baton` to its end: (succeeded, standard output, standard error). One that does not end fails the test.
pub fn output(command: &mut Command) -> (bool, String, String) {
    let (stdout, stderr) = (Arc::default(), Arc::default());
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the executable runs");
    let readers = [
        collect(child.stdout.take().expect("piped"), &stdout),
        collect(child.stderr.take().expect("piped"), &stderr),
    ];
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("{command:?} does not end:\n{}{}", lock(&stdout), lock(&stderr));
        }
        std::thread::sleep(LOOK);
    };
    for reader in readers {
        reader.join().expect("a reader");
    }
    let text = |log: &Mutex<String>| lock(log).clone();
    (status.success(), text(&stdout), text(&stderr))
}

fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("e2e-cache")
}

/// A folder without a baton.toml.
fn empty_folder() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("e2e-empty");
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// A folder for one test, empty.
pub fn folder(name: &str) -> PathBuf {
    let folder =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("e2e-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// The directory of the bundled model.
pub fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/demo/weights")
}

/// A port that nobody has, below those that the system gives away by itself. No two tests of a run are given the same:
/// who asked for one binds it later. Where a run begins is drawn, so that two runs at once rarely meet.
pub fn free_port() -> u16 {
    const PORTS: u32 = 8_000;
    static NEXT: LazyLock<AtomicU32> = LazyLock::new(|| {
        let mut random = [0u8; 4];
        getrandom::fill(&mut random).expect("random bytes");
        AtomicU32::new(u32::from_le_bytes(random) % PORTS)
    });
    loop {
        let port = 12_000 + (NEXT.fetch_add(1, Ordering::Relaxed) % PORTS) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A running `baton up`. Dropping it kills it, and with it its children.
pub struct Cluster {
    up: Child,
    log: Arc<Mutex<String>>,
    client: Client,
}

impl Deref for Cluster {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Cluster {
    /// `baton up` with these flags, once it serves. The test fails when it ends before.
    pub async fn up(flags: &[&str]) -> Cluster {
        Self::up_with(flags, &[]).await
    }

    /// As [`Cluster::up`], with these variables in its environment.
    pub async fn up_with(flags: &[&str], variables: &[(&str, &str)]) -> Cluster {
        let port = free_port();
        let port_flag = format!("--port={port}");
        let arguments: Vec<_> = ["up", port_flag.as_str()].iter().chain(flags).copied().collect();
        let mut up = baton(&arguments)
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable runs");
        let log = Arc::new(Mutex::new(String::new()));
        collect(up.stdout.take().expect("piped"), &log);
        collect(up.stderr.take().expect("piped"), &log);
        let mut cluster = Cluster { client: Client::new(port), up, log };
        cluster.wait_for_line("Ctrl-C stops all").await;
        cluster
    }

    /// The settings file that `up` wrote for its processes: address and token of the cluster.
    pub fn run_file(&self) -> PathBuf {
        cache().join(format!("baton/run/up-{}.toml", self.port))
    }

    /// Where nodes join, `host:port`.
    pub fn router(&self) -> String {
        let text = std::fs::read_to_string(self.run_file()).expect("the file of a running `up`");
        let settings: toml::Table = text.parse().expect("settings");
        settings["router"].as_str().expect("an address").to_owned()
    }

    /// A chat completion that must succeed.
    pub async fn chat(&self, body: Value) -> Value {
        let (status, answer) = self.post("/v1/chat/completions", &with_model(&body)).await;
        assert_eq!(status, 200, "{answer}\n{}", self.log());
        answer
    }

    /// A streamed chat completion that must succeed: its events up to `[DONE]`.
    pub async fn chat_stream(&self, body: Value) -> Vec<Value> {
        let mut events = self.chat_begin(body).await;
        let mut all = Vec::new();
        while let Some(event) = events.next().await {
            all.push(event);
        }
        all
    }

    /// A streamed chat completion, event by event. Dropping it cancels the request.
    pub async fn chat_begin(&self, body: Value) -> EventStream {
        self.begin("/v1/chat/completions", &body).await
    }

    /// All that the processes have written so far.
    pub fn log(&self) -> String {
        lock(&self.log).clone()
    }

    /// Waits until `up` or a child has written `part`.
    pub async fn wait_for_line(&mut self, part: &str) {
        self.wait_for_lines(part, 1).await;
    }

    /// Waits until `part` was written `count` times.
    pub async fn wait_for_lines(&mut self, part: &str, count: usize) {
        let begun = Instant::now();
        while lock(&self.log).matches(part).count() < count {
            if let Some(status) = self.up.try_wait().expect("a child") {
                panic!("up ended with {status}:\n{}", self.log());
            }
            assert!(begun.elapsed() < PATIENCE, "no {part:?} within {PATIENCE:?}:\n{}", self.log());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Process number of the child `name` (`router`, `prefill-0`, `decode-0.1`).
    pub fn pid(&self, name: &str) -> u32 {
        let of_role = match name {
            "router" => " router ".to_owned(),
            node => format!(" --name={node} "),
        };
        let children = children(self.up.id());
        let found = children.iter().find(|(_, arguments)| format!("{arguments} ").contains(&of_role));
        found.unwrap_or_else(|| panic!("no {name} among {children:?}")).0
    }

    /// Process numbers of all children.
    pub fn pids(&self) -> Vec<u32> {
        children(self.up.id()).into_iter().map(|(pid, _)| pid).collect()
    }

    /// kill -9 of the child `name`.
    pub fn kill(&self, name: &str) {
        signal(self.pid(name), libc::SIGKILL);
    }

    /// Sends `number` to `up` itself and waits for its end.
    pub async fn end(mut self, number: libc::c_int) -> (ExitStatus, String) {
        signal(self.up.id(), number);
        let begun = Instant::now();
        loop {
            if let Some(status) = self.up.try_wait().expect("a child") {
                return (status, self.log());
            }
            assert!(begun.elapsed() < PATIENCE, "up goes on after signal {number}:\n{}", self.log());
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.up.kill();
        let _ = self.up.wait();
        if std::thread::panicking() {
            eprintln!("log of the cluster:\n{}", self.log());
        }
    }
}

/// Waits until none of `pids` is a running process.
pub async fn wait_until_gone(pids: &[u32]) {
    let begun = Instant::now();
    while let Some(pid) = pids.iter().find(|&&pid| is_running(pid)) {
        assert!(begun.elapsed() < PATIENCE, "process {pid} goes on");
        tokio::time::sleep(LOOK).await;
    }
}

/// Text of all deltas.
pub fn text_of(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
}

/// Reads `stream` into `log`, line by line, on a thread of its own.
pub fn collect(stream: impl Read + Send + 'static, log: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let log = log.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let mut log = lock(&log);
            log.push_str(&line);
            log.push('\n');
        }
    })
}

/// A log, whoever panicked while writing it.
pub fn lock(log: &Mutex<String>) -> MutexGuard<'_, String> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Direct children of a process that have not ended: number and arguments.
fn children(parent: u32) -> Vec<(u32, String)> {
    let rows = ps(&["-axo", "pid=,ppid=,stat=,args="]);
    let row = |line: &str| {
        let mut columns = line.split_whitespace();
        let pid = columns.next()?.parse().ok()?;
        let is_child = columns.next()? == parent.to_string() && !columns.next()?.starts_with('Z');
        is_child.then(|| (pid, columns.collect::<Vec<_>>().join(" ")))
    };
    rows.lines().filter_map(row).collect()
}

fn is_running(pid: u32) -> bool {
    let state = ps(&["-o", "stat=", "-p", &pid.to_string()]);
    !state.trim().is_empty() && !state.trim().starts_with('Z')
}

fn ps(arguments: &[&str]) -> String {
    let output = Command::new("ps").args(arguments).output().expect("ps runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Sends signal `number` to a process that is there.
pub fn signal(pid: u32, number: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("a process number");
    // SAFETY: kill takes two numbers and touches no memory of ours.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0, "process {pid} is not there");
}
