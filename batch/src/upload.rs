//! A file on its way in: written to `incoming/`, which no client sees, until it is complete. Dropped, it is gone.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use crate::store::StoreError;

/// An upload. Begun by `Store::upload`, ended by `Store::keep`.
#[derive(Debug)]
pub struct Upload {
    /// Of the file that it becomes.
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    file: Option<File>,
    bytes: u64,
}

impl Upload {
    /// Makes `path`.
    pub(crate) fn new(id: String, path: PathBuf) -> Result<Upload, StoreError> {
        let file = File::create_new(&path).map_err(|error| StoreError::at(&path, error))?;
        Ok(Upload { id, path, file: Some(file), bytes: 0 })
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends. After an error the upload is of no use.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(file) = &mut self.file else { return Err(StoreError::Again) };
        file.write_all(bytes).map_err(|error| StoreError::at(&self.path, error))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Everything is on disk.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.take().map_or(Ok(()), |file| file.sync_all())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Kept, it has another name.
        let _ = fs::remove_file(&self.path);
    }
}
