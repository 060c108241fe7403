//! Opens a directory of safetensors files, whole or sharded by an index, and finds the model's tensors in it: plain ones,
//! MLX's quantised and stacked ones, FP8, whole numbers (`packed`). Names become those of Hugging Face.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path};

use backend::Quant;
use safetensors::Dtype;
use serde::Deserialize;

use crate::data_file::DataFile;
use crate::experts::ExpertNames;
use crate::file::{Entry, WeightFile, table};
use crate::packed::{Kind, PARTS};
use crate::quantisation::Mlx;
use crate::scales::{Factor, ScaleKind, Scales};
use crate::weights::{Form, Place, Stored, Weights, plain};
use crate::{Config, ModelError, Quantisation};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Ends of the names of scales for activations and caches.
const MEASURED: [&str; 8] = [
    ".input_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
];

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// Whether the directory `dir` has weights of this kind.
pub(crate) fn is_model(dir: &Path) -> bool {
    dir.join(SINGLE).exists() || dir.join(INDEX).exists()
}

/// The tensors of the model of `config` in the directory `dir`.
pub(crate) fn open(dir: &Path, config: &Config) -> Result<Weights, ModelError> {
    let (files, mut found, table): (_, Found, _) = if dir.join(SINGLE).exists() || !dir.join(INDEX).exists() {
        let file = single(dir)?;
        let found = file.tensors.iter().map(|entry| (entry.name.clone(), (0, entry.clone()))).collect();
        (vec![file], found, dir.join(SINGLE))
    } else {
        let (files, found) = sharded(dir)?;
        (files, found, dir.join(INDEX))
    };
    let front = config.names_front;
    if !front.is_empty() {
        let own = |(name, place): (String, _)| Some((name.strip_prefix(front)?.to_owned(), place));
        found = found.into_iter().filter_map(own).collect();
    }
    let paths: Vec<String> = files.iter().map(|file| file.data.path.clone()).collect();
    let mut tensors = Reader::new(&paths, &found, config, front).all()?;
    let files: Vec<DataFile> = files.into_iter().map(|file| file.data).collect();
    if let Some(Quantisation::Gptq { reordered, .. }) = config.quantisation {
        for (name, stored) in &tensors {
            if let (true, Form::Recoded(recoded)) = (reordered, &stored.form) {
                recoded.check_order(&files, name, &(0..stored.extent().1))?;
            }
        }
        without_empty_biases(&mut tensors, config, &files)?;
    }
    let own_name = Box::new(|_: &str| None);
    Ok(Weights { files, table: table.display().to_string(), tensors, own_name, interleaved: None })
}

/// The matrices and vectors that a safetensors file would give a model quantised as `config` says, and the bytes that each takes in
/// memory: of the first bytes of a file of `len`, as [`table`]. For hostile headers.
pub fn weights(
    path: &str,
    bytes: &[u8],
    len: u64,
    config: &Config,
) -> Result<Vec<(String, u64)>, ModelError> {
    let entries = table(path, bytes, len)?;
    let found = entries.into_iter().map(|entry| (entry.name.clone(), (0, entry))).collect();
    let paths = [path.to_owned()];
    let tensors = Reader::new(&paths, &found, config, "").all()?.into_iter();
    Ok(tensors.map(|(name, stored)| (format!("{name}: {}", stored.format()), stored.len_bytes())).collect())
}

/// Where each tensor lies, by its name in the file.
type Found = BTreeMap<String, (usize, Entry)>;

struct Reader<'r> {
    /// The files' names.
    paths: &'r [String],
    found: &'r Found,
    quantisation: Option<&'r Quantisation>,
    /// What was cut off the names.
    front: &'static str,
    /// Whether the experts' numbers have inputs as rows.
    turned: bool,
}

impl<'r> Reader<'r> {
    fn new(paths: &'r [String], found: &'r Found, config: &'r Config, front: &'static str) -> Self {
        let turned = config.experts.as_ref().is_some_and(|experts| experts.names == ExpertNames::Together);
        Reader { paths, found, quantisation: config.quantisation.as_ref(), front, turned }
    }

    /// All tensors by their Hugging Face names.
    fn all(&self) -> Result<BTreeMap<String, Stored>, ModelError> {
        let mut tensors = BTreeMap::new();
        for (name, (file, entry)) in self.found {
            if let Some((name, stored)) = self.tensor(name, *file, entry)? {
                unstack(name, stored, &mut tensors);
            }
        }
        Ok(tensors)
    }

    /// The tensor that `entry` begins, and its name; `None` where it is a part of another. Stacked matrices have three
    /// dimensions.
    fn tensor(&self, name: &str, file: usize, entry: &Entry) -> Result<Option<(String, Stored)>, ModelError> {
        let has = |base: &str, end: &str| self.found.contains_key(&format!("{base}.{end}"));
        let place = Place { file, range: entry.range.clone() };
        if entry.shape.contains(&0) {
            // Other dimensions of nothing can be any number, so nothing is computed from them.
            let form = Form::Foreign(format!("{} without elements", entry.dtype));
            return Ok(Some((name.into(), Stored { shape: entry.shape.clone(), place, form })));
        }
        let path = || self.paths[file].clone();
        let format =
            |reason: String| ModelError::Format { path: path(), reason: format!("tensor {name}: {reason}") };
        if let Some((base, kind)) = Kind::of(name, entry.dtype, has) {
            let part = |end: &str| {
                let (file, entry) = self.found.get(&format!("{base}.{end}"))?;
                Some((Place { file: *file, range: entry.range.clone() }, entry))
            };
            let stored = kind.read(self.quantisation, place, entry, part).map_err(format)?;
            return Ok(Some((weight_of(base), stored)));
        }
        if let Some(base) = name.strip_suffix("_blocks").filter(|_| entry.dtype == Dtype::U8) {
            let stored = self.blocks(base, entry, place).map_err(format)?;
            return Ok(Some((weight_of(base), stored)));
        }
        if let Some(base) = name.strip_suffix("_bias").filter(|base| base.contains(".experts.")) {
            let form = plain(entry.dtype).map_or_else(|| Form::Foreign(entry.dtype.to_string()), Form::Plain);
            return Ok(Some((format!("{base}.bias"), Stored { shape: entry.shape.clone(), place, form })));
        }
        if let (&[count, cols, rows], Some(dtype), true) = (&entry.shape[..], plain(entry.dtype), self.turned)
            && name.split_once(".experts.").is_some_and(|(_, rest)| !rest.contains('.'))
        {
            let stored = Stored { shape: vec![count, rows, cols], place, form: Form::Turned(dtype) };
            return Ok(Some((weight_of(name), stored)));
        }
        let four = name.strip_suffix(".weight_packed").or(name.strip_suffix(".weight"));
        if let Some(base) = four.filter(|base| entry.dtype == Dtype::U8 && has(base, "weight_scale")) {
            let stored = self.fp4(base, entry, place).map_err(format)?;
            return Ok(Some((weight_of(base), stored)));
        }
        let part = |end: &str, of: &str| name.strip_suffix(end).is_some_and(|base| has(base, of));
        if name.strip_suffix("_scales").is_some_and(|base| self.found.contains_key(&format!("{base}_blocks")))
        {
            return Ok(None);
        }
        let mlx = part(".scales", "weight") || part(".biases", "scales");
        if mlx || part(".weight_scale_inv", "weight") || PARTS.iter().any(|(end, of)| part(end, of)) {
            return Ok(None);
        }
        // What activations and caches were scaled by when they were measured: they keep their numbers here.
        let floats = |quantisation: &Quantisation| {
            quantisation.fp8_block().is_some() || !quantisation.fp4_groups().is_empty()
        };
        let of_weights = self.quantisation.is_some_and(floats);
        if of_weights && MEASURED.iter().any(|end| name.ends_with(end)) {
            return Ok(None);
        }
        let base = name.strip_suffix(".weight").unwrap_or(name);
        if has(base, "scales") {
            return self.mlx(name, base, entry, place).map(Some);
        }
        if entry.dtype == Dtype::F8_E4M3
            && let Some(block) = self.quantisation.and_then(Quantisation::fp8_block)
            && let Some(end) = ["weight_scale_inv", "weight_scale"].into_iter().find(|end| has(base, end))
        {
            let by_block = end == "weight_scale_inv";
            let form = fp8(&entry.shape, self.scales(base, end, None)?, block, by_block).map_err(format)?;
            return Ok(Some((name.into(), Stored { shape: entry.shape.clone(), place, form })));
        }
        let form = plain(entry.dtype).map_or_else(|| Form::Foreign(entry.dtype.to_string()), Form::Plain);
        Ok(Some((name.into(), Stored { shape: entry.shape.clone(), place, form })))
    }

    /// A stack of matrices of MXFP4 as gpt-oss has them: 16 bytes of codes for each scale.
    fn blocks(&self, base: &str, entry: &Entry, place: Place) -> Result<Stored, String> {
        const GROUP: usize = 32;
        let scales = self.found.get(&format!("{base}_scales"));
        let Some((file, scales)) = scales.filter(|(_, scales)| scales.dtype == Dtype::U8) else {
            return Err(format!("has no {base}_scales of bytes"));
        };
        let (&[count, rows, across, bytes], of_scales) = (&entry.shape[..], &scales.shape[..]) else {
            return Err(format!("shape {:?} has no blocks", entry.shape));
        };
        if bytes * 2 != GROUP || of_scales != [count, rows, across] {
            return Err(format!("{:?} with scales {of_scales:?} in groups of {GROUP}", entry.shape));
        }
        let stored = Place { file: *file, range: scales.range.clone() };
        let scales = Scales { kind: ScaleKind::E8m0, rows: count * rows, cols: across, place: stored };
        let format = Quant::Fp4 { group: GROUP };
        let form = Form::Quantised { format, scales: Some(scales), biases: None };
        Ok(Stored { shape: vec![count, rows, across * GROUP], place, form })
    }

    /// A matrix of FP4, two codes to a byte: ModelOpt's and compressed-tensors'.
    fn fp4(&self, base: &str, entry: &Entry, place: Place) -> Result<Stored, String> {
        let find = |end: &str| self.found.get(&format!("{base}.{end}"));
        let Some((scales_file, scales)) = find("weight_scale") else {
            return Err("is quantised, and has no weight_scale".into());
        };
        let factors = [("weight_scale_2", false), ("weight_global_scale", true)];
        let factor = factors.into_iter().find_map(|(end, divides)| Some((find(end)?, divides)));
        let kind = match (scales.dtype, factor) {
            (Dtype::U8 | Dtype::F8_E8M0, None) => ScaleKind::E8m0,
            (Dtype::F8_E4M3, None) => {
                return Err("is quantised, and has neither weight_scale_2 nor weight_global_scale".into());
            }
            (Dtype::F8_E4M3, Some(((file, entry), divides))) => {
                if entry.dtype != Dtype::F32 || entry.shape.iter().product::<usize>() != 1 {
                    return Err(format!("is scaled by {} {:?}, expected one F32", entry.dtype, entry.shape));
                }
                let place = Place { file: *file, range: entry.range.clone() };
                ScaleKind::E4m3(Some(Factor { place, divides }))
            }
            (other, _) => return Err(format!("scales of type {other}, expected F8_E4M3 or powers of two")),
        };
        let groups = self.quantisation.map_or(&[][..], Quantisation::fp4_groups);
        if groups.is_empty() {
            return Err("quantised in a way that config.json does not name".into());
        }
        let (&[rows, bytes], &[down, across]) = (&entry.shape[..], &scales.shape[..]) else {
            return Err(format!("shape {:?} with scales {:?} is no matrix", entry.shape, scales.shape));
        };
        let fits = |group: &&usize| {
            down == rows && across.checked_mul(**group).is_some_and(|cols| Some(cols) == bytes.checked_mul(2))
        };
        let Some(group) = groups.iter().find(fits) else {
            return Err(format!(
                "[{rows}, {bytes}] bytes with scales [{down}, {across}] in groups of {groups:?}"
            ));
        };
        let scales_place = Place { file: *scales_file, range: scales.range.clone() };
        let scales = Scales { kind, rows: down, cols: across, place: scales_place };
        let form =
            Form::Quantised { format: Quant::Fp4 { group: *group }, scales: Some(scales), biases: None };
        Ok(Stored { shape: vec![rows, bytes * 2], place, form })
    }

    /// A matrix or stack of MLX's formats.
    fn mlx(
        &self,
        name: &str,
        base: &str,
        entry: &Entry,
        place: Place,
    ) -> Result<(String, Stored), ModelError> {
        let path = self.paths[place.file].clone();
        let error = |reason: String| ModelError::Format {
            path: path.clone(),
            reason: format!("tensor {name}: {reason}"),
        };
        let Some(mlx) = self
            .quantisation
            .and_then(|quantisation| quantisation.mlx_format(&format!("{}{base}", self.front)))
        else {
            return Err(error("has scales, but config.json gives it no quantization".into()));
        };
        let (kind, has_biases) = match mlx {
            Mlx::Affine { .. } => (None, true),
            Mlx::Mxfp4 | Mlx::Mxfp8 => (Some(ScaleKind::E8m0), false),
            Mlx::Nvfp4 => (Some(ScaleKind::E4m3(None)), false),
        };
        let scales = self.scales(base, "scales", kind)?;
        let biases = has_biases.then(|| self.scales(base, "biases", None)).transpose()?;
        let (bits, group) = mlx.sizes();
        let (rows, words) =
            entry.shape.split_last().map_or((0, 0), |(last, rest)| (rest.iter().product(), *last));
        let cols = words.saturating_mul(32) / bits;
        let fits = |scales: &Scales| (scales.rows, scales.cols.saturating_mul(group)) == (rows, cols);
        if entry.dtype != Dtype::U32
            || words.saturating_mul(32) != cols * bits
            || !fits(&scales)
            || !biases.as_ref().is_none_or(fits)
        {
            let (dtype, shape) = (entry.dtype, &entry.shape);
            return Err(error(format!(
                "{dtype} {shape:?} with scales [{}, {}] of {bits} bits in groups of {group}",
                scales.rows, scales.cols
            )));
        }
        let mut shape = entry.shape.clone();
        shape.pop();
        shape.push(cols);
        let format = match mlx {
            Mlx::Affine { .. } => Quant::Affine { bits, group },
            Mlx::Mxfp4 | Mlx::Nvfp4 => Quant::Fp4 { group },
            Mlx::Mxfp8 => Quant::Fp8 { rows: 1, cols: group },
        };
        let form = Form::Quantised { format, scales: Some(scales), biases };
        Ok((name.into(), Stored { shape, place, form }))
    }

    /// Scales or biases of `base`, numbers unless they are bytes of a `kind`; a stack's are one matrix.
    fn scales(&self, base: &str, end: &str, kind: Option<ScaleKind>) -> Result<Scales, ModelError> {
        let name = format!("{base}.{end}");
        let Some((file, entry)) = self.found.get(&name) else {
            let reason = format!("tensor {base} is quantised, and has no {name}");
            return Err(ModelError::Format { path: self.paths[0].clone(), reason });
        };
        let kind = match kind {
            Some(kind) => Some(kind).filter(|_| entry.dtype == Dtype::U8),
            None => ScaleKind::numbers(entry.dtype),
        };
        let Some(kind) = kind.filter(|_| !entry.shape.contains(&0)) else {
            let path = self.paths[*file].clone();
            return Err(ModelError::Type { path, name, got: entry.dtype.to_string() });
        };
        let (cols, rows) =
            entry.shape.split_last().map_or((1, 1), |(last, rest)| (*last, rest.iter().product()));
        Ok(Scales { kind, rows, cols, place: Place { file: *file, range: entry.range.clone() } })
    }
}

/// FP8 codes of `shape`: a scale per block where they are so many, else (unless `by_block`) per output or one.
fn fp8(
    shape: &[usize],
    mut scales: Scales,
    block: Option<(usize, usize)>,
    by_block: bool,
) -> Result<Form, String> {
    let &[height, width] = shape else { return Err(format!("shape {shape:?} is no matrix")) };
    let grid = (scales.rows, scales.cols);
    let (rows, cols) = match block {
        Some((rows, cols)) if grid == (height.div_ceil(rows), width.div_ceil(cols)) => (rows, cols),
        _ if grid == (1, 1) && !by_block => (height, width),
        _ if (grid == (height, 1) || grid == (1, height)) && !by_block => {
            (scales.rows, scales.cols) = (height, 1);
            (1, width)
        }
        block => {
            let (down, across) = grid;
            let blocks = block.map_or(String::new(), |(rows, cols)| format!(" in blocks of {rows} x {cols}"));
            return Err(format!("{shape:?} with scales [{down}, {across}]{blocks}"));
        }
    };
    Ok(Form::Quantised { format: Quant::Fp8 { rows, cols }, scales: Some(scales), biases: None })
}

/// Leaves out biases of zeros that the model does not have: early AutoGPTQ gave every matrix one.
fn without_empty_biases(
    tensors: &mut BTreeMap<String, Stored>,
    config: &Config,
    files: &[DataFile],
) -> Result<(), ModelError> {
    let own: BTreeSet<String> = crate::tensors(config).into_iter().map(|spec| spec.name).collect();
    let mut empty = Vec::new();
    for (name, Stored { place, .. }) in tensors.iter() {
        let Some(base) = name.strip_suffix(".bias").filter(|_| !own.contains(name)) else { continue };
        if tensors.get(&weight_of(base)).is_some_and(|weight| matches!(weight.form, Form::Recoded(_)))
            && files[place.file].read(place.range.start, place.len() as usize)?.iter().all(|byte| *byte == 0)
        {
            empty.push(name.clone());
        }
    }
    empty.iter().for_each(|name| drop(tensors.remove(name)));
    Ok(())
}

/// The name of a matrix.
fn weight_of(base: &str) -> String {
    format!("{base}.weight")
}

/// Puts the tensor, or the matrices that it stacks, into `tensors` by their Hugging Face names.
fn unstack(name: String, stored: Stored, tensors: &mut BTreeMap<String, Stored>) {
    // Of all experts: `experts.up_proj.bias`, where one's is `experts.7.up_proj.bias`.
    let of_all =
        name.split_once(".experts.").filter(|(_, rest)| !rest.starts_with(|c: char| c.is_ascii_digit()));
    if let (Some((block, rest)), &[count, cols]) = (of_all, &stored.shape[..])
        && rest.ends_with(".bias")
        && count * cols > 0
        && matches!(stored.form, Form::Plain(_))
    {
        for expert in 0..count {
            tensors.insert(format!("{block}.experts.{expert}.{rest}"), stored.row(expert));
        }
        return;
    }
    let &[count, rows, cols] = &stored.shape[..] else {
        tensors.insert(name, stored);
        return;
    };
    if count.saturating_mul(rows).saturating_mul(cols) == 0 {
        tensors.insert(name, stored);
        return;
    }
    // One matrix under the other.
    let stacked = Stored { shape: vec![count * rows, cols], ..stored };
    if let Some((block, rest)) = of_all {
        for expert in 0..count {
            tensors.insert(format!("{block}.experts.{expert}.{rest}"), stacked.part(expert, count));
        }
        return;
    }
    let Some((block, rest)) = name.split_once(".switch_mlp.") else {
        tensors.insert(name, stacked);
        return;
    };
    let names = [ExpertNames::Mlp, ExpertNames::BlockSparse];
    let names = names.into_iter().find(|names| block.ends_with(names.block())).unwrap_or(ExpertNames::Mlp);
    // MLX calls the projections the same in every family.
    let projections = ExpertNames::Mlp.projections().into_iter().zip(names.projections());
    let rest = match projections.into_iter().find(|(mlx, _)| rest.strip_prefix(mlx) == Some(".weight")) {
        Some((_, projection)) => format!("{projection}.weight"),
        None => rest.to_owned(),
    };
    for expert in 0..count {
        tensors.insert(format!("{block}.experts.{expert}.{rest}"), stacked.part(expert, count));
    }
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
    let json = vocab::text_file(&path).map_err(|reason| ModelError::Io { path: shown.clone(), reason })?;
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
    let mut found = Found::new();
    for (number, file) in files.iter().enumerate() {
        let listed = file.tensors.iter().filter(|entry| file_of(&entry.name) == Some(number));
        found.extend(listed.map(|entry| (entry.name.clone(), (number, entry.clone()))));
    }
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
