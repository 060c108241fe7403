//! The flash kernels there are, by size of a head: how each is started.

use backend::BackendError;

use crate::args::AttendArgs;
use crate::device::Device;
use crate::driver::Driver;

/// Shared memory of a block, on devices whose processors run two large ones at once: A100, H100, B200. RTX cards and GB10 have 99 KiB.
const SHARED_BYTES_MANY: usize = 128 << 10;

/// Queries of a block of the `attend_few` kernels.
pub(crate) const FEW_QUERIES: usize = 16;

/// Flash kernels for heads up to some size.
pub(crate) struct Flash {
    pub(crate) key_max: usize,
    pub(crate) value_max: usize,
    prompts: Kernel,
    /// For prompts on devices with little shared memory.
    small: Option<Kernel>,
    pub(crate) few: Kernel,
    /// For prompts where warp groups multiply (`kernels/hopper.cu`).
    groups: Option<Kernel>,
}

/// One flash kernel.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    name: &'static str,
    threads: u32,
    /// Queries of a block.
    pub(crate) queries: usize,
    /// Positions of a tile, and tiles of keys and of values that are held.
    keys: usize,
    stages: usize,
}

const fn prompts(name: &'static str, queries: usize, keys: usize) -> Kernel {
    Kernel { name, threads: 128, queries, keys, stages: 1 }
}

const fn few(name: &'static str, keys: usize) -> Kernel {
    Kernel { name, threads: 32, queries: FEW_QUERIES, keys, stages: 1 }
}

const fn groups(name: &'static str) -> Option<Kernel> {
    Some(Kernel { name, threads: 256, queries: 128, keys: 128, stages: 2 })
}

pub(crate) const FLASH: [Flash; 4] = [
    Flash {
        key_max: 64,
        value_max: 64,
        prompts: prompts("attend_64", 128, 64),
        few: few("attend_few_64", 64),
        small: None,
        groups: groups("attend_group_64"),
    },
    Flash {
        key_max: 128,
        value_max: 128,
        prompts: prompts("attend_128", 128, 64),
        few: few("attend_few_128", 64),
        small: Some(prompts("attend_128_small", 64, 64)),
        groups: groups("attend_group_128"),
    },
    Flash {
        key_max: 192,
        value_max: 128,
        prompts: prompts("attend_192", 64, 64),
        few: few("attend_few_192", 64),
        small: None,
        groups: groups("attend_group_192"),
    },
    Flash {
        key_max: 256,
        value_max: 256,
        prompts: prompts("attend_256", 64, 32),
        few: few("attend_few_256", 32),
        small: None,
        groups: None,
    },
];

impl Flash {
    /// The kernel for prompts on `device`.
    pub(crate) fn for_prompts<D: Driver>(&self, device: &Device<D>) -> Kernel {
        let small = self.small.filter(|_| device.driver().shared_bytes_max() < SHARED_BYTES_MANY);
        let every = small.unwrap_or(self.prompts);
        self.groups.filter(|_| device.groups).unwrap_or(every)
    }

    /// Both kinds, where there are two.
    pub(crate) fn kinds(&self) -> Option<[Kernel; 2]> {
        Some([self.prompts, self.groups?])
    }

    /// Queues `kernel` for so many tiles, groups of heads, and splits.
    pub(crate) fn launch<D: Driver>(
        &self,
        device: &Device<D>,
        kernel: Kernel,
        grid: [usize; 3],
        args: &AttendArgs,
    ) -> Result<(), BackendError> {
        let tile = kernel.keys * (self.key_max + self.value_max);
        let bytes = (kernel.queries * self.key_max + kernel.stages * tile) * 2;
        device.launch(kernel.name, grid.map(|size| size as u32), kernel.threads, bytes, args)
    }
}
