//! `baton up`: a whole cluster on this machine, each part a process of its own, all on loopback.

mod child;
mod console;
mod plan;
mod ports;
mod ready;
mod supervisor;

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cluster::ClusterToken;
use hub::Want;
use models::Checkpoint;
use node::memory::{self, Need};
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::sync::mpsc;

use crate::config::UpSettings;
use crate::system::Signal;
use crate::{bundled, dirs, model};
use console::Console;
use plan::{Ports, Process};
use ready::Readiness;
use supervisor::{Action, Event, Supervisor};

pub use supervisor::STOP_GRACE;

/// Runs until Ctrl-C, SIGTERM or the loss of the terminal.
pub async fn run(settings: UpSettings) -> Result<ExitCode> {
    let clients = listen(settings.port)?;
    let (model, served_name) = model(&settings).await?;
    let draft = match &settings.draft_model {
        Some(named) => Some(located(named).await.context("draft model")?.0),
        None => None,
    };
    let planned = (settings.clone(), model.clone(), draft.clone());
    tokio::task::spawn_blocking(move || require_room(&planned.0, &planned.1, planned.2.as_deref())).await??;
    let mut internal = ports::free(1 + settings.decode)?;
    let ports = Ports { clients: clients.as_raw_fd(), leaders: internal.split_off(1), cluster: internal[0] };
    let cores = available_parallelism().map_or(1, usize::from);
    let processes = plan::plan(&settings, &model, draft.as_deref(), &served_name, &ports, cores);

    let token = ClusterToken::generate()?;
    let run_file = RunFile::write(settings.port, ports.cluster, &token)?;
    let nodes = processes.iter().filter(|p| p.joins).map(|p| p.name.clone()).collect();
    let ready = Readiness::new(settings.port, ports.cluster, &token, nodes)?;
    Up::new(processes, run_file, clients).serve(settings.port, &served_name, ready).await
}

/// Takes the port before anything is started, and says when it is taken. The router serves on it; while one is away, clients
/// wait for the next.
fn listen(port: u16) -> Result<TcpListener> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(listener) => Ok(listener),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("port {port} is taken by another process: choose one with --port")
        }
        Err(error) => Err(error).with_context(|| format!("cannot listen on port {port}")),
    }
}

/// Refuses what this machine cannot hold, all processes together, before any of them is started. A model that cannot be
/// opened is left to them: they say what is wrong with it.
fn require_room(settings: &UpSettings, path: &Path, draft: Option<&Path>) -> Result<()> {
    let Ok(checkpoint) = Checkpoint::open(path) else { return Ok(()) };
    let kv = settings.kv_memory.0;
    let sum = |ranks: Vec<u64>| {
        let need = |weights| Need { weights, kv };
        ranks.into_iter().map(need).fold(Need::default(), Need::with)
    };
    let prefill = sum(checkpoint.rank_bytes(1)?);
    let mut decode = sum(checkpoint.rank_bytes(settings.tp)?);
    if let Some(Ok(draft)) = draft.map(Checkpoint::open) {
        let bytes = |config, world| -> Result<usize> {
            Ok(models::kv_specs(config, settings.dtype, world)?.first().map_or(0, |spec| spec.token_bytes()))
        };
        let tokens = [bytes(checkpoint.config(), settings.tp)?, bytes(draft.config(), 1)?];
        let [_, kv] = memory::kv_bytes_of_both(Some(kv), None, tokens);
        decode = decode.with(Need { weights: draft.rank_bytes(1)?.iter().sum(), kv });
    }
    let copies = |need, count| (0..count).fold(Need::default(), |all: Need, _| all.with(need));
    let all = copies(prefill, settings.prefill).with(copies(decode, settings.decode));
    match memory::available().and_then(|available| all.beyond(available)) {
        None => Ok(()),
        Some(reason) => bail!(
            "{} does not fit: prefill nodes: {}, decode groups: {} of {} ranks: {reason}",
            path.display(),
            settings.prefill,
            settings.decode,
            settings.tp
        ),
    }
}

async fn model(settings: &UpSettings) -> Result<(PathBuf, String)> {
    let own = settings.served_name.clone().map(|name| name.0);
    let Some(named) = &settings.model else {
        return Ok((bundled::unpack(&dirs::cache()?)?, own.unwrap_or_else(|| bundled::NAME.into())));
    };
    let (path, name) = located(named).await?;
    Ok((path, own.unwrap_or(name)))
}

/// Path and name of a model. Once for all processes, which get the path.
async fn located(named: &Path) -> Result<(PathBuf, String)> {
    let found = model::locate(named, Want::Model, None).await?;
    let path = found.path.canonicalize().with_context(|| format!("model {}", found.path.display()))?;
    Ok((path, found.name))
}

/// The settings file that the children read: the cluster's address and token, for the owner's eyes only. Gone with `up`.
struct RunFile {
    path: PathBuf,
}

impl RunFile {
    fn write(port: u16, cluster: u16, token: &ClusterToken) -> Result<RunFile> {
        let path = dirs::run_file(port)?;
        let text = format!(
            "# The cluster of `baton up` on port {port}.\nrouter = \"127.0.0.1:{cluster}\"\ntoken = \"{}\"\n",
            token.expose()
        );
        let write = |path: &Path| {
            // Left by an `up` that was killed.
            let _ = fs::remove_file(path);
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(text.as_bytes())
        };
        write(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(RunFile { path })
    }
}

impl Drop for RunFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Carries out what the supervisor decides.
struct Up {
    processes: Vec<Process>,
    run_file: RunFile,
    /// Where clients wait while the router is started again.
    clients: Option<TcpListener>,
    console: Arc<Console>,
    supervisor: Supervisor,
    signals: Vec<Option<mpsc::UnboundedSender<Signal>>>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
}

impl Up {
    fn new(processes: Vec<Process>, run_file: RunFile, clients: TcpListener) -> Self {
        let (events, inbox) = mpsc::unbounded_channel();
        Up {
            console: Arc::new(Console::new()),
            supervisor: Supervisor::new(processes.iter().map(|p| (p.name.clone(), p.wave))),
            signals: processes.iter().map(|_| None).collect(),
            processes,
            run_file,
            clients: Some(clients),
            events,
            inbox,
        }
    }

    async fn serve(mut self, port: u16, model: &str, ready: Readiness) -> Result<ExitCode> {
        let mut stops = Stops::new()?;
        let names: Vec<_> = self.processes.iter().map(|p| p.name.as_str()).collect();
        self.console.line("up", &format!("starting {} with {model}", names.join(", ")));
        let begun = Instant::now();
        let health = tokio::spawn({
            let (console, events) = (self.console.clone(), self.events.clone());
            async move {
                ready.wait(&console).await;
                // Our own inbox outlives this task.
                let _ = events.send(Event::Serving);
            }
        });
        let mut actions = self.supervisor.begin(begun);
        loop {
            for action in actions {
                if let Some(status) = self.carry_out(action) {
                    health.abort();
                    self.console.line("up", "all processes have ended");
                    return Ok(ExitCode::from(status));
                }
            }
            let wake = self.supervisor.wake();
            let due = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            actions = tokio::select! {
                Some(event) = self.inbox.recv() => {
                    if event == Event::Serving && self.supervisor.is_starting() {
                        self.welcome(port, model, begun.elapsed());
                    }
                    self.supervisor.on(event, Instant::now())
                }
                () = stops.next() => {
                    health.abort();
                    self.console.end_progress();
                    self.console.line("up", "stopping; once more to stop at once");
                    // There will be no other router: who comes now is refused at once.
                    self.clients = None;
                    self.supervisor.on(Event::Stop, Instant::now())
                }
                () = due => self.supervisor.tick(Instant::now()),
            };
        }
    }

    /// Returns the status to end with.
    fn carry_out(&mut self, action: Action) -> Option<u8> {
        match action {
            Action::Start(id) => {
                let process = &self.processes[id];
                let signals =
                    child::start(id, process, &self.run_file.path, &self.console, self.events.clone());
                self.signals[id] = Some(signals);
            }
            Action::Terminate(id) => {
                self.console.stopping();
                self.signal(id, Signal::Terminate);
            }
            Action::Kill(id) => self.signal(id, Signal::Kill),
            Action::Say(text) => self.console.line("up", &text),
            Action::Finish(status) => return Some(status),
        }
        None
    }

    fn signal(&self, id: usize, signal: Signal) {
        if let Some(signals) = &self.signals[id] {
            // A child whose task has ended reports its exit, which is then in our inbox.
            let _ = signals.send(signal);
        }
    }

    fn welcome(&self, port: u16, model: &str, took: Duration) {
        self.console.line("up", &format!("serving after {:.1} s", took.as_secs_f64()));
        let (url, up) = match port {
            8000 => (String::new(), String::new()),
            port => (format!(" --url http://127.0.0.1:{port}"), format!(" --up {port}")),
        };
        // As the user called us: not everybody has it in the PATH.
        let baton = std::env::args().next().unwrap_or_else(|| "baton".into());
        let (chat, status) = (format!("{baton} chat{url}"), format!("{baton} status{up}"));
        let width = chat.len().max(status.len());
        crate::print(&format!(
            "\nbaton serves {model} at http://127.0.0.1:{port}/v1\n\n  \
             curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
             -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Who are you?\"}}]}}'\n\n  \
             {chat:width$}   talk to it in this terminal\n  \
             {status:width$}   nodes, load, links\n\n\
             Ctrl-C stops all.\n\n"
        ));
    }
}

/// What asks `up` to stop.
struct Stops {
    interrupt: SignalStream,
    terminate: SignalStream,
    hangup: SignalStream,
}

impl Stops {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Stops {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
