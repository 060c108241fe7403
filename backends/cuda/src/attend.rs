//! Attention on the device: where rows lie in the cache, which kernel sees which rows, and attention with heads of keys and
//! values; that over latents is in [`crate::latent`].

mod flash;
#[cfg(all(test, feature = "emulator"))]
mod given_up;

use std::rc::Rc;

use backend::{Attend, BackendError, KvStore, NormSpan, QkNorm, Rope, RopeStyle};

use crate::act::CudaAct;
use crate::args::{AnglesArgs, AttendArgs, CombineArgs, Places, PrepareArgs, SquaresArgs, Tile};
use crate::device::{Device, THREADS};
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::nccl::Element;
use crate::step::{CudaStep, RUN_ROWS_MAX};
use crate::weight::Kind;

pub(crate) use flash::{FEW_QUERIES, FLASH, Flash, Kernel};

/// Threads of a block of the plain kernels: a warp a head.
const PLAIN_THREADS: u32 = 128;
/// Elements of a value that the plain kernel holds.
const PLAIN_VALUE_MAX: usize = 512;
/// Positions that one block reads at least when keys are split.
pub(crate) const SPLIT_POSITIONS_MIN: usize = 256;

/// Rows of the batch on the device.
pub(crate) struct Rows<D: Driver> {
    positions: Buffer<D>,
    runs: Buffer<D>,
    pub(crate) tables: Buffer<D>,
    pub(crate) blocks_max: usize,
    angles: std::cell::RefCell<Vec<Angles<D>>>,
    tiles: std::cell::RefCell<Vec<(TileKey, Rc<Tiles<D>>)>>,
}

/// Which rows are tiled, and how: the same for all layers of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TileKey {
    pub(crate) rows_max: usize,
    /// Lengths of runs that are taken.
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// Blocks of rows on the device.
pub(crate) struct Tiles<D: Driver> {
    pub(crate) sent: Buffer<D>,
    pub(crate) count: usize,
    /// Positions that the longest sees, or more.
    pub(crate) positions: usize,
    /// Row of the batch of every tile.
    pub(crate) rows: Vec<u32>,
}

/// Cosines and sines of every row, `[rows, n]` f32 each.
struct Angles<D: Driver> {
    rope: Rope,
    cosines: Rc<Buffer<D>>,
    sines: Rc<Buffer<D>>,
}

pub(crate) fn refused<T>(reason: String) -> Result<T, BackendError> {
    Err(BackendError::Device(reason))
}

/// So many or more: of steps that generate most are alike then, while their sequences grow.
fn rounded(count: usize) -> usize {
    count.next_power_of_two().max(8)
}

/// The greatest divisor of `count` that is at most `max`.
fn divisor(count: usize, max: usize) -> usize {
    (1..=count.min(max)).rev().find(|size| count.is_multiple_of(*size)).unwrap_or(1)
}

impl<D: Driver> CudaStep<'_, D> {
    pub(crate) fn places(&mut self) -> Result<Rc<Rows<D>>, BackendError> {
        if let Some(rows) = &self.rows {
            return Ok(rows.clone());
        }
        let (mut positions, mut runs) = (Vec::new(), Vec::new());
        let mut tables: Vec<&[u32]> = Vec::new();
        for (run, rows) in self.batch.runs.iter().enumerate() {
            positions.extend(rows.start..rows.start + rows.len);
            runs.extend(std::iter::repeat_n(run as u32, rows.len as usize));
            tables.push(if run < self.asked_runs { self.kv.table(rows.seq)? } else { self.kv.spare() });
        }
        let blocks_max = tables.iter().map(|table| table.len()).max().unwrap_or(0).max(1);
        // As many tables as rows, so that steps are alike whose rows are of other sequences.
        let (blocks_max, lines) = match self.generates {
            true => (rounded(blocks_max), self.batch.rows()),
            false => (blocks_max, tables.len()),
        };
        let mut flat = vec![0; lines * blocks_max];
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
            tiles: Default::default(),
        };
        Ok(self.rows.insert(Rc::new(rows)).clone())
    }

    pub(crate) fn device_places(&self, rows: &Rows<D>) -> Places {
        Places {
            positions: rows.positions.address,
            runs: rows.runs.address,
            tables: rows.tables.address,
            blocks_max: rows.blocks_max as u32,
            block_shift: self.kv.block_tokens().trailing_zeros(),
        }
    }

    /// The angles of this step's rows; queued at the first layer that asks.
    pub(crate) fn angles(&self, rows: &Rows<D>, rope: &Rope) -> Result<(u64, u64), BackendError> {
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

    pub(crate) fn enter(&mut self, layer: usize, window: Option<u32>) -> Result<(), BackendError> {
        if layer >= self.kv.spec().layers || window == Some(0) {
            return refused(format!("layer {layer} of {}, window {window:?}", self.kv.spec().layers));
        }
        for run in self.batch.runs.iter().take(self.asked_runs) {
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
        let sinks = match attend.sinks.map(|sinks| &*sinks.0) {
            None => 0,
            Some(Kind::Exact(memory, len)) if *len == heads => memory.address,
            Some(_) => return refused(format!("sinks that are not of {heads} heads")),
        };
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
            sinks,
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
            block_shift: self.kv.block_tokens().trailing_zeros(),
            window: window.unwrap_or(0),
            scale,
            ..AttendArgs::default()
        };
        self.attend_rows(&attended, 0, heads)?;
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
        if let Some(ranks) = &self.device.ranks {
            let places = rows * (heads_total + kv_heads_total);
            ranks.sum(self.device, squares.address, places, Element::F32)?;
        }
        args.squares = squares.address;
        args.projection = 1;
        (args.heads_total, args.kv_heads_total) = (*heads_total as u32, *kv_heads_total as u32);
        Ok(Some(squares))
    }

    /// Attention of the rows of runs longer than `above`. `args`: all but tiles, packing and splits; addresses are of the
    /// first of `heads` heads.
    pub(crate) fn attend_rows(
        &self,
        args: &AttendArgs,
        above: usize,
        heads: usize,
    ) -> Result<(), BackendError> {
        match self.flash(args.key_dim as usize, args.value_dim as usize, args.q_row as usize) {
            Some(flash) => self.attend_flash(args, flash, above, heads),
            None => self.attend_plain(args, above),
        }
    }

    /// The kernel on tensor cores for these sizes, if there is one.
    pub(crate) fn flash(&self, key_dim: usize, value_dim: usize, q_row: usize) -> Option<&'static Flash> {
        let fits = |flash: &&Flash| key_dim <= flash.key_max && value_dim <= flash.value_max;
        let aligned = [key_dim, value_dim, q_row].iter().all(|size| size.is_multiple_of(8));
        FLASH.iter().find(fits).filter(|_| self.device.bf16() && aligned)
    }

    fn attend_plain(&self, args: &AttendArgs, above: usize) -> Result<(), BackendError> {
        if args.value_dim as usize > PLAIN_VALUE_MAX {
            return refused(format!("values of {}: at most {PLAIN_VALUE_MAX}", args.value_dim));
        }
        let tiles = self.tiles(TileKey { rows_max: 1, from: above + 1, to: usize::MAX })?;
        let args = AttendArgs { tiles: tiles.sent.address, pack: 1, splits: 1, ..*args };
        let shared = PLAIN_THREADS as usize / 32 * args.key_dim as usize * 4;
        let kernel = self.device.of_type("attend_plain_f32", "attend_plain_bf16");
        self.device.launch(kernel, [tiles.count as u32, 1, 1], PLAIN_THREADS, shared, &args)
    }

    /// Sequences with few queries are split along their keys; the others go in blocks of rows.
    fn attend_flash(
        &self,
        args: &AttendArgs,
        flash: &Flash,
        above: usize,
        heads: usize,
    ) -> Result<(), BackendError> {
        let group = args.group as usize;
        // Runs of up to so many rows fit a block of few queries; those of a step that generates go in several.
        let few_rows = match self.generates {
            true => RUN_ROWS_MAX as usize,
            false => FEW_QUERIES / divisor(group, FEW_QUERIES),
        };
        for (few, kernel) in [(false, flash.for_prompts(self.device)), (true, flash.few)] {
            let queries = kernel.queries;
            let pack = divisor(group, queries);
            let (from, to) = if few { (above + 1, few_rows) } else { (few_rows.max(above) + 1, usize::MAX) };
            let tiles = self.tiles(TileKey { rows_max: queries / pack, from, to })?;
            if tiles.count == 0 {
                continue;
            }
            let groups = heads / pack;
            // All that rows of a tile see.
            let positions = match args.window as usize {
                0 => tiles.positions,
                window => tiles.positions.min(window + queries / pack),
            };
            let splits =
                if few { self.splits(tiles.count * groups, positions, SPLIT_POSITIONS_MIN) } else { 1 };
            let sums = tiles.count * groups * splits * queries * (args.value_dim as usize + 2);
            let partial = (splits > 1).then(|| self.device.pool.take(sums * 4)).transpose()?;
            let args = AttendArgs {
                tiles: tiles.sent.address,
                partial: partial.as_ref().map_or(0, |partial| partial.address),
                pack: pack as u32,
                splits: splits as u32,
                ..*args
            };
            flash.launch(self.device, kernel, [tiles.count, groups, splits], &args)?;
            if let Some(partial) = &partial {
                let combine = CombineArgs {
                    partial: partial.address,
                    tiles: tiles.sent.address,
                    out: args.out,
                    sinks: args.sinks,
                    heads: args.heads,
                    pack: args.pack,
                    value_dim: args.value_dim,
                    splits: args.splits,
                    queries_max: queries as u32,
                    compact: 0,
                    scale: args.scale,
                };
                self.device.launch(
                    "combine",
                    [tiles.count as u32, groups as u32, 1],
                    THREADS,
                    0,
                    &combine,
                )?;
            }
        }
        Ok(())
    }

    /// Pieces of the positions, so that `blocks` of each keep the device busy; none has fewer than `least` positions.
    pub(crate) fn splits(&self, blocks: usize, positions: usize, least: usize) -> usize {
        let wanted = (self.device.driver().blocks_busy() as usize).div_ceil(blocks.max(1));
        wanted.clamp(1, positions.div_ceil(least).max(1))
    }

    /// Blocks of at most so many rows of the runs whose lengths are asked for; sent when first asked for. Later rows see
    /// more: they go first.
    pub(crate) fn tiles(&self, key: TileKey) -> Result<Rc<Tiles<D>>, BackendError> {
        let Some(all) = &self.rows else {
            return refused("tiles before places".to_owned());
        };
        let mut known = all.tiles.borrow_mut();
        if let Some((_, tiles)) = known.iter().find(|(of, _)| *of == key) {
            return Ok(tiles.clone());
        }
        let mut tiles: Vec<Tile> = Vec::new();
        let mut row = 0;
        for (run, rows) in self.batch.runs.iter().enumerate() {
            if (key.from..=key.to).contains(&(rows.len as usize)) {
                for first in (0..rows.len).step_by(key.rows_max) {
                    tiles.push(Tile {
                        run: run as u32,
                        row: row + first,
                        rows: (rows.len - first).min(key.rows_max as u32),
                        position: rows.start + first,
                    });
                }
            }
            row += rows.len;
        }
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile.position));
        if self.generates && !tiles.is_empty() {
            // Rounded, so that steps are alike: tiles without rows, whose blocks end at once.
            tiles.resize(tiles.len().next_power_of_two().min(self.batch.rows()), Tile::default());
        }
        let words: Vec<u32> =
            tiles.iter().flat_map(|tile| [tile.run, tile.row, tile.rows, tile.position]).collect();
        let positions = tiles.iter().map(|tile| (tile.position + tile.rows) as usize).max().unwrap_or(1);
        let sent = Rc::new(Tiles {
            sent: self.device.pool.send(&words)?,
            count: tiles.len(),
            positions: if self.generates { rounded(positions) } else { positions },
            rows: tiles.iter().map(|tile| tile.row).collect(),
        });
        known.push((key, sent.clone()));
        Ok(sent)
    }
}
