//! Files of the store: they are uploaded, read, listed and deleted by their owner.

use std::fs::{self, File};

use super::page::{Page, cursor, page};
use super::{Inner, Store, StoreError, random};
use crate::database::FILES;
use crate::record::{FileRecord, Purpose};
use crate::upload::Upload;

impl Store {
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

    pub(super) fn forget_files(&self, inner: &mut Inner, numbers: &[u64]) -> Result<(), StoreError> {
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
}
