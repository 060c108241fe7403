//! A mixture of experts: rows are brought together by expert, so that a step reads each expert's weights once. Called
//! by `step`. All threads take part in every product, however few the rows.
//!
//! Each of the ranges of K is added up over the experts in ascending order, the shared one last, before the ranges are
//! joined: so a row's bits depend neither on the other rows nor on how ranks share the columns.

use std::ops::Range;

use backend::{Glu, Moe};

use crate::act::{CpuAct, Raw};
use crate::coded::DECODED_FLOATS;
use crate::device::CpuBackend;
use crate::kernel::{Scaled, Stretch};
use crate::lanes::LANES;
use crate::operand::Operand;
use crate::packed::{Kind, Packed};
use crate::product::{Product, ROWS_STREAMING, TASKS_PER_THREAD, Tile, Tiles, Tree};
use crate::route::{self, Choice};
use crate::step::CpuStep;

/// Rows up to which all ranges of K have sums of their own: experts then have few rows each, whose weights are read from end to
/// end.
const ROWS_TOGETHER: usize = 64;
/// Floats that the sums of one task take at most while experts are added to them, but for the narrowest tile: they stay in the
/// second cache. Wide tiles are few, and each reads all inputs.
const SUMS_FLOATS: usize = 64 * 1024;

/// Who computes what in one mixture; kept between steps for its memory.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// `[rows, top_k]`.
    choices: Vec<Choice>,
    /// Pairs of expert `e` are `[starts[e], starts[e + 1])`.
    starts: Vec<usize>,
    /// Row and weight of each pair, by expert, then by row.
    pairs: Vec<(u32, f32)>,
    /// Tiles of the first products: of an expert, or (one past the last) the shared one.
    tiles: Vec<(usize, Tile)>,
}

impl Plan {
    /// Sorts `choices`, `top_k` per row, by expert.
    fn sort(&mut self, experts: usize, top_k: usize) {
        self.starts.clear();
        self.starts.resize(experts + 1, 0);
        for choice in &self.choices {
            self.starts[choice.expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        self.pairs.clear();
        self.pairs.resize(self.choices.len(), (0, 0.0));
        for (at, choice) in self.choices.iter().enumerate() {
            // The starts move up as their places fill, and are put back below.
            let place = &mut self.starts[choice.expert as usize];
            self.pairs[*place] = ((at / top_k) as u32, choice.weight);
            *place += 1;
        }
        self.starts.rotate_right(1);
        self.starts[0] = 0;
    }
}

/// The weights of a mixture, checked against each other.
struct Weights<'w> {
    router: &'w Packed,
    bias: Option<&'w [f32]>,
    gate_up: &'w [Packed],
    down: &'w [Packed],
    shared: Option<(&'w Packed, &'w Packed)>,
}

impl<'w> Weights<'w> {
    fn of(moe: &Moe<'w, CpuBackend>, hidden: usize) -> Result<Self, String> {
        route::check(moe.routing)?;
        let experts = moe.routing.experts;
        let product = |weight: &'w crate::CpuWeight, what: &str| match &weight.0 {
            Kind::Product(packed) => Ok(packed),
            _ => Err(format!("{what} is not a product")),
        };
        let many = |weight: &'w crate::CpuWeight, what: &str| match &weight.0 {
            Kind::Experts(all) if all.len() == experts => Ok(all.as_slice()),
            Kind::Experts(all) => Err(format!("{what} of {} experts, {experts} routed to", all.len())),
            _ => Err(format!("{what} is not of experts")),
        };
        let shape = |packed: &Packed| (packed.outputs, packed.inputs);
        let router = product(moe.router, "the router")?;
        if shape(router) != (experts, hidden) || router.ranges != 1 {
            return Err(format!("a router {:?} for {experts} experts of width {hidden}", shape(router)));
        }
        let bias = match moe.choice_bias.map(|weight| &weight.0) {
            None => None,
            Some(Kind::Vector(vector)) if vector.len() == experts => Some(vector.as_slice()),
            Some(_) => return Err(format!("a choice bias that is not of {experts} experts")),
        };
        let (gate_up, down) = (many(moe.gate_up, "gate and up")?, many(moe.down, "down")?);
        let shared = match moe.shared {
            None => None,
            Some((gate_up, down)) => Some((
                product(gate_up, "gate and up of the shared expert")?,
                product(down, "down of the shared expert")?,
            )),
        };
        if shared.is_some_and(|(_, down)| down.bias.is_some()) {
            return Err("a shared expert whose down has a bias".to_owned());
        }
        let first = [(&gate_up[0], &down[0])];
        for (gate_up, downward) in first.into_iter().chain(shared) {
            let inner = gate_up.outputs / 2;
            if gate_up.outputs % 2 != 0
                || gate_up.inputs != hidden
                || gate_up.ranges != 1
                || shape(downward) != (hidden, inner)
            {
                let shapes = (shape(gate_up), shape(downward));
                return Err(format!("an expert of {shapes:?} for width {hidden}"));
            }
            if downward.ranges != down[0].ranges || !downward.is_cut_as(&down[0]) {
                return Err(format!(
                    "a shared expert in {} ranges beside {}",
                    downward.ranges, down[0].ranges
                ));
            }
        }
        Ok(Weights { router, bias, gate_up, down, shared })
    }
}

impl CpuStep<'_> {
    /// [`backend::Step::moe`] over `x`, rounded already. Errors name the numbers that do not fit.
    pub(crate) fn mixture(&mut self, x: &CpuAct, moe: &Moe<'_, CpuBackend>) -> Result<CpuAct, String> {
        let weights = Weights::of(moe, x.width)?;
        let mut plan = std::mem::take(&mut self.device.plan);
        self.choose(x, moe, &weights, &mut plan);
        plan.sort(moe.routing.experts, moe.routing.top_k);
        let gated = self.gate(x, &weights, moe.glu, &mut plan);
        let out = self.combine(x, &weights, &gated, &plan);
        self.device.plan = plan;
        Ok(out)
    }

    /// Every row's experts.
    fn choose(&mut self, x: &CpuAct, moe: &Moe<'_, CpuBackend>, weights: &Weights<'_>, plan: &mut Plan) {
        let (routing, kernels) = (moe.routing, self.device.kernels);
        let mut scores = self.product(x, weights.router);
        let (experts, top_k) = (routing.experts, routing.top_k);
        plan.choices.clear();
        plan.choices.resize(x.rows * top_k, Choice::default());
        let (scores, choices) = (Raw(scores.floats.as_mut_ptr()), Rows(plan.choices.as_mut_ptr()));
        // An expert of a row takes about as long as this many multiply-adds.
        let work = x.rows * experts * (16 + 4 * top_k);
        self.device.pool.run(x.rows, work, |row, scratch| {
            let room = scratch.floats(experts);
            // SAFETY: the row's scores and choices, used by this task only, and room of this thread.
            unsafe {
                let scores = std::slice::from_raw_parts_mut(scores.row(row, experts), experts);
                let room = std::slice::from_raw_parts_mut(room, experts);
                let chosen = std::slice::from_raw_parts_mut(choices.at(row * top_k), top_k);
                route::route(routing, weights.bias, |x| (kernels.exp)(x), scores, room, chosen);
            }
        });
    }

    /// Gated activations: `[pairs, inner]` of the experts, and `[rows, inner]` of the shared one.
    fn gate(
        &mut self,
        x: &CpuAct,
        weights: &Weights<'_>,
        glu: Glu,
        plan: &mut Plan,
    ) -> (CpuAct, Option<CpuAct>) {
        let kernels = self.device.kernels;
        let mut gathered = self.act(plan.pairs.len(), x.width);
        let (from, to) = (x.floats.as_slice(), Raw(gathered.floats.as_mut_ptr()));
        self.each_row(plan.pairs.len(), x.width, |pair| {
            let row = &from[plan.pairs[pair].0 as usize * x.width..][..x.width];
            // SAFETY: the pair's floats, written by this task only.
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), to.row(pair, x.width), x.width) };
        });
        // All experts have the first one's shape, so what it wants all want.
        let gathered_other = self.operands(&gathered, &weights.gate_up[0]);
        let shared_other = weights.shared.map(|(gate_up, _)| self.operands(x, gate_up));
        let mut own = self.act(plan.pairs.len(), weights.gate_up[0].outputs);
        let mut shared = weights.shared.map(|(gate_up, _)| self.act(x.rows, gate_up.outputs));
        let shared_out = shared.as_mut().map(|act| act.floats.as_mut_ptr());
        let own_out = own.floats.as_mut_ptr();
        let product = |expert: usize| match (weights.gate_up.get(expert), weights.shared, shared_out) {
            (Some(weight), _, _) => {
                let (start, end) = (plan.starts[expert], plan.starts[expert + 1]);
                Some(Product {
                    kernels,
                    weight,
                    x: gathered_other.of(&gathered, weight).rows_from(start),
                    out: own_out.wrapping_add(start * weight.outputs),
                    rows: end - start,
                })
            }
            (None, Some((weight, _)), Some(out)) => shared_other.as_ref().map(|other| Product {
                kernels,
                weight,
                x: other.of(x, weight),
                out,
                rows: x.rows,
            }),
            _ => None,
        };
        let (mut work, mut used) = (0, 0);
        let all = weights.gate_up.len() + 1;
        for product in (0..all).filter_map(product).filter(|product| product.rows > 0) {
            work += product.rows * product.weight.inputs * product.weight.outputs;
            used += 1;
        }
        let enough = (self.device.pool.threads() * TASKS_PER_THREAD).div_ceil(used.max(1));
        let mut tiles = std::mem::take(&mut plan.tiles);
        tiles.clear();
        let last = (0..all).rfind(|at| product(*at).is_some_and(|product| product.rows > 0));
        for expert in 0..all {
            if let Some(product) = product(expert).filter(|product| product.rows > 0) {
                let mut cut = product.tiles(enough);
                if Some(expert) == last {
                    cut = cut.tapered(self.device.pool.threads());
                }
                tiles.extend((0..cut.count).filter_map(|at| cut.get(at)).map(|tile| (expert, tile)));
            }
        }
        let address = Products(&product);
        let pool = &self.device.pool;
        let soon = |task: usize| {
            let next = tiles.get(task).and_then(|(expert, tile)| Some(address.of(*expert)?.start(*tile)));
            next.unwrap_or(std::ptr::null())
        };
        pool.run(tiles.len(), work, |task, scratch| {
            let (expert, tile) = tiles[task];
            if let Some(product) = address.of(expert) {
                // SAFETY: x and out are valid for the product's shapes; tiles are disjoint parts of the outputs.
                unsafe { product.tile(tile, soon(pool.next(task)), scratch) };
            }
        });
        plan.tiles = tiles;
        (self.gated(&own, glu), shared.map(|shared| self.gated(&shared, glu)))
    }

    /// The second products, weighed and added up: `[rows, hidden]`.
    fn combine(
        &mut self,
        x: &CpuAct,
        weights: &Weights<'_>,
        (own, shared): &(CpuAct, Option<CpuAct>),
        plan: &Plan,
    ) -> CpuAct {
        let (kernels, rows, first) = (self.device.kernels, x.rows, &weights.down[0]);
        let mut out = self.act(rows, first.outputs);
        out.rounded = !self.device.bf16();
        let to = Raw(out.floats.as_mut_ptr());
        let inner = own.width;
        let most = plan.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        let most = if shared.is_some() { rows } else { most };
        let together = if rows <= ROWS_TOGETHER { first.ranges } else { 1 };
        let tree = Tree { ranges: first.ranges, together };
        // One expert's part: few rows sum all ranges at once.
        let part_rows = most.max(together * most.min(Scaled::ROWS_RANGES));
        let mut enough = self.device.pool.threads() * TASKS_PER_THREAD;
        let mut tiles = Tiles::of_row(first, enough);
        while together * rows * tiles.group() * LANES > SUMS_FLOATS && tiles.group() > 1 {
            enough = tiles.count + 1;
            tiles = Tiles::of_row(first, enough);
        }
        if rows <= ROWS_STREAMING {
            tiles = tiles.tapered(self.device.pool.threads());
        }
        let own_other = self.operands(own, first);
        let shared = weights
            .shared
            .zip(shared.as_ref())
            .map(|((_, weight), act)| (weight, act, self.operands(act, weight)));
        let work = (plan.pairs.len() * inner + shared.as_ref().map_or(0, |(_, act, _)| act.floats.len()))
            * first.outputs;
        let pool = &self.device.pool;
        // What a task reads from some expert on.
        let chosen = |from: usize| {
            let chosen = (from..weights.down.len()).find(|at| plan.starts[*at] < plan.starts[*at + 1]);
            chosen.map(|at| &weights.down[at]).or(shared.as_ref().map(|(weight, ..)| *weight))
        };
        let begins = |weight: &Packed, tile: Tile| weight.segments[tile.segment].start(tile.panel);
        pool.run(tiles.count, work, |task, scratch| {
            let Some(tile @ Tile { segment, panel, panels, .. }) = tiles.get(task) else { return };
            let then = chosen(0).zip(tiles.get(pool.next(task)));
            let then = then.map_or(std::ptr::null(), |(weight, tile)| begins(weight, tile));
            let width = panels * LANES;
            let column = first.segments[segment].first + panel * LANES;
            let columns = width.min(first.segments[segment].outputs - panel * LANES);
            let size = rows * width;
            let sums = scratch.floats((tree.places() * rows + part_rows) * width + DECODED_FLOATS);
            let part = sums.wrapping_add(tree.places() * size);
            let buffer = part.wrapping_add(part_rows * width);
            // Sums `rows` rows of one expert over some ranges, and gives those of each, by its place among them, to `add`.
            let expert = |weight: &Packed,
                          x: Operand<'_>,
                          rows: usize,
                          soon: *const u8,
                          ranges: Range<usize>,
                          add: &dyn Fn(usize, *const f32)| {
                let (size, segment) = (rows * width, &weight.segments[segment]);
                let together = if rows <= Scaled::ROWS_RANGES { ranges.len() } else { 1 };
                for first in ranges.clone().step_by(together) {
                    let (summed, stretch) = (first..first + together, Stretch { panel, panels, soon });
                    // SAFETY: the part and the buffer lie in this thread's scratch one behind the other; x has the rows.
                    unsafe { segment.sum(kernels, summed, stretch, x, rows, part, size, buffer) };
                    (0..together).for_each(|at| add(first - ranges.start + at, part.wrapping_add(at * size)));
                }
            };
            // SAFETY: sums lie in this thread's scratch; inputs are those of each expert's pairs; the columns of `out` are
            // this task's.
            unsafe {
                tree.sum(kernels, sums, size, |ranges, sums| {
                    sums.write_bytes(0, ranges.len() * size);
                    for (at, weight) in weights.down.iter().enumerate().filter(|_| ranges.start == 0) {
                        let Some(bias) = &weight.bias else { break };
                        for (row, factor) in &plan.pairs[plan.starts[at]..plan.starts[at + 1]] {
                            let sum = sums.add(*row as usize * width);
                            (kernels.blend)(sum, bias.as_ptr().add(column), columns, 1.0, *factor);
                        }
                    }
                    for (at, weight) in weights.down.iter().enumerate() {
                        let start = plan.starts[at];
                        let pairs = &plan.pairs[start..plan.starts[at + 1]];
                        if pairs.is_empty() {
                            continue;
                        }
                        let x = own_other.of(own, weight).rows_from(start);
                        let soon = chosen(at + 1).map_or(then, |weight| begins(weight, tile));
                        expert(weight, x, pairs.len(), soon, ranges.clone(), &|range, part| {
                            for (at, (row, factor)) in pairs.iter().enumerate() {
                                let sum = sums.add(range * size + *row as usize * width);
                                (kernels.blend)(sum, part.add(at * width), width, 1.0, *factor);
                            }
                        });
                    }
                    if let Some((weight, act, other)) = &shared {
                        expert(weight, other.of(act, weight), rows, then, ranges, &|range, part| {
                            (kernels.add)(sums.add(range * size), part, size, false);
                        });
                    }
                });
                let to = to.row(0, first.outputs).add(column);
                (kernels.place)(sums, width, to, first.outputs, rows, columns);
            }
        });
        out
    }
}

/// Choices that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Rows(*mut Choice);
// SAFETY: every task uses its own row.
unsafe impl Sync for Rows {}

impl Rows {
    fn at(self, at: usize) -> *mut Choice {
        self.0.wrapping_add(at)
    }
}

/// The products of a mixture, by expert, for all threads.
struct Products<'a, F>(&'a F);
// SAFETY: what it returns may be shared (see [`Product`]), and it holds addresses only.
unsafe impl<F> Sync for Products<'_, F> {}

impl<'w, F: Fn(usize) -> Option<Product<'w>>> Products<'_, F> {
    fn of(&self, expert: usize) -> Option<Product<'w>> {
        (self.0)(expert)
    }
}
