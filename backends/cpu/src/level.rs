//! Instruction levels: which kernels this machine can run.

use std::fmt;
use std::str::FromStr;

use crate::kernel::{self, Kernels};

/// A set of vector instructions. Results may differ between levels, never within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the compiler makes of plain arrays: NEON on aarch64, SSE2 on x86-64.
    Portable,
    /// AVX2 with FMA and F16C: quantised weights in bf16 steps are multiplied as whole numbers.
    Avx2,
    /// The same with AVX-VNNI, which has an instruction for such products.
    AvxVnni,
    /// AVX-512 F, BW, VL and DQ; quantised weights are multiplied as floats.
    Avx512,
    /// The same with VNNI and VBMI: quantised weights in bf16 steps are multiplied as whole numbers.
    Avx512Vnni,
    /// The same with BF16: products of bf16 weights in bf16 steps have their own order of sums.
    Avx512Bf16,
    /// The same with AMX's tiles for products: those of bf16, and attention, have their own order of sums; those of whole numbers are the same.
    Amx,
}

impl Level {
    /// All levels, the plainest first.
    pub const ALL: [Level; 7] = [
        Level::Portable,
        Level::Avx2,
        Level::AvxVnni,
        Level::Avx512,
        Level::Avx512Vnni,
        Level::Avx512Bf16,
        Level::Amx,
    ];

    /// The best level of this machine.
    pub fn best() -> Self {
        // Products of bf16 take Intel's processors twice as long as those of floats, and AMX is what they have for them.
        let slow = |level: Level| level == Level::Avx512Bf16 && is_intel();
        let mut levels = Level::ALL.into_iter().rev().filter(|level| level.available() && !slow(*level));
        levels.next().unwrap_or(Level::Portable)
    }

    /// Whether this machine has the instructions.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let (avx2, avx_vnni, avx512, vnni, bf16) = (
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"),
            is_x86_feature_detected!("avxvnni"),
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq"),
            is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi"),
            is_x86_feature_detected!("avx512bf16"),
        );
        #[cfg(not(target_arch = "x86_64"))]
        let (avx2, avx_vnni, avx512, vnni, bf16) = (false, false, false, false, false);
        match self {
            Level::Portable => true,
            Level::Avx2 => avx2,
            Level::AvxVnni => avx2 && avx_vnni,
            Level::Avx512 => avx2 && avx512,
            Level::Avx512Vnni => avx2 && avx512 && vnni,
            Level::Avx512Bf16 => avx2 && avx512 && vnni && bf16,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => avx2 && avx512 && vnni && bf16 && kernel::tiles::available(),
            #[cfg(not(target_arch = "x86_64"))]
            Level::Amx => false,
        }
    }

    /// `portable`, `avx2`, `avxvnni`, `avx512`, `avx512vnni`, `avx512bf16` or `amx`.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::AvxVnni => "avxvnni",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512vnni",
            Level::Avx512Bf16 => "avx512bf16",
            Level::Amx => "amx",
        }
    }

    /// The kernels, for a level that is available.
    pub(crate) fn kernels(self) -> &'static Kernels {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &kernel::AVX2,
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => &kernel::AVX_VNNI,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &kernel::avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => &kernel::AVX512_VNNI,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => &kernel::AVX512_BF16,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => &kernel::AMX,
            _ => &kernel::portable::KERNELS,
        }
    }
}

/// Whether Intel made this processor.
fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
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
            format!("unknown instruction level {s:?}: expected portable, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx")
        })
    }
}
