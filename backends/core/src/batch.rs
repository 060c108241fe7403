//! What one step computes: rows of several sequences, prompts and generation alike.

use std::fmt;

/// A sequence in a KV store. Chosen by the engine's leader, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Consecutive positions of one sequence: a prompt chunk (`len` large) or a generated token (`len` 1).
/// The step writes their K and V at `[start, start + len)` and attends over `[0, start + len)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The sequence; its capacity covers `start + len`.
    pub seq: SeqId,
    /// Position of the first row.
    pub start: u32,
    /// Number of rows, at least 1.
    pub len: u32,
}

/// The token of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Its id.
    Id(u32),
    /// Still in flight: what this row of the step submitted last drew ([`crate::Out::Draw`]). The device takes it from
    /// there, on every rank the id that rank 0 drew; the host may not know it yet.
    Drawn(u32),
}

/// The rows of one step, in the order of `runs`. At most one run per sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Consecutive rows per sequence.
    pub runs: Vec<Run>,
    /// Tokens of all rows: `ids.len()` is the sum of `runs[..].len`.
    pub ids: Vec<Input>,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Appends `ids` as a run of `seq` beginning at position `start`.
    pub fn push(&mut self, seq: SeqId, start: u32, ids: &[u32]) {
        assert!(!ids.is_empty(), "an empty run of sequence {seq}");
        self.runs.push(Run { seq, start, len: ids.len() as u32 });
        self.ids.extend(ids.iter().copied().map(Input::Id));
    }

    /// Appends the token that row `row` of the step before draws as a run of `seq` at position `start`.
    pub fn push_drawn(&mut self, seq: SeqId, start: u32, row: u32) {
        self.runs.push(Run { seq, start, len: 1 });
        self.ids.push(Input::Drawn(row));
    }

    /// Whether a row's token is in flight.
    pub fn in_flight(&self) -> bool {
        self.ids.iter().any(|id| matches!(id, Input::Drawn(_)))
    }

    /// The ids of all rows, in place of what `ids` held; `drawn` is what each row of the step before drew. Errors name a row that
    /// drew nothing.
    pub fn resolve(&self, drawn: &[Option<u32>], ids: &mut Vec<u32>) -> Result<(), String> {
        ids.clear();
        for input in &self.ids {
            ids.push(match *input {
                Input::Id(id) => id,
                Input::Drawn(row) => match drawn.get(row as usize) {
                    Some(Some(id)) => *id,
                    _ => return Err(format!("row {row} of the step before drew no token")),
                },
            });
        }
        Ok(())
    }

    /// The last row of each run: where logits are usually wanted.
    pub fn last_rows(&self) -> Vec<u32> {
        self.runs
            .iter()
            .scan(0, |end, run| {
                *end += run.len;
                Some(*end - 1)
            })
            .collect()
    }
}
