//! What few rows ask for ahead of use, of panels that are read side by side from end to end: early into the second cache, which waits
//! for more lines of memory at once, and then into the first.

use super::codes::plane_bits;
use crate::lanes::Lanes;

/// Bytes ahead of use, of all panels together: for the first cache, and for the second.
const NEAR_BYTES: usize = 4096;
const FAR_BYTES: usize = 10240;

/// Bytes of the codes of 32 inputs.
pub(super) const fn chunk_bytes(code: usize) -> usize {
    match plane_bits(code) {
        0 => 512,
        bits => bits * 64,
    }
}

/// Bytes from `at` in some panels of `panel_bytes` to what is asked for there, `own` ahead in each: what lies behind, and at the end of
/// the panels that much of those which are so many bytes behind them.
#[inline(always)]
pub(super) fn behind(panel_bytes: usize, next: usize, at: usize, own: usize) -> usize {
    if at + own < panel_bytes { own } else { own.wrapping_add(next).wrapping_sub(panel_bytes) }
}

/// Bytes from the first of some panels to the `P` that come after `P` of them, or to what is read then.
#[inline(always)]
pub(super) fn next<const P: usize>(
    panel_bytes: usize,
    first: *const u8,
    left: usize,
    soon: *const u8,
) -> usize {
    if left > P { P * panel_bytes } else { soon.addr().wrapping_sub(first.addr()) }
}

/// Bytes from some place in panels to what is asked for there.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    near: usize,
    far: usize,
}

impl Ahead {
    /// From `at` in each of `P` panels; those that come next begin `next` bytes behind the first of them.
    #[inline(always)]
    pub(super) fn of<const P: usize>(panel_bytes: usize, next: usize, at: usize) -> Self {
        Ahead {
            near: behind(panel_bytes, next, at, NEAR_BYTES / P),
            far: behind(panel_bytes, next, at, FAR_BYTES / P),
        }
    }

    /// Asks for what is so far behind `at`.
    #[inline(always)]
    fn ask<V: Lanes>(self, at: *const u8) {
        // SAFETY: any address will do.
        unsafe {
            V::prefetch_far(at.wrapping_add(self.far));
            V::prefetch(at.wrapping_add(self.near));
        }
    }

    /// Asks for what lies behind the scales of a block of `P` panels.
    #[inline(always)]
    pub(super) fn ask_scales<V: Lanes, const P: usize>(
        self,
        panel_bytes: usize,
        block: *const u8,
        bytes: usize,
    ) {
        for line in 0..bytes / 64 {
            for p in 0..P {
                self.ask::<V>(block.wrapping_add(p * panel_bytes + line * 64));
            }
        }
    }

    /// Asks for what lies behind octet `octet` of a chunk of `P` panels.
    #[inline(always)]
    pub(super) fn ask_octet<V: Lanes, const CODE: usize, const P: usize>(
        self,
        panel_bytes: usize,
        chunk: *const u8,
        octet: usize,
    ) {
        let octet_bytes = const { chunk_bytes(CODE) / 4 };
        for line in octet * octet_bytes / 64..(octet + 1) * octet_bytes / 64 {
            for p in 0..P {
                self.ask::<V>(chunk.wrapping_add(p * panel_bytes + line * 64));
            }
        }
    }
}
