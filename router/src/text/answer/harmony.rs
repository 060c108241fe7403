//! Answers of gpt-oss, in OpenAI's Harmony format: messages of a header and a body,
//! `<|start|>assistant<|channel|>final<|message|>..<|end|>`, of which the prompt has written `<|start|>assistant`. The channel says
//! what the body is: `analysis` is reasoning, `final` is for the user, and so is `commentary`, words before a call. A message
//! with a recipient, `to=functions.NAME` before or behind the channel, is a call. Source: openai/harmony, docs/format.md.
//!
//! Models get headers wrong: two channels, none, no `<|message|>`. Whatever is no word of a header is given out; what is not
//! certainly for the user is reasoning, and so is what the model writes to tools that nobody gave it.

use super::tags::{Buffer, Found};
use super::{Opening, Part, ToolParser, Types, append};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const CONSTRAIN: &str = "<|constrain|>";
const MESSAGE: &str = "<|message|>";
const END: &str = "<|end|>";

/// Tokens that end an answer.
pub const ENDS: [&str; 2] = ["<|return|>", "<|call|>"];

/// All of the markup.
pub const MARKS: [&str; 7] = [START, CHANNEL, CONSTRAIN, MESSAGE, END, ENDS[0], ENDS[1]];

/// What ends a header.
const AFTER_HEADER: [&str; 5] = [MESSAGE, START, END, ENDS[0], ENDS[1]];

const ROLE: &str = "assistant";
const TO: &str = "to=";
const CHANNELS: [&str; 3] = ["analysis", "commentary", "final"];

/// Where the words of two messages meet.
const BETWEEN: &str = "\n\n";

/// The parser.
#[derive(Debug)]
pub struct Harmony {
    /// Of the request's tools; `None`: there are none, and so no calls.
    tools: Option<Types>,
    state: State,
    buffer: Buffer,
    /// As far as it has come.
    header: String,
    /// A mark has opened it: what follows are no words without a header.
    opened: bool,
    /// What words without a header are: as those of the message before.
    bare: State,
    /// There was text; there was reasoning.
    spoke: bool,
    reasoned: bool,
    /// Of this message nothing is out.
    fresh: bool,
    /// White space that belongs to arguments if more of them follows.
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Reasoning,
    Text,
    Arguments,
}

impl Harmony {
    /// `opening`: the prompt ends in a header (`ByModel`), in reasoning (`Open`) or in words for the user (`Closed`).
    pub fn new(tools: Option<Types>, opening: Opening) -> Self {
        let state = match opening {
            Opening::ByModel => State::Header,
            Opening::Open => State::Reasoning,
            Opening::Closed => State::Text,
        };
        Self {
            tools,
            state,
            buffer: Buffer::default(),
            header: String::new(),
            opened: false,
            bare: State::Text,
            spoke: false,
            reasoned: false,
            fresh: true,
            held: String::new(),
        }
    }

    /// The name of the function that is called, if it is one.
    fn function<'a>(&self, recipient: &'a str) -> Option<&'a str> {
        let tools = self.tools.as_ref()?;
        let name = recipient.strip_prefix("functions.").or(Some(recipient).filter(|name| tools.have(name)))?;
        (!name.is_empty()).then_some(name)
    }

    /// The header has come to its end by `tag`, or with the answer.
    fn head(&mut self, tag: Option<&str>, parts: &mut Vec<Part>) {
        let text = std::mem::take(&mut self.header);
        let header = Header::of(&text);
        let rest = header.rest.trim();
        if tag == Some(MESSAGE) {
            // One word is a type of content.
            if rest.contains(char::is_whitespace) {
                self.begin(State::Reasoning);
                self.body(rest, parts);
            }
            self.address(&header, header.channel != CHANNELS[0], parts);
            return;
        }
        // A word that the answer's end has cut is none.
        let words = MARKS.iter().chain(&CHANNELS).chain(&[ROLE, TO]);
        let cut = tag.is_none() && words.into_iter().any(|word| word.starts_with(rest));
        if !(rest.is_empty() || cut) {
            self.address(&header, header.channel == CHANNELS[2], parts);
            self.body(rest, parts);
            self.end(parts);
        }
        self.state = State::Header;
    }

    /// Begins the message of a header. `for_user`: by its channel.
    fn address(&mut self, header: &Header<'_>, for_user: bool, parts: &mut Vec<Part>) {
        if let Some(name) = self.function(header.recipient) {
            append(parts, Part::Call { id: None, name: name.to_string() });
            return self.begin(State::Arguments);
        }
        let aside = !matches!(header.recipient, "" | ROLE | "user" | "all");
        self.begin(if for_user && !aside { State::Text } else { State::Reasoning });
    }

    fn begin(&mut self, state: State) {
        (self.state, self.fresh) = (state, true);
        self.bare = if state == State::Reasoning { State::Reasoning } else { State::Text };
    }

    /// More of a message.
    fn body(&mut self, text: &str, parts: &mut Vec<Part>) {
        if text.is_empty() {
            return;
        }
        if self.state == State::Arguments {
            return self.arguments(text, parts);
        }
        let reasoning = self.state == State::Reasoning;
        let before = std::mem::replace(if reasoning { &mut self.reasoned } else { &mut self.spoke }, true);
        let between = if before && self.fresh { BETWEEN } else { "" };
        self.fresh = false;
        let text = format!("{between}{text}");
        append(parts, if reasoning { Part::Reasoning(text) } else { Part::Text(text) });
    }

    /// White space around arguments is layout.
    fn arguments(&mut self, text: &str, parts: &mut Vec<Part>) {
        let text = if self.fresh { text.trim_start() } else { text };
        let words = text.trim_end();
        if !words.is_empty() {
            self.fresh = false;
            append(parts, Part::Arguments(format!("{}{words}", std::mem::take(&mut self.held))));
        }
        if !self.fresh {
            self.held.push_str(&text[words.len()..]);
        }
    }

    /// The message has ended.
    fn end(&mut self, parts: &mut Vec<Part>) {
        if self.state == State::Arguments {
            if self.fresh {
                append(parts, Part::Arguments("{}".into()));
            }
            append(parts, Part::CallEnd);
        }
        self.held.clear();
        self.state = State::Header;
    }
}

impl ToolParser for Harmony {
    fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.buffer.push(text);
        loop {
            let tags: &[&str] = if self.state == State::Header { &AFTER_HEADER } else { &MARKS };
            let (text, tag) = match self.buffer.until(tags) {
                Found::Text(text) => (text, None),
                Found::Tag(text, which) => (text, Some(tags[which])),
            };
            if self.state == State::Header {
                self.header.push_str(&text);
                if !self.opened && !begins_header(&self.header) {
                    // Words without a header: read again as such.
                    let words =
                        std::mem::take(&mut self.header) + tag.unwrap_or_default() + &self.buffer.rest();
                    self.buffer.push(&words);
                    self.begin(self.bare);
                } else if tag.is_some() {
                    self.head(tag, parts);
                    self.opened = tag == Some(START);
                } else {
                    return;
                }
                continue;
            }
            self.body(&text, parts);
            match tag {
                None => return,
                // Out of place.
                Some(MESSAGE | CONSTRAIN) => {}
                Some(tag) => {
                    self.end(parts);
                    self.opened = tag == START;
                    if tag == CHANNEL {
                        self.header.push_str(CHANNEL);
                    }
                }
            }
        }
    }

    /// A call that broke off keeps what it has of its arguments.
    fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = self.buffer.rest();
        if self.state == State::Header {
            self.header.push_str(&rest);
            return self.head(None, parts);
        }
        self.body(&rest, parts);
        self.end(parts);
    }

    fn is_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }
}

/// What a prompt ends in: in a header, or in the body of the message that is gone on with.
pub fn opening(prompt: &str) -> Opening {
    let last = prompt.rsplit_once(START).map_or(prompt, |(_, last)| last);
    match last.split_once(MESSAGE) {
        Some((_, body)) if body.contains(END) || ENDS.iter().any(|end| body.contains(end)) => {
            Opening::ByModel
        }
        Some((header, _)) if Header::of(header).channel == CHANNELS[0] => Opening::Open,
        Some(_) => Opening::Closed,
        None => Opening::ByModel,
    }
}

/// Whether a header that no mark has opened may begin so.
fn begins_header(text: &str) -> bool {
    let (role, mark) = text.split_at(text.find('<').unwrap_or(text.len()));
    let marked = [CHANNEL, CONSTRAIN].iter().any(|full| full.starts_with(mark) || mark.starts_with(full));
    let whole = !mark.is_empty() || role.ends_with(char::is_whitespace);
    let mut words = role.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let word = word.trim_start_matches(ROLE);
        let begun = !whole && words.peek().is_none() && [ROLE, TO].iter().any(|full| full.starts_with(word));
        if !(word.is_empty() || word.starts_with(TO) || begun) {
            return false;
        }
    }
    marked
}

/// What a header says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Header<'a> {
    /// The last that is named, of `CHANNELS`; or none.
    channel: &'a str,
    /// The last that is named.
    recipient: &'a str,
    /// What is no word of a header.
    rest: String,
}

impl<'a> Header<'a> {
    fn of(mut text: &'a str) -> Self {
        /// What the next word is.
        enum Place {
            Role,
            Channel,
            Type,
            Behind,
        }
        let part = |c: char| c.is_alphanumeric() || "_-.:/".contains(c);
        let run = |text: &'a str| text.split_once(|c| !part(c)).map_or(text, |(run, _)| run);
        let (mut place, mut header) = (Place::Role, Self::default());
        loop {
            let words = text.trim_start();
            let word = run(words);
            text = if words.is_empty() {
                return header;
            } else if let Some(behind) = words.strip_prefix(CHANNEL) {
                place = Place::Channel;
                behind
            } else if let Some(behind) = words.strip_prefix(CONSTRAIN) {
                place = Place::Type;
                behind
            } else if let Some(to) = words.strip_prefix(TO) {
                header.recipient = run(to);
                &to[header.recipient.len()..]
            } else {
                let length = match place {
                    Place::Role if words.starts_with(ROLE) => ROLE.len(),
                    Place::Channel if CHANNELS.contains(&word) => {
                        (place, header.channel) = (Place::Behind, word);
                        word.len()
                    }
                    Place::Type if !word.is_empty() => {
                        place = Place::Behind;
                        word.len()
                    }
                    // As the chat template writes it.
                    Place::Behind if word == "json" && !header.recipient.is_empty() => word.len(),
                    _ => {
                        let next = [CHANNEL, CONSTRAIN].iter().filter_map(|mark| words.find(mark)).min();
                        let end = next.unwrap_or(words.len());
                        header.rest.push_str(&words[..end]);
                        end
                    }
                };
                &words[length..]
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::check::{call, called, parts, reasoning, text};
    use super::super::{Family, Reading};
    use super::*;

    /// With the tools `f` and `browser.open`.
    fn run(answer: &str) -> Vec<Part> {
        let tool = |name: &str| json!({"function": {"name": name}});
        called(Family::Harmony, &Types::new(&[tool("f"), tool("browser.open")]), answer)
    }

    fn without_tools(opening: Opening, answer: &str) -> Vec<Part> {
        parts(&Reading { tools: None, reasoning: Some(opening), family: Some(Family::Harmony) }, answer)
    }

    const THOUGHT: &str = "<|channel|>analysis<|message|>Hm, <b>.\n<|end|><|start|>assistant";

    #[test]
    fn channels_say_what_is_reasoning_and_what_is_for_the_user() {
        let answer = format!("{THOUGHT}<|channel|>final<|message|> 2 < 3 <|x \n");
        let both = [reasoning("Hm, <b>.\n"), text(" 2 < 3 <|x \n")];
        assert_eq!(run(&answer), both);
        assert_eq!(without_tools(Opening::ByModel, &answer), both);
        assert_eq!(without_tools(Opening::ByModel, &format!("{answer}<|return|>")), both);
        let preamble = format!("{THOUGHT}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant");
        assert_eq!(run(&preamble), [reasoning("Hm, <b>.\n"), text("I look.")]);
        let form = "<|channel|>final <|constrain|>json<|message|>{\"a\": 1}";
        assert_eq!(run(form), [text("{\"a\": 1}")]);
    }

    #[test]
    fn messages_of_a_kind_stand_apart() {
        let thoughts =
            format!("{THOUGHT}{THOUGHT}<|channel|>commentary<|message|>a<|end|><|start|>assistant");
        let answer = format!("{thoughts}{THOUGHT}<|channel|>final<|message|>b");
        let hm = "Hm, <b>.\n";
        let expected =
            [reasoning(&format!("{hm}\n\n{hm}")), text("a"), reasoning(&format!("\n\n{hm}")), text("\n\nb")];
        assert_eq!(run(&answer), expected);
    }

    #[test]
    fn a_recipient_anywhere_in_the_header_makes_a_call() {
        for header in [
            "<|channel|>commentary to=functions.f <|constrain|>json",
            "<|channel|>commentary to=functions.f<|constrain|>json",
            "<|channel|>commentary to=functions.f json",
            "<|channel|>commentary to=functions.f code",
            "<|channel|>analysis to=functions.f",
            "<|channel|>commentary to=f",
            " to=functions.f<|channel|>commentary json",
            " to=functions.f<|channel|>analysis <|constrain|>json",
            "<|channel|>commentary to=assistant<|channel|>commentary to=functions.f",
        ] {
            let answer = format!("{header}<|message|>{{}}");
            assert_eq!(run(&answer), call("f", "{}"), "{answer}");
        }
        for end in ["", "<|call|>", "<|end|>", "<|start|>assistant"] {
            let head = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>";
            let answer = format!("{THOUGHT}{head}\n{{\"a\": \"<|b \"}}\n{end}");
            let expected = [vec![reasoning("Hm, <b>.\n")], call("f", "{\"a\": \"<|b \"}")].concat();
            assert_eq!(run(&answer), expected, "{answer}");
        }
        let named = "<|channel|>commentary to=browser.open<|message|><|call|>";
        assert_eq!(run(named), call("browser.open", "{}"), "a tool of that name was given");
        let two = "<|channel|>commentary to=functions.f<|message|>{}<|end|><|start|>assistant to=functions.g\
                   <|channel|>commentary<|message|>[1, <|end|>";
        assert_eq!(run(two), [call("f", "{}"), call("g", "[1,")].concat(), "arguments are what was written");
    }

    /// Protects: nobody gets a call of a tool that the model was not given, and nothing of it is lost.
    #[test]
    fn what_is_written_to_other_tools_is_reasoning() {
        let python = "<|channel|>analysis to=python code<|message|>print(1)<|call|>";
        let search = " to=browser.search<|channel|>commentary<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>a";
        assert_eq!(run(python), [reasoning("print(1)")]);
        assert_eq!(run(search), [reasoning("{}"), text("a")]);
        let call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>";
        assert_eq!(without_tools(Opening::ByModel, call), [reasoning("{}")]);
    }

    #[test]
    fn broken_headers_lose_no_text_and_leak_no_markup() {
        let done = "<|end|><|start|>assistant<|channel|>final<|message|>b";
        for (begin, expected) in [
            // As gpt-oss has been seen to write them.
            ("<|channel|>commentary<|channel|>analysis<|message|>a", vec![reasoning("a"), text("b")]),
            (
                "<|channel|>commentary to=assistant<|channel|>analysis<|message|>a",
                vec![reasoning("a"), text("b")],
            ),
            ("<|channel|>commentary?commentary?", vec![reasoning("?commentary?"), text("b")]),
            ("<|channel|>??", vec![reasoning("??"), text("b")]),
            ("<|channel|>We need a word", vec![reasoning("We need a word"), text("b")]),
            ("<|channel|>analysis We <need> a", vec![reasoning("We <need> a"), text("b")]),
            ("<|channel|>final a", vec![text("a\n\nb")]),
            ("<|channel|>final<|message|><|message|>a", vec![text("a\n\nb")]),
            ("<|channel|>??<|message|>a", vec![text("a\n\nb")]),
            ("<|channel|>final as I said<|message|>a", vec![reasoning("as I said"), text("a\n\nb")]),
            (
                "<|channel|>analysis<|message|>a<|channel|>analysis<|message|>c",
                vec![reasoning("a\n\nc"), text("b")],
            ),
            ("<|start|><|start|>assistant<|channel|>analysis<|message|>a", vec![reasoning("a"), text("b")]),
            ("assistantassistant<|channel|>analysis<|message|>a", vec![reasoning("a"), text("b")]),
            ("<|message|>a", vec![text("a\n\nb")]),
            ("a to=b <|channel|>analysis<|message|>c", vec![text("a to=b "), reasoning("c"), text("\n\nb")]),
            ("A", vec![text("A\n\nb")]),
            ("<|channel|>analysis<|message|>a<|end|> so", vec![reasoning("a\n\n so"), text("b")]),
            ("<b>A</b>", vec![text("<b>A</b>\n\nb")]),
            ("<|start|>user<|message|>a", vec![text("a\n\nb")]),
            ("<|start|>So it is", vec![reasoning("So it is"), text("b")]),
            (
                "<|channel|>We need <|channel|>analysis<|message|>a",
                vec![reasoning("We need\n\na"), text("b")],
            ),
            ("", vec![text("b")]),
        ] {
            assert_eq!(run(&format!("{begin}{done}")), expected, "{begin}");
        }
        let bare = "<|channel|>commentary to=functions.f <|constrain|>json{\"a\": 1}<|call|>";
        assert_eq!(run(bare), call("f", "{\"a\": 1}"));
        let after = format!("{}\n<|start|>", &done["<|end|>".len()..]);
        assert_eq!(run(&after), [text("b\n")]);
    }

    /// Protects: `max_tokens` may end an answer at any token, and no markup is told as words.
    #[test]
    fn a_header_that_is_cut_off_is_none() {
        let tokens = [
            "<|end|>",
            "<|start|>",
            "assist",
            "ant",
            "<|channel|>",
            "comment",
            "ary",
            " to",
            "=",
            "functions",
            ".f",
            " ",
            "<|constrain|>",
            "js",
            "on",
        ];
        for cut in 0..=tokens.len() {
            let answer = format!("<|channel|>analysis<|message|>Hm{}", tokens[..cut].concat());
            assert_eq!(run(&answer), [reasoning("Hm")], "{answer}");
        }
        for begun in ["<|channel|>final", "<|channel|>fin", " to", "to=functions.f<|channel|>"] {
            assert_eq!(run(begun), [], "{begun}");
        }
        assert_eq!(run("<|channel|>commentary to=f<|message|>{\"a\""), call("f", "{\"a\""));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever a model writes, however it is cut: no mark is told as words, and calls are whole.
        #[test]
        fn nothing_that_a_model_writes_leaks(at in prop::collection::vec(0..WRITTEN.len(), 0..9)) {
            let answer: String = at.iter().map(|at| WRITTEN[*at]).collect();
            let mut open = false;
            for part in run(&answer) {
                let (opens, goes_on, ends) = match &part {
                    Part::Call { .. } => (true, false, false),
                    Part::Arguments(_) => (false, true, false),
                    Part::CallEnd => (false, true, true),
                    Part::Text(_) | Part::Reasoning(_) => (false, false, false),
                };
                prop_assert_eq!(open, goes_on, "{:?}", &part);
                open = (open || opens) && !ends;
                if let Part::Text(words) | Part::Reasoning(words) | Part::Arguments(words) = part {
                    prop_assert!(!MARKS.iter().any(|mark| words.contains(mark)), "{:?}", words);
                }
            }
            prop_assert!(!open);
        }
    }

    const WRITTEN: [&str; 16] = [
        "<|start|>",
        "<|channel|>",
        "<|constrain|>",
        "<|message|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "assistant",
        "analysis",
        "commentary",
        "final",
        " to=functions.f",
        "json",
        " ",
        "{}",
        "So <b",
    ];

    #[test]
    fn an_answer_goes_on_where_the_prompt_ends() {
        for (prompt, expected) in [
            ("<|start|>user<|message|>a<|end|><|start|>assistant", Opening::ByModel),
            ("<|start|>user<|message|>a<|end|>", Opening::ByModel),
            ("<|end|><|start|>assistant<|channel|>final<|message|>Hi", Opening::Closed),
            ("<|end|><|start|>assistant<|channel|>analysis<|message|>Hm", Opening::Open),
        ] {
            assert_eq!(opening(prompt), expected, "{prompt}");
        }
        assert_eq!(without_tools(Opening::Closed, " you"), [text(" you")]);
        let rest = "a<|end|><|start|>assistant<|channel|>final<|message|>b";
        assert_eq!(without_tools(Opening::Open, rest), [reasoning("a"), text("b")]);
    }

    #[test]
    fn the_parser_knows_when_the_model_reasons() {
        let mut parser = Harmony::new(None, Opening::ByModel);
        let mut parts = Vec::new();
        let mut reasons = |text: &str| {
            parser.push(text, &mut parts);
            parser.is_reasoning()
        };
        let steps = [
            "<|channel|>analysis",
            "<|message|>",
            "a",
            "<|end|>",
            "<|start|>assistant<|channel|>final<|message|>",
        ];
        assert_eq!(steps.map(&mut reasons), [false, true, true, false, false]);
    }
}
