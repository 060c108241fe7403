//! Batch jobs at work: has the lines of batches answered by the cluster behind this gateway, as much at a time as it can hold
//! beside interactive requests ([`pace`]), and keeps answers in the room `batch`. `api` shows files and batches to clients
//! and answers lines; [`drive`] is the life of one batch.

mod drive;
mod pace;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batch::{Endpoint, Space, Store, StoreError};
use futures::future::BoxFuture;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::inference::Load;
use drive::Drive;
use pace::Pace;

/// Batches whose lines are answered at the same time; further ones wait for these.
const ACTIVE_MAX: usize = 32;

/// A request for files or batches waits so long for the first attempt to open the store, which may have a crash to clean up.
const OPEN_WAIT: Duration = Duration::from_secs(20);

/// Between two attempts to open the store.
const OPEN_PAUSE: Duration = Duration::from_millis(200);

/// Between two looks at how much the cluster has to do.
const LOOK: Duration = Duration::from_millis(50);

/// Between two looks at what has expired.
const SWEEP: Duration = Duration::from_secs(60);

/// How files and batches are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchConfig {
    /// Where.
    pub folder: PathBuf,
    /// What owners may take.
    pub space: Space,
    /// Largest file that is taken in.
    pub file_bytes: u64,
    /// Most lines of a batch.
    pub lines: u64,
}

impl BatchConfig {
    /// In `folder`, within the usual bounds.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        // A million lines take some 40 MB of memory while they are checked and worked on.
        Self { folder: folder.into(), space: Space::default(), file_bytes: 1 << 30, lines: 1_000_000 }
    }
}

/// Who answers lines.
pub trait Answers: Send + Sync + 'static {
    /// Answers one line. Dropping the future cancels everything behind it.
    fn answer(&self, owner: &str, endpoint: Endpoint, body: Value) -> BoxFuture<'static, Answered>;
    /// Errors for a model that is not served under this name, in words for clients.
    fn check_model(&self, model: &str) -> Result<(), String>;
    /// Whether this owner still has a key.
    fn knows(&self, owner: &str) -> bool;
    /// Requests in the cluster.
    fn load(&self) -> Load;
    /// Longest line.
    fn line_bytes(&self) -> u64;
}

/// The answer to one line.
#[derive(Debug, Clone)]
pub struct Answered {
    /// HTTP's.
    pub status: u16,
    /// For logs.
    pub request_id: String,
    /// An answer or an error, as a client of HTTP would get it.
    pub body: Value,
    /// When a new try has a chance, if it says so.
    pub retry_after: Option<Duration>,
}

/// Lines answered since start: `completed` in output files, `failed` in error files.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Files and batches of one gateway.
pub struct Batches {
    /// How they are kept.
    pub config: BatchConfig,
    lines: Family<Outcome, Counter>,
    running: Gauge,
    store: watch::Sender<Opened>,
    /// Something about a batch was changed by a client.
    changed: watch::Sender<()>,
    /// Why work stands still, if it does.
    trouble: Mutex<Option<Trouble>>,
}

/// Whether there is a store to work with.
#[derive(Debug, Clone)]
enum Opened {
    /// Soon to be known.
    Opening,
    Yes(Arc<Store>),
    /// Why not, in words for clients.
    No(&'static str),
}

/// No store for any further request.
const STOPPING: Opened = Opened::No("the server is about to stop");

/// An error as the log has it, and what of it concerns clients.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Trouble {
    log: String,
    told: &'static str,
}

impl Trouble {
    fn of(error: &StoreError) -> Trouble {
        let told = match error {
            _ if error.is_full() => "the disk is full",
            StoreError::Busy(_) => "another process of the server has its files and batches open",
            _ => "the server's disk fails",
        };
        Trouble { log: error.to_string(), told }
    }
}

impl Batches {
    /// Nothing is opened before [`Batches::run`].
    pub fn new(config: BatchConfig) -> Arc<Batches> {
        Arc::new(Batches {
            config,
            lines: Family::default(),
            running: Gauge::default(),
            store: watch::Sender::new(Opened::Opening),
            changed: watch::Sender::new(()),
            trouble: Mutex::default(),
        })
    }

    /// Adds what is counted to the metrics page.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("baton_batch_lines", "Lines of batches answered", self.lines.clone());
        registry.register("baton_batches_running", "Batches at work", self.running.clone());
        self.count(0, 0);
    }

    /// So many lines more are answered.
    fn count(&self, completed: u64, failed: u64) {
        let counter = |outcome| self.lines.get_or_create(&Outcome { outcome });
        counter("completed").inc_by(completed);
        counter("failed").inc_by(failed);
    }

    /// The store, as soon as it is known whether it opens. Errors with why it does not, in words for clients.
    pub async fn store(&self) -> Result<Arc<Store>, &'static str> {
        let mut opened = self.store.subscribe();
        let known = opened.wait_for(|opened| !matches!(opened, Opened::Opening));
        let known = timeout(OPEN_WAIT, known).await.ok().and_then(Result::ok);
        match known.as_deref() {
            Some(Opened::Yes(store)) => Ok(Arc::clone(store)),
            Some(Opened::No(why)) => Err(why),
            Some(Opened::Opening) | None => Err("files and batches are not open yet"),
        }
    }

    /// A batch was made or cancelled.
    pub fn wake(&self) {
        self.changed.send_replace(());
    }

    /// Why no batch goes on, if none does, in words for clients.
    pub fn trouble(&self) -> Option<&'static str> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().map(|trouble| trouble.told)
    }

    /// Remembers why work stands still, and says it once; `None`: it goes on.
    fn say(&self, error: Option<&StoreError>) {
        let trouble = error.map(Trouble::of);
        let mut known = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == trouble {
            return;
        }
        match &trouble {
            None => tracing::info!("batches go on"),
            Some(Trouble { log, .. }) => tracing::warn!("batches wait: {log}"),
        }
        *known = trouble;
    }

    /// Works until `shutdown`, then lets go of the folder. Lines that were being answered then are answered after the next
    /// start.
    pub async fn run(self: Arc<Self>, answers: Arc<dyn Answers>, shutdown: CancellationToken) {
        let Some(store) = self.open(&shutdown).await else { return };
        self.store.send_replace(Opened::Yes(Arc::clone(&store)));
        let pace = Arc::new(Pace::default());
        let drive = Arc::new(Drive {
            batches: Arc::clone(&self),
            store: Arc::clone(&store),
            answers: Arc::clone(&answers),
            pace: Arc::clone(&pace),
            shutdown: shutdown.clone(),
        });
        let mut changed = self.changed.subscribe();
        let (mut look, mut sweep) = (interval(LOOK), interval(SWEEP));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tasks = JoinSet::new();
        let mut active: HashSet<String> = HashSet::new();
        let mut begin = true;
        loop {
            if std::mem::take(&mut begin) {
                for id in store.unfinished() {
                    let known = store.record(&id).is_some_and(|record| answers.knows(&record.owner));
                    if known && active.len() < ACTIVE_MAX && active.insert(id.clone()) {
                        let drive = Arc::clone(&drive);
                        tasks.spawn(async move {
                            drive.run(&id).await;
                            id
                        });
                    }
                }
            }
            self.running.set(active.len() as i64);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = tasks.join_next(), if !tasks.is_empty() => match ended {
                    Ok(id) => begin = active.remove(&id),
                    Err(error) => {
                        // Which one is not told: all are looked at again.
                        tracing::error!("a batch broke off: {error}");
                        tasks.abort_all();
                        while tasks.join_next().await.is_some() {}
                        active.clear();
                        sleep(Duration::from_secs(1)).await;
                        begin = true;
                    }
                },
                // The sender is ours: there is no error.
                Ok(()) = changed.changed() => begin = true,
                _ = look.tick() => pace.adjust(answers.load()),
                _ = sweep.tick() => {
                    let store = Arc::clone(&store);
                    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.sweep()).await {
                        self.say(Some(&error));
                    }
                    begin = true;
                }
            }
        }
        self.store.send_replace(STOPPING);
        while tasks.join_next().await.is_some() {}
    }

    async fn open(&self, shutdown: &CancellationToken) -> Option<Arc<Store>> {
        loop {
            let (folder, space) = (self.config.folder.clone(), self.config.space);
            match tokio::task::spawn_blocking(move || Store::open(&folder, space)).await {
                Ok(Ok(store)) => {
                    self.say(None);
                    return Some(Arc::new(store));
                }
                Ok(Err(error)) => {
                    self.say(Some(&error));
                    self.store.send_replace(Opened::No(Trouble::of(&error).told));
                }
                Err(error) => tracing::error!("batches: {error}"),
            }
            tokio::select! {
                () = shutdown.cancelled() => {
                    self.store.send_replace(STOPPING);
                    return None;
                }
                () = sleep(OPEN_PAUSE) => {}
            }
        }
    }
}

/// When a batch's window closes, as this process counts time.
fn closes(store: &Store, expires_at: u64) -> Instant {
    Instant::now() + Duration::from_secs(expires_at.saturating_sub(store.now()))
}
