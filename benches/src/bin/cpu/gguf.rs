//! Writes a GGUF file of a shape with seeded random weights.
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::blocks::{Kind, Random, Recipe};
use crate::shape::{Shape, Value};

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 32;
/// Bytes made at once: whole blocks of every kind.
const PIECE_BLOCKS: usize = 4096;

/// Writes the file unless one of the right length is there. Returns its length.
pub fn write(path: &Path, shape: &Shape, recipe: Recipe) -> Result<u64> {
    let tensors = shape.tensors(recipe);
    let mut header = Vec::new();
    header.extend_from_slice(b"GGUF");
    header.extend_from_slice(&3u32.to_le_bytes());
    header.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    let metadata = shape.metadata();
    header.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in &metadata {
        text(&mut header, key);
        match value {
            Value::Count(n) => put(&mut header, 4, &n.to_le_bytes()),
            Value::Number(x) => put(&mut header, 6, &x.to_le_bytes()),
            Value::Flag(flag) => put(&mut header, 7, &[u8::from(*flag)]),
            Value::Text(words) => {
                put(&mut header, 8, &[]);
                text(&mut header, words);
            }
        }
    }
    let mut offset = 0;
    for tensor in &tensors {
        text(&mut header, &tensor.name);
        header.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
        for dim in &tensor.dims {
            header.extend_from_slice(&(*dim as u64).to_le_bytes());
        }
        header.extend_from_slice(&tensor.kind.id().to_le_bytes());
        header.extend_from_slice(&(offset as u64).to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    let length = (header.len() + offset) as u64;
    if std::fs::metadata(path).is_ok_and(|meta| meta.len() == length) {
        return Ok(length);
    }
    // Under its name only when it is whole.
    let part = path.with_extension("part");
    let mut out = BufWriter::new(File::create(&part).with_context(|| part.display().to_string())?);
    out.write_all(&header)?;
    for (at, tensor) in tensors.iter().enumerate() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (at as u64 + 1) << 20);
        let inputs = tensor.dims[0];
        let mut left = tensor.bytes();
        let block = Kind::bytes(tensor.kind, 256);
        let mut piece = vec![0; block * PIECE_BLOCKS];
        while left > 0 {
            let now = left.min(piece.len());
            tensor.kind.fill(&mut random, inputs, &mut piece[..now]);
            out.write_all(&piece[..now])?;
            left -= now;
        }
        out.write_all(&vec![0; tensor.bytes().next_multiple_of(ALIGNMENT) - tensor.bytes()])?;
    }
    out.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    std::fs::rename(&part, path)?;
    Ok(length)
}

fn text(out: &mut Vec<u8>, words: &str) {
    out.extend_from_slice(&(words.len() as u64).to_le_bytes());
    out.extend_from_slice(words.as_bytes());
}

fn put(out: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(bytes);
}
