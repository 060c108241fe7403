//! What a user has answered: lines in OpenAI's batch format (vLLM's `run_batch` has the same), bodies of requests, or plain
//! prompts. Told apart by the first line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::How;

/// How the lines of a file are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`
    OpenAi,
    /// `{"messages": [...]}` or `{"prompt": ...}`
    Bodies,
    /// Text.
    Prompts,
}

/// An input file.
#[derive(Debug)]
pub struct Input {
    file: File,
    /// How it is written.
    pub form: Form,
    /// What its lines ask for.
    pub endpoint: &'static str,
}

/// A line as a server takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Unique in its file.
    pub id: String,
    /// JSON, without the end of line.
    pub line: String,
}

const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"];

impl Input {
    /// Opens `path`, a file, and looks at its first line. `text`: every line is a prompt.
    pub fn open(path: &Path, text: bool) -> Result<Input> {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("cannot read {shown}"))?;
        let kind = file.metadata().with_context(|| format!("cannot read {shown}"))?;
        ensure!(kind.is_file(), "{shown} is no file: lines are read more than once");
        let mut first = String::new();
        let mut lines = BufReader::new(&file);
        while first.trim().is_empty() {
            first.clear();
            ensure!(
                lines.read_line(&mut first).with_context(|| format!("cannot read {shown}"))? > 0,
                "{shown} has no lines"
            );
            first = without_mark(&first).to_owned();
        }
        let (form, endpoint) = form(&first, text).with_context(|| format!("first line of {shown}"))?;
        Ok(Input { file, form, endpoint })
    }

    /// Goes over all lines that are not blank. `model` is for lines that name none.
    pub fn each(&self, how: &How, model: &str, mut take: impl FnMut(Request) -> Result<()>) -> Result<()> {
        use std::io::Seek;
        (&self.file).rewind()?;
        for (number, line) in (1..).zip(BufReader::new(&self.file).lines()) {
            let line = line.with_context(|| format!("line {number}"))?;
            let line = if number == 1 { without_mark(&line) } else { &line };
            if !line.trim().is_empty() {
                take(request(self, number, line, how, model).with_context(|| format!("line {number}"))?)?;
            }
        }
        Ok(())
    }
}

/// Without the byte order mark that some editors begin a file with.
fn without_mark(line: &str) -> &str {
    line.strip_prefix('\u{feff}').unwrap_or(line)
}

fn form(first: &str, text: bool) -> Result<(Form, &'static str)> {
    let chat = ENDPOINTS[0];
    if text {
        return Ok((Form::Prompts, chat));
    }
    let Ok(value) = serde_json::from_str::<Value>(first) else {
        // A line that begins like an object was meant to be one.
        ensure!(!first.trim_start().starts_with('{'), "not valid JSON (--text takes lines as prompts)");
        return Ok((Form::Prompts, chat));
    };
    if value.get("custom_id").is_some() || value.get("body").is_some() {
        let url = value["url"].as_str().unwrap_or_default();
        let endpoint = ENDPOINTS.into_iter().find(|endpoint| *endpoint == url);
        return Ok((
            Form::OpenAi,
            endpoint.with_context(|| format!("url is {url:?}: one of {}", ENDPOINTS.join(", ")))?,
        ));
    }
    match (value.get("messages"), value.get("prompt"), value.get("input")) {
        (Some(_), ..) => Ok((Form::Bodies, chat)),
        (_, Some(_), _) => Ok((Form::Bodies, "/v1/completions")),
        (.., Some(_)) => Ok((Form::Bodies, "/v1/responses")),
        _ if value.is_object() => {
            bail!("an object with neither custom_id and body, nor messages, prompt or input")
        }
        _ => Ok((Form::Prompts, chat)),
    }
}

fn request(input: &Input, number: u64, line: &str, how: &How, model: &str) -> Result<Request> {
    let object =
        || serde_json::from_str::<Value>(line).ok().filter(Value::is_object).context("not a JSON object");
    let mut body = match input.form {
        Form::OpenAi => {
            let id = object()?["custom_id"].as_str().context("no custom_id")?.to_owned();
            return Ok(Request { id, line: line.trim().to_owned() });
        }
        Form::Bodies => object()?,
        Form::Prompts => {
            // A line that is a JSON string may hold line ends.
            let text = serde_json::from_str::<String>(line).unwrap_or_else(|_| line.to_owned());
            let system = how.system.iter().map(|text| json!({"role": "system", "content": text}));
            let messages: Vec<Value> = system.chain([json!({"role": "user", "content": text})]).collect();
            let mut body = json!({ "messages": messages });
            if let Some(tokens) = how.max_tokens {
                body["max_tokens"] = tokens.into();
            }
            if let Some(temperature) = how.temperature {
                body["temperature"] = json!(temperature);
            }
            body
        }
    };
    let id = name(number, &body, how);
    if body.get("model").is_none() {
        body["model"] = model.into();
    }
    let line = json!({"custom_id": id, "method": "POST", "url": input.endpoint, "body": body}).to_string();
    Ok(Request { id, line })
}

/// Names a line by its place and by what it asks: answers of a file that was changed since are not taken for its own.
fn name(number: u64, body: &Value, how: &How) -> String {
    let sum = Sha256::digest(format!("{body} {:?}", how.model));
    let sum: String = sum[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("line-{number}-{sum}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how() -> How {
        How {
            text: false,
            model: None,
            system: Some("be brief".into()),
            max_tokens: Some(5),
            temperature: None,
            window: "24h".into(),
        }
    }

    fn requests(name: &str, content: &str, text: bool) -> Result<Vec<Request>> {
        let path = std::env::temp_dir().join(format!("baton-batch-{name}-{}", std::process::id()));
        std::fs::write(&path, content)?;
        let mut all = Vec::new();
        let read = Input::open(&path, text).and_then(|input| {
            input.each(&how(), "m", |request| {
                all.push(request);
                Ok(())
            })
        });
        std::fs::remove_file(path)?;
        read.map(|()| all)
    }

    #[test]
    fn every_form_becomes_requests() {
        let line =
            r#"{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}"#;
        let all = requests("openai", &format!("\n{line}\n\n"), false).expect("reads");
        assert_eq!(all, [Request { id: "a".into(), line: line.into() }]);
        assert_eq!(requests("marked", &format!("\u{feff}{line}\n"), false).expect("reads"), all);

        let all = requests("bodies", "{\"prompt\": \"x\"}\n\n{\"prompt\": \"y\", \"model\": \"n\"}", false)
            .expect("reads");
        let value = |request: &Request| serde_json::from_str::<Value>(&request.line).expect("JSON");
        assert!(all[0].id.starts_with("line-1-") && all[1].id.starts_with("line-3-"), "{all:?}");
        assert_eq!(value(&all[0])["url"], "/v1/completions");
        assert_eq!(
            (&value(&all[0])["body"]["model"], &value(&all[1])["body"]["model"]),
            (&json!("m"), &json!("n"))
        );

        let all = requests("prompts", "Hello\n\"two\\nlines\"\n", false).expect("reads");
        let content = |i: usize| value(&all[i])["body"]["messages"][1]["content"].clone();
        assert_eq!((content(0), content(1)), (json!("Hello"), json!("two\nlines")));
        assert_eq!(value(&all[0])["body"]["max_tokens"], 5);
        let marked = requests("marked-prompts", "\u{feff}Hello\n\"two\\nlines\"\n", false);
        assert_eq!(marked.expect("reads"), all);
        // What was answered is known by what it asked.
        let changed = requests("changed", "Hello!\n\"two\\nlines\"\n", false).expect("reads");
        assert!(changed[0].id != all[0].id && changed[1].id == all[1].id, "{changed:?} {all:?}");
        let all = requests("text", "{not JSON\n", true).expect("reads");
        assert_eq!(value(&all[0])["body"]["messages"][1]["content"], "{not JSON");
        for wrong in ["", "{not JSON", "{\"a\": 1}", r#"{"custom_id": "a", "url": "/x", "body": {}}"#] {
            assert!(requests("wrong", wrong, false).is_err(), "{wrong}");
        }
    }
}
