//! What the arguments of tools are, by their schemas: families that write arguments as bare text need it to make JSON.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::Value;

use crate::text::json::dumps;

/// Types of the arguments of all tools of a request.
#[derive(Debug, Clone, Default)]
pub struct Types(Arc<Tools>);

#[derive(Debug, Default)]
struct Tools {
    names: HashSet<String>,
    /// By the names of tool and argument.
    types: HashMap<(String, String), Vec<String>>,
}

impl Types {
    /// `tools`: definitions as OpenAI has them.
    pub fn new(tools: &[Value]) -> Self {
        let Tools { mut names, mut types } = Tools::default();
        for function in tools.iter().filter_map(|tool| tool.get("function")) {
            let name = function["name"].as_str().unwrap_or_default();
            names.insert(name.to_string());
            let properties = function["parameters"]["properties"].as_object().into_iter().flatten();
            for (key, schema) in properties {
                types.insert((name.to_string(), key.clone()), of_schema(schema));
            }
        }
        Self(Arc::new(Tools { names, types }))
    }

    /// Whether there is a tool of this name.
    pub fn have(&self, name: &str) -> bool {
        self.0.names.contains(name)
    }

    /// The JSON of an argument that the model wrote as bare text.
    pub fn json(&self, function: &str, key: &str, text: &str) -> String {
        let types = self.0.types.get(&(function.to_string(), key.to_string())).map_or(&[][..], Vec::as_slice);
        let allows = |kind: &str| types.is_empty() || types.iter().any(|allowed| allowed == kind);
        let only_string = !types.is_empty() && types.iter().all(|kind| kind == "string");
        let value = match serde_json::from_str::<Value>(text.trim()) {
            Ok(value) if !only_string && (allows(kind(&value)) || !allows("string")) => value,
            _ => match text.trim() {
                // As Python writes them.
                "True" if allows("boolean") && !only_string => true.into(),
                "False" if allows("boolean") && !only_string => false.into(),
                "None" if allows("null") && !only_string => Value::Null,
                _ => text.into(),
            },
        };
        dumps(&value)
    }
}

fn of_schema(schema: &Value) -> Vec<String> {
    let mut types = Vec::new();
    match &schema["type"] {
        Value::String(kind) => types.push(kind.clone()),
        Value::Array(kinds) => types.extend(kinds.iter().filter_map(Value::as_str).map(String::from)),
        _ => {}
    }
    let values = schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"));
    if types.is_empty() {
        types.extend(values.map(|value| kind(value).to_string()));
    }
    for key in ["anyOf", "oneOf"] {
        types.extend(schema[key].as_array().into_iter().flatten().flat_map(of_schema));
    }
    types
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_schema_decides() {
        let types = Types::new(&[json!({"function": {"name": "f", "parameters": {"properties": {
            "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
            "o": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "e": {"enum": ["1", "a"]},
            "l": {"type": ["array", "string"]}, "any": {}}}}})]);
        for (key, text, expected) in [
            ("s", "7", "\"7\""),
            ("s", " a\n", "\" a\\n\""),
            ("i", "7", "7"),
            ("i", "seven", "\"seven\""),
            ("n", "7", "7"),
            ("b", "true", "true"),
            ("b", "True", "true"),
            ("o", "null", "null"),
            ("o", "7", "\"7\""),
            ("e", "1", "\"1\""),
            ("l", "[1,2]", "[1, 2]"),
            ("l", "x", "\"x\""),
            ("any", "7", "7"),
            ("any", "x", "\"x\""),
            ("unknown", "{\"a\": 1}", "{\"a\": 1}"),
        ] {
            assert_eq!(types.json("f", key, text), expected, "{key} {text}");
        }
    }
}
