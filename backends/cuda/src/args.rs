//! Arguments of the kernels: the structs of `kernels/*.cu`, field by field. Pointers are device addresses.

/// Words of the largest of them.
const WORDS_MAX: usize = 24;

/// A struct of a kernel's.
///
/// # Safety
/// `repr(C)`, of whole words, equal to the kernel's struct, and [`Field::put`] writes all of its fields at their places.
pub unsafe trait Args: Field {}

/// What has a place in such a struct.
pub trait Field: Copy {
    /// Writes itself to `to`, which has its size.
    fn put(&self, to: &mut [u8]);
}

/// Arguments as the device reads them, zeros where the struct has no field: equal ones have equal words.
#[derive(Clone, Copy)]
pub struct Words {
    words: [u64; WORDS_MAX],
    len: usize,
}

impl Words {
    /// The words of `args`.
    pub(crate) fn of<A: Args>(args: &A) -> Self {
        const { assert!(size_of::<A>() <= WORDS_MAX * 8 && size_of::<A>().is_multiple_of(8)) }
        let mut bytes = [0; WORDS_MAX * 8];
        args.put(&mut bytes[..size_of::<A>()]);
        let (words, _) = bytes.as_chunks();
        let mut all = Words { words: [0; WORDS_MAX], len: size_of::<A>() / 8 };
        all.words.iter_mut().zip(words).for_each(|(to, word)| *to = u64::from_ne_bytes(*word));
        all
    }
}

impl std::ops::Deref for Words {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        &self.words[..self.len]
    }
}

macro_rules! numbers {
    ($($type:ty)*) => {
        $(impl Field for $type {
            fn put(&self, to: &mut [u8]) {
                to.copy_from_slice(&self.to_ne_bytes());
            }
        })*
    };
}

numbers!(u32 u64 f32);

macro_rules! args {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            pub(crate) struct $name { $(pub(crate) $field: $type,)* }
            impl Field for $name {
                fn put(&self, to: &mut [u8]) {
                    $(
                        let at = std::mem::offset_of!($name, $field);
                        self.$field.put(&mut to[at..at + size_of::<$type>()]);
                    )*
                }
            }
            // SAFETY: plain numbers in C layout; the kernels have the same fields in the same order.
            unsafe impl Args for $name {}
        )*
    };
}

args! {
    GatherArgs { table: u64, rows: u64, out: u64, width: u32, count: u32, }
    NormArgs { x: u64, weight: u64, out: u64, width: u32, eps: f32, }
    AddArgs { x: u64, y: u64, out: u64, width: u32, broadcast: u32, }
    GluArgs { x: u64, out: u64, width: u32, clamped: u32, limit: f32, slope: f32, }
    ConvertArgs { x: u64, out: u64, count: u64, }
    /// One rank's columns among those of all.
    SideBySideArgs { parts: u64, out: u64, width: u32, out_width: u32, first: u32, }
    AnglesArgs { positions: u64, inv_freq: u64, cosines: u64, sines: u64, rows: u32, n: u32, factor: f32, }
    /// Where the rows of the batch lie in the cache.
    Places { positions: u64, runs: u64, tables: u64, blocks_max: u32, block_shift: u32, }
    PrepareArgs {
        places: Places, qkv: u64, q_norm: u64, k_norm: u64, squares: u64, cosines: u64, sines: u64, k_plane: u64,
        v_plane: u64, heads: u32, kv_heads: u32, dim: u32, n: u32, interleaved: u32, projection: u32,
        heads_total: u32, kv_heads_total: u32, eps: f32,
    }
    SquaresArgs {
        qkv: u64, squares: u64, heads: u32, kv_heads: u32, dim: u32, heads_total: u32, kv_heads_total: u32,
        head_first: u32, kv_head_first: u32, kv_own_from: u32, kv_own_to: u32,
    }
    PrepareLatentArgs {
        places: Places, q: u64, kv: u64, norm: u64, cosines: u64, sines: u64, latent_plane: u64, rope_plane: u64,
        heads: u32, nope: u32, rope: u32, latent: u32, interleaved: u32, eps: f32,
    }
    /// Rows of one sequence that one block attends for.
    Tile { run: u32, row: u32, rows: u32, position: u32, }
    AttendArgs {
        q: u64, out: u64, k: u64, v: u64, tables: u64, firsts: u64, tiles: u64, partial: u64, sinks: u64,
        q_row: u32, q_head: u32, k_token: u32, k_head: u32, v_token: u32, v_head: u32, heads: u32, group: u32,
        pack: u32, key_dim: u32, value_dim: u32, blocks_max: u32, block_shift: u32, window: u32, splits: u32,
        scale: f32,
    }
    CombineArgs {
        partial: u64, tiles: u64, out: u64, sinks: u64, heads: u32, pack: u32, value_dim: u32, splits: u32,
        queries_max: u32, compact: u32, scale: f32,
    }
    /// Products with the matrices of heads, see `kernels/latent.cu`.
    AbsorbArgs {
        x: u64, w: u64, rows: u64, out: u64, count: u32, heads: u32, inputs: u32, outputs: u32, x_head: u32,
        x_offset: u32, x_row: u32,
    }
    LatentArgs {
        q_latent: u64, q: u64, latents: u64, ropes: u64, tables: u64, tiles: u64, out: u64, partial: u64, heads: u32,
        latent: u32, rope: u32, q_row: u32, q_head: u32, q_offset: u32, blocks_max: u32, block_shift: u32,
        splits: u32, scale: f32,
    }
    MoveArgs {
        pages: u64, dense: u64, table: u64, pitch: u32, width: u32, first: u32, count: u32, block_shift: u32,
        out: u32,
    }
    SumArgs { rows: u64, tables: u64, sums: u64, width: u32, count: u32, }
    ExpandArgs { nope: u64, rope: u64, out: u64, heads: u32, nope_dim: u32, rope_dim: u32, }
    /// A quantised matrix on the device, see `kernels/quant.cuh`.
    QuantArgs {
        codes: u64, scales: u64, biases: u64, format: u32, bits: u32, group: u32, group_rows: u32,
        origin_row: u32, origin_col: u32, scale_type: u32, scale_cols: u32, row_bytes: u32, cols: u32,
    }
    ProductArgs {
        quant: QuantArgs, w: u64, x: u64, out: u64, bias: u64, rows: u64, tiles: u64, codes_expert: u64,
        scales_expert: u64, m: u32, n: u32, k: u32, out_stride: u32, out_f32: u32,
    }
    /// Rows that are rounded to FP8, see `kernels/fp8.cu`.
    RoundArgs { x: u64, codes: u64, scales: u64, width: u32, chunks: u32, }
    Fp8Args { product: ProductArgs, x_scales: u64, }
    DecodeArgs { quant: QuantArgs, rows: u64, out: u64, cols: u32, }
    RouteArgs {
        scores: u64, bias: u64, choice_bias: u64, experts: u64, weights: u64, count: u32, top_k: u32, sigmoid: u32,
        groups: u32, groups_used: u32, normalise: u32, bias_type: u32, normalise_eps: f32, scale: f32,
    }
    RoutesArgs {
        experts: u64, slots: u64, sources: u64, tiles: u64, rows: u32, top_k: u32, count: u32, tile: u32,
        tiles_max: u32,
    }
    DrawArgs { logits: u64, rules: u64, out: u64, width: u32, }
    ResolveArgs { inputs: u64, drawn: u64, out: u64, count: u32, }
    GatherSumArgs {
        parts: u64, slots: u64, weights: u64, shared: u64, out: u64, top_k: u32, width: u32, out_f32: u32,
    }
}
