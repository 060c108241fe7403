//! Between the gateway's requests and the nodes' messages.
//!
//! Caller: [`super::attempt`].

use proto::v1;

use crate::inference::{FinishReason, GenerateRequest, Score, Token};

/// The message of one attempt: the prompt and what was delivered of the answer. `score`: the prompt is still to be
/// scored, where the request asks for it.
pub fn sequence(request: &GenerateRequest, output: &[u32], attempt: u32, score: bool) -> v1::Sequence {
    let mut tokens = Vec::with_capacity(request.tokens.len() + output.len());
    tokens.extend_from_slice(&request.tokens);
    tokens.extend_from_slice(output);
    let sampling = &request.sampling;
    v1::Sequence {
        request_id: request.id.clone(),
        attempt,
        tokens,
        output_start: request.tokens.len() as u32,
        max_tokens: request.max_tokens,
        min_tokens: request.min_tokens,
        stop_ids: request.stop_ids.clone(),
        ignore_eos: request.ignore_eos,
        sampling: Some(v1::Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
            logit_bias: sampling.logit_bias.iter().copied().collect(),
            logprobs: sampling.logprobs,
            top_logprobs: sampling.top_logprobs,
        }),
        cache_salt: request.cache_salt.clone(),
        priority: request.priority,
        grammar: request.grammar.as_deref().unwrap_or_default().to_string(),
        prompt_logprobs: request.prompt_logprobs.filter(|_| score),
        prediction: request.prediction.to_vec(),
    }
}

/// A token of a node.
pub fn token(token: v1::Token) -> Token {
    let v1::Token { index, id, logprob, top: likeliest, predicted } = token;
    Token { index, id, logprob, top: top(likeliest), predicted }
}

fn top(top: Vec<v1::TopLogprob>) -> Vec<(u32, f32)> {
    top.into_iter().map(|top| (top.id, top.logprob)).collect()
}

/// How likely tokens of the prompt are.
pub fn scores(scores: Vec<v1::Score>) -> impl Iterator<Item = Score> {
    scores.into_iter().map(|s| Score { logprob: s.logprob, rank: s.rank, top: top(s.top) })
}

/// Why the answer ends, if it does.
pub fn finish(reason: v1::FinishReason) -> Option<FinishReason> {
    match reason {
        v1::FinishReason::None => None,
        v1::FinishReason::Stop => Some(FinishReason::Stop),
        v1::FinishReason::Length => Some(FinishReason::Length),
    }
}
