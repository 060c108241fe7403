//! The lines of an input: where each begins, and whether each is a request. Pure over a reader; used by `store` and `job`.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead};

use serde_json::Value;

use crate::record::{Endpoint, Problem};

/// Problems that are told of one input; the rest would not help.
const PROBLEMS_MAX: usize = 100;

/// What some editors begin a file of UTF-8 with: no part of its first line.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Longest `custom_id`.
const CUSTOM_ID_BYTES_MAX: usize = 512;

/// What lines must be.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// Of every line.
    pub endpoint: Endpoint,
    /// What is wrong with a model's name, if anything, in words for clients.
    pub model: &'a dyn Fn(&str) -> Result<(), String>,
    /// Longest line.
    pub line_bytes: u64,
    /// Most lines.
    pub lines: u64,
    /// Stops looking.
    pub stop: &'a dyn Fn() -> bool,
}

/// What was found in an input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Lines that are not blank.
    pub lines: u64,
    /// What is wrong; nothing: all lines can be answered.
    pub problems: Vec<Problem>,
    /// It was told to stop before the end.
    pub stopped: bool,
}

/// Goes over the lines of an input that are not blank.
pub struct Scan<R> {
    reader: R,
    line_bytes: u64,
    line: Vec<u8>,
    at: u64,
    number: u64,
}

/// One line.
pub struct Seen<'s> {
    /// Counted from 1, blank ones too.
    pub number: u64,
    /// Where it begins.
    pub begin: u64,
    /// Its bytes, without the end of line. Empty where it is too long.
    pub bytes: &'s [u8],
    /// It is longer than allowed.
    pub too_long: bool,
}

impl<R: BufRead> Scan<R> {
    /// Lines of at most `line_bytes`.
    pub fn new(reader: R, line_bytes: u64) -> Scan<R> {
        Scan { reader, line_bytes, line: Vec::new(), at: 0, number: 0 }
    }

    /// The next line that is not blank.
    pub fn next_line(&mut self) -> io::Result<Option<Seen<'_>>> {
        loop {
            let (begin, mut too_long) = (self.at, false);
            self.line.clear();
            // By pieces: a line of a gigabyte takes no gigabyte.
            loop {
                let piece = self.reader.fill_buf()?;
                if piece.is_empty() {
                    break;
                }
                let end = piece.iter().position(|&byte| byte == b'\n');
                let taken = end.map_or(piece.len(), |end| end + 1);
                let content = &piece[..end.unwrap_or(piece.len())];
                if self.line.len() as u64 + content.len() as u64 > self.line_bytes {
                    too_long = true;
                    self.line.clear();
                }
                if !too_long {
                    self.line.extend_from_slice(content);
                }
                self.reader.consume(taken);
                self.at += taken as u64;
                if end.is_some() {
                    break;
                }
            }
            if self.at == begin {
                return Ok(None);
            }
            self.number += 1;
            let marked = begin == 0 && self.line.starts_with(BYTE_ORDER_MARK);
            let before = if marked { BYTE_ORDER_MARK.len() } else { 0 };
            if too_long || !self.line[before..].trim_ascii().is_empty() {
                break Ok(Some(Seen {
                    number: self.number,
                    begin: begin + before as u64,
                    bytes: self.line[before..].trim_ascii_end(),
                    too_long,
                }));
            }
        }
    }
}

/// Looks at every line.
pub fn check(reader: impl BufRead, rules: &Rules) -> io::Result<Checked> {
    let mut found = Checked::default();
    // Two hashes under keys of this moment stand for an id: nobody can make two ids collide.
    let (first, second) = (RandomState::new(), RandomState::new());
    let mut ids = HashSet::new();
    let mut scan = Scan::new(reader, rules.line_bytes);
    while let Some(line) = scan.next_line()? {
        if (rules.stop)() {
            found.stopped = true;
            return Ok(found);
        }
        found.lines += 1;
        if found.lines > rules.lines {
            let message = format!("The input has more than {} lines.", rules.lines);
            found.problems.push(Problem { code: "too_many_lines".into(), message, param: None, line: None });
            return Ok(found);
        }
        let known = |id: &str| !ids.insert((first.hash_one(id), second.hash_one(id)));
        if let Err(problem) = check_line(&line, rules, known) {
            found.problems.push(problem);
            if found.problems.len() == PROBLEMS_MAX {
                return Ok(found);
            }
        }
    }
    if found.lines == 0 {
        let message = "The input has no lines.".into();
        found.problems.push(Problem { code: "empty_file".into(), message, param: None, line: None });
    }
    Ok(found)
}

fn check_line(line: &Seen, rules: &Rules, known: impl FnOnce(&str) -> bool) -> Result<(), Problem> {
    let problem = |code: &str, param: Option<&str>, message: String| Problem {
        code: code.into(),
        message,
        param: param.map(Into::into),
        line: Some(line.number),
    };
    if line.too_long {
        let message = format!("This line is longer than {} bytes.", rules.line_bytes);
        return Err(problem("line_too_long", None, message));
    }
    let value: Value = serde_json::from_slice(line.bytes).map_err(|error| {
        problem("invalid_json_line", None, format!("This line is not valid JSON: {error}."))
    })?;
    if !value.is_object() {
        return Err(problem("invalid_json_line", None, "This line is not a JSON object.".into()));
    }
    let missing = |name: &str| {
        let message = format!("Missing required parameter: '{name}'.");
        problem("missing_required_parameter", Some(name), message)
    };
    let id = value["custom_id"].as_str().filter(|id| !id.is_empty()).ok_or_else(|| missing("custom_id"))?;
    if id.len() > CUSTOM_ID_BYTES_MAX {
        let message = format!("'custom_id' is longer than {CUSTOM_ID_BYTES_MAX} bytes.");
        return Err(problem("invalid_custom_id", Some("custom_id"), message));
    }
    if known(id) {
        let message = format!("The custom_id {id:?} was used on a line before.");
        return Err(problem("duplicate_custom_id", Some("custom_id"), message));
    }
    if value["method"].as_str().ok_or_else(|| missing("method"))? != "POST" {
        return Err(problem("invalid_method", Some("method"), "'method' must be POST.".into()));
    }
    let endpoint = rules.endpoint.as_str();
    if value["url"].as_str().ok_or_else(|| missing("url"))? != endpoint {
        let message = format!("'url' must be the batch's endpoint, {endpoint}.");
        return Err(problem("invalid_url", Some("url"), message));
    }
    let body = value["body"].as_object().ok_or_else(|| missing("body"))?;
    if let Some(Value::String(model)) = body.get("model") {
        (rules.model)(model).map_err(|message| problem("model_not_found", Some("body.model"), message))?;
    }
    if body.get("stream").and_then(Value::as_bool) == Some(true) {
        let message = "'stream' is not supported in a batch.".into();
        return Err(problem("unsupported_parameter", Some("body.stream"), message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Checked {
        let rules = Rules {
            endpoint: Endpoint::Chat,
            model: &|name| if name == "m" { Ok(()) } else { Err(format!("not {name}")) },
            line_bytes: 200,
            lines: 5,
            stop: &|| false,
        };
        // A small buffer: lines come in pieces.
        check(io::BufReader::with_capacity(7, text.as_bytes()), &rules).expect("reads")
    }

    fn line(id: &str) -> String {
        format!(
            r#"{{"custom_id": "{id}", "method": "POST", "url": "/v1/chat/completions", "body": {{"model": "m"}}}}"#
        )
    }

    #[test]
    fn every_wrong_line_is_named() {
        let good = checked(&format!("{}\r\n\n  \n{}", line("a"), line("b")));
        assert_eq!((good.lines, good.problems), (2, vec![]));
        let wrong = |line: &str| {
            let found = checked(line);
            assert_eq!(found.problems.len(), 1, "{line}");
            (found.problems[0].code.clone(), found.problems[0].line)
        };
        let text = line("a");
        for (bad, code) in [
            ("{", "invalid_json_line"),
            ("[]", "invalid_json_line"),
            ("{}", "missing_required_parameter"),
            (&text.replace("POST", "GET"), "invalid_method"),
            (&text.replace("/v1/chat/completions", "/v1/completions"), "invalid_url"),
            (&text.replace(r#"{"model": "m"}"#, "3"), "missing_required_parameter"),
            (&text.replace(r#""m""#, r#""n""#), "model_not_found"),
            (&text.replace(r#""m""#, r#""m", "stream": true"#), "unsupported_parameter"),
            (&text.replace(r#""m""#, &format!(r#""{}""#, "m".repeat(200))), "line_too_long"),
        ] {
            assert_eq!(wrong(bad), (code.into(), Some(1)), "{bad}");
        }
        assert_eq!(wrong(&format!("\n{text}\n{text}")), ("duplicate_custom_id".into(), Some(3)));
        assert_eq!(wrong("\n \n"), ("empty_file".into(), None));
        let many: Vec<String> = (0..6).map(|i| line(&i.to_string())).collect();
        assert_eq!(wrong(&many.join("\n")), ("too_many_lines".into(), None));
    }

    #[test]
    fn lines_know_where_they_begin() {
        let mut scan = Scan::new(io::BufReader::with_capacity(3, "a\n\nbcdef\nghij".as_bytes()), 4);
        let mut seen = Vec::new();
        while let Some(line) = scan.next_line().expect("reads") {
            seen.push((line.number, line.begin, line.bytes.to_vec(), line.too_long));
        }
        assert_eq!(
            seen,
            [(1, 0, b"a".to_vec(), false), (3, 3, vec![], true), (4, 9, b"ghij".to_vec(), false)]
        );
        // A byte order mark is before the first line, and nowhere else.
        let text = "\u{feff}a\n\u{feff}b";
        let mut scan = Scan::new(io::BufReader::with_capacity(2, text.as_bytes()), 4);
        for (begin, bytes) in [(3, "a"), (5, "\u{feff}b")] {
            let line = scan.next_line().expect("reads").expect("a line");
            assert_eq!((line.begin, line.bytes), (begin, bytes.as_bytes()));
        }
    }
}
