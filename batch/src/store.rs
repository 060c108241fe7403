//! All files and batches, and every change of them. Records are in memory too, so that lists cost no disk; the database is
//! what counts. What is done with files and with batches is in `files` and `batches`.

mod batches;
mod error;
mod files;
mod page;
mod space;

pub use batches::NewBatch;
pub use error::StoreError;
pub use page::Page;
pub use space::Space;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::clock::Clock;
use crate::database::{BATCHES, Database, FILES, Writing};
use crate::record::{BatchRecord, FileRecord};

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
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Store::open_at(folder, space, wall)
    }

    /// As [`Store::open`], on a machine whose clock says `wall`, in seconds since 1970.
    pub fn open_at(folder: &Path, space: Space, wall: u64) -> Result<Store, StoreError> {
        for part in [folder.to_path_buf(), folder.join("files"), folder.join("incoming")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&part);
            made.map_err(|error| StoreError::at(&part, error))?;
        }
        let path = folder.join("store.redb");
        let database = Database::open(&path).map_err(|error| match error {
            StoreError::Database(redb::Error::DatabaseAlreadyOpen) => StoreError::Busy(path),
            error => error,
        })?;
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

/// 128 bits that nobody can guess.
fn random() -> Result<u128, StoreError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Random(error.to_string()))?;
    Ok(u128::from_le_bytes(bytes))
}
