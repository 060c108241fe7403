//! Draws the next token of a sequence. Pure: the same (seed, position, logits, tokens so far) give the same token on
//! every node and attempt, which is what lets a stream go on elsewhere. Called by the runner on the leader, for what the
//! device does not draw itself; both draw by [`backend::draw`].
//!
//! The order of adjustments is vLLM's: grammar, bias, stop ids below `min_tokens`, repetition, frequency and presence
//! penalties, temperature, min-p, top-k, top-p. Log probabilities are those of the logits as the model gave them.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use backend::Rule;
use backend::draw::{draw, not_finite};
use grammar::Mask;

use crate::request::{Request, Sampling};
use crate::score::score;

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
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The output is against its grammar, or the grammar is too much work at this place.
    #[error(transparent)]
    Grammar(#[from] grammar::GrammarError),
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
pub fn sample(logits: &[f32], request: &mut Request) -> Result<Sampled, SampleError> {
    let output = request.tokens.get(request.output_start..).unwrap_or_default();
    let mask = request.grammar.as_mut().map(|grammar| grammar.next(output)).transpose()?;
    let request = &*request;
    let position = request.tokens.len();
    if let Some((id, value)) = not_finite(logits) {
        return Err(SampleError::NotFinite { id, position, value });
    }
    let adjusted = adjust(logits, request, mask.as_ref());
    let id = draw(&adjusted, &rule(&request.sampling, position));
    let id = id.ok_or(SampleError::Masked { vocabulary: logits.len(), position })?;
    let (logprob, top) = report(logits, id, request);
    Ok(Sampled { id, logprob, top })
}

/// How the token at `position` is drawn, on the host or on the device.
pub(crate) fn rule(sampling: &Sampling, position: usize) -> Rule {
    Rule {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        seed: sampling.seed,
        position: position as u64,
    }
}

/// How the device draws the token at `position`, which may lie beyond what is known of the answer. `None`: the host has
/// to, for it needs more than the logits, or tells more than the token.
pub fn on_device(request: &Request, position: usize) -> Option<Rule> {
    // All fields by name: whoever adds one decides here.
    let Request {
        id: _,
        attempt: _,
        tokens: _,
        output_start,
        max_tokens: _,
        min_tokens,
        stop_ids,
        ignore_eos: _,
        sampling,
        cache_salt: _,
        priority: _,
        grammar,
        prompt_logprobs: _,
        prediction: _,
    } = request;
    let Sampling {
        temperature: _,
        top_p: _,
        top_k: _,
        min_p: _,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        seed: _,
        logit_bias,
        logprobs,
        top_logprobs: _,
    } = sampling;
    let masked = position - output_start < *min_tokens && !stop_ids.is_empty();
    let penalised = *presence_penalty != 0.0 || *frequency_penalty != 0.0 || *repetition_penalty != 1.0;
    let plain = grammar.is_none() && !masked && !penalised && logit_bias.is_empty() && !logprobs;
    plain.then(|| rule(sampling, position))
}

/// Logits after bias, masks and penalties; borrowed when there are none.
fn adjust<'a>(logits: &'a [f32], request: &Request, mask: Option<&Mask>) -> Cow<'a, [f32]> {
    let sampling = &request.sampling;
    let mut out = Cow::Borrowed(logits);
    if let Some(mask) = mask {
        mask.apply(out.to_mut(), &request.stop_ids);
    }
    for (&id, &bias) in &sampling.logit_bias {
        if let Some(x) = out.to_mut().get_mut(id as usize) {
            *x += bias;
        }
    }
    let output = request.tokens.get(request.output_start..).unwrap_or_default();
    // A text that is complete ends, however short.
    let must_end = mask.is_some_and(|mask| mask.must_end);
    if output.len() < request.min_tokens && !must_end {
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

/// Log probabilities that the request asks for.
fn report(logits: &[f32], id: u32, request: &Request) -> (Option<f32>, Vec<(u32, f32)>) {
    let sampling = &request.sampling;
    if !sampling.logprobs {
        return (None, Vec::new());
    }
    let score = score(logits, id, sampling.top_logprobs as usize);
    (Some(score.logprob), score.top)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(sampling: Sampling) -> Request {
        Request { tokens: vec![0], output_start: 1, max_tokens: 8, sampling, ..Request::default() }
    }

    fn drawn(logits: &[f32], sampling: Sampling) -> u32 {
        sample(logits, &mut request(sampling)).expect("a token").id
    }

    /// Protects: the device draws only what it draws like the host.
    #[test]
    fn what_needs_more_than_logits_is_drawn_on_the_host() {
        let plain =
            Sampling { temperature: 0.5, top_k: 3, top_p: 0.9, min_p: 0.1, seed: 4, ..Sampling::default() };
        let asked = Request { min_tokens: 3, stop_ids: vec![1], ..request(plain.clone()) };
        // Output begins at 1: positions 1, 2 and 3 are masked.
        assert_eq!((on_device(&asked, 3), on_device(&asked, 4)), (None, Some(rule(&plain, 4))));
        assert_eq!(on_device(&Request { stop_ids: vec![], ..asked }, 3), Some(rule(&plain, 3)));
        let hosts = [
            Sampling { presence_penalty: 0.1, ..plain.clone() },
            Sampling { frequency_penalty: 0.1, ..plain.clone() },
            Sampling { repetition_penalty: 1.1, ..plain.clone() },
            Sampling { logit_bias: [(1, 1.0)].into(), ..plain.clone() },
            Sampling { logprobs: true, ..plain },
        ];
        for sampling in hosts {
            assert_eq!(on_device(&request(sampling.clone()), 1), None, "{sampling:?}");
        }
    }

    #[test]
    fn a_logit_that_is_no_number_is_named() {
        let error = sample(&[0.0, f32::NAN, 1.0], &mut request(Sampling::default())).unwrap_err();
        assert_eq!(error.to_string(), "logit of id 1 at position 1 is NaN");
        assert!(sample(&[0.0, f32::INFINITY], &mut request(Sampling::default())).is_err());
    }

    #[test]
    fn stop_ids_are_masked_below_min_tokens_only() {
        let mut r = request(Sampling::default());
        (r.stop_ids, r.min_tokens) = (vec![1], 1);
        assert_eq!(sample(&[1.0, 2.0], &mut r).unwrap().id, 0);
        r.tokens.push(0);
        assert_eq!(sample(&[1.0, 2.0], &mut r).unwrap().id, 1);
        (r.stop_ids, r.min_tokens) = (vec![0, 1], 9);
        assert_eq!(sample(&[1.0, 2.0], &mut r), Err(SampleError::Masked { vocabulary: 2, position: 2 }));
    }

    #[test]
    fn penalties_count_output_and_repetition_counts_the_prompt_too() {
        let mut r = request(Sampling { presence_penalty: 1.5, ..Sampling::default() });
        // Id 0 is in the prompt alone: presence leaves it.
        assert_eq!(sample(&[3.0, 2.0], &mut r).unwrap().id, 0);
        r.tokens.push(0);
        assert_eq!(sample(&[3.0, 2.0], &mut r).unwrap().id, 1);
        r.sampling = Sampling { frequency_penalty: 0.6, ..Sampling::default() };
        assert_eq!(sample(&[3.0, 2.0], &mut r).unwrap().id, 0);
        r.tokens.push(0);
        assert_eq!(sample(&[3.0, 2.0], &mut r).unwrap().id, 1);
        let mut r = request(Sampling { repetition_penalty: 2.0, ..Sampling::default() });
        assert_eq!(sample(&[3.0, 2.0], &mut r).unwrap().id, 1);
        r.sampling.repetition_penalty = 1.4;
        assert_eq!(sample(&[3.0, 2.0], &mut r).unwrap().id, 0);
        r.sampling.repetition_penalty = 2.0;
        assert_eq!(sample(&[-1.0, -1.5], &mut r).unwrap().id, 1);
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
        let sampled = sample(&[1.0, 2.0, 3.0], &mut request(sampling)).unwrap();
        let norm = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln();
        assert_eq!(sampled.id, 0);
        assert!((f64::from(sampled.logprob.unwrap()) - (1.0 - norm)).abs() < 1e-6);
        let top: Vec<u32> = sampled.top.iter().map(|t| t.0).collect();
        assert_eq!(top, [2, 1]);
        assert!((f64::from(sampled.top[0].1) - (3.0 - norm)).abs() < 1e-6);
    }

    /// Ids 0 `a`, 1 `b`, 2 the end.
    fn compiler() -> grammar::Compiler {
        let token = |id: u32, text: &str| vocab::Token { id, bytes: text.into(), special: id == 2 };
        let vocab = vocab::Vocab::new([token(0, "a"), token(1, "b"), token(2, "<end>")]).expect("valid");
        grammar::Compiler::new(vocab.into()).expect("a compiler")
    }

    #[test]
    fn a_grammar_leaves_what_fits_and_goes_on_elsewhere() {
        let grammar = compiler().compile("start: \"a\" \"b\"?").expect("a grammar");
        let mut r = request(Sampling { logprobs: true, ..Sampling::default() });
        (r.grammar, r.stop_ids) = (Some(grammar.clone()), vec![2]);
        // The fourth logit is padding of the model: no id at all.
        let draw = |r: &mut Request, logits: [f32; 4]| {
            let id = sample(&logits, r).expect("a token").id;
            r.tokens.push(id);
            id
        };
        assert_eq!(on_device(&r, 1), None);
        assert_eq!(draw(&mut r, [1.0, 2.0, 3.0, 9.0]), 0);
        assert_eq!(draw(&mut r, [3.0, 2.0, 1.0, 9.0]), 1);
        // Elsewhere the same tokens lead to the same state: only the end is left, before `min_tokens` too.
        (r.grammar, r.min_tokens) = (Some(grammar), 9);
        assert_eq!(draw(&mut r, [3.0, 2.0, 1.0, 9.0]), 2);
        r.tokens[1] = 1;
        r.grammar = Some(compiler().compile("start: \"a\" \"b\"?").expect("a grammar"));
        assert!(matches!(sample(&[0.0; 4], &mut r), Err(SampleError::Grammar(_))));
    }
}
