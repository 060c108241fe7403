//! Which part of the model each tensor-parallel rank holds: explicit ranges, so that nothing else divides by the number
//! of ranks. Ranges are equal where they can be, else the first ranks hold more. Columns that share a quantisation scale
//! stay together where there are enough of such groups.

use std::ops::Range;

use backend::{DType, KSum, KvSpec};

use crate::attention::Attention;
use crate::config::Group;
use crate::regroup::CUT_COLS;
use crate::tensors::{Cut, Span};
use crate::{Config, ModelError};

/// Partial sums of a row-parallel product over the whole model.
const TREE: usize = 8;

/// Uneven MLP ranges begin at multiples of this, where it divides the width.
const FFN_ALIGN: usize = 32;

/// One rank's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// KV heads that they need; held by several ranks where there are more ranks than KV heads. Latent attention has
    /// none: every rank holds the latent.
    pub kv_heads: Range<usize>,
    /// Of the KV heads, those that no lower rank holds, counted from this rank's first.
    pub kv_heads_own: Range<usize>,
    /// MLP columns, in layers without experts.
    pub ffn: Range<usize>,
    /// Columns of every expert.
    pub experts: Range<usize>,
    /// Columns of the shared expert.
    pub shared: Range<usize>,
    /// Rows of the head (logits).
    pub vocab: Range<usize>,
    /// Sum order of the attention's output projection.
    pub o_sum: KSum,
    /// Sum order of the MLP's down projection.
    pub down_sum: KSum,
    /// Sum order of the experts' down projections, the shared one's too.
    pub experts_sum: KSum,
}

/// The parts of all `world` ranks. Errors when a rank would be left without any.
pub fn shards(config: &Config, world: usize) -> Result<Vec<Shard>, ModelError> {
    let heads = within_groups(&config.groups.o, |group| head_ranges(config, world, group))?;
    let groups = &config.groups;
    let none = || vec![0..0; world];
    let ffn = match config.has_dense_layers() {
        true => columns("ffn columns", config.ffn, world, &groups.down)?,
        false => none(),
    };
    let (mut experts, mut shared) = (none(), none());
    // Experts and the shared one are added up range by range, so they have one sum order.
    let mut experts_sum = KSum::Tree { ranges: 1 };
    if let Some(numbers) = &config.experts {
        experts = columns("columns of an expert", numbers.width, world, &groups.experts)?;
        experts_sum = ksum(numbers.width, &experts);
        if numbers.shared_width > 0 {
            shared = columns("columns of the shared expert", numbers.shared_width, world, &groups.shared)?;
            if ksum(numbers.shared_width, &shared) != experts_sum {
                experts_sum = KSum::Tree { ranges: 1 };
            }
        }
    }
    let vocab = split("vocabulary entries", config.vocab_size, world, 1, &Group::default())?;
    let value_dim = config.attention.value_dim();
    let columns: Vec<Range<usize>> =
        heads.iter().map(|(heads, _)| heads.start * value_dim..heads.end * value_dim).collect();
    let (o_sum, down_sum) = (ksum(config.attended(), &columns), ksum(config.ffn, &ffn));
    let mut told = 0;
    Ok(heads
        .into_iter()
        .enumerate()
        .map(|(rank, (heads, kv_heads))| {
            let own = told.max(kv_heads.start)..kv_heads.end.max(told);
            told = own.end;
            Shard {
                rank,
                world,
                kv_heads_own: own.start - kv_heads.start..own.end - kv_heads.start,
                heads,
                kv_heads,
                ffn: ffn[rank].clone(),
                experts: experts[rank].clone(),
                shared: shared[rank].clone(),
                vocab: vocab[rank].clone(),
                o_sum,
                down_sum,
                experts_sum,
            }
        })
        .collect())
}

/// What each of `world` ranks caches per token, in elements of `dtype`.
pub fn kv_specs(config: &Config, dtype: DType, world: usize) -> Result<Vec<KvSpec>, ModelError> {
    let layers = config.layers;
    let spec = |shard: Shard| match &config.attention {
        Attention::Grouped(grouped) => {
            KvSpec::gqa(layers, grouped.kv_heads, shard.kv_heads, grouped.head_dim, dtype)
        }
        Attention::Latent(latent) => KvSpec::mla(layers, latent.latent_dim, latent.rope_dim, dtype),
    };
    Ok(shards(config, world)?.into_iter().map(spec).collect())
}

/// Rows and columns that `shard` holds of a tensor of `rows` x `cols` (a vector is one row).
pub(crate) fn held(shard: &Shard, cut: Cut, (rows, cols): (usize, usize)) -> (Range<usize>, Range<usize>) {
    let elements = |span: Span| {
        let times = |range: &Range<usize>, unit: usize| range.start * unit..range.end * unit;
        match span {
            Span::Heads(unit) => times(&shard.heads, unit),
            Span::KvHeads(unit) => times(&shard.kv_heads, unit),
            Span::Ffn => shard.ffn.clone(),
            Span::Experts(unit) => times(&shard.experts, unit),
            Span::Shared => shard.shared.clone(),
            Span::Vocab => shard.vocab.clone(),
        }
    };
    match cut {
        Cut::Whole => (0..rows, 0..cols),
        Cut::First => (0..rows, if shard.rank == 0 { 0..cols } else { 0..0 }),
        Cut::Rows(span) if rows == 1 => (0..1, elements(span)),
        Cut::Rows(span) => (elements(span), 0..cols),
        Cut::Cols(span) => (0..rows, elements(span)),
    }
}

/// What `split` gives with whole quantisation groups; where those are too few, with parts of them.
fn within_groups<T>(group: &Group, split: impl Fn(&Group) -> Result<T, ModelError>) -> Result<T, ModelError> {
    match split(group) {
        Err(ModelError::Groups { .. }) if group.cols > CUT_COLS => {
            split(&Group { cols: CUT_COLS, tensor: group.tensor.clone() })
        }
        result => result,
    }
}

fn columns(
    what: &'static str,
    total: usize,
    world: usize,
    group: &Group,
) -> Result<Vec<Range<usize>>, ModelError> {
    within_groups(group, |group| split(what, total, world, FFN_ALIGN, group))
}

/// `total` in `world` consecutive ranges, unequal by one unit at most; a unit is a multiple of `group` where ranges are
/// not equal anyway, and of `align` where that divides `total` and leaves every rank one.
fn split(
    what: &'static str,
    total: usize,
    world: usize,
    align: usize,
    group: &Group,
) -> Result<Vec<Range<usize>>, ModelError> {
    if world == 0 || total < world {
        return Err(ModelError::Split { what, count: total, world });
    }
    let fits = |unit: usize| total.is_multiple_of(unit) && total / unit >= world;
    // Equal ranges need no alignment.
    let equal = total.is_multiple_of(world) && (total / world).is_multiple_of(group.cols);
    let units = [if equal { total / world } else { align.max(group.cols) }, group.cols];
    let Some(unit) = units.into_iter().find(|unit| unit.is_multiple_of(group.cols) && fits(*unit)) else {
        return Err(cut_group(group, total, world));
    };
    let (each, more) = (total / unit / world, total / unit % world);
    let start = |rank: usize| (rank * each + rank.min(more)) * unit;
    Ok((0..world).map(|rank| start(rank)..start(rank + 1)).collect())
}

fn cut_group(group: &Group, cols: usize, world: usize) -> ModelError {
    ModelError::Groups { name: group.tensor.clone(), cols, group: group.cols, world }
}

/// Query heads and the KV heads that they need.
type Heads = (Range<usize>, Range<usize>);

/// The heads of each rank. A rank's query heads are whole groups of KV heads, or lie within one group.
fn head_ranges(config: &Config, world: usize, group: &Group) -> Result<Vec<Heads>, ModelError> {
    let value_dim = config.attention.value_dim();
    // Heads whose columns of the output projection fill whole quantisation groups.
    let together = group.cols / gcd(group.cols, value_dim);
    // `total` heads in pieces of `unit`; an error tells of all `count` heads of the model.
    let pieces = |what, count, total: usize, world: usize, unit: usize| {
        if total >= world && (!total.is_multiple_of(unit) || total / unit < world) {
            return Err(cut_group(group, config.attended(), world));
        }
        let ranges = split(what, total / unit, world, 1, &Group::default());
        let ranges = ranges.map_err(|_| ModelError::Split { what, count, world })?;
        Ok(ranges.into_iter().map(|range| range.start * unit..range.end * unit).collect::<Vec<_>>())
    };
    let Attention::Grouped(grouped) = &config.attention else {
        let heads = pieces("query heads", config.heads, config.heads, world, together)?;
        return Ok(heads.into_iter().map(|heads| (heads, 0..0)).collect());
    };
    let each = config.heads / grouped.kv_heads;
    if world <= grouped.kv_heads {
        let kv =
            pieces("kv heads", grouped.kv_heads, grouped.kv_heads, world, together / gcd(together, each))?;
        return Ok(kv.into_iter().map(|kv| (kv.start * each..kv.end * each, kv)).collect());
    }
    // More ranks than KV heads: consecutive ranks share one, and split its query heads.
    let mut ranges = Vec::with_capacity(world);
    for (kv, ranks) in
        split("kv heads", world, grouped.kv_heads, 1, &Group::default())?.into_iter().enumerate()
    {
        // One rank of a KV head has all its query heads, be they aligned: their boundaries are the model's too.
        let heads =
            pieces("query heads", config.heads, each, ranks.len(), together).map_err(
                |error| match error {
                    ModelError::Split { what, count, .. } => ModelError::Split { what, count, world },
                    ModelError::Groups { name, cols, group, .. } => {
                        ModelError::Groups { name, cols, group, world }
                    }
                    error => error,
                },
            )?;
        ranges.extend(heads.into_iter().map(|h| (kv * each + h.start..kv * each + h.end, kv..kv + 1)));
    }
    Ok(ranges)
}

/// The greatest common divisor.
pub(crate) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The sum order of a row-parallel product over `total` columns: the same tree for every split where the ranks' parts
/// are whole branches of it.
fn ksum(total: usize, ranges: &[Range<usize>]) -> KSum {
    let world = ranges.len();
    let branches = TREE.is_multiple_of(world)
        && total.is_multiple_of(TREE)
        && ranges
            .iter()
            .enumerate()
            .all(|(rank, r)| *r == (rank * total / world..(rank + 1) * total / world));
    KSum::Tree { ranges: if branches { TREE / world } else { 1 } }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(heads: usize, kv_heads: usize, head_dim: usize, ffn: usize, vocab: usize) -> Config {
        let json = format!(
            r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": 64, "intermediate_size": {ffn},
                "num_hidden_layers": 1, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                "head_dim": {head_dim}, "max_position_embeddings": 64}}"#
        );
        Config::parse("c", json.as_bytes()).unwrap()
    }

    /// Ranges in order that cover `[0, total)` once, none empty.
    fn covers(ranges: impl Iterator<Item = Range<usize>>, total: usize) -> bool {
        let mut end = 0;
        for range in ranges {
            if range.start != end || range.is_empty() {
                return false;
            }
            end = range.end;
        }
        end == total
    }

    proptest! {
        /// Every split gives each rank something, covers the model in order, and keeps query heads with their KV heads.
        #[test]
        fn ranks_cover_the_model(kv in 1usize..9, group in 1usize..9, ffn in 1usize..600, vocab in 1usize..600, world in 1usize..17) {
            let config = config(kv * group, kv, 16, ffn, vocab);
            let Ok(shards) = shards(&config, world) else {
                // Only for want of pieces.
                let ranks_of_first_head = if world <= kv { 1 } else { world.div_ceil(kv) };
                prop_assert!(ffn < world || vocab < world || ranks_of_first_head > group);
                return Ok(());
            };
            prop_assert_eq!(shards.len(), world);
            prop_assert!(covers(shards.iter().map(|s| s.heads.clone()), kv * group));
            prop_assert!(covers(shards.iter().map(|s| s.ffn.clone()), ffn));
            prop_assert!(covers(shards.iter().map(|s| s.vocab.clone()), vocab));
            for s in &shards {
                // The KV heads of the query heads, no more.
                prop_assert_eq!(&s.kv_heads, &(s.heads.start / group..(s.heads.end - 1) / group + 1));
                // The seam pairs them evenly.
                prop_assert_eq!(s.heads.len() % s.kv_heads.len(), 0);
                if s.kv_heads.len() > 1 {
                    prop_assert_eq!(s.heads.len(), s.kv_heads.len() * group);
                }
            }
        }

        /// Ranks differ by one unit at most.
        #[test]
        fn splits_are_fair(total in 1usize..2000, world in 1usize..17) {
            if let Ok(ranges) = split("x", total, world, FFN_ALIGN, &Group::default()) {
                let lens: Vec<usize> = ranges.iter().map(Range::len).collect();
                let (least, most) = (lens.iter().min().unwrap(), lens.iter().max().unwrap());
                prop_assert!(most - least <= FFN_ALIGN, "{lens:?}");
                prop_assert!(total % world != 0 || most == least, "{lens:?}");
            }
        }
    }

    #[test]
    fn the_sum_tree_is_shared_where_ranges_divide() {
        let sums = |heads, ffn, world| {
            let shards = shards(&config(heads, 2, 16, ffn, 512), world).unwrap();
            let of = |sum| match sum {
                KSum::Tree { ranges } => ranges,
                KSum::Ascending => 0,
            };
            (of(shards[0].o_sum), of(shards[0].down_sum))
        };
        assert_eq!(sums(4, 160, 1), (8, 8));
        assert_eq!(sums(4, 160, 2), (4, 4));
        assert_eq!(sums(4, 160, 4), (2, 2));
        assert_eq!(sums(8, 160, 8), (1, 1));
        // 160 in 3 parts and 4 heads in 3: branches of no common tree.
        assert_eq!(sums(4, 160, 3), (1, 1));
        // 6 heads over 4 ranks are uneven, 160 columns are not; 162 columns have no 8 equal ranges.
        assert_eq!(sums(6, 160, 4), (1, 2));
        assert_eq!(sums(6, 162, 2), (4, 1));
    }

    #[test]
    fn kv_heads_are_shared_by_ranks_when_there_are_fewer() {
        let shards = shards(&config(6, 2, 16, 160, 512), 4).unwrap();
        let heads: Vec<_> = shards.iter().map(|s| (s.heads.clone(), s.kv_heads.clone())).collect();
        assert_eq!(heads, [(0..2, 0..1), (2..3, 0..1), (3..5, 1..2), (5..6, 1..2)]);
        let specs = kv_specs(&config(6, 2, 16, 160, 512), DType::BF16, 4).unwrap();
        assert_eq!(specs[1], KvSpec::gqa(1, 2, 0..1, 16, DType::BF16));
        assert_eq!(specs[2], KvSpec::gqa(1, 2, 1..2, 16, DType::BF16));
    }

    #[test]
    fn each_kv_head_is_told_by_one_rank() {
        let own = |heads, kv_heads, world| -> Vec<_> {
            let shards = shards(&config(heads, kv_heads, 16, 160, 512), world).unwrap();
            shards.into_iter().map(|s| (s.kv_heads, s.kv_heads_own)).collect()
        };
        assert_eq!(own(8, 4, 2), [(0..2, 0..2), (2..4, 0..2)]);
        assert_eq!(own(8, 2, 4), [(0..1, 0..1), (0..1, 1..1), (1..2, 0..1), (1..2, 1..1)]);
    }

    #[test]
    fn heads_stay_within_quantisation_groups_while_there_are_enough() {
        let ranges = |heads, kv_heads, cols, world| {
            let mut config = config(heads, kv_heads, 32, 160, 512);
            config.groups.o = Group { cols, tensor: "o".into() };
            shards(&config, world).map(|all| all.into_iter().map(|s| s.heads).collect::<Vec<_>>())
        };
        // Heads of 32 columns: two to a group of 64.
        assert_eq!(ranges(6, 6, 32, 4).unwrap(), [0..2, 2..4, 4..5, 5..6]);
        assert_eq!(ranges(6, 6, 64, 2).unwrap(), [0..4, 4..6]);
        assert_eq!(ranges(6, 6, 64, 3).unwrap(), [0..2, 2..4, 4..6]);
        // Fewer groups than ranks: heads as if there were none.
        assert_eq!(ranges(6, 6, 64, 4).unwrap(), [0..2, 2..4, 4..5, 5..6]);
        assert_eq!(ranges(4, 1, 256, 2).unwrap(), [0..2, 2..4]);
        // Query heads come with their KV heads.
        assert_eq!(ranges(12, 6, 128, 2).unwrap(), [0..8, 8..12]);
    }

    #[test]
    fn latents_are_everywhere_and_experts_are_split_by_columns() {
        let json = r#"{"model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "kv_lora_rank": 32,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 2, "first_k_dense_replace": 1}"#;
        let mut config = Config::parse("c", json.as_bytes()).unwrap();
        let shard = shards(&config, 2).unwrap().swap_remove(1);
        assert_eq!((shard.heads, shard.kv_heads), (2..4, 0..0));
        assert_eq!((shard.ffn, shard.experts, shard.shared), (80..160, 24..48, 48..96));
        assert_eq!((shard.o_sum, shard.experts_sum), (KSum::Tree { ranges: 4 }, KSum::Tree { ranges: 4 }));
        let specs = kv_specs(&config, DType::BF16, 2).unwrap();
        assert_eq!(specs, vec![KvSpec::mla(2, 32, 8, DType::BF16); 2]);
        // Experts in whole groups are uneven, and then have no common tree; nor has the shared one, which is added to them.
        config.groups.experts = Group { cols: 16, tensor: "e".into() };
        let shards = shards(&config, 2).unwrap();
        assert_eq!((&shards[0].experts, &shards[0].shared), (&(0..32), &(0..48)));
        assert_eq!(shards[0].experts_sum, KSum::Tree { ranges: 1 });
    }

    #[test]
    fn more_ranks_than_heads_is_an_error() {
        let error = shards(&config(4, 2, 16, 160, 512), 5).unwrap_err().to_string();
        assert_eq!(error, "cannot split query heads over 5 tensor-parallel ranks: there are 4");
        let error = shards(&config(8, 2, 16, 3, 512), 4).unwrap_err().to_string();
        assert_eq!(error, "cannot split ffn columns over 4 tensor-parallel ranks: there are 3");
    }
}
