//! Batches of the store: from the client's wish over the check of its lines to their end. Answers are `crate::job`'s.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};

use super::page::{Page, cursor, page};
use super::{Store, StoreError, random};
use crate::database::BATCHES;
use crate::input::{self, Rules};
use crate::record::{BatchRecord, Counts, Endpoint, Problem, Status};

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

impl Store {
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
}
