//! The processor's tiles, and whether it has them: by CPUID, by the system's leave, and by a product that comes out right.

use std::arch::asm;
use std::sync::OnceLock;

use super::{Shape, Trial, Unit, bytes_are_right};

/// The tiles of the core that this thread runs on. The system keeps them with the thread.
pub(in crate::kernel) struct Tiles;

/// Whether this process may use tiles, and they compute rightly.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| (has_tiles() && may_use_tiles() || are_emulated()) && computes_rightly())
}

/// Whether something else answers for the processor's tiles, from now on.
#[cfg(all(feature = "amx-emulator", target_os = "linux"))]
fn are_emulated() -> bool {
    super::emulator::install()
}

#[cfg(not(all(feature = "amx-emulator", target_os = "linux")))]
fn are_emulated() -> bool {
    false
}

/// AMX-BF16, AMX-TILE and AMX-INT8.
pub(super) fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    const ALL: u32 = BF16 | TILE | INT8;
    let highest = std::arch::x86_64::__cpuid(0).eax;
    highest >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & ALL == ALL
}

/// Asks the system for the state that tiles take in every thread.
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call reads its two numbers only.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// One product of every kind of block, and of bytes.
fn computes_rightly() -> bool {
    let trial = Trial::new(45, 5, 75);
    trial.is_right(&trial.run(&mut Tiles, (0, 45), 0)) && bytes_are_right(&mut Tiles)
}

// SAFETY (all blocks here): `available` said that the processor and the system know these instructions; memory is the
// caller's; no other code of this process uses tiles, so they keep what they have between blocks.
impl Unit for Tiles {
    #[inline(always)]
    unsafe fn configure(&mut self, shape: &Shape) {
        // SAFETY: see the impl.
        unsafe { asm!("ldtilecfg [{}]", in(reg) shape, options(nostack, readonly)) }
    }

    #[inline(always)]
    unsafe fn zero<const D: usize>(&mut self) {
        // SAFETY: see the impl.
        unsafe { asm!("tilezero tmm{}", const D, options(nostack, nomem)) }
    }

    #[inline(always)]
    unsafe fn load<const D: usize>(&mut self, from: *const u8, stride_bytes: usize) {
        // SAFETY: see the impl.
        unsafe {
            asm!("tileloadd tmm{}, [{} + {}*1]", const D, in(reg) from, in(reg) stride_bytes, options(nostack, readonly))
        }
    }

    #[inline(always)]
    unsafe fn store<const D: usize>(&mut self, to: *mut u8, stride_bytes: usize) {
        // SAFETY: see the impl.
        unsafe {
            asm!("tilestored [{} + {}*1], tmm{}", in(reg) to, in(reg) stride_bytes, const D, options(nostack))
        }
    }

    #[inline(always)]
    unsafe fn multiply<const D: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: see the impl.
        unsafe { asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const D, const A, const B, options(nostack, nomem)) }
    }

    #[inline(always)]
    unsafe fn multiply_bytes<
        const D: usize,
        const A: usize,
        const B: usize,
        const A_SIGNED: bool,
        const B_SIGNED: bool,
    >(
        &mut self,
    ) {
        // SAFETY: see the impl.
        unsafe {
            match (A_SIGNED, B_SIGNED) {
                (false, false) => {
                    asm!("tdpbuud tmm{}, tmm{}, tmm{}", const D, const A, const B, options(nostack, nomem));
                }
                (false, true) => {
                    asm!("tdpbusd tmm{}, tmm{}, tmm{}", const D, const A, const B, options(nostack, nomem));
                }
                (true, false) => {
                    asm!("tdpbsud tmm{}, tmm{}, tmm{}", const D, const A, const B, options(nostack, nomem));
                }
                (true, true) => {
                    asm!("tdpbssd tmm{}, tmm{}, tmm{}", const D, const A, const B, options(nostack, nomem));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn release(&mut self) {
        // SAFETY: see the impl.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

#[cfg(test)]
mod tests {
    use std::arch::global_asm;

    // The instructions as this file writes them, one of each, for their bytes.
    global_asm!(
        "baton_cpu_tiles_begin:",
        "ldtilecfg [rax]",
        "tilezero tmm{three}",
        "tileloadd tmm{five}, [rax + rbx*1]",
        "tilestored [rax + rbx*1], tmm{three}",
        "tdpbf16ps tmm{three}, tmm{five}, tmm{six}",
        "tdpbuud tmm{three}, tmm{five}, tmm{six}",
        "tdpbusd tmm{three}, tmm{five}, tmm{six}",
        "tdpbsud tmm{three}, tmm{five}, tmm{six}",
        "tdpbssd tmm{three}, tmm{five}, tmm{six}",
        "tilerelease",
        "baton_cpu_tiles_end:",
        three = const 3,
        five = const 5,
        six = const 6,
    );

    unsafe extern "C" {
        static baton_cpu_tiles_begin: u8;
        static baton_cpu_tiles_end: u8;
    }

    /// The assembler writes the encodings of Intel's manual (VEX.128, map 0F38, W0; opcodes 49, 4B, 5C and 5E).
    #[test]
    fn instructions_have_their_encodings() {
        // SAFETY: both labels lie in one piece of this program, the first before the second.
        let bytes = unsafe {
            let (begin, end) = (&raw const baton_cpu_tiles_begin, &raw const baton_cpu_tiles_end);
            std::slice::from_raw_parts(begin, end.offset_from(begin) as usize)
        };
        let expected: &[&[u8]] = &[
            &[0xc4, 0xe2, 0x78, 0x49, 0x00],
            &[0xc4, 0xe2, 0x7b, 0x49, 0xd8],
            &[0xc4, 0xe2, 0x7b, 0x4b, 0x2c, 0x18],
            &[0xc4, 0xe2, 0x7a, 0x4b, 0x1c, 0x18],
            &[0xc4, 0xe2, 0x4a, 0x5c, 0xdd],
            &[0xc4, 0xe2, 0x48, 0x5e, 0xdd],
            &[0xc4, 0xe2, 0x49, 0x5e, 0xdd],
            &[0xc4, 0xe2, 0x4a, 0x5e, 0xdd],
            &[0xc4, 0xe2, 0x4b, 0x5e, 0xdd],
            &[0xc4, 0xe2, 0x78, 0x49, 0xc0],
        ];
        assert_eq!(bytes, expected.concat());
    }
}
