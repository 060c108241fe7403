//! Activations: rows of floats that one operation of a step hands to the next.

use crate::memory::Floats;

/// An activation `[rows, width]`: f32 in memory, each value one of the step's dtype unless a product just made it.
#[derive(Debug)]
pub struct CpuAct {
    pub(crate) floats: Floats,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    /// Whether values are those of the step's dtype. A product's are not yet: the next operation rounds as it reads,
    /// and logits stay as they are.
    pub(crate) rounded: bool,
}

/// Raw rows that tasks use disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Raw(pub(crate) *mut f32);
// SAFETY: every task uses its own rows, see `each_row`.
unsafe impl Sync for Raw {}
// SAFETY: as above.
unsafe impl Send for Raw {}

impl Raw {
    pub(crate) fn row(self, row: usize, width: usize) -> *mut f32 {
        self.0.wrapping_add(row * width)
    }
}
