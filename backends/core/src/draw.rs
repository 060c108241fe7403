//! How the next token is drawn from a row of logits: the rule, and the function that hosts and devices compute alike, so
//! that a stream goes on elsewhere to the same tokens. Called by backends for [`crate::Out::Draw`], and by the engine
//! for rows that need logits on the host. Pure.
//!
//! A draw is the id of the greatest `logit / temperature + noise` among the ids that the filters keep, where the noise
//! of an id is a Gumbel variable that depends on seed, position and id alone: that id follows the softmax. Filters see
//! the logits over the temperature, in this order: min-p, top-k, top-p.

use std::cmp::Ordering;

/// Below this temperature the most likely id is taken.
pub const TEMPERATURE_MIN: f32 = 1e-5;

/// First guess of how many ids hold the nucleus; grown eightfold until they do.
const NUCLEUS_GUESS: usize = 256;

/// Rows of more ids are searched block by block.
const LONG: usize = 4096;
const BLOCK: usize = 64;

/// Greatest noise of any id, rounded up: `-ln(-ln(1 - 2^-33))`.
const NOISE_MAX: f64 = 22.9;

/// How a row's token is drawn: a pure function of these and the row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// 0: greedy, the lowest id of the greatest logit.
    pub temperature: f32,
    /// Most likely ids kept; 0: all.
    pub top_k: u32,
    /// The most likely ids are kept up to the one that brings their share to this, in (0, 1].
    pub top_p: f32,
    /// Least probability kept, relative to the most likely id's.
    pub min_p: f32,
    /// The request's.
    pub seed: u64,
    /// Position in the sequence of the token to be drawn.
    pub position: u64,
}

impl Rule {
    /// The most likely id.
    pub const GREEDY: Rule =
        Rule { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, position: 0 };

    /// Whether the most likely id is taken, whatever else the rule says.
    pub fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_MIN
    }

    /// Whether some ids may be left out.
    pub fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// What becomes of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Draw {
    /// The host gets the logits.
    Logits,
    /// The device draws an id, which the next step may use before the host knows it.
    Token(Rule),
}

/// What became of a row of logits.
#[derive(Clone, Debug, PartialEq)]
pub enum Drawn {
    /// One logit per vocabulary id.
    Logits(Vec<f32>),
    /// The id drawn.
    Token(u32),
    /// Nothing can be drawn: the logit of `id` is not a finite number. A later step takes id 0 in its place.
    NotFinite {
        /// The first such id.
        id: u32,
    },
}

/// The noise of one position of one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    /// Both words of its key.
    pub keys: [u32; 2],
}

impl Noise {
    /// Of the token at `position` (the finaliser of SplitMix64, twice).
    pub fn new(seed: u64, position: u64) -> Self {
        fn mix(mut x: u64) -> u64 {
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        }
        let counter = position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let key = mix(mix(seed ^ 0x6261_746f_6e00_0001).wrapping_add(counter));
        Noise { keys: [key as u32, (key >> 32) as u32] }
    }

    /// Shifts of a round of [`Noise::bits`] (Wellons' lowbias32).
    pub const SHIFTS: [u32; 3] = [16, 15, 16];

    /// Factors between the shifts.
    pub const FACTORS: [u32; 2] = [0x7feb_352d, 0x846c_a68b];

    /// 32 random bits of `id`: a round over `id ^ keys[0]`, and one over that plus `keys[1]`. A round is
    /// `x ^= x >> shift; x *= factor; x ^= x >> shift; x *= factor; x ^= x >> shift` in 32 bits, which every device has.
    pub fn bits(self, id: u32) -> u32 {
        let round = |x: u32| {
            let x = (x ^ (x >> Self::SHIFTS[0])).wrapping_mul(Self::FACTORS[0]);
            let x = (x ^ (x >> Self::SHIFTS[1])).wrapping_mul(Self::FACTORS[1]);
            x ^ (x >> Self::SHIFTS[2])
        };
        round(round(id ^ self.keys[0]).wrapping_add(self.keys[1]))
    }

    /// The Gumbel variable of `bits`: `-ln(-ln(1 - w))` with `w = (bits + 0.5) / 2^32`. Great values come of small `w`, where
    /// f32 is precise too.
    pub fn gumbel(bits: u32) -> f64 {
        let w = (f64::from(bits) + 0.5) / 4_294_967_296.0;
        -(-(-w).ln_1p()).ln()
    }

    /// Not less than [`Noise::gumbel`], and cheap: `w >= 2^-(zeros + 1)` and `-ln(1 - w) >= w`.
    fn bound(bits: u32) -> f64 {
        f64::from(bits.leading_zeros() + 1) * std::f64::consts::LN_2
    }
}

/// Draws an id from `logits`, one per vocabulary id, all finite or minus infinity (which is never drawn). `None`: all are.
pub fn draw(logits: &[f32], rule: &Rule) -> Option<u32> {
    if rule.is_greedy() {
        return most_likely(logits);
    }
    let max = greatest(logits);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let scaled = |x: f32| (f64::from(x) - f64::from(max)) / f64::from(rule.temperature);
    let noise = Noise::new(rule.seed, rule.position);
    let mut best = Best { score: f64::NEG_INFINITY, id: 0 };
    if rule.filters() {
        for id in kept(logits, rule, max, scaled) {
            best.offer(id, scaled(logits[id as usize]), noise);
        }
    } else {
        (0..).zip(logits).for_each(|(id, x)| best.offer(id, scaled(*x), noise));
    }
    Some(best.id)
}

/// The first logit that is no finite number.
pub fn not_finite(logits: &[f32]) -> Option<(usize, f32)> {
    /// All bits of the exponent: infinities and NaN.
    const EXPONENT: u32 = 0x7f80_0000;
    // The greatest exponent of all first: without an early end the loop runs many at a time.
    let greatest = logits.iter().fold(0, |greatest, x| (x.to_bits() & EXPONENT).max(greatest));
    if greatest < EXPONENT {
        return None;
    }
    logits.iter().copied().enumerate().find(|(_, x)| !x.is_finite())
}

/// What becomes of one row on a device that is a CPU.
pub fn drawn(logits: &[f32], draw: &Draw) -> Drawn {
    let Draw::Token(rule) = draw else { return Drawn::Logits(logits.to_vec()) };
    if let Some((id, _)) = not_finite(logits) {
        return Drawn::NotFinite { id: id as u32 };
    }
    // Finite logits always give an id; a row without any has no finite logit either.
    self::draw(logits, rule).map_or(Drawn::NotFinite { id: 0 }, Drawn::Token)
}

/// The greatest score so far.
struct Best {
    score: f64,
    id: u32,
}

impl Best {
    /// Considers `id`, whose logit relative to the greatest and over the temperature is `x`. Most ids are out of reach
    /// whatever their noise; the logarithms are for the others.
    fn offer(&mut self, id: u32, x: f64, noise: Noise) {
        if x + NOISE_MAX <= self.score {
            return;
        }
        let bits = noise.bits(id);
        if x + Noise::bound(bits) <= self.score {
            return;
        }
        let score = x + Noise::gumbel(bits);
        if score > self.score {
            *self = Best { score, id };
        }
    }
}

/// The greatest logit. In lanes, so that many are compared at a time.
pub fn greatest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = logits.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The id of the greatest logit, the lowest on ties.
fn most_likely(logits: &[f32]) -> Option<u32> {
    let max = greatest(logits);
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&x| x == max).map(|id| id as u32)
}

/// The ids that the filters of `rule` keep, in no order; at least the most likely one, whose logit is `max`.
fn kept(logits: &[f32], rule: &Rule, max: f32, scaled: impl Fn(f32) -> f64) -> Vec<u32> {
    // Relative to the most likely id, whose mass is 1.
    let least = f64::from(rule.min_p).ln();
    let top_k = rule.top_k as usize;
    // Of a long row most ids are out of reach, which takes a look at each less than keeping them would.
    let long = logits.len() > LONG;
    let total = (long && top_k == 0 && rule.top_p < 1.0)
        .then(|| total_mass(logits, max, rule.temperature, least as f32));
    // The logit of a mass's logarithm, rounded down.
    let logit = |x: f64| ((f64::from(max) + x * f64::from(rule.temperature)) as f32).next_down();
    let floor = match total {
        // Even all ids of this mass would be less than what the nucleus leaves out, by half.
        Some(total) => logit(((1.0 - f64::from(rule.top_p)) * total / (2.0 * logits.len() as f64)).ln()),
        None if long && top_k > 0 => top_k_floor(logits, top_k),
        None => f32::NEG_INFINITY,
    };
    let floor = floor.max(logit(least));
    let mut kept: Vec<(u32, f64)> = (0..)
        .zip(logits)
        .filter(|&(_, &x)| x >= floor && x > f32::NEG_INFINITY)
        .map(|(id, &x)| (id, scaled(x)))
        .filter(|&(_, x)| x >= least)
        .collect();
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k, by_mass);
        kept.truncate(top_k);
    }
    if rule.top_p < 1.0 {
        kept.iter_mut().for_each(|(_, x)| *x = x.exp());
        let total = total.unwrap_or_else(|| kept.iter().map(|&(_, m)| m).sum());
        keep_nucleus(&mut kept, f64::from(rule.top_p) * total);
    }
    kept.into_iter().map(|(id, _)| id).collect()
}

/// No more than the logit of the `top_k`th most likely id: as many blocks have one as great as their own greatest.
fn top_k_floor(logits: &[f32], top_k: usize) -> f32 {
    let mut blocks: Vec<f32> = logits.chunks(BLOCK).map(greatest).collect();
    if top_k > blocks.len() {
        return f32::NEG_INFINITY;
    }
    *blocks.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a)).1
}

/// The sum of `e^((x - max) / temperature)` over all logits for which the exponent is at least `least`, to a few millionths: in
/// operations of which the compiler makes many at a time.
fn total_mass(logits: &[f32], max: f32, temperature: f32, least: f32) -> f64 {
    // Taylor's series of 2^x.
    const SERIES: [f32; 7] =
        [1.0, std::f32::consts::LN_2, 0.240_226_5, 0.055_504_11, 0.009_618_13, 0.001_333_36, 0.000_154_04];
    // What is added to this has its whole part in the lowest bits.
    const WHOLE: f32 = 12_582_912.0;
    // Powers of two from here on are normal numbers.
    const LOWEST: f32 = -126.0;
    let (scale, least) = (std::f32::consts::LOG2_E / temperature, least * std::f32::consts::LOG2_E);
    let mass = |x: f32| {
        let x = (x - max) * scale;
        let x = if x > LOWEST { x } else { LOWEST };
        let whole = x + WHOLE;
        let part = x - (whole - WHOLE);
        let power = f32::from_bits((whole.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
        let mass = SERIES.iter().rev().fold(0.0, |sum, factor| sum * part + factor) * power;
        if x >= least { mass } else { 0.0 }
    };
    let mut total = 0.0;
    for block in logits.chunks(BLOCK) {
        let mut lanes = [0f32; 16];
        let chunks = block.chunks_exact(lanes.len());
        let rest: f32 = chunks.remainder().iter().map(|x| mass(*x)).sum();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += mass(*x);
            }
        }
        total += f64::from(lanes.iter().sum::<f32>() + rest);
    }
    total
}

/// Keeps the most likely ids up to and including the one that brings their mass to `target`.
fn keep_nucleus(kept: &mut Vec<(u32, f64)>, target: f64) {
    let mut head = NUCLEUS_GUESS;
    loop {
        let all = head >= kept.len();
        if !all {
            kept.select_nth_unstable_by(head, by_mass);
        }
        let end = head.min(kept.len());
        kept[..end].sort_unstable_by(by_mass);
        let mut sum = 0.0;
        let nucleus = kept[..end].iter().position(|&(_, m)| {
            sum += m;
            sum >= target
        });
        if let Some(last) = nucleus {
            kept.truncate(last + 1);
            return;
        }
        if all {
            return;
        }
        head *= 8;
    }
}

/// Greatest mass (or logit) first, then lowest id.
fn by_mass(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WARM: Rule = Rule { temperature: 1.0, ..Rule::GREEDY };

    #[test]
    fn greedy_takes_the_lowest_id_of_the_greatest() {
        assert_eq!(draw(&[1.0, 3.0, 3.0, 2.0], &Rule::GREEDY), Some(1));
        assert_eq!(draw(&[f32::NEG_INFINITY; 40], &Rule::GREEDY), None);
        assert_eq!(draw(&[f32::NEG_INFINITY; 40], &WARM), None);
    }

    #[test]
    fn long_rows_are_searched_whole() {
        let mut logits: Vec<f32> = (0..1003).map(|i| -(i as f32)).collect();
        for id in [0, 15, 16, 17, 999, 1002] {
            logits[id] = 5.0 + id as f32;
            assert_eq!(draw(&logits, &Rule::GREEDY), Some(id as u32));
            assert_eq!(not_finite(&logits), None);
        }
        logits[1001] = f32::NEG_INFINITY;
        assert_eq!(not_finite(&logits), Some((1001, f32::NEG_INFINITY)));
    }

    /// softmax([ln 1, ln 2, ln 7]) = [0.1, 0.2, 0.7]; the error of 20,000 draws is below 0.02 by five sigma.
    #[test]
    fn draws_follow_the_probabilities_by_seed_and_by_position() {
        let logits = [1f32.ln(), 2f32.ln(), 7f32.ln()];
        for by_seed in [true, false] {
            let mut counts = [0u32; 3];
            for i in 0..20_000 {
                let (seed, position) = if by_seed { (i, 7) } else { (7, i) };
                counts[draw(&logits, &Rule { seed, position, ..WARM }).unwrap() as usize] += 1;
            }
            for (count, p) in counts.iter().zip([0.1, 0.2, 0.7]) {
                assert!((f64::from(*count) / 20_000.0 - p).abs() < 0.02, "{counts:?}");
            }
        }
    }

    /// A flat row of many ids: each part of the vocabulary is drawn as often as it is long.
    #[test]
    fn every_id_can_be_drawn() {
        let logits = vec![0.5; 4000];
        let mut counts = [0u32; 8];
        for seed in 0..8000 {
            counts[draw(&logits, &Rule { seed, ..WARM }).unwrap() as usize / 500] += 1;
        }
        // 1000 each, five sigma are 150.
        assert!(counts.iter().all(|count| count.abs_diff(1000) < 150), "{counts:?}");
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = [1f32.ln(), 2f32.ln(), 3f32.ln(), 4f32.ln()];
        let support = |rule: Rule| {
            let mut ids: Vec<u32> =
                (0..500).map(|seed| draw(&logits, &Rule { seed, ..rule }).unwrap()).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(support(Rule { top_k: 2, ..WARM }), [2, 3]);
        // 0.4 < 0.45 <= 0.4 + 0.3
        assert_eq!(support(Rule { top_p: 0.45, ..WARM }), [2, 3]);
        assert_eq!(support(Rule { top_p: 0.39, ..WARM }), [3]);
        assert_eq!(support(Rule { min_p: 0.45, ..WARM }), [1, 2, 3]);
        assert_eq!(support(WARM), [0, 1, 2, 3]);
    }

    /// The noise is part of what nodes agree on: it never changes, or streams that move would break.
    #[test]
    fn noise_is_fixed() {
        let noise = Noise::new(1, 2);
        assert_eq!(noise.keys, [557_671_280, 4_169_253_250]);
        let bits = [0, 1, 2, 151_935].map(|id| noise.bits(id));
        assert_eq!(bits, [1_499_182_773, 416_267_024, 3_803_443_020, 2_919_581_624]);
    }

    /// What is out of reach in a long row changes nothing: filters keep what they keep of all ids, whose masses are summed one by
    /// one, but for ids that bring the share to within the error of the sum.
    #[test]
    fn long_rows_keep_what_short_ones_would() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let mut narrowed = 0;
        for (len, spread) in [(4097, 3.0), (20_000, 30.0), (128_256, 12.0), (151_936, 40.0), (5000, 0.0)] {
            let mut logits: Vec<f32> =
                (0..len).map(|_| 1.0 + spread * (uniform() + uniform() - uniform())).collect();
            logits[len / 2] = f32::NEG_INFINITY;
            let max = greatest(&logits);
            for (top_k, top_p, min_p) in [
                (1, 1.0, 0.0),
                (40, 0.95, 0.0),
                (3000, 1.0, 0.0),
                (0, 0.9, 0.0),
                (0, 0.999, 0.0),
                (0, 0.5, 0.02),
                (0, 1e-6, 0.0),
                (0, 1.0, 0.05),
                (500, 0.95, 0.01),
            ] {
                let rule = Rule { temperature: 0.7, top_k, top_p, min_p, ..Rule::GREEDY };
                let scaled = |x: f32| (f64::from(x) - f64::from(max)) / 0.7f32 as f64;
                let mut all: Vec<(u32, f64)> = (0..)
                    .zip(logits.iter().map(|x| scaled(*x)))
                    .filter(|(_, x)| *x >= f64::from(min_p).ln() && *x > f64::NEG_INFINITY)
                    .collect();
                all.sort_unstable_by(by_mass);
                all.truncate(if top_k > 0 { top_k as usize } else { len });
                let total: f64 = all.iter().map(|(_, x)| x.exp()).sum();
                let share = |ids: usize| all[..ids].iter().map(|(_, x)| x.exp()).sum::<f64>() / total;
                let mut got = kept(&logits, &rule, max, scaled);
                let count = got.len();
                narrowed += usize::from(count < all.len());
                got.sort_unstable();
                let mut want: Vec<u32> = all[..count].iter().map(|(id, _)| *id).collect();
                want.sort_unstable();
                assert!(got == want, "{rule:?} of {len}");
                if top_p < 1.0 {
                    let target = f64::from(top_p);
                    assert!(share(count) > target - 1e-5, "{rule:?} of {len}");
                    assert!(count == 1 || share(count - 1) < target + 1e-5, "{rule:?} of {len}");
                } else {
                    assert_eq!(count, all.len());
                }
            }
        }
        assert!(narrowed > 10);
    }

    proptest! {
        // The search that leaves out what is out of reach finds the greatest score.
        #[test]
        fn the_greatest_score_wins(
            logits in prop::collection::vec(-30f32..30.0, 1..600),
            temperature in 0.05f32..5.0,
            seed: u64,
            position in 0u64..1000,
        ) {
            let rule = Rule { temperature, seed, position, ..Rule::GREEDY };
            let noise = Noise::new(seed, position);
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let score = |id: u32| {
                let x = (f64::from(logits[id as usize]) - f64::from(max)) / f64::from(temperature);
                x + Noise::gumbel(noise.bits(id))
            };
            let best = (0..logits.len() as u32).max_by(|a, b| score(*a).total_cmp(&score(*b)));
            prop_assert_eq!(draw(&logits, &rule), best);
        }

        #[test]
        fn the_bound_holds(bits: u32, shift in 0u32..32) {
            let bits = bits >> shift;
            prop_assert!(Noise::gumbel(bits) <= Noise::bound(bits));
            prop_assert!(Noise::gumbel(bits) <= NOISE_MAX);
        }

        // The partial selection finds the same nucleus as sorting everything.
        #[test]
        fn nucleus_is_the_smallest_that_reaches_its_share(
            masses in prop::collection::vec(1e-6f64..1.0, 1..3000),
            top_p in 0.01f64..0.999,
        ) {
            let mut kept: Vec<(u32, f64)> = (0..).zip(masses.iter().copied()).collect();
            let mut sorted = kept.clone();
            sorted.sort_by(by_mass);
            let target = top_p * masses.iter().sum::<f64>();
            let mut sum = 0.0;
            let end = sorted.iter().position(|&(_, m)| { sum += m; sum >= target }).unwrap_or(sorted.len() - 1);
            sorted.truncate(end + 1);
            keep_nucleus(&mut kept, target);
            prop_assert_eq!(kept, sorted);
        }
    }
}
