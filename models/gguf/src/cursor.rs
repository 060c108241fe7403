//! Reads a header's bytes in order. Every length is compared with what is left before anything is taken.

use crate::header::Fault;

/// A place in the first bytes of a file.
pub(crate) struct Cursor<'b> {
    bytes: &'b [u8],
    at: usize,
    /// Length of the whole file, of which `bytes` is the beginning.
    len: u64,
    /// What is being read, for messages.
    pub(crate) field: String,
}

impl<'b> Cursor<'b> {
    pub(crate) fn new(bytes: &'b [u8], len: u64) -> Self {
        Cursor { bytes, at: 0, len, field: "header".into() }
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> u64 {
        self.at as u64
    }

    pub(crate) fn wrong(&self, reason: impl Into<String>) -> Fault {
        Fault::Wrong { field: self.field.clone(), reason: reason.into() }
    }

    /// The next `count` bytes. [`Fault::More`] when the file has them and `bytes` has not.
    pub(crate) fn take(&mut self, count: u64) -> Result<&'b [u8], Fault> {
        let end = (self.at as u64).checked_add(count);
        match end {
            Some(end) if end <= self.bytes.len() as u64 => {
                let taken = &self.bytes[self.at..end as usize];
                self.at = end as usize;
                Ok(taken)
            }
            Some(end) if end <= self.len => Err(Fault::More { end }),
            _ => {
                let left = self.len.saturating_sub(self.at());
                Err(self.wrong(format!("{count} bytes at byte {}, the file has {left} more", self.at)))
            }
        }
    }

    /// Whether `count` items of at least `each` bytes can follow.
    pub(crate) fn room(&self, count: u64, each: u64, what: &str) -> Result<(), Fault> {
        let left = self.len.saturating_sub(self.at());
        match count.checked_mul(each) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(self.wrong(format!("{count} {what}, the file has {left} more bytes"))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64)?);
        Ok(bytes)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A text of at most `max` bytes.
    pub(crate) fn text(&mut self, max: u64) -> Result<String, Fault> {
        let len = self.u64()?;
        if len > max {
            return Err(self.wrong(format!("a text of {len} bytes, at most {max}")));
        }
        let bytes = self.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.wrong(format!("a text that is not UTF-8: {error}"))),
        }
    }
}
