//! Which part of the model each tensor-parallel rank holds: explicit ranges, so that nothing else divides by the number
//! of ranks. Ranges are equal where they can be, else the first ranks hold more.

use std::ops::Range;

use backend::{DType, KSum, KvSpec};

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
    /// KV heads that they need; held by several ranks where there are more ranks than KV heads.
    pub kv_heads: Range<usize>,
    /// MLP columns.
    pub ffn: Range<usize>,
    /// Rows of the head (logits).
    pub vocab: Range<usize>,
    /// Sum order of the attention's output projection.
    pub o_sum: KSum,
    /// Sum order of the MLP's down projection.
    pub down_sum: KSum,
}

/// The parts of all `world` ranks. Errors when a rank would be left without any.
pub fn shards(config: &Config, world: usize) -> Result<Vec<Shard>, ModelError> {
    let heads = head_ranges(config, world)?;
    let ffn = split("ffn columns", config.ffn, world, FFN_ALIGN)?;
    let vocab = split("vocabulary entries", config.vocab_size, world, 1)?;
    let columns: Vec<Range<usize>> =
        heads.iter().map(|(heads, _)| heads.start * config.head_dim..heads.end * config.head_dim).collect();
    let (o_sum, down_sum) = (ksum(config.heads * config.head_dim, &columns), ksum(config.ffn, &ffn));
    Ok(heads
        .into_iter()
        .zip(ffn.into_iter().zip(vocab))
        .enumerate()
        .map(|(rank, ((heads, kv_heads), (ffn, vocab)))| Shard {
            rank,
            world,
            heads,
            kv_heads,
            ffn,
            vocab,
            o_sum,
            down_sum,
        })
        .collect())
}

/// What each of `world` ranks caches per token, in elements of `dtype`.
pub fn kv_specs(config: &Config, dtype: DType, world: usize) -> Result<Vec<KvSpec>, ModelError> {
    let spec =
        |shard: Shard| KvSpec::gqa(config.layers, config.kv_heads, shard.kv_heads, config.head_dim, dtype);
    Ok(shards(config, world)?.into_iter().map(spec).collect())
}

/// `total` in `world` consecutive ranges, unequal by one unit at most; a unit is `align` where that divides `total`
/// and leaves every rank one.
fn split(
    what: &'static str,
    total: usize,
    world: usize,
    align: usize,
) -> Result<Vec<Range<usize>>, ModelError> {
    if world == 0 || total < world {
        return Err(ModelError::Split { what, count: total, world });
    }
    // Equal ranges need no alignment.
    let aligned = !total.is_multiple_of(world) && total.is_multiple_of(align) && total / align >= world;
    let unit = if aligned { align } else { 1 };
    let (each, more) = (total / unit / world, total / unit % world);
    let start = |rank: usize| (rank * each + rank.min(more)) * unit;
    Ok((0..world).map(|rank| start(rank)..start(rank + 1)).collect())
}

/// Query heads and the KV heads that they need.
type Heads = (Range<usize>, Range<usize>);

/// The heads of each rank. A rank's query heads are whole groups of KV heads, or lie within one group.
fn head_ranges(config: &Config, world: usize) -> Result<Vec<Heads>, ModelError> {
    let group = config.heads / config.kv_heads;
    if world <= config.kv_heads {
        let kv = split("kv heads", config.kv_heads, world, 1)?;
        return Ok(kv.into_iter().map(|kv| (kv.start * group..kv.end * group, kv)).collect());
    }
    // More ranks than KV heads: consecutive ranks share one, and split its query heads.
    let mut ranges = Vec::with_capacity(world);
    for (kv, ranks) in split("kv heads", world, config.kv_heads, 1)?.into_iter().enumerate() {
        let heads = split("query heads of a kv head", group, ranks.len(), 1)
            .map_err(|_| ModelError::Split { what: "query heads", count: config.heads, world })?;
        ranges.extend(heads.into_iter().map(|h| (kv * group + h.start..kv * group + h.end, kv..kv + 1)));
    }
    Ok(ranges)
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
            if let Ok(ranges) = split("x", total, world, FFN_ALIGN) {
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
    fn more_ranks_than_heads_is_an_error() {
        let error = shards(&config(4, 2, 16, 160, 512), 5).unwrap_err().to_string();
        assert_eq!(error, "cannot split query heads over 5 tensor-parallel ranks: there are 4");
        let error = shards(&config(8, 2, 16, 3, 512), 4).unwrap_err().to_string();
        assert_eq!(error, "cannot split ffn columns over 4 tensor-parallel ranks: there are 3");
    }
}
