//! Files and batch jobs on disk: what clients uploaded, which lines are answered, and the answers. Called by the router's
//! `batch` (which has lines answered) and `api` (which shows them to clients). All calls block; none knows HTTP or the cluster.
//!
//! ```text
//! store.redb   records of files and batches, and one bit per answered line
//! files/       content, by id: inputs, outputs, and outputs of batches that run
//! incoming/    uploads that are not complete; emptied at every start
//! ```
//!
//! A line is answered when the database says so. An answer is first written to its file and synced, then the bit of its line
//! and the new length of the file are committed together: after a crash the file is cut to that length, and whatever had
//! been written beyond it is answered again. So every line is in the output or error file once, whenever the process died.

mod bits;
mod clock;
mod database;
mod input;
mod job;
mod record;
mod store;
mod upload;

pub use clock::Clock;
pub use input::Rules;
pub use job::{Answer, Job, Line};
pub use record::{BatchRecord, Counts, Endpoint, FileRecord, Problem, Purpose, Status};
pub use store::{NewBatch, Page, Space, Store, StoreError};
pub use upload::Upload;
