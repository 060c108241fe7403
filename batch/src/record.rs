//! What is known of a file and of a batch, as it is kept in the database.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Lines to answer.
    Batch,
    /// Answers, or errors.
    BatchOutput,
}

impl Purpose {
    /// OpenAI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Purpose::Batch => "batch",
            Purpose::BatchOutput => "batch_output",
        }
    }
}

/// A file. Its content is at `files/ID`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// `file-` and 32 hex digits.
    pub id: String,
    /// Whose it is; empty where no keys are asked for.
    pub owner: String,
    /// As uploaded.
    pub filename: String,
    /// What for.
    pub purpose: Purpose,
    /// Of the content.
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    /// When it is deleted; `None`: never.
    pub expires_at: Option<u64>,
}

/// What every line of a batch asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    /// Conversations.
    #[serde(rename = "/v1/chat/completions")]
    Chat,
    /// Texts.
    #[serde(rename = "/v1/completions")]
    Completions,
    /// OpenAI's newer form of conversations.
    #[serde(rename = "/v1/responses")]
    Responses,
}

impl Endpoint {
    /// All of them.
    pub const ALL: [Endpoint; 3] = [Endpoint::Chat, Endpoint::Completions, Endpoint::Responses];

    /// The path.
    pub fn as_str(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
            Endpoint::Responses => "/v1/responses",
        }
    }
}

/// Where a batch is. It goes down this list and never up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its lines are being looked at.
    Validating,
    /// Its lines are being answered.
    InProgress,
    /// All lines are answered; the files are being closed.
    Finalizing,
    /// The client wants it no more; lines without an answer get an error.
    Cancelling,
    /// Some line is not one: nothing was answered. An end.
    Failed,
    /// Every line has an answer or an error. An end.
    Completed,
    /// The window closed before all lines were answered. An end.
    Expired,
    /// As the client wanted. An end.
    Cancelled,
}

impl Status {
    /// Nothing happens to it any more.
    pub fn ended(self) -> bool {
        matches!(self, Status::Failed | Status::Completed | Status::Expired | Status::Cancelled)
    }

    /// OpenAI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Validating => "validating",
            Status::InProgress => "in_progress",
            Status::Finalizing => "finalizing",
            Status::Cancelling => "cancelling",
            Status::Failed => "failed",
            Status::Completed => "completed",
            Status::Expired => "expired",
            Status::Cancelled => "cancelled",
        }
    }
}

/// What is wrong with a line, or with the whole input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// Counted from 1; `None`: the whole input.
    pub line: Option<u64>,
}

/// Lines of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// All.
    pub total: u64,
    /// In the output file.
    pub completed: u64,
    /// In the error file.
    pub failed: u64,
}

/// A batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchRecord {
    /// `batch_` and 32 hex digits.
    pub id: String,
    /// Whose it is; empty where no keys are asked for.
    pub owner: String,
    /// What its lines ask for.
    pub endpoint: Endpoint,
    /// Where the lines are.
    pub input_file_id: String,
    /// As the client wrote it.
    pub completion_window: String,
    /// The client's own words.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Where it is.
    pub status: Status,
    /// The status that it will have when it is closed; `Completed` unless its lines ran out of time.
    pub outcome: Status,
    /// What is wrong with the input.
    pub problems: Vec<Problem>,
    /// Its lines.
    pub counts: Counts,
    /// Content of the output file and of the error file that counts; what is behind is cut off.
    pub written: [u64; 2],
    /// Ids of the two files, known to clients once the batch has ended, if they hold anything.
    pub outputs: [String; 2],
    /// Lifetime of the two files in seconds; `None`: the store's own.
    pub output_lifetime: Option<u64>,
    /// Seconds since 1970, as all below.
    pub created_at: u64,
    /// When its window closes.
    pub expires_at: u64,
    /// When it came to each status it has had.
    pub reached: BTreeMap<String, u64>,
}

impl BatchRecord {
    /// Goes on to `status`.
    pub fn enter(&mut self, status: Status, now: u64) {
        self.status = status;
        self.reached.insert(status.as_str().into(), now);
    }

    /// When it came to `status`.
    pub fn reached(&self, status: Status) -> Option<u64> {
        self.reached.get(status.as_str()).copied()
    }

    /// Ids of the output file and of the error file, once the batch has ended and if they hold anything.
    pub fn files(&self) -> [Option<&str>; 2] {
        let there = |i: usize| (self.status.ended() && self.written[i] > 0).then(|| self.outputs[i].as_str());
        [there(0), there(1)]
    }
}
