//! The life of one batch: its lines are checked, answered and kept, and it is ended. Whatever stops it (a shutdown, a full
//! disk, a crash), it goes on later from what is kept.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use batch::{Answer, Endpoint, Job, Line, Rules, Status, Store, StoreError};
use futures::FutureExt;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::pace::Pace;
use super::{Answered, Answers, Batches, closes};

/// Answers are kept together: each commit waits for the disk some times.
const COMMIT_MAX: usize = 256;

/// An answer waits for others this long.
const COMMIT_AFTER: Duration = Duration::from_millis(50);

/// Answers that could not be kept yet; no line is begun while there are more.
const UNKEPT_MAX: usize = 1024;

/// Between two attempts to write to a disk that refused.
const DISK_PAUSE: Duration = Duration::from_secs(1);

/// A line that the cluster has no room for is asked again after this, then after twice as long, up to the last.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// A line on which the server failed is tried this often.
const TRIES_MAX: u32 = 3;

/// What every batch needs.
pub struct Drive {
    /// Whose batches these are.
    pub batches: Arc<Batches>,
    /// Where they are kept.
    pub store: Arc<Store>,
    /// Who answers lines.
    pub answers: Arc<dyn Answers>,
    /// When.
    pub pace: Arc<Pace>,
    /// The end.
    pub shutdown: CancellationToken,
}

/// Why a batch is left alone for now.
enum Left {
    /// The server stops, or the owner has no key any more.
    Stopped,
    /// It is tried again.
    Trouble(StoreError),
}

impl From<StoreError> for Left {
    fn from(error: StoreError) -> Left {
        Left::Trouble(error)
    }
}

impl Drive {
    /// Until the batch has ended, or the server stops.
    pub async fn run(&self, id: &str) {
        loop {
            let step = match self.store.record(id).map(|record| record.status) {
                None => return,
                Some(status) if status.ended() => return,
                Some(Status::Validating) => self.validate(id).await,
                Some(_) => self.work(id).await,
            };
            match step {
                Ok(()) => self.batches.say(None),
                Err(Left::Stopped) => return,
                Err(Left::Trouble(error)) => {
                    self.batches.say(Some(&error));
                    tokio::select! {
                        () = self.shutdown.cancelled() => return,
                        () = sleep(DISK_PAUSE) => {}
                    }
                }
            }
        }
    }

    async fn validate(&self, id: &str) -> Result<(), Left> {
        let Some(record) = self.store.record(id) else { return Ok(()) };
        let (store, answers, stop) =
            (Arc::clone(&self.store), Arc::clone(&self.answers), self.shutdown.clone());
        let (id, lines) = (id.to_owned(), self.batches.config.lines);
        blocking(move || {
            let rules = Rules {
                endpoint: record.endpoint,
                model: &|model| answers.check_model(model),
                line_bytes: answers.line_bytes(),
                lines,
                stop: &|| stop.is_cancelled(),
            };
            store.validate(&id, &rules)
        })
        .await?;
        if self.shutdown.is_cancelled() { Err(Left::Stopped) } else { Ok(()) }
    }

    async fn work(&self, id: &str) -> Result<(), Left> {
        let (store, line_bytes, name) = (Arc::clone(&self.store), self.answers.line_bytes(), id.to_owned());
        let Some(job) = blocking(move || store.job(&name, line_bytes)).await? else { return Ok(()) };
        let mut job = self.answer_all(job).await?;
        let Some(record) = self.store.record(id) else { return Ok(()) };
        let (code, message) = match record.outcome {
            Status::Expired => {
                ("batch_expired", "This request could not be executed before the completion window expired.")
            }
            _ => ("batch_cancelled", "This request was not executed because the batch was cancelled."),
        };
        while job.left() > 0 {
            let store = Arc::clone(&self.store);
            let (kept, count) = blocking(move || {
                let rest = job
                    .refuse(COMMIT_MAX, code, message)
                    .map_err(|error| StoreError::Disk { path: "the input file".into(), error })?;
                store.answer(&mut job, &rest)?;
                Ok((job, rest.len()))
            })
            .await?;
            job = kept;
            self.batches.count(0, count as u64);
            if self.shutdown.is_cancelled() {
                return Err(Left::Stopped);
            }
        }
        let store = Arc::clone(&self.store);
        let ended = blocking(move || store.finish(&mut job)).await?;
        let counts = ended.counts;
        tracing::info!(
            id,
            status = ended.status.as_str(),
            completed = counts.completed,
            failed = counts.failed,
            "batch ended"
        );
        Ok(())
    }

    /// Has all lines answered that have no answer. Returns when there are none left, or the batch is to end without them.
    async fn answer_all(&self, mut job: Job) -> Result<Job, Left> {
        let id = job.record().id.clone();
        let (owner, endpoint) = (job.record().owner.clone(), job.record().endpoint);
        let window = closes(&self.store, job.record().expires_at);
        let mut changed = self.batches.changed.subscribe();
        let (mut running, mut unkept) = (JoinSet::new(), Vec::new());
        let mut next = 0;
        let mut commit_at = Instant::now();
        loop {
            if self.store.record(&id).is_none_or(|record| record.status != Status::InProgress) {
                break;
            }
            if !self.answers.knows(&owner) {
                // Without a key there is nobody to work for; what was answered is kept.
                self.keep(job, unkept).await?;
                return Err(Left::Stopped);
            }
            let mut line = if unkept.len() < UNKEPT_MAX { job.next(next) } else { None };
            if line.is_none() && running.is_empty() && unkept.is_empty() {
                break;
            }
            let mut commit = unkept.len() >= COMMIT_MAX;
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => {
                    self.keep(job, unkept).await?;
                    return Err(Left::Stopped);
                }
                Ok(()) = changed.changed() => {}
                () = sleep_until(window) => {
                    let (store, id) = (Arc::clone(&self.store), id.clone());
                    blocking(move || store.expire(&id)).await?;
                }
                () = std::future::ready(()), if commit => {}
                Some(answer) = running.join_next(), if !running.is_empty() => match answer {
                    Ok(answer) => {
                        if unkept.is_empty() {
                            commit_at = Instant::now() + COMMIT_AFTER;
                        }
                        unkept.push(answer);
                    }
                    Err(error) => tracing::error!("a line's task broke off: {error}"),
                },
                () = sleep_until(commit_at), if !unkept.is_empty() => commit = true,
                place = self.pace.place(), if line.is_some() => {
                    if let Some(line) = line.take() {
                        next = line.index + 1;
                        let (answers, owner) = (Arc::clone(&self.answers), owner.clone());
                        let pace = Arc::clone(&self.pace);
                        running.spawn(async move { answer(&*answers, &pace, place, &owner, endpoint, line).await });
                    }
                }
            }
            if commit {
                job = self.keep(job, std::mem::take(&mut unkept)).await?;
            }
        }
        // What still runs is dropped, and with it what it does in the cluster.
        drop(running);
        self.keep(job, unkept).await
    }

    /// Keeps answers, trying again while the disk refuses; nothing is lost meanwhile.
    async fn keep(&self, mut job: Job, answers: Vec<Answer>) -> Result<Job, Left> {
        if answers.is_empty() {
            return Ok(job);
        }
        let answers = Arc::new(answers);
        loop {
            let (store, these) = (Arc::clone(&self.store), Arc::clone(&answers));
            let task = spawn_blocking(move || {
                let before = job.record().counts;
                let result = store.answer(&mut job, &these);
                (job, before, result)
            });
            let Ok((back, before, result)) = task.await else { return Err(StoreError::Again.into()) };
            job = back;
            match result {
                Ok(()) => {
                    let after = job.record().counts;
                    self.batches.count(after.completed - before.completed, after.failed - before.failed);
                    self.batches.say(None);
                    return Ok(job);
                }
                // The next try opens it.
                Err(StoreError::Again) => {}
                Err(error) => {
                    self.batches.say(Some(&error));
                    tokio::select! {
                        // They are answered again after the next start.
                        () = self.shutdown.cancelled() => return Err(Left::Stopped),
                        () = sleep(DISK_PAUSE) => {}
                    }
                }
            }
        }
    }
}

/// Answers one line, however often it takes.
async fn answer(
    answers: &dyn Answers,
    pace: &Arc<Pace>,
    mut place: super::pace::Place,
    owner: &str,
    endpoint: Endpoint,
    line: Line,
) -> Answer {
    let reading = line.clone();
    let (id, body) = match spawn_blocking(move || reading.read()).await {
        Ok(Ok(read)) => read,
        Ok(Err(error)) => return line.error("", "input_unreadable", &error.to_string()),
        Err(error) => return line.error("", "internal_error", &error.to_string()),
    };
    let (mut tries, mut pause) = (0, RETRY_MIN);
    loop {
        let asked = AssertUnwindSafe(answers.answer(owner, endpoint, body.clone())).catch_unwind();
        let answered = tokio::select! {
            biased;
            answered = asked => Some(answered),
            () = place.yields.cancelled() => None,
        };
        let wait = match answered {
            // Others were here first.
            None => Duration::ZERO,
            Some(Ok(Answered { status: 429 | 503, retry_after, .. })) => {
                pause = (2 * pause).min(RETRY_MAX);
                retry_after.unwrap_or(pause).min(pause)
            }
            Some(Ok(answered)) => {
                tries += u32::from(answered.status >= 500);
                if answered.status < 500 || tries >= TRIES_MAX {
                    return line.answer(&id, answered.status, &answered.request_id, answered.body);
                }
                RETRY_MIN
            }
            Some(Err(_)) => {
                tries += 1;
                if tries >= TRIES_MAX {
                    return line.error(&id, "internal_error", "The server failed on this request.");
                }
                RETRY_MIN
            }
        };
        drop(place);
        sleep(wait).await;
        place = pace.place().await;
    }
}

/// Runs what waits for the disk on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!("a thread of the store failed: {error}");
            Err(StoreError::Again)
        }
    }
}
