//! From prompts to a running answer: one sequence per prompt and choice, each with its own id and seed.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::Request;
use cluster::traces::Scope;
use futures::stream::{self, StreamExt};

use super::Gateway;
use super::answer::{Answer, Lane};
use super::choice::Choice;
use super::error::ApiError;
use super::head::Head;
use super::params::Params;
use super::prompt_scores::ScoresWanted;
use super::quota::Caller;
use crate::inference::{
    BACKGROUND, FinishReason, Finished, GenerateRequest, InferenceError, Started, TokenEvent, TokenStream,
};
use crate::metrics::SequenceMeter;
use crate::text::{Beginning, answer};

/// A tokenized prompt that fits.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Not empty.
    pub tokens: Arc<[u32]>,
    /// Of output, at most; 0: the prompt alone is wanted.
    pub max_tokens: u32,
    /// What `echo` puts before the answer.
    pub echo: Option<Arc<str>>,
    /// What the client expects of the output.
    pub prediction: Arc<[u32]>,
}

/// How answers are read.
#[derive(Debug, Clone)]
pub struct Reading {
    /// What answers must look like.
    pub grammar: Option<Arc<str>>,
    /// A text of its own, or the rest of the prompt.
    pub beginning: Beginning,
    /// Reasoning and calls.
    pub answer: answer::Reading,
    /// The first call ends the answer.
    pub single_call: bool,
    /// Reasoning is not shown.
    pub hide_reasoning: bool,
    /// Special ids that are text, because they are marks of calls.
    pub marks: Arc<[u32]>,
    /// `Some`: with log probabilities, and of this many alternatives.
    pub logprobs: Option<u32>,
    /// Of the prompt's tokens.
    pub scores: ScoresWanted,
}

impl Reading {
    /// All is text.
    pub fn plain(beginning: Beginning, logprobs: Option<u32>) -> Self {
        Self {
            grammar: None,
            beginning,
            answer: answer::Reading::default(),
            single_call: false,
            hide_reasoning: false,
            marks: Arc::default(),
            logprobs,
            scores: ScoresWanted::default(),
        }
    }
}

/// Who asks, and where the request's spans belong.
#[derive(Debug, Clone, Default)]
pub struct Asker {
    /// `None` where nobody needs a key.
    pub caller: Option<Arc<Caller>>,
    /// Of the request's own span.
    pub trace: Scope,
}

impl Asker {
    /// As `guard` has noted it.
    pub fn of(request: &Request) -> Self {
        let noted = request.extensions();
        Self { caller: noted.get().cloned(), trace: noted.get().cloned().unwrap_or_default() }
    }
}

/// Starts the sequences of a request that arrived at `arrived`. Nothing runs before the answer is polled.
pub fn start(
    gateway: &Gateway,
    params: &Params,
    prompts: &[Prompt],
    reading: &Reading,
    head: &Head,
    arrived: Instant,
    asker: &Asker,
) -> Result<Answer, ApiError> {
    let background = asker.caller.as_ref().is_some_and(|caller| caller.background);
    let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
    reading.scores.check(prompt_tokens, params.best_of)?;
    let prepare = arrived.elapsed();
    let mut span = asker.trace.span_since("tokenize", arrived);
    span.set("baton.prompt_tokens", prompt_tokens);
    span.end();
    gateway.metrics.prepared(prepare);
    prompts.iter().for_each(|prompt| gateway.metrics.asked(params.n, prompt.max_tokens));
    let seed = match params.seed {
        Some(seed) => seed,
        None => random()? as u64,
    };
    let count = prompts.len() * params.best_of;
    let mut sampling = params.sampling.clone();
    sampling.logprobs = reading.logprobs.is_some() || params.best_of > params.n;
    sampling.top_logprobs = reading.logprobs.unwrap_or(0);
    let lanes = prompts.iter().flat_map(|prompt| (0..params.best_of).map(move |number| (prompt, number)));
    let lanes = lanes.enumerate().map(|(index, (prompt, number))| {
        let mut sampling = sampling.clone();
        // As vLLM: the choices of a prompt draw differently, the same prompt twice draws alike.
        sampling.seed = seed.wrapping_add(number as u64);
        let request = GenerateRequest {
            id: if count == 1 { head.id.clone() } else { format!("{}-{index}", head.id) },
            tokens: Arc::clone(&prompt.tokens),
            max_tokens: prompt.max_tokens,
            min_tokens: params.min_tokens,
            ignore_eos: params.stop_ids.is_empty(),
            stop_ids: params.stop_ids.clone(),
            sampling,
            cache_salt: params.cache_salt.clone(),
            priority: if background { BACKGROUND } else { params.priority },
            grammar: reading.grammar.clone(),
            // Nothing comes before the first.
            prompt_logprobs: reading.scores.top().filter(|_| prompt.tokens.len() > 1),
            prediction: Arc::clone(&prompt.prediction),
            trace: asker.trace.clone(),
        };
        let pieces = Arc::clone(gateway.text.tokenizer.pieces());
        let choice = Choice::new(params, pieces, reading, prompt.prediction.len() as u32);
        let prompt_tokens = prompt.tokens.len() as u32;
        let meter =
            SequenceMeter::new(Arc::clone(&gateway.metrics), arrived, prompt_tokens).of(asker.caller.clone());
        let stream = match (request.max_tokens, request.prompt_logprobs) {
            (0, None) => nothing(),
            (0, Some(_)) => unanswered(gateway.inference.generate(GenerateRequest {
                max_tokens: 1,
                min_tokens: 0,
                ..request
            })),
            _ => gateway.inference.generate(request),
        };
        (Lane::new(choice, meter, prompt_tokens), stream)
    });
    Ok(Answer::new(lanes.collect(), params, prepare.as_secs_f64(), &gateway.over))
}

/// An answer of no tokens, for which no node is asked.
fn nothing() -> TokenStream {
    let finished = Finished { reason: FinishReason::Length, output_tokens: 0 };
    stream::iter([Ok(TokenEvent::Started(Started::default())), Ok(TokenEvent::Finished(finished))]).boxed()
}

/// An answer of no tokens whose prompt is scored: that one can be drawn behind it is nobody's concern.
fn unanswered(stream: TokenStream) -> TokenStream {
    let rest = |event: Result<TokenEvent, InferenceError>| match event {
        Ok(TokenEvent::Token(_)) => None,
        Ok(TokenEvent::Finished(_)) => {
            Some(Ok(TokenEvent::Finished(Finished { reason: FinishReason::Length, output_tokens: 0 })))
        }
        other => Some(other),
    };
    stream.filter_map(move |event| std::future::ready(rest(event))).boxed()
}

/// 128 bits that nobody can guess.
pub fn random() -> Result<u128, ApiError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        tracing::error!("no random numbers: {error}");
        ApiError::internal("the server has no random numbers")
    })?;
    Ok(u128::from_le_bytes(bytes))
}
