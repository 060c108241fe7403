//! Mixtures of experts in numbers: how many, how a token's are chosen, which layers have them, what their tensors are
//! called.

use backend::{Glu, Routing, Score};

use crate::ModelError;
use crate::config::at_most;
use crate::fields::Fields;

/// Most experts of a layer, and of all layers: tables are made of so many entries.
const EXPERTS_MAX: usize = 2048;
const EXPERTS_TOTAL_MAX: usize = 1 << 17;

/// The experts of the layers that have them.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How a token's experts are chosen and weighed.
    pub routing: Routing,
    /// Width of an expert.
    pub width: usize,
    /// Width of the expert that every token passes; 0: there is none.
    pub shared_width: usize,
    /// Whether a bias is added to the scores for the choice.
    pub choice_bias: bool,
    /// Whether router, gate, up and down have biases.
    pub biases: bool,
    /// How gate and up become one.
    pub glu: Glu,
    /// Per layer, whether it has experts.
    pub layers: Vec<bool>,
    /// Names of their tensors.
    pub names: ExpertNames,
}

/// What a family calls the tensors of its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertNames {
    /// `mlp.experts.0.gate_proj`, `mlp.gate.e_score_correction_bias`.
    Mlp,
    /// `block_sparse_moe.experts.0.w1`, `block_sparse_moe.e_score_correction_bias`.
    BlockSparse,
    /// `mlp.experts.0.gate_up_proj`, whose rows are a gate's and an up's in turn, or the two apart; `mlp.router`.
    Together,
}

impl ExpertNames {
    /// The part of a layer that holds router and experts.
    pub(crate) fn block(self) -> &'static str {
        match self {
            ExpertNames::Mlp | ExpertNames::Together => "mlp",
            ExpertNames::BlockSparse => "block_sparse_moe",
        }
    }

    /// Gate, up and down projection of an expert.
    pub(crate) fn projections(self) -> [&'static str; 3] {
        match self {
            ExpertNames::Mlp | ExpertNames::Together => ["gate_proj", "up_proj", "down_proj"],
            ExpertNames::BlockSparse => ["w1", "w3", "w2"],
        }
    }

    /// The router, within the block.
    pub(crate) fn router(self) -> &'static str {
        match self {
            ExpertNames::Mlp | ExpertNames::BlockSparse => "gate",
            ExpertNames::Together => "router",
        }
    }

    /// The bias for the choice, within the block.
    pub(crate) fn choice_bias(self) -> &'static str {
        match self {
            ExpertNames::Mlp | ExpertNames::Together => "gate.e_score_correction_bias",
            ExpertNames::BlockSparse => "e_score_correction_bias",
        }
    }
}

impl Experts {
    /// DeepSeek V3's, which GLM 4 MoE has too: sigmoid scores, a bias for the choice, groups, a shared expert, the
    /// first layers dense.
    pub(crate) fn deepseek(fields: &mut Fields, layers: usize) -> Result<Experts, ModelError> {
        fields.one_of("scoring_func", &["sigmoid"])?;
        fields.one_of("topk_method", &["noaux_tc"])?;
        let width = fields.size("moe_intermediate_size")?;
        let (experts, top_k) = chosen(fields, ["n_routed_experts", "num_local_experts"], layers)?;
        let groups = fields.opt_size("n_group")?.unwrap_or(1);
        let groups_used = fields.opt_size("topk_group")?.unwrap_or(1);
        let members = experts.checked_div(groups).unwrap_or(0);
        if groups == 0 || members * groups != experts || groups > 1 && members < 2 {
            let reason = format!("{groups} groups of {experts} experts: each needs as many, at least 2");
            return Err(fields.error("n_group", reason));
        }
        if groups_used == 0 || groups_used > groups || top_k > groups_used * members {
            let reason =
                format!("{groups_used} of {groups} groups of {members} for {top_k} experts of a token");
            return Err(fields.error("topk_group", reason));
        }
        let shared = fields.opt_size("n_shared_experts")?.unwrap_or(0);
        let first = fields.opt_size("first_k_dense_replace")?.unwrap_or(0);
        let every = fields.opt_size("moe_layer_freq")?.unwrap_or(1);
        if every == 0 {
            return Err(fields.error("moe_layer_freq", "0 is not a number of layers"));
        }
        Ok(Experts {
            routing: Routing {
                experts,
                top_k,
                score: Score::Sigmoid,
                groups: (groups > 1).then_some((groups, groups_used)),
                normalise: fields.flag("norm_topk_prob", true)?,
                normalise_eps: 1e-20,
                scale: fields.opt_positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
            },
            width,
            shared_width: shared * width,
            choice_bias: true,
            biases: false,
            glu: Glu::Silu,
            layers: (0..layers).map(|layer| layer >= first && layer % every == 0).collect(),
            names: ExpertNames::Mlp,
        })
    }
}

/// The number of experts (under either name), and those of a token.
pub(crate) fn chosen(
    fields: &mut Fields,
    [name, other]: [&'static str; 2],
    layers: usize,
) -> Result<(usize, usize), ModelError> {
    let name = if fields.has(other) && !fields.has(name) { other } else { name };
    let experts = at_most(fields, name, EXPERTS_MAX)?;
    if let Some(again) = fields.opt_size(other)?.filter(|again| *again != experts) {
        return Err(fields.error(other, format!("{again}, but {name} is {experts}")));
    }
    if experts * layers > EXPERTS_TOTAL_MAX {
        let reason = format!("{experts} in {layers} layers are more than {EXPERTS_TOTAL_MAX}");
        return Err(fields.error(name, reason));
    }
    let top_k = fields.size("num_experts_per_tok")?;
    if top_k > experts {
        return Err(fields.error("num_experts_per_tok", format!("{top_k} of {experts} experts")));
    }
    Ok((experts, top_k))
}
