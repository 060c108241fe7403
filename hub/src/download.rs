//! One file into the cache: goes on where an earlier attempt stopped, and is given its name only when length and hash are
//! what was announced.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::cache::Repo;
use crate::digest::Digest;
use crate::remote::{Failure, FileInfo, Remote, passing, pause};
use crate::{HubError, ModelName};

/// Bytes per read and write.
const CHUNK: usize = 256 << 10;
/// How often a lock that another process holds is tried.
const LOCK_LOOK: Duration = Duration::from_millis(100);
/// A process that holds a lock while nothing arrives for this long is stuck.
const LOCK_SILENCE: Duration = Duration::from_secs(120);

/// What happens to a file on its way.
pub(crate) enum Step<'a> {
    /// So many bytes more are here, over the network.
    Came(u64),
    /// So many bytes were here already; all that was said of the file before is void.
    There(u64),
    /// The connection broke, for this reason; the next attempt follows.
    Again(&'a str),
}

/// Where a file comes from and goes.
pub(crate) struct Job<'a> {
    pub(crate) remote: &'a Remote,
    pub(crate) repo: &'a Repo,
    pub(crate) name: &'a ModelName,
    pub(crate) commit: &'a str,
    /// Set when another file has failed: this one need not go on.
    pub(crate) stop: &'a AtomicBool,
}

impl Job<'_> {
    /// Puts `file` into the cache, unless it is there. `Ok(false)`: told to stop.
    pub(crate) fn run(&self, file: &FileInfo, step: &dyn Fn(Step<'_>)) -> Result<bool, HubError> {
        let blob = self.repo.blob(&file.tag);
        let is_there = || fs::metadata(&blob).is_ok_and(|found| found.len() == file.len);
        if !is_there() {
            let Some(_lock) = self.lock(file, step)? else { return Ok(false) };
            if !is_there() && !self.fetch(file, step)? {
                return Ok(false);
            }
        }
        step(Step::There(file.len));
        self.repo.link(self.commit, &file.name, &file.tag)?;
        Ok(true)
    }

    /// Waits for another process that downloads the same, as long as it gets on. `None`: told to stop.
    fn lock(&self, file: &FileInfo, step: &dyn Fn(Step<'_>)) -> Result<Option<File>, HubError> {
        let (path, lock) = self.repo.lock(&file.tag)?;
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(lock)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(reason)) => return Err(HubError::Io { path, reason }),
            }
            let there = self.repo.there(&file.tag, file.len);
            if there != seen {
                (seen, since) = (there, Instant::now());
                step(Step::There(there));
            } else if since.elapsed() > LOCK_SILENCE {
                return Err(HubError::Locked { path, seconds: LOCK_SILENCE.as_secs() });
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            sleep(LOCK_LOOK);
        }
    }

    fn fetch(&self, file: &FileInfo, step: &dyn Fn(Step<'_>)) -> Result<bool, HubError> {
        let path = self.repo.incomplete(&file.tag);
        for last in [false, true] {
            let Some((what, got, want)) = self.fill(&path, file, step)? else {
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                let blob = self.repo.blob(&file.tag);
                fs::rename(&path, &blob).map_err(|reason| HubError::Io { path: blob, reason })?;
                return Ok(true);
            };
            // What was here before may be at fault: once more, from the beginning.
            fs::remove_file(&path).map_err(|reason| HubError::Io { path: path.clone(), reason })?;
            step(Step::There(0));
            if last {
                return Err(HubError::Damaged {
                    repo: self.name.repo(),
                    file: file.name.clone(),
                    what,
                    got,
                    want,
                });
            }
            step(Step::Again(what));
        }
        Ok(false)
    }

    /// Gets all of `file` into `path`. Returns what is wrong with it: name, found, announced.
    fn fill(
        &self,
        path: &Path,
        file: &FileInfo,
        step: &dyn Fn(Step<'_>),
    ) -> Result<Option<(&'static str, String, String)>, HubError> {
        let io = |reason: std::io::Error| match reason.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => self.full(path, file),
            _ => HubError::Io { path: path.into(), reason },
        };
        let mut out =
            File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        if out.metadata().map_err(io)?.len() > file.len {
            out.set_len(0).map_err(io)?;
        }
        let mut digest = Digest::of_tag(&file.tag, file.len);
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        loop {
            let read = out.read(&mut buffer).map_err(io)?;
            if read == 0 {
                break;
            }
            digest.update(&buffer[..read]);
            at += read as u64;
        }
        step(Step::There(at));

        let patience = self.remote.patience();
        let mut barren = 0;
        while at < file.len && !self.stop.load(Ordering::Relaxed) {
            let before = at;
            let end =
                self.remote.read(self.name, self.commit, &file.name, at, None).and_then(|mut reading| {
                    if reading.from < at {
                        // The server knows no ranges: all over.
                        digest = Digest::of_tag(&file.tag, file.len);
                        at = 0;
                        out.set_len(0).map_err(io).map_err(Failure::Final)?;
                        out.seek(SeekFrom::Start(0)).map_err(io).map_err(Failure::Final)?;
                        step(Step::There(0));
                    }
                    while at < file.len && !self.stop.load(Ordering::Relaxed) {
                        let most = usize::try_from(file.len - at).unwrap_or(CHUNK).min(CHUNK);
                        let read = reading.body.read(&mut buffer[..most]).map_err(passing)?;
                        if read == 0 {
                            return Err(Failure::Passing("the connection ended early".into(), None));
                        }
                        out.write_all(&buffer[..read]).map_err(io).map_err(Failure::Final)?;
                        digest.update(&buffer[..read]);
                        at += read as u64;
                        step(Step::Came(read as u64));
                    }
                    Ok(())
                });
            match end {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason, wait)) => {
                    barren = if at > before { 1 } else { barren + 1 };
                    if barren >= patience.attempts {
                        let url = format!("{}/{}", self.name.repo(), file.name);
                        return Err(HubError::Network { url, reason, attempts: barren });
                    }
                    step(Step::Again(&reason));
                    sleep(pause(patience, barren, wait));
                }
            }
        }
        if at < file.len {
            return Ok(None); // told to stop
        }
        // A name in the cache promises the content, also after a power cut.
        out.sync_all().map_err(io)?;
        Ok(digest
            .finish()
            .filter(|(_, got)| *got != file.tag)
            .map(|(what, got)| (what, got, file.tag.clone())))
    }

    /// The disk filled up under way.
    fn full(&self, path: &Path, file: &FileInfo) -> HubError {
        let there = self.repo.there(&file.tag, file.len);
        HubError::Space {
            repo: format!("{}/{}", self.name.repo(), file.name),
            total: crate::Bytes(file.len),
            there: crate::Bytes(there),
            free: crate::Bytes(crate::space::free(path).unwrap_or(0)),
            path: path.parent().unwrap_or(path).into(),
        }
    }
}
