//! `generation_config.json`: what a model's makers recommend, used where a request says nothing. As vLLM does, with one
//! difference: `do_sample: false` means greedy, which is what it says.

use serde::Deserialize;

/// Values for requests that leave them open.
#[derive(Debug, Clone, PartialEq)]
pub struct Defaults {
    /// 1 unless the file says otherwise.
    pub temperature: f32,
    /// (0, 1].
    pub top_p: f32,
    /// 0: all.
    pub top_k: u32,
    /// [0, 1].
    pub min_p: f32,
    /// > 0.
    pub repetition_penalty: f32,
    /// Output tokens, where a request does not say how many.
    pub max_new_tokens: Option<u32>,
    /// Ids that end an answer.
    pub eos_ids: Vec<u32>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: None,
            eos_ids: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
struct File {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
    eos_token_id: Option<Ids>,
}

/// `eos_token_id` is one id or several.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

impl Defaults {
    /// From the bytes of the file. The error says what is wrong with it.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let ours = Self::default();
        let greedy = file.do_sample == Some(false) && file.temperature.is_none();
        let defaults = Self {
            temperature: file.temperature.unwrap_or(if greedy { 0.0 } else { ours.temperature }),
            top_p: file.top_p.unwrap_or(ours.top_p),
            top_k: file.top_k.unwrap_or(ours.top_k),
            min_p: file.min_p.unwrap_or(ours.min_p),
            repetition_penalty: file.repetition_penalty.unwrap_or(ours.repetition_penalty),
            max_new_tokens: file.max_new_tokens.filter(|&max| max > 0),
            eos_ids: file.eos_token_id.map(Ids::into_vec).unwrap_or_default(),
        };
        let checks = [
            (
                "temperature",
                defaults.temperature,
                defaults.temperature >= 0.0 && defaults.temperature.is_finite(),
            ),
            ("top_p", defaults.top_p, defaults.top_p > 0.0 && defaults.top_p <= 1.0),
            ("min_p", defaults.min_p, (0.0..=1.0).contains(&defaults.min_p)),
            ("repetition_penalty", defaults.repetition_penalty, defaults.repetition_penalty > 0.0),
        ];
        match checks.iter().find(|(_, _, good)| !good) {
            Some((name, value, _)) => Err(format!("{name} is {value}")),
            None => Ok(defaults),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_the_file_says() {
        let defaults = Defaults::parse(
            br#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [151645, 151643], "other": {}}"#,
        );
        let expected = Defaults {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
            eos_ids: vec![151645, 151643],
            ..Defaults::default()
        };
        assert_eq!(defaults, Ok(expected));
    }

    #[test]
    fn do_sample_false_is_greedy() {
        let defaults = Defaults::parse(br#"{"do_sample": false, "eos_token_id": 2}"#).expect("valid");
        assert_eq!((defaults.temperature, defaults.eos_ids), (0.0, vec![2]));
    }

    #[test]
    fn nonsense_is_named() {
        assert_eq!(Defaults::parse(br#"{"top_p": 0}"#), Err("top_p is 0".into()));
        assert!(Defaults::parse(b"{").is_err());
    }
}
