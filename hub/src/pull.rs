//! A model by name: from the cache if it is whole there, else from the hub.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{fs, thread};

use crate::cache::Repo;
use crate::download::{Job, Step};
use crate::remote::{FileInfo, Listing, Remote};
use crate::select::{self, CONFIG, INDEX, Weights};
use crate::{Bytes, HubError, ModelName, Settings, space};

/// Files that arrive at once.
const AT_ONCE: usize = 4;
/// Questions about files that are asked at once.
const ASKED_AT_ONCE: usize = 8;

/// Which files of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// What a router reads: numbers, tokenizer, template; no weights. Of a GGUF model all of it: its one file has both.
    Text,
    /// All that a node reads.
    Model,
    /// The files whose names match one of these globs (`*`, `?`), and nothing else: for a rank that knows which of the
    /// files hold its part, or a person who does.
    Files(Vec<String>),
}

/// A model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The snapshot's directory; of a GGUF model its first file.
    pub path: PathBuf,
    /// Full commit id.
    pub commit: String,
}

/// What is told of a download while it runs. Files are numbered as `Begin` lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The hub at this address is asked what the model is.
    Asks(&'a str),
    /// It gave no answer, for this reason; it is asked again, perhaps several times. Told once.
    AsksAgain(&'a str),
    /// These files are next: name, bytes, bytes that are here already.
    Begin(&'a [(String, u64, u64)]),
    /// Bytes of a file that came over the network.
    Came(usize, u64),
    /// A file has so many bytes here: found, or left after others were thrown away.
    There(usize, u64),
    /// A file's connection broke, for this reason; it goes on.
    Again(usize, &'a str),
    /// A file is whole, checked and in its place.
    Done(usize),
}

/// Hears of a download, from several threads.
pub type Watch<'w> = &'w (dyn Fn(Event<'_>) + Sync);

/// The hub and the cache.
pub struct Hub {
    settings: Settings,
    remote: Remote,
}

impl Hub {
    /// Asks nobody yet.
    pub fn new(settings: Settings) -> Hub {
        Hub { remote: Remote::new(&settings), settings }
    }

    /// The model in the cache, or else from the hub. A model that is in the cache is served as it is: nothing is asked, so
    /// that a start does not depend on the network. [`Hub::pull`] brings what is newer.
    pub fn find(&self, name: &ModelName, want: &Want, watch: Watch<'_>) -> Result<Found, HubError> {
        match self.cached(name, want) {
            Some(found) => Ok(found),
            None => self.pull(name, want, watch),
        }
    }

    /// The model in the cache, if every file that is wanted is whole.
    pub fn cached(&self, name: &ModelName, want: &Want) -> Option<Found> {
        let repo = Repo::new(&self.settings.cache, name);
        let commit = repo.commit(name.revision())?;
        let names = repo.names(&commit);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let dir = repo.snapshot(&commit);
        let path = match want {
            Want::Files(globs) => (!select::matching(&names, globs).is_empty()).then(|| dir.clone())?,
            Want::Text if names.contains(&CONFIG) && name.quant().is_none() => dir.clone(),
            Want::Text | Want::Model => match select::weights(&names, name.quant()).ok()? {
                Weights::Single(_) if names.contains(&CONFIG) => dir.clone(),
                Weights::Indexed(index) if names.contains(&CONFIG) => {
                    let files = select::index_files(&fs::read(dir.join(index)).ok()?).ok()?;
                    files.iter().all(|file| names.contains(&file.as_str())).then(|| dir.clone())?
                }
                Weights::Gguf(files) => dir.join(&files[0]),
                Weights::Single(_) | Weights::Indexed(_) => return None,
            },
        };
        Some(Found { path, commit })
    }

    /// Brings the model in the cache up to what the hub has at its revision. What is there is kept, what broke off goes on.
    pub fn pull(&self, name: &ModelName, want: &Want, watch: Watch<'_>) -> Result<Found, HubError> {
        if self.settings.offline {
            return self.cached(name, want).ok_or_else(|| self.offline(name));
        }
        let listing = self.remote.list(name, watch)?;
        let repo = Repo::new(&self.settings.cache, name);
        repo.make()?;
        let get = |files: &[&str]| self.get(name, &repo, &listing, files, watch);
        let names: Vec<&str> = listing.files.iter().map(String::as_str).collect();
        let refused = |reason| HubError::Select { repo: name.repo(), reason };
        let dir = repo.snapshot(&listing.commit);
        let path = match want {
            Want::Files(globs) => {
                let files = select::matching(&names, globs);
                if files.is_empty() {
                    return Err(refused(format!("no file matches {}", globs.join(", "))));
                }
                get(&files)?;
                dir.clone()
            }
            Want::Text | Want::Model => {
                let weights = select::weights(&names, name.quant()).map_err(refused)?;
                let mut text = select::text(&names);
                match weights {
                    Weights::Gguf(files) => {
                        // Their numbers, tokenizer and template are inside.
                        get(&files.iter().map(String::as_str).collect::<Vec<_>>())?;
                        dir.join(&files[0])
                    }
                    _ if !names.contains(&CONFIG) => return Err(refused(format!("no {CONFIG}"))),
                    _ if *want == Want::Text => {
                        get(&text)?;
                        dir.clone()
                    }
                    Weights::Single(file) => {
                        text.push(&file);
                        get(&text)?;
                        dir.clone()
                    }
                    Weights::Indexed(index) => {
                        text.insert(0, &index);
                        get(&text)?;
                        let path = dir.join(&index);
                        let json = fs::read(&path).map_err(|reason| HubError::Io { path, reason })?;
                        let files = select::index_files(&json)
                            .map_err(|reason| refused(format!("{INDEX}: {reason}")))?;
                        get(&files.iter().map(String::as_str).collect::<Vec<_>>())?;
                        dir.clone()
                    }
                }
            }
        };
        repo.write_ref(name.revision(), &listing.commit)?;
        Ok(Found { path, commit: listing.commit })
    }

    /// Looks into a repository without keeping anything.
    pub fn peek<'h>(&'h self, name: &'h ModelName, watch: Watch<'h>) -> Result<Peek<'h>, HubError> {
        if self.settings.offline {
            return Err(self.offline(name));
        }
        Ok(Peek { hub: self, name, listing: self.remote.list(name, watch)?, watch })
    }

    fn offline(&self, name: &ModelName) -> HubError {
        HubError::Offline { what: name.to_string(), cache: self.settings.cache.clone() }
    }

    fn get(
        &self,
        name: &ModelName,
        repo: &Repo,
        listing: &Listing,
        files: &[&str],
        watch: Watch<'_>,
    ) -> Result<(), HubError> {
        let commit = &listing.commit;
        let head = |_, file: &&str| self.remote.head(name, commit, file, watch).map(Some);
        let infos = at_once(ASKED_AT_ONCE, files, head)?;
        self.require_space(name, repo, &infos)?;
        let parts: Vec<_> =
            infos.iter().map(|info| (info.name.clone(), info.len, repo.there(&info.tag, info.len))).collect();
        watch(Event::Begin(&parts));
        let stop = AtomicBool::new(false);
        let job = Job { remote: &self.remote, repo, name, commit, stop: &stop };
        at_once(AT_ONCE, &infos, |i, info| {
            let step = |step: Step<'_>| match step {
                Step::Came(bytes) => watch(Event::Came(i, bytes)),
                Step::There(bytes) => watch(Event::There(i, bytes)),
                Step::Again(reason) => watch(Event::Again(i, reason)),
            };
            let done = job.run(info, &step).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
            if done {
                watch(Event::Done(i));
            }
            Ok(done.then_some(()))
        })?;
        Ok(())
    }

    fn require_space(&self, name: &ModelName, repo: &Repo, infos: &[FileInfo]) -> Result<(), HubError> {
        // Files of the same content are one blob.
        let mut tags: Vec<(&str, u64)> = infos.iter().map(|info| (info.tag.as_str(), info.len)).collect();
        tags.sort_unstable();
        tags.dedup();
        let total = tags.iter().map(|(_, len)| len).sum();
        let there = tags.iter().map(|(tag, len)| repo.there(tag, *len)).sum();
        let path = &self.settings.cache;
        let free = space::free(path).map_err(|reason| HubError::Io { path: path.clone(), reason })?;
        fits(total, there, free).then_some(()).ok_or_else(|| HubError::Space {
            repo: name.repo(),
            total: Bytes(total),
            there: Bytes(there),
            free: Bytes(free),
            path: path.clone(),
        })
    }
}

/// Whether what is missing of `total` fits.
fn fits(total: u64, there: u64, free: u64) -> bool {
    total.saturating_sub(there) <= free
}

/// A look into a repository at one commit.
pub struct Peek<'h> {
    hub: &'h Hub,
    name: &'h ModelName,
    listing: Listing,
    watch: Watch<'h>,
}

impl Peek<'_> {
    /// Full commit id.
    pub fn commit(&self) -> &str {
        &self.listing.commit
    }

    /// Names of all files.
    pub fn names(&self) -> Vec<&str> {
        self.listing.files.iter().map(String::as_str).collect()
    }

    /// Bytes of `file`.
    pub fn len(&self, file: &str) -> Result<u64, HubError> {
        Ok(self.hub.remote.head(self.name, &self.listing.commit, file, self.watch)?.len)
    }

    /// Bytes `[from, to)` of `file`, as many of them as it has; nothing else of it crosses the network.
    pub fn read(&self, file: &str, from: u64, to: u64) -> Result<Vec<u8>, HubError> {
        self.hub.remote.range(self.name, &self.listing.commit, file, (from, to), self.watch)
    }
}

/// Does `work` for all `items` on up to `threads` threads; results in order. After the first error, or the first `None`
/// (told to stop), no further item is begun.
fn at_once<T: Sync, R: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(usize, &T) -> Result<Option<R>, HubError> + Sync,
) -> Result<Vec<R>, HubError> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<R>>> = Mutex::new(items.iter().map(|_| None).collect());
    let failed: Mutex<Option<HubError>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { return };
                    match work(i, item) {
                        Ok(Some(result)) => {
                            if let Ok(mut results) = results.lock() {
                                results[i] = Some(result);
                            }
                        }
                        Ok(None) => return,
                        Err(error) => {
                            next.store(items.len(), Ordering::Relaxed);
                            if let Ok(mut failed) = failed.lock() {
                                failed.get_or_insert(error);
                            }
                            return;
                        }
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        Some(error) => Err(error),
        None => Ok(results
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .into_iter()
            .flatten()
            .collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is there already needs no room.
    #[test]
    fn room_is_for_what_is_missing() {
        assert!(fits(10, 4, 6) && !fits(10, 4, 5) && fits(10, 10, 0));
    }

    /// One failure ends the rest, and is what is said.
    #[test]
    fn the_first_error_ends_all() {
        let items: Vec<usize> = (0..100).collect();
        let all = at_once(4, &items, |i, item| Ok(Some((i, item * 2)))).expect("no error");
        assert!(all.iter().enumerate().all(|(i, found)| *found == (i, i * 2)) && all.len() == 100);
        let begun = AtomicUsize::new(0);
        let error = at_once(1, &items, |i, _| {
            begun.fetch_add(1, Ordering::Relaxed);
            if i == 3 { Err(HubError::Name { text: "x".into() }) } else { Ok(Some(())) }
        });
        assert!(error.is_err());
        assert_eq!(begun.into_inner(), 4);
    }
}
