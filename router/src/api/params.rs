//! What a request may say about how to generate, the same for chats and completions. Parsed here into a type; every value
//! is checked, and defaults are the model's own (`generation_config.json`).

use serde_json::{Value, json};

use super::batches::metadata;
use super::config::Limits;
use super::error::ApiError;
use super::fields::{Fields, integer, number};
use crate::inference::Sampling;
use crate::text::{Defaults, StopStrings};

/// Alternatives reported per token, as vLLM's `--max-logprobs`.
pub const TOP_LOGPROBS_MAX: i64 = 20;

/// Entries of `logit_bias`.
const LOGIT_BIAS_MAX: usize = 1024;

/// Bytes of one stop string.
const STOP_BYTES_MAX: usize = 1024;

/// Entries of `stop_token_ids`.
const STOP_IDS_MAX: usize = 128;

/// Below this a temperature is greedy: dividing by less would overflow.
const TEMPERATURE_MIN: f32 = 1e-4;

/// Known to OpenAI's or vLLM's users, and not served.
const UNSUPPORTED: [&str; 11] = [
    "dynatemp_range",
    "return_token_ids",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "bad_words",
    "logits_processors",
    "thinking_token_budget",
    "kv_transfer_params",
    "vllm_xargs",
];

/// Known to others, with the value that changes nothing.
const NEUTRAL: [(&str, f64); 4] = [("length_penalty", 1.0), ("typical_p", 1.0), ("top_a", 0.0), ("tfs", 1.0)];

/// The tier that answers name: there is one.
pub const TIER: &str = "default";

/// OpenAI's words; all are served alike here.
pub const TIERS: [&str; 6] = ["auto", "default", "flex", "scale", "priority", "standard_only"];

/// Which events of a stream carry the usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsageIn {
    /// None.
    No,
    /// One after all choices.
    Last,
    /// All, and that one.
    All,
}

/// What the parser must know of model and server.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Of the model.
    pub defaults: &'a Defaults,
    /// Ids below this exist.
    pub vocab: usize,
    /// Bounds.
    pub limits: &'a Limits,
}

/// Checked parameters.
#[derive(Debug, Clone)]
pub struct Params {
    /// Answers to each prompt.
    pub n: usize,
    /// Answers that are made for each prompt, of which the `n` likeliest are given; `n` but where a client asks for more.
    pub best_of: usize,
    /// As server-sent events.
    pub stream: bool,
    /// Which events carry the usage.
    pub usage: UsageIn,
    /// Output tokens at most; `None`: as many as fit, or the endpoint's default.
    pub max_tokens: Option<u32>,
    /// Output tokens before which nothing ends the answer.
    pub min_tokens: u32,
    /// Texts that end the answer.
    pub stop: StopStrings,
    /// The answer keeps the stop string that ends it.
    pub include_stop: bool,
    /// Ids that end the answer: the model's own unless `ignore_eos`, and the client's.
    pub stop_ids: Vec<u32>,
    /// Of `stop_ids`, those that the client named.
    pub stop_ids_given: Vec<u32>,
    /// Markup tokens give no text.
    pub skip_special: bool,
    /// Without the seed and without log probabilities, which the endpoints set.
    pub sampling: Sampling,
    /// As given; otherwise drawn per request.
    pub seed: Option<u64>,
    /// Prefixes are shared within equal salts.
    pub cache_salt: Vec<u8>,
    /// 0 or lower; lower runs later.
    pub priority: i32,
    /// Tell how likely each token of the prompt is, with so many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// The request names a tier, so its answer does.
    pub names_tier: bool,
    /// Choices tell where their time went.
    pub timings: bool,
}

impl Params {
    /// Reads what both endpoints share. `max_tokens` names the fields that bound the output, the strongest first; `least` of
    /// them is allowed.
    pub fn read(
        fields: &mut Fields,
        rules: &Rules<'_>,
        max_tokens: &[&str],
        least: i64,
    ) -> Result<Self, ApiError> {
        let defaults = rules.defaults;
        let ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
        let stop_ids_given = stop_token_ids(fields, rules.vocab)?;
        let mut stop_ids = if ignore_eos { Vec::new() } else { defaults.eos_ids.clone() };
        stop_ids.extend(stop_ids_given.iter().filter(|id| !defaults.eos_ids.contains(id) || ignore_eos));
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let n = fields.integer("n", 1..=rules.limits.sequences as i64)?.unwrap_or(1) as usize;
        let params = Self {
            n,
            best_of: n,
            stream,
            usage: stream_options(fields, stream)?,
            max_tokens: read_max_tokens(fields, max_tokens, least)?,
            min_tokens: fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32,
            stop: stop_strings(fields, rules.limits.stop_strings)?,
            include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
            stop_ids,
            stop_ids_given,
            skip_special: fields.boolean("skip_special_tokens")?.unwrap_or(true),
            sampling: sampling(fields, rules)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            cache_salt: fields.string("cache_salt")?.map(String::into_bytes).unwrap_or_default(),
            // vLLM counts the other way round: there, lower runs earlier. No client may overtake interactive requests.
            priority: -(fields.integer("priority", 0..=i64::from(i32::MAX))?.unwrap_or(0) as i32),
            prompt_logprobs: fields.integer("prompt_logprobs", 0..=TOP_LOGPROBS_MAX)?.map(|top| top as u32),
            names_tier: fields.word("service_tier", &TIERS)?.is_some(),
            timings: fields.boolean("baton_timings")?.unwrap_or(false),
        };
        params.check()?;
        tolerated(fields)?;
        Ok(params)
    }

    fn check(&self) -> Result<(), ApiError> {
        if let Some(max) = self.max_tokens.filter(|&max| max < self.min_tokens) {
            let expected = format!("at most the most tokens of an answer, {max}");
            return Err(ApiError::wrong_value("min_tokens", expected, self.min_tokens));
        }
        if self.stream && self.prompt_logprobs.is_some() {
            return Err(ApiError::unsupported("prompt_logprobs", "cannot be streamed"));
        }
        Ok(())
    }

    /// Output tokens at most, for a prompt of this length. `default`: where the request does not say; less if less fits.
    /// `param`: of the prompt, for errors.
    pub fn output_tokens(
        &self,
        prompt: usize,
        context: usize,
        default: Option<u32>,
        param: &str,
    ) -> Result<u32, ApiError> {
        let room = context.saturating_sub(prompt).min(u32::MAX as usize) as u32;
        match self.max_tokens {
            _ if room == 0 => Err(ApiError::context(param, context, prompt, None)),
            Some(max) if max > room => Err(ApiError::context(param, context, prompt, Some(max))),
            Some(max) => Ok(max),
            None => Ok(default.map_or(room, |default| default.min(room).max(self.min_tokens.min(room)))),
        }
    }
}

/// Fields that change nothing here, and fields that would change something that we do not serve.
fn tolerated(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "safety_identifier", "prompt_cache_key"] {
        fields.string(name)?;
    }
    fields.word("prompt_cache_retention", &["in_memory", "in-memory", "24h"])?;
    metadata(fields.object("metadata")?)?;
    fields.only("store", &json!(false), "is not supported: nothing is stored")?;
    fields.only("use_beam_search", &json!(false), "is not supported")?;
    fields.only("early_stopping", &json!(false), "is not supported: there is no beam search")?;
    fields.only("mirostat", &json!(0), "is not supported")?;
    for (name, neutral) in NEUTRAL {
        fields.only(name, &json!(neutral), "is not supported")?;
    }
    fields.only("spaces_between_special_tokens", &json!(true), "is not supported")?;
    fields.refuse(&UNSUPPORTED, "is not supported")
}

fn read_max_tokens(fields: &mut Fields, names: &[&str], least: i64) -> Result<Option<u32>, ApiError> {
    let mut strongest = None;
    for name in names {
        let value = fields.integer(name, least..=i64::from(u32::MAX))?;
        strongest = strongest.or(value.map(|max| max as u32));
    }
    Ok(strongest)
}

fn sampling(fields: &mut Fields, rules: &Rules<'_>) -> Result<Sampling, ApiError> {
    let defaults = rules.defaults;
    let temperature = fields.number("temperature", "a number from 0 to 2", |t| (0.0..=2.0).contains(&t))?;
    let temperature = temperature.unwrap_or(defaults.temperature);
    let top_p = fields.number("top_p", "a number from 0 to 1", |p| (0.0..=1.0).contains(&p))?;
    // None of the mass is the likeliest token alone: greedy.
    let (temperature, top_p) =
        if top_p == Some(0.0) { (0.0, 1.0) } else { (temperature, top_p.unwrap_or(defaults.top_p)) };
    let penalty = |p: f64| (-2.0..=2.0).contains(&p);
    Ok(Sampling {
        temperature: if temperature < TEMPERATURE_MIN { 0.0 } else { temperature },
        top_p,
        // -1 is vLLM's word for all.
        top_k: fields.integer("top_k", -1..=i64::from(i32::MAX))?.map_or(defaults.top_k, |k| k.max(0) as u32),
        min_p: fields
            .number("min_p", "a number from 0 to 1", |p| (0.0..=1.0).contains(&p))?
            .unwrap_or(defaults.min_p),
        presence_penalty: fields.number("presence_penalty", "a number from -2 to 2", penalty)?.unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", "a number from -2 to 2", penalty)?
            .unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty", "a number above 0 and up to 2", |p| {
                (f64::from(f32::MIN_POSITIVE)..=2.0).contains(&p)
            })?
            .unwrap_or(defaults.repetition_penalty),
        logit_bias: logit_bias(fields, rules.vocab)?,
        ..Sampling::default()
    })
}

fn logit_bias(fields: &mut Fields, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(object) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let map = object.rest();
    if map.len() > LOGIT_BIAS_MAX {
        return Err(ApiError::wrong_value(
            "logit_bias",
            format!("at most {LOGIT_BIAS_MAX} entries"),
            map.len(),
        ));
    }
    let mut biases = map
        .into_iter()
        .map(|(key, value)| {
            let name = format!("logit_bias.{key}");
            let id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
            let id = id.ok_or_else(|| {
                ApiError::wrong_value("logit_bias", format!("token ids below {vocab}"), &key)
            })?;
            Ok((
                id,
                number(&name, &value, "a number from -100 to 100", |bias| (-100.0..=100.0).contains(&bias))?,
            ))
        })
        .collect::<Result<Vec<_>, ApiError>>()?;
    biases.sort_by_key(|(id, _)| *id);
    biases.dedup_by_key(|(id, _)| *id); // "7" and "07"
    Ok(biases)
}

fn stop_token_ids(fields: &mut Fields, vocab: usize) -> Result<Vec<u32>, ApiError> {
    let items = fields.array("stop_token_ids")?.unwrap_or_default();
    if items.len() > STOP_IDS_MAX {
        return Err(ApiError::wrong_value(
            "stop_token_ids",
            format!("at most {STOP_IDS_MAX} entries"),
            items.len(),
        ));
    }
    let read = |(i, item): (usize, &Value)| {
        integer(&format!("stop_token_ids[{i}]"), item, 0..=vocab as i64 - 1).map(|id| id as u32)
    };
    items.iter().enumerate().map(read).collect()
}

/// A string or a list of strings.
fn stop_strings(fields: &mut Fields, most: usize) -> Result<StopStrings, ApiError> {
    let mut alone = false;
    let items = match fields.take("stop") {
        None => return Ok(StopStrings::default()),
        Some(Value::Array(items)) => items,
        Some(text @ Value::String(_)) => {
            alone = true;
            vec![text]
        }
        Some(other) => return Err(ApiError::wrong_type("stop", "a string or an array of strings", &other)),
    };
    if items.len() > most {
        return Err(ApiError::wrong_value("stop", format!("at most {most} stop strings"), items.len()));
    }
    let mut strings = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let name = if alone { "stop".into() } else { format!("stop[{i}]") };
        match item.as_str() {
            Some(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => strings.push(text),
            Some(text) => {
                let expected = format!("a string of 1 to {STOP_BYTES_MAX} bytes");
                return Err(ApiError::wrong_value(&name, expected, format!("{} bytes", text.len())));
            }
            None => return Err(ApiError::wrong_type(&name, "a string", item)),
        }
    }
    Ok(StopStrings::new(&strings))
}

/// Which events carry the usage.
fn stream_options(fields: &mut Fields, stream: bool) -> Result<UsageIn, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(UsageIn::No) };
    if !stream {
        let message = "The parameter 'stream_options' is allowed only together with 'stream': true.";
        return Err(ApiError::bad("stream_options", "invalid_value", message));
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.only("include_obfuscation", &json!(false), "is not supported")?;
    let continuous = options.boolean("continuous_usage_stats")?.unwrap_or(false);
    options.finish()?;
    Ok(match (include_usage, continuous) {
        (_, true) => UsageIn::All,
        (true, false) => UsageIn::Last,
        (false, false) => UsageIn::No,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Params, ApiError> {
        let defaults = Defaults { temperature: 0.6, top_k: 20, eos_ids: vec![2, 3], ..Defaults::default() };
        let limits = Limits::for_context(100);
        let rules = Rules { defaults: &defaults, vocab: 50, limits: &limits };
        let mut fields = Fields::parse(json.as_bytes())?;
        let params = Params::read(&mut fields, &rules, &["max_completion_tokens", "max_tokens"], 1)?;
        fields.finish()?;
        Ok(params)
    }

    #[test]
    fn what_is_not_said_is_the_models_own() {
        let params = read("{}").expect("valid");
        assert_eq!((params.sampling.temperature, params.sampling.top_k, params.n), (0.6, 20, 1));
        assert_eq!((params.stop_ids, params.max_tokens, params.seed), (vec![2, 3], None, None));
    }

    #[test]
    fn every_parameter_arrives() {
        let params = read(
            r#"{"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
                "repetition_penalty": 1.5, "seed": -1, "logit_bias": {"9": -100, "4": 1.5}, "stop": ["a", "b"],
                "stop_token_ids": [7, 2], "max_tokens": 9, "max_completion_tokens": 5, "min_tokens": 3, "ignore_eos": true,
                "n": 2, "stream": true, "stream_options": {"include_usage": true}, "cache_salt": "s", "priority": 4,
                "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "skip_special_tokens": false,
                "include_stop_str_in_output": true, "store": false}"#,
        )
        .expect("valid");
        let sampling = Sampling {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 0,
            min_p: 0.1,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            repetition_penalty: 1.5,
            logit_bias: vec![(4, 1.5), (9, -100.0)],
            ..Sampling::default()
        };
        assert_eq!(params.sampling, sampling);
        assert_eq!((params.stop_ids, params.max_tokens, params.min_tokens), (vec![7, 2], Some(5), 3));
        assert_eq!((params.seed, params.priority, params.n), (Some(u64::MAX), -4, 2));
        assert_eq!((params.usage, params.best_of), (UsageIn::Last, 2));
        assert!(params.stream && params.include_stop && !params.skip_special);
        assert_eq!((params.stop.get(1), params.cache_salt), ("b", b"s".to_vec()));
    }

    #[test]
    fn no_mass_at_all_is_greedy_and_neutral_values_pass() {
        let params = read(
            r#"{"temperature": 2, "top_p": 0, "typical_p": 1, "mirostat": 0, "top_a": 0, "tfs": 1.0, "early_stopping": false,
                "length_penalty": 1, "bad_words": [], "return_token_ids": false,
                "stream": true, "stream_options": {"continuous_usage_stats": true}}"#,
        )
        .expect("valid");
        assert_eq!((params.sampling.temperature, params.sampling.top_p), (0.0, 1.0));
        assert_eq!(params.usage, UsageIn::All);
    }

    #[test]
    fn prompt_and_answer_fit_the_context_or_both_numbers_are_named() {
        let free = read("{}").expect("valid");
        assert_eq!(free.output_tokens(60, 100, None, "messages"), Ok(40));
        assert_eq!(free.output_tokens(60, 100, Some(16), "prompt"), Ok(16));
        assert_eq!(free.output_tokens(90, 100, Some(16), "prompt"), Ok(10));
        let error = free.output_tokens(100, 100, None, "messages").unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (Some("context_length_exceeded"), Some("messages")));
        let bound = read(r#"{"max_tokens": 41}"#).expect("valid");
        assert_eq!(bound.output_tokens(59, 100, None, "messages"), Ok(41));
        let error = bound.output_tokens(60, 100, None, "messages").unwrap_err();
        assert!(
            ["100 tokens", "60 tokens", "41 tokens"].iter().all(|n| error.message.contains(n)),
            "{}",
            error.message
        );
    }

    #[test]
    fn a_wrong_value_names_its_parameter() {
        for (json, param) in [
            (r#"{"temperature": 2.1}"#, "temperature"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"top_p": -0.1}"#, "top_p"),
            (r#"{"length_penalty": 2}"#, "length_penalty"),
            (r#"{"service_tier": "gold"}"#, "service_tier"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"min_p": 1.1}"#, "min_p"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty"),
            (r#"{"frequency_penalty": -3}"#, "frequency_penalty"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"repetition_penalty": 1e-40}"#, "repetition_penalty"),
            (r#"{"seed": 1.5}"#, "seed"),
            (r#"{"stop": 1}"#, "stop"),
            (r#"{"stop": ["a", ""]}"#, "stop[1]"),
            (r#"{"stop": ["a", 1]}"#, "stop[1]"),
            (r#"{"stop_token_ids": [50]}"#, "stop_token_ids[0]"),
            (r#"{"max_tokens": 0}"#, "max_tokens"),
            (r#"{"max_completion_tokens": -1}"#, "max_completion_tokens"),
            (r#"{"min_tokens": 5, "max_tokens": 4}"#, "min_tokens"),
            (r#"{"logit_bias": {"50": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"4": 101}}"#, "logit_bias.4"),
            (r#"{"logit_bias": [1]}"#, "logit_bias"),
            (r#"{"n": 0}"#, "n"),
            (r#"{"n": 17}"#, "n"),
            (r#"{"stream": 1}"#, "stream"),
            (r#"{"stream_options": {"include_usage": true}}"#, "stream_options"),
            (r#"{"stream": true, "stream_options": {"x": true}}"#, "stream_options.x"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
            (r#"{"response_format": {"type": "json_schema", "json_schema": {}}}"#, "response_format"),
            (r#"{"guided_json": {}}"#, "guided_json"),
            (r#"{"store": true}"#, "store"),
            (r#"{"priority": -1}"#, "priority"),
            (r#"{"user": 1}"#, "user"),
            (r#"{"temprature": 1}"#, "temprature"),
        ] {
            assert_eq!(read(json).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }
}
