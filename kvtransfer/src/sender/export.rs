//! An export that several connections send from at once.

use std::io::IoSlice;
use std::sync::Mutex;

use backend::{BackendError, KvError, KvExport, Piece, Within};

use crate::sync::lock;

/// A lease that is asked by one thread at a time, and whose bytes may be read by many.
pub(super) struct SharedExport {
    export: Box<dyn KvExport>,
    turn: Mutex<()>,
}

// SAFETY: the export's methods are called under `turn` only, so never by two threads at once, which is all that `Send`
// without `Sync` asks for. What outlives the turn are shared slices of bytes and a region, borrowed from `self`.
unsafe impl Sync for SharedExport {}

impl SharedExport {
    pub fn new(export: Box<dyn KvExport>) -> Self {
        SharedExport { export, turn: Mutex::new(()) }
    }

    /// See [`KvExport::wait`].
    pub fn wait(&self) -> Result<(), BackendError> {
        let _turn = lock(&self.turn);
        self.export.wait()
    }

    /// The `bytes` of `piece` where they lie, if they are to be had so.
    pub fn slices(&self, piece: &Piece, bytes: usize) -> Option<Vec<IoSlice<'_>>> {
        let _turn = lock(&self.turn);
        let slices = self.export.slices(piece)?;
        (slices.iter().map(|slice| slice.len()).sum::<usize>() == bytes).then_some(slices)
    }

    /// The `bytes` of `piece` in memory that lives longer than the lease, if they lie there.
    pub fn within(&self, piece: &Piece, bytes: usize) -> Option<Within<'_>> {
        let _turn = lock(&self.turn);
        let within = self.export.within(piece).filter(|within| within.bytes == bytes && bytes > 0)?;
        within.sums.is_none_or(|sums| sums.len() == piece.tokens.len()).then_some(within)
    }

    /// See [`KvExport::read`].
    pub fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        let _turn = lock(&self.turn);
        self.export.read(piece, out)
    }
}
