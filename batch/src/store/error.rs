//! Why the store did not do something, in the words of whoever asked for it.

use std::io;
use std::path::{Path, PathBuf};

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
