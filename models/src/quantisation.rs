//! How a configuration says that its weights are quantised: MLX's `quantization`, or Hugging Face's
//! `quantization_config`. Which tensors really are is seen from the tensors themselves.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::ModelError;
use crate::fields::Fields;

/// Format of quantised weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quantisation {
    /// MLX affine.
    Mlx {
        /// Of tensors without a word of their own.
        all: Affine,
        /// By name without `.weight`; `None`: not quantised.
        overrides: BTreeMap<String, Option<Affine>>,
    },
    /// DeepSeek's FP8: a scale per block of rows and columns.
    Fp8 {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
    /// compressed-tensors `pack-quantized`: symmetric, 4 bits.
    Int4 {
        /// Columns that share a scale.
        group: usize,
    },
}

/// Numbers of MLX's affine format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affine {
    /// Bits of a code, 2 to 8.
    pub bits: usize,
    /// Columns that share scale and bias.
    pub group: usize,
}

impl Quantisation {
    /// Reads `quantization` or `quantization_config`; `None` where neither says anything. A format that is not
    /// supported is an error that names it.
    pub(crate) fn read(fields: &mut Fields) -> Result<Option<Quantisation>, ModelError> {
        let mlx = fields.opt_object("quantization")?;
        let general = fields.opt_object("quantization_config")?;
        if let Some(mlx) = mlx {
            // MLX writes the same under the second name, for the hub.
            return Quantisation::mlx(mlx).map(Some);
        }
        let Some(mut general) = general else { return Ok(None) };
        let method = general.opt_text("quant_method")?;
        let found = match method.as_deref() {
            Some("fp8") => Quantisation::fp8(&mut general)?,
            Some("compressed-tensors") => Quantisation::compressed_tensors(&mut general)?,
            None if general.has("group_size") => return Quantisation::mlx(general).map(Some),
            Some(other) => {
                let reason = format!("{other:?} is not supported (known: fp8, compressed-tensors)");
                return Err(general.error("quant_method", reason));
            }
            None => return Err(general.error("quant_method", "missing")),
        };
        general.finish()?;
        Ok(Some(found))
    }

    fn mlx(mut fields: Fields) -> Result<Quantisation, ModelError> {
        let all = affine(&mut fields, None)?;
        let mut overrides = BTreeMap::new();
        for (name, value) in fields.unread() {
            let found = match &value {
                Value::Bool(false) => None,
                Value::Bool(true) => Some(all),
                Value::Object(map) => {
                    let mut inner = fields.nested(&name, map.clone());
                    let found = affine(&mut inner, Some(all))?;
                    inner.finish()?;
                    Some(found)
                }
                _ => return Err(fields.error(&name, format!("{value} is not supported"))),
            };
            overrides.insert(name, found);
        }
        Ok(Quantisation::Mlx { all, overrides })
    }

    /// Source: <https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md>
    fn fp8(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        fields.one_of("fmt", &["e4m3", "float8_e4m3fn"])?;
        fields.one_of("activation_scheme", &["dynamic"])?;
        // Scales that are powers of two are stored as f32 all the same.
        fields.one_of("scale_fmt", &["ue8m0", "float"])?;
        fields.harmless(&["modules_to_not_convert", "ignored_layers", "dequantize"]);
        match fields.sizes("weight_block_size")?[..] {
            [rows, cols] if rows > 0 && cols > 0 => Ok(Quantisation::Fp8 { rows, cols }),
            _ => Err(fields.error("weight_block_size", "only blocks of [rows, columns] are supported")),
        }
    }

    /// Source: <https://github.com/vllm-project/compressed-tensors>
    fn compressed_tensors(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        fields.one_of("format", &["pack-quantized"])?;
        fields.one_of("quantization_status", &["compressed", "frozen"])?;
        fields.harmless(&["ignore", "version", "global_compression_ratio"]);
        let Some(groups) = fields.opt_object("config_groups")? else {
            return Err(fields.error("config_groups", "missing"));
        };
        let mut found = None;
        for (name, value) in groups.unread() {
            let Value::Object(map) = value else { return Err(groups.error(&name, "not an object")) };
            let mut group = groups.nested(&name, map);
            group.harmless(&["targets"]);
            group.one_of("format", &["pack-quantized"])?;
            let Some(mut weights) = group.opt_object("weights")? else {
                return Err(group.error("weights", "missing"));
            };
            group.finish()?;
            if weights.opt_size("num_bits")? != Some(4) {
                return Err(weights.error("num_bits", "only 4 is supported"));
            }
            weights.one_of("type", &["int"])?;
            weights.one_of("strategy", &["group"])?;
            if !weights.flag("symmetric", true)? {
                return Err(weights.error("symmetric", "false is not supported"));
            }
            weights.harmless(&["observer", "observer_kwargs", "zp_dtype", "scale_dtype"]);
            let size = weights.size("group_size")?;
            weights.finish()?;
            if size % 8 != 0 || found.is_some_and(|found| found != size) {
                return Err(groups.error(&name, format!("groups of {size} columns are not supported")));
            }
            found = Some(size);
        }
        found
            .map(|group| Quantisation::Int4 { group })
            .ok_or_else(|| fields.error("config_groups", "no group"))
    }

    /// Bits and group of the MLX tensor `base` (a name without `.weight`).
    pub(crate) fn affine(&self, base: &str) -> Option<Affine> {
        match self {
            Quantisation::Mlx { all, overrides } => overrides.get(base).copied().unwrap_or(Some(*all)),
            _ => None,
        }
    }
}

/// `bits`, `group_size` and `mode` of an object; what is absent is that of `all`.
fn affine(fields: &mut Fields, all: Option<Affine>) -> Result<Affine, ModelError> {
    fields.one_of("mode", &["affine"])?;
    let bits = fields.opt_size("bits")?.or(all.map(|all| all.bits)).unwrap_or(4);
    let group = fields.opt_size("group_size")?.or(all.map(|all| all.group)).unwrap_or(64);
    if !(2..=8).contains(&bits) {
        return Err(fields.error("bits", format!("{bits} is not between 2 and 8")));
    }
    if group == 0 || group % 8 != 0 {
        return Err(fields.error("group_size", format!("{group} is not a multiple of 8")));
    }
    Ok(Affine { bits, group })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Option<Quantisation>, String> {
        let mut fields = Fields::parse("c", json.as_bytes()).unwrap();
        Quantisation::read(&mut fields).map_err(|error| error.to_string())
    }

    #[test]
    fn mlx_has_overrides_by_tensor() {
        let text = r#"{"quantization": {"group_size": 64, "bits": 4, "mode": "affine",
            "a.gate": {"group_size": 32, "bits": 8}, "b": false, "c": true, "d": {"bits": 6}},
            "quantization_config": {"group_size": 64, "bits": 4}}"#;
        let found = read(text).unwrap().unwrap();
        let of = |base| found.affine(base);
        assert_eq!(of("x"), Some(Affine { bits: 4, group: 64 }));
        assert_eq!(of("a.gate"), Some(Affine { bits: 8, group: 32 }));
        assert_eq!(of("b"), None);
        assert_eq!(of("c"), of("x"));
        assert_eq!(of("d"), Some(Affine { bits: 6, group: 64 }));
    }

    #[test]
    fn formats_are_known_or_named() {
        assert_eq!(read("{}"), Ok(None));
        let of = |config: &str| read(&format!(r#"{{"quantization_config": {config}}}"#));
        assert_eq!(
            of(
                r#"{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 64]}"#
            ),
            Ok(Some(Quantisation::Fp8 { rows: 128, cols: 64 }))
        );
        let int4 = r#"{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int",
            "symmetric": true, "strategy": "group", "group_size": 32, "actorder": null}}}}"#;
        assert_eq!(of(int4), Ok(Some(Quantisation::Int4 { group: 32 })));
        for (config, error) in [
            (
                r#"{"quant_method": "gptq", "bits": 4}"#.into(),
                "quant_method: \"gptq\" is not supported (known: fp8, compressed-tensors)",
            ),
            (
                r#"{"quant_method": "fp8"}"#.into(),
                "weight_block_size: only blocks of [rows, columns] are supported",
            ),
            (
                int4.replace("pack-quantized", "nvfp4-pack-quantized"),
                "format: \"nvfp4-pack-quantized\" is not supported (known: pack-quantized)",
            ),
            (
                int4.replace("\"symmetric\": true", "\"symmetric\": false"),
                "config_groups.group_0.weights.symmetric: false is not supported",
            ),
            (
                int4.replace("\"num_bits\": 4", "\"num_bits\": 8"),
                "config_groups.group_0.weights.num_bits: only 4 is supported",
            ),
            (
                int4.replace("null", "\"group\""),
                "config_groups.group_0.weights.actorder: \"group\" is not supported: it may change the computation",
            ),
            (r#"{"bits": 4}"#.into(), "quant_method: missing"),
        ] {
            assert_eq!(of(&config), Err(format!("c: quantization_config.{error}")), "{config}");
        }
        // MLX's other modes, of all tensors or of one.
        for (mode, bits, group) in [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)] {
            let numbers = format!(r#""group_size": {group}, "bits": {bits}, "mode": "{mode}""#);
            let error = |place: &str| {
                Err(format!("c: quantization.{place}: \"{mode}\" is not supported (known: affine)"))
            };
            assert_eq!(read(&format!(r#"{{"quantization": {{{numbers}}}}}"#)), error("mode"));
            let one =
                format!(r#"{{"quantization": {{"bits": 4, "group_size": 64, "lm_head": {{{numbers}}}}}}}"#);
            assert_eq!(read(&one), error("lm_head.mode"));
        }
    }
}
