//! Leases on cache memory that leave the owner thread: the only way in which bytes of a KV store meet a socket.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use crate::{KvError, Within};

/// A rectangle of cache: one layer, one plane, some heads, some tokens. Its bytes in canonical wire order are
/// `[token][head][dim]`. Heads are numbered over the whole model, tokens by absolute position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Decoder layer.
    pub layer: usize,
    /// Index into [`crate::KvSpec::planes`].
    pub plane: usize,
    /// Heads of the whole model.
    pub heads: Range<usize>,
    /// Absolute positions.
    pub tokens: Range<u32>,
}

/// Heads of one plane that one receiver takes, of any layer and token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Index into [`crate::KvSpec::planes`].
    pub plane: usize,
    /// Heads of the whole model.
    pub heads: Range<usize>,
}

/// A read lease on the finished cache of one sequence: pins its blocks until dropped.
pub trait KvExport: Send {
    /// Positions that may be read.
    fn tokens(&self) -> Range<u32>;

    /// Layers that may be read.
    fn layers(&self) -> Range<usize>;

    /// Waits until the device has produced the bytes; returns at once where they are there.
    fn wait(&self) -> Result<(), crate::BackendError> {
        Ok(())
    }

    /// Appends the bytes of `piece` in wire order to `out`.
    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError>;

    /// The bytes of `piece` where they lie, in wire order, when they need no conversion and lie in few runs;
    /// `None`: use [`KvExport::read`].
    fn slices(&self, _piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        None
    }

    /// The bytes of `piece` in memory that lives longer than the lease, when they lie there in one run, in wire order. Of memory
    /// that the host does not read ([`Within::sums`]) [`KvExport::slices`] and [`KvExport::read`] make a copy first.
    fn within(&self, _piece: &Piece) -> Option<Within<'_>> {
        None
    }
}

/// The sole write lease on positions of one sequence that arrive from elsewhere. Dropping it without
/// [`crate::KvStore::commit`] gives the blocks back once their sequence is closed.
pub trait KvLanding: Send {
    /// Positions to be filled.
    fn tokens(&self) -> Range<u32>;

    /// Stores the bytes of `piece`, given in wire order. Errors leave the landing usable for a retry of the piece.
    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError>;

    /// The places of the bytes of `piece`, in wire order, for reading straight from a socket, when layout and dtype
    /// agree; `None`: use [`KvLanding::write`].
    fn slices(&mut self, _piece: &Piece) -> Option<Vec<IoSliceMut<'_>>> {
        None
    }
}
