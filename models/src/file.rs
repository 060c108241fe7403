//! One safetensors file, mapped: its tensor table, checked against the file's length.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use serde_json::Value;

use crate::ModelError;

/// Longest header in bytes, as in the format's own library.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A mapped file and its tensors.
pub(crate) struct WeightFile {
    /// For messages.
    pub(crate) path: String,
    /// The whole file.
    pub(crate) map: Mmap,
    /// By name; ranges are bytes of the file.
    pub(crate) tensors: Vec<(String, TensorInfo, Range<usize>)>,
}

impl WeightFile {
    /// Maps `path` and reads its header. Errors when the file is not safetensors, ends before a tensor does, or gives a
    /// tensor a place of the wrong size.
    pub(crate) fn open(path: &Path) -> Result<WeightFile, ModelError> {
        let name = path.display().to_string();
        let io = |reason| ModelError::Io { path: name.clone(), reason };
        let format = |reason: String| ModelError::Format { path: name.clone(), reason };
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut prefix = [0; 8];
        if len < 8 {
            return Err(format(format!("truncated: {len} bytes, a safetensors file has at least 8")));
        }
        file.read_exact(&mut prefix).map_err(io)?;
        let header = u64::from_le_bytes(prefix);
        if header > HEADER_BYTES_MAX {
            return Err(format(format!(
                "not a safetensors file: header of {header} bytes, at most {HEADER_BYTES_MAX}"
            )));
        }
        let data = 8 + header;
        if data > len {
            return Err(format(format!("truncated: the header ends at byte {data}, the file has {len}")));
        }
        // SAFETY: the mapping is read only. Weight files are not written while a model is served; one that is
        // truncated under us ends the process, it cannot break memory.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let table: HashMap<String, Value> = serde_json::from_slice(&map[8..data as usize])
            .map_err(|error| format(format!("not a safetensors file: header: {error}")))?;
        let mut tensors = Vec::with_capacity(table.len());
        for (tensor, value) in table.into_iter().filter(|(tensor, _)| tensor != "__metadata__") {
            let info: TensorInfo =
                serde_json::from_value(value).map_err(|error| format(format!("tensor {tensor}: {error}")))?;
            let bits = info
                .shape
                .iter()
                .try_fold(info.dtype.bitsize() as u64, |product, dim| product.checked_mul(*dim as u64));
            let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
            let place = end.checked_sub(start).ok_or_else(|| {
                format(format!("tensor {tensor}: begins at {start}, after its end at {end}"))
            })?;
            if bits != place.checked_mul(8) {
                let (dtype, shape) = (info.dtype, &info.shape);
                return Err(format(format!(
                    "tensor {tensor}: {dtype} {shape:?} in a place of {place} bytes"
                )));
            }
            match data.checked_add(end) {
                Some(end) if end <= len => {}
                end => {
                    let end = end.unwrap_or(u64::MAX);
                    return Err(ModelError::Truncated { path: name.clone(), name: tensor, end, len });
                }
            }
            let range = (data + start) as usize..(data + end) as usize;
            tensors.push((tensor, info, range));
        }
        Ok(WeightFile { path: name.clone(), map, tensors })
    }
}
