//! What one token's cache is: planes per layer, their width, type and sharding. Store, wire, reshard and ranks loop
//! over planes and never ask which model it is. GQA is two planes (K, V), MLA two replicated ones (latent, rope key).

use std::ops::Range;

use crate::DType;

/// The cache of one model, as held by one rank (or by the whole model when `heads` of each plane covers all).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// Number of decoder layers.
    pub layers: usize,
    /// Planes of every layer, in wire order (K before V).
    pub planes: Vec<Plane>,
}

/// One plane of the cache: `[token][head][dim]` per layer, in canonical order (K after norm and rope, half-split).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plane {
    /// `k`, `v`, `latent`, `rope`: for messages and identity.
    pub name: &'static str,
    /// Heads of the whole model (1 for a replicated plane).
    pub heads_total: usize,
    /// Elements per head.
    pub dim: usize,
    /// Element type.
    pub dtype: DType,
    /// Which heads this rank holds.
    pub sharding: Sharding,
}

/// How a plane is spread over tensor-parallel ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharding {
    /// This rank holds these heads of `[0, heads_total)`. Ranks may hold unequal or overlapping ranges.
    Heads(Range<usize>),
    /// Every rank holds the whole plane.
    Replicated,
}

impl Plane {
    /// The heads that this rank holds.
    pub fn heads(&self) -> Range<usize> {
        match &self.sharding {
            Sharding::Heads(range) => range.clone(),
            Sharding::Replicated => 0..self.heads_total,
        }
    }

    /// Bytes of one token of one layer on this rank.
    pub fn token_bytes(&self) -> usize {
        self.heads().len() * self.head_bytes()
    }

    /// Bytes of one head of one token.
    pub fn head_bytes(&self) -> usize {
        self.dim * self.dtype.bytes()
    }
}

impl KvSpec {
    /// Bytes of one token over all layers and planes on this rank.
    pub fn token_bytes(&self) -> usize {
        self.layers * self.layer_token_bytes()
    }

    /// Bytes of one token of one layer on this rank.
    pub fn layer_token_bytes(&self) -> usize {
        self.planes.iter().map(Plane::token_bytes).sum()
    }

    /// K and V planes of grouped-query attention: `heads` of `heads_total` KV heads of `dim` elements.
    pub fn gqa(layers: usize, heads_total: usize, heads: Range<usize>, dim: usize, dtype: DType) -> Self {
        let plane = |name| Plane { name, heads_total, dim, dtype, sharding: Sharding::Heads(heads.clone()) };
        KvSpec { layers, planes: vec![plane("k"), plane("v")] }
    }

    /// Planes of multi-head latent attention, the same on every rank: the normed latent of `latent` elements and the
    /// rotated key of `rope` elements that all heads share.
    pub fn mla(layers: usize, latent: usize, rope: usize, dtype: DType) -> Self {
        let plane = |name, dim| Plane { name, heads_total: 1, dim, dtype, sharding: Sharding::Replicated };
        KvSpec { layers, planes: vec![plane("latent", latent), plane("rope", rope)] }
    }
}
