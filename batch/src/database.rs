//! The embedded database: records as JSON under ascending numbers, one bit per answered line, the last time seen. After an
//! error of the disk it is closed and opened anew at the next use, since nobody knows then what of a commit has landed.
//! Used by `store`.

use std::path::{Path, PathBuf};

use redb::{ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::store::StoreError;

/// Of the database's pages in memory; the records are kept in memory by `store` anyway.
const CACHE_BYTES: usize = 8 << 20;

/// Records by number.
pub type Records = TableDefinition<'static, u64, &'static [u8]>;

/// Files.
pub const FILES: Records = TableDefinition::new("files");
/// Batches.
pub const BATCHES: Records = TableDefinition::new("batches");
/// Chunks of answered lines, by number of the batch and of the chunk.
const ANSWERED: TableDefinition<(u64, u32), &[u8]> = TableDefinition::new("answered");
/// `time`: the last moment seen. `next`: the next number.
const NUMBERS: TableDefinition<&str, u64> = TableDefinition::new("numbers");

/// The database.
#[derive(Debug)]
pub struct Database {
    path: PathBuf,
    /// `None` after an error.
    open: Option<redb::Database>,
}

/// A transaction that is being written.
pub struct Writing<'t>(&'t WriteTransaction);

impl Database {
    /// Opens `path`, made if it is not there.
    pub fn open(path: &Path) -> Result<Database, StoreError> {
        let mut database = Database { path: path.into(), open: None };
        database.reopen()?;
        Ok(database)
    }

    /// Opens it again after an error; true: it was closed, and what its user remembers may be wrong.
    pub fn reopen(&mut self) -> Result<bool, StoreError> {
        if self.open.is_some() {
            return Ok(false);
        }
        let open = redb::Builder::new().set_cache_size(CACHE_BYTES).create(&self.path)?;
        // All tables exist from here on.
        let write = open.begin_write()?;
        write.open_table(FILES)?;
        write.open_table(BATCHES)?;
        write.open_table(ANSWERED)?;
        write.open_table(NUMBERS)?;
        write.commit()?;
        self.open = Some(open);
        Ok(true)
    }

    /// Writes all that `change` asks for, or nothing. On disk when it returns.
    pub fn write(
        &mut self,
        change: impl FnOnce(&Writing) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let open = self.open.as_ref().ok_or(StoreError::Again)?;
        let result = (|| {
            let write = open.begin_write()?;
            change(&Writing(&write))?;
            Ok(write.commit()?)
        })();
        if result.is_err() {
            self.open = None;
        }
        result
    }

    /// All records of a table, by number.
    pub fn records<T: DeserializeOwned>(&self, table: Records) -> Result<Vec<(u64, T)>, StoreError> {
        let table = self.read()?.open_table(table)?;
        let mut all = Vec::new();
        for entry in table.iter()? {
            let (number, bytes) = entry?;
            let record = serde_json::from_slice(bytes.value()).map_err(StoreError::Record)?;
            all.push((number.value(), record));
        }
        Ok(all)
    }

    /// Chunks of answered lines of a batch.
    pub fn answered(&self, batch: u64) -> Result<Vec<(u32, Vec<u8>)>, StoreError> {
        let table = self.read()?.open_table(ANSWERED)?;
        let mut all = Vec::new();
        for entry in table.range((batch, 0)..=(batch, u32::MAX))? {
            let (key, bytes) = entry?;
            all.push((key.value().1, bytes.value().to_vec()));
        }
        Ok(all)
    }

    /// A number by its name; 0 where there is none.
    pub fn number(&self, name: &str) -> Result<u64, StoreError> {
        let table = self.read()?.open_table(NUMBERS)?;
        Ok(table.get(name)?.map_or(0, |value| value.value()))
    }

    fn read(&self) -> Result<redb::ReadTransaction, StoreError> {
        Ok(self.open.as_ref().ok_or(StoreError::Again)?.begin_read()?)
    }
}

impl Writing<'_> {
    /// Puts a record.
    pub fn put(&self, table: Records, number: u64, record: &impl Serialize) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(StoreError::Record)?;
        self.0.open_table(table)?.insert(number, bytes.as_slice())?;
        Ok(())
    }

    /// Removes a record.
    pub fn remove(&self, table: Records, number: u64) -> Result<(), StoreError> {
        self.0.open_table(table)?.remove(number)?;
        Ok(())
    }

    /// Puts a chunk of answered lines.
    pub fn put_answered(&self, batch: u64, chunk: u32, bytes: &[u8]) -> Result<(), StoreError> {
        self.0.open_table(ANSWERED)?.insert((batch, chunk), bytes)?;
        Ok(())
    }

    /// Forgets which lines of a batch are answered.
    pub fn remove_answered(&self, batch: u64) -> Result<(), StoreError> {
        self.0.open_table(ANSWERED)?.retain_in((batch, 0)..=(batch, u32::MAX), |_, _| false)?;
        Ok(())
    }

    /// Puts a number.
    pub fn put_number(&self, name: &str, value: u64) -> Result<(), StoreError> {
        self.0.open_table(NUMBERS)?.insert(name, value)?;
        Ok(())
    }
}
