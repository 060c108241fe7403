//! Tokens and their log probabilities as JSON shows them.

use serde_json::Value;

use crate::text::pieces::Pieces;

/// What stands for minus infinity, which JSON cannot say; OpenAI's and vLLM's value.
const LOGPROB_MIN: f32 = -9999.0;

/// A token's text; parts of characters as U+FFFD (their `bytes` are exact).
pub fn token_text(pieces: &Pieces, id: u32) -> String {
    String::from_utf8_lossy(pieces.bytes(id)).into_owned()
}

/// A log probability that JSON can hold.
pub fn finite(logprob: f32) -> Value {
    // Through the shortest decimal of the f32, which as f64 would show digits that nobody measured.
    let value = if logprob.is_nan() { LOGPROB_MIN } else { logprob.max(LOGPROB_MIN) };
    value.to_string().parse::<f64>().unwrap_or(f64::from(LOGPROB_MIN)).into()
}
