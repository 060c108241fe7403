//! Tiles as Intel's manual describes them (Software Developer's Manual, volume 2, TDPBF16PS), in plain code: what the
//! blocking is tested with where no processor has them. Sums of even and odd inputs of a tile are apart and then join.

use super::{ROW_BYTES, ROWS, Shape, Unit};

/// Eight tiles and their sizes.
#[derive(Debug)]
pub(super) struct Tiles {
    shape: Option<Shape>,
    bytes: [[[u8; ROW_BYTES]; ROWS]; 8],
}

impl Default for Tiles {
    fn default() -> Self {
        Tiles { shape: None, bytes: [[[0; ROW_BYTES]; ROWS]; 8] }
    }
}

impl Tiles {
    /// Rows, and bytes per row, of a tile.
    fn size(&self, tile: usize) -> (usize, usize) {
        let Some(shape) = &self.shape else { panic!("tile {tile} before its size") };
        (shape.rows[tile].into(), shape.row_bytes[tile].into())
    }

    fn word(&self, tile: usize, row: usize, word: usize) -> u32 {
        let at = &self.bytes[tile][row][word * 4..][..4];
        u32::from_le_bytes([at[0], at[1], at[2], at[3]])
    }
}

/// Numbers below the normal ones count as zero.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn low(word: u32) -> f32 {
    flushed(f32::from_bits(word << 16))
}

fn high(word: u32) -> f32 {
    flushed(f32::from_bits(word & 0xffff_0000))
}

impl Unit for Tiles {
    unsafe fn configure(&mut self, shape: &Shape) {
        assert_eq!((shape.palette, shape.start, shape.reserved), (1, 0, [0; 14]));
        for tile in 0..8 {
            let (rows, bytes) = (shape.rows[tile], shape.row_bytes[tile]);
            assert!(
                (1..=16).contains(&rows) && (1..=64).contains(&bytes),
                "tile {tile}: {rows} rows of {bytes}"
            );
        }
        *self = Tiles { shape: Some(*shape), ..Tiles::default() };
    }

    unsafe fn zero<const D: usize>(&mut self) {
        self.size(D);
        self.bytes[D] = [[0; ROW_BYTES]; ROWS];
    }

    unsafe fn load<const D: usize>(&mut self, from: *const u8, stride_bytes: usize) {
        let (rows, bytes) = self.size(D);
        self.bytes[D] = [[0; ROW_BYTES]; ROWS];
        for (row, line) in self.bytes[D][..rows].iter_mut().enumerate() {
            // SAFETY: the caller's rows.
            unsafe { std::ptr::copy_nonoverlapping(from.add(row * stride_bytes), line.as_mut_ptr(), bytes) };
        }
    }

    unsafe fn store<const D: usize>(&mut self, to: *mut u8, stride_bytes: usize) {
        let (rows, bytes) = self.size(D);
        for (row, line) in self.bytes[D][..rows].iter().enumerate() {
            // SAFETY: the caller's rows.
            unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), to.add(row * stride_bytes), bytes) };
        }
    }

    unsafe fn multiply<const D: usize, const A: usize, const B: usize>(&mut self) {
        let ((rows, bytes), (a_rows, a_bytes), (b_rows, b_bytes)) =
            (self.size(D), self.size(A), self.size(B));
        // What the instruction raises a fault for.
        assert!(rows == a_rows && bytes == b_bytes && a_bytes == b_rows * 4 && D != A && D != B && A != B);
        for row in 0..rows {
            for column in 0..bytes / 4 {
                let (mut even, mut odd) = (0f32, 0f32);
                for pair in 0..b_rows {
                    let (x, w) = (self.word(A, row, pair), self.word(B, pair, column));
                    even = flushed(low(x).mul_add(low(w), even));
                    odd = flushed(high(x).mul_add(high(w), odd));
                }
                let held = f32::from_bits(self.word(D, row, column));
                let sum = flushed(flushed(held) + flushed(even + odd));
                self.bytes[D][row][column * 4..][..4].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }

    unsafe fn release(&mut self) {
        self.shape = None;
    }
}
