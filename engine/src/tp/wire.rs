//! Numbers, texts and caches as bytes, little endian, for the frames between the ranks of a group. Pure.

use std::ops::Range;
use std::time::Duration;

use backend::{DType, KvSpec, Plane, Sharding};

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The frame ends in the middle of something.
    #[error("frame ends after {got} bytes, {wanted} more wanted")]
    Short {
        /// Bytes that there are.
        got: usize,
        /// Bytes missing.
        wanted: usize,
    },
    /// The frame goes on after its end.
    #[error("{0} bytes after the end of a frame")]
    Long(usize),
    /// A value outside its range.
    #[error("{what} {value} is unknown")]
    Unknown {
        /// What it should be.
        what: &'static str,
        /// What it was.
        value: String,
    },
}

/// Bytes being written.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// Appends a byte.
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends microseconds.
    pub fn duration(&mut self, value: Duration) {
        self.u64(value.as_micros().try_into().unwrap_or(u64::MAX));
    }

    /// Appends length and bytes.
    pub fn bytes(&mut self, value: &[u8]) {
        self.u32(value.len() as u32);
        self.0.extend_from_slice(value);
    }

    /// Appends length and UTF-8.
    pub fn text(&mut self, value: &str) {
        self.bytes(value.as_bytes());
    }

    /// Appends both ends.
    pub fn range(&mut self, value: &Range<u32>) {
        self.u32(value.start);
        self.u32(value.end);
    }

    /// Appends the number of items, then each.
    pub fn list<T>(&mut self, items: &[T], mut item: impl FnMut(&mut Self, &T)) {
        self.u32(items.len() as u32);
        for value in items {
            item(self, value);
        }
    }

    /// Appends the shape of a cache.
    pub fn spec(&mut self, spec: &KvSpec) {
        self.u32(spec.layers as u32);
        self.list(&spec.planes, |w, plane| {
            w.text(plane.name);
            w.u32(plane.heads_total as u32);
            w.u32(plane.dim as u32);
            w.text(plane.dtype.name());
            w.u8((plane.sharding == Sharding::Replicated) as u8);
            let heads = plane.heads();
            w.range(&(heads.start as u32..heads.end as u32));
        });
    }
}

/// Bytes being read.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let short = WireError::Short { got: self.0.len(), wanted: count.saturating_sub(self.0.len()) };
        let (head, rest) = self.0.split_at_checked(count).ok_or(short)?;
        self.0 = rest;
        Ok(head)
    }

    /// A fixed number of bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    /// A byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Microseconds.
    pub fn duration(&mut self) -> Result<Duration, WireError> {
        Ok(Duration::from_micros(self.u64()?))
    }

    /// Length and bytes.
    pub fn bytes(&mut self) -> Result<Vec<u8>, WireError> {
        let count = self.u32()? as usize;
        Ok(self.take(count)?.to_vec())
    }

    /// Length and UTF-8.
    pub fn text(&mut self) -> Result<String, WireError> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes)
            .map_err(|e| WireError::Unknown { what: "text", value: format!("{:?}", e.into_bytes()) })
    }

    /// Both ends.
    pub fn range(&mut self) -> Result<Range<u32>, WireError> {
        Ok(self.u32()?..self.u32()?)
    }

    /// The number of items, then each. Every item takes at least a byte, so a false number ends as a short frame.
    pub fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u32()?;
        let mut items = Vec::with_capacity((count as usize).min(self.0.len()));
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }

    /// The shape of a cache.
    pub fn spec(&mut self) -> Result<KvSpec, WireError> {
        /// Names of planes; others come from a version that we do not understand.
        const NAMES: [&str; 4] = ["k", "v", "latent", "rope"];
        let layers = self.u32()? as usize;
        let planes = self.list(|r| {
            let name = r.text()?;
            let known = NAMES.into_iter().find(|n| *n == name);
            let (heads_total, dim) = (r.u32()? as usize, r.u32()? as usize);
            let dtype = r.text()?;
            let replicated = r.u8()? != 0;
            let heads = r.range()?;
            Ok(Plane {
                name: known.ok_or(WireError::Unknown { what: "kv plane", value: name })?,
                heads_total,
                dim,
                dtype: dtype
                    .parse::<DType>()
                    .map_err(|_| WireError::Unknown { what: "dtype", value: dtype })?,
                sharding: if replicated {
                    Sharding::Replicated
                } else {
                    Sharding::Heads(heads.start as usize..heads.end as usize)
                },
            })
        })?;
        Ok(KvSpec { layers, planes })
    }

    /// Errors unless everything was read.
    pub fn end(&self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Long(self.0.len())) }
    }
}
