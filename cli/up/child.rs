//! One child process: started, its log lines passed on, its end reported. Each has a task of its own, which alone signals it.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;

use super::console::Console;
use super::plan::Process;
use super::supervisor::{ChildId, Event, Exit};
use crate::supervised;
use crate::system::{self, Signal};

/// Longest log line that is passed on whole; the rest of it follows as a line of its own.
const LINE_BYTES_MAX: usize = 8 << 10;
/// After a child's end its last lines are waited for this long.
const LINES_GRACE: Duration = Duration::from_secs(1);

/// Starts `process` and returns where it is signalled. Its end goes to `events` as that of `id`.
pub fn start(
    id: ChildId,
    process: &Process,
    settings_file: &Path,
    console: &Arc<Console>,
    events: mpsc::UnboundedSender<Event>,
) -> mpsc::UnboundedSender<Signal> {
    let (signals, mut inbox) = mpsc::unbounded_channel();
    let spawned = command(process, settings_file).and_then(|mut command| command.spawn());
    let (name, console) = (process.name.clone(), console.clone());
    tokio::spawn(async move {
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                let _ = events.send(Event::Exited(id, Exit::NotStarted(error.to_string())));
                return;
            }
        };
        let lines = child.stderr.take().map(|stderr| tokio::spawn(pass_on(stderr, name, console)));
        // Held open for as long as the child lives; see `supervised`.
        let _lifeline = child.stdin.take();
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                Some(signal) = inbox.recv() => {
                    if let Some(pid) = child.id() {
                        system::signal(pid, signal);
                    }
                }
            }
        };
        if let Some(lines) = lines {
            let _ = tokio::time::timeout(LINES_GRACE, lines).await;
        }
        let exit = match status {
            Ok(status) => match std::os::unix::process::ExitStatusExt::signal(&status) {
                Some(signal) => Exit::Signal(signal),
                None => Exit::Status(status.code().unwrap_or_default()),
            },
            Err(error) => Exit::NotStarted(error.to_string()),
        };
        let _ = events.send(Event::Exited(id, exit));
    });
    signals
}

/// The child has no settings but its arguments and `settings_file`, and no terminal: Ctrl-C reaches `up` alone, which stops
/// its children in order.
fn command(process: &Process, settings_file: &Path) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("BATON_") {
            command.env_remove(name);
        }
    }
    command
        .args(&process.arguments)
        .env("BATON_CONFIG", settings_file)
        .env(supervised::VARIABLE, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(descriptor) = process.passes {
        // SAFETY: runs between fork and exec, where one system call is allowed.
        unsafe { command.pre_exec(move || system::pass_on(descriptor)) };
    }
    Ok(command)
}

async fn pass_on(stderr: impl AsyncRead + Unpin, name: String, console: Arc<Console>) {
    let mut reader = BufReader::with_capacity(LINE_BYTES_MAX, stderr);
    let mut line = Vec::new();
    loop {
        let (used, whole) = match reader.fill_buf().await {
            Ok([]) | Err(_) => break,
            Ok(bytes) => match bytes.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    line.extend_from_slice(&bytes[..end]);
                    (end + 1, true)
                }
                None => {
                    line.extend_from_slice(bytes);
                    (bytes.len(), line.len() >= LINE_BYTES_MAX)
                }
            },
        };
        reader.consume(used);
        if whole {
            console.child_line(&name, &String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    if !line.is_empty() {
        console.child_line(&name, &String::from_utf8_lossy(&line));
    }
}
