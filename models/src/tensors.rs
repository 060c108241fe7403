//! The tensors of an architecture by their names in Hugging Face checkpoints, with shapes and how ranks share them: what
//! a checkpoint is checked against before anything is loaded, what a dummy one is made of, what a rank reads.

use crate::attention::{Attention, Grouped, HeadNorm, Latent};
use crate::{Config, ExpertNames, Experts};

/// One tensor that the architecture has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// `[out, in]`, or `[dim]` of a norm or bias.
    pub shape: Vec<usize>,
    /// What it does.
    pub role: Role,
    /// What a rank holds of it.
    pub cut: Cut,
}

/// What a tensor does; tells a dummy checkpoint its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Matrix of a product, or an embedding table.
    Matrix,
    /// Scale of a norm.
    Norm,
    /// Bias of a product, or of a choice.
    Bias,
}

/// What a rank holds of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// Rows (elements of a vector).
    Rows(Span),
    /// Columns.
    Cols(Span),
    /// All of it, on the first rank alone.
    First,
}

/// Along what a tensor is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Query heads, each of so many elements.
    Heads(usize),
    /// KV heads, each of so many elements.
    KvHeads(usize),
    /// Columns of the MLP.
    Ffn,
    /// Columns of every expert, each of so many rows.
    Experts(usize),
    /// Columns of the shared expert.
    Shared,
    /// Entries of the vocabulary.
    Vocab,
}

/// Names of the weights outside the layers.
pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Latent attention's matrix from the latent to keys and values; and what some formats have in its place: latent to
/// keys, absorbed, and latent to values, each head under the other.
pub(crate) const KV_B: &str = "self_attn.kv_b_proj.weight";
pub(crate) const EMBED_Q: &str = "self_attn.embed_q.weight";
pub(crate) const UNEMBED_OUT: &str = "self_attn.unembed_out.weight";

/// The scores of a layer's query heads that have no value.
pub(crate) const SINKS: &str = "self_attn.sinks";

/// An expert's gate and up in one matrix, whose rows are theirs in turn.
pub(crate) const GATE_UP: &str = "gate_up_proj";

/// Name of `part` (`self_attn.q_proj.weight`) in `layer`.
pub(crate) fn in_layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// All tensors of the model, in the order of computation.
pub fn tensors(config: &Config) -> Vec<TensorSpec> {
    let mut list = List(Vec::new());
    list.matrix(EMBED.into(), [config.vocab_size, config.hidden], Cut::Whole);
    for layer in 0..config.layers {
        let name = |part: &str| in_layer(layer, part);
        list.norm(name("input_layernorm"), config.hidden, Cut::Whole);
        match &config.attention {
            Attention::Grouped(grouped) => list.grouped(config, grouped, &name),
            Attention::Latent(latent) => list.latent(config, latent, &name),
        }
        list.norm(name("post_attention_layernorm"), config.hidden, Cut::Whole);
        match config.experts(layer) {
            Some(experts) => list.experts(config.hidden, experts, &name),
            None => list.mlp(config, &name),
        }
    }
    list.tensor(NORM.into(), vec![config.hidden], Role::Norm, Cut::Whole);
    if !config.tied {
        list.matrix(HEAD.into(), [config.vocab_size, config.hidden], Cut::Rows(Span::Vocab));
    }
    list.0
}

/// The tensors that a checkpoint may have in the place of `spec`, with the same meaning.
pub(crate) fn instead(config: &Config, spec: &TensorSpec) -> Option<[TensorSpec; 2]> {
    if let Some((front, end)) = spec.name.rsplit_once(GATE_UP) {
        let one = |name: &str| {
            let mut shape = spec.shape.clone();
            shape[0] /= 2;
            let (name, cut) = (format!("{front}{name}{end}"), Cut::Rows(Span::Experts(1)));
            TensorSpec { name, shape, role: spec.role, cut }
        };
        return Some([one("gate_proj"), one("up_proj")]);
    }
    let front = spec.name.strip_suffix(KV_B)?;
    let Attention::Latent(latent) = &config.attention else { return None };
    let one = |name: &str, out: usize, cols: usize| TensorSpec {
        name: format!("{front}{name}"),
        shape: vec![config.heads * out, cols],
        role: Role::Matrix,
        cut: Cut::Rows(Span::Heads(out)),
    };
    Some([
        one(EMBED_Q, latent.latent_dim, latent.nope_dim),
        one(UNEMBED_OUT, latent.value_dim, latent.latent_dim),
    ])
}

/// Whether a checkpoint may have `name` without the model using it: tables that are computed, a stored copy of a tied
/// head, and what predicts further tokens.
pub(crate) fn unused(config: &Config, name: &str) -> bool {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
    name.ends_with(".rotary_emb.inv_freq")
        || config.tied && name == HEAD
        || layer.is_some_and(|layer: usize| layer >= config.layers)
        || ["mtp.", "model.mtp."].iter().any(|front| name.starts_with(front))
}

struct List(Vec<TensorSpec>);

impl List {
    fn tensor(&mut self, name: String, shape: Vec<usize>, role: Role, cut: Cut) {
        self.0.push(TensorSpec { name, shape, role, cut });
    }

    fn matrix(&mut self, name: String, shape: [usize; 2], cut: Cut) {
        self.tensor(name, shape.to_vec(), Role::Matrix, cut);
    }

    fn norm(&mut self, name: String, dim: usize, cut: Cut) {
        self.tensor(format!("{name}.weight"), vec![dim], Role::Norm, cut);
    }

    /// A matrix, and its bias: cut as its rows are.
    fn linear(&mut self, name: String, shape: [usize; 2], cut: Cut, bias: bool) {
        self.matrix(format!("{name}.weight"), shape, cut);
        if bias {
            let cut = match cut {
                // Added where the sums of experts are joined.
                Cut::Cols(Span::Experts(_)) => Cut::First,
                Cut::Cols(_) => Cut::Whole,
                cut => cut,
            };
            self.tensor(format!("{name}.bias"), vec![shape[0]], Role::Bias, cut);
        }
    }

    fn grouped(&mut self, config: &Config, grouped: &Grouped, name: &impl Fn(&str) -> String) {
        let (hidden, dim) = (config.hidden, grouped.head_dim);
        let (q, kv) = (config.heads * dim, grouped.kv_heads * dim);
        let (heads, kv_heads) = (Span::Heads(dim), Span::KvHeads(dim));
        let bias = grouped.qkv_bias;
        self.linear(name("self_attn.q_proj"), [q, hidden], Cut::Rows(heads), bias);
        self.linear(name("self_attn.k_proj"), [kv, hidden], Cut::Rows(kv_heads), bias);
        self.linear(name("self_attn.v_proj"), [kv, hidden], Cut::Rows(kv_heads), bias);
        self.linear(name("self_attn.o_proj"), [hidden, q], Cut::Cols(heads), grouped.o_bias);
        let norms = match grouped.qk_norm {
            None => None,
            Some(HeadNorm::Head) => Some([(dim, Cut::Whole); 2]),
            Some(HeadNorm::Projection) => Some([(q, Cut::Rows(heads)), (kv, Cut::Rows(kv_heads))]),
        };
        if grouped.sinks {
            let cut = Cut::Rows(Span::Heads(1));
            self.tensor(name(SINKS), vec![config.heads], Role::Bias, cut);
        }
        if let Some([(q, q_cut), (k, k_cut)]) = norms {
            self.norm(name("self_attn.q_norm"), q, q_cut);
            self.norm(name("self_attn.k_norm"), k, k_cut);
        }
    }

    fn latent(&mut self, config: &Config, latent: &Latent, name: &impl Fn(&str) -> String) {
        let (hidden, heads) = (config.hidden, config.heads);
        let Latent { latent_dim, nope_dim, rope_dim, value_dim, bias, .. } = *latent;
        let (q, kv) = (nope_dim + rope_dim, nope_dim + value_dim);
        match latent.q_rank {
            Some(rank) => {
                self.linear(name("self_attn.q_a_proj"), [rank, hidden], Cut::Whole, bias);
                self.norm(name("self_attn.q_a_layernorm"), rank, Cut::Whole);
                self.linear(name("self_attn.q_b_proj"), [heads * q, rank], Cut::Rows(Span::Heads(q)), false);
            }
            None => {
                self.linear(name("self_attn.q_proj"), [heads * q, hidden], Cut::Rows(Span::Heads(q)), false);
            }
        }
        let down = name("self_attn.kv_a_proj_with_mqa");
        self.linear(down, [latent_dim + rope_dim, hidden], Cut::Whole, bias);
        self.norm(name("self_attn.kv_a_layernorm"), latent_dim, Cut::Whole);
        self.matrix(name(KV_B), [heads * kv, latent_dim], Cut::Rows(Span::Heads(kv)));
        let o = Cut::Cols(Span::Heads(value_dim));
        self.linear(name("self_attn.o_proj"), [hidden, heads * value_dim], o, bias);
    }

    fn mlp(&mut self, config: &Config, name: &impl Fn(&str) -> String) {
        let names = ["gate", "up", "down"].map(|part| name(&format!("mlp.{part}_proj")));
        self.gated(names, config.hidden, config.ffn, Span::Ffn, config.mlp_bias);
    }

    fn experts(&mut self, hidden: usize, experts: &Experts, name: &impl Fn(&str) -> String) {
        let (names, count) = (experts.names, experts.routing.experts);
        let block = names.block();
        let router = name(&format!("{block}.{}", names.router()));
        self.linear(router, [count, hidden], Cut::Whole, experts.biases);
        if experts.choice_bias {
            let bias = name(&format!("{block}.{}", names.choice_bias()));
            self.tensor(bias, vec![count], Role::Bias, Cut::Whole);
        }
        if experts.shared_width > 0 {
            let names = names.projections().map(|part| name(&format!("{block}.shared_experts.{part}")));
            self.gated(names, hidden, experts.shared_width, Span::Shared, false);
        }
        for expert in 0..count {
            let one = |part: &str| name(&format!("{block}.experts.{expert}.{part}"));
            if names == ExpertNames::Together {
                let (width, bias) = (experts.width, experts.biases);
                self.linear(one(GATE_UP), [2 * width, hidden], Cut::Rows(Span::Experts(2)), bias);
                self.linear(one("down_proj"), [hidden, width], Cut::Cols(Span::Experts(1)), bias);
            } else {
                self.gated(
                    names.projections().map(one),
                    hidden,
                    experts.width,
                    Span::Experts(1),
                    experts.biases,
                );
            }
        }
    }

    /// Gate, up and down of a gated MLP.
    fn gated(&mut self, [gate, up, down]: [String; 3], hidden: usize, width: usize, span: Span, bias: bool) {
        self.linear(gate, [width, hidden], Cut::Rows(span), bias);
        self.linear(up, [width, hidden], Cut::Rows(span), bias);
        self.linear(down, [hidden, width], Cut::Cols(span), bias);
    }
}
