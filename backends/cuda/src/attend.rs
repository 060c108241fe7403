//! Attention on the device: where rows lie in the cache, which kernel sees which rows, and the two kinds of attention.

use std::rc::Rc;

use backend::{Attend, BackendError, KvStore, Mla, NormSpan, QkNorm, Rope, RopeStyle};

use crate::act::CudaAct;
use crate::args::{
    AnglesArgs, AttendArgs, CombineArgs, ExpandArgs, Places, PrepareArgs, PrepareLatentArgs, SquaresArgs,
    Tile,
};
use crate::device::{Device, THREADS};
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::step::CudaStep;
use crate::weight::{CudaWeight, HeadShape, Kind, Matrix};

/// Threads of a block of the plain kernels: a warp a head.
const PLAIN_THREADS: u32 = 128;
/// Elements of a value that the plain kernel holds.
const PLAIN_VALUE_MAX: usize = 512;
/// Queries of a block of the `attend_few` kernels.
const FEW_QUERIES: usize = 16;
/// Positions that one block reads at least when keys are split.
const SPLIT_POSITIONS_MIN: usize = 256;

/// Rows of the batch on the device.
pub(crate) struct Rows<D: Driver> {
    positions: Buffer<D>,
    runs: Buffer<D>,
    tables: Buffer<D>,
    blocks_max: usize,
    angles: std::cell::RefCell<Vec<Angles<D>>>,
}

/// Cosines and sines of every row, `[rows, n]` f32 each.
struct Angles<D: Driver> {
    rope: Rope,
    cosines: Rc<Buffer<D>>,
    sines: Rc<Buffer<D>>,
}

/// A flash kernel for heads up to some size.
struct Flash {
    key_max: usize,
    value_max: usize,
    /// For prompts and for few queries.
    kernels: [&'static str; 2],
    /// Queries of a block of the first.
    queries: usize,
    /// Positions of a tile.
    keys: usize,
}

impl Flash {
    /// Queries, keys and values in padded rows of bf16.
    const fn shared_bytes(&self, queries: usize) -> usize {
        (queries * (self.key_max + 8) + self.keys * (self.key_max + self.value_max + 16)) * 2
    }
}

const FLASH: [Flash; 4] = [
    Flash { key_max: 64, value_max: 64, kernels: ["attend_64", "attend_few_64"], queries: 128, keys: 64 },
    Flash { key_max: 128, value_max: 128, kernels: ["attend_128", "attend_few_128"], queries: 128, keys: 64 },
    Flash { key_max: 192, value_max: 128, kernels: ["attend_192", "attend_few_192"], queries: 64, keys: 64 },
    Flash { key_max: 256, value_max: 256, kernels: ["attend_256", "attend_few_256"], queries: 64, keys: 32 },
];

fn refused<T>(reason: String) -> Result<T, BackendError> {
    Err(BackendError::Device(reason))
}

/// The greatest divisor of `count` that is at most `max`.
fn divisor(count: usize, max: usize) -> usize {
    (1..=count.min(max)).rev().find(|size| count.is_multiple_of(*size)).unwrap_or(1)
}

impl<D: Driver> CudaStep<'_, D> {
    fn places(&mut self) -> Result<Rc<Rows<D>>, BackendError> {
        if let Some(rows) = &self.rows {
            return Ok(rows.clone());
        }
        let (mut positions, mut runs) = (Vec::new(), Vec::new());
        let mut tables: Vec<&[u32]> = Vec::new();
        for (run, rows) in self.batch.runs.iter().enumerate() {
            positions.extend(rows.start..rows.start + rows.len);
            runs.extend(std::iter::repeat_n(run as u32, rows.len as usize));
            tables.push(self.kv.table(rows.seq)?);
        }
        let blocks_max = tables.iter().map(|table| table.len()).max().unwrap_or(0).max(1);
        let mut flat = vec![0; tables.len() * blocks_max];
        for (to, table) in flat.chunks_exact_mut(blocks_max).zip(&tables) {
            to[..table.len()].copy_from_slice(table);
        }
        let pool = &self.device.pool;
        let rows = Rows {
            positions: pool.send(&positions)?,
            runs: pool.send(&runs)?,
            tables: pool.send(&flat)?,
            blocks_max,
            angles: Default::default(),
        };
        Ok(self.rows.insert(Rc::new(rows)).clone())
    }

    fn device_places(&self, rows: &Rows<D>) -> Places {
        Places {
            positions: rows.positions.address,
            runs: rows.runs.address,
            tables: rows.tables.address,
            blocks_max: rows.blocks_max as u32,
            block_tokens: self.kv.block_tokens(),
        }
    }

    /// The angles of this step's rows; queued at the first layer that asks.
    fn angles(&self, rows: &Rows<D>, rope: &Rope) -> Result<(u64, u64), BackendError> {
        let mut known = rows.angles.borrow_mut();
        if let Some(angles) = known.iter().find(|angles| angles.rope == *rope) {
            return Ok((angles.cosines.address, angles.sines.address));
        }
        let (count, n) = (self.batch.rows(), rope.inv_freq.len());
        let pool = &self.device.pool;
        let words: Vec<u32> = rope.inv_freq.iter().map(|x| x.to_bits()).collect();
        let frequencies = pool.send(&words)?;
        let (cosines, sines) = (Rc::new(pool.take(count * n * 4)?), Rc::new(pool.take(count * n * 4)?));
        let args = AnglesArgs {
            positions: rows.positions.address,
            inv_freq: frequencies.address,
            cosines: cosines.address,
            sines: sines.address,
            rows: count as u32,
            n: n as u32,
            factor: rope.factor,
        };
        self.device.over_all("angles", count * n, &args)?;
        let addresses = (cosines.address, sines.address);
        known.push(Angles { rope: rope.clone(), cosines, sines });
        Ok(addresses)
    }

    fn enter(&mut self, layer: usize, window: Option<u32>) -> Result<(), BackendError> {
        if layer >= self.kv.spec().layers || window == Some(0) {
            return refused(format!("layer {layer} of {}, window {window:?}", self.kv.spec().layers));
        }
        for run in &self.batch.runs {
            let first = window.map_or(0, |window| (run.start + 1).saturating_sub(window));
            self.kv.enter(run.seq, layer, first, run.start..run.start + run.len)?;
        }
        Ok(())
    }

    pub(crate) fn attention(
        &mut self,
        layer: usize,
        qkv: &CudaAct<D>,
        attend: &Attend<'_, Device<D>>,
    ) -> Result<Buffer<D>, BackendError>
    where
        D: crate::device::Open,
    {
        let Attend { heads, kv_heads, head_dim: dim, scale, rope, window, .. } = *attend;
        if kv_heads == 0 || heads == 0 || heads % kv_heads != 0 {
            return refused(format!("{heads} query heads over {kv_heads} KV heads"));
        }
        if dim == 0 || dim % 2 != 0 || rope.inv_freq.len() * 2 > dim {
            return refused(format!("heads of {dim} with {} rotary pairs", rope.inv_freq.len()));
        }
        if (qkv.rows, qkv.width) != (self.batch.rows(), (heads + 2 * kv_heads) * dim) {
            return refused(format!(
                "qkv of {} x {} for {heads} + 2 * {kv_heads} heads of {dim}",
                qkv.rows, qkv.width
            ));
        }
        let planes = &self.kv.spec().planes;
        if planes.len() != 2 || planes.iter().any(|plane| plane.heads().len() != kv_heads || plane.dim != dim)
        {
            return refused(format!("a cache whose planes are not {kv_heads} heads of {dim}"));
        }
        self.enter(layer, window)?;
        let buffer = qkv.buffer(self.device)?;
        let rows = self.places()?;
        let (cosines, sines) = self.angles(&rows, rope)?;
        let mut args = PrepareArgs {
            places: self.device_places(&rows),
            qkv: buffer.address,
            cosines,
            sines,
            k_plane: self.kv.plane(layer, 0),
            v_plane: self.kv.plane(layer, 1),
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            dim: dim as u32,
            n: rope.inv_freq.len() as u32,
            interleaved: u32::from(rope.style == RopeStyle::Interleaved),
            ..PrepareArgs::default()
        };
        let squares = match &attend.qk_norm {
            Some(norm) => self.head_norms(&mut args, norm, qkv.rows)?,
            None => None,
        };
        let warps = THREADS as usize / 32;
        let kernel = self.device.of_type("prepare_f32", "prepare_bf16");
        self.device.launch(kernel, [qkv.rows as u32, 1, 1], THREADS, warps * 2 * dim * 4, &args)?;
        drop(squares);
        let out = self.device.elements(qkv.rows * heads * dim)?;
        let attended = AttendArgs {
            q: buffer.address,
            out: out.address,
            k: self.kv.plane(layer, 0),
            v: self.kv.plane(layer, 1),
            tables: rows.tables.address,
            q_row: qkv.width as u32,
            q_head: dim as u32,
            k_token: (kv_heads * dim) as u32,
            k_head: dim as u32,
            v_token: (kv_heads * dim) as u32,
            v_head: dim as u32,
            heads: heads as u32,
            group: (heads / kv_heads) as u32,
            key_dim: dim as u32,
            value_dim: dim as u32,
            blocks_max: rows.blocks_max as u32,
            block_tokens: self.kv.block_tokens(),
            window: window.unwrap_or(0),
            scale,
            ..AttendArgs::default()
        };
        self.attend_rows(&attended)?;
        Ok(out)
    }

    /// Fills in the norms of q and k; the square sums of a projection live as long as what is returned.
    fn head_norms(
        &self,
        args: &mut PrepareArgs,
        norm: &QkNorm<'_, Device<D>>,
        rows: usize,
    ) -> Result<Option<Buffer<D>>, BackendError>
    where
        D: crate::device::Open,
    {
        let (heads, kv_heads, dim) = (args.heads as usize, args.kv_heads as usize, args.dim as usize);
        args.eps = norm.eps;
        let NormSpan::Projection { heads_total, kv_heads_total, head_first, kv_head_first, kv_heads_own } =
            &norm.span
        else {
            args.q_norm = self.vector(norm.q, dim, "a head norm's scale")?;
            args.k_norm = self.vector(norm.k, dim, "a head norm's scale")?;
            return Ok(None);
        };
        args.q_norm = self.vector(norm.q, heads * dim, "the scale of q's norm")?;
        args.k_norm = self.vector(norm.k, kv_heads * dim, "the scale of k's norm")?;
        if head_first + heads > *heads_total || kv_head_first + kv_heads > *kv_heads_total {
            return refused(format!(
                "heads {head_first} and {kv_head_first} on of {heads_total} and {kv_heads_total}"
            ));
        }
        let squares = self.device.pool.take(rows * (heads_total + kv_heads_total) * 4)?;
        let of_heads = SquaresArgs {
            qkv: args.qkv,
            squares: squares.address,
            heads: args.heads,
            kv_heads: args.kv_heads,
            dim: args.dim,
            heads_total: *heads_total as u32,
            kv_heads_total: *kv_heads_total as u32,
            head_first: *head_first as u32,
            kv_head_first: *kv_head_first as u32,
            kv_own_from: kv_heads_own.start as u32,
            kv_own_to: kv_heads_own.end as u32,
        };
        self.device.each(self.device.of_type("squares_f32", "squares_bf16"), rows, &of_heads)?;
        args.squares = squares.address;
        args.projection = 1;
        (args.heads_total, args.kv_heads_total) = (*heads_total as u32, *kv_heads_total as u32);
        Ok(Some(squares))
    }

    /// Attention of every row of the batch. `args`: all but tiles, packing and splits.
    fn attend_rows(&self, args: &AttendArgs) -> Result<(), BackendError> {
        let (key_dim, value_dim) = (args.key_dim as usize, args.value_dim as usize);
        let fits = |flash: &&Flash| key_dim <= flash.key_max && value_dim <= flash.value_max;
        let aligned =
            key_dim.is_multiple_of(8) && value_dim.is_multiple_of(8) && args.q_row.is_multiple_of(8);
        match FLASH.iter().find(fits).filter(|_| self.device.bf16() && aligned) {
            Some(flash) => self.attend_flash(args, flash),
            None => self.attend_plain(args),
        }
    }

    fn attend_plain(&self, args: &AttendArgs) -> Result<(), BackendError> {
        if args.value_dim as usize > PLAIN_VALUE_MAX {
            return refused(format!("values of {}: at most {PLAIN_VALUE_MAX}", args.value_dim));
        }
        let tiles = self.tiles(|_| true, 1);
        let sent = self.device.pool.send(&words(&tiles))?;
        let args = AttendArgs { tiles: sent.address, pack: 1, splits: 1, ..*args };
        let shared = PLAIN_THREADS as usize / 32 * args.key_dim as usize * 4;
        let kernel = self.device.of_type("attend_plain_f32", "attend_plain_bf16");
        self.device.launch(kernel, [tiles.len() as u32, 1, 1], PLAIN_THREADS, shared, &args)
    }

    /// Sequences with few queries are split along their keys; the others go in blocks of rows.
    fn attend_flash(&self, args: &AttendArgs, flash: &Flash) -> Result<(), BackendError> {
        let group = args.group as usize;
        for (few, queries) in [(false, flash.queries), (true, FEW_QUERIES)] {
            let pack = divisor(group, queries);
            let is_few = |rows: usize| rows * divisor(group, FEW_QUERIES) <= FEW_QUERIES;
            let tiles = self.tiles(|rows| is_few(rows) == few, queries / pack);
            if tiles.is_empty() {
                continue;
            }
            let sent = self.device.pool.send(&words(&tiles))?;
            let groups = args.heads / pack as u32;
            let positions = tiles.iter().map(|tile| (tile.position + tile.rows) as usize).max().unwrap_or(1);
            let blocks = tiles.len() * groups as usize;
            let splits = if few {
                let wanted = (self.device.driver().blocks_busy() as usize).div_ceil(blocks);
                wanted.clamp(1, positions.div_ceil(SPLIT_POSITIONS_MIN))
            } else {
                1
            };
            let sums = blocks * splits * queries * (args.value_dim as usize + 2);
            let partial = (splits > 1).then(|| self.device.pool.take(sums * 4)).transpose()?;
            let args = AttendArgs {
                tiles: sent.address,
                partial: partial.as_ref().map_or(0, |partial| partial.address),
                pack: pack as u32,
                splits: splits as u32,
                ..*args
            };
            let threads = if few { 32 } else { 128 };
            let grid = [tiles.len() as u32, groups, splits as u32];
            self.device.launch(
                flash.kernels[usize::from(few)],
                grid,
                threads,
                flash.shared_bytes(queries),
                &args,
            )?;
            if let Some(partial) = &partial {
                let combine = CombineArgs {
                    partial: partial.address,
                    tiles: sent.address,
                    out: args.out,
                    heads: args.heads,
                    pack: args.pack,
                    value_dim: args.value_dim,
                    splits: args.splits,
                    queries_max: queries as u32,
                    scale: args.scale,
                };
                self.device.launch("combine", [tiles.len() as u32, groups, 1], THREADS, 0, &combine)?;
            }
        }
        Ok(())
    }

    /// Blocks of at most `rows_max` rows of the runs that `take` wants by their length. Later rows see more: they go first.
    fn tiles(&self, take: impl Fn(usize) -> bool, rows_max: usize) -> Vec<Tile> {
        let mut tiles = Vec::new();
        let mut row = 0;
        for (run, rows) in self.batch.runs.iter().enumerate() {
            if take(rows.len as usize) {
                for first in (0..rows.len).step_by(rows_max) {
                    tiles.push(Tile {
                        run: run as u32,
                        row: row + first,
                        rows: (rows.len - first).min(rows_max as u32),
                        position: rows.start + first,
                    });
                }
            }
            row += rows.len;
        }
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile.position));
        tiles
    }

    pub(crate) fn latent_attention(
        &mut self,
        layer: usize,
        q: &CudaAct<D>,
        kv: &CudaAct<D>,
        mla: &Mla<'_, Device<D>>,
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
        if !keys.0.turned || values.0.turned {
            return refused("heads whose matrices are not [nope, latent] and [value, latent]".to_owned());
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
        self.device.launch(
            kernel,
            [count as u32, 1, 1],
            THREADS,
            THREADS as usize / 32 * rope_dim * 4,
            &prepare,
        )?;

        // Latents and rope keys of all sequences' contexts, side by side.
        let mut firsts = Vec::new();
        let mut total = 0;
        for run in &self.batch.runs {
            firsts.push(total);
            total += run.start + run.len;
        }
        let tokens = total as usize;
        let item = self.device.dtype.bytes();
        let latents = self.device.elements(tokens * latent_dim)?;
        let ropes = self.device.elements(tokens * rope_dim)?;
        for ((index, run), first) in self.batch.runs.iter().enumerate().zip(&firsts) {
            let table = rows.tables.address + (index * rows.blocks_max * 4) as u64;
            for (plane, dense, dim) in [(0, &latents, latent_dim), (1, &ropes, rope_dim)] {
                let to = dense.address + (*first as usize * dim * item) as u64;
                self.kv.move_rows(layer, plane, table, 0..run.start + run.len, to, true)?;
            }
        }
        let nopes = self.device.elements(tokens * heads * nope)?;
        self.device.product(keys.1, latents.address, tokens, nopes.address, false)?;
        let v = self.device.elements(tokens * heads * value_dim)?;
        self.device.product(values.1, latents.address, tokens, v.address, false)?;
        let k = self.device.elements(tokens * heads * (nope + rope_dim))?;
        let expand = ExpandArgs {
            nope: nopes.address,
            rope: ropes.address,
            out: k.address,
            heads: heads as u32,
            nope_dim: nope as u32,
            rope_dim: rope_dim as u32,
        };
        self.device.each(self.device.of_type("expand_keys_f32", "expand_keys_bf16"), tokens, &expand)?;
        let out = self.device.elements(count * heads * value_dim)?;
        let sent = self.device.pool.send(&firsts)?;
        let key = nope + rope_dim;
        let attended = AttendArgs {
            q: q.address,
            out: out.address,
            k: k.address,
            v: v.address,
            firsts: sent.address,
            q_row: (heads * key) as u32,
            q_head: key as u32,
            k_token: (heads * key) as u32,
            k_head: key as u32,
            v_token: (heads * value_dim) as u32,
            v_head: value_dim as u32,
            heads: heads as u32,
            group: 1,
            key_dim: key as u32,
            value_dim: value_dim as u32,
            scale,
            ..AttendArgs::default()
        };
        self.attend_rows(&attended)?;
        Ok(out)
    }
}

/// The product of a weight of heads with these sizes.
fn heads_of<D: Driver>(
    weight: &CudaWeight<D>,
    heads: usize,
    outputs: usize,
    inputs: usize,
) -> Result<(HeadShape, &Matrix<D>), BackendError> {
    match &*weight.0 {
        Kind::Heads(shapes, matrix)
            if shapes.len() == heads && (shapes[0].outputs, shapes[0].inputs) == (outputs, inputs) =>
        {
            Ok((shapes[0], matrix))
        }
        _ => refused(format!("this weight is no product of {heads} heads, {inputs} -> {outputs}")),
    }
}

fn words(tiles: &[Tile]) -> Vec<u32> {
    tiles.iter().flat_map(|tile| [tile.run, tile.row, tile.rows, tile.position]).collect()
}
