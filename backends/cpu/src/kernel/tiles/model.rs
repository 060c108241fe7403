//! Tiles as Intel's manual describes them (Software Developer's Manual, volume 2, TDPBF16PS and TDPBSSD), in plain code: what the
//! blocking is tested with where no processor has them, and what the emulator computes with. Sums of even and odd inputs
//! of a tile are apart and then join. `None` is what the processor raises a fault for.

use super::{ROW_BYTES, ROWS, Shape, Unit};

/// Eight tiles and their sizes.
#[derive(Debug)]
pub(in crate::kernel) struct Tiles {
    shape: Option<Shape>,
    bytes: [[[u8; ROW_BYTES]; ROWS]; 8],
}

impl Tiles {
    /// Without sizes, as in a thread that begins.
    pub const fn new() -> Self {
        Tiles { shape: None, bytes: [[[0; ROW_BYTES]; ROWS]; 8] }
    }

    /// Rows, and bytes per row, of a tile.
    fn size(&self, tile: usize) -> Option<(usize, usize)> {
        let shape = self.shape.as_ref()?;
        Some((shape.rows[tile].into(), shape.row_bytes[tile].into()))
    }

    fn word(&self, tile: usize, row: usize, word: usize) -> u32 {
        let at = &self.bytes[tile][row][word * 4..][..4];
        u32::from_le_bytes([at[0], at[1], at[2], at[3]])
    }

    pub fn configure(&mut self, shape: &Shape) -> Option<()> {
        let plain = (shape.palette, shape.start, shape.reserved) == (1, 0, [0; 14]);
        let has_size = |tile: usize| {
            (1..=16).contains(&shape.rows[tile]) && (1..=ROW_BYTES as u16).contains(&shape.row_bytes[tile])
        };
        let others = (8..16).all(|tile| shape.rows[tile] == 0 && shape.row_bytes[tile] == 0);
        (plain && (0..8).all(has_size) && others)
            .then(|| *self = Tiles { shape: Some(*shape), ..Tiles::new() })
    }

    pub fn zero(&mut self, tile: usize) -> Option<()> {
        self.size(tile)?;
        self.bytes[tile] = [[0; ROW_BYTES]; ROWS];
        Some(())
    }

    /// # Safety
    /// The tile's rows can be read, `stride` bytes apart.
    pub unsafe fn load(&mut self, tile: usize, from: *const u8, stride: usize) -> Option<()> {
        let (rows, bytes) = self.size(tile)?;
        self.zero(tile)?;
        for (row, line) in self.bytes[tile][..rows].iter_mut().enumerate() {
            // SAFETY: the caller's rows.
            unsafe { std::ptr::copy_nonoverlapping(from.add(row * stride), line.as_mut_ptr(), bytes) };
        }
        Some(())
    }

    /// # Safety
    /// The tile's rows can be written, `stride` bytes apart.
    pub unsafe fn store(&self, tile: usize, to: *mut u8, stride: usize) -> Option<()> {
        let (rows, bytes) = self.size(tile)?;
        for (row, line) in self.bytes[tile][..rows].iter().enumerate() {
            // SAFETY: the caller's rows.
            unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), to.add(row * stride), bytes) };
        }
        Some(())
    }

    /// Rows and columns of `d` and words of a sum, where `d += a b` has such.
    fn product(&self, d: usize, a: usize, b: usize) -> Option<(usize, usize, usize)> {
        let ((rows, bytes), (a_rows, a_bytes), (b_rows, b_bytes)) =
            (self.size(d)?, self.size(a)?, self.size(b)?);
        let apart = d != a && d != b && a != b;
        let fits = rows == a_rows && bytes == b_bytes && a_bytes == b_rows * 4;
        (apart && fits).then_some((rows, bytes / 4, b_rows))
    }

    /// `d += a b` of 32 bits and fours of bytes, with signs or without.
    pub fn multiply_bytes(&mut self, d: usize, a: usize, b: usize, signed: (bool, bool)) -> Option<()> {
        let (rows, columns, words) = self.product(d, a, b)?;
        let number = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
        for row in 0..rows {
            for column in 0..columns {
                let mut sum = self.word(d, row, column) as i32;
                for word in 0..words {
                    let (x, w) = (self.word(a, row, word), self.word(b, word, column));
                    for (x, w) in x.to_le_bytes().into_iter().zip(w.to_le_bytes()) {
                        sum = sum.wrapping_add(number(x, signed.0) * number(w, signed.1));
                    }
                }
                self.bytes[d][row][column * 4..][..4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        Some(())
    }

    /// `d += a b` of f32 and pairs of bf16.
    pub fn multiply(&mut self, d: usize, a: usize, b: usize) -> Option<()> {
        let (rows, columns, pairs) = self.product(d, a, b)?;
        for row in 0..rows {
            for column in 0..columns {
                let (mut even, mut odd) = (0f32, 0f32);
                for pair in 0..pairs {
                    let (x, w) = (self.word(a, row, pair), self.word(b, pair, column));
                    even = flushed(low(x).mul_add(low(w), even));
                    odd = flushed(high(x).mul_add(high(w), odd));
                }
                let held = f32::from_bits(self.word(d, row, column));
                let sum = flushed(flushed(held) + flushed(even + odd));
                self.bytes[d][row][column * 4..][..4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        Some(())
    }

    pub fn release(&mut self) {
        self.shape = None;
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
        Tiles::configure(self, shape).expect("sizes");
    }

    unsafe fn zero<const D: usize>(&mut self) {
        Tiles::zero(self, D).expect("a tile");
    }

    unsafe fn load<const D: usize>(&mut self, from: *const u8, stride_bytes: usize) {
        // SAFETY: the caller's.
        unsafe { Tiles::load(self, D, from, stride_bytes) }.expect("a tile");
    }

    unsafe fn store<const D: usize>(&mut self, to: *mut u8, stride_bytes: usize) {
        // SAFETY: the caller's.
        unsafe { Tiles::store(self, D, to, stride_bytes) }.expect("a tile");
    }

    unsafe fn multiply<const D: usize, const A: usize, const B: usize>(&mut self) {
        Tiles::multiply(self, D, A, B).expect("tiles that go together");
    }

    unsafe fn multiply_bytes<
        const D: usize,
        const A: usize,
        const B: usize,
        const A_SIGNED: bool,
        const B_SIGNED: bool,
    >(
        &mut self,
    ) {
        Tiles::multiply_bytes(self, D, A, B, (A_SIGNED, B_SIGNED)).expect("tiles that go together");
    }

    unsafe fn release(&mut self) {
        Tiles::release(self);
    }
}
