//! Draws the next token of a sequence. Pure: the same (seed, position, logits, tokens so far) give the same token on
//! every node and attempt, which is what lets a stream go on elsewhere. Called by the runner on the leader.
//!
//! The order of adjustments is vLLM's: bias, stop ids below `min_tokens`, repetition, frequency and presence penalties,
//! temperature, min-p, top-k, top-p. Log probabilities are those of the logits as the model gave them.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use crate::request::Request;

/// Below this temperature the most likely id is taken.
const TEMPERATURE_MIN: f32 = 1e-5;

/// First guess of how many ids hold the nucleus; grown eightfold until they do.
const NUCLEUS_GUESS: usize = 256;

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub id: u32,
    /// Its log probability, where asked for.
    pub logprob: Option<f32>,
    /// The most likely ids with theirs, where asked for, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why nothing can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is no number.
    #[error("logit of id {id} at position {position} is {value}")]
    NotFinite {
        /// Vocabulary id.
        id: usize,
        /// Position of the token to be drawn.
        position: usize,
        /// The logit.
        value: f32,
    },
    /// Bias and stop ids leave no id.
    #[error("all {vocabulary} ids are masked at position {position}")]
    Masked {
        /// Number of logits.
        vocabulary: usize,
        /// Position of the token to be drawn.
        position: usize,
    },
}

/// Draws the token at position `request.tokens.len()` from `logits`, one per vocabulary id.
pub fn sample(logits: &[f32], request: &Request) -> Result<Sampled, SampleError> {
    let position = request.tokens.len();
    if let Some((id, value)) = not_finite(logits) {
        return Err(SampleError::NotFinite { id, position, value });
    }
    let adjusted = adjust(logits, request);
    let id = if request.sampling.temperature < TEMPERATURE_MIN {
        most_likely(&adjusted)
    } else {
        draw(&adjusted, request, uniform(request.sampling.seed, position as u64))
    };
    let id = id.ok_or(SampleError::Masked { vocabulary: logits.len(), position })?;
    let (logprob, top) = report(logits, id, request);
    Ok(Sampled { id, logprob, top })
}

/// A number in [0, 1) that depends on seed and position alone (the finaliser of SplitMix64, twice).
pub fn uniform(seed: u64, position: u64) -> f64 {
    fn mix(mut x: u64) -> u64 {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    let counter = position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mix(mix(seed ^ 0x6261_746f_6e00_0001).wrapping_add(counter)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Logits after bias, masks and penalties; borrowed when there are none.
fn adjust<'a>(logits: &'a [f32], request: &Request) -> Cow<'a, [f32]> {
    let sampling = &request.sampling;
    let mut out = Cow::Borrowed(logits);
    for (&id, &bias) in &sampling.logit_bias {
        if let Some(x) = out.to_mut().get_mut(id as usize) {
            *x += bias;
        }
    }
    let output = request.tokens.get(request.output_start..).unwrap_or_default();
    if output.len() < request.min_tokens {
        for &id in &request.stop_ids {
            if let Some(x) = out.to_mut().get_mut(id as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    if sampling.repetition_penalty != 1.0 {
        let out = out.to_mut();
        for &id in &request.tokens.iter().collect::<HashSet<_>>() {
            if let Some(x) = out.get_mut(*id as usize) {
                let penalty = sampling.repetition_penalty;
                *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            }
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        let mut counts = HashMap::<u32, u32>::new();
        for &id in output {
            *counts.entry(id).or_default() += 1;
        }
        let out = out.to_mut();
        for (id, count) in counts {
            if let Some(x) = out.get_mut(id as usize) {
                *x -= sampling.frequency_penalty * count as f32;
                *x -= sampling.presence_penalty;
            }
        }
    }
    out
}

/// The first logit that is no finite number.
fn not_finite(logits: &[f32]) -> Option<(usize, f32)> {
    /// All bits of the exponent: infinities and NaN.
    const EXPONENT: u32 = 0x7f80_0000;
    // The greatest exponent of all first: without an early end the loop runs many at a time.
    let greatest = logits.iter().fold(0, |greatest, x| (x.to_bits() & EXPONENT).max(greatest));
    if greatest < EXPONENT {
        return None;
    }
    logits.iter().copied().enumerate().find(|(_, x)| !x.is_finite())
}

/// The greatest logit. In lanes, so that many are compared at a time.
fn greatest(logits: &[f32]) -> f32 {
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

/// One id of the kept ones, where `u` in [0, 1) falls when their masses lie side by side in order of id. (By id, not
/// by mass: two ids of almost equal mass may then swap places without changing what is drawn.)
fn draw(logits: &[f32], request: &Request, u: f64) -> Option<u32> {
    let sampling = &request.sampling;
    let (max, temperature) = (f64::from(greatest(logits)), f64::from(sampling.temperature));
    if max == f64::NEG_INFINITY {
        return None;
    }
    // Relative to the most likely id, whose mass is 1: exp((x - max) / temperature) >= min_p.
    let least = max + temperature * f64::from(sampling.min_p).ln();
    let mut kept: Vec<(u32, f64)> =
        (0..).zip(logits.iter().map(|&x| f64::from(x))).filter(|&(_, x)| x >= least).collect();
    let top_k = sampling.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k, by_mass);
        kept.truncate(top_k);
    }
    for (_, x) in &mut kept {
        *x = ((*x - max) / temperature).exp();
    }
    if sampling.top_p < 1.0 {
        keep_nucleus(&mut kept, f64::from(sampling.top_p));
    }
    kept.sort_unstable_by_key(|&(id, _)| id);
    let target = u * kept.iter().map(|&(_, m)| m).sum::<f64>();
    let mut sum = 0.0;
    for &(id, m) in &kept {
        sum += m;
        if target < sum {
            return Some(id);
        }
    }
    // Rounding may leave the target at the very end.
    kept.iter().rev().find(|(_, m)| *m > 0.0).map(|&(id, _)| id)
}

/// Keeps the most likely ids up to and including the one that brings their share to `top_p`.
fn keep_nucleus(kept: &mut Vec<(u32, f64)>, top_p: f64) {
    let target = top_p * kept.iter().map(|&(_, m)| m).sum::<f64>();
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

/// Log probabilities that the request asks for.
fn report(logits: &[f32], id: u32, request: &Request) -> (Option<f32>, Vec<(u32, f32)>) {
    let sampling = &request.sampling;
    if !sampling.logprobs {
        return (None, Vec::new());
    }
    let max = greatest(logits);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
    let norm = f64::from(max) + sum.ln();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - norm) as f32;
    let wanted = (sampling.top_logprobs as usize).min(logits.len());
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if wanted > 0 && wanted < ids.len() {
        ids.select_nth_unstable_by(wanted, order);
    }
    ids.truncate(wanted);
    ids.sort_unstable_by(order);
    (Some(logprob(id)), ids.into_iter().map(|id| (id, logprob(id))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Sampling;
    use proptest::prelude::*;

    fn request(sampling: Sampling) -> Request {
        Request { tokens: vec![0], output_start: 1, max_tokens: 8, sampling, ..Request::default() }
    }

    fn drawn(logits: &[f32], sampling: Sampling) -> u32 {
        sample(logits, &request(sampling)).expect("a token").id
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_greatest() {
        assert_eq!(drawn(&[1.0, 3.0, 3.0, 2.0], Sampling::default()), 1);
    }

    #[test]
    fn a_logit_that_is_no_number_is_named() {
        let error = sample(&[0.0, f32::NAN, 1.0], &request(Sampling::default())).unwrap_err();
        assert_eq!(error.to_string(), "logit of id 1 at position 1 is NaN");
        assert!(sample(&[0.0, f32::INFINITY], &request(Sampling::default())).is_err());
    }

    #[test]
    fn stop_ids_are_masked_below_min_tokens_only() {
        let mut r = request(Sampling::default());
        (r.stop_ids, r.min_tokens) = (vec![1], 1);
        assert_eq!(sample(&[1.0, 2.0], &r).unwrap().id, 0);
        r.tokens.push(0);
        assert_eq!(sample(&[1.0, 2.0], &r).unwrap().id, 1);
        (r.stop_ids, r.min_tokens) = (vec![0, 1], 9);
        assert_eq!(sample(&[1.0, 2.0], &r), Err(SampleError::Masked { vocabulary: 2, position: 2 }));
    }

    #[test]
    fn penalties_count_output_and_repetition_counts_the_prompt_too() {
        let mut r = request(Sampling { presence_penalty: 1.5, ..Sampling::default() });
        // Id 0 is in the prompt alone: presence leaves it.
        assert_eq!(sample(&[3.0, 2.0], &r).unwrap().id, 0);
        r.tokens.push(0);
        assert_eq!(sample(&[3.0, 2.0], &r).unwrap().id, 1);
        r.sampling = Sampling { frequency_penalty: 0.6, ..Sampling::default() };
        assert_eq!(sample(&[3.0, 2.0], &r).unwrap().id, 0);
        r.tokens.push(0);
        assert_eq!(sample(&[3.0, 2.0], &r).unwrap().id, 1);
        let mut r = request(Sampling { repetition_penalty: 2.0, ..Sampling::default() });
        assert_eq!(sample(&[3.0, 2.0], &r).unwrap().id, 1);
        r.sampling.repetition_penalty = 1.4;
        assert_eq!(sample(&[3.0, 2.0], &r).unwrap().id, 0);
        r.sampling.repetition_penalty = 2.0;
        assert_eq!(sample(&[-1.0, -1.5], &r).unwrap().id, 1);
    }

    #[test]
    fn bias_moves_the_choice_and_unknown_ids_do_nothing() {
        let logit_bias = [(0, 5.0), (99, 100.0)].into();
        assert_eq!(drawn(&[0.0, 1.0], Sampling { logit_bias, ..Sampling::default() }), 0);
    }

    #[test]
    fn logprobs_are_those_of_the_raw_logits() {
        let sampling = Sampling {
            logprobs: true,
            top_logprobs: 2,
            temperature: 0.3,
            top_k: 1,
            logit_bias: [(0, 50.0)].into(),
            ..Sampling::default()
        };
        let sampled = sample(&[1.0, 2.0, 3.0], &request(sampling)).unwrap();
        let norm = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln();
        assert_eq!(sampled.id, 0);
        assert!((f64::from(sampled.logprob.unwrap()) - (1.0 - norm)).abs() < 1e-6);
        let top: Vec<u32> = sampled.top.iter().map(|t| t.0).collect();
        assert_eq!(top, [2, 1]);
        assert!((f64::from(sampled.top[0].1) - (3.0 - norm)).abs() < 1e-6);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        // softmax([ln 1, ln 2, ln 7]) = [0.1, 0.2, 0.7]; the error of 20,000 draws is below 0.02 by five sigma.
        let logits = [1f32.ln(), 2f32.ln(), 7f32.ln()];
        let mut counts = [0u32; 3];
        for seed in 0..20_000 {
            counts[drawn(&logits, Sampling { temperature: 1.0, seed, ..Sampling::default() }) as usize] += 1;
        }
        for (count, p) in counts.iter().zip([0.1, 0.2, 0.7]) {
            assert!((f64::from(*count) / 20_000.0 - p).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn long_rows_are_searched_whole() {
        let mut logits: Vec<f32> = (0..1003).map(|i| -(i as f32)).collect();
        for id in [0, 15, 16, 17, 999, 1002] {
            logits[id] = 5.0 + id as f32;
            assert_eq!(most_likely(&logits), Some(id as u32));
            assert_eq!(not_finite(&logits), None);
        }
        logits[1001] = f32::NEG_INFINITY;
        assert_eq!(not_finite(&logits), Some((1001, f32::NEG_INFINITY)));
        assert_eq!(most_likely(&[f32::NEG_INFINITY; 40]), None);
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = [1f32.ln(), 2f32.ln(), 3f32.ln(), 4f32.ln()];
        let support = |sampling: Sampling| {
            let mut ids: Vec<u32> = (0..500)
                .map(|seed| drawn(&logits, Sampling { temperature: 1.0, seed, ..sampling.clone() }))
                .collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(support(Sampling { top_k: 2, ..Sampling::default() }), [2, 3]);
        // 0.4 < 0.45 <= 0.4 + 0.3
        assert_eq!(support(Sampling { top_p: 0.45, ..Sampling::default() }), [2, 3]);
        assert_eq!(support(Sampling { top_p: 0.39, ..Sampling::default() }), [3]);
        assert_eq!(support(Sampling { min_p: 0.45, ..Sampling::default() }), [1, 2, 3]);
        assert_eq!(support(Sampling::default()), [0, 1, 2, 3]);
    }

    proptest! {
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
            keep_nucleus(&mut kept, top_p);
            prop_assert_eq!(kept, sorted);
        }

        // What is drawn depends on seed and position alone, never on what was drawn before.
        #[test]
        fn uniform_is_a_function_in_the_unit_interval(seed: u64, position: u64) {
            let u = uniform(seed, position);
            prop_assert!((0.0..1.0).contains(&u));
            prop_assert_eq!(u, uniform(seed, position));
            prop_assert_ne!(u, uniform(seed, position.wrapping_add(1)));
            prop_assert_ne!(u, uniform(seed.wrapping_add(1), position));
        }
    }
}
