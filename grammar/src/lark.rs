//! Pieces of grammars in llguidance's dialect of Lark. A piece is the right side of a rule.

use serde_json::{Value, json};

/// White space between the parts of a JSON text: models like some, but may not fill a page with it.
const JSON_SPACE: &str = r"[\x20\x0A]{1,16}";

/// A grammar of one rule.
pub fn grammar(body: &str) -> String {
    format!("start: {body}\n")
}

/// This text.
pub fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// JSON of a schema.
pub fn json(schema: &Value) -> String {
    format!("%json {}", with_options(schema, false))
}

/// JSON of a schema, of which what is not supported is passed over.
pub fn json_leniently(schema: &Value) -> String {
    format!("%json {}", with_options(schema, true))
}

fn with_options(schema: &Value, lenient: bool) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    if let Some(map) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": JSON_SPACE, "lenient": lenient});
        map.insert("x-guidance".into(), options);
    }
    schema
}

/// One of these texts.
pub fn choice(texts: &[String]) -> String {
    let literals: Vec<String> = texts.iter().map(|text| literal(text)).collect();
    format!("({})", literals.join(" | "))
}

/// Text that the regular expression matches from end to end.
pub fn regex(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 2);
    out.push('/');
    let mut escaped = false;
    for c in pattern.chars() {
        match c {
            '/' if !escaped => out.push_str("\\/"),
            '\n' => out.push_str(if escaped { "n" } else { "\\n" }),
            c => out.push(c),
        }
        escaped = c == '\\' && !escaped;
    }
    out.push('/');
    out
}

/// A grammar with rules of its own; its `start` is this piece.
pub fn nested(lark: &str) -> String {
    format!("%lark {{\n{lark}\n}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delimiters_within_are_escaped() {
        assert_eq!(regex("a/b\\/c\n"), "/a\\/b\\/c\\n/");
        assert_eq!(choice(&["a\"b".into(), "\n".into()]), "(\"a\\\"b\" | \"\\n\")");
    }
}
