//! Random weights in GGUF's formats: bits at random, scales such that numbers are about as large as those of a fresh layer.

use half::f16;

/// Formats of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ones in f32.
    Norm,
    F32,
    F16,
    Bf16,
    Q4_0,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
}

/// What llama.cpp's quantiser makes of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    All(Kind),
    /// The head in Q6_K.
    Most(Kind),
    /// Q4_K, half of the values' and inner weights and the head in Q6_K.
    Q4KM,
}

/// Recipes by name.
pub const RECIPES: [(&str, Recipe); 12] = [
    ("bf16", Recipe::All(Kind::Bf16)),
    ("f16", Recipe::All(Kind::F16)),
    ("q8_0", Recipe::All(Kind::Q8_0)),
    ("q4_0", Recipe::Most(Kind::Q4_0)),
    ("q2_k", Recipe::Most(Kind::Q2K)),
    ("q3_k", Recipe::Most(Kind::Q3K)),
    ("q4_k_m", Recipe::Q4KM),
    ("q5_k", Recipe::All(Kind::Q5K)),
    ("q6_k", Recipe::All(Kind::Q6K)),
    ("iq4_nl", Recipe::Most(Kind::Iq4Nl)),
    ("iq4_xs", Recipe::Most(Kind::Iq4Xs)),
    ("mxfp4", Recipe::Most(Kind::Mxfp4)),
];

impl Recipe {
    pub fn named(name: &str) -> Option<Recipe> {
        RECIPES.iter().find(|(known, _)| *known == name).map(|(_, recipe)| *recipe)
    }

    /// Of most matrices.
    pub fn matrix(self) -> Kind {
        match self {
            Recipe::All(kind) | Recipe::Most(kind) => kind,
            Recipe::Q4KM => Kind::Q4K,
        }
    }

    /// Of the table of tokens, which is the head too.
    pub fn head(self) -> Kind {
        match self {
            Recipe::All(kind) => kind,
            Recipe::Most(_) | Recipe::Q4KM => Kind::Q6K,
        }
    }

    /// Of the values' and the down projection of `layer`.
    pub fn finer(self, layer: usize, layers: usize) -> Kind {
        let finer = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        if self == Recipe::Q4KM && finer { Kind::Q6K } else { self.matrix() }
    }

    /// Of rows that blocks of 256 do not fit.
    pub fn short(self) -> Kind {
        match self.matrix() {
            Kind::Q2K | Kind::Q3K | Kind::Q4K | Kind::Q5K | Kind::Q6K | Kind::Iq4Xs => Kind::Q8_0,
            kind => kind,
        }
    }
}

impl Kind {
    /// The number in a file.
    pub fn id(self) -> u32 {
        match self {
            Kind::Norm | Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::Q4_0 => 2,
            Kind::Q8_0 => 8,
            Kind::Q2K => 10,
            Kind::Q3K => 11,
            Kind::Q4K => 12,
            Kind::Q5K => 13,
            Kind::Q6K => 14,
            Kind::Iq4Nl => 20,
            Kind::Iq4Xs => 23,
            Kind::Mxfp4 => 39,
            Kind::Bf16 => 30,
        }
    }

    /// Elements and bytes of a block.
    const fn block(self) -> (usize, usize) {
        match self {
            Kind::Norm | Kind::F32 => (1, 4),
            Kind::F16 | Kind::Bf16 => (1, 2),
            Kind::Q4_0 => (32, 18),
            Kind::Q8_0 => (32, 34),
            Kind::Q2K => (256, 84),
            Kind::Q3K => (256, 110),
            Kind::Q4K => (256, 144),
            Kind::Q5K => (256, 176),
            Kind::Q6K => (256, 210),
            Kind::Iq4Nl => (32, 18),
            Kind::Iq4Xs => (256, 136),
            Kind::Mxfp4 => (32, 17),
        }
    }

    pub fn bytes(self, elements: usize) -> usize {
        let (size, bytes) = self.block();
        elements / size * bytes
    }

    /// Fills whole blocks of a matrix of `inputs` columns.
    pub fn fill(self, random: &mut Random, inputs: usize, out: &mut [u8]) {
        // Root of the mean square: of a sum of `inputs` products it comes out as about 1.
        let size = 1.0 / (inputs as f32).sqrt();
        match self {
            Kind::Norm => out.as_chunks_mut::<4>().0.iter_mut().for_each(|x| *x = 1f32.to_le_bytes()),
            Kind::F32 => out.as_chunks_mut::<4>().0.iter_mut().for_each(|x| {
                let uniform = random.next() as i64 as f32 / i64::MAX as f32;
                *x = (uniform * size * 1.7).to_le_bytes();
            }),
            Kind::F16 | Kind::Bf16 => {
                // A random sign and fraction, one exponent.
                let (keep, exponent) = match self {
                    Kind::F16 => (0x83ff, f16::from_f32(size / 1.5).to_bits() & 0x7c00),
                    _ => (0x807f, half::bf16::from_f32(size / 1.5).to_bits() & 0x7f80),
                };
                for halves in out.chunks_mut(8) {
                    let bits = random.next().to_le_bytes();
                    for (at, half) in halves.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                        let bits = u16::from_le_bytes([bits[2 * at], bits[2 * at + 1]]);
                        *half = (bits & keep | exponent).to_le_bytes();
                    }
                }
            }
            _ => {
                for eight in out.chunks_mut(8) {
                    let bits = random.next().to_le_bytes();
                    eight.copy_from_slice(&bits[..eight.len()]);
                }
                for block in out.chunks_exact_mut(self.block().1) {
                    if self == Kind::Mxfp4 {
                        // A power of two.
                        block[0] = ((size / 2.8).to_bits() >> 23) as u8;
                        continue;
                    }
                    let mut put = |at: usize, x: f32| {
                        block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
                    };
                    match self {
                        Kind::Q8_0 => put(0, size / 74.0),
                        Kind::Q4_0 => put(0, size / 4.6),
                        Kind::Q6K => put(208, size / (74.0 * 18.5)),
                        Kind::Q3K => put(108, size / (18.5 * 2.3)),
                        Kind::Iq4Nl => put(0, size / 67.0),
                        Kind::Iq4Xs => put(0, size / (18.5 * 67.0)),
                        Kind::Q2K => {
                            put(80, size / 14.0);
                            put(82, size / 14.0 * 1.5);
                        }
                        // Minima take off what codes are above zero in the middle.
                        Kind::Q4K => {
                            put(0, size / 170.0);
                            put(2, size / 170.0 * 7.5);
                        }
                        _ => {
                            put(0, size / 340.0);
                            put(2, size / 340.0 * 15.5);
                        }
                    }
                }
            }
        }
    }
}

/// A stream of random bits.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
