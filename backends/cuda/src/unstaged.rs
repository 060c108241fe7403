//! Read leases whose bytes stay in the device's memory, for receivers that read them there (GPUDirect): gathered by what each receiver
//! takes, summed on the device. Who wants them on the host after all gets a copy. Made by [`crate::kv`].

use std::io::IoSlice;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use backend::checksum::{Further, x_to};
use backend::{BackendError, Cut, KvError, KvExport, KvSpec, Piece, Within};

use crate::driver::Driver;
use crate::lease::Hold;
use crate::memory::{Lasting, Pinned};

/// Places of parts in the memory: what is copied in words of 16 bytes, on the device and by network cards.
const ALIGN: usize = 256;

/// Bytes of a warp's words, which `kernels/sums.cu` sums at once.
const ROUND_BYTES: u64 = 128;

/// One receiver's heads of a plane: `[token][head][dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) cut: Cut,
    /// Where it begins in the memory, in bytes, and among the sums.
    pub(crate) at: usize,
    pub(crate) sums_at: usize,
    /// Bytes of a token, and those of the token that come before them in a page.
    pub(crate) row: usize,
    pub(crate) skip: usize,
}

/// Where `cuts` of so many tokens lie, with bytes and sums of all. `None`: there are none, or some that the device does not sum.
pub(crate) fn parts(spec: &KvSpec, cuts: &[Cut], tokens: usize) -> Option<(Vec<Part>, usize, usize)> {
    let (mut at, mut sums_at) = (0usize, 0);
    let mut parts = Vec::with_capacity(cuts.len());
    for cut in cuts {
        let plane = spec.planes.get(cut.plane)?;
        let (own, head) = (plane.heads(), plane.head_bytes());
        let row = cut.heads.len() * head;
        let inside = own.start <= cut.heads.start && cut.heads.end <= own.end;
        if !inside || row == 0 || !row.is_multiple_of(4) {
            return None;
        }
        let skip = (cut.heads.start - own.start) * head;
        parts.push(Part { cut: cut.clone(), at, sums_at, row, skip });
        at = (at + row * tokens).next_multiple_of(ALIGN);
        sums_at += tokens;
    }
    (sums_at > 0).then_some((parts, at, sums_at))
}

/// What the kernel multiplies by.
pub(crate) fn tables() -> Vec<u32> {
    let further = Further::new(ROUND_BYTES);
    // What comes behind the last word of each lane, and the checksum's own 32 bits.
    let to_end = (0..32u64).map(|lane| x_to(32 * (32 - lane)));
    further.tables().iter().copied().chain(to_end).collect()
}

/// See the head of this file.
pub struct Unstaged<D: Driver> {
    pub(crate) hold: Hold,
    pub(crate) layer: usize,
    pub(crate) parts: Vec<Part>,
    pub(crate) memory: Lasting<D>,
    pub(crate) bytes: usize,
    /// In bytes, once `arrived`.
    pub(crate) sums: Pinned<D>,
    /// The bytes are there, and their sums are on the host.
    pub(crate) arrived: Arc<D::Event>,
    pub(crate) words: OnceLock<Option<Vec<u32>>>,
    pub(crate) copy: OnceLock<Option<Vec<u8>>>,
}

impl<D: Driver> Drop for Unstaged<D> {
    fn drop(&mut self) {
        // Kernels and a copy write to both memories until then; a device that failed writes no more.
        let _ = D::wait(&self.arrived);
    }
}

impl<D: Driver> Unstaged<D> {
    /// The part that has the piece's heads, and the piece's tokens within it.
    fn part(&self, piece: &Piece) -> Option<(&Part, Range<usize>)> {
        let held = &self.hold.layout.tokens;
        let inside = held.start <= piece.tokens.start && piece.tokens.end <= held.end;
        let tokens = || (piece.tokens.start - held.start) as usize..(piece.tokens.end - held.start) as usize;
        let has = |part: &&Part| part.cut.plane == piece.plane && part.cut.heads == piece.heads;
        let found = self.parts.iter().find(has).filter(|_| piece.layer == self.layer && inside)?;
        (!piece.tokens.is_empty()).then(|| (found, tokens()))
    }

    fn words(&self) -> Option<&[u32]> {
        let read = || {
            D::wait(&self.arrived).ok()?;
            let (words, _) = self.sums.as_ref().as_chunks::<4>();
            Some(words.iter().map(|word| u32::from_ne_bytes(*word)).collect())
        };
        self.words.get_or_init(read).as_deref()
    }

    /// All bytes on the host. `None`: the device has failed.
    fn copy(&self) -> Option<&[u8]> {
        let fetch = || {
            let mut bytes = vec![0; self.bytes];
            D::fetch(&self.arrived, self.memory.region().address(), &mut bytes).ok()?;
            Some(bytes)
        };
        self.copy.get_or_init(fetch).as_deref()
    }
}

impl<D: Driver> KvExport for Unstaged<D> {
    fn tokens(&self) -> Range<u32> {
        self.hold.layout.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.layer..self.layer + 1
    }

    fn wait(&self) -> Result<(), BackendError> {
        D::wait(&self.arrived)
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        let want = self.part(piece).map_or(0, |(part, tokens)| part.row * tokens.len());
        let slices = self.slices(piece).ok_or(KvError::Length { got: 0, want })?;
        slices.iter().for_each(|slice| out.extend_from_slice(slice));
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        let (part, tokens) = self.part(piece)?;
        let place = part.at + tokens.start * part.row..part.at + tokens.end * part.row;
        Some(vec![IoSlice::new(&self.copy()?[place])])
    }

    fn within(&self, piece: &Piece) -> Option<Within<'_>> {
        let (part, tokens) = self.part(piece)?;
        let sums = &self.words()?[part.sums_at + tokens.start..part.sums_at + tokens.end];
        let at = part.at + tokens.start * part.row;
        Some(Within { region: self.memory.region(), at, bytes: tokens.len() * part.row, sums: Some(sums) })
    }
}

#[cfg(test)]
mod tests {
    use backend::DType;

    use super::*;

    #[test]
    fn parts_lie_behind_each_other_and_are_of_this_rank() {
        // Heads 4..8 of 8, 16 elements of bf16: 32 bytes a head.
        let spec = KvSpec::gqa(2, 8, 4..8, 16, DType::BF16);
        let cut = |plane, heads| Cut { plane, heads };
        let (parts, bytes, sums) = super::parts(&spec, &[cut(0, 4..8), cut(1, 6..7)], 5).unwrap();
        let places: Vec<_> = parts.iter().map(|part| (part.at, part.sums_at, part.row, part.skip)).collect();
        assert_eq!(places, [(0, 0, 128, 0), (768, 5, 32, 64)]);
        assert_eq!((bytes, sums), (1024, 10));
        for wrong in [vec![cut(0, 3..5)], vec![cut(2, 4..5)], vec![cut(0, 4..4)], vec![]] {
            assert_eq!(super::parts(&spec, &wrong, 5), None, "{wrong:?}");
        }
        // A row that is no whole number of words.
        let odd = KvSpec::gqa(1, 1, 0..1, 3, DType::BF16);
        assert_eq!(super::parts(&odd, &[cut(0, 0..1)], 5), None);
    }
}
