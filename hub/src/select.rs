//! Which of a repository's files a model needs. Pure: lists of names in, lists of names out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;

/// Weights in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The list of the files that share the weights.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The model's numbers. Fetched last of the small files: where it is, they are.
pub(crate) const CONFIG: &str = "config.json";

/// The quantisation that is taken when none is named, as by the other tools.
const USUAL: &str = "Q4_K_M";

/// Everything but weights that any family reads.
const TEXT: [&str; 15] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
];

/// Where a repository's weights are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// All in this safetensors file.
    Single(String),
    /// In the files that this index names; see [`index_files`].
    Indexed(String),
    /// In these GGUF files, in order.
    Gguf(Vec<String>),
}

/// The small files, those that say the most last.
pub(crate) fn text<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let mut found: Vec<&str> = names.iter().copied().filter(|name| TEXT.contains(name)).collect();
    found.sort_by_key(|name| *name == CONFIG);
    found
}

/// Where the weights are, of all `names` of a repository or directory. The error says what there is instead.
pub fn weights(names: &[&str], quant: Option<&str>) -> Result<Weights, String> {
    let models = ggufs(names);
    if quant.is_none() {
        for (name, weights) in
            [(SINGLE, Weights::Single(SINGLE.into())), (INDEX, Weights::Indexed(INDEX.into()))]
        {
            if names.contains(&name) {
                return Ok(weights);
            }
        }
    }
    let tags = || models.keys().cloned().collect::<Vec<_>>().join(", ");
    match (quant, models.len()) {
        (Some(quant), 0) => Err(format!("no GGUF files, so there is no {quant} of it")),
        (None, 0) => {
            let other = [".bin", ".pth", ".pt", ".safetensors", ".onnx"];
            match names.iter().find(|name| other.iter().any(|end| name.ends_with(end))) {
                Some(name) => Err(format!("neither {SINGLE} nor {INDEX} nor GGUF files ({name} is there)")),
                None => Err(format!("neither {SINGLE} nor {INDEX} nor GGUF files")),
            }
        }
        (Some(quant), _) => match of_quant(&models, quant) {
            Some(files) => whole(files),
            None => Err(format!("no quantisation {quant}; there are {}", tags())),
        },
        (None, 1) => models.values().next().map_or(Err("no GGUF files".into()), |files| whole(files)),
        (None, _) => match of_quant(&models, USUAL) {
            Some(files) => whole(files),
            None => Err(format!("several quantisations: name one of {} after a colon", tags())),
        },
    }
}

/// The files that an index's JSON names, all of them plain names beside it.
pub fn index_files(json: &[u8]) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    match files.iter().find(|file| !is_inside(file) || file.contains('/')) {
        Some(file) => Err(format!("weight file {file:?} is not a plain file name")),
        None if files.is_empty() => Err("names no weight file".into()),
        None => Ok(files.into_iter().collect()),
    }
}

/// Whether a stranger's file name stays below the directory that it is joined to.
pub(crate) fn is_inside(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', ':', '\0'])
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Names that match one of `globs`; `*` is any text, also over slashes, `?` one character.
pub(crate) fn matching<'a>(names: &[&'a str], globs: &[String]) -> Vec<&'a str> {
    names
        .iter()
        .copied()
        .filter(|name| globs.iter().any(|glob| matches(glob.as_bytes(), name.as_bytes())))
        .collect()
}

fn matches(glob: &[u8], name: &[u8]) -> bool {
    // Where to go on when what follows the last star does not fit: the star takes one byte more.
    let (mut g, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[n] => {
                g += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (g, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|&byte| byte == b'*')
}

/// GGUF models by quantisation tag; each is one file or the parts of one.
fn ggufs(names: &[&str]) -> BTreeMap<String, Vec<String>> {
    let mut models: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in names.iter().filter(|name| name.ends_with(".gguf")) {
        let file = name.rsplit('/').next().unwrap_or(name).trim_end_matches(".gguf");
        // Vision projectors and calibration data are no models.
        if file.to_ascii_lowercase().starts_with("mmproj") || file.to_ascii_lowercase().contains("imatrix") {
            continue;
        }
        models.entry(tag(file)).or_default().push((*name).to_owned());
    }
    for files in models.values_mut() {
        files.sort();
    }
    models
}

/// `Qwen3-0.6B-Q4_K_M-00001-of-00002` -> `Q4_K_M`; a name without a known tag is its own.
fn tag(stem: &str) -> String {
    let stem = part_of(stem).map_or(stem, |(stem, _, _)| stem);
    let is_tag = |text: &str| {
        let upper = text.to_ascii_uppercase();
        let digit_after = |start: &str| {
            upper.strip_prefix(start).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        };
        ["Q", "IQ", "TQ"].iter().any(|start| digit_after(start))
            || ["F16", "F32", "BF16", "FP16", "FP32"].contains(&upper.as_str())
            || upper.starts_with("MXFP")
    };
    let Some((before, last)) = stem.rsplit_once(['-', '.']) else { return stem.to_owned() };
    match is_tag(last) {
        // Unsloth's dynamic kinds carry their mark in front: UD-Q4_K_XL.
        true if before.to_ascii_uppercase().ends_with("-UD") => format!("UD-{last}"),
        true => last.to_owned(),
        false => stem.to_owned(),
    }
}

/// Stem, number and count of one part of a split file.
fn part_of(stem: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let number_of = |text: &str| if text.len() == 5 { text.parse::<usize>().ok() } else { None };
    Some((stem, number_of(number)?, number_of(count)?))
}

fn of_quant<'m>(models: &'m BTreeMap<String, Vec<String>>, quant: &str) -> Option<&'m Vec<String>> {
    models.iter().find(|(tag, _)| tag.eq_ignore_ascii_case(quant)).map(|(_, files)| files)
}

/// Checks that a model's parts are all there, once.
fn whole(files: &[String]) -> Result<Weights, String> {
    let stem = |file: &str| file.rsplit('/').next().unwrap_or(file).trim_end_matches(".gguf").to_owned();
    let first = stem(&files[0]);
    match part_of(&first) {
        None if files.len() == 1 => Ok(Weights::Gguf(files.to_vec())),
        None => Err(format!("{} and {} are the same quantisation: name one with --file", files[0], files[1])),
        Some((_, _, count)) => {
            let in_order = files.iter().enumerate().all(|(i, file)| {
                part_of(&stem(file)).is_some_and(|(_, number, of)| number == i + 1 && of == count)
            });
            match in_order && files.len() == count {
                true => Ok(Weights::Gguf(files.to_vec())),
                false => Err(format!("{} of the {count} parts of {first}", files.len())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repository holds much that a model does not need: other formats, images, originals.
    #[test]
    fn only_what_is_needed() {
        let names = [
            ".gitattributes",
            "LICENSE",
            "README.md",
            "config.json",
            "tokenizer.json",
            "original/consolidated.00.pth",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "pytorch_model.bin",
        ];
        assert_eq!(text(&names), ["tokenizer.json", "config.json"]);
        assert_eq!(weights(&names, None), Ok(Weights::Indexed(INDEX.into())));
        assert_eq!(weights(&["model.safetensors", INDEX], None), Ok(Weights::Single(SINGLE.into())));
        assert_eq!(
            weights(&["pytorch_model.bin"], None).unwrap_err(),
            "neither model.safetensors nor model.safetensors.index.json nor GGUF files (pytorch_model.bin is there)"
        );
    }

    #[test]
    fn one_quantisation_of_many() {
        let names = [
            "Qwen3-0.6B-BF16.gguf",
            "Qwen3-0.6B-Q4_K_M.gguf",
            "Qwen3-0.6B-UD-Q4_K_XL.gguf",
            "Q8_0/Qwen3-0.6B-Q8_0-00001-of-00002.gguf",
            "Q8_0/Qwen3-0.6B-Q8_0-00002-of-00002.gguf",
            "mmproj-F16.gguf",
            "Qwen3-0.6B.imatrix.gguf",
        ];
        let one = |file: &str| Ok(Weights::Gguf(vec![file.into()]));
        assert_eq!(weights(&names, None), one("Qwen3-0.6B-Q4_K_M.gguf"));
        assert_eq!(weights(&names, Some("bf16")), one("Qwen3-0.6B-BF16.gguf"));
        assert_eq!(weights(&names, Some("UD-Q4_K_XL")), one("Qwen3-0.6B-UD-Q4_K_XL.gguf"));
        let parts = names[3..5].iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(weights(&names, Some("Q8_0")), Ok(Weights::Gguf(parts)));
        assert_eq!(
            weights(&names, Some("Q2_K")).unwrap_err(),
            "no quantisation Q2_K; there are BF16, Q4_K_M, Q8_0, UD-Q4_K_XL"
        );
        assert_eq!(
            weights(&["a-Q5_0.gguf", "a-Q6_K.gguf"], None).unwrap_err(),
            "several quantisations: name one of Q5_0, Q6_K after a colon"
        );
        assert_eq!(weights(&["model.gguf"], None), one("model.gguf"));
        assert_eq!(
            weights(&names[3..4], Some("Q8_0")).unwrap_err(),
            "1 of the 2 parts of Qwen3-0.6B-Q8_0-00001-of-00002"
        );
        assert_eq!(weights(&[SINGLE], Some("Q4_0")).unwrap_err(), "no GGUF files, so there is no Q4_0 of it");
    }

    /// An index is a stranger's text.
    #[test]
    fn an_index_names_files_beside_it() {
        let files = |json: &str| index_files(json.as_bytes());
        assert_eq!(
            files(
                r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#
            ),
            Ok(vec!["m-1.safetensors".into(), "m-2.safetensors".into()])
        );
        for name in ["../x", "/etc/passwd", "a/b", "", "..", "c:x"] {
            let json = serde_json::json!({ "weight_map": { "a": name } }).to_string();
            assert_eq!(files(&json), Err(format!("weight file {name:?} is not a plain file name")));
        }
        assert_eq!(files(r#"{"weight_map": {}}"#), Err("names no weight file".into()));
    }

    #[test]
    fn globs() {
        let names = ["config.json", "sub/model-1.bin", "model-1.bin", "model-12.bin"];
        let of = |glob: &str| matching(&names, &[glob.into()]);
        assert_eq!(of("*.json"), ["config.json"]);
        assert_eq!(of("model-?.bin"), ["model-1.bin"]);
        assert_eq!(of("*model-1*"), ["sub/model-1.bin", "model-1.bin", "model-12.bin"]);
        assert_eq!(of("*1*2*"), ["model-12.bin"]);
        assert!(of("onfig.json").is_empty() && of("config.jso").is_empty() && of("").is_empty());
    }
}
