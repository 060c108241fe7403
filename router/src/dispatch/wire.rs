//! Between the gateway's requests and the nodes' messages.
//!
//! Caller: [`super::attempt`].

use proto::v1;

use crate::inference::{FinishReason, GenerateRequest, Token};

/// The message of one attempt: the prompt and what was delivered of the answer.
pub fn sequence(request: &GenerateRequest, output: &[u32], attempt: u32) -> v1::Sequence {
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
    }
}

/// A token of a node.
pub fn token(token: v1::Token) -> Token {
    Token {
        index: token.index,
        id: token.id,
        logprob: token.logprob,
        top: token.top.into_iter().map(|top| (top.id, top.logprob)).collect(),
    }
}

/// Why the answer ends, if it does.
pub fn finish(reason: v1::FinishReason) -> Option<FinishReason> {
    match reason {
        v1::FinishReason::None => None,
        v1::FinishReason::Stop => Some(FinishReason::Stop),
        v1::FinishReason::Length => Some(FinishReason::Length),
    }
}
