//! A model's numbers and weights, checked against each other when they are opened. Tensors are read when a rank asks for
//! its part of them, and only that part.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use backend::{DType, RopeStyle};

use crate::config::Group;
use crate::data_file::DataFile;
use crate::shard::held;
use crate::tensors::{Cut, EMBED, Role, Span, TensorSpec, instead, tensors, unused};
use crate::weights::{Form, Place, Slice, Stored, Weights};
use crate::{Config, Generation, ModelError, Shard, dummy, gguf_file, huggingface, shards};

/// Numbers and weights of one model.
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    generation: Generation,
    tensors: BTreeMap<String, Tensor>,
    source: Source,
}

/// One tensor of a checkpoint.
pub(crate) struct Tensor {
    pub(crate) role: Role,
    pub(crate) cut: Cut,
    pub(crate) stored: Stored,
}

/// Where the bytes are.
enum Source {
    Files(Vec<DataFile>),
    Dummy { seed: u64 },
}

impl Checkpoint {
    /// Opens the model at `path`: a directory with `config.json` and `model.safetensors`, whole or sharded by an index; a
    /// GGUF file under whatever name, whole or any part of a split one; or a directory that has one instead. Every tensor of
    /// the architecture must be there with its shape, and no other.
    pub fn open(path: &Path) -> Result<Checkpoint, ModelError> {
        let dir = path;
        if !huggingface::is_model(dir)
            && let Some(file) = gguf::find(path)?
        {
            let (config, generation, weights) = gguf_file::open(&file)?;
            let generation = if path.is_dir() { Generation::read(path, &config)? } else { generation };
            return Checkpoint::assemble(path, config, generation, weights);
        }
        if path.is_file() {
            let reason = "neither a model's directory nor a GGUF file".into();
            return Err(ModelError::Format { path: path.display().to_string(), reason });
        }
        let config = Config::read(&dir.join("config.json"))?;
        let generation = Generation::read(dir, &config)?;
        let weights = huggingface::open(dir, &config)?;
        Checkpoint::assemble(dir, config, generation, weights)
    }

    /// Seeded random weights of a sane scale for the `config.json` at `path` (or in the directory `path`). Nothing is
    /// held: every slice is made when it is asked for, the same for every split. None is quantised.
    pub fn dummy(path: &Path, seed: u64) -> Result<Checkpoint, ModelError> {
        let file = if path.is_dir() { path.join("config.json") } else { path.into() };
        let dir = file.parent().unwrap_or(Path::new("")).to_path_buf();
        let config = Config::read(&file)?;
        let generation = Generation::read(&dir, &config)?;
        let dtype = config.dtype.unwrap_or(DType::BF16);
        let make = |spec: TensorSpec| {
            let bytes = spec.shape.iter().fold(dtype.bytes() as u64, |all, n| all.saturating_mul(*n as u64));
            let place = Place { file: 0, range: 0..bytes };
            let stored = Stored { shape: spec.shape, place, form: Form::Plain(dtype) };
            (spec.name, Tensor { role: spec.role, cut: spec.cut, stored })
        };
        let tensors = tensors(&config).into_iter().map(make).collect();
        Ok(Checkpoint { path: dir, config, generation, tensors, source: Source::Dummy { seed } })
    }

    /// Puts numbers and weights together when each tensor of the architecture is among the weights with its shape, and
    /// there is no other. `path` is where the tokenizer is.
    pub(crate) fn assemble(
        path: &Path,
        mut config: Config,
        generation: Generation,
        weights: Weights,
    ) -> Result<Checkpoint, ModelError> {
        let Weights { files, table, tensors: mut found, own_name, interleaved } = weights;
        match interleaved {
            Some(true) => config.rope.style = RopeStyle::Interleaved,
            Some(false) => config.rope.style = RopeStyle::HalfSplit,
            None => {}
        }
        let mut checked = BTreeMap::new();
        for spec in tensors(&config) {
            let specs = match instead(&config, &spec) {
                Some(two) if !found.contains_key(&spec.name) && found.contains_key(&two[0].name) => {
                    two.to_vec()
                }
                _ => vec![spec],
            };
            for spec in specs {
                let Some(stored) = found.remove(&spec.name) else {
                    return Err(ModelError::Missing {
                        path: table,
                        name: own_name(&spec.name).unwrap_or(spec.name),
                        model_type: config.model_type.into(),
                        shape: spec.shape,
                    });
                };
                check(&spec, &stored, &files)?;
                keep_together(&mut config, &spec, stored.align_cols());
                checked.insert(spec.name, Tensor { role: spec.role, cut: spec.cut, stored });
            }
        }
        if let Some((name, stored)) = found.into_iter().find(|(name, _)| !unused(&config, name)) {
            let path = files[stored.place.file].path.clone();
            return Err(ModelError::Unexpected { path, name, model_type: config.model_type.into() });
        }
        Ok(Checkpoint {
            path: path.into(),
            config,
            generation,
            tensors: checked,
            source: Source::Files(files),
        })
    }

    /// The directory or GGUF file; also of the tokenizer.
    pub fn path(&self) -> &Path {
        &self.path
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
        self.tensors.values().map(|tensor| tensor.stored.len_bytes()).sum()
    }

    /// The formats of the weights and the bytes of each, most first.
    pub fn formats(&self) -> Vec<(String, u64)> {
        let mut bytes = BTreeMap::new();
        for tensor in self.tensors.values() {
            *bytes.entry(tensor.stored.format()).or_insert(0) += tensor.stored.len_bytes();
        }
        let mut formats: Vec<(String, u64)> = bytes.into_iter().collect();
        formats.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        formats
    }

    /// Bytes of the weights that each of `world` ranks holds, as they are stored.
    pub fn rank_bytes(&self, world: usize) -> Result<Vec<u64>, ModelError> {
        let of = |shard: &Shard| {
            let bytes = |tensor: &Tensor, cut: Cut| {
                let (rows, cols) = held(shard, cut, tensor.stored.extent());
                tensor.stored.part_bytes(&rows, &cols)
            };
            // A tied table serves a rank of several a second time, as its part of the head.
            let again = self.tensors.get(EMBED).filter(|_| self.config.tied && world > 1);
            let head = again.map_or(0, |table| bytes(table, Cut::Rows(Span::Vocab)));
            self.tensors.values().map(|tensor| bytes(tensor, tensor.cut)).sum::<u64>() + head
        };
        Ok(shards(&self.config, world)?.iter().map(of).collect())
    }

    /// All tensors by name, in order of name.
    pub(crate) fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Whether there is a tensor `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The seed of a dummy.
    pub(crate) fn seed(&self) -> Option<u64> {
        match self.source {
            Source::Dummy { seed } => Some(seed),
            Source::Files(_) => None,
        }
    }

    /// Bytes `part` of a place as they lie in its file; none of a dummy.
    pub(crate) fn file_bytes(&self, place: &Place, part: Range<u64>) -> Result<Vec<u8>, ModelError> {
        match &self.source {
            Source::Files(files) => {
                files[place.file].read(place.range.start + part.start, (part.end - part.start) as usize)
            }
            Source::Dummy { .. } => Ok(Vec::new()),
        }
    }

    /// What `shard` holds of the tensor `name`. Panics when the architecture has no such tensor: its table was checked
    /// when it was opened.
    pub(crate) fn part(&self, name: &str, shard: &Shard) -> Result<Slice<'_>, ModelError> {
        let tensor = self.tensor(name);
        let (rows, cols) = held(shard, tensor.cut, tensor.stored.extent());
        self.slice(name, rows, cols)
    }

    /// Rows and columns of the tensor `name`; a vector is one row. Panics as [`Checkpoint::part`] does.
    pub(crate) fn slice(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Slice<'_>, ModelError> {
        let tensor = self.tensor(name);
        let (height, width) = tensor.stored.extent();
        assert!(rows.end <= height && cols.end <= width, "{name}: {rows:?} x {cols:?} of {height} x {width}");
        let name = self.tensors.get_key_value(name).map_or("", |(name, _)| name.as_str());
        match (&self.source, &tensor.stored.form) {
            (Source::Files(files), _) => tensor.stored.read(files, name, rows, cols),
            (Source::Dummy { seed }, form) => {
                let dtype = if let Form::Plain(dtype) = form { *dtype } else { DType::BF16 };
                let scale = dummy::Scale::of(tensor.role, width);
                let bytes = dummy::bytes(*seed, name, scale, dtype, width, rows.clone(), cols.clone());
                Ok(Slice::made(name, dtype, rows.len(), cols.len(), bytes))
            }
        }
    }

    fn tensor(&self, name: &str) -> &Tensor {
        let model_type = self.config.model_type;
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name} in the {model_type} architecture"))
    }
}

/// Compares a tensor with what the architecture has.
fn check(spec: &TensorSpec, stored: &Stored, files: &[DataFile]) -> Result<(), ModelError> {
    let path = || files[stored.place.file].path.clone();
    let name = || spec.name.clone();
    if stored.shape != spec.shape {
        return Err(ModelError::Shape {
            path: path(),
            name: name(),
            got: stored.shape.clone(),
            want: spec.shape.clone(),
        });
    }
    match (&stored.form, spec.role) {
        (Form::Plain(_), _) | (Form::Turned(_) | Form::Quantised { .. } | Form::Recoded(_), Role::Matrix) => {
            Ok(())
        }
        _ => Err(ModelError::Type { path: path(), name: name(), got: stored.format() }),
    }
}

/// Notes the groups of a matrix that is cut by columns.
fn keep_together(config: &mut Config, spec: &TensorSpec, cols: usize) {
    let groups = &mut config.groups;
    let group = match spec.cut {
        Cut::Cols(Span::Heads(_)) => &mut groups.o,
        Cut::Cols(Span::Ffn) => &mut groups.down,
        Cut::Cols(Span::Experts(_)) => &mut groups.experts,
        Cut::Cols(Span::Shared) => &mut groups.shared,
        _ => return,
    };
    if cols > group.cols {
        *group = Group { cols, tensor: spec.name.clone() };
    }
}
