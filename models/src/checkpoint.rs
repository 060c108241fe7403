//! A model directory: its numbers and its weights, checked against each other when it is opened. Tensors are read when
//! a rank asks for its part of them, and only that part.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use backend::{DType, TensorView};
use safetensors::Dtype;
use serde::Deserialize;

use crate::data_file::Rows;
use crate::file::WeightFile;
use crate::tensors::{Role, tensors, unused};
use crate::{Config, Generation, ModelError, dummy};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Numbers and weights of one model.
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    generation: Generation,
    tensors: BTreeMap<String, Tensor>,
    source: Source,
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    role: Role,
    /// Index into the files; 0 of a dummy.
    file: usize,
    /// Bytes of that file.
    range: Range<u64>,
}

/// Where the bytes are.
enum Source {
    Files(Vec<WeightFile>),
    Dummy { seed: u64 },
}

/// Rows and columns of a tensor that one rank asked for.
pub(crate) struct Slice<'a> {
    name: &'a str,
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens the model directory `dir` (`config.json` and `model.safetensors`, whole or sharded by an index). Every
    /// tensor of the architecture must be there with its shape, and no other.
    pub fn open(dir: &Path) -> Result<Checkpoint, ModelError> {
        let config = Config::read(&dir.join("config.json"))?;
        let generation = Generation::read(dir, &config)?;
        let (files, found, table) = if dir.join(SINGLE).exists() || !dir.join(INDEX).exists() {
            let file = single(dir)?;
            let found = index_of(std::slice::from_ref(&file), |_, _| true);
            (vec![file], found, dir.join(SINGLE))
        } else {
            let (files, found) = sharded(dir)?;
            (files, found, dir.join(INDEX))
        };
        let tensors = check(&config, &files, found, &table.display().to_string())?;
        Ok(Checkpoint { dir: dir.into(), config, generation, tensors, source: Source::Files(files) })
    }

    /// Seeded random weights of a sane scale for the `config.json` at `path` (or in the directory `path`). Nothing is
    /// held: every slice is made when it is asked for, the same for every split.
    pub fn dummy(path: &Path, seed: u64) -> Result<Checkpoint, ModelError> {
        let file = if path.is_dir() { path.join("config.json") } else { path.into() };
        let dir = file.parent().unwrap_or(Path::new("")).to_path_buf();
        let config = Config::read(&file)?;
        let generation = Generation::read(&dir, &config)?;
        let dtype = config.dtype.unwrap_or(DType::BF16);
        let place = |spec: crate::TensorSpec| {
            let bytes = spec.shape.iter().product::<usize>() * dtype.bytes();
            let tensor =
                Tensor { dtype, shape: spec.shape, role: spec.role, file: 0, range: 0..bytes as u64 };
            (spec.name, tensor)
        };
        let tensors = tensors(&config).into_iter().map(place).collect();
        Ok(Checkpoint { dir, config, generation, tensors, source: Source::Dummy { seed } })
    }

    /// The directory; also of the tokenizer's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// End tokens and sampling defaults.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.range.end - tensor.range.start).sum()
    }

    /// All tensors by name, in order of name.
    pub(crate) fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The seed of a dummy.
    pub(crate) fn seed(&self) -> Option<u64> {
        match self.source {
            Source::Dummy { seed } => Some(seed),
            Source::Files(_) => None,
        }
    }

    /// Length in bytes of a tensor in its file; 0 of a dummy.
    pub(crate) fn file_len(&self, tensor: &Tensor) -> u64 {
        match &self.source {
            Source::Files(_) => tensor.range.end - tensor.range.start,
            Source::Dummy { .. } => 0,
        }
    }

    /// Bytes `part` of a tensor as they lie in the file, where it has them.
    pub(crate) fn file_bytes(&self, tensor: &Tensor, part: Range<u64>) -> Result<Vec<u8>, ModelError> {
        match &self.source {
            Source::Files(files) => {
                let start = tensor.range.start + part.start;
                files[tensor.file].data.read(start, (part.end - part.start) as usize)
            }
            Source::Dummy { .. } => Ok(Vec::new()),
        }
    }

    /// Rows and columns of the tensor `name`, read from its file; a vector is one row. Panics when the architecture has
    /// no such tensor or it is smaller: [`Checkpoint::open`] has checked the whole table.
    pub(crate) fn slice(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Slice<'_>, ModelError> {
        let Some((name, tensor)) = self.tensors.get_key_value(name) else {
            panic!("no tensor {name} in the {} architecture", self.config.model_type)
        };
        let (height, width) = tensor.extent();
        assert!(rows.end <= height && cols.end <= width, "{name}: {rows:?} x {cols:?} of {height} x {width}");
        let item = tensor.dtype.bytes();
        let bytes = match &self.source {
            Source::Files(files) => {
                let start = tensor.range.start + ((rows.start * width + cols.start) * item) as u64;
                let (count, row, stride) = (rows.len(), cols.len() * item, (width * item) as u64);
                files[tensor.file].data.read_rows(Rows { start, count, row, stride })?
            }
            Source::Dummy { seed } => {
                let scale = dummy::Scale::of(tensor.role, width);
                dummy::bytes(*seed, name, scale, tensor.dtype, width, rows.clone(), cols.clone())
            }
        };
        Ok(Slice { name, dtype: tensor.dtype, rows: rows.len(), cols: cols.len(), bytes })
    }

    /// All of the tensor `name`.
    pub(crate) fn whole(&self, name: &str) -> Result<Slice<'_>, ModelError> {
        let (height, width) = self.tensors.get(name).map_or((0, 0), Tensor::extent);
        self.slice(name, 0..height, 0..width)
    }
}

impl Tensor {
    /// Rows and columns; a vector is one row.
    fn extent(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, self.shape.iter().product()),
        }
    }
}

impl Slice<'_> {
    /// As the seam takes it.
    pub(crate) fn view(&self) -> TensorView<'_> {
        TensorView {
            name: self.name,
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            row_stride_bytes: self.cols * self.dtype.bytes(),
            bytes: &self.bytes,
        }
    }

    /// Bytes of the part itself.
    pub(crate) fn len_bytes(&self) -> u64 {
        (self.rows * self.cols * self.dtype.bytes()) as u64
    }
}

/// Where each tensor lies: file, and position in its table.
type Found = BTreeMap<String, (usize, usize)>;

fn index_of(files: &[WeightFile], keep: impl Fn(&str, usize) -> bool) -> Found {
    let mut found = Found::new();
    for (file, weights) in files.iter().enumerate() {
        for (position, entry) in weights.tensors.iter().enumerate() {
            if keep(&entry.name, file) {
                found.insert(entry.name.clone(), (file, position));
            }
        }
    }
    found
}

fn single(dir: &Path) -> Result<WeightFile, ModelError> {
    let path = dir.join(SINGLE);
    if path.exists() {
        return WeightFile::open(&path);
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let other =
        names.filter(|name| [".gguf", ".bin", ".safetensors"].iter().any(|end| name.ends_with(end))).min();
    let reason = match other {
        Some(name) => format!("neither {SINGLE} nor {INDEX} ({name} is there)"),
        None => format!("neither {SINGLE} nor {INDEX}"),
    };
    Err(ModelError::Format { path: dir.display().to_string(), reason })
}

fn sharded(dir: &Path) -> Result<(Vec<WeightFile>, Found), ModelError> {
    let path = dir.join(INDEX);
    let shown = path.display().to_string();
    let format = |reason: String| ModelError::Format { path: shown.clone(), reason };
    let json = std::fs::read(&path).map_err(|reason| ModelError::Io { path: shown.clone(), reason })?;
    let index: Index = serde_json::from_slice(&json).map_err(|error| format(error.to_string()))?;
    let mut names: Vec<&String> = index.weight_map.values().collect();
    names.sort();
    names.dedup();
    // An index is a stranger's text: its files are those beside it.
    if let Some(name) = names.iter().find(|name| !plain_name(name)) {
        return Err(format(format!("weight file {name:?} is not a plain file name")));
    }
    let files: Vec<WeightFile> =
        names.iter().map(|name| WeightFile::open(&dir.join(name))).collect::<Result<_, _>>()?;
    let file_of = |name: &str| names.binary_search(&index.weight_map.get(name)?).ok();
    let found = index_of(&files, |name, file| file_of(name) == Some(file));
    match index.weight_map.iter().find(|(name, _)| !found.contains_key(*name)) {
        Some((name, file)) => Err(format(format!("tensor {name} is not in {file}"))),
        None => Ok((files, found)),
    }
}

/// Whether `name` is one normal component: no separator, no `..`, no drive.
fn plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains(['/', '\\', ':'])
}

/// Compares what was found with what the architecture has. `table` is the file that lists the tensors.
fn check(
    config: &Config,
    files: &[WeightFile],
    mut found: Found,
    table: &str,
) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let mut checked = BTreeMap::new();
    for spec in tensors(config) {
        let Some((file, position)) = found.remove(&spec.name) else {
            return Err(ModelError::Missing {
                path: table.into(),
                name: spec.name,
                model_type: config.model_type.into(),
                shape: spec.shape,
            });
        };
        let info = &files[file].tensors[position];
        let path = || files[file].data.path.clone();
        if info.shape != spec.shape {
            return Err(ModelError::Shape {
                path: path(),
                name: spec.name,
                got: info.shape.clone(),
                want: spec.shape,
            });
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(ModelError::Type { path: path(), name: spec.name, got: other.to_string() });
            }
        };
        checked.insert(
            spec.name,
            Tensor { dtype, shape: spec.shape, role: spec.role, file, range: info.range.clone() },
        );
    }
    match found.into_iter().find(|(name, _)| !unused(config, name)) {
        Some((name, (file, _))) => Err(ModelError::Unexpected {
            path: files[file].data.path.clone(),
            name,
            model_type: config.model_type.into(),
        }),
        None => Ok(checked),
    }
}
