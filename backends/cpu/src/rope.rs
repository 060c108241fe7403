//! Angles of the rotary embedding. Sine and cosine are computed here, in plain f64 arithmetic, so that every machine
//! gets the same bits whatever its system library.

use std::sync::Arc;

use backend::{Batch, Rope};

/// Cosines and sines of every row of a step: `[rows, frequencies]` each, factor included.
#[derive(Debug)]
pub(crate) struct Angles {
    inv_freq: Arc<[f32]>,
    factor: f32,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// The angles that a step's layers ask for; kept between steps for their memory.
#[derive(Debug, Default)]
pub(crate) struct AngleTable {
    made: Vec<Angles>,
    /// Of these so many are of this step's rows.
    used: usize,
}

impl AngleTable {
    /// Forgets the rows of the step before.
    pub(crate) fn begin(&mut self) {
        self.used = 0;
    }

    /// Where the angles of `rope` are for the rows of `batch`; computed when asked for the first time.
    pub(crate) fn of(&mut self, rope: &Rope, batch: &Batch) -> usize {
        if let Some(at) = self.made[..self.used].iter().position(|angles| angles.are_of(rope)) {
            return at;
        }
        if self.used == self.made.len() {
            let (cos, sin) = (Vec::new(), Vec::new());
            self.made.push(Angles { inv_freq: rope.inv_freq.clone(), factor: rope.factor, cos, sin });
        }
        self.made[self.used].fill(rope, batch);
        self.used += 1;
        self.used - 1
    }

    pub(crate) fn at(&self, at: usize) -> &Angles {
        &self.made[at]
    }
}

impl Angles {
    fn fill(&mut self, rope: &Rope, batch: &Batch) {
        (self.inv_freq, self.factor) = (rope.inv_freq.clone(), rope.factor);
        self.cos.clear();
        self.sin.clear();
        for position in batch.runs.iter().flat_map(|run| run.start..run.start + run.len) {
            for frequency in rope.inv_freq.iter() {
                // The angle is an f32 product, as in the reference implementations.
                let (s, c) = sine_cosine(f64::from(frequency * position as f32));
                self.cos.push(c as f32 * rope.factor);
                self.sin.push(s as f32 * rope.factor);
            }
        }
    }

    /// Cosines and sines of one row.
    pub(crate) fn of(&self, row: usize, frequencies: usize) -> (&[f32], &[f32]) {
        let of = row * frequencies..(row + 1) * frequencies;
        (&self.cos[of.clone()], &self.sin[of])
    }

    /// Whether these are the angles of `rope` (for the same rows).
    fn are_of(&self, rope: &Rope) -> bool {
        self.factor.to_bits() == rope.factor.to_bits()
            && (Arc::ptr_eq(&self.inv_freq, &rope.inv_freq) || self.inv_freq == rope.inv_freq)
    }
}

/// Sine and cosine of `0 <= x < 2^22`, within 2e-15. Source: fdlibm's reduction and polynomials.
fn sine_cosine(x: f64) -> (f64, f64) {
    // pi / 2 in three parts of 33 bits: products with a whole number below 2^20 are exact.
    const PART_1: f64 = 1.570_796_326_734_125_6;
    const PART_2: f64 = 6.077_100_506_303_966e-11;
    const PART_3: f64 = 2.022_266_248_711_166_5e-21;
    let n = (x * std::f64::consts::FRAC_2_PI).round();
    let r = ((x - n * PART_1) - n * PART_2) - n * PART_3;
    let z = r * r;
    let mut sine = 1.589_690_995_211_55e-10;
    for c in [
        -2.505_076_025_340_686e-8,
        2.755_731_370_707_007e-6,
        -1.984_126_982_985_795e-4,
        8.333_333_333_322_49e-3,
        -1.666_666_666_666_663e-1,
    ] {
        sine = sine * z + c;
    }
    let sine = r + r * z * sine;
    let mut cosine = -1.135_964_755_778_819_5e-11;
    for c in [
        2.087_572_321_298_175e-9,
        -2.755_731_435_139_066e-7,
        2.480_158_728_947_673e-5,
        -1.388_888_888_887_411e-3,
        4.166_666_666_666_66e-2,
    ] {
        cosine = cosine * z + c;
    }
    let cosine = 1.0 - 0.5 * z + z * z * cosine;
    match n as i64 & 3 {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Angles of the longest contexts are as good as the system's.
    #[test]
    fn sine_and_cosine_are_exact_to_f32() {
        let mut worst = 0f64;
        for step in 0..200_000 {
            let x = f64::from((step as f32) * 5.237 + (step % 97) as f32 * 0.01);
            let (s, c) = sine_cosine(x);
            worst = worst.max((s - x.sin()).abs()).max((c - x.cos()).abs());
        }
        assert!(worst < 2e-15, "{worst:e}");
    }
}
