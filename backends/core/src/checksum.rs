//! CRC32C as arithmetic: what a device and the wire have to agree on. A message is a polynomial over two elements, its checksum what
//! is left of it modulo P; the checksum of two messages in a row is that of the first, times x to the bits of the second, plus that of
//! the second. Used by devices that sum what they send, and by `kvtransfer`, which joins such sums.

/// P without x^32, the highest power in the lowest bit, as in every sum here.
pub const POLYNOMIAL: u32 = 0x82f6_3b78;

/// 1.
const ONE: u32 = 1 << 31;

/// The checksum of `bytes`, bit by bit: for tests.
pub fn of(bytes: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

/// `a b` modulo P.
pub const fn times(a: u32, b: u32) -> u32 {
    let (mut product, mut bit) = (0, 0);
    while bit < 32 {
        product = product >> 1 ^ if product & 1 == 1 { POLYNOMIAL } else { 0 };
        product ^= if a >> bit & 1 == 1 { b } else { 0 };
        bit += 1;
    }
    product
}

/// x^`power` modulo P.
pub const fn x_to(power: u64) -> u32 {
    let (mut value, mut square, mut left) = (ONE, ONE >> 1, power);
    while left > 0 {
        if left & 1 == 1 {
            value = times(value, square);
        }
        square = times(square, square);
        left >>= 1;
    }
    value
}

/// Multiplies by one power of x, a byte of the sum at a time.
pub struct Further(Box<[[u32; 256]; 4]>);

impl Further {
    /// As many `bytes` further on.
    pub fn new(bytes: u64) -> Self {
        let factor = x_to(8 * bytes);
        let mut tables = Box::new([[0; 256]; 4]);
        for (at, table) in tables.iter_mut().enumerate() {
            for (byte, product) in (0u32..).zip(table) {
                *product = times(byte << (8 * at), factor);
            }
        }
        Further(tables)
    }

    /// What `sum` is worth there.
    pub fn of(&self, sum: u32) -> u32 {
        let part = |at: usize| self.0[at][(sum >> (8 * at) & 0xff) as usize];
        part(0) ^ part(1) ^ part(2) ^ part(3)
    }

    /// Its tables, of the lowest byte first: `[4, 256]`.
    pub fn tables(&self) -> &[u32] {
        self.0.as_flattened()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_parts_make_that_of_the_whole() {
        // RFC 3720, B.4.
        assert_eq!(of(&[0; 32]), 0x8a91_36aa);
        let bytes: Vec<u8> = (0..600u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for (first, second) in [(1, 1), (4, 252), (100, 500), (599, 1)] {
            let (a, b) = bytes[..first + second].split_at(first);
            let joined = Further::new(second as u64).of(of(a)) ^ of(b);
            assert_eq!(joined, of(&bytes[..first + second]), "{first} and {second} bytes");
        }
        assert_eq!(times(x_to(40), x_to(2000)), x_to(2040));
    }
}
