//! The decoder, written once over the seam: embed, layers, head. The engine's runner calls [`Model::forward`] where a
//! step wants logits and [`Model::fill`] where it does not; the pieces are public for layer-major prefill and pipeline
//! stages.

use std::ops::Range;

use backend::{Attend, Backend, DType, Glu, KvSpec, Mla, Moe, NormSpan, QkNorm, Rope, Routing, Step};

use crate::load::{Ends, Loader};
use crate::{
    Attention, Checkpoint, Config, Grouped, HeadNorm, Latent, ModelError, Progress, Shard, kv_specs, shards,
};

/// Epsilon of the norms of latents: fixed, whatever `rms_norm_eps` is.
const LATENT_NORM_EPS: f32 = 1e-6;

/// One rank's part of a model, on its device.
pub struct Model<B: Backend> {
    config: Config,
    shard: Shard,
    spec: KvSpec,
    rope: Rope,
    ends: Ends<B>,
    layers: Vec<Layer<B>>,
}

/// Weights of one layer.
pub(crate) struct Layer<B: Backend> {
    pub(crate) input_norm: B::Weight,
    pub(crate) attention: AttentionWeights<B>,
    pub(crate) o: B::Weight,
    pub(crate) o_bias: Option<B::Weight>,
    pub(crate) post_norm: B::Weight,
    pub(crate) ffn: FfnWeights<B>,
}

/// Weights of a layer's attention, but for the output projection.
pub(crate) enum AttentionWeights<B: Backend> {
    Grouped {
        /// Rows q | k | v of this rank's heads.
        qkv: B::Weight,
        qk_norm: Option<(B::Weight, B::Weight)>,
        sinks: Option<B::Weight>,
    },
    Latent {
        q: QueryWeights<B>,
        /// Rows latent | rope key.
        kv: B::Weight,
        latent_norm: B::Weight,
        q_to_latent: B::Weight,
        latent_to_value: B::Weight,
    },
}

/// Where latent attention's q comes from.
pub(crate) enum QueryWeights<B: Backend> {
    /// The hidden state.
    Whole(B::Weight),
    /// A latent of its own, of low rank.
    Low { down: B::Weight, norm: B::Weight, up: B::Weight },
}

/// Weights of a layer's MLP or experts.
pub(crate) enum FfnWeights<B: Backend> {
    Dense {
        /// Rows gate | up of this rank's columns.
        gate_up: B::Weight,
        down: B::Weight,
        down_bias: Option<B::Weight>,
    },
    Experts {
        routing: Routing,
        glu: Glu,
        router: B::Weight,
        choice_bias: Option<B::Weight>,
        /// Of every expert, rows gate | up of this rank's columns.
        gate_up: B::Weight,
        down: B::Weight,
        /// Of the expert that every token passes.
        shared: Option<(B::Weight, B::Weight)>,
    },
}

/// Called when the attention of a layer is recorded: from then on the layer's cache can be exported, while its MLP and
/// the later layers still compute.
pub type AfterAttend<'f, S> = &'f mut dyn FnMut(&mut S, usize);

impl<B: Backend> Model<B> {
    /// Loads the part of rank `rank` of `world`. `dtype` is the backend's ([`backend::DeviceOptions::dtype`]): the type
    /// of activations and cache. Only this rank's bytes are read. `progress` is called after every weight.
    pub fn load(
        backend: &mut B,
        checkpoint: &Checkpoint,
        rank: usize,
        world: usize,
        dtype: DType,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, ModelError> {
        assert!(rank < world, "rank {rank} of {world}");
        let config = checkpoint.config().clone();
        let shard = shards(&config, world)?.swap_remove(rank);
        let spec = kv_specs(&config, dtype, world)?.swap_remove(rank);
        let mut loader = Loader::new(backend, checkpoint, &shard, progress)?;
        let ends = loader.ends()?;
        let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let rope = config.rope.table();
        Ok(Model { config, shard, spec, rope, ends, layers })
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What this rank holds.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// What this rank caches.
    pub fn kv_spec(&self) -> &KvSpec {
        &self.spec
    }

    /// Longest context in tokens.
    pub fn max_context(&self) -> usize {
        self.config.context
    }

    /// Width of the logits, all ranks together.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// The whole model over the step's batch: `[rows.len(), vocabulary of this rank]`, for [`backend::Out::Logits`].
    /// `rows` (at least one) are batch rows, see [`backend::Batch::last_rows`]. In the last layer only they go on after
    /// the attention.
    pub fn forward<'a>(
        &self,
        step: &mut B::Step<'a>,
        rows: &[u32],
        after_attend: AfterAttend<'_, B::Step<'a>>,
    ) -> B::Act {
        assert!(!rows.is_empty(), "logits of no rows: use fill");
        let last = self.config.layers - 1;
        let x = self.embed(step);
        let x = self.layers(step, x, 0..last, after_attend);
        let attended = self.attend(step, &x, last, after_attend);
        let (x, attended) = (step.rows(x, rows), step.rows(attended, rows));
        let x = self.after_attention(step, x, attended, last);
        self.logits(step, x)
    }

    /// The step's batch into the cache, without logits, for [`backend::Out::Nothing`]: chunks of a prompt before its
    /// last. The last layer ends with its cache writes.
    pub fn fill<'a>(&self, step: &mut B::Step<'a>, after_attend: AfterAttend<'_, B::Step<'a>>) {
        let last = self.config.layers - 1;
        let x = self.embed(step);
        let x = self.layers(step, x, 0..last, after_attend);
        self.attend(step, &x, last, after_attend);
    }

    /// The batch's ids as activations `[rows, hidden]`.
    pub fn embed<'a>(&self, step: &mut B::Step<'a>) -> B::Act {
        step.embed(&self.ends.embed)
    }

    /// Layers `range` over `x = [rows, hidden]`.
    pub fn layers<'a>(
        &self,
        step: &mut B::Step<'a>,
        x: B::Act,
        range: Range<usize>,
        after_attend: AfterAttend<'_, B::Step<'a>>,
    ) -> B::Act {
        range.fold(x, |x, layer| self.layer(step, x, layer, after_attend))
    }

    /// One layer over `x = [rows, hidden]`.
    pub fn layer<'a>(
        &self,
        step: &mut B::Step<'a>,
        x: B::Act,
        layer: usize,
        after_attend: AfterAttend<'_, B::Step<'a>>,
    ) -> B::Act {
        let attended = self.attend(step, &x, layer, after_attend);
        self.after_attention(step, x, attended, layer)
    }

    /// Final norm and head over rows `rows` of `x = [rows, hidden]`.
    pub fn head<'a>(&self, step: &mut B::Step<'a>, x: B::Act, rows: &[u32]) -> B::Act {
        let x = step.rows(x, rows);
        self.logits(step, x)
    }

    /// Norm, projections and attention: `[rows, this rank's query heads * width of a value]`. Writes the layer's cache.
    fn attend<'a>(
        &self,
        step: &mut B::Step<'a>,
        x: &B::Act,
        layer: usize,
        after_attend: AfterAttend<'_, B::Step<'a>>,
    ) -> B::Act {
        let weights = &self.layers[layer];
        let x = step.norm(x, &weights.input_norm, self.config.norm_eps);
        let attended = match (&self.config.attention, &weights.attention) {
            (Attention::Grouped(grouped), AttentionWeights::Grouped { qkv, qk_norm, sinks }) => {
                let qkv = step.linear(&x, qkv);
                step.attend(layer, qkv, &self.grouped(grouped, layer, qk_norm.as_ref(), sinks.as_ref()))
            }
            (
                Attention::Latent(latent),
                AttentionWeights::Latent { q, kv, latent_norm, q_to_latent, latent_to_value },
            ) => {
                let q = match q {
                    QueryWeights::Whole(q) => step.linear(&x, q),
                    QueryWeights::Low { down, norm, up } => {
                        let low = step.linear(&x, down);
                        let low = step.norm(&low, norm, LATENT_NORM_EPS);
                        step.linear(&low, up)
                    }
                };
                let kv = step.linear(&x, kv);
                step.attend_mla(
                    layer,
                    q,
                    kv,
                    &self.latent(latent, [latent_norm, q_to_latent, latent_to_value]),
                )
            }
            _ => unreachable!("weights are loaded by the configuration's kind of attention"),
        };
        after_attend(step, layer);
        attended
    }

    fn grouped<'m>(
        &'m self,
        grouped: &Grouped,
        layer: usize,
        norms: Option<&'m (B::Weight, B::Weight)>,
        sinks: Option<&'m B::Weight>,
    ) -> Attend<'m, B> {
        let shard = &self.shard;
        let span = match grouped.qk_norm {
            Some(HeadNorm::Projection) => NormSpan::Projection {
                heads_total: self.config.heads,
                kv_heads_total: grouped.kv_heads,
                head_first: shard.heads.start,
                kv_head_first: shard.kv_heads.start,
                kv_heads_own: shard.kv_heads_own.clone(),
            },
            _ => NormSpan::Head,
        };
        Attend {
            heads: shard.heads.len(),
            kv_heads: shard.kv_heads.len(),
            head_dim: grouped.head_dim,
            scale: (grouped.head_dim as f32).powf(-0.5),
            rope: &self.rope,
            qk_norm: norms.map(|(q, k)| QkNorm { q, k, eps: self.config.norm_eps, span }),
            window: grouped.windows[layer],
            sinks,
        }
    }

    fn latent<'m>(
        &'m self,
        latent: &Latent,
        [latent_norm, q_to_latent, latent_to_value]: [&'m B::Weight; 3],
    ) -> Mla<'m, B> {
        Mla {
            heads: self.shard.heads.len(),
            nope_dim: latent.nope_dim,
            rope_dim: latent.rope_dim,
            value_dim: latent.value_dim,
            latent_dim: latent.latent_dim,
            scale: latent.scale,
            rope: &self.rope,
            latent_norm,
            norm_eps: LATENT_NORM_EPS,
            q_to_latent,
            latent_to_value,
        }
    }

    /// Output projection, residual, MLP or experts, residual.
    fn after_attention<'a>(
        &self,
        step: &mut B::Step<'a>,
        x: B::Act,
        attended: B::Act,
        layer: usize,
    ) -> B::Act {
        let weights = &self.layers[layer];
        let attended = self.row_parallel(step, &attended, &weights.o, weights.o_bias.as_ref());
        let x = step.add(x, attended);
        let normed = step.norm(&x, &weights.post_norm, self.config.norm_eps);
        let out = match &weights.ffn {
            FfnWeights::Dense { gate_up, down, down_bias } => {
                let gate_up = step.linear(&normed, gate_up);
                let gated = step.glu(gate_up, Glu::Silu);
                self.row_parallel(step, &gated, down, down_bias.as_ref())
            }
            FfnWeights::Experts { routing, glu, router, choice_bias, gate_up, down, shared } => {
                let moe = Moe {
                    router,
                    routing,
                    choice_bias: choice_bias.as_ref(),
                    gate_up,
                    down,
                    shared: shared.as_ref().map(|(gate_up, down)| (gate_up, down)),
                    glu: *glu,
                };
                let partial = step.moe(&normed, &moe);
                step.all_reduce(partial)
            }
        };
        step.add(x, out)
    }

    /// A product whose inputs are spread over the ranks.
    fn row_parallel<'a>(
        &self,
        step: &mut B::Step<'a>,
        x: &B::Act,
        weight: &B::Weight,
        bias: Option<&B::Weight>,
    ) -> B::Act {
        let partial = step.linear(x, weight);
        let joined = step.all_reduce(partial);
        match bias {
            Some(bias) => step.bias(joined, bias),
            None => joined,
        }
    }

    fn logits<'a>(&self, step: &mut B::Step<'a>, x: B::Act) -> B::Act {
        let x = step.norm(&x, &self.ends.norm, self.config.norm_eps);
        step.linear(&x, self.ends.head.as_ref().unwrap_or(&self.ends.embed))
    }
}
