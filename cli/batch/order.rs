//! Answers in the order of their input: where each line of a file of answers is, and what it says.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Where a line is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where it begins.
    pub begin: u64,
    /// Without the end of line.
    pub bytes: usize,
    /// It got what it asked for.
    pub good: bool,
}

/// Lines of a file of answers by `custom_id`; the last of an id counts. What is no answer is left out: a line that was being
/// written when the process died, a question.
pub fn places(path: &Path) -> Result<HashMap<String, Place>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (mut places, mut begin, mut line) = (HashMap::new(), 0, Vec::new());
    let mut reader = BufReader::new(file);
    loop {
        line.clear();
        let read =
            reader.read_until(b'\n', &mut line).with_context(|| format!("cannot read {}", path.display()))?;
        if read == 0 {
            return Ok(places);
        }
        let bytes = line.trim_ascii_end().len();
        if let Ok(value) = serde_json::from_slice::<Value>(&line)
            && let Some(id) = value["custom_id"].as_str()
            && (value.get("response").is_some() || value.get("error").is_some())
        {
            let good = value["error"].is_null() && value["response"]["status_code"] == 200;
            places.insert(id.to_owned(), Place { begin, bytes, good });
        }
        begin += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_bad_and_broken_lines() {
        let path = std::env::temp_dir().join(format!("baton-batch-order-{}", std::process::id()));
        let good = r#"{"custom_id": "a", "response": {"status_code": 200}, "error": null}"#;
        let bad = r#"{"custom_id": "b", "response": {"status_code": 400}, "error": null}"#;
        let none = r#"{"custom_id": "c", "response": null, "error": {"code": "batch_expired"}}"#;
        let question = r#"{"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {}}"#;
        std::fs::write(&path, format!("{good}\n{bad}\n{none}\n{question}\n{}", &good[..20])).expect("writes");
        let places = places(&path).expect("reads");
        std::fs::remove_file(&path).expect("cleans up");
        let of = |id: &str| places[id];
        assert_eq!(of("a"), Place { begin: 0, bytes: good.len(), good: true });
        assert_eq!(of("b"), Place { begin: good.len() as u64 + 1, bytes: bad.len(), good: false });
        assert!(!of("c").good && places.len() == 3);
    }
}
