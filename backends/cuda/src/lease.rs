//! Leases on the CUDA store. They hold their bytes in pinned host memory in wire order, so pieces of whole heads travel
//! without another copy, and other threads never touch the device but to wait for an event; except what receivers read in the
//! device's memory ([`crate::unstaged`]).

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use backend::paged::LeaseId;
use backend::{BackendError, KvError, KvExport, KvLanding, KvSpec, Piece, Plane, SeqId, Within};

use crate::driver::Driver;
use crate::memory::Pinned;
use crate::unstaged::Unstaged;

/// Where the bytes of a lease lie: `[layer][plane][token][head][dim]`.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) layers: Range<usize>,
    pub(crate) tokens: Range<u32>,
    planes: Vec<Plane>,
}

/// What both kinds of lease hold.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) lease: LeaseId,
    /// Where the end is reported; `None` once the store has taken the lease back.
    pub(crate) ended: Option<Arc<Mutex<Vec<LeaseId>>>>,
    pub(crate) layout: Layout,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(ended) = &self.ended {
            ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self.lease);
        }
    }
}

fn within(what: &'static str, asked: Range<usize>, held: &Range<usize>) -> Result<(), KvError> {
    if asked.start <= asked.end && asked.start >= held.start && asked.end <= held.end {
        return Ok(());
    }
    let (start, end) = (asked.start as u64, asked.end as u64);
    Err(KvError::Range { what, start, end, limit_start: held.start as u64, limit_end: held.end as u64 })
}

impl Layout {
    pub(crate) fn new(spec: &KvSpec, layers: Range<usize>, tokens: Range<u32>) -> Self {
        Layout { layers, tokens, planes: spec.planes.clone() }
    }

    pub(crate) fn layer_bytes(&self) -> usize {
        self.planes.iter().map(Plane::token_bytes).sum::<usize>() * self.tokens.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layers.len() * self.layer_bytes()
    }

    /// Where a plane of a layer begins.
    pub(crate) fn plane(&self, layer: usize, plane: usize) -> usize {
        let before: usize = self.planes[..plane].iter().map(Plane::token_bytes).sum();
        (layer - self.layers.start) * self.layer_bytes() + before * self.tokens.len()
    }

    /// The places of the piece's bytes in wire order: one where whole heads are asked for, else one a token.
    fn places(&self, piece: &Piece) -> Result<Vec<Range<usize>>, KvError> {
        within("layer", piece.layer..piece.layer + 1, &self.layers)?;
        within("plane", piece.plane..piece.plane + 1, &(0..self.planes.len()))?;
        let plane = &self.planes[piece.plane];
        within("heads", piece.heads.clone(), &plane.heads())?;
        let tokens = piece.tokens.start as usize..piece.tokens.end as usize;
        within("tokens", tokens.clone(), &(self.tokens.start as usize..self.tokens.end as usize))?;
        let (row, head) = (plane.token_bytes(), plane.head_bytes());
        let base = self.plane(piece.layer, piece.plane);
        let at = |token: usize| base + (token - self.tokens.start as usize) * row;
        if piece.heads == plane.heads() {
            return Ok(std::iter::once(at(tokens.start)..at(tokens.end)).collect());
        }
        let skip = (piece.heads.start - plane.heads().start) * head;
        let bytes = piece.heads.len() * head;
        Ok(tokens.map(|token| at(token) + skip..at(token) + skip + bytes).collect())
    }
}

/// A read lease.
pub enum CudaExport<D: Driver> {
    /// Bytes on their way to the host.
    Staged(Staged<D>),
    /// Bytes that stay.
    Unstaged(Unstaged<D>),
}

impl<D: Driver> CudaExport<D> {
    fn of(&self) -> &dyn KvExport {
        match self {
            CudaExport::Staged(export) => export,
            CudaExport::Unstaged(export) => export,
        }
    }
}

impl<D: Driver> KvExport for CudaExport<D> {
    fn tokens(&self) -> Range<u32> {
        self.of().tokens()
    }

    fn layers(&self) -> Range<usize> {
        self.of().layers()
    }

    fn wait(&self) -> Result<(), BackendError> {
        self.of().wait()
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        self.of().read(piece, out)
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        self.of().slices(piece)
    }

    fn within(&self, piece: &Piece) -> Option<Within<'_>> {
        self.of().within(piece)
    }
}

/// A read lease on bytes of the host.
pub struct Staged<D: Driver> {
    pub(crate) hold: Hold,
    pub(crate) host: Pinned<D>,
    pub(crate) arrived: Arc<D::Event>,
}

impl<D: Driver> Drop for Staged<D> {
    fn drop(&mut self) {
        // The copy writes to this memory until then; a device that failed writes no more.
        let _ = D::wait(&self.arrived);
    }
}

impl<D: Driver> KvExport for Staged<D> {
    fn tokens(&self) -> Range<u32> {
        self.hold.layout.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.hold.layout.layers.clone()
    }

    fn wait(&self) -> Result<(), BackendError> {
        D::wait(&self.arrived)
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        for place in self.hold.layout.places(piece)? {
            out.extend_from_slice(&self.host.as_ref()[place]);
        }
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        let places = self.hold.layout.places(piece).ok().filter(|places| places.len() == 1)?;
        Some(places.into_iter().map(|place| IoSlice::new(&self.host.as_ref()[place])).collect())
    }

    fn within(&self, piece: &Piece) -> Option<Within<'_>> {
        let places = self.hold.layout.places(piece).ok().filter(|places| places.len() == 1)?;
        let place = places.into_iter().next()?;
        Some(Within { region: self.host.region(), at: place.start, bytes: place.len(), sums: None })
    }
}

/// A write lease: bytes that go to the device at commit.
pub struct CudaLanding<D: Driver> {
    pub(crate) seq: SeqId,
    pub(crate) hold: Hold,
    pub(crate) host: Pinned<D>,
}

impl<D: Driver> KvLanding for CudaLanding<D> {
    fn tokens(&self) -> Range<u32> {
        self.hold.layout.tokens.clone()
    }

    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        let places = self.hold.layout.places(piece)?;
        let want = places.iter().map(|place| place.len()).sum();
        if bytes.len() != want {
            return Err(KvError::Length { got: bytes.len(), want });
        }
        let mut rest = bytes;
        for place in places {
            let (now, later) = rest.split_at(place.len());
            self.host.as_mut()[place].copy_from_slice(now);
            rest = later;
        }
        Ok(())
    }

    fn slices(&mut self, piece: &Piece) -> Option<Vec<IoSliceMut<'_>>> {
        let places = self.hold.layout.places(piece).ok().filter(|places| places.len() == 1)?;
        let place = places.into_iter().next()?;
        Some(vec![IoSliceMut::new(&mut self.host.as_mut()[place])])
    }
}
