//! A file of weights that is read by position, never mapped: one that shrinks or vanishes under a running load is an
//! error with its name, where a mapping would end the process. Called by `checkpoint` for every part of every tensor.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::ModelError;

/// Threads that read one large part. Positional reads of a file in the page cache scale with them, and so do drives.
const THREADS: usize = 4;

/// Parts below this many bytes are read by the caller's thread.
const PARALLEL_BYTES_MIN: usize = 16 << 20;

/// Rows with smaller gaps than this are read with them. Such a gap holds no whole page, so a drive reads the same bytes
/// either way; and a call per row of 512 bytes takes 6 times as long as reading along and copying (measured on Linux, from
/// the page cache).
const GAP_BYTES_MIN: u64 = PAGE_BYTES;

/// What drives and page caches read at least.
const PAGE_BYTES: u64 = 4096;

/// Bytes of rows and gaps that are read by one call.
const SPAN_BYTES: usize = 1 << 20;

/// An open file of known length.
pub(crate) struct DataFile {
    /// For messages.
    pub(crate) path: String,
    /// Length in bytes when it was opened.
    pub(crate) len: u64,
    file: File,
}

/// Rows of bytes in a file: row `i` is `[start + i * stride, start + i * stride + row)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// First byte.
    pub(crate) start: u64,
    /// How many.
    pub(crate) count: usize,
    /// Bytes of one.
    pub(crate) row: usize,
    /// From one to the next.
    pub(crate) stride: u64,
}

impl DataFile {
    /// Opens `path`, which must be a regular file: reading a device or a pipe would not end.
    pub(crate) fn open(path: &Path) -> Result<DataFile, ModelError> {
        let name = path.display().to_string();
        let io = |reason| ModelError::Io { path: name.clone(), reason };
        let kind = std::fs::metadata(path).map_err(io)?;
        if !kind.is_file() {
            return Err(ModelError::Format { path: name, reason: "not a regular file".into() });
        }
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(DataFile { path: name, len, file })
    }

    /// `len` bytes from `start` on. The caller has checked them against [`DataFile::len`].
    pub(crate) fn read(&self, start: u64, len: usize) -> Result<Vec<u8>, ModelError> {
        self.read_rows(Rows { start, count: 1, row: len, stride: len as u64 })
    }

    /// The rows, one after another without gaps. Large parts are read by several threads.
    pub(crate) fn read_rows(&self, rows: Rows) -> Result<Vec<u8>, ModelError> {
        // Rows without gaps are one long row, cut anew below.
        let dense = rows.row as u64 == rows.stride || rows.count == 1;
        let (count, row, stride) = match dense {
            true => (rows.count * rows.row, 1, 1),
            false => (rows.count, rows.row, rows.stride),
        };
        let mut bytes = vec![0; count * row];
        let fill = |first: usize, out: &mut [u8]| -> io::Result<()> {
            let start = rows.start + first as u64 * stride;
            if dense {
                return self.file.read_exact_at(out, start);
            }
            if stride - row as u64 >= GAP_BYTES_MIN {
                for (i, out) in out.chunks_exact_mut(row).enumerate() {
                    self.file.read_exact_at(out, start + i as u64 * stride)?;
                }
                return Ok(());
            }
            let stride = stride as usize;
            let at_once = (SPAN_BYTES / stride).max(1);
            let mut span = Vec::new();
            for (i, out) in out.chunks_mut(at_once * row).enumerate() {
                // The last row's gap may lie beyond the end of the file.
                span.resize((out.len() / row - 1) * stride + row, 0);
                self.file.read_exact_at(&mut span, start + (i * at_once * stride) as u64)?;
                for (out, row_and_gap) in out.chunks_exact_mut(row).zip(span.chunks(stride)) {
                    out.copy_from_slice(&row_and_gap[..row]);
                }
            }
            Ok(())
        };
        let done = if bytes.len() < PARALLEL_BYTES_MIN {
            fill(0, &mut bytes)
        } else {
            let each = count.div_ceil(THREADS);
            std::thread::scope(|scope| {
                let parts = bytes.chunks_mut(each * row).enumerate();
                let threads: Vec<_> =
                    parts.map(|(part, out)| scope.spawn(move || fill(part * each, out))).collect();
                threads.into_iter().try_for_each(|thread| match thread.join() {
                    Ok(done) => done,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })
        };
        done.map_err(|error| self.lost(error, rows))?;
        Ok(bytes)
    }

    fn lost(&self, reason: io::Error, rows: Rows) -> ModelError {
        if reason.kind() != io::ErrorKind::UnexpectedEof {
            return ModelError::Io { path: self.path.clone(), reason };
        }
        let end = rows.start + (rows.count as u64).saturating_sub(1) * rows.stride + rows.row as u64;
        let now = self.file.metadata().map_or(0, |data| data.len());
        let reason = format!(
            "changed while it was read: it had {} bytes and has {now}, byte {end} is needed",
            self.len
        );
        ModelError::Format { path: self.path.clone(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, DataFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w");
        std::fs::write(&path, bytes).unwrap();
        let file = DataFile::open(&path).unwrap();
        (dir, file)
    }

    #[test]
    fn rows_with_and_without_gaps() {
        let (_dir, file) = file(&(0..20).collect::<Vec<u8>>());
        assert_eq!(file.len, 20);
        assert_eq!(file.read(3, 4).unwrap(), [3, 4, 5, 6]);
        let rows = Rows { start: 1, count: 3, row: 2, stride: 6 };
        assert_eq!(file.read_rows(rows).unwrap(), [1, 2, 7, 8, 13, 14]);
        let last = Rows { start: 6, count: 3, row: 2, stride: 6 };
        assert_eq!(file.read_rows(last).unwrap(), [6, 7, 12, 13, 18, 19]);
        assert!(file.read(20, 0).unwrap().is_empty());
    }

    #[test]
    fn a_large_part_read_by_threads_is_the_same() {
        // 3 rows more than threads divide, each with its number; small gaps, large ones, and many rows to a call.
        for (row, count, gap) in
            [(PARALLEL_BYTES_MIN / 64, 67, 5), (PARALLEL_BYTES_MIN / 64, 67, 5000), (4096, 4099, 64)]
        {
            let mut bytes = Vec::new();
            for i in 0..count {
                bytes.extend(std::iter::repeat_n(i as u8, row));
                bytes.extend(std::iter::repeat_n(255, gap));
            }
            let (_dir, file) = file(&bytes);
            let got = file.read_rows(Rows { start: 0, count, row, stride: (row + gap) as u64 }).unwrap();
            assert!(got.chunks_exact(row).enumerate().all(|(i, part)| part.iter().all(|b| *b == i as u8)));
            assert_eq!(got.len(), row * count);
            assert!(file.read(0, bytes.len()).unwrap() == bytes);
        }
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_that_names_it() {
        let (dir, file) = file(&[0; 100]);
        let path = dir.path().join("w");
        std::fs::File::options().write(true).open(&path).unwrap().set_len(40).unwrap();
        assert_eq!(
            file.read(30, 20).unwrap_err().to_string(),
            format!(
                "{}: changed while it was read: it had 100 bytes and has 40, byte 50 is needed",
                path.display()
            )
        );
        assert!(DataFile::open(dir.path()).err().unwrap().to_string().ends_with(": not a regular file"));
    }
}
