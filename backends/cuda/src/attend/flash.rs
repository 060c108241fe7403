//! The flash kernels there are, by size of a head: how each is started.

use backend::BackendError;

use crate::args::AttendArgs;
use crate::device::Device;
use crate::driver::Driver;

/// Queries of a block of the `attend_few` kernels.
pub(crate) const FEW_QUERIES: usize = 16;

/// Flash kernels for heads up to some size.
pub(crate) struct Flash {
    pub(crate) key_max: usize,
    pub(crate) value_max: usize,
    prompts: Kernel,
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
    /// Elements between rows of a tile that nobody uses.
    padding: usize,
}

const fn prompts(name: &'static str, queries: usize, keys: usize) -> Kernel {
    Kernel { name, threads: 128, queries, keys, stages: 1, padding: 8 }
}

const fn few(name: &'static str, keys: usize) -> Kernel {
    Kernel { name, threads: 32, queries: FEW_QUERIES, keys, stages: 1, padding: 8 }
}

const fn groups(name: &'static str) -> Option<Kernel> {
    Some(Kernel { name, threads: 256, queries: 128, keys: 128, stages: 2, padding: 0 })
}

pub(crate) const FLASH: [Flash; 4] = [
    Flash {
        key_max: 64,
        value_max: 64,
        prompts: prompts("attend_64", 128, 64),
        few: few("attend_few_64", 64),
        groups: groups("attend_group_64"),
    },
    Flash {
        key_max: 128,
        value_max: 128,
        prompts: prompts("attend_128", 128, 64),
        few: few("attend_few_128", 64),
        groups: groups("attend_group_128"),
    },
    Flash {
        key_max: 192,
        value_max: 128,
        prompts: prompts("attend_192", 64, 64),
        few: few("attend_few_192", 64),
        groups: groups("attend_group_192"),
    },
    Flash {
        key_max: 256,
        value_max: 256,
        prompts: prompts("attend_256", 64, 32),
        few: few("attend_few_256", 32),
        groups: None,
    },
];

impl Flash {
    /// The kernel for prompts: that of every generation, or of warp groups where there is one.
    pub(crate) fn for_prompts(&self, groups: bool) -> Kernel {
        self.groups.filter(|_| groups).unwrap_or(self.prompts)
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
        let queries = kernel.queries * (self.key_max + kernel.padding);
        let tile = kernel.keys * (self.key_max + self.value_max + 2 * kernel.padding);
        let bytes = (queries + kernel.stages * tile) * 2;
        device.launch(kernel.name, grid.map(|size| size as u32), kernel.threads, bytes, args)
    }
}
