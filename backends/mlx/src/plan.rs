//! How the rows of a step become attention calls. Pure.
//!
//! Single tokens of a bank go together, `[slots, heads, 1, dim]` against `[slots, heads, keys, dim]`; a chunk of a prompt
//! goes alone, `[1, heads, rows, dim]`. Both write their K and V first, the tokens with one indexed update. Between the slots
//! of a call some may have no row: they are computed, and dropped, as long as they are not more than the others (Metal skips
//! keys that are masked).

use std::ops::Range;

use backend::{Batch, SeqId};

use crate::slots::Place;

/// The rows of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// One row of each of some slots, two at least.
    Tokens {
        bank: usize,
        /// From the first to the last.
        slots: Range<usize>,
        /// Slot of each row, ascending.
        held: Vec<usize>,
        /// Row of the batch.
        rows: Vec<usize>,
        /// Position of each row.
        positions: Vec<u32>,
    },
    /// Consecutive rows of one sequence.
    Chunk { place: Place, rows: Range<usize>, start: u32 },
}

/// What the rows of a call may see of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// All keys.
    All,
    /// The last row all, each before it one less.
    Causal,
    /// As positions and window say.
    Masked,
}

impl Call {
    /// Positions of its rows, in the order of the call.
    pub(crate) fn positions(&self) -> Vec<u32> {
        match self {
            Call::Tokens { positions, .. } => positions.clone(),
            Call::Chunk { rows, start, .. } => (*start..*start + rows.len() as u32).collect(),
        }
    }

    /// Which of the call's rows each of its slots has, if any. The rows of a chunk have one each.
    pub(crate) fn spread(&self) -> Vec<Option<usize>> {
        match self {
            Call::Tokens { slots, held, .. } => {
                slots.clone().map(|slot| held.binary_search(&slot).ok()).collect()
            }
            Call::Chunk { rows, .. } => (0..rows.len()).map(Some).collect(),
        }
    }

    /// Rows of the batch, in the order of the call.
    pub(crate) fn rows(&self) -> Vec<usize> {
        match self {
            Call::Tokens { rows, .. } => rows.clone(),
            Call::Chunk { rows, .. } => rows.clone().collect(),
        }
    }

    /// The keys that some row sees, and what each sees of them. A row at `p` sees `(p - window, p]`.
    pub(crate) fn sight(&self, window: Option<u32>) -> (Range<u32>, Sight) {
        let positions = self.positions();
        let (low, high) = (positions.iter().min(), positions.iter().max());
        let (low, high) = (low.copied().unwrap_or(0), high.copied().unwrap_or(0));
        let first = |position: u32| window.map_or(0, |window| (position + 1).saturating_sub(window));
        let keys = first(low)..high + 1;
        let sight = match self {
            _ if low == high => Sight::All,
            Call::Chunk { .. } if first(high) == keys.start => Sight::Causal,
            _ => Sight::Masked,
        };
        (keys, sight)
    }
}

/// The calls of a batch whose sequences lie at `place`. Every row is in one of them.
pub(crate) fn calls<E>(batch: &Batch, place: impl Fn(SeqId) -> Result<Place, E>) -> Result<Vec<Call>, E> {
    let (mut calls, mut tokens, mut row) = (Vec::new(), Vec::new(), 0);
    for run in &batch.runs {
        let (place, len) = (place(run.seq)?, run.len as usize);
        match len {
            1 => tokens.push((place, row, run.start)),
            _ => calls.push(Call::Chunk { place, rows: row..row + len, start: run.start }),
        }
        row += len;
    }
    tokens.sort_unstable();
    let mut groups: Vec<Vec<(Place, usize, u32)>> = Vec::new();
    for token in tokens {
        let near = |group: &&mut Vec<(Place, usize, u32)>| {
            let first = group[0].0;
            first.bank == token.0.bank && token.0.slot + 1 - first.slot <= 2 * (group.len() + 1)
        };
        match groups.last_mut().filter(near) {
            Some(group) => group.push(token),
            None => groups.push(vec![token]),
        }
    }
    for group in groups {
        let (first, row, start) = group[0];
        calls.push(match group.len() {
            1 => Call::Chunk { place: first, rows: row..row + 1, start },
            len => Call::Tokens {
                bank: first.bank,
                slots: first.slot..group[len - 1].0.slot + 1,
                held: group.iter().map(|token| token.0.slot).collect(),
                rows: group.iter().map(|token| token.1).collect(),
                positions: group.iter().map(|token| token.2).collect(),
            },
        });
    }
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(runs: &[(u64, u32, usize)]) -> Batch {
        let mut batch = Batch::default();
        runs.iter().for_each(|(seq, start, len)| batch.push(SeqId(*seq), *start, &vec![0; *len]));
        batch
    }

    /// Sequence `s` lies in slot `s % 10` of bank `s / 10`.
    fn planned(runs: &[(u64, u32, usize)]) -> Vec<Call> {
        let place = |seq: SeqId| Ok::<_, ()>(Place { bank: seq.0 as usize / 10, slot: seq.0 as usize % 10 });
        calls(&batch(runs), place).unwrap()
    }

    /// Tokens of a bank are one call, whatever their order; a wide gap, another bank or a chunk is another.
    #[test]
    fn neighbours_go_together() {
        let got = planned(&[(3, 30, 1), (9, 0, 4), (0, 20, 1), (12, 9, 1), (8, 50, 1)]);
        let chunk = |bank, slot, rows, start| Call::Chunk { place: Place { bank, slot }, rows, start };
        let want = [
            chunk(0, 9, 1..5, 0),
            Call::Tokens {
                bank: 0,
                slots: 0..4,
                held: vec![0, 3],
                rows: vec![5, 0],
                positions: vec![20, 30],
            },
            chunk(0, 8, 7..8, 50),
            chunk(1, 2, 6..7, 9),
        ];
        assert_eq!(got, want);
        assert_eq!(got[1].spread(), [Some(0), None, None, Some(1)]);
    }

    /// Not more slots without a row are computed than with one.
    #[test]
    fn gaps_are_bridged_up_to_a_half() {
        let spans = |slots: &[u64]| -> Vec<usize> {
            let runs: Vec<_> = slots.iter().map(|slot| (*slot, 5, 1)).collect();
            planned(&runs).iter().map(|call| call.spread().len()).collect()
        };
        assert_eq!(spans(&[0, 2, 4, 6, 8]), [9]);
        assert_eq!(spans(&[0, 1, 5]), [6]);
        assert_eq!(spans(&[0, 1, 6]), [2, 1]);
        assert_eq!(spans(&[0, 4]), [1, 1]);
    }

    /// Masks are made only where the shape does not say it already, and keys outside every window are left out.
    #[test]
    fn sight_of_chunks_and_tokens() {
        let sight = |runs: &[(u64, u32, usize)], window| planned(runs)[0].sight(window);
        assert_eq!(sight(&[(0, 8, 4)], None), (0..12, Sight::Causal));
        assert_eq!(sight(&[(0, 8, 4)], Some(12)), (0..12, Sight::Causal));
        assert_eq!(sight(&[(0, 8, 4)], Some(11)), (0..12, Sight::Masked));
        assert_eq!(sight(&[(0, 8, 4)], Some(3)), (6..12, Sight::Masked));
        assert_eq!(sight(&[(0, 8, 1)], None), (0..9, Sight::All));
        assert_eq!(sight(&[(0, 8, 1)], Some(3)), (6..9, Sight::All));
        assert_eq!(sight(&[(0, 8, 1), (1, 8, 1)], None), (0..9, Sight::All));
        assert_eq!(sight(&[(0, 8, 1), (1, 4, 1)], Some(3)), (2..9, Sight::Masked));
    }
}
