//! Opening MLX as one rank of a group.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use backend::{
    Backend, BackendError, Batch, Caps, DType, DeviceOptions, Group, KvSpec, Links, Rope, RopeStyle,
    WeightSource,
};
use mlx_rs::Array;

use crate::draw::Flight;
use crate::fabric::Fabric;
use crate::fused::Fused;
use crate::graph::{Failure, Recorded, int};
use crate::kv::MlxKv;
use crate::platform;
use crate::step::{MlxAct, MlxStep};
use crate::weight::MlxWeight;

/// MLX on this machine's device. All its state belongs to the thread that opened it.
#[derive(Debug)]
pub struct MlxBackend {
    pub(crate) dtype: DType,
    block_tokens: u32,
    ropes: Vec<RopeTable>,
    /// What the step before draws.
    pub(crate) flight: Option<Flight>,
    pub(crate) fused: Fused,
    /// Rank and number of ranks.
    place: (usize, usize),
    /// Bytes that the device may use, where the system says.
    claimed: Option<u64>,
    /// Links to the other ranks, once they have met.
    fabric: Option<Rc<Fabric>>,
    copied: Arc<AtomicU64>,
}

/// A rotary embedding as MLX takes it.
#[derive(Debug)]
struct RopeTable {
    inv_freq: Arc<[f32]>,
    /// Seconds to the cache's hertz: MLX divides positions by these.
    periods: Array,
}

impl MlxBackend {
    /// Bytes that caches of this device have copied from slot to slot: what growth and prefixes cost that could not be moved.
    pub fn copied_bytes(&self) -> Arc<AtomicU64> {
        self.copied.clone()
    }

    /// The periods of `rope`, made when a layer first asks.
    pub(crate) fn periods(&mut self, rope: &Rope) -> Array {
        let same = |table: &&RopeTable| {
            Arc::ptr_eq(&table.inv_freq, &rope.inv_freq) || table.inv_freq == rope.inv_freq
        };
        if let Some(table) = self.ropes.iter().find(same) {
            return table.periods.clone();
        }
        let periods: Vec<f32> = rope.inv_freq.iter().map(|frequency| period(*frequency)).collect();
        let periods = Array::from_slice(&periods, &[int(periods.len())]);
        self.ropes.push(RopeTable { inv_freq: rope.inv_freq.clone(), periods: periods.clone() });
        periods
    }
}

impl MlxBackend {
    /// The sum of `x` over the ranks.
    pub(crate) fn joined(&self, x: &Array) -> Recorded {
        match self.fabric()? {
            Some(fabric) => fabric.sum(x),
            None => Ok(x.clone()),
        }
    }

    /// Links to the other ranks, if there are others. Errors when they have not met.
    pub(crate) fn fabric(&self) -> Result<Option<&Rc<Fabric>>, Failure> {
        match (&self.fabric, self.place.1) {
            (None, 2..) => Err(Failure(format!("rank {} has not met the others", self.place.0))),
            (fabric, _) => Ok(fabric.as_ref()),
        }
    }
}

/// The number whose reciprocal in f32 is nearest to `frequency`: MLX turns periods back into frequencies, and an error of
/// one bit there is one of many at a distant position.
fn period(frequency: f32) -> f32 {
    let near = 1.0 / frequency;
    let error = |period: &f32| (f64::from(1.0 / period) - f64::from(frequency)).abs();
    let candidates = [near, near.next_up(), near.next_down()];
    candidates
        .into_iter()
        .filter(|p| p.is_finite())
        .min_by(|a, b| error(a).total_cmp(&error(b)))
        .unwrap_or(near)
}

impl Backend for MlxBackend {
    type Weight = MlxWeight;
    type Act = MlxAct;
    type Hidden = MlxAct;
    type Kv = MlxKv;
    type Step<'a> = MlxStep<'a>;

    fn open(options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        platform::check()?;
        let mut backend = MlxBackend {
            dtype: options.dtype,
            block_tokens: options.block_tokens,
            ropes: Vec::new(),
            place: (group.rank, group.world),
            claimed: platform::claim(),
            fabric: None,
            flight: None,
            fused: Fused::new(),
            copied: Arc::default(),
        };
        // Other links are none yet: the ranks meet later.
        if matches!(group.links, Links::Native(_)) {
            backend.regroup(group)?;
        }
        Ok(backend)
    }

    fn caps(&self) -> Caps {
        Caps { name: "mlx", device: platform::DEVICE.to_owned(), exact: false, chunk_tokens: 512 }
    }

    fn load(&mut self, source: &WeightSource<'_>) -> Result<MlxWeight, BackendError> {
        MlxWeight::load(source, self.dtype)
    }

    fn kv(&mut self, spec: &KvSpec, bytes: u64) -> Result<MlxKv, BackendError> {
        let held = mlx_rs::memory::active_memory().map_err(Failure::from)?;
        platform::fits(held as u64, bytes, self.claimed)?;
        MlxKv::new(spec, bytes, self.block_tokens, self.copied.clone())
    }

    /// Links that are MLX's own, once per process (or the same again).
    fn regroup(&mut self, group: Group) -> Result<(), BackendError> {
        self.fabric = None;
        self.place = (group.rank, group.world);
        if group.world > 1 {
            self.fabric = Some(Rc::new(Fabric::join(group.rank, group.world, &group.links)?));
        }
        Ok(())
    }

    fn step<'a>(&'a mut self, kv: &'a mut MlxKv, batch: &'a Batch) -> MlxStep<'a> {
        MlxStep::new(self, kv, batch)
    }
}

/// Whether the checkpoint's projections hold the pairs of a head next to each other.
pub(crate) fn interleaved(rope: &Rope) -> bool {
    rope.style == RopeStyle::Interleaved
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What MLX makes of a period is the frequency, to the last bit or the one beside it.
    #[test]
    fn periods_turn_back_into_frequencies() {
        for i in 0..64 {
            let frequency = 500_000f32.powf(-(i as f32) / 64.0);
            let back = 1.0 / period(frequency);
            let bits = (i64::from(back.to_bits()) - i64::from(frequency.to_bits())).abs();
            assert!(bits <= 1, "{frequency} became {back}");
        }
    }
}
