//! Leases that leave the owner thread. An export is arrays of its own, evaluated or being so; a landing is host memory,
//! given to MLX when it is committed. Neither shares memory with the store, so neither can disturb it.

use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use backend::paged::LeaseId;
use backend::{BackendError, KvError, KvExport, KvLanding, KvSpec, Piece, SeqId};
use mlx_rs::Array;

use crate::graph::{Failure, Recorded, int, mlx_type};
use crate::host::{Buffer, PAGE_BYTES};

/// A read lease: a copy of one layer of one sequence.
#[derive(Debug)]
pub struct MlxExport {
    spec: Arc<KvSpec>,
    layer: usize,
    tokens: Range<u32>,
    /// Per plane `[tokens, bytes of a token]` in wire order; or why not.
    planes: Result<Vec<Array>, String>,
}

impl MlxExport {
    /// `planes` are being evaluated; none for an empty range.
    pub(crate) fn new(
        spec: Arc<KvSpec>,
        layer: usize,
        tokens: Range<u32>,
        planes: Result<Vec<Array>, Failure>,
    ) -> Self {
        MlxExport { spec, layer, tokens, planes: planes.map_err(|failure| failure.0) }
    }
}

impl KvExport for MlxExport {
    fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.layer..self.layer + 1
    }

    fn wait(&self) -> Result<(), BackendError> {
        match &self.planes {
            // They are being evaluated: this waits for it.
            Ok(planes) => {
                planes.iter().try_for_each(|plane| plane.eval()).map_err(|error| Failure::from(error).into())
            }
            Err(reason) => Err(BackendError::Device(reason.clone())),
        }
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        let regions = Regions::new(self.spec.clone(), self.tokens.clone());
        let place = regions.check(piece, self.layers())?;
        let length = KvError::Length { got: 0, want: place.bytes * place.count };
        let Ok(planes) = &self.planes else { return Err(length) };
        if place.count == 0 {
            return Ok(());
        }
        let Ok(bytes) = planes[piece.plane].try_as_slice::<u8>() else { return Err(length) };
        out.reserve(place.bytes * place.count);
        for token in 0..place.count {
            out.extend_from_slice(&bytes[place.start + token * place.stride..][..place.bytes]);
        }
        Ok(())
    }
}

/// Where some tokens of all layers and planes lie in one buffer: `[layer][plane]` regions of whole pages, each
/// `[token][head][dim]`.
#[derive(Debug)]
pub(crate) struct Regions {
    spec: Arc<KvSpec>,
    tokens: Range<u32>,
}

/// Where a piece lies in its region: `count` times `bytes`, `stride` apart.
struct Strip {
    start: usize,
    count: usize,
    bytes: usize,
    stride: usize,
}

impl Regions {
    pub(crate) fn new(spec: Arc<KvSpec>, tokens: Range<u32>) -> Self {
        Regions { spec, tokens }
    }

    fn region_bytes(&self, plane: usize) -> usize {
        self.tokens.len() * self.spec.planes[plane].token_bytes()
    }

    fn offset(&self, layer: usize, plane: usize) -> usize {
        let pages = |plane| self.region_bytes(plane).next_multiple_of(PAGE_BYTES);
        let layer_bytes: usize = (0..self.spec.planes.len()).map(pages).sum();
        layer * layer_bytes + (0..plane).map(pages).sum::<usize>()
    }

    /// Errors when `piece` is not within `layers` and the tokens.
    fn check(&self, piece: &Piece, layers: Range<usize>) -> Result<Strip, KvError> {
        let planes = &self.spec.planes;
        within("layer", piece.layer..piece.layer + 1, &layers)?;
        within("plane", piece.plane..piece.plane + 1, &(0..planes.len()))?;
        let plane = &planes[piece.plane];
        within("heads", piece.heads.clone(), &plane.heads())?;
        let wide = |tokens: &Range<u32>| tokens.start as usize..tokens.end as usize;
        within("tokens", wide(&piece.tokens), &wide(&self.tokens))?;
        let (stride, head) = (plane.token_bytes(), plane.head_bytes());
        let skip = (piece.heads.start - plane.heads().start) * head;
        let start = (piece.tokens.start - self.tokens.start) as usize * stride + skip;
        Ok(Strip { start, count: piece.tokens.len(), bytes: piece.heads.len() * head, stride })
    }
}

fn within(what: &'static str, asked: Range<usize>, held: &Range<usize>) -> Result<(), KvError> {
    if asked.start <= asked.end && asked.start >= held.start && asked.end <= held.end {
        return Ok(());
    }
    let (start, end) = (asked.start as u64, asked.end as u64);
    Err(KvError::Range { what, start, end, limit_start: held.start as u64, limit_end: held.end as u64 })
}

/// A write lease: host memory that becomes cache when it is committed.
#[derive(Debug)]
pub struct MlxLanding {
    pub(crate) seq: SeqId,
    regions: Regions,
    buffer: Option<Buffer>,
    lease: LeaseId,
    /// Where the end is reported.
    ended: Arc<Mutex<Vec<LeaseId>>>,
}

impl MlxLanding {
    /// Errors when there is no memory.
    pub(crate) fn new(
        seq: SeqId,
        regions: Regions,
        lease: LeaseId,
        ended: Arc<Mutex<Vec<LeaseId>>>,
    ) -> Result<Self, KvError> {
        let buffer = Buffer::zeroed(regions.offset(regions.spec.layers, 0))?;
        Ok(MlxLanding { seq, regions, buffer: Some(buffer), lease, ended })
    }

    /// Whether it is of the store that is told through `ended`.
    pub(crate) fn is_of(&self, ended: &Arc<Mutex<Vec<LeaseId>>>) -> bool {
        Arc::ptr_eq(&self.ended, ended)
    }

    /// Its lease, which lives on, and its memory.
    pub(crate) fn into_filled(mut self) -> (LeaseId, Filled) {
        let regions = Regions::new(self.regions.spec.clone(), self.regions.tokens.clone());
        // Without a buffer, dropping it reports nothing.
        (self.lease, Filled { regions, buffer: self.buffer.take().map(Arc::new) })
    }

    fn strip(&mut self, piece: &Piece) -> Result<(Strip, &mut [u8]), KvError> {
        let strip = self.regions.check(piece, 0..self.regions.spec.layers)?;
        let start = self.regions.offset(piece.layer, piece.plane);
        let bytes = self.regions.region_bytes(piece.plane);
        let buffer = self.buffer.as_mut().map(Buffer::as_mut_slice).unwrap_or_default();
        Ok((strip, &mut buffer[start..start + bytes]))
    }
}

impl Drop for MlxLanding {
    fn drop(&mut self) {
        if self.buffer.is_some() {
            self.ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self.lease);
        }
    }
}

impl KvLanding for MlxLanding {
    fn tokens(&self) -> Range<u32> {
        self.regions.tokens.clone()
    }

    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        let (strip, region) = self.strip(piece)?;
        let want = strip.bytes * strip.count;
        if bytes.len() != want {
            return Err(KvError::Length { got: bytes.len(), want });
        }
        for (token, values) in bytes.chunks_exact(strip.bytes.max(1)).enumerate() {
            region[strip.start + token * strip.stride..][..strip.bytes].copy_from_slice(values);
        }
        Ok(())
    }

    fn slices(&mut self, piece: &Piece) -> Option<Vec<IoSliceMut<'_>>> {
        let (strip, region) = self.strip(piece).ok()?;
        // Parts of rows are one per token: too many to be worth it.
        if strip.bytes != strip.stride {
            return None;
        }
        Some(vec![IoSliceMut::new(&mut region[strip.start..][..strip.bytes * strip.count])])
    }
}

/// The memory of a committed landing.
#[derive(Debug)]
pub(crate) struct Filled {
    regions: Regions,
    buffer: Option<Arc<Buffer>>,
}

impl Filled {
    pub(crate) fn tokens(&self) -> Range<u32> {
        self.regions.tokens.clone()
    }

    /// A plane of a layer as the cache wants it: `[1, heads, tokens, dim]`.
    pub(crate) fn array(&self, layer: usize, plane: usize) -> Recorded {
        let Some(buffer) = &self.buffer else { return Err(Failure("a landing without memory".to_owned())) };
        let (offset, size) = (self.regions.offset(layer, plane), self.regions.region_bytes(plane));
        let plane = &self.regions.spec.planes[plane];
        let shape = [1, self.regions.tokens.len(), plane.heads().len(), plane.dim].map(int);
        let wire = buffer.array(offset, &shape, mlx_type(plane.dtype), size)?;
        Ok(wire.transpose_axes(&[0, 2, 1, 3])?)
    }
}
