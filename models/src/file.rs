//! One safetensors file: its tensor table, checked before anything is believed. [`table`] is pure, so that hostile
//! headers can be tried without files. Called by `checkpoint`.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::ModelError;
use crate::data_file::DataFile;

/// Longest header in bytes, as in the format's own library.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Longest name of a tensor in bytes.
const NAME_BYTES_MAX: usize = 1024;

/// Most dimensions of a tensor.
const DIMS_MAX: usize = 8;

/// An open file and its tensors.
pub(crate) struct WeightFile {
    pub(crate) data: DataFile,
    pub(crate) tensors: Vec<Entry>,
}

/// One tensor of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<u64>,
}

impl WeightFile {
    /// Opens `path` and reads its table; see [`table`].
    pub(crate) fn open(path: &Path) -> Result<WeightFile, ModelError> {
        let data = DataFile::open(path)?;
        let prefix = data.read(0, data.len.min(8) as usize)?;
        let header = header_bytes(&data.path, &prefix, data.len)?;
        let header = data.read(8, header as usize)?;
        let tensors = entries(&data.path, &header, data.len)?;
        Ok(WeightFile { data, tensors })
    }
}

/// The table of the safetensors file that begins with `bytes` and has `len` bytes in all; `path` is for messages. Errors
/// when the file is not safetensors, ends before a tensor does, names a tensor twice, gives one a place of the wrong size
/// or two the same bytes. Bytes that belong to no tensor are left alone. Takes memory in proportion to `bytes` only.
pub fn table(path: &str, bytes: &[u8], len: u64) -> Result<Vec<Entry>, ModelError> {
    let header = header_bytes(path, bytes, len)?;
    match bytes.get(8..8 + header as usize) {
        Some(header) => entries(path, header, len),
        None => Err(format(path, format!("{} bytes of a header that ends at {}", bytes.len(), 8 + header))),
    }
}

/// Length of the header of a file of `len` bytes that begins with `bytes`.
fn header_bytes(path: &str, bytes: &[u8], len: u64) -> Result<u64, ModelError> {
    let Some(prefix) = bytes.first_chunk::<8>() else {
        return Err(format(path, format!("truncated: {len} bytes, a safetensors file has at least 8")));
    };
    if gguf::is_lfs_pointer(bytes) {
        return Err(format(path, gguf::LFS_POINTER.into()));
    }
    let header = u64::from_le_bytes(*prefix);
    if header > HEADER_BYTES_MAX {
        let reason = format!("not a safetensors file: header of {header} bytes, at most {HEADER_BYTES_MAX}");
        return Err(format(path, reason));
    }
    if 8 + header > len {
        let reason = format!("truncated: the header ends at byte {}, the file has {len}", 8 + header);
        return Err(format(path, reason));
    }
    Ok(header)
}

fn format(path: &str, reason: String) -> ModelError {
    ModelError::Format { path: path.into(), reason }
}

fn entries(path: &str, header: &[u8], len: u64) -> Result<Vec<Entry>, ModelError> {
    let Table(lines) = serde_json::from_slice(header)
        .map_err(|error| format(path, format!("not a safetensors file: header: {error}")))?;
    let data = 8 + header.len() as u64;
    let mut entries = Vec::with_capacity(lines.len());
    for (name, line) in lines {
        let Line { dtype, shape: Shape(shape), data_offsets: (start, end) } = line;
        let bits =
            shape.iter().try_fold(dtype.bitsize() as u64, |product, dim| product.checked_mul(*dim as u64));
        let Some(place) = end.checked_sub(start) else {
            return Err(format(path, format!("tensor {name}: begins at {start}, after its end at {end}")));
        };
        if bits.is_none() || bits != place.checked_mul(8) {
            return Err(format(
                path,
                format!("tensor {name}: {dtype} {shape:?} in a place of {place} bytes"),
            ));
        }
        match data.checked_add(end) {
            Some(last) if last <= len => {}
            last => {
                let end = last.unwrap_or(u64::MAX);
                return Err(ModelError::Truncated { path: path.into(), name, end, len });
            }
        }
        entries.push(Entry { name, dtype, shape, range: data + start..data + end });
    }
    match overlap(&entries) {
        Some((a, b)) => Err(format(path, format!("tensors {} and {} share bytes", a.name, b.name))),
        None => Ok(entries),
    }
}

/// Two entries that share a byte.
fn overlap(entries: &[Entry]) -> Option<(&Entry, &Entry)> {
    let mut order: Vec<&Entry> = entries.iter().filter(|entry| !entry.range.is_empty()).collect();
    order.sort_by_key(|entry| entry.range.start);
    order.windows(2).find(|pair| pair[0].range.end > pair[1].range.start).map(|pair| (pair[0], pair[1]))
}

/// The header: tensors in the order of the file. Read straight into this, so that a hostile header costs no tree of
/// values; the parser bounds nesting.
struct Table(Vec<(String, Line)>);

/// What a header says of one tensor.
struct Line {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Table {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Lines;
        impl<'de> Visitor<'de> for Lines {
            type Value = Table;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Table, A::Error> {
                let (mut lines, mut seen) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name.len() > NAME_BYTES_MAX {
                        let reason = format!("a name of {} bytes, at most {NAME_BYTES_MAX}", name.len());
                        return Err(de::Error::custom(reason));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(de::Error::custom(format!("{name} is there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let line = map.next_value::<Line>();
                    lines.push((
                        name.clone(),
                        line.map_err(|error| de::Error::custom(format!("tensor {name}: {error}")))?,
                    ));
                }
                Ok(Table(lines))
            }
        }
        deserializer.deserialize_map(Lines)
    }
}

impl<'de> Deserialize<'de> for Line {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Line;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Line, A::Error> {
                fn put<T, E: de::Error>(place: &mut Option<T>, name: &str, value: T) -> Result<(), E> {
                    match place.replace(value) {
                        Some(_) => Err(E::custom(format!("{name} is there twice"))),
                        None => Ok(()),
                    }
                }
                let (mut dtype, mut shape, mut offsets) = (None, None, None);
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "dtype" => put(&mut dtype, &key, map.next_value()?)?,
                        "shape" => put(&mut shape, &key, map.next_value()?)?,
                        "data_offsets" => put(&mut offsets, &key, map.next_value()?)?,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Line {
                    dtype: dtype.ok_or_else(|| de::Error::missing_field("dtype"))?,
                    shape: shape.ok_or_else(|| de::Error::missing_field("shape"))?,
                    data_offsets: offsets.ok_or_else(|| de::Error::missing_field("data_offsets"))?,
                })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {DIMS_MAX} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = list.next_element::<usize>()? {
                    if dims.len() == DIMS_MAX {
                        return Err(de::Error::custom(format!("more than {DIMS_MAX} dimensions")));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of a file with this header and 64 bytes of data.
    fn of(header: &str) -> Result<Vec<Entry>, String> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        let len = bytes.len() as u64 + 64;
        table("f", &bytes, len).map_err(|error| error.to_string())
    }

    fn line(shape: &str, start: u64, end: u64) -> String {
        format!(r#"{{"dtype": "F32", "shape": {shape}, "data_offsets": [{start}, {end}]}}"#)
    }

    #[test]
    fn holes_and_empty_tensors_pass() {
        let header = format!(
            r#"{{"__metadata__": {{"format": "pt", "n": {{"deep": []}}}}, "b": {}, "a": {}, "none": {}, "one": {}}}"#,
            line("[2, 3]", 40, 64),
            line("[4]", 0, 16),
            line("[0]", 8, 8),
            line("[]", 20, 24)
        );
        let entries = of(&header).unwrap();
        let data = 8 + header.len() as u64;
        let found: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.range.start - data)).collect();
        assert_eq!(found, [("b", 40), ("a", 0), ("none", 8), ("one", 20)]);
        assert_eq!(entries[0].shape, [2, 3]);
    }

    #[test]
    fn what_disagrees_is_named() {
        let error = |tensors: &str| of(&format!("{{{tensors}}}")).unwrap_err();
        assert_eq!(
            error(&format!(r#""a": {}, "b": {}"#, line("[4]", 0, 16), line("[4]", 12, 28))),
            "f: tensors a and b share bytes"
        );
        assert!(
            error(&format!(r#""a": {}, "a": {}"#, line("[4]", 0, 16), line("[4]", 16, 32)))
                .contains("a is there twice"),
        );
        assert_eq!(
            error(&format!(r#""a": {}"#, line("[4]", 16, 0))),
            "f: tensor a: begins at 16, after its end at 0"
        );
        assert_eq!(
            error(&format!(r#""a": {}"#, line("[5]", 0, 16))),
            "f: tensor a: F32 [5] in a place of 16 bytes"
        );
        // 2^61 elements of 32 bits overflow to nothing; so does a place of 2^61 bytes.
        let wide = "[2305843009213693952]";
        assert!(error(&format!(r#""a": {}"#, line(wide, 0, 0))).contains("in a place of 0 bytes"));
        assert!(
            error(&format!(r#""a": {}"#, line(wide, 0, 1 << 61)))
                .contains("in a place of 2305843009213693952")
        );
        assert!(
            error(&format!(r#""a": {}"#, line("[17]", 0, 68))).contains("truncated: tensor a ends at byte")
        );
        let last = u64::MAX;
        assert!(error(&format!(r#""a": {}"#, line("[1]", last - 4, last))).contains("truncated: tensor a"));
        assert!(error(&format!(r#""{}": {}"#, "n".repeat(1025), line("[1]", 0, 4))).contains("at most 1024"));
        assert!(error(&format!(r#""a": {}"#, line("[1,1,1,1,1,1,1,1,1]", 0, 4))).contains("8 dimensions"));
        assert!(error(r#""a": {"dtype": "F32", "dtype": "F32"}"#).contains("tensor a: dtype is there twice"));
        assert!(error(r#""a": {"dtype": "F32"}"#).contains("tensor a: missing field `shape`"));
        assert!(error(r#""a": {"dtype": "F7", "shape": [], "data_offsets": [0, 0]}"#).contains("tensor a: "));
        // Nesting is skipped without a stack, and refused where a value is read.
        assert!(error(&format!(r#""__metadata__": {}"#, "[".repeat(100_000))).contains("expected"));
        assert!(error(&format!(r#""a": {}"#, "[".repeat(100_000))).contains("a: invalid type: sequence"));
    }

    #[test]
    fn a_header_that_is_not_there_is_not_asked_for() {
        let error = |bytes: &[u8], len| table("f", bytes, len).unwrap_err().to_string();
        assert_eq!(error(&[0; 5], 5), "f: truncated: 5 bytes, a safetensors file has at least 8");
        assert_eq!(
            error(&u64::MAX.to_le_bytes(), 1 << 40),
            "f: not a safetensors file: header of 18446744073709551615 bytes, at most 100000000"
        );
        let pointer = error(b"version https://git-lfs.github.com/spec/v1\noid", 130);
        assert!(pointer.contains("`git lfs pull`"), "{pointer}");
        assert_eq!(
            error(&100u64.to_le_bytes(), 50),
            "f: truncated: the header ends at byte 108, the file has 50"
        );
    }
}
