//! How likely the tokens of a prompt are, as clients ask for it and see it: within `logprobs` where `echo` repeats the prompt
//! (OpenAI's completions), or as a list of its own (vLLM's `prompt_logprobs`).

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::logprobs::{finite, token_text};
use crate::inference::Score;
use crate::text::pieces::{Piece, Pieces};

/// Log probabilities of prompts in one answer, all choices and alternatives together: each is some 100 bytes until it is
/// sent, and a context of 131,072 tokens has room for one alternative each.
const ENTRIES_MAX: usize = 1 << 18;

/// Alternatives wanted beside each token of a prompt; `None`: the prompt is not scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScoresWanted {
    /// Before those of the answer, with `echo`.
    pub echo: Option<u32>,
    /// As a list of its own.
    pub list: Option<u32>,
}

impl ScoresWanted {
    /// What the cluster is asked for.
    pub fn top(&self) -> Option<u32> {
        self.echo.max(self.list)
    }

    /// Refuses more than one answer holds, of `choices` of each prompt; `tokens`: of all prompts together.
    pub fn check(&self, tokens: usize, choices: usize) -> Result<(), ApiError> {
        let Some(top) = self.top() else { return Ok(()) };
        let entries = tokens.saturating_mul(choices).saturating_mul(top as usize + 1);
        if entries <= ENTRIES_MAX {
            return Ok(());
        }
        let param = if self.list.is_some() { "prompt_logprobs" } else { "logprobs" };
        let expected = format!("at most {ENTRIES_MAX} log probabilities of prompts in one answer");
        Err(ApiError::wrong_value(param, expected, entries))
    }
}

/// The `logprobs` of a completion: four lists, an entry per token.
#[derive(Debug, Default)]
pub struct LegacyLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl LegacyLogprobs {
    /// One more token. `logprob`: `None` for the first of a prompt, before which nothing is.
    pub fn push(
        &mut self,
        pieces: &Pieces,
        id: u32,
        logprob: Option<f32>,
        top: &[(u32, f32)],
        offset: usize,
    ) {
        let text = token_text(pieces, id);
        let mut map = Map::new();
        for &(id, logprob) in top {
            // Parts of characters look alike; the likeliest of them is kept.
            map.entry(token_text(pieces, id)).or_insert_with(|| finite(logprob));
        }
        let shown = !top.is_empty();
        if let Some(logprob) = logprob.filter(|_| shown) {
            map.entry(text.clone()).or_insert_with(|| finite(logprob));
        }
        self.tokens.push(text);
        self.token_logprobs.push(logprob.map_or(Value::Null, finite));
        self.top_logprobs.push(if shown { Value::Object(map) } else { Value::Null });
        self.text_offset.push(offset);
    }

    /// The tokens of a prompt whose text is `echo`; `scores`: from the second on, of which `top` alternatives are told.
    pub fn push_prompt(&mut self, pieces: &Pieces, prompt: &[u32], echo: &str, scores: &[Score], top: u32) {
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        for ((&id, offset), score) in prompt.iter().zip(offsets(pieces, prompt, echo)).zip(scores) {
            let (logprob, alternatives) = match score {
                Some(score) => (Some(score.logprob), first(&score.top, top)),
                None => (None, &[][..]),
            };
            self.push(pieces, id, logprob, alternatives, offset);
        }
    }

    /// As responses have it; without tokens none.
    pub fn into_value(self) -> Option<Value> {
        let Self { tokens, token_logprobs, top_logprobs, text_offset } = self;
        (!tokens.is_empty()).then(|| {
            json!({"text_offset": text_offset, "token_logprobs": token_logprobs, "tokens": tokens,
                "top_logprobs": top_logprobs})
        })
    }
}

/// vLLM's `prompt_logprobs`: null for the first token, then by id what its place could have held.
pub fn list(pieces: &Pieces, prompt: &[u32], scores: &[Score], top: u32) -> Value {
    let entry = |id: u32, logprob: f32, rank: u32| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": token_text(pieces, id)});
    let of = |(id, score): (&u32, &Score)| {
        let mut map = Map::from_iter([(id.to_string(), entry(*id, score.logprob, score.rank))]);
        for (rank, &(id, logprob)) in (1..).zip(first(&score.top, top)) {
            map.entry(id.to_string()).or_insert_with(|| entry(id, logprob, rank));
        }
        Value::Object(map)
    };
    std::iter::once(Value::Null).chain(prompt.iter().skip(1).zip(scores).map(of)).collect()
}

fn first(top: &[(u32, f32)], count: u32) -> &[(u32, f32)] {
    &top[..top.len().min(count as usize)]
}

/// Where each token begins in the prompt's text, in characters. What is not in the text (the mark of its beginning) is as
/// wide as nothing; SentencePiece's first token has a space that the text lacks.
fn offsets(pieces: &Pieces, prompt: &[u32], text: &str) -> Vec<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut characters) = (0, 0);
    let begin = |id: &u32| {
        let offset = characters;
        let piece = pieces.bytes(*id);
        let rest = &bytes[at..];
        let width = match piece.strip_prefix(b" ") {
            _ if rest.starts_with(piece) => piece.len(),
            Some(bare) if rest.starts_with(bare) => bare.len(),
            _ if matches!(pieces.get(*id), Piece::Special(_) | Piece::None) => 0,
            // The tokenizer has written the text otherwise.
            _ => piece.len().min(rest.len()),
        };
        // Bytes that do not go on with a character begin one.
        characters += rest[..width].iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        at += width;
        offset
    };
    prompt.iter().map(begin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(names: &[(&str, bool)]) -> Pieces {
        let names: Vec<_> = names.iter().map(|(text, special)| Some((text.to_string(), *special))).collect();
        let decoder = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]});
        Pieces::new(&names, &decoder).expect("supported")
    }

    fn scored(logprob: f32, rank: u32, top: &[(u32, f32)]) -> Score {
        Score { logprob, rank, top: top.to_vec() }
    }

    /// Protects: four lists of equal length, null before the first token, the token itself among its alternatives.
    #[test]
    fn a_prompt_in_the_legacy_form() {
        let pieces = pieces(&[("<s>", true), (" Hi", false), ("\u{e9}", false), ("x", false)]);
        let mut legacy = LegacyLogprobs::default();
        let scores = [scored(-1.0, 2, &[(3, -0.5), (1, -1.0)]), scored(-2.0, 3, &[(3, -0.25), (1, -1.5)])];
        legacy.push_prompt(&pieces, &[0, 1, 2], "Hi\u{e9}", &scores, 1);
        legacy.push(&pieces, 3, Some(-0.125), &[], 3);
        assert_eq!(
            legacy.into_value(),
            Some(json!({
                "tokens": ["<s>", " Hi", "\u{e9}", "x"],
                "token_logprobs": [null, -1.0, -2.0, -0.125],
                "top_logprobs": [null, {"x": -0.5, " Hi": -1.0}, {"x": -0.25, "\u{e9}": -2.0}, null],
                "text_offset": [0, 0, 2, 3],
            }))
        );
        assert_eq!(LegacyLogprobs::default().into_value(), None);
    }

    /// Protects: vLLM's form, with the token's own rank where it is none of the likeliest.
    #[test]
    fn a_prompt_as_a_list() {
        let pieces = pieces(&[("a", false), ("b", false), ("c", false)]);
        let scores = [scored(-3.0, 7, &[(0, -0.5), (2, -1.0)]), scored(-0.5, 1, &[(0, -0.5)])];
        let entry = |logprob: f32, rank: u32, text: &str| json!({"logprob": logprob, "rank": rank, "decoded_token": text});
        assert_eq!(
            list(&pieces, &[2, 1, 0], &scores, 2),
            json!([null, {"1": entry(-3.0, 7, "b"), "0": entry(-0.5, 1, "a"), "2": entry(-1.0, 2, "c")},
                {"0": entry(-0.5, 1, "a")}])
        );
        assert_eq!(list(&pieces, &[2, 1], &scores[..1], 0), json!([null, {"1": entry(-3.0, 7, "b")}]));
    }

    /// Protects: what is held for one answer is bounded, whichever way it is asked for.
    #[test]
    fn the_answer_is_bounded() {
        let wanted = |echo, list| ScoresWanted { echo, list };
        assert_eq!(wanted(None, None).check(usize::MAX, 9), Ok(()));
        assert_eq!(wanted(Some(1), None).check(131_072, 1), Ok(()));
        assert_eq!(wanted(Some(0), Some(20)).check(12_483, 1), Ok(()));
        let error = wanted(Some(0), Some(20)).check(12_484, 1).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("prompt_logprobs"));
        let error = wanted(Some(1), None).check(131_072, 2).unwrap_err();
        assert_eq!(
            error.message,
            "Invalid value for 'logprobs': expected at most 262144 log probabilities of prompts in one answer, but got 524288."
        );
    }
}
