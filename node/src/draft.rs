//! A draft model beside the model: opened and compared with it before any weight is read, then loaded whole on a device of its
//! own. Called by [`crate::rank`] on rank 0.

use std::path::Path;

use backend::{Backend, DType, DeviceOptions, Group};
use engine::DraftModel;
use models::{Checkpoint, Model, ModelError};
use vocab::{TokenizerJson, Vocab};

use crate::error::NodeError;
use crate::loading;

/// A draft model's files and numbers.
pub(crate) struct Draft {
    checkpoint: Checkpoint,
    /// Bytes of its weights, as they are stored.
    pub weight_bytes: u64,
    /// Bytes that a token takes in its cache.
    pub token_bytes: usize,
}

/// A draft model on its device.
pub(crate) struct Loaded<B: Backend> {
    backend: B,
    model: Model<B>,
}

impl Draft {
    /// Errors when it cannot guess for `model`.
    pub fn of(checkpoint: Checkpoint, model: &Checkpoint, dtype: DType) -> Result<Draft, NodeError> {
        let shown = |path: &Path| path.display().to_string();
        let named =
            |reason: ModelError| NodeError::Model { model: shown(checkpoint.path()), reason: reason.into() };
        compare(&checkpoint, model).map_err(named)?.map_err(|reason| NodeError::Draft {
            draft: shown(checkpoint.path()),
            model: shown(model.path()),
            reason,
        })?;
        let weight_bytes = checkpoint.rank_bytes(1).map_err(named)?.iter().sum();
        let spec = models::kv_specs(checkpoint.config(), dtype, 1).map_err(named)?.swap_remove(0);
        Ok(Draft { weight_bytes, token_bytes: spec.token_bytes(), checkpoint })
    }

    /// On the device of the model.
    pub fn load<B: Backend>(&self, beside: &B, device: &DeviceOptions) -> Result<Loaded<B>, ModelError> {
        let mut backend = beside.beside(device, Group::alone())?;
        let mut progress = loading::progress(self.shown());
        let model = Model::load(&mut backend, &self.checkpoint, 0, 1, device.dtype, &mut progress)?;
        tracing::info!("draft model {} loaded", self.shown());
        Ok(Loaded { backend, model })
    }

    pub fn shown(&self) -> String {
        self.checkpoint.path().display().to_string()
    }
}

impl<B: Backend> Loaded<B> {
    /// With a cache of `kv_bytes`.
    pub fn ready(self, kv_bytes: u64) -> Result<DraftModel<B>, engine::EngineError> {
        DraftModel::new(self.backend, self.model, kv_bytes)
    }
}

/// Whether tokens of `draft` are those of `model`; if not, why.
fn compare(draft: &Checkpoint, model: &Checkpoint) -> Result<Result<(), String>, ModelError> {
    let vocab = |checkpoint: &Checkpoint| match TokenizerJson::read(checkpoint.path())? {
        Some(_) => Ok::<_, ModelError>(Some(Vocab::read(checkpoint.path())?)),
        None => Ok(None),
    };
    Ok(match (vocab(draft)?, vocab(model)?) {
        (Some(draft), Some(model)) => draft.guesses_for(&model),
        // Without texts: random weights, for measurements.
        (None, None) => Ok(()),
        _ => Err("only one of them has a tokenizer".into()),
    })
}
