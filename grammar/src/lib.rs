//! What an answer may look like: a grammar over text becomes, token by token, the ids that may come next. The router
//! compiles a client's grammar to refuse what cannot be, before anything is reserved; whoever samples compiles the same text
//! again and masks its logits. The state follows from the tokens of the answer alone, so a stream goes on elsewhere.
//!
//! Grammars are in llguidance's dialect of Lark, which [`lark`] writes; [`gbnf`] reads the other usual notation.

pub mod gbnf;
pub mod lark;

use std::fmt;
use std::sync::Arc;

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use vocab::Vocab;

/// Bytes of a grammar, its schemas included.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;

/// Work to build the tables of one grammar: about 50,000 units per ms.
const COMPILE_FUEL: u64 = 5_000_000;

/// Symbols in the rules of one grammar.
const GRAMMAR_SYMBOLS_MAX: usize = 200_000;

/// States of one grammar's lexer, each of 1 to 2 kB.
const LEXER_STATES_MAX: usize = 50_000;

/// Characters of an error's text: the library quotes whole grammars.
const REASON_CHARS_MAX: usize = 400;

/// Why there is no mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The text is too long.
    #[error("the grammar has {bytes} bytes, at most {GRAMMAR_BYTES_MAX}")]
    TooLong {
        /// Of the text.
        bytes: usize,
    },
    /// It is no grammar, or asks for what is not supported, or is too much work.
    #[error("{0}")]
    Invalid(String),
    /// A token of the answer is against the grammar.
    #[error("token {id} at output position {position} is against the grammar")]
    Against {
        /// Token id.
        id: u32,
        /// In the output.
        position: usize,
    },
    /// The vocabulary cannot be used.
    #[error("the vocabulary cannot be used for grammars: {0}")]
    Vocabulary(String),
}

/// Compiles grammars for one vocabulary. Making one takes a moment (0.1 s for 150,000 ids) and some megabytes.
pub struct Compiler {
    factory: ParserFactory,
    vocab: Arc<Vocab>,
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Compiler({} ids)", self.vocab.len())
    }
}

impl Compiler {
    /// For the ids of `vocab`.
    pub fn new(vocab: Arc<Vocab>) -> Result<Self, GrammarError> {
        let mut words: Vec<Vec<u8>> = (0..vocab.len() as u32).map(|id| word(&vocab, id)).collect();
        // An id of its own for the end: which ids end an answer is each request's.
        let end = words.len() as u32;
        words.push(b"\xff<baton end of answer>".to_vec());
        let info = TokRxInfo::new(words.len() as u32, end);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let unusable = |error: &dyn fmt::Display| GrammarError::Vocabulary(clipped(&error.to_string()));
        let mut factory = ParserFactory::new(
            &env,
            InferenceCapabilities { ff_tokens: false, backtrack: false, ..Default::default() },
            &llguidance::earley::SlicedBiasComputer::general_slices(),
        )
        .map_err(|error| unusable(&error))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_FUEL;
        limits.max_grammar_size = GRAMMAR_SYMBOLS_MAX;
        limits.max_lexer_states = LEXER_STATES_MAX;
        limits.verbose_errors = false;
        Ok(Self { factory, vocab })
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// A grammar at the beginning of an answer. Bounded work, but work: not for an async thread.
    pub fn compile(&self, lark: &str) -> Result<Automaton, GrammarError> {
        if lark.len() > GRAMMAR_BYTES_MAX {
            return Err(GrammarError::TooLong { bytes: lark.len() });
        }
        let mut matcher =
            Matcher::new(self.factory.create_parser(TopLevelGrammar::from_lark(lark.to_string())));
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Invalid(clipped(&error)));
        }
        // The first mask finds what compiling alone does not, such as a grammar without any text.
        let first = matcher.compute_mask_or_eos().map_err(|error| error.to_string());
        let none = StopReason::NoExtensionBias.to_string();
        match first {
            Ok(first) if !first.is_zero() => {}
            Err(error) if !error.contains(&none) => return Err(GrammarError::Invalid(clipped(&error))),
            _ => return Err(GrammarError::Invalid("no text fits the grammar".into())),
        }
        let end = self.vocab.len() as u32;
        Ok(Automaton { matcher, source: lark.into(), taken: 0, end })
    }
}

/// What the library knows of an id: special ones are marked by a byte that is in no text.
fn word(vocab: &Vocab, id: u32) -> Vec<u8> {
    let bytes = vocab.bytes(id).unwrap_or_default();
    match vocab.is_special(id) {
        true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        false => bytes.to_vec(),
    }
}

/// The first line, with the one that says which error it announces; and not all of it. Without a place: it is one of our text,
/// not of the client's.
fn clipped(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    let which = lines.find_map(|line| line.strip_prefix("error:")).unwrap_or_default();
    let place = |text: &str| text.starts_with("at ") && text.ends_with(')');
    let first = first.split_once(": ").filter(|(start, _)| place(start)).map_or(first, |(_, rest)| rest);
    let first = first.strip_prefix("failed to compile JSON schema: ").unwrap_or(first);
    // Of the library's own build.
    let first = first.replace(" without 'referencing' feature", "");
    format!("{first}{which}").trim_end_matches('.').chars().take(REASON_CHARS_MAX).collect()
}

/// A grammar, and how far an answer has come in it.
pub struct Automaton {
    matcher: Matcher,
    source: Arc<str>,
    /// Tokens of output that it has seen.
    taken: usize,
    /// The id that stands for the end of the answer.
    end: u32,
}

impl Clone for Automaton {
    fn clone(&self) -> Self {
        let matcher = self.matcher.deep_clone();
        Self { matcher, source: Arc::clone(&self.source), taken: self.taken, end: self.end }
    }
}

impl PartialEq for Automaton {
    fn eq(&self, other: &Self) -> bool {
        (&self.source, self.taken) == (&other.source, other.taken)
    }
}

impl fmt::Debug for Automaton {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Automaton({} bytes, after {} tokens)", self.source.len(), self.taken)
    }
}

impl Automaton {
    /// What may come after `output`, all tokens of the answer so far, of which it takes in those that are new.
    pub fn next(&mut self, output: &[u32]) -> Result<Mask, GrammarError> {
        for (position, &id) in output.iter().enumerate().skip(self.taken) {
            let against = GrammarError::Against { id, position };
            if self.matcher.is_stopped() {
                return Err(against);
            }
            self.matcher.consume_token(id).map_err(|_| against)?;
            self.taken = position + 1;
        }
        let allowed = self.matcher.compute_mask_or_eos();
        let allowed = allowed.map_err(|error| GrammarError::Invalid(clipped(&error.to_string())))?;
        let may_end = allowed.is_allowed(self.end);
        let must_end = may_end && allowed.num_set() == 1;
        Ok(Mask { allowed, end: self.end, may_end, must_end })
    }
}

/// Which ids may come next.
#[derive(Debug)]
pub struct Mask {
    allowed: SimpleVob,
    end: u32,
    /// The answer may be at its end: ids that end it are allowed.
    pub may_end: bool,
    /// Nothing else is allowed.
    pub must_end: bool,
}

impl Mask {
    /// Whether the id may be a part of the answer.
    pub fn allows(&self, id: u32) -> bool {
        id < self.end && self.allowed.is_allowed(id)
    }

    /// Makes all other logits minus infinity. `stop_ids`: allowed where the answer may end.
    pub fn apply(&self, logits: &mut [f32], stop_ids: &[u32]) {
        let kept: Vec<(usize, f32)> = match self.may_end {
            true => stop_ids
                .iter()
                .filter_map(|&id| logits.get(id as usize).map(|&logit| (id as usize, logit)))
                .collect(),
            false => Vec::new(),
        };
        for (word, chunk) in logits.chunks_mut(32).enumerate() {
            let bits = self.allowed.as_slice().get(word).copied().unwrap_or(0);
            if bits != u32::MAX {
                for (bit, logit) in chunk.iter_mut().enumerate() {
                    if bits & (1 << bit) == 0 || (word * 32 + bit) as u32 >= self.end {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            } else if (word * 32 + 32) as u32 > self.end {
                let from = (self.end as usize).saturating_sub(word * 32).min(chunk.len());
                chunk[from..].fill(f32::NEG_INFINITY);
            }
        }
        kept.into_iter().for_each(|(id, logit)| logits[id] = logit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vocab::Token;

    /// Printable ASCII by code from id 0, then `<end>` (special), then `<call>` (special).
    fn compiler() -> Compiler {
        let letter = |code: u8| Token { id: u32::from(code) - 32, bytes: vec![code], special: false };
        let special = |id: u32, name: &str| Token { id, bytes: name.as_bytes().to_vec(), special: true };
        let tokens = (32..127).map(letter).chain([special(END, "<end>"), special(CALL, "<call>")]);
        Compiler::new(Arc::new(Vocab::new(tokens).expect("a vocabulary"))).expect("a compiler")
    }

    const END: u32 = 95;
    const CALL: u32 = 96;

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(|byte| u32::from(byte) - 32).collect()
    }

    /// The characters that may follow, `$` for the end, `!` for the special `<call>`.
    fn follows(lark: &str, text: &str) -> String {
        let mut automaton = compiler().compile(lark).expect("a grammar");
        let mask = automaton.next(&ids(text)).expect("text of the grammar");
        let mut logits = vec![1.0; 100];
        mask.apply(&mut logits, &[END]);
        let name = |id: usize| match id as u32 {
            END => '$',
            CALL => '!',
            id => char::from(id as u8 + 32),
        };
        logits.iter().enumerate().filter(|(_, logit)| **logit == 1.0).map(|(id, _)| name(id)).collect()
    }

    #[test]
    fn only_what_fits_may_follow() {
        let choice = lark::grammar(&lark::choice(&["yes".into(), "yet".into()]));
        assert_eq!(follows(&choice, ""), "y");
        assert_eq!(follows(&choice, "ye"), "st");
        assert_eq!(follows(&choice, "yes"), "$");
        assert_eq!(follows(&lark::grammar(&lark::regex("a+/b?")), "aa"), "/a");
        assert_eq!(follows(&lark::grammar(&lark::regex("a+/b?")), "aa/"), "b$");
        assert_eq!(follows("start: \"f\" <call> \"x\"", "f"), "!");
    }

    #[test]
    fn json_has_the_form_of_its_schema() {
        let schema = serde_json::json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/$defs/n"}},
            "required": ["a", "b"], "additionalProperties": false, "$defs": {"n": {"enum": [1, 2]}}});
        let lark = lark::grammar(&lark::json(&schema));
        assert_eq!(follows(&lark, "{\"a\":"), " ft");
        assert_eq!(follows(&lark, "{\"a\":true,\"b\":"), " 12");
        assert_eq!(follows(&lark, "{\"a\":true,\"b\":2}"), "$");
    }

    #[test]
    fn the_state_follows_from_the_tokens_alone() {
        let compiler = compiler();
        let lark = lark::grammar(&lark::regex("(ab)+"));
        let mut step_by_step = compiler.compile(&lark).expect("a grammar");
        let output = ids("abab");
        for end in 0..=output.len() {
            let mut at_once = compiler.compile(&lark).expect("a grammar");
            let (one, other) = (step_by_step.next(&output[..end]), at_once.next(&output[..end]));
            let all = |mask: Mask| (0..100).filter(|&id| mask.allows(id)).collect::<Vec<u32>>();
            assert_eq!(one.map(all), other.map(all), "after {end}");
        }
        let against = step_by_step.next(&ids("ababb")).unwrap_err();
        assert_eq!(against, GrammarError::Against { id: ids("b")[0], position: 4 });
    }

    #[test]
    fn what_is_no_grammar_is_said_in_one_short_line() {
        for (lark, said) in [
            ("start: nothing", "unknown name: \"nothing\""),
            ("start: %json {\"type\": \"robot\"}", "Invalid type: robot"),
            (
                "start: %json {\"$ref\": \"#/nowhere\"}",
                "Reference segment 'nowhere' not found in '#/nowhere'",
            ),
            ("start: %json {\"$ref\": \"#\"}", "no text fits the grammar"),
            (
                "start: %json {\"$ref\": \"https://a.example/b\"}",
                "Only absolute $ref's (#/...) are supported; ref 'https://a.example/b'",
            ),
            ("start: /(/", "invalid regex \"(\" (in regex): regex parse error: unclosed group"),
            ("word: \"a\"", "no start rule found"),
        ] {
            assert_eq!(compiler().compile(lark).unwrap_err().to_string(), said);
        }
        // What a line announces is not left out.
        let ahead = compiler().compile(r"start: /(?=a)b/").unwrap_err().to_string();
        assert!(ahead.contains("look-around"), "{ahead}");
        let long = "x".repeat(GRAMMAR_BYTES_MAX + 1);
        assert_eq!(compiler().compile(&long).unwrap_err(), GrammarError::TooLong { bytes: long.len() });
    }

    #[test]
    fn too_much_work_is_refused_in_bounded_time() {
        let begun = std::time::Instant::now();
        let regex = lark::grammar(&lark::regex("((a{1,500}){1,500}b){1,500}(c|d){5,9000}"));
        // Small tables or none: either way soon.
        _ = compiler().compile(&regex);
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    }
}
