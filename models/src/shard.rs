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
    let unit = if total % world != 0 && total % align == 0 && total / align >= world { align } else { 1 };
    let (each, more) = (total / unit / world, total / unit % world);
    let start = |rank: usize| (rank * each + rank.min(more)) * unit;
    Ok((0..world).map(|rank| start(rank)..start(rank + 1)).collect())
}

/// Query heads and KV heads per rank. A rank's query heads are whole groups of KV heads, or lie within one group.
fn head_ranges(config: &Config, world: usize) -> Result<Vec<(Range<usize>, Range<usize>)>, ModelError> {
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
    let branches = TREE % world == 0
        && total % TREE == 0
        && ranges
            .iter()
            .enumerate()
            .all(|(rank, r)| *r == (rank * total / world..(rank + 1) * total / world));
    KSum::Tree { ranges: if branches { TREE / world } else { 1 } }
}
