//! Multi-head latent attention: the cache holds latents and rope keys. Short runs (generation) attend in the latents' space,
//! which reads the cache as it lies; for long ones keys and values of their context are made, some heads at a time.

use backend::{BackendError, KvStore, Mla, RopeStyle};

use crate::act::CudaAct;
use crate::args::{AbsorbArgs, AttendArgs, CombineArgs, ExpandArgs, LatentArgs, PrepareLatentArgs};
use crate::attend::{Rows, TileKey, refused};
use crate::device::THREADS;
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::step::{CudaStep, RUN_ROWS_MAX};
use crate::weight::{CudaWeight, Data, HeadShape, Kind};

/// What `kernels/latent.cu` holds.
const LATENT_MAX: usize = 512;
const ROPE_MAX: usize = 64;
const NOPE_MAX: usize = 256;
/// Rows of one read of a head's matrix, outputs of a block, positions of a tile.
const GROUP_ROWS: usize = 8;
const GROUP_OUTPUTS: usize = 512;
const TILE_POSITIONS: usize = 32;
/// Positions that one block reads at least when they are split.
const SPLIT_POSITIONS_MIN: usize = 128;
/// Keys and values of so many bytes are made at a time.
const EXPANDED_BYTES_MAX: usize = 1 << 30;

/// Bytes of shared memory of `attend_latent` with so many heads a block.
const fn shared_bytes(heads: usize) -> usize {
    let row = LATENT_MAX + ROPE_MAX + 8;
    let elements = heads * row + 2 * TILE_POSITIONS * row + heads * (TILE_POSITIONS + 8);
    elements * 2 + (2 * heads * (TILE_POSITIONS + 4) + 3 * heads) * 4
}

/// Runs of up to so many rows are absorbed: beyond, making keys and values once costs less. Counted in products per key, `rows`
/// times `2 latent` against `rows` times `nope + value` and one expansion; those of absorbed rows count twice, for each reads the latents
/// again.
fn absorbed_rows_max(nope: usize, value: usize, latent: usize) -> usize {
    let more = (2 * latent).saturating_sub(nope + value).max(1);
    latent * (nope + value) / (2 * more)
}

/// What both ways need.
struct Latent<'a, D: Driver> {
    layer: usize,
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    latent: usize,
    scale: f32,
    q: &'a Buffer<D>,
    /// `[heads, nope, latent]` and `[heads, value, latent]` in the step's dtype.
    keys: u64,
    values: u64,
    rows: &'a Rows<D>,
    out: &'a Buffer<D>,
}

impl<D: Driver> CudaStep<'_, D> {
    pub(crate) fn latent_attention(
        &mut self,
        layer: usize,
        q: &CudaAct<D>,
        kv: &CudaAct<D>,
        mla: &Mla<'_, crate::device::Device<D>>,
    ) -> Result<Buffer<D>, BackendError>
    where
        D: crate::device::Open,
    {
        let Mla { heads, nope_dim: nope, rope_dim, value_dim, latent_dim, scale, rope, norm_eps, .. } = *mla;
        let count = self.batch.rows();
        let planes: Vec<usize> = self.kv.spec().planes.iter().map(|plane| plane.dim).collect();
        if heads == 0 || rope.inv_freq.len() * 2 != rope_dim || planes != [latent_dim, rope_dim] {
            return refused(format!(
                "{heads} heads over a cache of {planes:?} for {latent_dim} + {rope_dim}"
            ));
        }
        if (q.rows, q.width, kv.rows, kv.width)
            != (count, heads * (nope + rope_dim), count, latent_dim + rope_dim)
        {
            return refused(format!("q of {} x {}, kv of {} x {}", q.rows, q.width, kv.rows, kv.width));
        }
        let keys = heads_of(mla.q_to_latent, heads, latent_dim, nope)?;
        let values = heads_of(mla.latent_to_value, heads, value_dim, latent_dim)?;
        if !keys.0.to_latent || values.0.to_latent {
            return refused("the two products of a latent in each other's place".to_owned());
        }
        let norm = self.vector(mla.latent_norm, latent_dim, "the latent norm's scale")?;
        self.enter(layer, None)?;
        let (q, kv) = (q.buffer(self.device)?, kv.buffer(self.device)?);
        let rows = self.places()?;
        let (cosines, sines) = self.angles(&rows, rope)?;
        let prepare = PrepareLatentArgs {
            places: self.device_places(&rows),
            q: q.address,
            kv: kv.address,
            norm,
            cosines,
            sines,
            latent_plane: self.kv.plane(layer, 0),
            rope_plane: self.kv.plane(layer, 1),
            heads: heads as u32,
            nope: nope as u32,
            rope: rope_dim as u32,
            latent: latent_dim as u32,
            interleaved: u32::from(rope.style == RopeStyle::Interleaved),
            eps: norm_eps,
        };
        let kernel = self.device.of_type("prepare_latent_f32", "prepare_latent_bf16");
        let shared = THREADS as usize / 32 * rope_dim * 4;
        self.device.launch(kernel, [count as u32, 1, 1], THREADS, shared, &prepare)?;
        let out = self.device.elements(count * heads * value_dim)?;
        let latent = Latent {
            layer,
            heads,
            nope,
            rope: rope_dim,
            value: value_dim,
            latent: latent_dim,
            scale,
            q: &q,
            keys: keys.1,
            values: values.1,
            rows: &rows,
            out: &out,
        };
        let absorbs = self.device.bf16()
            && latent_dim <= LATENT_MAX
            && rope_dim <= ROPE_MAX
            && nope <= NOPE_MAX
            && [nope, rope_dim, latent_dim].iter().all(|dim| dim.is_multiple_of(8));
        let above = match absorbs {
            // All of its rows, and so a tile for each.
            true if self.generates => RUN_ROWS_MAX as usize,
            true => absorbed_rows_max(nope, value_dim, latent_dim),
            false => 0,
        };
        if absorbs {
            self.absorbed(&latent, above)?;
        }
        self.expanded(&latent, above)?;
        Ok(out)
    }

    /// Attention of runs of up to `above` rows over the latents as they lie.
    fn absorbed(&self, of: &Latent<'_, D>, above: usize) -> Result<(), BackendError> {
        let tiles = self.tiles(TileKey { rows_max: 1, from: 1, to: above })?;
        if tiles.count == 0 {
            return Ok(());
        }
        let device = &*self.device;
        let Latent { heads, nope, rope, value, latent, .. } = *of;
        let rows = device.pool.send(&tiles.rows)?;
        let q_latent = device.elements(tiles.count * heads * latent)?;
        let groups = tiles.count.div_ceil(GROUP_ROWS);
        let keys = AbsorbArgs {
            x: of.q.address,
            w: of.keys,
            rows: rows.address,
            out: q_latent.address,
            count: tiles.count as u32,
            heads: heads as u32,
            inputs: nope as u32,
            outputs: latent as u32,
            x_head: (nope + rope) as u32,
            x_offset: 0,
            x_row: (heads * (nope + rope)) as u32,
        };
        let grid = [groups as u32, heads as u32, latent.div_ceil(GROUP_OUTPUTS) as u32];
        device.launch("absorb_keys", grid, THREADS, 0, &keys)?;

        // More heads a block read the cache less often, where shared memory is large.
        let many = heads > 16 && device.driver().shared_bytes_max() >= shared_bytes(32);
        let (kernel, pack) = if many { ("attend_latent_32", 32) } else { ("attend_latent_16", 16) };
        let packs = heads.div_ceil(pack);
        let splits = self.splits(tiles.count * packs, tiles.positions, SPLIT_POSITIONS_MIN);
        let sums = device.elements(tiles.count * heads * latent)?;
        let places = tiles.count * packs * splits * pack * (latent + 2);
        let partial = (splits > 1).then(|| device.pool.take(places * 4)).transpose()?;
        let attend = LatentArgs {
            q_latent: q_latent.address,
            q: of.q.address,
            latents: self.kv.plane(of.layer, 0),
            ropes: self.kv.plane(of.layer, 1),
            tables: of.rows.tables.address,
            tiles: tiles.sent.address,
            out: sums.address,
            partial: partial.as_ref().map_or(0, |partial| partial.address),
            heads: heads as u32,
            latent: latent as u32,
            rope: rope as u32,
            q_row: (heads * (nope + rope)) as u32,
            q_head: (nope + rope) as u32,
            q_offset: nope as u32,
            blocks_max: of.rows.blocks_max as u32,
            block_shift: self.kv.block_tokens().trailing_zeros(),
            splits: splits as u32,
            scale: of.scale,
        };
        let grid = [tiles.count as u32, packs as u32, splits as u32];
        device.launch(kernel, grid, THREADS, shared_bytes(pack), &attend)?;
        if let Some(partial) = &partial {
            let combine = CombineArgs {
                partial: partial.address,
                tiles: tiles.sent.address,
                out: sums.address,
                sinks: 0,
                heads: heads as u32,
                pack: pack as u32,
                value_dim: latent as u32,
                splits: splits as u32,
                queries_max: pack as u32,
                compact: 1,
                scale: of.scale,
            };
            device.launch("combine", [tiles.count as u32, packs as u32, 1], THREADS, 0, &combine)?;
        }
        let values = AbsorbArgs {
            x: sums.address,
            w: of.values,
            rows: rows.address,
            out: of.out.address,
            count: tiles.count as u32,
            heads: heads as u32,
            inputs: latent as u32,
            outputs: value as u32,
            ..AbsorbArgs::default()
        };
        device.launch("absorb_values", [groups as u32, heads as u32, 1], THREADS, 0, &values)
    }

    /// Attention of runs longer than `above`, over keys and values made from the latents of their contexts.
    fn expanded(&self, of: &Latent<'_, D>, above: usize) -> Result<(), BackendError> {
        let device = &*self.device;
        let Latent { layer, heads, nope, rope, value, latent, .. } = *of;
        // Latents and rope keys of the contexts, side by side; runs that are not taken have none.
        let mut firsts = Vec::new();
        let mut total = 0;
        for run in &self.batch.runs {
            firsts.push(total);
            if run.len as usize > above {
                total += run.start + run.len;
            }
        }
        let tokens = total as usize;
        if tokens == 0 {
            return Ok(());
        }
        let item = device.dtype.bytes();
        let latents = device.elements(tokens * latent)?;
        let ropes = device.elements(tokens * rope)?;
        for ((index, run), first) in self.batch.runs.iter().enumerate().zip(&firsts) {
            if run.len as usize <= above {
                continue;
            }
            let table = of.rows.tables.address + (index * of.rows.blocks_max * 4) as u64;
            for (plane, dense, dim) in [(0, &latents, latent), (1, &ropes, rope)] {
                let to = dense.address + (*first as usize * dim * item) as u64;
                self.kv.move_rows(layer, plane, table, 0..run.start + run.len, to, true)?;
            }
        }
        let sent = device.pool.send(&firsts)?;
        let key = nope + rope;
        // The plain kernel takes all heads at once; it is for tests and odd sizes.
        let some = EXPANDED_BYTES_MAX / (tokens * (nope + key + value) * item);
        let each = if self.flash(key, value, heads * key).is_some() { some.clamp(1, heads) } else { heads };
        for head in (0..heads).step_by(each) {
            let now = each.min(heads - head);
            let matrix = |address: u64, rows: usize| address + (head * rows * latent * item) as u64;
            let nopes = device.elements(tokens * now * nope)?;
            device.plain_product(
                matrix(of.keys, nope),
                now * nope,
                latent,
                latents.address,
                tokens,
                nopes.address,
            )?;
            let v = device.elements(tokens * now * value)?;
            device.plain_product(
                matrix(of.values, value),
                now * value,
                latent,
                latents.address,
                tokens,
                v.address,
            )?;
            let k = device.elements(tokens * now * key)?;
            let expand = ExpandArgs {
                nope: nopes.address,
                rope: ropes.address,
                out: k.address,
                heads: now as u32,
                nope_dim: nope as u32,
                rope_dim: rope as u32,
            };
            device.each(device.of_type("expand_keys_f32", "expand_keys_bf16"), tokens, &expand)?;
            let attended = AttendArgs {
                q: of.q.address + (head * key * item) as u64,
                out: of.out.address + (head * value * item) as u64,
                k: k.address,
                v: v.address,
                firsts: sent.address,
                q_row: (heads * key) as u32,
                q_head: key as u32,
                k_token: (now * key) as u32,
                k_head: key as u32,
                v_token: (now * value) as u32,
                v_head: value as u32,
                heads: heads as u32,
                group: 1,
                key_dim: key as u32,
                value_dim: value as u32,
                scale: of.scale,
                ..AttendArgs::default()
            };
            self.attend_rows(&attended, above, now)?;
        }
        Ok(())
    }
}

/// Shape of one head, and the address of all heads' numbers.
fn heads_of<D: Driver>(
    weight: &CudaWeight<D>,
    heads: usize,
    outputs: usize,
    inputs: usize,
) -> Result<(HeadShape, u64), BackendError> {
    if let Kind::Heads(shapes, matrix) = &*weight.0
        && shapes.len() == heads
        && (shapes[0].outputs, shapes[0].inputs) == (outputs, inputs)
        && let [part] = &matrix.parts[..]
        && let Data::Plain(memory) = &part.data
    {
        return Ok((shapes[0], memory.address));
    }
    refused(format!("this weight is no product of {heads} heads, {inputs} -> {outputs}"))
}

const _: () = assert!(shared_bytes(16) <= 99 * 1024, "every supported GPU has so much");
