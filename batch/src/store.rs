//! All files and batches, and every change of them. Records are in memory too, so that lists cost no disk; the database is
//! what counts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::clock::Clock;
use crate::database::{BATCHES, Database, FILES, Writing};
use crate::input::{self, Rules};
use crate::record::{BatchRecord, Counts, Endpoint, FileRecord, Problem, Purpose, Status};
use crate::upload::Upload;

/// What owners may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Of all files of one owner.
    pub owner_bytes: u64,
    /// Files of one owner, and batches of one owner.
    pub owner_records: usize,
    /// Batches of one owner that have not ended.
    pub owner_unfinished: usize,
    /// Seconds after which files and ended batches are deleted, where the client does not say; `None`: never.
    pub lifetime: Option<u64>,
}

impl Default for Space {
    fn default() -> Space {
        Space {
            owner_bytes: 256 << 30,
            owner_records: 100_000,
            owner_unfinished: 1_000,
            lifetime: Some(30 * 24 * 3600),
        }
    }
}

/// Why something was not done. Nothing has changed then, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process works with this folder.
    #[error("another process has opened {}", .0.display())]
    Busy(PathBuf),
    /// The disk.
    #[error("{}: {error}", path.display())]
    Disk {
        /// What was written or read.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The database.
    #[error("database of batches: {0}")]
    Database(#[from] redb::Error),
    /// A record that is none.
    #[error("database of batches: a record is damaged: {0}")]
    Record(serde_json::Error),
    /// The database was opened anew in between.
    #[error("the database of batches was opened anew: try again")]
    Again,
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(String),
    /// A file that a batch needs.
    #[error("the file is being used by {0}")]
    InUse(String),
    /// The owner has as much as one may have.
    #[error("there is room for {limit} {what} of one key: delete some, or wait")]
    NoRoom {
        /// `bytes of files`, ...
        what: &'static str,
        /// So many.
        limit: u64,
    },
    /// A batch that has ended stays as it is.
    #[error("the batch has ended: it is {0}")]
    Ended(&'static str),
}

impl StoreError {
    /// An error of the disk at `path`.
    pub(crate) fn at(path: &Path, error: io::Error) -> StoreError {
        StoreError::Disk { path: path.into(), error }
    }

    /// The disk is full, or the user's part of it.
    pub fn is_full(&self) -> bool {
        let full = |error: &io::Error| {
            use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
            matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
        };
        match self {
            StoreError::Disk { error, .. } | StoreError::Database(redb::Error::Io(error)) => full(error),
            _ => false,
        }
    }
}

macro_rules! from_redb {
    ($($Error:ident),*) => { $(
        impl From<redb::$Error> for StoreError {
            fn from(error: redb::$Error) -> StoreError {
                StoreError::Database(error.into())
            }
        }
    )* };
}
from_redb!(DatabaseError, TransactionError, TableError, StorageError, CommitError);

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// In order.
    pub items: Vec<T>,
    /// There are more behind.
    pub more: bool,
}

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct NewBatch {
    /// Whose it is.
    pub owner: String,
    /// Of every line.
    pub endpoint: Endpoint,
    /// The lines.
    pub input_file_id: String,
    /// As the client wrote it.
    pub completion_window: String,
    /// The same, in seconds.
    pub window_s: u64,
    /// The client's own words.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Of the files that it makes, in seconds.
    pub output_lifetime: Option<u64>,
}

/// All files and batches of one folder, which no other process may use meanwhile.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    space: Space,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) database: Database,
    clock: Clock,
    files: BTreeMap<u64, FileRecord>,
    pub(crate) batches: BTreeMap<u64, BatchRecord>,
    file_numbers: HashMap<String, u64>,
    batch_numbers: HashMap<String, u64>,
    next: u64,
    /// How often the database was opened; jobs read theirs again when it changes.
    pub(crate) generation: u64,
}

impl Store {
    /// Opens `folder`, made if it is not there, and cleans up what a crash may have left.
    pub fn open(folder: &Path, space: Space) -> Result<Store, StoreError> {
        for part in [folder.to_path_buf(), folder.join("files"), folder.join("incoming")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&part);
            made.map_err(|error| StoreError::at(&part, error))?;
        }
        let path = folder.join("store.redb");
        let database = Database::open(&path).map_err(|error| match error {
            StoreError::Database(redb::Error::DatabaseAlreadyOpen) => StoreError::Busy(path),
            error => error,
        })?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let clock = Clock::new(wall, database.number("time")?, Instant::now());
        let mut inner = Inner {
            database,
            clock,
            files: BTreeMap::new(),
            batches: BTreeMap::new(),
            file_numbers: HashMap::new(),
            batch_numbers: HashMap::new(),
            next: 0,
            generation: 0,
        };
        inner.load()?;
        let store = Store { folder: folder.into(), space, inner: Mutex::new(inner) };
        store.clean()?;
        Ok(store)
    }

    /// Removes what no record knows: uploads that were not complete, files whose record was removed.
    fn clean(&self) -> Result<(), StoreError> {
        let inner = self.lock();
        let running = inner.batches.values().filter(|batch| !batch.status.ended());
        let outputs: HashSet<&str> = running.flat_map(|batch| &batch.outputs).map(String::as_str).collect();
        for part in ["incoming", "files"] {
            let folder = self.folder.join(part);
            for entry in fs::read_dir(&folder).map_err(|error| StoreError::at(&folder, error))? {
                let entry = entry.map_err(|error| StoreError::at(&folder, error))?;
                let name = entry.file_name();
                let known = name.to_str().is_some_and(|name| {
                    part == "files" && (inner.file_numbers.contains_key(name) || outputs.contains(name))
                });
                if !known {
                    let path = entry.path();
                    fs::remove_file(&path).map_err(|error| StoreError::at(&path, error))?;
                }
            }
        }
        Ok(())
    }

    /// Seconds since 1970, as records have them.
    pub fn now(&self) -> u64 {
        self.lock().now()
    }

    /// Begins an upload.
    pub fn upload(&self) -> Result<Upload, StoreError> {
        let id = format!("file-{:032x}", random()?);
        let path = self.folder.join("incoming").join(&id);
        Upload::new(id, path)
    }

    /// Makes a complete upload a file. `lifetime`: in seconds; `None`: the store's.
    pub fn keep(
        &self,
        mut upload: Upload,
        owner: &str,
        filename: &str,
        lifetime: Option<u64>,
    ) -> Result<FileRecord, StoreError> {
        upload.sync().map_err(|error| StoreError::at(&upload.path, error))?;
        let mut inner = self.ready()?;
        let mine = || inner.files.values().filter(|file| file.owner == owner);
        let bytes: u64 = mine().map(|file| file.bytes).sum();
        if bytes.saturating_add(upload.bytes()) > self.space.owner_bytes {
            return Err(StoreError::NoRoom { what: "bytes of files", limit: self.space.owner_bytes });
        }
        if mine().count() >= self.space.owner_records {
            return Err(StoreError::NoRoom { what: "files", limit: self.space.owner_records as u64 });
        }
        let path = self.content(&upload.id);
        fs::rename(&upload.path, &path).map_err(|error| StoreError::at(&path, error))?;
        let now = inner.now();
        let record = FileRecord {
            id: upload.id.clone(),
            owner: owner.into(),
            filename: filename.into(),
            purpose: Purpose::Batch,
            bytes: upload.bytes(),
            created_at: now,
            expires_at: lifetime.or(self.space.lifetime).map(|seconds| now + seconds),
        };
        let kept = self.sync_files().and_then(|()| inner.put_files(vec![record.clone()], |_| Ok(())));
        if let Err(error) = kept {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(record)
    }

    /// A file of `owner`.
    pub fn file(&self, owner: &str, id: &str) -> Option<FileRecord> {
        let inner = self.lock();
        let file = inner.files.get(inner.file_numbers.get(id)?)?;
        (file.owner == owner).then(|| file.clone())
    }

    /// The content of a file of `owner`.
    pub fn open_file(&self, owner: &str, id: &str) -> Result<Option<(FileRecord, File)>, StoreError> {
        let Some(record) = self.file(owner, id) else { return Ok(None) };
        let path = self.content(id);
        let file = File::open(&path).map_err(|error| StoreError::at(&path, error))?;
        Ok(Some((record, file)))
    }

    /// Files of `owner`, those behind `after`. `None`: there is no such file.
    pub fn files(
        &self,
        owner: &str,
        purpose: Option<Purpose>,
        after: Option<&str>,
        limit: usize,
        ascending: bool,
    ) -> Option<Page<FileRecord>> {
        let inner = self.lock();
        let after = cursor(after, owner, &inner.file_numbers, |number| &inner.files[&number].owner)?;
        let wanted =
            |file: &FileRecord| file.owner == owner && purpose.is_none_or(|wanted| file.purpose == wanted);
        Some(page(&inner.files, after, limit, ascending, wanted))
    }

    /// Deletes a file of `owner`; false: there is none.
    pub fn remove_file(&self, owner: &str, id: &str) -> Result<bool, StoreError> {
        let mut inner = self.ready()?;
        let Some(&number) = inner.file_numbers.get(id).filter(|number| inner.files[number].owner == owner)
        else {
            return Ok(false);
        };
        if let Some(batch) = inner.needs(id) {
            return Err(StoreError::InUse(batch));
        }
        self.forget_files(&mut inner, &[number])?;
        Ok(true)
    }

    /// Begins a batch. `None`: its owner has no such input file.
    pub fn create(&self, new: NewBatch) -> Result<Option<BatchRecord>, StoreError> {
        let mut inner = self.ready()?;
        let file = inner.file_numbers.get(&new.input_file_id).and_then(|number| inner.files.get(number));
        if file.is_none_or(|file| file.owner != new.owner) {
            return Ok(None);
        }
        let mine = || inner.batches.values().filter(|batch| batch.owner == new.owner);
        if mine().filter(|batch| !batch.status.ended()).count() >= self.space.owner_unfinished {
            let limit = self.space.owner_unfinished as u64;
            return Err(StoreError::NoRoom { what: "batches that have not ended", limit });
        }
        if mine().count() >= self.space.owner_records {
            return Err(StoreError::NoRoom { what: "batches", limit: self.space.owner_records as u64 });
        }
        let now = inner.now();
        let mut record = BatchRecord {
            id: format!("batch_{:032x}", random()?),
            owner: new.owner,
            endpoint: new.endpoint,
            input_file_id: new.input_file_id,
            completion_window: new.completion_window,
            metadata: new.metadata,
            status: Status::Validating,
            outcome: Status::Completed,
            problems: Vec::new(),
            counts: Counts::default(),
            written: [0; 2],
            outputs: [format!("file-{:032x}", random()?), format!("file-{:032x}", random()?)],
            output_lifetime: new.output_lifetime,
            created_at: now,
            expires_at: now + new.window_s,
            reached: BTreeMap::new(),
        };
        record.enter(Status::Validating, now);
        let number = inner.next;
        inner.write(|write| {
            write.put(BATCHES, number, &record)?;
            write.put_number("next", number + 1)
        })?;
        inner.next += 1;
        inner.batch_numbers.insert(record.id.clone(), number);
        inner.batches.insert(number, record.clone());
        Ok(Some(record))
    }

    /// A batch of `owner`.
    pub fn batch(&self, owner: &str, id: &str) -> Option<BatchRecord> {
        self.record(id).filter(|batch| batch.owner == owner)
    }

    /// A batch, whoever's.
    pub fn record(&self, id: &str) -> Option<BatchRecord> {
        let inner = self.lock();
        inner.batches.get(inner.batch_numbers.get(id)?).cloned()
    }

    /// Batches of `owner`, newest first, those behind `after`. `None`: there is no such batch.
    pub fn batches(&self, owner: &str, after: Option<&str>, limit: usize) -> Option<Page<BatchRecord>> {
        let inner = self.lock();
        let after = cursor(after, owner, &inner.batch_numbers, |number| &inner.batches[&number].owner)?;
        Some(page(&inner.batches, after, limit, false, |batch| batch.owner == owner))
    }

    /// Ids of batches that have not ended, oldest first.
    pub fn unfinished(&self) -> Vec<String> {
        let inner = self.lock();
        inner.batches.values().filter(|batch| !batch.status.ended()).map(|batch| batch.id.clone()).collect()
    }

    /// The client wants a batch no more. `None`: its owner has none of this id.
    pub fn cancel(&self, owner: &str, id: &str) -> Result<Option<BatchRecord>, StoreError> {
        match self.batch(owner, id) {
            None => return Ok(None),
            Some(batch) if batch.status == Status::Cancelling => return Ok(Some(batch)),
            Some(batch) if batch.status.ended() || batch.status == Status::Finalizing => {
                return Err(StoreError::Ended(batch.status.as_str()));
            }
            Some(_) => {}
        }
        self.change(id, |batch, now| {
            batch.enter(Status::Cancelling, now);
            batch.outcome = Status::Cancelled;
        })
        .map(Some)
    }

    /// Looks at the lines of a batch that is validating: it goes on to be in progress, or has failed.
    pub fn validate(&self, id: &str, rules: &Rules) -> Result<(), StoreError> {
        let Some(record) = self.record(id) else { return Ok(()) };
        let path = self.content(&record.input_file_id);
        let checked =
            File::open(&path).and_then(|file| input::check(BufReader::with_capacity(256 << 10, file), rules));
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.fail(id, "input_file_changed", "The input file is gone.");
            }
            Err(error) => return Err(StoreError::at(&path, error)),
        };
        if checked.stopped {
            return Ok(());
        }
        self.change(id, |batch, now| {
            // Cancelled meanwhile, it stays so.
            if batch.status != Status::Validating {
                return;
            }
            if checked.problems.is_empty() {
                batch.counts.total = checked.lines;
                batch.enter(Status::InProgress, now);
            } else {
                batch.problems = checked.problems;
                batch.enter(Status::Failed, now);
            }
        })?;
        Ok(())
    }

    /// Changes a batch. The argument of `change` beside it is the time.
    pub(crate) fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut BatchRecord, u64),
    ) -> Result<BatchRecord, StoreError> {
        let mut inner = self.ready()?;
        let number = *inner.batch_numbers.get(id).ok_or(StoreError::Again)?;
        let mut record = inner.batches[&number].clone();
        change(&mut record, inner.now());
        inner.write(|write| write.put(BATCHES, number, &record))?;
        inner.batches.insert(number, record.clone());
        Ok(record)
    }

    /// The window of a batch has closed: its lines are answered no more.
    pub fn expire(&self, id: &str) -> Result<(), StoreError> {
        self.change(id, |batch, now| {
            if batch.status == Status::InProgress || batch.status == Status::Validating {
                batch.enter(Status::Finalizing, now);
                batch.outcome = Status::Expired;
            }
        })?;
        Ok(())
    }

    /// An input that cannot be read any more, or is another one now, ends its batch.
    pub fn fail(&self, id: &str, code: &str, message: &str) -> Result<(), StoreError> {
        let problem = Problem { code: code.into(), message: message.into(), param: None, line: None };
        self.change(id, |batch, now| {
            batch.problems.push(problem);
            batch.enter(Status::Failed, now);
        })?;
        Ok(())
    }

    /// Deletes what has expired, and writes the time down. To be called every minute.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let mut inner = self.ready()?;
        let now = inner.now();
        let over = |file: &FileRecord| file.expires_at.is_some_and(|at| at <= now);
        let files: Vec<u64> = inner
            .files
            .iter()
            .filter(|(_, file)| over(file) && inner.needs(&file.id).is_none())
            .map(|(number, _)| *number)
            .collect();
        let old = |batch: &BatchRecord| {
            let ended = batch.reached(batch.status).filter(|_| batch.status.ended());
            ended.zip(self.space.lifetime).is_some_and(|(at, lifetime)| at + lifetime <= now)
        };
        let batches: Vec<u64> =
            inner.batches.iter().filter(|(_, batch)| old(batch)).map(|(number, _)| *number).collect();
        inner.write(|write| batches.iter().try_for_each(|number| write.remove(BATCHES, *number)))?;
        for number in batches {
            if let Some(batch) = inner.batches.remove(&number) {
                inner.batch_numbers.remove(&batch.id);
            }
        }
        self.forget_files(&mut inner, &files)
    }

    fn forget_files(&self, inner: &mut Inner, numbers: &[u64]) -> Result<(), StoreError> {
        inner.write(|write| numbers.iter().try_for_each(|number| write.remove(FILES, *number)))?;
        for number in numbers {
            if let Some(file) = inner.files.remove(number) {
                inner.file_numbers.remove(&file.id);
                // What stays is removed at the next start.
                let _ = fs::remove_file(self.content(&file.id));
            }
        }
        Ok(())
    }

    /// Where the content of a file is.
    pub(crate) fn content(&self, id: &str) -> PathBuf {
        self.folder.join("files").join(id)
    }

    /// Names of files are on disk.
    pub(crate) fn sync_files(&self) -> Result<(), StoreError> {
        let folder = self.folder.join("files");
        File::open(&folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| StoreError::at(&folder, error))
    }

    /// The store, its database open.
    pub(crate) fn ready(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.lock();
        if inner.database.reopen()? {
            inner.load()?;
        }
        Ok(inner)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        // Memory follows the database after each write; no panic comes between.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lifetime(&self) -> Option<u64> {
        self.space.lifetime
    }
}

impl Inner {
    /// Reads all records.
    fn load(&mut self) -> Result<(), StoreError> {
        self.generation += 1;
        self.files = self.database.records(FILES)?.into_iter().collect();
        self.batches = self.database.records(BATCHES)?.into_iter().collect();
        self.file_numbers = self.files.iter().map(|(number, file)| (file.id.clone(), *number)).collect();
        self.batch_numbers = self.batches.iter().map(|(number, batch)| (batch.id.clone(), *number)).collect();
        self.next = self.database.number("next")?;
        Ok(())
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.now(Instant::now())
    }

    pub(crate) fn number(&self, batch: &str) -> Option<u64> {
        self.batch_numbers.get(batch).copied()
    }

    /// One transaction. The time goes with every one.
    pub(crate) fn write(
        &mut self,
        change: impl FnOnce(&Writing) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let now = self.now();
        self.database.write(|write| {
            change(write)?;
            write.put_number("time", now)
        })
    }

    /// Puts files under new numbers, and with them whatever `also` puts.
    pub(crate) fn put_files(
        &mut self,
        files: Vec<FileRecord>,
        also: impl FnOnce(&Writing) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let first = self.next;
        self.write(|write| {
            for (number, file) in (first..).zip(&files) {
                write.put(FILES, number, file)?;
            }
            write.put_number("next", first + files.len() as u64)?;
            also(write)
        })?;
        for file in files {
            self.file_numbers.insert(file.id.clone(), self.next);
            self.files.insert(self.next, file);
            self.next += 1;
        }
        Ok(())
    }

    /// The batch that still reads a file.
    fn needs(&self, file: &str) -> Option<String> {
        let mut running = self.batches.values().filter(|batch| !batch.status.ended());
        running.find(|batch| batch.input_file_id == file).map(|batch| batch.id.clone())
    }
}

/// The number of the item that a list goes on behind: `None`: there is none; `Some(None)`: it begins.
fn cursor<'a>(
    after: Option<&str>,
    owner: &str,
    numbers: &HashMap<String, u64>,
    owner_of: impl FnOnce(u64) -> &'a String,
) -> Option<Option<u64>> {
    let Some(id) = after else { return Some(None) };
    let number = *numbers.get(id)?;
    (owner_of(number) == owner).then_some(Some(number))
}

fn page<T: Clone>(
    all: &BTreeMap<u64, T>,
    after: Option<u64>,
    limit: usize,
    ascending: bool,
    wanted: impl Fn(&T) -> bool,
) -> Page<T> {
    let behind: Box<dyn Iterator<Item = &T>> = match (ascending, after) {
        (true, Some(after)) => Box::new(all.range(after + 1..).map(|(_, item)| item)),
        (false, Some(after)) => Box::new(all.range(..after).rev().map(|(_, item)| item)),
        (true, None) => Box::new(all.values()),
        (false, None) => Box::new(all.values().rev()),
    };
    let mut items: Vec<T> = behind.filter(|item| wanted(item)).take(limit + 1).cloned().collect();
    let more = items.len() > limit;
    items.truncate(limit);
    Page { items, more }
}

/// 128 bits that nobody can guess.
fn random() -> Result<u128, StoreError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Random(error.to_string()))?;
    Ok(u128::from_le_bytes(bytes))
}
