//! Operations of one step, at model altitude. MLX records a lazy graph, CUDA enqueues on streams, the CPU runs at once:
//! so the unit is a step, its operations cannot fail (the first error comes out of [`Pending::wait`]), tensors stay
//! inside, and only host data and `Send` leases leave the owner thread.

use std::fmt::Debug;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{
    BackendError, Batch, CpuOptions, CudaOptions, Cut, DType, Draw, Drawn, Group, KvError, KvExport,
    KvLanding, KvSpec, Place, SeqId, WeightSource,
};

/// One device, or one tensor-parallel rank of several, on its owner thread.
pub trait Backend: Sized + 'static {
    /// A loaded weight: immutable, packed or quantised as the device likes.
    type Weight;
    /// An activation of this step, `[rows, width]`: arena slice, device buffer, lazy array. Moved, not cloned.
    type Act;
    /// An activation kept between steps (layer-major prefill, pipeline stages).
    type Hidden;
    /// The KV store.
    type Kv: KvStore;
    /// A step being recorded or run.
    type Step<'a>: Step<Backend = Self>
    where
        Self: 'a;

    /// Opens the device as one rank of `group`.
    fn open(options: &DeviceOptions, group: Group) -> Result<Self, BackendError>;

    /// Opens this device once more, as [`Backend::open`] does, for another model beside what it has: what serves both, a GPU's code
    /// and what was tried of it, is shared.
    fn beside(&self, options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        Self::open(options, group)
    }

    /// What this backend is and promises.
    fn caps(&self) -> Caps;

    /// Bytes of the device's memory that are free now; `None` where it has none of its own, or does not say.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// Packs a weight for the device. Reads the bytes once; they need not outlive the call.
    fn load(&mut self, source: &WeightSource<'_>) -> Result<Self::Weight, BackendError>;

    /// Makes the KV store for this rank's `spec` within `bytes`.
    fn kv(&mut self, spec: &KvSpec, bytes: u64) -> Result<Self::Kv, BackendError>;

    /// Begins a step over `batch`. The caller has given every sequence capacity for its run.
    fn step<'a>(&'a mut self, kv: &'a mut Self::Kv, batch: &'a Batch) -> Self::Step<'a>;

    /// Replaces the links to the other ranks after one was lost; weights and KV stores stay. Rank and world are those
    /// of [`Backend::open`]. Errors where the backend cannot do it: the process is restarted then.
    fn regroup(&mut self, _group: Group) -> Result<(), BackendError> {
        let reason = "cannot replace the links of a group".to_owned();
        Err(BackendError::Unavailable { backend: self.caps().name, reason })
    }
}

/// How to open a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Type that activations are rounded to between operations, and of the KV cache. Sums are always f32.
    pub dtype: DType,
    /// Worker threads of a CPU backend; `0`: one per usable core.
    pub threads: usize,
    /// Tokens of a KV block, a power of two (paged backends).
    pub block_tokens: u32,
    /// Device index where a machine has several.
    pub device: usize,
    /// Folder for what a device compiles, kept between runs; `None`: nothing is kept.
    pub cache: Option<PathBuf>,
    /// What only a CPU backend is asked.
    pub cpu: CpuOptions,
    /// What only a CUDA backend is asked.
    pub cuda: CudaOptions,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            dtype: DType::BF16,
            threads: 0,
            block_tokens: 64,
            device: 0,
            cache: None,
            cpu: CpuOptions::default(),
            cuda: CudaOptions::default(),
        }
    }
}

/// What a backend is and promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// `cpu`, `cuda` or `mlx`.
    pub name: &'static str,
    /// Device and instruction level in words, e.g. `avx512, 2 threads`.
    pub device: String,
    /// Whether the arithmetic contract holds (bit-exact rows). Otherwise results agree within tolerance.
    pub exact: bool,
    /// Rows of one prompt in a step that keep the device computing, rather than reading weights.
    pub chunk_tokens: usize,
}

/// One step: the operations of a decoder over the rows of a [`Batch`].
pub trait Step {
    /// The backend this step runs on.
    type Backend: Backend;

    /// Rows of `table` at the batch's token ids: `[rows, hidden]`. Ids in flight ([`crate::Input::Drawn`]) are taken from
    /// the step before; in a group this is where ranks that did not draw them learn them.
    fn embed(&mut self, table: &Weight<Self>) -> Act<Self>;

    /// A kept activation, back in this step.
    fn resume(&mut self, hidden: Hidden<Self>) -> Act<Self>;

    /// RMS norm over the last dimension, then the scale: `x / sqrt(mean(x^2) + eps) * weight`, in f32, rounded once
    /// to the step's dtype before the scale and once after, as Hugging Face does.
    fn norm(&mut self, x: &Act<Self>, weight: &Weight<Self>, eps: f32) -> Act<Self>;

    /// `x W^T + bias`: `[rows, in] -> [rows, out]`. With [`crate::KSum::Tree`] the result is this rank's f32 partial
    /// sum, to be given to [`Step::all_reduce`] (also when the group has one rank).
    fn linear(&mut self, x: &Act<Self>, weight: &Weight<Self>) -> Act<Self>;

    /// `x + y`.
    fn add(&mut self, x: Act<Self>, y: Act<Self>) -> Act<Self>;

    /// Gated unit of `x = [rows, gate | up]`: `[rows, width / 2]`, see [`Glu`].
    fn glu(&mut self, x: Act<Self>, kind: Glu) -> Act<Self>;

    /// The given rows, in that order.
    fn rows(&mut self, x: Act<Self>, rows: &[u32]) -> Act<Self>;

    /// Joins the ranks' partial sums as a binary tree by rank, in f32, then rounds to the step's dtype.
    fn all_reduce(&mut self, x: Act<Self>) -> Act<Self>;

    /// `x + bias` for every row, in f32, rounded to the step's dtype. For the bias of a row-parallel product, which
    /// belongs after the join ([`Step::all_reduce`]) so that every split gives the same bits; other biases go with
    /// their [`crate::Linear`].
    fn bias(&mut self, x: Act<Self>, bias: &Weight<Self>) -> Act<Self>;

    /// Attention of `layer` over `qkv = [rows, q heads | k heads | v heads]` of this rank: optional per-head norm of q
    /// and k, rope, writing K and V to the cache at each run's positions, then causal attention over `[0, position]`.
    /// Returns `[rows, q heads * head_dim]`.
    fn attend(&mut self, layer: usize, qkv: Act<Self>, attend: &Attend<'_, Self::Backend>) -> Act<Self>;

    /// Multi-head latent attention of `layer`. `q = [rows, this rank's heads * (nope | rope)]`, `kv = [rows, latent |
    /// rope]` (the same on every rank): norms the latent, rotates the rope parts, writes latent and rope key to the two
    /// planes of [`KvSpec::mla`], then causal attention over `[0, position]`. A head's key is `k_up latent | rope key`,
    /// its value `v_up latent`. Returns `[rows, this rank's heads * value_dim]`. Whether keys and values are expanded
    /// or the products are absorbed into q and the result is the backend's choice, per row (but see [`Caps::exact`]).
    fn attend_mla(
        &mut self,
        layer: usize,
        q: Act<Self>,
        kv: Act<Self>,
        mla: &Mla<'_, Self::Backend>,
    ) -> Act<Self>;

    /// A mixture of experts over `x = [rows, hidden]`: routes every row, computes its experts (and the shared one) and
    /// adds them up by their weights. The result is this rank's f32 partial sum, to be given to [`Step::all_reduce`], as
    /// that of a [`crate::KSum::Tree`] product: on exact backends each of the 8 ranges of K is added up over the
    /// experts in ascending order, the shared one last, before the ranges are joined; biases of `down` come before the
    /// products of the first range.
    fn moe(&mut self, x: &Act<Self>, moe: &Moe<'_, Self::Backend>) -> Act<Self>;

    /// A lease on the cache of `tokens` of `seq` in `layer`, as it will be after the last [`Step::attend`] of that
    /// layer. Called once the layer's attention is recorded; [`KvExport::wait`] tells when the bytes are there.
    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<Export<Self>, KvError>;

    /// As [`Step::export`], of `cuts` alone, for receivers that read the memory named by [`KvStore::stays`]: the bytes may stay there.
    fn export_there(
        &mut self,
        seq: SeqId,
        layer: usize,
        tokens: Range<u32>,
        _cuts: &[Cut],
    ) -> Result<Export<Self>, KvError> {
        self.export(seq, layer, tokens)
    }

    /// Ends the step and returns at once where the device can; the next step may be begun before
    /// [`Pending::wait`], and so may operations of the [`KvStore`]: they take effect in the order of calls, as if every
    /// step had ended when it was submitted.
    fn submit(self, out: Out<Act<Self>>) -> Box<dyn Pending<Hidden<Self>>>;
}

/// Short names for the associated types of a step's backend.
pub type Weight<S> = <<S as Step>::Backend as Backend>::Weight;
/// See [`Backend::Act`].
pub type Act<S> = <<S as Step>::Backend as Backend>::Act;
/// See [`Backend::Hidden`].
pub type Hidden<S> = <<S as Step>::Backend as Backend>::Hidden;
/// See [`KvStore::Export`].
pub type Export<S> = <<<S as Step>::Backend as Backend>::Kv as KvStore>::Export;

/// How gate and up become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Glu {
    /// `silu(gate) * up`.
    Silu,
    /// `gate * sigmoid(slope * gate) * (up + 1)` of a gate of at most `limit`, and an up within `limit` of 0 (gpt-oss).
    Clamped {
        /// Positive.
        limit: f32,
        /// Factor within the sigmoid.
        slope: f32,
    },
}

/// What attention needs besides q, k and v. Sizes are this rank's.
pub struct Attend<'a, B: Backend> {
    /// Query heads of this rank.
    pub heads: usize,
    /// KV heads of this rank; each serves `heads / kv_heads` consecutive query heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Factor of the scores, usually `head_dim^-0.5`.
    pub scale: f32,
    /// Rotary embedding of q and k.
    pub rope: &'a Rope,
    /// RMS norm of q and k before rope.
    pub qk_norm: Option<QkNorm<'a, B>>,
    /// Sliding window: a row at `p` attends to `(p - window, p]`.
    pub window: Option<u32>,
    /// A score per query head, [`WeightSource::Exact`] `[heads]`, that takes its share of the softmax and has no value
    /// (attention sinks, gpt-oss).
    pub sinks: Option<&'a B::Weight>,
}

/// RMS norm of q and k before rope.
pub struct QkNorm<'a, B: Backend> {
    /// Scale of q: `[head_dim]`, or `[heads * head_dim]` with [`NormSpan::Projection`].
    pub q: &'a B::Weight,
    /// Scale of k: `[head_dim]`, or `[kv_heads * head_dim]` with [`NormSpan::Projection`].
    pub k: &'a B::Weight,
    /// Epsilon.
    pub eps: f32,
    /// Over what the mean square is taken.
    pub span: NormSpan,
}

/// Over what a norm of q and k takes its mean square.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NormSpan {
    /// Each head by itself (Qwen 3).
    Head,
    /// All heads of the projection, of all ranks (MiniMax M2): the heads' square sums are all-reduced as a vector with a
    /// place per head, then added up in order of head.
    Projection {
        /// Query heads of the whole model.
        heads_total: usize,
        /// KV heads of the whole model.
        kv_heads_total: usize,
        /// First query head of this rank.
        head_first: usize,
        /// First KV head of this rank.
        kv_head_first: usize,
        /// Of this rank's KV heads, those that no lower rank has too: only these are told to the others.
        kv_heads_own: Range<usize>,
    },
}

/// What multi-head latent attention needs besides q and kv. Sizes are this rank's.
pub struct Mla<'a, B: Backend> {
    /// Query heads of this rank.
    pub heads: usize,
    /// Elements of a head's q and k without position.
    pub nope_dim: usize,
    /// Elements of a head's q, and of the shared key, that are rotated.
    pub rope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Elements of the latent.
    pub latent_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Rotary embedding of `rope_dim` elements.
    pub rope: &'a Rope,
    /// RMS norm of the latent, `[latent_dim]`.
    pub latent_norm: &'a B::Weight,
    /// Its epsilon.
    pub norm_eps: f32,
    /// Latent to keys, absorbed: [`crate::Heads`] `nope_dim -> latent_dim`.
    pub q_to_latent: &'a B::Weight,
    /// Latent to values: [`crate::Heads`] `latent_dim -> value_dim`.
    pub latent_to_value: &'a B::Weight,
}

/// What a mixture of experts needs.
pub struct Moe<'a, B: Backend> {
    /// Scores of the experts: [`crate::Linear`] `[experts, hidden]`, whole on every rank; the scores stay f32. A bias
    /// of it is part of the scores.
    pub router: &'a B::Weight,
    /// How scores choose experts and weigh them.
    pub routing: &'a Routing,
    /// Added to the scores for the choice only: [`WeightSource::Exact`] `[experts]`.
    pub choice_bias: Option<&'a B::Weight>,
    /// Gate and up of every expert: [`WeightSource::Experts`] `[gate | up, hidden]`, this rank's columns. All have
    /// biases, or none.
    pub gate_up: &'a B::Weight,
    /// Down of every expert: [`WeightSource::Experts`] `[hidden, this rank's columns]`, [`crate::KSum::Tree`]. Where all
    /// have biases, rank 0 alone has them: they are added once.
    pub down: &'a B::Weight,
    /// Gate and up, and down, of the expert that every row passes: [`crate::Linear`]s.
    pub shared: Option<(&'a B::Weight, &'a B::Weight)>,
    /// How gate and up become one.
    pub glu: Glu,
}

/// How a row's scores choose its experts and weigh them.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts of the model.
    pub experts: usize,
    /// Experts of a row.
    pub top_k: usize,
    /// From products to scores.
    pub score: Score,
    /// Groups of consecutive experts, and how many of them a row may use: those with the largest sums of their two
    /// best choices; other groups' choices count as minus infinity.
    pub groups: Option<(usize, usize)>,
    /// Whether the chosen weights are divided by their sum.
    pub normalise: bool,
    /// Added to that sum (DeepSeek: 1e-20).
    pub normalise_eps: f32,
    /// Factor on the weights.
    pub scale: f32,
}

/// From a router's products to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// A rotary embedding as a table of frequencies: every kind (plain, linear, llama3, yarn) comes down to this.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Inverse frequencies in radians per position; twice as many leading elements of a head are rotated.
    pub inv_freq: Arc<[f32]>,
    /// Factor on cos and sin (yarn's attention factor), usually 1.
    pub factor: f32,
    /// Which elements form a pair in the checkpoint's projections.
    pub style: RopeStyle,
}

/// Which elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(i, i + n)` for `n` frequencies: Hugging Face Llama and Qwen; the cache's canonical order.
    HalfSplit,
    /// `(2 i, 2 i + 1)`: the cache still holds half-split order.
    Interleaved,
}

/// What a step hands back.
pub enum Out<A> {
    /// Nothing but the cache writes.
    Nothing,
    /// Logits `[rows, vocabulary of this rank]`; ranks hold consecutive ranges, rank 0 receives the whole.
    Logits(A),
    /// Logits as above, and what becomes of each row: the device draws a token, or rank 0's host gets the logits.
    Draw(A, Vec<Draw>),
    /// An activation kept for [`Step::resume`].
    Hidden(A),
}

/// The result of a step.
pub enum Output<H> {
    /// Nothing was asked for (or this rank is not the one that receives logits).
    Nothing,
    /// Row-major `[rows, vocabulary]`.
    Logits(Vec<f32>),
    /// Of each row of [`Out::Draw`], on rank 0. The other ranks may get nothing: the ids are rank 0's.
    Drawn(Vec<Drawn>),
    /// A kept activation.
    Hidden(H),
}

/// A submitted step.
pub trait Pending<H> {
    /// Whether [`Pending::wait`] would return at once: always on devices that compute while operations are called. Then
    /// nothing is gained by beginning the next step first.
    fn ready(&self) -> bool;

    /// Blocks until the step is done; the first error of any of its operations comes out here.
    fn wait(self: Box<Self>) -> Result<Output<H>, BackendError>;
}

/// The KV cache of one rank: sequences with a capacity in tokens. The physical layout is private. Calls are made by
/// the owner thread, in the same order on every rank; leases go to other threads.
pub trait KvStore {
    /// Read lease.
    type Export: KvExport + 'static;
    /// Write lease.
    type Landing: KvLanding + 'static;

    /// This rank's share of the cache.
    fn spec(&self) -> &KvSpec;

    /// Tokens of a block: capacity is rounded up to it, prefixes are shared at multiples of it.
    fn block_tokens(&self) -> u32;

    /// Whether [`Fork::Share`] shares blocks; otherwise it copies and takes as many blocks again.
    fn shares(&self) -> bool {
        true
    }

    /// Blocks by state. Reclaims what dropped leases gave back.
    fn usage(&mut self) -> KvUsage;

    /// Adds an empty sequence with room for `tokens`.
    fn open(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError>;

    /// Makes room for `tokens` in all; never shrinks.
    fn grow(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError>;

    /// Adds sequence `to` whose first `tokens` (a multiple of [`KvStore::block_tokens`]) are those of `from`.
    fn fork(&mut self, from: SeqId, to: SeqId, tokens: u32, mode: Fork) -> Result<(), KvError>;

    /// Gives back capacity beyond `tokens`.
    fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError>;

    /// Removes the sequence. Its blocks are free at once, or quarantined until leases on them are dropped.
    fn close(&mut self, seq: SeqId) -> Result<(), KvError>;

    /// A read lease on computed or landed `tokens` of one layer.
    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<Self::Export, KvError>;

    /// Where the bytes of [`Step::export_there`] lie, so that a transport may be asked whether it reaches them; `None`: always on the
    /// host.
    fn stays(&self) -> Option<Place> {
        None
    }

    /// The sole write lease on `tokens`, all layers and planes; the sequence has room for them.
    fn land(&mut self, seq: SeqId, tokens: Range<u32>) -> Result<Self::Landing, KvError>;

    /// Takes a filled landing into its sequence.
    fn commit(&mut self, landing: Self::Landing) -> Result<(), KvError>;
}

/// How [`KvStore::fork`] takes over a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// Both read the same blocks (paged stores); a store that cannot share copies.
    Share,
    /// `from` is closed; its memory serves `to`.
    Move,
}

/// Blocks of a store by state; `total == free + used + quarantined` always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvUsage {
    /// All blocks.
    pub total: u32,
    /// Free for [`KvStore::open`] and [`KvStore::grow`].
    pub free: u32,
    /// Held by sequences (a shared block counts once).
    pub used: u32,
    /// Closed, but still under a lease.
    pub quarantined: u32,
}

impl<A: Debug> Debug for Out<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Out::Nothing => f.write_str("Nothing"),
            Out::Logits(act) => f.debug_tuple("Logits").field(act).finish(),
            Out::Draw(act, draws) => f.debug_tuple("Draw").field(act).field(draws).finish(),
            Out::Hidden(act) => f.debug_tuple("Hidden").field(act).finish(),
        }
    }
}
