//! A batch whose lines are being answered: which ones are left, and the commit of answers. Made and used by `router`, one at a
//! time per batch.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::bits::{Bits, CHUNK_LINES};
use crate::database::BATCHES;
use crate::input::Scan;
use crate::record::{BatchRecord, FileRecord, Purpose, Status};
use crate::store::{Store, StoreError};

/// A batch at work.
#[derive(Debug)]
pub struct Job {
    record: BatchRecord,
    number: u64,
    input: Arc<File>,
    /// Where each line begins, and its bytes.
    lines: Vec<(u64, u32)>,
    answered: Bits,
    outputs: [File; 2],
    /// As the store's.
    generation: u64,
    /// Behind what counts, files may hold more.
    dirty: bool,
}

/// A line to answer.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its place among the lines that are not blank, from 0.
    pub index: usize,
    batch: Arc<str>,
    input: Arc<File>,
    begin: u64,
    bytes: u32,
}

/// A line with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    index: usize,
    good: bool,
    text: String,
}

impl Line {
    /// What the client calls it, and what it asks for. Reads the disk.
    pub fn read(&self) -> io::Result<(String, Value)> {
        let mut bytes = vec![0; self.bytes as usize];
        self.input.read_exact_at(&mut bytes, self.begin)?;
        let mut line: Value = serde_json::from_slice(&bytes)?;
        let id = line["custom_id"].as_str().unwrap_or_default().to_owned();
        Ok((id, line["body"].take()))
    }

    /// The answer of a server: `status` is HTTP's.
    pub fn answer(&self, custom_id: &str, status: u16, request_id: &str, body: Value) -> Answer {
        let response = json!({"status_code": status, "request_id": request_id, "body": body});
        self.with(custom_id, status == 200, response, Value::Null)
    }

    /// There is no answer.
    pub fn error(&self, custom_id: &str, code: &str, message: &str) -> Answer {
        self.with(custom_id, false, Value::Null, json!({"code": code, "message": message}))
    }

    fn with(&self, custom_id: &str, good: bool, response: Value, error: Value) -> Answer {
        let id = format!("{}_{}", self.batch.replacen("batch_", "batch_req_", 1), self.index);
        let line = json!({"id": id, "custom_id": custom_id, "response": response, "error": error});
        Answer { index: self.index, good, text: line.to_string() }
    }
}

impl Job {
    /// What is kept of it.
    pub fn record(&self) -> &BatchRecord {
        &self.record
    }

    /// Lines without an answer.
    pub fn left(&self) -> usize {
        self.lines.len() - self.answered.count()
    }

    /// The first line without an answer at or behind `from`.
    pub fn next(&mut self, from: usize) -> Option<Line> {
        let index = self.answered.next_clear(from)?;
        let (begin, bytes) = self.lines[index];
        let batch = self.record.id.as_str().into();
        Some(Line { index, batch, input: Arc::clone(&self.input), begin, bytes })
    }

    /// Errors in place of the answers of up to `most` lines that have none.
    pub fn refuse(&mut self, most: usize, code: &str, message: &str) -> io::Result<Vec<Answer>> {
        let (mut answers, mut from) = (Vec::new(), 0);
        while answers.len() < most {
            let Some(line) = self.next(from) else { break };
            from = line.index + 1;
            answers.push(line.error(&line.read()?.0, code, message));
        }
        Ok(answers)
    }
}

impl Store {
    /// Goes to work on a batch whose lines were found good. `None`: it is not one of these; or its input is not what it was,
    /// and it has failed.
    pub fn job(&self, id: &str, line_bytes: u64) -> Result<Option<Job>, StoreError> {
        let (generation, number, record) = {
            let inner = self.ready()?;
            let Some(number) = inner.number(id) else { return Ok(None) };
            (inner.generation, number, inner.batches[&number].clone())
        };
        if record.status.ended() || record.status == Status::Validating {
            return Ok(None);
        }
        let path = self.content(&record.input_file_id);
        let lines = File::open(&path).and_then(|input| Ok((lines(&input, line_bytes)?, input)));
        let (lines, input) = match lines {
            // Cancelled or expired before its lines were counted.
            Ok((_, input)) if record.counts.total == 0 => (Vec::new(), input),
            Ok((lines, input)) if lines.len() as u64 == record.counts.total => (lines, input),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::at(&path, error));
            }
            _ => {
                self.fail(id, "input_file_changed", "The input file is gone, or not what it was.")?;
                return Ok(None);
            }
        };
        let [output, errors] = &record.outputs;
        let outputs = [self.output(output)?, self.output(errors)?];
        self.sync_files()?;
        let answered = Bits::new(lines.len());
        let mut job =
            Job { record, number, input: Arc::new(input), lines, answered, outputs, generation, dirty: true };
        // Whatever the generation: the bits have not been read.
        self.read_answered(&mut job)?;
        Ok(Some(job))
    }

    /// Keeps answers. Lines that have one already keep it. After an error none of them counts, and all can be given again.
    pub fn answer(&self, job: &mut Job, answers: &[Answer]) -> Result<(), StoreError> {
        if self.ready()?.generation != job.generation {
            self.read_answered(job)?;
        }
        let mut seen = HashSet::new();
        let fresh: Vec<&Answer> = answers
            .iter()
            .filter(|answer| !job.answered.get(answer.index) && seen.insert(answer.index))
            .collect();
        let mut texts = [Vec::new(), Vec::new()];
        for answer in &fresh {
            let text = &mut texts[usize::from(!answer.good)];
            text.extend_from_slice(answer.text.as_bytes());
            text.push(b'\n');
        }
        let was_dirty = std::mem::replace(&mut job.dirty, true);
        for (i, text) in texts.iter().enumerate() {
            let (file, end) = (&job.outputs[i], job.record.written[i]);
            let written = (|| {
                if was_dirty {
                    file.set_len(end)?;
                }
                if !text.is_empty() {
                    file.write_all_at(text, end)?;
                    file.sync_data()?;
                }
                Ok(())
            })();
            written.map_err(|error| StoreError::at(&self.content(&job.record.outputs[i]), error))?;
        }
        let mut answered = job.answered.clone();
        fresh.iter().for_each(|answer| _ = answered.set(answer.index));
        let chunks: HashSet<usize> = fresh.iter().map(|answer| answer.index / CHUNK_LINES).collect();

        let mut inner = self.lock();
        if inner.generation != job.generation {
            return Err(StoreError::Again);
        }
        let mut record = inner.batches[&job.number].clone();
        for answer in &fresh {
            match answer.good {
                true => record.counts.completed += 1,
                false => record.counts.failed += 1,
            }
        }
        for (written, text) in record.written.iter_mut().zip(&texts) {
            *written += text.len() as u64;
        }
        inner.write(|write| {
            write.put(BATCHES, job.number, &record)?;
            chunks
                .iter()
                .try_for_each(|&chunk| write.put_answered(job.number, chunk as u32, &answered.chunk(chunk)))
        })?;
        inner.batches.insert(job.number, record.clone());
        job.record = record;
        job.answered = answered;
        job.dirty = false;
        Ok(())
    }

    /// All lines are answered, or no more of them will be: closes the files and ends the batch.
    pub fn finish(&self, job: &mut Job) -> Result<BatchRecord, StoreError> {
        if job.record.status == Status::InProgress {
            self.change(&job.record.id, |batch, now| {
                if batch.status == Status::InProgress {
                    batch.enter(Status::Finalizing, now);
                }
            })?;
        }
        // Cuts what is behind the last answer, if anything.
        job.dirty = true;
        self.answer(job, &[])?;
        for (file, id) in job.outputs.iter().zip(&job.record.outputs) {
            file.sync_all().map_err(|error| StoreError::at(&self.content(id), error))?;
        }
        let mut inner = self.ready()?;
        let mut record = inner.batches[&job.number].clone();
        let now = inner.now();
        let outcome = record.outcome;
        record.enter(outcome, now);
        let lifetime = record.output_lifetime.or(self.lifetime());
        let files = [("output", 0), ("error", 1)].into_iter().filter(|&(_, i)| record.written[i] > 0);
        let files = files.map(|(kind, i)| FileRecord {
            id: record.outputs[i].clone(),
            owner: record.owner.clone(),
            filename: format!("{}_{kind}.jsonl", record.id),
            purpose: Purpose::BatchOutput,
            bytes: record.written[i],
            created_at: now,
            expires_at: lifetime.map(|seconds| now + seconds),
        });
        inner.put_files(files.collect(), |write| {
            write.put(BATCHES, job.number, &record)?;
            write.remove_answered(job.number)
        })?;
        inner.batches.insert(job.number, record.clone());
        drop(inner);
        for i in 0..2 {
            if record.written[i] == 0 {
                let _ = fs::remove_file(self.content(&record.outputs[i]));
            }
        }
        job.record = record.clone();
        Ok(record)
    }

    fn output(&self, id: &str) -> Result<File, StoreError> {
        let path = self.content(id);
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        file.map_err(|error| StoreError::at(&path, error))
    }

    /// Reads again what counts as answered.
    fn read_answered(&self, job: &mut Job) -> Result<(), StoreError> {
        let inner = self.ready()?;
        let mut answered = Bits::new(job.lines.len());
        for (chunk, bytes) in inner.database.answered(job.number)? {
            answered.load(chunk as usize, &bytes);
        }
        job.answered = answered;
        job.record = inner.batches.get(&job.number).cloned().ok_or(StoreError::Again)?;
        job.generation = inner.generation;
        job.dirty = true;
        Ok(())
    }
}

fn lines(input: &File, line_bytes: u64) -> io::Result<Vec<(u64, u32)>> {
    let mut scan = Scan::new(BufReader::with_capacity(256 << 10, input), line_bytes);
    let mut lines = Vec::new();
    while let Some(line) = scan.next_line()? {
        lines.push((line.begin, line.bytes.len() as u32));
    }
    Ok(lines)
}
