//! Grammars of calls: what a model must write where a client demands a call, or wants its arguments to fit their schema.
//! The markup is that of the model's own family, so that it writes what it was trained to write.

use std::fmt::Write;

use grammar::lark::{json, json_leniently, literal};
use serde_json::{Value, json as value};

use super::Family;

/// Calls of one answer, where several are allowed.
const CALLS_MAX: usize = 16;

/// Rules of a grammar, and pieces that use them.
#[derive(Debug)]
pub struct Calls {
    /// One or more calls, from their first mark on.
    pub calls: String,
    /// Words with calls among them, or without. `None`: the family marks no beginning that could be waited for.
    pub among_words: Option<String>,
    /// What both need.
    pub rules: String,
}

/// How a mark is written: as text, or as a token that is no text.
pub type Mark<'a> = &'a dyn Fn(&str) -> String;

/// Calls of `tools`, as OpenAI defines them; `fenced`: DeepSeek before V3.1. Those of gpt-oss use rules of [`super::Frame`].
pub fn calls(family: Family, tools: &[&Value], parallel: bool, fenced: bool, mark: Mark<'_>) -> Calls {
    let mut writer = Writer { rules: String::new(), count: 0, mark };
    let one: Vec<String> = tools.iter().map(|tool| writer.call(family, fenced, &tool["function"])).collect();
    let one = writer.rule(&one.join(" | "));
    let more = |between: &str| match parallel && family != Family::Llama {
        true => format!("{one} ({between} {one}){{0,{}}}", CALLS_MAX - 1),
        false => one.clone(),
    };
    // Before the calls, the calls, behind them.
    let (open, inside, close) = match family {
        // The first mark is of the first call.
        Family::Hermes | Family::QwenXml | Family::Glm => {
            let first = writer.mark("<tool_call>");
            let again = format!("\"\\n\" {first}");
            (first, more(&again), String::new())
        }
        Family::Llama => (String::new(), one.clone(), String::new()),
        Family::DeepSeek => {
            let between = if fenced { "\"\\n\"" } else { "" };
            (writer.mark("<｜tool▁calls▁begin｜>"), more(between), writer.mark("<｜tool▁calls▁end｜>"))
        }
        Family::Kimi => {
            (writer.mark("<|tool_calls_section_begin|>"), more(""), writer.mark("<|tool_calls_section_end|>"))
        }
        Family::MiniMax => {
            let close = writer.text(&[Text("\n"), Named("</minimax:tool_call>")]);
            (writer.mark("<minimax:tool_call>"), more(""), close)
        }
        // One is all: its end is the answer's.
        Family::Harmony => ("(preamble thought*)*".into(), one.clone(), String::new()),
    };
    let opening = match family {
        Family::Hermes | Family::QwenXml | Family::Glm => Some("<tool_call>"),
        Family::DeepSeek => Some("<｜tool▁calls▁begin｜>"),
        Family::Kimi => Some("<|tool_calls_section_begin|>"),
        Family::MiniMax => Some("<minimax:tool_call>"),
        Family::Llama | Family::Harmony => None,
    };
    let inside = writer.rule(&format!("{inside} {close}"));
    let among_words = match family {
        Family::Harmony => Some(format!("{open} ({inside} | final /(?s:.+)/?)")),
        _ => opening.map(|opening| writer.among_words(opening, &inside)),
    };
    Calls { calls: format!("{open} {inside}"), among_words, rules: writer.rules }
}

/// A piece of fixed text. Neighbours become one literal: the lexer behind looks for the longest and never goes back, so no
/// literal may begin another that could stand at its place.
enum Piece<'a> {
    Text(&'a str),
    /// A mark.
    Named(&'a str),
}
use Piece::{Named, Text};

struct Writer<'a> {
    rules: String,
    count: usize,
    mark: Mark<'a>,
}

impl Writer<'_> {
    fn mark(&self, name: &str) -> String {
        (self.mark)(name)
    }

    fn text(&self, pieces: &[Piece<'_>]) -> String {
        let (mut out, mut open) = (Vec::new(), String::new());
        for piece in pieces {
            match piece {
                Text(text) => open.push_str(text),
                Named(name) if self.mark(name).starts_with('"') => open.push_str(name),
                Named(name) => {
                    if !open.is_empty() {
                        out.push(literal(&std::mem::take(&mut open)));
                    }
                    out.push(self.mark(name));
                }
            }
        }
        if !open.is_empty() {
            out.push(literal(&open));
        }
        out.join(" ")
    }

    fn name(&mut self) -> String {
        self.count += 1;
        format!("call_{}", self.count)
    }

    /// A rule of its own; its name.
    fn rule(&mut self, body: &str) -> String {
        let name = self.name();
        _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    /// Text up to a mark, and the mark.
    fn until(&mut self, close: &str, named: bool) -> String {
        let mark = if named { self.mark(close) } else { literal(close) };
        match mark.starts_with('"') {
            true => {
                let name = self.name();
                _ = writeln!(self.rules, "{name}[lazy]: /(?s:.*){}/", regex_text(close));
                name
            }
            false => self.rule(&format!("/(?s:.+)/? {mark}")),
        }
    }

    fn among_words(&mut self, opening: &str, inside: &str) -> String {
        if !self.mark(opening).starts_with('"') {
            let mark = self.mark(opening);
            return format!("/(?s:.+)/? ({mark} {inside} /(?s:.+)/?)?");
        }
        let begin = self.until(opening, true);
        self.count += 1;
        let rest = format!("WORDS_{}", self.count);
        let opening = regex_text(opening);
        _ = writeln!(self.rules, "{rest}: /(?s:.+)/ & ~/(?s:.*){opening}(?s:.*)/");
        format!("({begin} {inside})? {rest}?")
    }

    /// One call, without the mark that comes before all of them.
    fn call(&mut self, family: Family, fenced: bool, function: &Value) -> String {
        let name = function["name"].as_str().unwrap_or_default();
        let schema = match &function["parameters"] {
            Value::Object(schema) if !schema.is_empty() => Value::Object(schema.clone()),
            _ => value!({"type": "object"}),
        };
        let strict = function["strict"] == true;
        let arguments = if strict { json(&schema) } else { json_leniently(&schema) };
        let quoted = literal(name);
        match family {
            Family::Hermes => {
                let head = literal(&format!("\n{{\"name\": {quoted}, \"arguments\": "));
                format!("{head} {arguments} {}", self.text(&[Text("}\n"), Named("</tool_call>")]))
            }
            Family::Llama => {
                let head = literal(&format!("{{\"name\": {quoted}, \"parameters\": "));
                format!("{head} {arguments} \"}}\"")
            }
            Family::DeepSeek => {
                let (call, end) = (Named("<｜tool▁call▁begin｜>"), Named("<｜tool▁call▁end｜>"));
                let separator = Named("<｜tool▁sep｜>");
                if fenced {
                    let line = format!("{name}\n```json\n");
                    let head = self.text(&[call, Text("function"), separator, Text(&line)]);
                    return format!("{head} {arguments} {}", self.text(&[Text("\n```"), end]));
                }
                let head = self.text(&[call, Text(name), separator]);
                format!("{head} {arguments} {}", self.text(&[end]))
            }
            Family::Kimi => {
                let id = format!("functions.{name}:");
                let head = self.text(&[Named("<|tool_call_begin|>"), Text(&id)]);
                let (begin, end) =
                    (self.mark("<|tool_call_argument_begin|>"), self.mark("<|tool_call_end|>"));
                format!("{head} /[0-9]{{1,3}}/ {begin} {arguments} {end}")
            }
            Family::Harmony => {
                let to = literal(&format!(" to=functions.{name}"));
                let [channel, constrain, message] =
                    ["<|channel|>", "<|constrain|>", "<|message|>"].map(|name| self.mark(name));
                let head = format!("({channel} \"commentary\" {to} | {to} {channel} \"commentary\")");
                format!("{head} (\" \"? {constrain} \"json\" | \" json\")? {message} {arguments}")
            }
            Family::MiniMax => {
                let head = literal(&format!("\n<invoke name=\"{name}\">\n"));
                let key = |_: &Self, key: &str| literal(&format!("<parameter name=\"{key}\">"));
                let arguments = self.arguments(&schema, strict, &key, &[Text("</parameter>")]);
                format!("{head} {arguments} \"</invoke>\"")
            }
            Family::QwenXml => {
                let head = literal(&format!("\n<function={name}>\n"));
                let key = |_: &Self, key: &str| literal(&format!("<parameter={key}>\n"));
                let arguments = self.arguments(&schema, strict, &key, &[Text("\n</parameter>")]);
                format!("{head} {arguments} {}", self.text(&[Text("</function>\n"), Named("</tool_call>")]))
            }
            Family::Glm => {
                let key = |writer: &Self, key: &str| {
                    let (open, close) = (Named("<arg_key>"), Named("</arg_key>"));
                    writer.text(&[open, Text(key), close, Text("\n"), Named("<arg_value>")])
                };
                let arguments = self.arguments(&schema, strict, &key, &[Named("</arg_value>")]);
                let head = literal(&format!("{name}\n"));
                format!("{head} {arguments} {}", self.text(&[Named("</tool_call>")]))
            }
        }
    }

    /// Arguments as bare text between marks, in the schema's order; those that are not required may be left out.
    fn arguments(
        &mut self,
        schema: &Value,
        strict: bool,
        key: &dyn Fn(&Self, &str) -> String,
        close: &[Piece<'_>; 1],
    ) -> String {
        let [Text(end) | Named(end)] = close;
        let behind = |writer: &Self, before: &str| {
            let last = if matches!(close, [Named(_)]) { Named(end) } else { Text(end) };
            writer.text(&[Text(before), last, Text("\n")])
        };
        let properties = schema["properties"].as_object().into_iter().flatten();
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let mut out = String::new();
        for (name, property) in properties {
            let texts: Option<Vec<String>> = property["enum"]
                .as_array()
                .and_then(|values| values.iter().map(|value| value.as_str().map(String::from)).collect());
            let value = match (texts, property["type"].as_str()) {
                (Some(texts), _) if !texts.is_empty() => {
                    let texts: Vec<String> = texts.iter().map(|text| behind(self, text)).collect();
                    format!("({})", texts.join(" | "))
                }
                (_, Some("string")) | (_, None) => {
                    let text = self.until(end, matches!(close, [Named(_)]));
                    format!("{text} \"\\n\"")
                }
                // A schema within may refer to definitions of the whole.
                _ => {
                    let mut property = property.clone();
                    for definitions in ["$defs", "definitions"] {
                        if let (Some(map), Some(all)) = (property.as_object_mut(), schema.get(definitions)) {
                            map.insert(definitions.into(), all.clone());
                        }
                    }
                    let json = if strict { json(&property) } else { json_leniently(&property) };
                    format!("{json} {}", behind(self, ""))
                }
            };
            let argument = self.rule(&format!("{} {value}", key(self, name)));
            let optional = if required.iter().any(|required| required == name) { "" } else { "?" };
            _ = write!(out, "{argument}{optional} ");
        }
        out
    }
}

/// Text within a regular expression between slashes.
fn regex_text(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '\n' => out.push_str("\\n"),
            c if "\\.+*?()|[]{}^$/".contains(c) => out.extend(['\\', c]),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::super::check;
    use super::super::{Part, Types};
    use super::*;
    use std::sync::Arc;
    use vocab::{Token, Vocab};

    /// Every byte, and an end.
    fn compiler() -> grammar::Compiler {
        let byte = |byte: u32| Token { id: byte, bytes: vec![byte as u8], special: false };
        let end = Token { id: 256, bytes: b"<end>".to_vec(), special: true };
        let vocab = Vocab::new((0..255).map(byte).chain([end])).expect("a vocabulary");
        grammar::Compiler::new(Arc::new(vocab)).expect("a compiler")
    }

    /// Whether the grammar takes all of the text, and then ends.
    fn takes(lark: &str, text: &str) -> bool {
        let mut automaton = compiler().compile(lark).unwrap_or_else(|error| panic!("{error}\n{lark}"));
        let output: Vec<u32> = text.bytes().map(u32::from).collect();
        automaton.next(&output).is_ok_and(|mask| mask.may_end)
    }

    fn tool() -> Value {
        value!({"type": "function", "function": {"name": "f", "strict": true, "parameters": {"type": "object",
            "properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "e": {"enum": ["x", "y"]}},
            "required": ["s", "n"], "additionalProperties": false}}})
    }

    fn built(family: Family, parallel: bool, fenced: bool) -> Calls {
        calls(family, &[&tool()], parallel, fenced, &literal)
    }

    /// A call in the words of each family, `N` for the integer.
    const ANSWERS: [(Family, bool, &str); 8] = [
        (
            Family::Hermes,
            false,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"a b\", \"n\": N}}\n</tool_call>",
        ),
        (Family::Llama, false, "{\"name\": \"f\", \"parameters\": {\"s\": \"a b\", \"n\": N}}"),
        (
            Family::DeepSeek,
            true,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"s\": \"a b\", \"n\": N}\n```\
             <｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            Family::DeepSeek,
            false,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"s\": \"a b\", \"n\": N}<｜tool▁call▁end｜>\
             <｜tool▁calls▁end｜>",
        ),
        (
            Family::Kimi,
            false,
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>\
             {\"s\": \"a b\", \"n\": N}<|tool_call_end|><|tool_calls_section_end|>",
        ),
        (
            Family::MiniMax,
            false,
            "<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"s\">a b</parameter>\n\
             <parameter name=\"n\">N</parameter>\n</invoke>\n</minimax:tool_call>",
        ),
        (
            Family::Glm,
            false,
            "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>a b</arg_value>\n<arg_key>n</arg_key>\n\
             <arg_value>N</arg_value>\n</tool_call>",
        ),
        (
            Family::QwenXml,
            false,
            "<tool_call>\n<function=f>\n<parameter=s>\na b\n</parameter>\n<parameter=n>\nN\n</parameter>\n</function>\n\
             </tool_call>",
        ),
    ];

    #[test]
    fn each_family_is_held_to_its_own_form_and_to_the_schema() {
        for (family, fenced, answer) in ANSWERS {
            let calls = built(family, true, fenced);
            let lark = format!("start: {}\n{}", calls.calls, calls.rules);
            assert!(takes(&lark, &answer.replace('N', "12")), "{answer}\n{lark}");
            assert!(!takes(&lark, &answer.replace('N', "\"x\"")), "{family:?}: the schema says integer");
            assert!(!takes(&lark, "Hello."), "{family:?}: a call is demanded");
            // And what is forced is what is read.
            let read = check::called(family, &Types::new(&[tool()]), &answer.replace('N', "12"));
            assert_eq!(read[1], Part::Arguments("{\"s\": \"a b\", \"n\": 12}".into()), "{family:?}");
        }
    }

    #[test]
    fn several_calls_only_where_they_are_allowed() {
        let (family, fenced, answer) = ANSWERS[0];
        let twice = format!("{0}\n{0}", answer.replace('N', "1"));
        for parallel in [true, false] {
            let calls = built(family, parallel, fenced);
            assert_eq!(takes(&format!("start: {}\n{}", calls.calls, calls.rules), &twice), parallel);
        }
    }

    #[test]
    fn among_words_a_call_is_free_to_come_but_not_free_in_form() {
        for (family, fenced, answer) in ANSWERS {
            let calls = built(family, true, fenced);
            let Some(words) = calls.among_words else {
                assert_eq!(family, Family::Llama);
                continue;
            };
            let lark = format!("start: {words}\n{}", calls.rules);
            assert!(takes(&lark, "Hello, <b>."), "{family:?}\n{lark}");
            assert!(takes(&lark, &format!("Hm. {}", answer.replace('N', "12"))), "{family:?}\n{lark}");
            assert!(!takes(&lark, &answer.replace('N', "\"x\"")), "{family:?}");
        }
    }
}
