//! A cluster started part by part, as on machines of its own: `baton router`, then `prefill` and `decode` with whatever
//! flags a test needs and `up` does not have.
//!
//! ```ignore
//! let mut parts = Parts::router(&["--disaggregation=always"]);
//! parts.prefill("p", 1, &["--block-tokens=16"]);
//! parts.decode("d", 2, &["--block-tokens=64"]);
//! parts.wait_until_ready(&["p", "d"]).await;
//! let choice = parts.complete(&json!({ "prompt": [1, 2, 3], "max_tokens": 4 })).await;
//! ```

use std::fs;
use std::net::TcpListener;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, MODEL};
use crate::harness::{LOOK, PATIENCE, baton, collect, folder, free_port, lock, model, output, signal};

/// The bundled model's vocabulary: ids below this exist.
fn vocab() -> u32 {
    let text = fs::read_to_string(model().join("config.json")).expect("the bundled model");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    config["vocab_size"].as_u64().and_then(|size| u32::try_from(size).ok()).expect("vocab_size")
}

/// Token of these clusters.
pub const TOKEN: &str = "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e";

/// `len` token ids of the bundled model, the same for the same `start`, unlike those of any other.
pub fn ids(start: u32, len: usize) -> Vec<u32> {
    let vocab = vocab();
    // Any ids will do; these look random and never change (Knuth's multiplicative hash).
    let id = |i: u32| (i.wrapping_mul(2_654_435_761) >> 7) % vocab;
    (start..).take(len).map(id).collect()
}

/// How often nodes are asked for; each time is a process.
const LOOK_AT_NODES: Duration = Duration::from_millis(100);

/// Running processes of one cluster. Dropping it kills them.
pub struct Parts {
    /// Its processes have certificates; nodes join by a token.
    certified: bool,
    /// Where nodes join.
    cluster: u16,
    folder: PathBuf,
    processes: Vec<Part>,
    client: Client,
    /// The router's socket, where it is ours.
    listener: Option<TcpListener>,
}

impl Deref for Parts {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

struct Part {
    name: String,
    arguments: Vec<String>,
    child: Child,
    /// A socket of ours that it gets.
    passes: Option<RawFd>,
    /// As with `up`: a part ends when this closes, so that a killed test leaves nothing behind.
    _lifeline: Option<ChildStdin>,
    log: Arc<Mutex<String>>,
}

impl Parts {
    /// A router with these flags, not waited for.
    pub fn router(flags: &[&str]) -> Parts {
        Self::begin(false, None, flags)
    }

    /// As [`Parts::router`], of a cluster with certificates.
    pub fn certified(flags: &[&str]) -> Parts {
        Self::begin(true, None, flags)
    }

    /// As [`Parts::router`], serving on a socket that stays when it ends.
    pub fn router_on(listener: TcpListener, flags: &[&str]) -> Parts {
        Self::begin(false, Some(listener), flags)
    }

    fn begin(certified: bool, listener: Option<TcpListener>, flags: &[&str]) -> Parts {
        let cluster = free_port();
        let own = listener.as_ref().map(|listener| listener.local_addr().expect("an address").port());
        let port = own.unwrap_or_else(free_port);
        let folder = folder(&format!("parts-{port}"));
        let client = Client::new(port);
        let mut parts = Parts { certified, cluster, folder, processes: Vec::new(), client, listener };
        let token = if certified { parts.token(&["create"]) } else { TOKEN.into() };
        fs::write(parts.folder.join("token"), token).expect("writes");
        let own = [format!("--port={port}"), format!("--cluster-bind=127.0.0.1:{cluster}")];
        parts.start("router", "router", &own, flags);
        parts
    }

    /// A prefill node of `tp` ranks named `name.RANK`; the router knows it by `name.0`.
    pub fn prefill(&mut self, name: &str, tp: usize, flags: &[&str]) {
        self.node("prefill", name, tp, flags);
    }

    /// As [`Parts::prefill`], a decode group.
    pub fn decode(&mut self, name: &str, tp: usize, flags: &[&str]) {
        self.node("decode", name, tp, flags);
    }

    fn node(&mut self, role: &str, name: &str, tp: usize, flags: &[&str]) {
        let leader = free_port();
        for rank in 0..tp {
            let name = format!("{name}.{rank}");
            let own = [
                format!("--name={name}"),
                format!("--router=127.0.0.1:{}", self.cluster),
                format!("--tp={tp}"),
                format!("--rank={rank}"),
                format!("--leader=127.0.0.1:{leader}"),
                "--kv-memory=256MiB".into(),
                "--threads=1".into(),
            ];
            self.start(role, &name, &own, flags);
        }
    }

    fn start(&mut self, role: &str, name: &str, own: &[String], flags: &[&str]) {
        let token = match self.certified && role == "router" {
            true => format!("--cluster-dir={}", self.folder.join("cluster").display()),
            false => format!("--token-file={}", self.folder.join("token").display()),
        };
        let mut arguments = vec![
            role.to_owned(),
            format!("--model={}", model().display()),
            format!("--served-name={MODEL}"),
            token,
        ];
        arguments.extend_from_slice(own);
        // The last one given wins.
        arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
        let passes = self.listener.as_ref().filter(|_| role == "router").map(AsRawFd::as_raw_fd);
        arguments.extend(passes.map(|number| format!("--listen-fd={number}")));
        self.processes.push(Part::start(name.to_owned(), arguments, passes));
    }

    /// What `baton token` prints about this cluster.
    pub fn token(&self, arguments: &[&str]) -> String {
        let folder = self.folder.join("cluster").display().to_string();
        let (ok, stdout, stderr) = output(baton(&["token", "--cluster-dir", &folder]).args(arguments));
        assert!(ok, "{stderr}");
        stdout
    }

    /// The flag for a node that joins by a token of its own.
    pub fn token_file(&self, name: &str) -> String {
        let path = self.folder.join(format!("token-{name}"));
        fs::write(&path, self.token(&["create", name])).expect("writes");
        format!("--token-file={}", path.display())
    }

    /// Where nodes join, `host:port`.
    pub fn cluster(&self) -> String {
        format!("127.0.0.1:{}", self.cluster)
    }

    /// The flag that names the meeting place of the node's ranks.
    pub fn leader(&mut self, name: &str) -> String {
        let part = self.part(&format!("{name}.0"));
        let flag = part.arguments.iter().find(|argument| argument.starts_with("--leader="));
        flag.expect("a node's flags").clone()
    }

    /// kill -9 of `name`.
    pub fn kill(&mut self, name: &str) {
        let part = self.part(name);
        part.child.kill().expect("a running part");
        part.child.wait().expect("a child");
    }

    /// Starts `name` again with its arguments; it must have ended.
    pub fn restart(&mut self, name: &str) {
        let part = self.part(name);
        assert!(part.child.try_wait().expect("a child").is_some(), "{name} still runs");
        *part = Part::start(part.name.clone(), part.arguments.clone(), part.passes);
    }

    /// As [`Parts::restart`], with another flag.
    pub fn restart_with(&mut self, name: &str, flag: &str) {
        self.part(name).arguments.push(flag.to_owned());
        self.restart(name);
    }

    /// kill -9 of all ranks of a node, then starts them again.
    pub fn restart_all(&mut self, name: &str, tp: usize) {
        let names: Vec<_> = (0..tp).map(|rank| format!("{name}.{rank}")).collect();
        names.iter().for_each(|name| self.kill(name));
        names.iter().for_each(|name| self.restart(name));
    }

    /// Process number of `name`.
    pub fn pid(&mut self, name: &str) -> u32 {
        self.part(name).child.id()
    }

    /// Sends a signal to `name`.
    pub fn signal(&mut self, name: &str, number: libc::c_int) {
        signal(self.part(name).child.id(), number);
    }

    /// Waits until `name` has ended: how, and what it wrote.
    pub async fn wait_for_end(&mut self, name: &str) -> (ExitStatus, String) {
        let begun = Instant::now();
        loop {
            let part = self.part(name);
            if let Some(status) = part.child.try_wait().expect("a child") {
                return (status, lock(&part.log).clone());
            }
            assert!(begun.elapsed() < PATIENCE, "{name} goes on:\n{}", self.log());
            tokio::time::sleep(LOOK).await;
        }
    }

    fn part(&mut self, name: &str) -> &mut Part {
        self.processes.iter_mut().find(|part| part.name == name).expect("a part of that name")
    }

    /// Waits until exactly these nodes are members, all of them ready, and a real step runs on every role.
    pub async fn wait_until_ready(&mut self, names: &[&str]) {
        let begun = Instant::now();
        loop {
            let state = self.look();
            let nodes = state.as_ref().map_or([].as_slice(), |state| nodes_of(state));
            let ready: Vec<_> = nodes
                .iter()
                .filter(|node| node["state"] == "ready")
                .filter_map(|node| node["name"].as_str())
                .collect();
            let all_there = nodes.len() == names.len() && names.iter().all(|name| ready.contains(name));
            if all_there && self.is_ok("/health").await {
                return;
            }
            for part in &mut self.processes {
                let ended = part.child.try_wait().expect("a child");
                assert!(ended.is_none(), "{} ended:\n{}", part.name, lock(&part.log));
            }
            assert!(begun.elapsed() < PATIENCE, "not ready: {state:?}\n{}", self.log());
            tokio::time::sleep(LOOK_AT_NODES).await;
        }
    }

    /// What `baton status --json` says; `None` while the router is not there.
    fn look(&self) -> Option<Value> {
        let router = format!("--router=127.0.0.1:{}", self.cluster);
        let token = format!("--token-file={}", self.folder.join("token").display());
        let (ok, json, _) = output(&mut baton(&["status", "--json", &router, &token]));
        ok.then(|| serde_json::from_str(&json).expect("JSON"))
    }

    /// What the router knows of its nodes, as `baton status --json` shows it.
    pub fn nodes(&self) -> Vec<Value> {
        let state = self.look().expect("a router");
        nodes_of(&state).to_vec()
    }

    /// As [`idle`].
    pub async fn wait_until_idle(&self) -> Vec<Value> {
        idle(PATIENCE, || self.nodes()).await
    }

    /// All that the parts have written so far.
    pub fn log(&self) -> String {
        let of = |part: &Part| format!("--- {}\n{}", part.name, lock(&part.log));
        self.processes.iter().map(of).collect()
    }
}

impl Part {
    fn start(name: String, arguments: Vec<String>, passes: Option<RawFd>) -> Part {
        let arguments_text: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut command = baton(&arguments_text);
        if let Some(number) = passes {
            // SAFETY: one system call between fork and exec, with a number; the socket is open as long as the parts are.
            unsafe {
                command.pre_exec(move || {
                    (libc::fcntl(number, libc::F_SETFD, 0) == 0)
                        .then_some(())
                        .ok_or_else(std::io::Error::last_os_error)
                })
            };
        }
        let mut child = command
            .env("BATON_SUPERVISED", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable runs");
        let log = Arc::default();
        collect(child.stderr.take().expect("piped"), &log);
        let lifeline = child.stdin.take();
        Part { name, arguments, child, passes, _lifeline: lifeline, log }
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        for part in &mut self.processes {
            let _ = part.child.kill();
            let _ = part.child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
        let log = self.log();
        if std::thread::panicking() {
            eprintln!("log of the parts:\n{log}");
        } else {
            assert!(!log.contains("panicked"), "a part panicked:\n{log}");
        }
    }
}

fn nodes_of(state: &Value) -> &[Value] {
    state["nodes"].as_array().expect("nodes")
}

/// Waits until every node says, from now on, that it is idle and that its store's blocks are all free or cached; fails after
/// `limit`, or when a store ever did not add up. `nodes`: as `baton status --json` shows them. Returns them.
pub async fn idle(limit: Duration, nodes: impl Fn() -> Vec<Value>) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let since_ms = begun.elapsed().as_millis() as u64;
        let nodes = nodes();
        let number = |value: &Value| value.as_u64().expect("a number");
        let is_idle = |node: &Value| {
            let kv = |field: &str| number(&node["kv"][field]);
            number(&node["reported_ms_ago"]) < since_ms
                && node["running"] == 0
                && node["waiting"] == 0
                && kv("free") + kv("cached") == kv("total")
                && kv("total") > 0
        };
        assert!(nodes.iter().all(|node| node["kv"]["audit_errors"] == 0), "{nodes:#?}");
        if nodes.iter().all(is_idle) {
            return nodes;
        }
        assert!(begun.elapsed() < limit, "not idle: {nodes:#?}");
        tokio::time::sleep(LOOK_AT_NODES).await;
    }
}
