//! Mixtures of experts on the device: routing, the places of rows by expert, the products, and the sum.

use std::rc::Rc;

use backend::{BackendError, Glu, Moe, Score};

use crate::act::CudaAct;
use crate::args::{GatherSumArgs, RouteArgs, RoutesArgs};
use crate::device::{Device, Open, THREADS};
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::product::Routed;
use crate::step::CudaStep;
use crate::weight::{CudaWeight, Kind, Matrix, scale_type};

/// As in `kernels/moe.cu`.
const EXPERTS_MAX: usize = 512;
/// Threads of the block that sorts rows by expert.
const ROUTES_THREADS: u32 = 512;

fn refused<T>(reason: String) -> Result<T, BackendError> {
    Err(BackendError::Device(reason))
}

impl<D: Driver + Open> CudaStep<'_, D> {
    pub(crate) fn experts(
        &mut self,
        x: &CudaAct<D>,
        moe: &Moe<'_, Device<D>>,
    ) -> Result<Buffer<D>, BackendError> {
        let (gate_up, down) = (matrix(moe.gate_up, true)?, matrix(moe.down, true)?);
        let router = matrix(moe.router, false)?;
        let routing = moe.routing;
        let (count, top_k, ffn) = (routing.experts, routing.top_k, down.inputs);
        let fits = (router.outputs, router.inputs, gate_up.experts, down.experts)
            == (count, x.width, count, count)
            && (gate_up.inputs, gate_up.outputs, down.outputs) == (x.width, 2 * ffn, x.width);
        if !fits || count > EXPERTS_MAX || top_k == 0 || top_k > count {
            return refused(format!("{count} experts of {ffn}, {top_k} a row, for width {}", x.width));
        }
        if let Some((groups, used)) = routing.groups
            && (groups == 0
                || count % groups != 0
                || used == 0
                || used > groups
                || top_k > count / groups * used)
        {
            return refused(format!("{used} of {groups} groups of {count} experts, {top_k} a row"));
        }
        let device = &*self.device;
        let choice_bias = match moe.choice_bias.map(|bias| &*bias.0) {
            None => 0,
            Some(Kind::Exact(memory, len)) if *len == count => memory.address,
            Some(_) => return refused(format!("a choice bias that is not of {count} experts")),
        };
        let rows = x.rows;
        let places = rows * top_k;
        let x = x.buffer(device)?;
        let scores = device.pool.take(rows * count * 4)?;
        device.product_unbiased(router, x.address, rows, scores.address)?;
        let (experts, weights) = (device.pool.take(places * 4)?, device.pool.take(places * 4)?);
        let (groups, groups_used) = routing.groups.unwrap_or((1, 1));
        let route = RouteArgs {
            scores: scores.address,
            bias: router.bias.as_ref().map_or(0, |bias| bias.address),
            choice_bias,
            experts: experts.address,
            weights: weights.address,
            count: count as u32,
            top_k: top_k as u32,
            sigmoid: u32::from(routing.score == Score::Sigmoid),
            groups: groups as u32,
            groups_used: groups_used as u32,
            normalise: u32::from(routing.normalise),
            bias_type: scale_type(device.dtype),
            normalise_eps: routing.normalise_eps,
            scale: routing.scale,
        };
        device.launch("route", [rows as u32, 1, 1], 32, 0, &route)?;

        let tiling = device.tiling(places.div_ceil(count), if x_aligned(gate_up, down) { 8 } else { 1 });
        let tiles_max = places.div_ceil(tiling.rows) + count.min(places);
        let (slots, sources) = (device.pool.take(places * 4)?, device.pool.take(places * 4)?);
        let tiles = device.pool.take(tiles_max * 12)?;
        let routes = RoutesArgs {
            experts: experts.address,
            slots: slots.address,
            sources: sources.address,
            tiles: tiles.address,
            rows: rows as u32,
            top_k: top_k as u32,
            count: count as u32,
            tile: tiling.rows as u32,
            tiles_max: tiles_max as u32,
        };
        device.launch("routes", [1, 1, 1], ROUTES_THREADS, 0, &routes)?;

        let mut routed = Routed {
            tiling,
            tiles: tiles.address,
            tiles_max,
            rows: sources.address,
            rows_count: rows,
            places,
        };
        let both = device.elements(places * 2 * ffn)?;
        device.experts(gate_up, &routed, x.address, both.address, false)?;
        let gated = device.glu(both.address, places, ffn, moe.glu)?;
        let parts = device.pool.take(places * down.outputs * 4)?;
        (routed.rows, routed.rows_count) = (0, places);
        device.experts(down, &routed, gated.address, parts.address, true)?;
        let shared = moe.shared.map(|shared| self.shared(&x, rows, shared, moe.glu)).transpose()?;
        let device = &*self.device;
        // In a group this is a part of the sum, which stays f32.
        let partial = device.ranks.is_some();
        let out = device.pool.take(rows * down.outputs * if partial { 4 } else { device.dtype.bytes() })?;
        let sum = GatherSumArgs {
            parts: parts.address,
            slots: slots.address,
            weights: weights.address,
            shared: shared.as_ref().map_or(0, |shared| shared.address),
            out: out.address,
            top_k: top_k as u32,
            width: down.outputs as u32,
            out_f32: u32::from(partial),
        };
        let kernel = device.of_type("gather_sum_f32", "gather_sum_bf16");
        device.launch(kernel, [rows as u32, 1, 1], THREADS, 0, &sum)?;
        Ok(out)
    }

    /// The expert that every row passes, in f32.
    fn shared(
        &self,
        x: &Rc<Buffer<D>>,
        rows: usize,
        (gate_up, down): (&CudaWeight<D>, &CudaWeight<D>),
        glu: Glu,
    ) -> Result<Buffer<D>, BackendError> {
        let (gate_up, down) = (matrix(gate_up, false)?, matrix(down, false)?);
        if gate_up.outputs != 2 * down.inputs {
            return refused(format!("a shared expert of {} into {}", gate_up.outputs, down.inputs));
        }
        if down.bias.is_some() {
            return refused("a shared expert whose down has a bias".to_owned());
        }
        let both = self.device.elements(rows * gate_up.outputs)?;
        self.device.product(gate_up, x.address, rows, both.address, false)?;
        let gated = self.device.glu(both.address, rows, down.inputs, glu)?;
        let out = self.device.pool.take(rows * down.outputs * 4)?;
        self.device.product(down, gated.address, rows, out.address, true)?;
        Ok(out)
    }
}

/// Whether both products of the experts have inputs in whole eights.
fn x_aligned<D: Driver>(gate_up: &Matrix<D>, down: &Matrix<D>) -> bool {
    gate_up.inputs.is_multiple_of(8) && down.inputs.is_multiple_of(8)
}

fn matrix<D: Driver>(weight: &CudaWeight<D>, experts: bool) -> Result<&Matrix<D>, BackendError> {
    match &*weight.0 {
        Kind::Product(matrix) if !experts => Ok(matrix),
        Kind::Experts(matrix) if experts => Ok(matrix),
        _ => refused("a weight of another kind than its place in a mixture of experts".to_owned()),
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use backend::{DType, DeviceOptions, Group};

    use super::*;
    use crate::emulator::Emulated;
    use crate::step::Fetched;

    /// Many choices, so that every warp takes several handfuls: places are in order of expert, then of row, and tiles cover them.
    #[test]
    fn rows_find_their_places() {
        for (rows, top_k, count, tile) in [(700, 3, 37, 32), (1, 2, 2, 8), (130, 4, EXPERTS_MAX, 128)] {
            let options = DeviceOptions { dtype: DType::F32, block_tokens: 16, ..DeviceOptions::default() };
            let driver = Emulated::open(0, None).unwrap();
            let device = Device::over(driver, &options, Group::alone()).unwrap();
            let places = rows * top_k;
            // Some experts have no row, some many.
            let chosen: Vec<u32> = (0..places).map(|at| (at * at % 101 % count) as u32).collect();
            let tiles_max = places.div_ceil(tile) + count.min(places);
            let experts = device.pool.send(&chosen).unwrap();
            let [slots, sources, tiles] =
                [places, places, tiles_max * 3].map(|words| device.pool.take(words * 4).unwrap());
            let args = RoutesArgs {
                experts: experts.address,
                slots: slots.address,
                sources: sources.address,
                tiles: tiles.address,
                rows: rows as u32,
                top_k: top_k as u32,
                count: count as u32,
                tile: tile as u32,
                tiles_max: tiles_max as u32,
            };
            device.launch("routes", [1, 1, 1], ROUTES_THREADS, 0, &args).unwrap();
            let words = |buffer: &Buffer<Emulated>, count: usize| -> Vec<u32> {
                let fetched = Fetched::of(&device, buffer.address, count * 4).unwrap();
                let (words, _) = fetched.bytes().unwrap().as_chunks();
                words.iter().map(|word| u32::from_le_bytes(*word)).collect()
            };
            let mut order: Vec<usize> = (0..places).collect();
            order.sort_by_key(|at| chosen[*at]);
            let mut want = vec![0; places];
            order.iter().enumerate().for_each(|(place, at)| want[*at] = place as u32);
            assert_eq!(words(&slots, places), want);
            let want: Vec<u32> = order.iter().map(|at| (at / top_k) as u32).collect();
            assert_eq!(words(&sources, places), want);
            let mut want = Vec::new();
            let mut first = 0;
            for own in order.chunk_by(|a, b| chosen[*a] == chosen[*b]) {
                for piece in own.chunks(tile) {
                    want.extend([chosen[own[0]], first, piece.len() as u32]);
                    first += piece.len() as u32;
                }
            }
            want.resize(tiles_max * 3, 0);
            assert_eq!(words(&tiles, tiles_max * 3), want);
        }
    }
}
