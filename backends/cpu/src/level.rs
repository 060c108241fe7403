//! Instruction levels: which kernels this machine can run.

use std::fmt;
use std::str::FromStr;

use crate::kernel::{self, Kernels};

/// A set of vector instructions. Results may differ between levels, never within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the compiler makes of plain arrays: NEON on aarch64, SSE2 on x86-64.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same with BF16, VNNI and VBMI: products of bf16 weights in bf16 steps have their own order of sums.
    Avx512Bf16,
    /// The same with AMX's tiles for products, which have their own order of sums.
    Amx,
}

impl Level {
    /// All levels, the plainest first.
    pub const ALL: [Level; 5] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx];

    /// The best level of this machine.
    pub fn best() -> Self {
        Level::ALL.into_iter().rev().find(|level| level.available()).unwrap_or(Level::Portable)
    }

    /// Whether this machine has the instructions.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let (avx2, avx512, bf16) = (
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"),
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq"),
            // Products of bytes come along: of processors that have bf16, Cooper Lake alone lacks them.
            is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512vbmi"),
        );
        #[cfg(not(target_arch = "x86_64"))]
        let (avx2, avx512, bf16) = (false, false, false);
        match self {
            Level::Portable => true,
            Level::Avx2 => avx2,
            Level::Avx512 => avx2 && avx512,
            Level::Avx512Bf16 => avx2 && avx512 && bf16,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => avx2 && avx512 && bf16 && kernel::tiles::available(),
            #[cfg(not(target_arch = "x86_64"))]
            Level::Amx => false,
        }
    }

    /// `portable`, `avx2`, `avx512`, `avx512bf16` or `amx`.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
            Level::Amx => "amx",
        }
    }

    /// The kernels, for a level that is available.
    pub(crate) fn kernels(self) -> &'static Kernels {
        #[cfg(target_arch = "x86_64")]
        let bytes = is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi");
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &kernel::avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if bytes => &kernel::AVX512_VNNI,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &kernel::avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => &kernel::AVX512_BF16,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => &kernel::AMX,
            _ => &kernel::portable::KERNELS,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let named = Level::ALL.into_iter().find(|level| level.name() == s);
        named.ok_or_else(|| {
            format!("unknown instruction level {s:?}: expected portable, avx2, avx512, avx512bf16 or amx")
        })
    }
}
