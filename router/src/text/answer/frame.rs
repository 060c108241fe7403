//! What stands around an answer that is held to a form: reasoning, which stays free, and headers of messages. Rules of a
//! grammar, beside those of [`super::forced`]. Called by `api::form`.

use super::forced::Mark;
use super::{Family, Opening};

/// Pieces of a grammar, and the rules that they need.
#[derive(Debug)]
pub struct Frame {
    /// Before all.
    pub before: &'static str,
    /// Before words that are held to a form.
    words: &'static str,
    /// Before a call.
    call: &'static str,
    /// What these need, and calls of gpt-oss.
    pub rules: String,
}

impl Frame {
    /// `opening`: where the prompt ends; `None`: the model does not reason.
    pub fn new(family: Option<Family>, opening: Option<Opening>, mark: Mark<'_>) -> Self {
        match (family, opening) {
            (Some(Family::Harmony), opening) => Self::channels(opening.unwrap_or(Opening::ByModel), mark),
            (_, None | Some(Opening::Closed)) => Self::of("", String::new()),
            (_, Some(Opening::Open)) => Self::of("thought (\"\\n\\n\" | \"\\n\")?", thought(mark)),
            (_, Some(Opening::ByModel)) => {
                let open = mark("<think>");
                let rules = format!("thinking: {open} thought (\"\\n\\n\" | \"\\n\")?\n{}", thought(mark));
                Self::of("thinking?", rules)
            }
        }
    }

    fn of(before: &'static str, rules: String) -> Self {
        Self { before, words: "", call: "", rules }
    }

    fn channels(opening: Opening, mark: Mark<'_>) -> Self {
        let [start, channel, constrain, message] =
            ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"].map(mark);
        let ended = until("ended", "<|end|>", mark);
        let rules = format!(
            "{ended}within: ended {start} \"assistant\"\n\
             thought: {channel} \"analysis\" {message} within\n\
             preamble: {channel} \"commentary\" {message} within\n\
             final: {channel} \"final\" (\" \"? {constrain} \"json\")? {message}\n"
        );
        // A message that the client has begun is gone on with, or left for a call.
        let (before, words, call) = match opening {
            Opening::ByModel => ("thought*", "final", ""),
            Opening::Open => ("within thought*", "final", ""),
            Opening::Closed => ("", "", "within thought*"),
        };
        Self { before, words, call, rules }
    }

    /// Words of this form.
    pub fn words(&self, form: &str) -> String {
        after(self.words, form)
    }

    /// These calls.
    pub fn calls(&self, calls: &str) -> String {
        after(self.call, calls)
    }

    /// These calls, or any words. `among_words`: both, at the beginning of an answer.
    pub fn among_words(&self, calls: &str, among_words: String) -> String {
        match self.call {
            "" => among_words,
            _ => format!("/(?s:.+)/? | {}", self.calls(calls)),
        }
    }
}

fn after(before: &str, piece: &str) -> String {
    if before.is_empty() { piece.to_string() } else { format!("{before} {piece}") }
}

fn thought(mark: Mark<'_>) -> String {
    until("thought", "</think>", mark)
}

/// A rule: text up to a mark, and the mark.
fn until(name: &str, close: &str, mark: Mark<'_>) -> String {
    let named = mark(close);
    match named.starts_with('"') {
        true => format!("{name}[lazy]: /(?s:.*){}/\n", close.replace('/', "\\/").replace('|', "\\|")),
        false => format!("{name}: /(?s:.+)/? {named}\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;
    use vocab::{Token, Vocab};

    use super::super::forced::calls;
    use super::*;

    const TOKENS: [&str; 4] = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"];
    const END: &str = "<|end|>";

    /// Whether the grammar takes all of the text, and then ends. Marks are tokens that are no text.
    fn takes(lark: &str, text: &str) -> bool {
        let byte = |byte: u32| Token { id: byte, bytes: vec![byte as u8], special: false };
        let marks = || TOKENS.into_iter().chain([END]);
        let special = (256..).zip(marks()).map(|(id, mark)| Token { id, bytes: mark.into(), special: true });
        let vocab = Vocab::new((0..256).map(byte).chain(special)).expect("a vocabulary");
        let compiler = grammar::Compiler::new(Arc::new(vocab)).expect("a compiler");
        let mut automaton = compiler.compile(lark).unwrap_or_else(|error| panic!("{error}\n{lark}"));
        let (mut output, mut rest) = (Vec::new(), text);
        while !rest.is_empty() {
            let mark = marks().position(|mark| rest.starts_with(mark));
            output.push(mark.map_or(u32::from(rest.as_bytes()[0]), |at| 256 + at as u32));
            rest = &rest[mark.map_or(1, |at| marks().nth(at).map_or(1, str::len))..];
        }
        automaton.next(&output).is_ok_and(|mask| mask.may_end)
    }

    fn harmony(opening: Opening) -> Frame {
        Frame::new(Some(Family::Harmony), Some(opening), &|name: &str| name.to_string())
    }

    fn start(frame: &Frame, answer: &str, rules: &str) -> String {
        format!("start: {} answer\nanswer: {answer}\n{rules}{}", frame.before, frame.rules)
    }

    const THOUGHT: &str = "<|channel|>analysis<|message|>Hm {\n<|end|><|start|>assistant";

    #[test]
    fn the_final_message_is_held_to_the_form_and_reasoning_is_free() {
        let frame = harmony(Opening::ByModel);
        let lark = start(&frame, &frame.words("%json {\"type\": \"integer\"}"), "");
        for head in ["<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>"] {
            for thoughts in [String::new(), THOUGHT.into(), format!("{THOUGHT}{THOUGHT}")] {
                assert!(takes(&lark, &format!("{thoughts}{head}12")), "{thoughts}{head}\n{lark}");
                assert!(!takes(&lark, &format!("{thoughts}{head}x")), "{thoughts}{head}");
            }
        }
        for other in ["12", "<|channel|>commentary<|message|>12", "<|channel|>analysis<|message|>12"] {
            assert!(!takes(&lark, other), "{other}");
        }
        let frame = harmony(Opening::Closed);
        let lark = start(&frame, &frame.words("%json {\"type\": \"integer\"}"), "");
        assert!(takes(&lark, "12") && !takes(&lark, "<|channel|>final<|message|>12"), "{lark}");
        let frame = harmony(Opening::Open);
        let lark = start(&frame, &frame.words("\"a\""), "");
        assert!(takes(
            &lark,
            &format!("{}<|channel|>final<|message|>a", &THOUGHT["<|channel|>analysis<|message|>".len()..])
        ));
    }

    #[test]
    fn calls_come_in_their_channel_and_fit_their_schema() {
        let tool = |name: &str| {
            json!({"function": {"name": name, "strict": true, "parameters": {"type": "object",
                "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}}})
        };
        let (f, g) = (tool("f"), tool("f_g"));
        let calls = calls(Family::Harmony, &[&f, &g], true, false, &|name: &str| name.to_string());
        let frame = harmony(Opening::ByModel);
        let demanded = start(&frame, &frame.calls(&calls.calls), &calls.rules);
        let words = calls.among_words.clone().expect("words");
        let free = start(&frame, &frame.among_words(&calls.calls, words), &calls.rules);
        let preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant";
        for before in ["", THOUGHT, preamble, &format!("{THOUGHT}{preamble}{THOUGHT}")] {
            for head in [
                "<|channel|>commentary to=functions.f",
                "<|channel|>commentary to=functions.f_g<|constrain|>json",
                "<|channel|>commentary to=functions.f <|constrain|>json",
                " to=functions.f<|channel|>commentary json",
            ] {
                for lark in [&demanded, &free] {
                    assert!(
                        takes(lark, &format!("{before}{head}<|message|>{{\"n\": 1}}")),
                        "{before}{head}\n{lark}"
                    );
                    assert!(
                        !takes(lark, &format!("{before}{head}<|message|>{{\"n\": \"\"}}")),
                        "{before}{head}"
                    );
                }
            }
            let said = format!("{before}<|channel|>final<|message|>Hi {{");
            assert!(takes(&free, &said) && !takes(&demanded, &said), "{said}");
            let other = format!("{before}<|channel|>commentary to=functions.h<|message|>{{\"n\": 1}}");
            assert!(!takes(&free, &other), "{other}");
        }
        let frame = harmony(Opening::Closed);
        let demanded = start(&frame, &frame.calls(&calls.calls), &calls.rules);
        let free = start(&frame, &frame.among_words(&calls.calls, String::new()), &calls.rules);
        let call = format!(
            " you.<|end|><|start|>assistant{THOUGHT}<|channel|>commentary to=functions.f<|message|>{{\"n\": 1}}"
        );
        assert!(takes(&demanded, &call) && takes(&free, &call), "{demanded}");
        assert!(takes(&free, " you.") && !takes(&demanded, " you."));
    }
}
