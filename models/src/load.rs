//! Puts one rank's part of a checkpoint on its device, weight by weight.

use std::ops::Range;

use backend::{Backend, KSum, Linear, WeightSource};

use crate::checkpoint::{Checkpoint, Slice};
use crate::decoder::Layer;
use crate::tensors::{EMBED, HEAD, NORM, in_layer};
use crate::{ModelError, Shard};

/// How far a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Weights on the device.
    pub weights: usize,
    /// Weights that this rank loads in all.
    pub weights_total: usize,
    /// Bytes read from the checkpoint.
    pub bytes: u64,
}

/// Weights of the layers, in the order of [`Layer`].
const PER_LAYER: usize = 6;

/// A load under way.
pub(crate) struct Loader<'l, B: Backend> {
    backend: &'l mut B,
    checkpoint: &'l Checkpoint,
    shard: &'l Shard,
    report: &'l mut dyn FnMut(Progress),
    progress: Progress,
}

/// The weights outside the layers.
pub(crate) struct Ends<B: Backend> {
    pub(crate) embed: B::Weight,
    pub(crate) norm: B::Weight,
    /// `None`: `embed` serves.
    pub(crate) head: Option<B::Weight>,
}

impl<'l, B: Backend> Loader<'l, B> {
    pub(crate) fn new(
        backend: &'l mut B,
        checkpoint: &'l Checkpoint,
        shard: &'l Shard,
        report: &'l mut dyn FnMut(Progress),
    ) -> Self {
        let config = checkpoint.config();
        let biases = if config.o_bias { 1 } else { 0 } + if config.mlp_bias { 1 } else { 0 };
        let norms = if config.qk_norm { 2 } else { 0 };
        let head = usize::from(!Self::shared(checkpoint, shard));
        let weights_total = 2 + head + config.layers * (PER_LAYER + biases + norms);
        let progress = Progress { weights: 0, weights_total, bytes: 0 };
        report(progress);
        Loader { backend, checkpoint, shard, report, progress }
    }

    /// Whether one table serves as embedding and head: a rank of several has all of the first, and a part of the
    /// second.
    fn shared(checkpoint: &Checkpoint, shard: &Shard) -> bool {
        checkpoint.config().tied && shard.world == 1
    }

    pub(crate) fn ends(&mut self) -> Result<Ends<B>, ModelError> {
        let (vocab, hidden) = (self.checkpoint.config().vocab_size, self.checkpoint.config().hidden);
        let shared = Self::shared(self.checkpoint, self.shard);
        let embed = if shared {
            self.linear(&[(EMBED, 0..vocab)], 0..hidden, false, KSum::Ascending)?
        } else {
            let table = self.checkpoint.whole(EMBED)?;
            self.load(&WeightSource::Embedding(table.view().into()), table.len_bytes())?
        };
        let norm = self.norm(NORM)?;
        let head = if self.checkpoint.config().tied { EMBED } else { HEAD };
        let head = match shared {
            true => None,
            false => {
                Some(self.linear(&[(head, self.shard.vocab.clone())], 0..hidden, false, KSum::Ascending)?)
            }
        };
        Ok(Ends { embed, norm, head })
    }

    pub(crate) fn layer(&mut self, layer: usize) -> Result<Layer<B>, ModelError> {
        let config = self.checkpoint.config();
        let shard = self.shard;
        let name = |part: &str| in_layer(layer, part);
        let elements = |heads: &Range<usize>| heads.start * config.head_dim..heads.end * config.head_dim;
        let (q, kv) = (elements(&shard.heads), elements(&shard.kv_heads));
        let hidden = 0..config.hidden;
        let [q_proj, k_proj, v_proj] =
            ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj.weight")));
        let o_proj = name("self_attn.o_proj.weight");
        let [gate, up, down] = ["gate", "up", "down"].map(|part| name(&format!("mlp.{part}_proj.weight")));
        Ok(Layer {
            input_norm: self.norm(&name("input_layernorm.weight"))?,
            qkv: self.linear(
                &[(&q_proj, q.clone()), (&k_proj, kv.clone()), (&v_proj, kv)],
                hidden.clone(),
                config.qkv_bias,
                KSum::Ascending,
            )?,
            q_norm: self.optional(config.qk_norm, &name("self_attn.q_norm.weight"), Self::norm)?,
            k_norm: self.optional(config.qk_norm, &name("self_attn.k_norm.weight"), Self::norm)?,
            o: self.linear(&[(&o_proj, hidden.clone())], q, false, shard.o_sum)?,
            o_bias: self.optional(config.o_bias, &name("self_attn.o_proj.bias"), Self::bias)?,
            post_norm: self.norm(&name("post_attention_layernorm.weight"))?,
            gate_up: self.linear(
                &[(&gate, shard.ffn.clone()), (&up, shard.ffn.clone())],
                hidden.clone(),
                config.mlp_bias,
                KSum::Ascending,
            )?,
            down: self.linear(&[(&down, hidden)], shard.ffn.clone(), false, shard.down_sum)?,
            down_bias: self.optional(config.mlp_bias, &name("mlp.down_proj.bias"), Self::bias)?,
        })
    }

    /// Rows of several matrices stacked, all with the same columns; with the biases of those rows where `bias`.
    fn linear(
        &mut self,
        parts: &[(&str, Range<usize>)],
        cols: Range<usize>,
        bias: bool,
        sum: KSum,
    ) -> Result<B::Weight, ModelError> {
        let checkpoint = self.checkpoint;
        let slices: Vec<Slice<'_>> = parts
            .iter()
            .map(|(name, rows)| checkpoint.slice(name, rows.clone(), cols.clone()))
            .collect::<Result<_, _>>()?;
        let biases: Vec<Slice<'_>> = parts
            .iter()
            .filter(|_| bias)
            // A bias is one row: the matrix's rows are its columns.
            .map(|(name, rows)| checkpoint.slice(&bias_of(name), 0..1, rows.clone()))
            .collect::<Result<_, _>>()?;
        let bytes = slices.iter().chain(&biases).map(Slice::len_bytes).sum();
        let source = WeightSource::Linear(Linear {
            parts: slices.iter().map(|slice| slice.view().into()).collect(),
            bias: bias.then(|| biases.iter().map(Slice::view).collect()),
            sum,
        });
        self.load(&source, bytes)
    }

    fn norm(&mut self, name: &str) -> Result<B::Weight, ModelError> {
        let slice = self.checkpoint.whole(name)?;
        self.load(&WeightSource::Norm(slice.view()), slice.len_bytes())
    }

    fn bias(&mut self, name: &str) -> Result<B::Weight, ModelError> {
        let slice = self.checkpoint.whole(name)?;
        self.load(&WeightSource::Bias(slice.view()), slice.len_bytes())
    }

    fn optional(
        &mut self,
        wanted: bool,
        name: &str,
        load: impl FnOnce(&mut Self, &str) -> Result<B::Weight, ModelError>,
    ) -> Result<Option<B::Weight>, ModelError> {
        wanted.then(|| load(self, name)).transpose()
    }

    fn load(&mut self, source: &WeightSource<'_>, bytes: u64) -> Result<B::Weight, ModelError> {
        let weight = self.backend.load(source)?;
        self.progress.weights += 1;
        self.progress.bytes += bytes;
        (self.report)(self.progress);
        Ok(weight)
    }
}

/// `x.weight` -> `x.bias`.
fn bias_of(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}
