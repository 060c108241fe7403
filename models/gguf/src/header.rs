//! The header of one GGUF file: metadata and tensor table. Pure: bytes in, value out, so that hostile files can be tried
//! without a file system. Takes memory in proportion to the bytes given, whatever they claim.

use std::collections::HashSet;
use std::ops::Range;

use crate::cursor::Cursor;
use crate::metadata::{Metadata, short};
use crate::{GgufError, LFS_POINTER, Type, is_lfs_pointer};

/// What every file begins with.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";

/// Headers are shorter than this; the largest known have 20 MB.
pub(crate) const HEADER_BYTES_MAX: u64 = 256 << 20;

/// Most keys, and most tensors of a file.
const KEYS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 20;

/// Longest name of a tensor in bytes.
const NAME_BYTES_MAX: u64 = 1024;

/// Dimensions of a tensor.
const DIMS_MAX: u32 = 4;

/// Bytes that tensors begin at a multiple of, unless `general.alignment` says otherwise; and the most it may say.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// What a file begins with.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Keys and values.
    pub metadata: Metadata,
    /// In the order of the file.
    pub tensors: Vec<TensorInfo>,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub kind: Type,
    /// Outermost dimension first, as Hugging Face writes shapes (GGUF writes them the other way round).
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<u64>,
}

/// Why a header could not be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// The bytes given end before byte `end`, the file does not.
    More {
        /// Bytes needed at least.
        end: u64,
    },
    /// It is not what it should be.
    Wrong {
        /// Metadata key, tensor, or part of the header.
        field: String,
        /// What disagreed.
        reason: String,
    },
}

impl Fault {
    /// As an error about `path`.
    pub(crate) fn at(self, path: &str) -> GgufError {
        match self {
            Fault::More { end } => GgufError::format(path, "header", format!("needs byte {end}")),
            Fault::Wrong { field, reason } => GgufError::format(path, field, reason),
        }
    }
}

impl Header {
    /// Parses the header of a file of `len` bytes that begins with `bytes`; `path` is for later messages. Errors when it is
    /// not GGUF 2 or 3, when any length, count or offset is more than the file holds, when a key or tensor is there twice, a
    /// tensor begins off alignment, ends behind the file or shares bytes with another.
    pub fn parse(path: &str, bytes: &[u8], len: u64) -> Result<Header, Fault> {
        let mut cursor = Cursor::new(bytes, len);
        if is_lfs_pointer(bytes) {
            return Err(cursor.wrong(LFS_POINTER));
        }
        if len < MAGIC.len() as u64 || cursor.take(MAGIC.len() as u64)? != MAGIC {
            return Err(cursor.wrong("not a GGUF file"));
        }
        let version = cursor.u32()?;
        match version {
            2 | 3 => {}
            swapped if swapped != 0 && swapped & 0xffff == 0 => {
                return Err(cursor.wrong("big-endian files are not supported"));
            }
            other => {
                return Err(cursor.wrong(format!("GGUF version {other} is not supported (known: 2, 3)")));
            }
        }
        let (tensors, keys) = (cursor.u64()?, cursor.u64()?);
        for (count, max, what) in [(tensors, TENSORS_MAX, "tensors"), (keys, KEYS_MAX, "metadata keys")] {
            if count > max {
                return Err(cursor.wrong(format!("{count} {what}, at most {max}")));
            }
        }
        // A key and its value take 13 bytes at least, a tensor 32.
        cursor.room(keys, 13, "metadata keys")?;
        let metadata = Metadata::parse(path, &mut cursor, keys)?;
        cursor.field = "header".into();
        cursor.room(tensors, 32, "tensors")?;
        let alignment = alignment(&metadata)?;
        let lines: Vec<Line> =
            (0..tensors).map(|index| Line::parse(&mut cursor, index)).collect::<Result<_, _>>()?;
        let data = cursor.at().next_multiple_of(alignment);
        let tensors: Vec<TensorInfo> =
            lines.into_iter().map(|line| line.place(data, alignment, len)).collect::<Result<_, _>>()?;
        let mut names = HashSet::new();
        if let Some(tensor) = tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
            return Err(wrong(&tensor.name, "is there twice"));
        }
        match overlap(&tensors) {
            Some((a, b)) => Err(wrong(&a.name, format!("shares bytes with tensor {}", short(&b.name)))),
            None => Ok(Header { version, metadata, tensors }),
        }
    }
}

/// A line of the tensor table.
struct Line {
    name: String,
    kind: Type,
    shape: Vec<usize>,
    /// Bytes of the tensor.
    bytes: u64,
    /// From the beginning of the data.
    offset: u64,
}

impl Line {
    fn parse(cursor: &mut Cursor<'_>, index: u64) -> Result<Line, Fault> {
        cursor.field = format!("tensor {index}");
        let name = cursor.text(NAME_BYTES_MAX)?;
        cursor.field = format!("tensor {}", short(&name));
        let dims = cursor.u32()?;
        if dims == 0 || dims > DIMS_MAX {
            return Err(cursor.wrong(format!("{dims} dimensions, from 1 to {DIMS_MAX}")));
        }
        let mut sizes: Vec<u64> = (0..dims).map(|_| cursor.u64()).collect::<Result<_, _>>()?;
        let id = cursor.u32()?;
        let offset = cursor.u64()?;
        let Some(kind) = Type::of(id) else {
            return Err(cursor.wrong(format!("element type {id} is unknown")));
        };
        if !sizes[0].is_multiple_of(kind.block) {
            let (row, block) = (sizes[0], kind.block);
            return Err(cursor.wrong(format!("rows of {row} elements, {} has blocks of {block}", kind.name)));
        }
        let elements = sizes.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        let bytes = elements.and_then(|elements| (elements / kind.block).checked_mul(kind.bytes));
        sizes.reverse();
        let shape = sizes.iter().map(|size| usize::try_from(*size)).collect::<Result<Vec<_>, _>>();
        match (shape, bytes) {
            (Ok(shape), Some(bytes)) if bytes > 0 => Ok(Line { name, kind, shape, bytes, offset }),
            _ => Err(cursor.wrong(format!("shape {sizes:?} of {}", kind.name))),
        }
    }

    /// Where it lies when the data begins at byte `data` of a file of `len` bytes.
    fn place(self, data: u64, alignment: u64, len: u64) -> Result<TensorInfo, Fault> {
        if !self.offset.is_multiple_of(alignment) {
            let reason = format!("begins at {}, which is no multiple of {alignment}", self.offset);
            return Err(wrong(&self.name, reason));
        }
        let start = data.checked_add(self.offset);
        match (start, start.and_then(|start| start.checked_add(self.bytes))) {
            (Some(start), Some(end)) if end <= len => {
                Ok(TensorInfo { name: self.name, kind: self.kind, shape: self.shape, range: start..end })
            }
            (_, end) => {
                let end = end.unwrap_or(u64::MAX);
                Err(wrong(&self.name, format!("truncated: ends at byte {end}, the file has {len}")))
            }
        }
    }
}

fn wrong(tensor: &str, reason: impl Into<String>) -> Fault {
    Fault::Wrong { field: format!("tensor {}", short(tensor)), reason: reason.into() }
}

fn alignment(metadata: &Metadata) -> Result<u64, Fault> {
    let fault = |reason: String| Fault::Wrong { field: "general.alignment".into(), reason };
    let Some(value) = metadata.get("general.alignment") else { return Ok(ALIGNMENT) };
    match value.as_count() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX => Ok(alignment),
        _ => Err(fault(format!("{} is no power of two up to {ALIGNMENT_MAX}", value.short()))),
    }
}

/// Two tensors that share a byte.
fn overlap(tensors: &[TensorInfo]) -> Option<(&TensorInfo, &TensorInfo)> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.range.start);
    order.windows(2).find(|pair| pair[0].range.end > pair[1].range.start).map(|pair| (pair[0], pair[1]))
}
