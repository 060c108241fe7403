//! A GGUF model on disk: one file, or all parts of a split one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::header::{HEADER_BYTES_MAX, MAGIC};
use crate::{Fault, GgufError, Header, Metadata, Type};

/// Bytes of a header that are read at first; as many again and again until it is whole.
const FIRST_BYTES: u64 = 1 << 20;

/// Most parts of a split file.
const PARTS_MAX: u64 = 4096;

/// The table of rotary divisors that llama.cpp computes for Llama 3.1 and later; at most this many.
const ROPE_FREQS: &str = "rope_freqs.weight";
const ROPE_FREQS_MAX: usize = 4096;

/// A GGUF model.
#[derive(Clone, Debug)]
pub struct Gguf {
    paths: Vec<PathBuf>,
    metadata: Metadata,
    tensors: BTreeMap<String, Tensor>,
    rope_freqs: Option<Vec<f32>>,
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Element type.
    pub kind: Type,
    /// Outermost dimension first; a stack of experts has three.
    pub shape: Vec<usize>,
    /// Index into [`Gguf::paths`].
    pub part: usize,
    /// Bytes of that file.
    pub range: Range<u64>,
}

impl Gguf {
    /// Opens the file at `path`; of a split one, any part opens all of them. Reads headers, no weights.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        let header = read(path)?;
        let parts = count(&header.metadata, "split.count")?.unwrap_or(1);
        if parts <= 1 {
            return Gguf::of(vec![(path.into(), header)]);
        }
        let shown = path.display().to_string();
        let own = count(&header.metadata, "split.no")?.unwrap_or(0);
        if parts > PARTS_MAX || own >= parts {
            return Err(GgufError::format(&shown, "split.count", format!("part {own} of {parts}")));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix(&ending(own, parts)) else {
            let reason = format!("part {own} of {parts} has a name that ends in {}", ending(own, parts));
            return Err(GgufError::format(&shown, "split.no", reason));
        };
        let mut files = Vec::new();
        for part in 0..parts {
            let path = path.with_file_name(format!("{stem}{}", ending(part, parts)));
            let header = if part == own { header.clone() } else { read(&path)? };
            for (key, want) in [("split.no", part), ("split.count", parts)] {
                let got = count(&header.metadata, key)?;
                if got != Some(want) {
                    let got = got.map_or("missing".into(), |got| got.to_string());
                    return Err(header.metadata.error(key, format!("{got}, expected {want}")));
                }
            }
            files.push((path, header));
        }
        let total = count(&files[0].1.metadata, "split.tensors.count")?;
        let found: usize = files.iter().map(|(_, header)| header.tensors.len()).sum();
        match total {
            Some(total) if total != found as u64 => {
                let reason = format!("{total}, the {parts} parts have {found}");
                Err(files[0].1.metadata.error("split.tensors.count", reason))
            }
            _ => Gguf::of(files),
        }
    }

    /// The model that `files` are the parts of.
    fn of(files: Vec<(PathBuf, Header)>) -> Result<Gguf, GgufError> {
        let mut tensors = BTreeMap::new();
        let (mut paths, mut metadata) = (Vec::new(), None);
        for (part, (path, header)) in files.into_iter().enumerate() {
            for info in header.tensors {
                let tensor = Tensor { kind: info.kind, shape: info.shape, part, range: info.range };
                if tensors.insert(info.name.clone(), tensor).is_some() {
                    let path = header.metadata.path();
                    let reason = "is in an earlier part as well";
                    return Err(GgufError::format(path, format!("tensor {}", info.name), reason));
                }
            }
            paths.push(path);
            metadata.get_or_insert(header.metadata);
        }
        let Some(metadata) = metadata else {
            return Err(GgufError::format("", "split.count", "no parts"));
        };
        let mut gguf = Gguf { paths, metadata, tensors, rope_freqs: None };
        gguf.rope_freqs = gguf.read_rope_freqs()?;
        Ok(gguf)
    }

    /// A model of one header without a file, whose rotary divisors are `rope_freqs`: for trying headers.
    pub fn without_file(header: Header, rope_freqs: Option<Vec<f32>>) -> Gguf {
        let tensors = header.tensors.into_iter().map(|info| {
            (info.name, Tensor { kind: info.kind, shape: info.shape, part: 0, range: info.range })
        });
        Gguf { paths: Vec::new(), metadata: header.metadata, tensors: tensors.collect(), rope_freqs }
    }

    /// The file, or its parts in order.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The first file, for messages.
    pub fn path(&self) -> &str {
        self.metadata.path()
    }

    /// Keys and values; of a split file those of the first part.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> Result<&str, GgufError> {
        let key = "general.architecture";
        self.metadata.text(key)?.ok_or_else(|| self.metadata.error(key, "missing"))
    }

    /// All tensors, in order of name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// What each rotary frequency is divided by, where the file has a table of it.
    pub fn rope_freqs(&self) -> Option<&[f32]> {
        self.rope_freqs.as_deref()
    }

    fn read_rope_freqs(&self) -> Result<Option<Vec<f32>>, GgufError> {
        let Some(tensor) = self.tensor(ROPE_FREQS) else { return Ok(None) };
        let path = &self.paths[tensor.part];
        let shown = path.display().to_string();
        let [len @ 1..=ROPE_FREQS_MAX] = tensor.shape[..] else {
            return Err(GgufError::format(&shown, ROPE_FREQS, format!("shape {:?}", tensor.shape)));
        };
        if tensor.kind.name != "F32" {
            return Err(GgufError::format(&shown, ROPE_FREQS, format!("{}, expected F32", tensor.kind.name)));
        }
        let mut bytes = vec![0; len * 4];
        File::open(path)
            .and_then(|file| file.read_exact_at(&mut bytes, tensor.range.start))
            .map_err(|reason| GgufError::Io { path: shown, reason })?;
        let (floats, _) = bytes.as_chunks::<4>();
        Ok(Some(floats.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    }
}

/// The GGUF file of a model at `path`: itself, when it is a file whose name ends in `.gguf`, or that begins as they all do
/// (Ollama's have names like `sha256-3f1c`); the only one of a directory, or the first part of the only split one; `None`
/// when there is none. Errors when a directory has several.
pub fn find(path: &Path) -> Result<Option<PathBuf>, GgufError> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    if !path.is_dir() {
        return Ok((is_gguf(path) || begins(path)).then(|| path.into()));
    }
    let io = |reason| GgufError::Io { path: path.display().to_string(), reason };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        // Parts after the first, and the eyes of a model that sees, are no models.
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let later = part_of(&name).is_some_and(|part| part != 1);
        if is_gguf(&file) && !later && !name.starts_with("mmproj") {
            files.push(file);
        }
    }
    files.sort();
    match &files[..] {
        [] => Ok(None),
        [file] => Ok(Some(file.clone())),
        [first, second, ..] => {
            let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let reason = format!("several: {}, {}; give the one to use", name(first), name(second));
            Err(GgufError::format(&path.display().to_string(), "GGUF files", reason))
        }
    }
}

/// Whether the file at `path` begins as a GGUF file does. Devices and pipes are not asked.
fn begins(path: &Path) -> bool {
    let first = || -> std::io::Result<[u8; MAGIC.len()]> {
        let mut first = [0; MAGIC.len()];
        File::open(path)?.read_exact(&mut first)?;
        Ok(first)
    };
    path.is_file() && first().is_ok_and(|first| first == *MAGIC)
}

/// 2 of `x-00002-of-00003.gguf`.
fn part_of(name: &str) -> Option<u64> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (_, part) = rest.rsplit_once('-')?;
    let number = |text: &str| text.parse::<u64>().ok().filter(|_| text.len() == 5);
    number(count)?;
    number(part)
}

/// How the name of part `part` (from 0) of `parts` ends.
fn ending(part: u64, parts: u64) -> String {
    format!("-{:05}-of-{parts:05}.gguf", part + 1)
}

fn count(metadata: &Metadata, key: &str) -> Result<Option<u64>, GgufError> {
    metadata.count(key)
}

/// Reads the header of the file at `path`, and no more than it takes.
fn read(path: &Path) -> Result<Header, GgufError> {
    let shown = path.display().to_string();
    let io = |reason| GgufError::Io { path: shown.clone(), reason };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(GgufError::format(&shown, "file", "not a regular file"));
    }
    let mut file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let (mut bytes, mut want) = (Vec::new(), FIRST_BYTES);
    loop {
        let more = want.min(len) - bytes.len() as u64;
        let read = (&mut file).take(more).read_to_end(&mut bytes).map_err(io)?;
        if (read as u64) < more {
            return Err(GgufError::format(&shown, "file", "became shorter while it was read"));
        }
        match Header::parse(&shown, &bytes, len) {
            Ok(header) => return Ok(header),
            Err(Fault::More { end }) if end <= HEADER_BYTES_MAX => {
                want = end.max(2 * want).min(HEADER_BYTES_MAX)
            }
            Err(Fault::More { end }) => {
                let reason = format!("reaches byte {end}, at most {HEADER_BYTES_MAX}");
                return Err(GgufError::format(&shown, "header", reason));
            }
            Err(fault) => return Err(fault.at(&shown)),
        }
    }
}
