//! Which rectangles of a landing have come: every (layer, plane, head, token) exactly once. Kept by the receiving session,
//! asked before a byte is written, so that a repeated or stray frame never touches the landing.

use std::ops::Range;

use backend::{KvSpec, Piece};

use crate::limits::INTERVALS_MAX;

/// Disjoint ranges, ascending, neighbours joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intervals(Vec<Range<u32>>);

impl Intervals {
    /// Whether `range` shares a token with what is there.
    pub fn overlaps(&self, range: &Range<u32>) -> bool {
        let next = self.0.partition_point(|have| have.end <= range.start);
        self.0.get(next).is_some_and(|have| have.start < range.end)
    }

    /// Adds `range`, which overlaps nothing.
    pub fn add(&mut self, range: Range<u32>) {
        debug_assert!(!range.is_empty() && !self.overlaps(&range), "{range:?}");
        let next = self.0.partition_point(|have| have.end <= range.start);
        let joins_previous = next > 0 && self.0[next - 1].end == range.start;
        let joins_next = self.0.get(next).is_some_and(|have| have.start == range.end);
        match (joins_previous, joins_next) {
            (true, true) => {
                self.0[next - 1].end = self.0[next].end;
                self.0.remove(next);
            }
            (true, false) => self.0[next - 1].end = range.end,
            (false, true) => self.0[next].start = range.start,
            (false, false) => self.0.insert(next, range),
        }
    }

    /// Takes `range` out, which is there whole.
    pub fn remove(&mut self, range: Range<u32>) {
        let at = self.0.partition_point(|have| have.end <= range.start);
        debug_assert!(self.0.get(at).is_some_and(|have| have.start <= range.start && range.end <= have.end));
        if at < self.0.len() {
            let have = self.0.remove(at);
            let rest = [have.start..range.start, range.end..have.end];
            self.0.splice(at..at, rest.into_iter().filter(|rest| rest.start < rest.end));
        }
    }

    /// Number of ranges kept.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A rectangle that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoverageError {
    /// Not part of the landing.
    #[error("{what} {start}..{end} outside {limit_start}..{limit_end}")]
    Outside {
        /// `layer`, `plane`, `heads` or `tokens`.
        what: &'static str,
        /// First index.
        start: u64,
        /// One past the last.
        end: u64,
        /// First index of the landing.
        limit_start: u64,
        /// One past its last.
        limit_end: u64,
    },
    /// Came before.
    #[error("layer {layer} plane {plane} head {head} tokens {start}..{end} came twice")]
    Twice {
        /// Decoder layer.
        layer: usize,
        /// Index of the plane.
        plane: usize,
        /// Head of the whole model.
        head: usize,
        /// First token of the rectangle.
        start: u32,
        /// One past its last.
        end: u32,
    },
    /// More separate token ranges than are kept.
    #[error("layer {layer} plane {plane} comes in more than {INTERVALS_MAX} separate token ranges")]
    Scattered {
        /// Decoder layer.
        layer: usize,
        /// Index of the plane.
        plane: usize,
    },
}

/// The rectangles of one landing.
#[derive(Clone, Debug)]
pub struct Coverage {
    tokens: Range<u32>,
    planes: Vec<PlaneCover>,
    layers: usize,
    heads_per_layer: usize,
    /// `[layer][plane][head of this rank]`
    sets: Vec<Intervals>,
    covered_bytes: u64,
    wanted_bytes: u64,
}

#[derive(Clone, Debug)]
struct PlaneCover {
    heads: Range<usize>,
    head_bytes: usize,
    /// First set of this plane within a layer.
    offset: usize,
}

impl Coverage {
    /// Nothing covered yet of `tokens` of a rank with `spec`.
    pub fn new(spec: &KvSpec, tokens: Range<u32>) -> Self {
        let mut heads_per_layer = 0;
        let planes = spec
            .planes
            .iter()
            .map(|plane| {
                let offset = heads_per_layer;
                heads_per_layer += plane.heads().len();
                PlaneCover { heads: plane.heads(), head_bytes: plane.head_bytes(), offset }
            })
            .collect();
        Coverage {
            wanted_bytes: spec.token_bytes() as u64 * tokens.len() as u64,
            sets: vec![Intervals::default(); spec.layers * heads_per_layer],
            tokens,
            planes,
            layers: spec.layers,
            heads_per_layer,
            covered_bytes: 0,
        }
    }

    /// Bytes of the whole landing.
    pub fn wanted_bytes(&self) -> u64 {
        self.wanted_bytes
    }

    /// Bytes claimed so far.
    pub fn covered_bytes(&self) -> u64 {
        self.covered_bytes
    }

    /// Whether all of it is claimed. Claims never overlap, so the sum decides.
    pub fn complete(&self) -> bool {
        self.covered_bytes == self.wanted_bytes
    }

    /// Claims a rectangle and returns its bytes. Nothing changes on an error.
    pub fn claim(&mut self, piece: &Piece) -> Result<u64, CoverageError> {
        inside("layer", piece.layer as u64..piece.layer as u64 + 1, 0..self.layers as u64)?;
        inside("plane", piece.plane as u64..piece.plane as u64 + 1, 0..self.planes.len() as u64)?;
        let plane = &self.planes[piece.plane];
        let long = |range: &Range<usize>| range.start as u64..range.end as u64;
        inside("heads", long(&piece.heads), long(&plane.heads))?;
        let (tokens, all) = (&piece.tokens, &self.tokens);
        inside("tokens", tokens.start.into()..tokens.end.into(), all.start.into()..all.end.into())?;

        let bytes = (piece.heads.len() * plane.head_bytes) as u64 * tokens.len() as u64;
        let sets = self.sets_of(piece);
        for (set, head) in sets.iter().zip(piece.heads.clone()) {
            if set.overlaps(tokens) {
                let (layer, plane, start, end) = (piece.layer, piece.plane, tokens.start, tokens.end);
                return Err(CoverageError::Twice { layer, plane, head, start, end });
            }
            if set.len() >= INTERVALS_MAX {
                return Err(CoverageError::Scattered { layer: piece.layer, plane: piece.plane });
            }
        }
        sets.iter_mut().for_each(|set| set.add(tokens.clone()));
        self.covered_bytes += bytes;
        Ok(bytes)
    }

    /// Frees what is kept per head; nothing can be claimed any more.
    pub fn forget(&mut self) {
        (self.layers, self.sets) = (0, Vec::new());
    }

    /// Gives a claimed rectangle back: its bytes did not come after all, and will come again.
    pub fn give_back(&mut self, piece: &Piece) {
        let head_bytes = self.planes[piece.plane].head_bytes;
        self.sets_of(piece).iter_mut().for_each(|set| set.remove(piece.tokens.clone()));
        self.covered_bytes -= (piece.heads.len() * head_bytes) as u64 * piece.tokens.len() as u64;
    }

    fn sets_of(&mut self, piece: &Piece) -> &mut [Intervals] {
        let plane = &self.planes[piece.plane];
        let first = piece.layer * self.heads_per_layer + plane.offset + piece.heads.start - plane.heads.start;
        &mut self.sets[first..first + piece.heads.len()]
    }
}

fn inside(what: &'static str, range: Range<u64>, limit: Range<u64>) -> Result<(), CoverageError> {
    if range.start < range.end && limit.start <= range.start && range.end <= limit.end {
        return Ok(());
    }
    let (start, end, limit_start, limit_end) = (range.start, range.end, limit.start, limit.end);
    Err(CoverageError::Outside { what, start, end, limit_start, limit_end })
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend::DType;

    fn piece(layer: usize, plane: usize, heads: Range<usize>, tokens: Range<u32>) -> Piece {
        Piece { layer, plane, heads, tokens }
    }

    #[test]
    fn intervals_join_and_show_overlap() {
        let mut set = Intervals::default();
        for range in [10..20, 30..40, 0..5, 20..30] {
            assert!(!set.overlaps(&range));
            set.add(range);
        }
        assert_eq!(set.0, [0..5, 10..40]);
        assert!(set.overlaps(&(39..41)) && set.overlaps(&(4..6)) && set.overlaps(&(0..100)));
        assert!(!set.overlaps(&(5..10)) && !set.overlaps(&(40..41)));
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let mut set = Intervals::default();
        set.add(10..40);
        set.remove(20..30);
        assert_eq!(set.0, [10..20, 30..40]);
        set.remove(30..40);
        set.remove(10..12);
        assert_eq!(set.0, std::slice::from_ref(&(12..20)));
        let mut coverage = Coverage::new(&KvSpec::gqa(1, 2, 0..2, 2, DType::F32), 0..8);
        coverage.claim(&piece(0, 1, 0..2, 0..8)).unwrap();
        coverage.give_back(&piece(0, 1, 0..2, 2..4));
        assert_eq!(coverage.covered_bytes(), 2 * 8 * 6);
        assert_eq!(coverage.claim(&piece(0, 1, 0..2, 2..4)), Ok(32));
    }

    #[test]
    fn every_cell_is_taken_once_and_errors_change_nothing() {
        // 2 layers, heads 2..4 of 4, 2 elements of f32: 16 bytes per token and plane.
        let mut coverage = Coverage::new(&KvSpec::gqa(2, 4, 2..4, 2, DType::F32), 8..12);
        assert_eq!(coverage.wanted_bytes(), 2 * 2 * 16 * 4);
        assert_eq!(coverage.claim(&piece(0, 0, 2..3, 8..12)), Ok(32));
        let twice = CoverageError::Twice { layer: 0, plane: 0, head: 2, start: 11, end: 12 };
        assert_eq!(coverage.claim(&piece(0, 0, 2..4, 11..12)), Err(twice));
        assert_eq!(coverage.claim(&piece(0, 0, 3..4, 11..12)), Ok(8), "the refused claim left head 3 alone");
        for outside in [
            piece(2, 0, 2..3, 8..9),
            piece(0, 2, 2..3, 8..9),
            piece(0, 1, 1..3, 8..9),
            piece(0, 1, 2..3, 7..9),
            piece(0, 1, 2..3, 11..13),
            piece(0, 1, 2..2, 8..9),
        ] {
            assert!(matches!(coverage.claim(&outside), Err(CoverageError::Outside { .. })), "{outside:?}");
        }
        coverage.claim(&piece(0, 0, 3..4, 8..11)).unwrap();
        coverage.claim(&piece(0, 1, 2..4, 8..12)).unwrap();
        coverage.claim(&piece(1, 1, 2..4, 8..12)).unwrap();
        assert!(!coverage.complete());
        coverage.claim(&piece(1, 0, 2..4, 8..12)).unwrap();
        assert!(coverage.complete());
    }

    #[test]
    fn scattered_claims_are_bounded() {
        let mut coverage = Coverage::new(&KvSpec::gqa(1, 1, 0..1, 1, DType::F32), 0..40_000);
        for token in 0..INTERVALS_MAX as u32 {
            coverage.claim(&piece(0, 0, 0..1, 2 * token..2 * token + 1)).unwrap();
        }
        let more = coverage.claim(&piece(0, 0, 0..1, 35_000..35_001));
        assert_eq!(more, Err(CoverageError::Scattered { layer: 0, plane: 0 }));
    }
}
