//! Opens a GGUF model: its numbers as a config.json, its tensors by their Hugging Face names, experts one by one. Called by
//! `checkpoint`, as `huggingface` is for directories of safetensors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use backend::{DType, GgufBlock, Quant};
use gguf::{Gguf, Tensor};

use crate::data_file::DataFile;
use crate::tensors::{TensorSpec, instead, tensors};
use crate::weights::{Form, Place, Stored, Weights};
use crate::{Config, Generation, ModelError};

/// The numbers, end tokens and tensors of the GGUF file at `path`, or of all files that it is a part of.
pub(crate) fn open(path: &Path) -> Result<(Config, Generation, Weights), ModelError> {
    let gguf = Gguf::open(path)?;
    let config = Config::parse(gguf.path(), gguf::config_json(&gguf)?.to_string().as_bytes())?;
    let generation = Generation { eos_ids: config.eos_ids.clone(), ..Generation::default() };
    let files: Vec<DataFile> =
        gguf.paths().iter().map(|path| DataFile::open(path)).collect::<Result<_, _>>()?;
    for (name, tensor) in gguf.tensors() {
        // Headers were read before the files were opened here: one may have been replaced between.
        let (end, len) = (tensor.range.end, files[tensor.part].len);
        if end > len {
            let path = files[tensor.part].path.clone();
            return Err(ModelError::Truncated { path, name: name.into(), end, len });
        }
    }
    let tensors = by_name(&gguf, &config)?;
    let interleaved = gguf::rope_interleaved(&gguf)?.then_some(true);
    let architecture = gguf.architecture()?.to_owned();
    let own_name = Box::new(move |name: &str| gguf::place(&architecture, name).map(|place| place.tensor));
    let weights = Weights { files, table: gguf.path().into(), tensors, own_name, interleaved };
    Ok((config, generation, weights))
}

/// What the architecture has, by its Hugging Face names, and all else that the file has and the model should not.
fn by_name(gguf: &Gguf, config: &Config) -> Result<BTreeMap<String, Stored>, ModelError> {
    let architecture = gguf.architecture()?;
    let specs = tensors(config).into_iter().flat_map(|spec| {
        let two = instead(config, &spec);
        std::iter::once(spec).chain(two.into_iter().flatten())
    });
    let (mut found, mut used) = (BTreeMap::new(), BTreeSet::new());
    for TensorSpec { name, .. } in specs {
        let Some(place) = gguf::place(architecture, &name) else { continue };
        let Some(tensor) = gguf.tensor(&place.tensor) else { continue };
        let Some(stored) = stored(tensor, place.expert) else {
            let path = gguf.paths()[tensor.part].display().to_string();
            let (tensor, shape) = (place.tensor, &tensor.shape);
            return Err(ModelError::Format {
                path,
                reason: format!("tensor {tensor}: shape {shape:?} has no {name}"),
            });
        };
        used.insert(place.tensor);
        found.insert(name, stored);
    }
    for (name, tensor) in gguf.tensors() {
        if !used.contains(name) && !gguf::unused(name, config.layers, config.tied) {
            // Under its own name, which no architecture has.
            found.extend(stored(tensor, None).map(|stored| (name.to_owned(), stored)));
        }
    }
    Ok(found)
}

/// A tensor, or matrix `expert` of a stack; matrices one under the other are one. `None` when there is no such matrix.
fn stored(tensor: &Tensor, expert: Option<usize>) -> Option<Stored> {
    let place = Place { file: tensor.part, range: tensor.range.clone() };
    let shape = match tensor.shape[..] {
        [count, rows, cols] => vec![count.checked_mul(rows)?, cols],
        _ => tensor.shape.clone(),
    };
    let stored = Stored { shape, place, form: form(tensor.kind.name) };
    match (expert, &tensor.shape[..]) {
        (None, _) => Some(stored),
        (Some(expert), [count, _, _]) if expert < *count => Some(stored.part(expert, *count)),
        // Biases.
        (Some(expert), [count, _]) if expert < *count && matches!(stored.form, Form::Plain(_)) => {
            Some(stored.row(expert))
        }
        (Some(_), _) => None,
    }
}

/// What the bytes of an element type are.
fn form(kind: &str) -> Form {
    match kind {
        "F32" => Form::Plain(DType::F32),
        "F16" => Form::Plain(DType::F16),
        "BF16" => Form::Plain(DType::BF16),
        other => match GgufBlock::named(other) {
            Some(block) => Form::Quantised { format: Quant::Gguf(block), scales: None, biases: None },
            None => Form::Foreign(other.into()),
        },
    }
}
