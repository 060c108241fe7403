//! Puts one rank's part of a checkpoint on its device, weight by weight.

use std::cell::Cell;

use backend::{
    Backend, BackendError, ExpertSource, Heads, KSum, Linear, MatrixView, TakeExpert, WeightSource,
};

use crate::ahead::ahead;
use crate::checkpoint::Checkpoint;
use crate::decoder::{AttentionWeights, FfnWeights, Layer, QueryWeights};
use crate::tensors::{EMBED, EMBED_Q, GATE_UP, HEAD, KV_B, NORM, SINKS, UNEMBED_OUT, in_layer};
use crate::weights::Slice;
use crate::{Attention, Experts, Latent, ModelError, Shard};

/// How far a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Layers on the device.
    pub layers: usize,
    /// Layers of the model.
    pub layers_total: usize,
    /// Bytes read from the checkpoint.
    pub bytes: u64,
    /// Bytes that this rank reads in all.
    pub bytes_total: u64,
}

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
    ) -> Result<Self, ModelError> {
        let bytes_total = checkpoint.rank_bytes(shard.world)?[shard.rank];
        let layers_total = checkpoint.config().layers;
        let progress = Progress { layers: 0, layers_total, bytes: 0, bytes_total };
        report(progress);
        Ok(Loader { backend, checkpoint, shard, report, progress })
    }

    pub(crate) fn ends(&mut self) -> Result<Ends<B>, ModelError> {
        let config = self.checkpoint.config();
        // One table serves as embedding and head; but a rank of several has all of the first, a part of the second.
        if config.tied && self.shard.world == 1 {
            let embed = self.linear(&[EMBED.into()], false, KSum::Ascending)?;
            return Ok(Ends { embed, norm: self.norm(NORM)?, head: None });
        }
        let table = self.checkpoint.part(EMBED, self.shard)?;
        let embed = self.load(&WeightSource::Embedding(table.view()))?;
        drop(table);
        let head = match config.tied {
            true => self.checkpoint.slice(EMBED, self.shard.vocab.clone(), 0..config.hidden)?,
            false => self.checkpoint.part(HEAD, self.shard)?,
        };
        let head = Linear { parts: vec![head.view()], bias: None, sum: KSum::Ascending };
        let head = self.load(&WeightSource::Linear(head))?;
        Ok(Ends { embed, norm: self.norm(NORM)?, head: Some(head) })
    }

    pub(crate) fn layer(&mut self, layer: usize) -> Result<Layer<B>, ModelError> {
        let config = self.checkpoint.config();
        let name = |part: &str| in_layer(layer, part);
        let loaded = Layer {
            input_norm: self.norm(&name("input_layernorm.weight"))?,
            attention: match &config.attention {
                Attention::Grouped(grouped) => AttentionWeights::Grouped {
                    qkv: self.linear(
                        &["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj.weight"))),
                        grouped.qkv_bias,
                        KSum::Ascending,
                    )?,
                    qk_norm: match grouped.qk_norm {
                        Some(_) => Some((
                            self.norm(&name("self_attn.q_norm.weight"))?,
                            self.norm(&name("self_attn.k_norm.weight"))?,
                        )),
                        None => None,
                    },
                    sinks: match grouped.sinks {
                        true => Some(self.exact(&name(SINKS))?),
                        false => None,
                    },
                },
                Attention::Latent(latent) => self.latent(latent, &name)?,
            },
            o: self.linear(&[name("self_attn.o_proj.weight")], false, self.shard.o_sum)?,
            o_bias: self.bias(config.attention.o_bias(), &name("self_attn.o_proj.bias"))?,
            post_norm: self.norm(&name("post_attention_layernorm.weight"))?,
            ffn: match config.experts(layer) {
                Some(experts) => self.experts(experts, &name)?,
                None => FfnWeights::Dense {
                    gate_up: self.linear(
                        &["gate", "up"].map(|part| name(&format!("mlp.{part}_proj.weight"))),
                        config.mlp_bias,
                        KSum::Ascending,
                    )?,
                    down: self.linear(&[name("mlp.down_proj.weight")], false, self.shard.down_sum)?,
                    down_bias: self.bias(config.mlp_bias, &name("mlp.down_proj.bias"))?,
                },
            },
        };
        self.progress.layers += 1;
        (self.report)(self.progress);
        Ok(loaded)
    }

    fn latent(
        &mut self,
        latent: &Latent,
        name: &impl Fn(&str) -> String,
    ) -> Result<AttentionWeights<B>, ModelError> {
        let q = match latent.q_rank {
            Some(_) => QueryWeights::Low {
                down: self.linear(&[name("self_attn.q_a_proj.weight")], latent.bias, KSum::Ascending)?,
                norm: self.norm(&name("self_attn.q_a_layernorm.weight"))?,
                up: self.linear(&[name("self_attn.q_b_proj.weight")], false, KSum::Ascending)?,
            },
            None => QueryWeights::Whole(self.linear(
                &[name("self_attn.q_proj.weight")],
                false,
                KSum::Ascending,
            )?),
        };
        let kv = name("self_attn.kv_a_proj_with_mqa.weight");
        let heads = self.heads(latent, name)?;
        let q_to_latent = self.backend.load(&heads.keys()?)?;
        let latent_to_value = self.backend.load(&heads.values()?)?;
        self.loaded(heads.len_bytes());
        Ok(AttentionWeights::Latent {
            q,
            kv: self.linear(&[kv], latent.bias, KSum::Ascending)?,
            latent_norm: self.norm(&name("self_attn.kv_a_layernorm.weight"))?,
            q_to_latent,
            latent_to_value,
        })
    }

    /// Each head's matrices between latent and keys, and latent and values: from one matrix whose rows are keys and
    /// values head by head, or from two.
    fn heads(&self, latent: &Latent, name: &impl Fn(&str) -> String) -> Result<HeadMatrices<'l>, ModelError> {
        let (checkpoint, shard): (&'l Checkpoint, _) = (self.checkpoint, self.shard);
        let Latent { latent_dim, nope_dim, value_dim, .. } = *latent;
        let slices = match checkpoint.has(&name(KV_B)) {
            true => vec![checkpoint.part(&name(KV_B), shard)?],
            false => {
                vec![checkpoint.part(&name(EMBED_Q), shard)?, checkpoint.part(&name(UNEMBED_OUT), shard)?]
            }
        };
        Ok(HeadMatrices { slices, heads: shard.heads.len(), latent_dim, nope_dim, value_dim })
    }

    fn experts(
        &mut self,
        experts: &Experts,
        name: &impl Fn(&str) -> String,
    ) -> Result<FfnWeights<B>, ModelError> {
        let (checkpoint, shard) = (self.checkpoint, self.shard);
        let (names, sum) = (experts.names, shard.experts_sum);
        let block = name(names.block());
        let [gate, up, down] = names.projections();
        let router = format!("{block}.{}.weight", names.router());
        let router = self.linear(&[router], experts.biases, KSum::Ascending)?;
        let choice_bias = match experts.choice_bias {
            true => Some(self.exact(&format!("{block}.{}", names.choice_bias()))?),
            false => None,
        };
        let mut stack = |parts: &[&str], sum: KSum, biases: bool| {
            let (block, count, bytes) = (&block, experts.routing.experts, Cell::new(0));
            let stack = Stack { checkpoint, shard, block, parts, count, sum, biases, bytes };
            let weight = self.backend.load(&WeightSource::Experts(&stack))?;
            self.loaded(stack.bytes.get());
            Ok::<_, ModelError>(weight)
        };
        let together = checkpoint.has(&format!("{block}.experts.0.{GATE_UP}.weight"));
        let apart = [gate, up];
        let gate_up = if together { &[GATE_UP][..] } else { &apart[..] };
        let gate_up = stack(gate_up, KSum::Ascending, experts.biases)?;
        // Added once, whoever multiplies.
        let down_stack = stack(&[down], sum, experts.biases && shard.rank == 0)?;
        let shared = match experts.shared_width {
            0 => None,
            _ => {
                let of = |part: &str| format!("{block}.shared_experts.{part}.weight");
                Some((
                    self.linear(&[of(gate), of(up)], false, KSum::Ascending)?,
                    self.linear(&[of(down)], false, sum)?,
                ))
            }
        };
        let (routing, glu) = (experts.routing.clone(), experts.glu);
        Ok(FfnWeights::Experts { routing, glu, router, choice_bias, gate_up, down: down_stack, shared })
    }

    /// This rank's part of several matrices stacked by rows, with their biases where `bias`.
    fn linear(&mut self, names: &[String], bias: bool, sum: KSum) -> Result<B::Weight, ModelError> {
        let (checkpoint, shard) = (self.checkpoint, self.shard);
        let part = |name: &String| checkpoint.part(name, shard);
        let slices: Vec<Slice<'_>> = names.iter().map(part).collect::<Result<_, _>>()?;
        let biases: Vec<Slice<'_>> =
            names.iter().filter(|_| bias).map(|name| part(&bias_of(name))).collect::<Result<_, _>>()?;
        let source = WeightSource::Linear(Linear {
            parts: slices.iter().map(Slice::view).collect(),
            bias: bias.then(|| biases.iter().map(Slice::numbers).collect()),
            sum,
        });
        self.load(&source)
    }

    /// Numbers that stay as exact as they are stored.
    fn exact(&mut self, name: &str) -> Result<B::Weight, ModelError> {
        let slice = self.checkpoint.part(name, self.shard)?;
        self.load(&WeightSource::Exact(slice.numbers()))
    }

    fn norm(&mut self, name: &str) -> Result<B::Weight, ModelError> {
        let slice = self.checkpoint.part(name, self.shard)?;
        self.load(&WeightSource::Norm(slice.numbers()))
    }

    fn bias(&mut self, wanted: bool, name: &str) -> Result<Option<B::Weight>, ModelError> {
        if !wanted {
            return Ok(None);
        }
        let slice = self.checkpoint.part(name, self.shard)?;
        self.load(&WeightSource::Bias(slice.numbers())).map(Some)
    }

    fn load(&mut self, source: &WeightSource<'_>) -> Result<B::Weight, ModelError> {
        let weight = self.backend.load(source)?;
        self.loaded(bytes_of(source));
        Ok(weight)
    }

    fn loaded(&mut self, bytes: u64) {
        self.progress.bytes += bytes;
        (self.report)(self.progress);
    }
}

/// This rank's parts of the experts of a layer, read as the device takes them.
struct Stack<'l> {
    checkpoint: &'l Checkpoint,
    shard: &'l Shard,
    /// `model.layers.3.mlp`.
    block: &'l str,
    /// The matrices of an expert that are stacked by rows.
    parts: &'l [&'l str],
    count: usize,
    sum: KSum,
    /// Whether the matrices have biases.
    biases: bool,
    /// Bytes that were read, the last time.
    bytes: Cell<u64>,
}

impl ExpertSource for Stack<'_> {
    fn count(&self) -> usize {
        self.count
    }

    fn each(&self, take: &mut TakeExpert<'_>) -> Result<(), BackendError> {
        self.bytes.set(0);
        let (checkpoint, shard, block, parts) = (self.checkpoint, self.shard, self.block, self.parts);
        let (together, with_biases) = (parts.contains(&GATE_UP), self.biases);
        let read = |expert: usize| {
            let all = |end: &str| -> Result<Vec<Slice<'_>>, ModelError> {
                let part =
                    |part: &&str| checkpoint.part(&format!("{block}.experts.{expert}.{part}.{end}"), shard);
                parts.iter().map(part).collect()
            };
            let both = || -> Result<_, ModelError> {
                let biases = with_biases.then(|| all("bias")).transpose()?;
                Ok((all("weight")?, if together { biases.map(apart) } else { biases }))
            };
            both().map_err(|error| BackendError::Source(error.into()))
        };
        ahead(self.count, read, |(slices, biases): (Vec<Slice<'_>>, Option<Vec<Slice<'_>>>)| {
            let parts: Vec<MatrixView<'_>> = match together {
                true => slices.iter().flat_map(|both| [both.rows_in_turn(0), both.rows_in_turn(1)]).collect(),
                false => slices.iter().map(Slice::view).collect(),
            };
            let bias: Option<Vec<_>> = biases.as_ref().map(|all| all.iter().map(Slice::numbers).collect());
            let linear = Linear { parts, bias, sum: self.sum };
            self.bytes.set(self.bytes.get() + linear_bytes(&linear));
            take(&linear)
        })
    }
}

/// Of each bias of gate and up together, whose numbers are theirs in turn, gate's and up's.
fn apart(biases: Vec<Slice<'_>>) -> Vec<Slice<'_>> {
    biases.into_iter().flat_map(|bias| [bias.in_turn(0), bias.in_turn(1)]).collect()
}

/// The matrices of this rank's heads, head after head: keys and values in turn, or keys and then values.
struct HeadMatrices<'c> {
    slices: Vec<Slice<'c>>,
    heads: usize,
    latent_dim: usize,
    nope_dim: usize,
    value_dim: usize,
}

impl HeadMatrices<'_> {
    fn keys(&self) -> Result<WeightSource<'_>, ModelError> {
        let absorbed = self.slices.len() == 2;
        let rows = if absorbed { self.latent_dim } else { self.nope_dim };
        let heads = self.cut(&self.slices[0], 0, rows)?;
        Ok(WeightSource::Heads(Heads { heads, transposed: !absorbed, to_latent: true }))
    }

    fn values(&self) -> Result<WeightSource<'_>, ModelError> {
        let heads = match &self.slices[..] {
            [_, values] => self.cut(values, 0, self.value_dim)?,
            both => self.cut(&both[0], self.nope_dim, self.value_dim)?,
        };
        Ok(WeightSource::Heads(Heads { heads, transposed: false, to_latent: false }))
    }

    /// Rows `skip..skip + rows` of every head.
    fn cut<'s>(
        &self,
        slice: &'s Slice<'_>,
        skip: usize,
        rows: usize,
    ) -> Result<Vec<MatrixView<'s>>, ModelError> {
        let all = slice.view();
        let each = all.rows() / self.heads;
        let part = |head: usize| all.cut(head * each + skip..head * each + skip + rows, 0..all.cols());
        Ok((0..self.heads).map(part).collect::<Result<_, BackendError>>()?)
    }

    fn len_bytes(&self) -> u64 {
        self.slices.iter().map(|slice| slice.view().len_bytes()).sum()
    }
}

/// Bytes that were read for a weight.
fn bytes_of(source: &WeightSource<'_>) -> u64 {
    match source {
        WeightSource::Linear(one) => linear_bytes(one),
        // Count their own.
        WeightSource::Experts(_) | WeightSource::Heads(_) => 0,
        WeightSource::Embedding(table) => table.len_bytes(),
        WeightSource::Norm(view) | WeightSource::Bias(view) | WeightSource::Exact(view) => {
            (view.rows * view.cols * view.dtype.bytes()) as u64
        }
    }
}

fn linear_bytes(linear: &Linear<'_>) -> u64 {
    let biases = linear.bias.iter().flatten().map(|bias| (bias.cols * bias.dtype.bytes()) as u64);
    linear.parts.iter().map(|part| part.len_bytes()).chain(biases).sum()
}

/// `x.weight` -> `x.bias`.
fn bias_of(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}
