//! The flash kernels there are, by size of a head: how each is started.

use backend::BackendError;

use crate::args::AttendArgs;
use crate::device::Device;
use crate::driver::{Driver, Wide};

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
    /// For prompts where there is tensor memory (`kernels/blackwell.cu`).
    memory: Option<Kernel>,
}

/// One flash kernel.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    name: &'static str,
    threads: u32,
    /// Queries of a block.
    pub(crate) queries: usize,
    /// Positions of a tile, and tiles of keys and of values that have a place in shared memory.
    keys: usize,
    places: [usize; 2],
}

const fn prompts(name: &'static str, queries: usize, keys: usize) -> Kernel {
    Kernel { name, threads: 128, queries, keys, places: [1, 1] }
}

const fn few(name: &'static str, keys: usize) -> Kernel {
    Kernel { name, threads: 32, queries: FEW_QUERIES, keys, places: [1, 1] }
}

const fn groups(name: &'static str) -> Option<Kernel> {
    Some(Kernel { name, threads: 256, queries: 128, keys: 128, places: [2, 2] })
}

/// Values lie where keys do, by turns.
const fn memory(name: &'static str, keys: usize) -> Option<Kernel> {
    Some(Kernel { name, threads: 384, queries: 256, keys, places: [5, 0] })
}

pub(crate) const FLASH: [Flash; 4] = [
    Flash {
        key_max: 64,
        value_max: 64,
        prompts: prompts("attend_64", 128, 64),
        few: few("attend_few_64", 64),
        small: None,
        groups: groups("attend_group_64"),
        memory: memory("attend_tensor_64", 128),
    },
    Flash {
        key_max: 128,
        value_max: 128,
        prompts: prompts("attend_128", 128, 64),
        few: few("attend_few_128", 64),
        small: Some(prompts("attend_128_small", 64, 64)),
        groups: groups("attend_group_128"),
        memory: memory("attend_tensor_128", 128),
    },
    Flash {
        key_max: 192,
        value_max: 128,
        prompts: prompts("attend_192", 64, 64),
        few: few("attend_few_192", 64),
        small: None,
        groups: groups("attend_group_192"),
        memory: memory("attend_tensor_192", 64),
    },
    Flash {
        key_max: 256,
        value_max: 256,
        prompts: prompts("attend_256", 64, 32),
        few: few("attend_few_256", 32),
        small: None,
        groups: None,
        memory: None,
    },
];

impl Flash {
    /// The kernel for prompts on `device`.
    pub(crate) fn for_prompts<D: Driver>(&self, device: &Device<D>) -> Kernel {
        let small = self.small.filter(|_| device.driver().shared_bytes_max() < SHARED_BYTES_MANY);
        let every = small.unwrap_or(self.prompts);
        device.attends.and_then(|wide| self.wide(wide)).unwrap_or(every)
    }

    /// The kernel for prompts by such products, if there is one.
    fn wide(&self, wide: Wide) -> Option<Kernel> {
        match wide {
            Wide::Groups => self.groups,
            Wide::Memory => self.memory,
        }
    }

    /// The kernels for prompts of every generation and by such products, where there are two.
    pub(crate) fn kinds(&self, wide: Wide) -> Option<[Kernel; 2]> {
        Some([self.prompts, self.wide(wide)?])
    }

    /// Queues `kernel` for so many tiles, groups of heads, and splits.
    pub(crate) fn launch<D: Driver>(
        &self,
        device: &Device<D>,
        kernel: Kernel,
        grid: [usize; 3],
        args: &AttendArgs,
    ) -> Result<(), BackendError> {
        let [keys, values] = kernel.places;
        let tiles = kernel.keys * (keys * self.key_max + values * self.value_max);
        let bytes = (kernel.queries * self.key_max + tiles) * 2;
        device.launch(kernel.name, grid.map(|size| size as u32), kernel.threads, bytes, args)
    }
}
