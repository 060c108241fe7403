//! The numbers of a model: what `config.json` says, parsed by the file of its family in `arch/`.

use std::path::Path;

use backend::DType;

use crate::fields::Fields;
use crate::{Attention, Experts, ModelError, Quantisation, RopeConfig, arch};

/// A decoder: embedding, layers of (norm, attention, norm, gated MLP or experts), norm, head. Families differ in these
/// numbers only.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Family, as `model_type` names it.
    pub model_type: &'static str,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Keys and values of the heads.
    pub attention: Attention,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Width of the MLP, in layers without experts.
    pub ffn: usize,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// The experts, in layers that have them.
    pub experts: Option<Experts>,
    /// Epsilon of the norms of the residual stream, and of q and k.
    pub norm_eps: f32,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Longest context in tokens.
    pub context: usize,
    /// Element type that the weights were saved in, where the file says so.
    pub dtype: Option<DType>,
    /// Tokens that end an answer; `generation_config.json` overrides them.
    pub eos_ids: Vec<u32>,
    /// How the file says that weights are quantised.
    pub quantisation: Option<Quantisation>,
    /// What the names of the tensors begin with in the files, where the model is a part of another; the rest of that one
    /// is not used.
    pub names_front: &'static str,
    /// Columns that a split over ranks keeps together. Put here by the checkpoint: the numbers alone know no groups.
    pub groups: Groups,
}

/// Columns of the matrices that are split by columns, which share a scale and so stay on one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// Of the attention's output projection.
    pub o: Group,
    /// Of the MLP's down projection.
    pub down: Group,
    /// Of the experts' down projections.
    pub experts: Group,
    /// Of the shared expert's down projection.
    pub shared: Group,
}

/// The largest group among matrices of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Columns of a group.
    pub cols: usize,
    /// A tensor that has it, for messages.
    pub tensor: String,
}

impl Default for Group {
    fn default() -> Self {
        Group { cols: 1, tensor: String::new() }
    }
}

/// Numbers of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// All of them; a tied table counts once.
    pub total: u64,
    /// Those that one token passes: of the experts, only the chosen ones.
    pub active: u64,
}

impl Config {
    /// Reads `config.json` at `path`, and what ModelOpt says beside it of how weights are quantised.
    pub fn read(path: &Path) -> Result<Config, ModelError> {
        let name = path.display().to_string();
        let json = vocab::text_file(path).map_err(|reason| ModelError::Io { path: name.clone(), reason })?;
        let mut config = Config::parse(&name, &json)?;
        if config.quantisation.is_none() {
            config.quantisation = Quantisation::beside(&path.with_file_name("hf_quant_config.json"))?;
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for messages. A field that is not known to leave the computation
    /// alone, and is not supported, is an error that names it.
    pub fn parse(path: &str, json: &[u8]) -> Result<Config, ModelError> {
        let mut fields = Fields::parse(path, json)?;
        let Some(model_type) = fields.opt_text("model_type")? else {
            return Err(fields.error("model_type", "missing"));
        };
        let config = arch::read(&model_type, &mut fields)?;
        fields.finish()?;
        Ok(config)
    }

    /// The experts of `layer`, where it has them.
    pub fn experts(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.layers[layer])
    }

    /// Whether some layer has an MLP without experts.
    pub fn has_dense_layers(&self) -> bool {
        self.experts.as_ref().is_none_or(|experts| !experts.layers.iter().all(|sparse| *sparse))
    }

    /// Elements of all heads' attention outputs: the columns of the output projection.
    pub fn attended(&self) -> usize {
        self.heads * self.attention.value_dim()
    }

    /// How many weights the model has.
    pub fn parameters(&self) -> Parameters {
        // Files are strangers' text: their numbers may be absurd.
        let count = |shape: &[usize]| shape.iter().fold(1u64, |all, n| all.saturating_mul(*n as u64));
        let total =
            crate::tensors(self).iter().fold(0u64, |all, spec| all.saturating_add(count(&spec.shape)));
        let idle = self.experts.as_ref().map_or(0, |experts| {
            let layers = experts.layers.iter().filter(|sparse| **sparse).count() as u64;
            let biases = if experts.biases { 2 * experts.width + self.hidden } else { 0 };
            let each =
                3u64.saturating_mul((self.hidden * experts.width) as u64).saturating_add(biases as u64);
            let idle = (experts.routing.experts - experts.routing.top_k) as u64;
            layers.saturating_mul(each).saturating_mul(idle)
        });
        Parameters { total, active: total.saturating_sub(idle) }
    }
}

/// Most layers of a model, and most elements of a head: tables are made of so many entries.
const LAYERS_MAX: usize = 1024;
const HEAD_DIM_MAX: usize = 1 << 16;

/// What all families have; the family's file adds the rest.
pub(crate) struct Base {
    pub(crate) model_type: &'static str,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    /// `max_position_embeddings`.
    pub(crate) positions: usize,
}

impl Base {
    pub(crate) fn read(fields: &mut Fields, model_type: &'static str) -> Result<Base, ModelError> {
        let hidden = fields.size("hidden_size")?;
        Ok(Base {
            model_type,
            hidden,
            layers: at_most(fields, "num_hidden_layers", LAYERS_MAX)?,
            heads: fields.size("num_attention_heads")?,
            positions: fields.size("max_position_embeddings")?,
        })
    }

    /// Width of the MLP of layers without experts.
    pub(crate) fn ffn(fields: &mut Fields) -> Result<usize, ModelError> {
        fields.size("intermediate_size")
    }

    /// The configuration, without biases of the MLP and experts.
    pub(crate) fn config(
        self,
        fields: &mut Fields,
        attention: Attention,
        rope: RopeConfig,
        ffn: usize,
    ) -> Result<Config, ModelError> {
        fields.one_of("hidden_act", &["silu", "swish"])?;
        let vocab_size = fields.size("vocab_size")?;
        Ok(Config {
            model_type: self.model_type,
            vocab_size,
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            attention,
            context: rope.context(self.positions),
            rope,
            ffn,
            mlp_bias: false,
            experts: None,
            norm_eps: fields.opt_positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied: fields.flag("tie_word_embeddings", false)?,
            dtype: dtype(fields)?,
            eos_ids: eos_ids(fields, vocab_size)?,
            quantisation: Quantisation::read(fields)?,
            names_front: "",
            groups: Groups::default(),
        })
    }
}

/// A size within a bound.
pub(crate) fn at_most(fields: &mut Fields, field: &'static str, max: usize) -> Result<usize, ModelError> {
    match fields.size(field)? {
        size if size > max => Err(fields.error(field, format!("{size} is above {max}"))),
        size => Ok(size),
    }
}

/// Elements of a head, where the file gives them: even and within a bound.
pub(crate) fn opt_head_dim(fields: &mut Fields, field: &'static str) -> Result<Option<usize>, ModelError> {
    match fields.opt_size(field)? {
        Some(dim) if dim == 0 || dim % 2 != 0 || dim > HEAD_DIM_MAX => {
            Err(fields.error(field, format!("{dim} is not an even number between 2 and {HEAD_DIM_MAX}")))
        }
        dim => Ok(dim),
    }
}

/// `eos_token_id`; ids that the model cannot produce are left out.
pub(crate) fn eos_ids(fields: &mut Fields, vocab_size: usize) -> Result<Vec<u32>, ModelError> {
    let mut ids = fields.ids("eos_token_id")?;
    ids.retain(|id| (*id as usize) < vocab_size);
    Ok(ids)
}

/// `torch_dtype` (or `dtype`, its later name), for information: weights say their own type.
fn dtype(fields: &mut Fields) -> Result<Option<DType>, ModelError> {
    let old = fields.opt_text("torch_dtype")?;
    Ok(fields.opt_text("dtype")?.or(old).and_then(|name| name.trim_start_matches("torch.").parse().ok()))
}

#[cfg(test)]
mod tests;
