//! What can go wrong between a model's files and a loaded model.

use backend::BackendError;
use gguf::GgufError;
use vocab::VocabError;

/// A model directory, its numbers or its weights are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("{path}: {reason}")]
    Io {
        /// File.
        path: String,
        /// What the system said.
        reason: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Format {
        /// File.
        path: String,
        /// What disagreed.
        reason: String,
    },
    /// A field of `config.json` or `generation_config.json` is missing, wrong, or asks for what is not supported.
    #[error("{path}: {field}: {reason}")]
    Field {
        /// File.
        path: String,
        /// The field, with dots for nesting.
        field: String,
        /// What disagreed.
        reason: String,
    },
    /// No family of this name is supported.
    #[error("{path}: not supported yet: model_type {model_type:?} (supported: {supported})")]
    Architecture {
        /// File.
        path: String,
        /// The name in the file.
        model_type: String,
        /// Names that are supported.
        supported: String,
    },
    /// The architecture has a tensor that the checkpoint lacks.
    #[error("{path}: tensor {name} is missing; the {model_type} model has it with shape {shape:?}")]
    Missing {
        /// Index or weight file.
        path: String,
        /// Tensor.
        name: String,
        /// Architecture.
        model_type: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The checkpoint has a tensor that the architecture lacks: leaving it out would be another model.
    #[error("{path}: tensor {name} is not part of the {model_type} model")]
    Unexpected {
        /// Weight file.
        path: String,
        /// Tensor.
        name: String,
        /// Architecture.
        model_type: String,
    },
    /// A tensor has another shape than `config.json` gives.
    #[error("{path}: tensor {name} has shape {got:?}, the model's numbers give {want:?}")]
    Shape {
        /// Weight file.
        path: String,
        /// Tensor.
        name: String,
        /// Shape in the file.
        got: Vec<usize>,
        /// Shape by the configuration.
        want: Vec<usize>,
    },
    /// A tensor has an element type that no backend takes.
    #[error("{path}: tensor {name} is stored as {got}, which is not supported")]
    Type {
        /// Weight file.
        path: String,
        /// Tensor.
        name: String,
        /// Type in the file.
        got: String,
    },
    /// A file ends before a tensor does.
    #[error("{path}: truncated: tensor {name} ends at byte {end}, the file has {len}")]
    Truncated {
        /// Weight file.
        path: String,
        /// Tensor.
        name: String,
        /// One past the tensor's last byte.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// The model cannot be split over this many ranks.
    #[error("cannot split {what} over {world} tensor-parallel ranks: there are {count}")]
    Split {
        /// `query heads`, `kv heads`, `ffn columns`, `vocabulary entries`.
        what: &'static str,
        /// Of them.
        count: usize,
        /// Ranks.
        world: usize,
    },
    /// There are fewer columns than ranks can share: quantised ones are cut at multiples of 8.
    #[error(
        "cannot split {name} over {world} tensor-parallel ranks: its {cols} columns stay together in groups of {group}"
    )]
    Groups {
        /// Tensor.
        name: String,
        /// Its columns.
        cols: usize,
        /// Columns that stay together.
        group: usize,
        /// Ranks.
        world: usize,
    },
    /// The tokenizer's vocabulary cannot be read.
    #[error(transparent)]
    Vocab(#[from] VocabError),
    /// A GGUF file is not what it should be.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
