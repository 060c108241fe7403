//! How a configuration says that its weights are quantised: MLX's `quantization`, Hugging Face's `quantization_config`, or
//! ModelOpt's file. Which tensors really are is seen from the tensors themselves.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::ModelError;
use crate::fields::Fields;

/// Format of quantised weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quantisation {
    /// MLX's.
    Mlx {
        /// Of tensors without a word of their own.
        all: Mlx,
        /// By name without `.weight`; `None`: not quantised.
        overrides: BTreeMap<String, Option<Mlx>>,
    },
    /// FP8 codes. Whether a tensor has one scale, one per output or one per block is seen from its scales.
    Fp8 {
        /// Rows and columns of a block, where there are blocks.
        block: Option<(usize, usize)>,
    },
    /// compressed-tensors: FP8 and whole numbers, some tensors in one form and some in another.
    Compressed {
        /// Rows and columns of a block of FP8, where there are blocks.
        block: Option<(usize, usize)>,
        /// Forms of packed whole numbers.
        ints: Vec<Ints>,
        /// Columns that share a scale of FP4, where there is FP4.
        fp4: Vec<usize>,
    },
    /// ModelOpt's FP4, and gpt-oss's: columns that share a scale.
    Fp4 {
        /// Columns.
        group: usize,
    },
    /// AWQ's.
    Awq(Ints),
    /// GPTQ's.
    Gptq {
        /// Bits and groups.
        ints: Ints,
        /// What zero points are more than what is stored.
        zeros_more: u8,
        /// Whether inputs may come in another order than their groups.
        reordered: bool,
    },
}

/// A form of packed whole numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ints {
    /// Bits of a code.
    pub bits: usize,
    /// Columns that share a scale; `None`: all of an output.
    pub group: Option<usize>,
}

/// One of MLX's formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlx {
    /// Whole numbers with scale and bias.
    Affine {
        /// Bits of a code, 2 to 8.
        bits: usize,
        /// Columns that share scale and bias.
        group: usize,
    },
    /// E2M1; of 32 columns a scale that is a power of two.
    Mxfp4,
    /// E2M1; of 16 columns a scale in E4M3.
    Nvfp4,
    /// E4M3; of 32 columns a scale that is a power of two.
    Mxfp8,
}

impl Mlx {
    /// Bits of a code, and columns that share a scale.
    pub const fn sizes(self) -> (usize, usize) {
        match self {
            Mlx::Affine { bits, group } => (bits, group),
            Mlx::Mxfp4 => (4, 32),
            Mlx::Nvfp4 => (4, 16),
            Mlx::Mxfp8 => (8, 32),
        }
    }
}

impl Quantisation {
    /// Reads `quantization` or `quantization_config`; `None` where neither says anything. A format that is not
    /// supported is an error that names it.
    pub(crate) fn read(fields: &mut Fields) -> Result<Option<Quantisation>, ModelError> {
        let mlx = fields.opt_object("quantization")?;
        // Early compressed-tensors had a name of its own.
        let early = fields.opt_object("compression_config")?;
        let general = fields.opt_object("quantization_config")?.or(early);
        if let Some(mlx) = mlx {
            // MLX writes the same under the second name, for the hub.
            return Quantisation::mlx(mlx).map(Some);
        }
        let Some(mut general) = general else { return Ok(None) };
        let method = general.opt_text("quant_method")?;
        let found = match method.as_deref() {
            Some("fp8") => Quantisation::fp8(&mut general)?,
            Some("modelopt") => Quantisation::modelopt(&mut general)?,
            Some("compressed-tensors") => Quantisation::compressed_tensors(&mut general)?,
            Some("awq") => Quantisation::awq(&mut general)?,
            Some("gptq") => Quantisation::gptq(&mut general)?,
            Some("mxfp4") => {
                general.harmless(&["dequantize", "modules_to_not_convert"]);
                Quantisation::Fp4 { group: 32 }
            }
            None if general.has("group_size") => return Quantisation::mlx(general).map(Some),
            Some(other) => {
                let reason = format!("{other:?} is not supported (known: {})", METHODS.join(", "));
                return Err(general.error("quant_method", reason));
            }
            None => return Err(general.error("quant_method", "missing")),
        };
        general.finish()?;
        Ok(Some(found))
    }

    fn mlx(mut fields: Fields) -> Result<Quantisation, ModelError> {
        let all = mlx_format(&mut fields, None)?;
        let mut overrides = BTreeMap::new();
        for (name, value) in fields.unread() {
            let found = match &value {
                Value::Bool(false) => None,
                Value::Bool(true) => Some(all),
                Value::Object(map) => {
                    let mut inner = fields.nested(&name, map.clone());
                    let found = mlx_format(&mut inner, Some(all))?;
                    inner.finish()?;
                    Some(found)
                }
                _ => return Err(fields.error(&name, format!("{value} is not supported"))),
            };
            overrides.insert(name, found);
        }
        Ok(Quantisation::Mlx { all, overrides })
    }

    /// What ModelOpt writes beside `config.json`, as `hf_quant_config.json`; `None` where it is not there.
    pub(crate) fn beside(path: &Path) -> Result<Option<Quantisation>, ModelError> {
        let name = path.display().to_string();
        let json = match vocab::text_file(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            json => json.map_err(|reason| ModelError::Io { path: name.clone(), reason })?,
        };
        let mut fields = Fields::parse(&name, &json)?;
        let Some(mut inner) = fields.opt_object("quantization")? else {
            return Err(fields.error("quantization", "missing"));
        };
        let found = Quantisation::modelopt(&mut inner)?;
        inner.finish()?;
        Ok(Some(found))
    }

    /// Sources: <https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md>,
    /// <https://github.com/neuralmagic/AutoFP8>
    fn fp8(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        fields.one_of("fmt", &["e4m3", "float8_e4m3fn"])?;
        fields.one_of("activation_scheme", &["dynamic", "static"])?;
        // Scales that are powers of two are stored as f32 all the same.
        fields.one_of("scale_fmt", &["ue8m0", "float"])?;
        fields.harmless(&["modules_to_not_convert", "ignored_layers", "dequantize", "kv_cache_scheme"]);
        Ok(Quantisation::Fp8 { block: block(fields, "weight_block_size")? })
    }

    /// Source: <https://github.com/NVIDIA/TensorRT-Model-Optimizer>
    fn modelopt(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        let algorithms = ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"];
        fields.one_of("quant_algo", &algorithms)?;
        let Some(algorithm) = fields.opt_text("quant_algo")? else {
            return Err(fields.error("quant_algo", "missing"));
        };
        fields.harmless(&["config_groups", "exclude_modules", "ignore", "producer"]);
        fields.harmless(&["kv_cache_quant_algo", "kv_cache_scheme"]);
        if algorithm != "NVFP4" {
            return Ok(Quantisation::Fp8 { block: None });
        }
        Ok(Quantisation::Fp4 { group: group(fields)?.unwrap_or(16) })
    }

    /// Source: <https://github.com/vllm-project/compressed-tensors>
    fn compressed_tensors(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        fields.one_of("format", FORMATS)?;
        fields.one_of("quantization_status", &["compressed", "frozen"])?;
        fields.harmless(&["ignore", "version", "global_compression_ratio", "kv_cache_scheme"]);
        if let Some(mut sparsity) = fields.opt_object("sparsity_config")? {
            sparsity.one_of("format", &["dense"])?;
        }
        let Some(groups) = fields.opt_object("config_groups")? else {
            return Err(fields.error("config_groups", "missing"));
        };
        let groups_of_tensors = groups.unread();
        if groups_of_tensors.is_empty() {
            return Err(fields.error("config_groups", "no group"));
        }
        let (mut all_blocks, mut ints, mut fp4) = (None, Vec::new(), Vec::new());
        for (name, value) in groups_of_tensors {
            let Value::Object(map) = value else { return Err(groups.error(&name, "not an object")) };
            let mut group = groups.nested(&name, map);
            // What activations were rounded to, which they are not here.
            group.harmless(&["targets", "input_activations"]);
            group.one_of("format", FORMATS)?;
            let Some(mut weights) = group.opt_object("weights")? else {
                return Err(group.error("weights", "missing"));
            };
            group.finish()?;
            weights.harmless(&["observer", "observer_kwargs", "zp_dtype", "scale_dtype"]);
            weights.one_of("type", &["int", "float"])?;
            match weights.opt_text("type")?.as_deref() {
                Some("float") if weights.opt_size("num_bits")? == Some(4) => fp4.push(four(&mut weights)?),
                Some("float") => {
                    let own = float(&mut weights)?;
                    if all_blocks.is_some_and(|all| own.is_some_and(|own| all != own)) {
                        return Err(weights.error("block_structure", "differs between groups"));
                    }
                    all_blocks = all_blocks.or(own);
                }
                _ => ints.push(int(&mut weights)?),
            }
            weights.finish()?;
        }
        Ok(Quantisation::Compressed { block: all_blocks, ints, fp4 })
    }

    /// Source: <https://github.com/casper-hansen/AutoAWQ>
    fn awq(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        fields.one_of("version", &["gemm", "GEMM"])?;
        if !fields.flag("zero_point", true)? {
            return Err(fields.error("zero_point", "false is not supported"));
        }
        fields.harmless(&["modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "pack_dtype"]);
        Ok(Quantisation::Awq(Ints { bits: bits(fields, "bits", &[4])?, group: group(fields)? }))
    }

    /// Sources: <https://github.com/AutoGPTQ/AutoGPTQ>, <https://github.com/ModelCloud/GPTQModel>
    fn gptq(fields: &mut Fields) -> Result<Quantisation, ModelError> {
        fields.one_of("checkpoint_format", &["gptq", "gptq_v2"])?;
        fields.one_of("format", &["gptq", "gptq_v2"])?;
        fields.one_of("pack_dtype", &["int32"])?;
        let own = [fields.opt_text("checkpoint_format")?, fields.opt_text("format")?];
        let second = own.iter().flatten().any(|format| format == "gptq_v2");
        if let Some(dynamic) = fields.opt_object("dynamic")? {
            // Those that begin with a minus are not quantised, which their tensors say too.
            if let Some((name, _)) = dynamic.unread().iter().find(|(name, _)| !name.starts_with('-')) {
                return Err(dynamic.error(name, "bits or groups of some modules are not supported"));
            }
        }
        fields.harmless(GPTQ_MADE);
        let ints = Ints { bits: bits(fields, "bits", &[2, 3, 4, 8])?, group: group(fields)? };
        let zeros_more = if second { 0 } else { 1 };
        Ok(Quantisation::Gptq { ints, zeros_more, reordered: fields.flag("desc_act", false)? })
    }

    /// Rows and columns of a block of FP8; `None` where there is no FP8, `Some(None)` where it has no blocks.
    pub(crate) fn fp8_block(&self) -> Option<Option<(usize, usize)>> {
        match self {
            Quantisation::Fp8 { block } | Quantisation::Compressed { block, .. } => Some(*block),
            _ => None,
        }
    }

    /// Columns that may share a scale of FP4; none where there is no FP4.
    pub(crate) fn fp4_groups(&self) -> &[usize] {
        match self {
            Quantisation::Fp4 { group } => std::slice::from_ref(group),
            Quantisation::Compressed { fp4, .. } => fp4,
            _ => &[],
        }
    }

    /// Format of the MLX tensor `base` (a name without `.weight`).
    pub(crate) fn mlx_format(&self, base: &str) -> Option<Mlx> {
        match self {
            Quantisation::Mlx { all, overrides } => overrides.get(base).copied().unwrap_or(Some(*all)),
            _ => None,
        }
    }
}

/// Values of `quant_method`.
const METHODS: [&str; 6] = ["fp8", "modelopt", "compressed-tensors", "awq", "gptq", "mxfp4"];

/// Values of `format` in compressed-tensors; the tensors say which of them they have.
const FORMATS: &[&str] = &[
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
];

/// Fields of GPTQ's that tell how codes were chosen, or what runs them elsewhere.
const GPTQ_MADE: &[&str] = &[
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "cache_examples_on_gpu",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "pad_token_id",
    "quantizer",
    "static_groups",
    "sym",
    "tokenizer",
    "true_sequential",
    "uri",
    "use_cuda_fp16",
    "use_exllama",
    "version",
];

/// A list of rows and columns.
fn block(fields: &mut Fields, name: &'static str) -> Result<Option<(usize, usize)>, ModelError> {
    match fields.sizes(name)?[..] {
        [] => Ok(None),
        [rows, cols] if rows > 0 && cols > 0 => Ok(Some((rows, cols))),
        _ => Err(fields.error(name, "only blocks of [rows, columns] are supported")),
    }
}

/// FP8 of one group of compressed-tensors: its blocks.
fn float(weights: &mut Fields) -> Result<Option<(usize, usize)>, ModelError> {
    if weights.opt_size("num_bits")? != Some(8) {
        return Err(weights.error("num_bits", "only 4 and 8 are supported of floats"));
    }
    weights.one_of("strategy", &["tensor", "channel", "block"])?;
    weights.harmless(&["symmetric"]);
    block(weights, "block_structure")
}

/// FP4 of one group of compressed-tensors: columns that share a scale.
fn four(weights: &mut Fields) -> Result<usize, ModelError> {
    weights.one_of("strategy", &["tensor_group", "group"])?;
    weights.harmless(&["symmetric"]);
    group(weights)?.ok_or_else(|| weights.error("group_size", "missing"))
}

/// Whole numbers of one group of compressed-tensors. Whether there are zero points is seen from the tensors.
fn int(weights: &mut Fields) -> Result<Ints, ModelError> {
    let bits = bits(weights, "num_bits", &[4, 8])?;
    weights.one_of("strategy", &["group", "channel"])?;
    // The order of inputs while they were quantised; `group` would keep it in the file.
    weights.one_of("actorder", &["static", "weight"])?;
    weights.harmless(&["symmetric"]);
    let channel = weights.opt_text("strategy")?.as_deref() == Some("channel");
    let group = group(weights)?;
    if !channel && group.is_none() {
        return Err(weights.error("group_size", "missing"));
    }
    Ok(Ints { bits, group: group.filter(|_| !channel) })
}

/// A number of bits that is one of `known`.
fn bits(fields: &mut Fields, name: &'static str, known: &[usize]) -> Result<usize, ModelError> {
    match fields.opt_size(name)? {
        Some(bits) if known.contains(&bits) => Ok(bits),
        Some(bits) => Err(fields.error(name, format!("{bits} is not supported (known: {known:?})"))),
        None => Err(fields.error(name, "missing")),
    }
}

/// `group_size`; `None` where an output is one group.
fn group(fields: &mut Fields) -> Result<Option<usize>, ModelError> {
    if fields.value("group_size").is_some_and(|value| value.as_i64() == Some(-1)) {
        return Ok(None);
    }
    match fields.opt_size("group_size")? {
        Some(size) if size == 0 || size % 8 != 0 => {
            Err(fields.error("group_size", format!("groups of {size} columns are not supported")))
        }
        size => Ok(size),
    }
}

/// `bits`, `group_size` and `mode` of an object; numbers of the affine mode that are absent are those of `all`.
fn mlx_format(fields: &mut Fields, all: Option<Mlx>) -> Result<Mlx, ModelError> {
    fields.one_of("mode", &["affine", "mxfp4", "nvfp4", "mxfp8"])?;
    let own = [fields.opt_size("bits")?, fields.opt_size("group_size")?];
    let fixed = match fields.opt_text("mode")?.as_deref() {
        Some("mxfp4") => Mlx::Mxfp4,
        Some("nvfp4") => Mlx::Nvfp4,
        Some("mxfp8") => Mlx::Mxfp8,
        _ => {
            let (bits, group) = match all {
                Some(Mlx::Affine { bits, group }) => (bits, group),
                _ => (4, 64),
            };
            let (bits, group) = (own[0].unwrap_or(bits), own[1].unwrap_or(group));
            if !(2..=8).contains(&bits) {
                return Err(fields.error("bits", format!("{bits} is not between 2 and 8")));
            }
            if group == 0 || group % 8 != 0 {
                return Err(fields.error("group_size", format!("{group} is not a multiple of 8")));
            }
            return Ok(Mlx::Affine { bits, group });
        }
    };
    let (bits, group) = fixed.sizes();
    for (name, own, fixed) in [("bits", own[0], bits), ("group_size", own[1], group)] {
        if let Some(own) = own.filter(|own| *own != fixed) {
            return Err(fields.error(name, format!("{own} is not supported (known: {fixed})")));
        }
    }
    Ok(fixed)
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
        let of = |base| found.mlx_format(base);
        assert_eq!(of("x"), Some(Mlx::Affine { bits: 4, group: 64 }));
        assert_eq!(of("a.gate"), Some(Mlx::Affine { bits: 8, group: 32 }));
        assert_eq!(of("b"), None);
        assert_eq!(of("c"), of("x"));
        assert_eq!(of("d"), Some(Mlx::Affine { bits: 6, group: 64 }));
    }

    #[test]
    fn formats_are_known_or_named() {
        assert_eq!(read("{}"), Ok(None));
        let of = |config: &str| read(&format!(r#"{{"quantization_config": {config}}}"#));
        assert_eq!(
            of(
                r#"{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 64]}"#
            ),
            Ok(Some(Quantisation::Fp8 { block: Some((128, 64)) }))
        );
        let whole = Ok(Some(Quantisation::Fp8 { block: None }));
        assert_eq!(
            of(r#"{"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}"#),
            whole
        );
        let modelopt = r#"{"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"},
            "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8}, "config_groups": {"group_0": {}}}"#;
        assert_eq!(of(modelopt), whole);
        let nvfp4 = modelopt.replace("\"FP8\"", "\"NVFP4\"");
        assert_eq!(of(&nvfp4), Ok(Some(Quantisation::Fp4 { group: 16 })));
        let group = |weights: &str| {
            format!(
                r#"{{"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"],
                "sparsity_config": {{"format": "dense"}}, "kv_cache_scheme": {{"num_bits": 8}}, "config_groups": {{{weights}}}}}"#
            )
        };
        let int4 = r#""ints": {"targets": ["Linear"], "format": "pack-quantized", "weights": {"num_bits": 4, "type": "int",
            "symmetric": true, "strategy": "group", "group_size": 32, "actorder": null}}"#;
        let fp8 = r#""floats": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": true},
            "weights": {"num_bits": 8, "type": "float", "symmetric": true, "strategy": "block", "block_structure": [128, 128]}}"#;
        let ints = vec![Ints { bits: 4, group: Some(32) }];
        let found = |block, ints| Ok(Some(Quantisation::Compressed { block, ints, fp4: Vec::new() }));
        assert_eq!(of(&group(int4)), found(None, ints.clone()));
        assert_eq!(of(&group(&format!("{int4}, {fp8}"))), found(Some((128, 128)), ints));
        let fp4 = r#""fours": {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float",
            "symmetric": true, "strategy": "tensor_group", "group_size": 16}}"#;
        let fours = Quantisation::Compressed { block: None, ints: vec![], fp4: vec![16] };
        assert_eq!(of(&group(fp4)), Ok(Some(fours)));
        let channel = int4.replace("\"group\", \"group_size\": 32", "\"channel\", \"group_size\": null");
        let channel = channel.replace("null}", "\"weight\"}").replace("true", "false");
        assert_eq!(of(&group(&channel)), found(None, vec![Ints { bits: 4, group: None }]));
        let awq = r#"{"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm",
            "modules_to_not_convert": null}"#;
        assert_eq!(of(awq), Ok(Some(Quantisation::Awq(Ints { bits: 4, group: Some(128) }))));
        let gptq = r#"{"quant_method": "gptq", "bits": 4, "group_size": -1, "damp_percent": 0.01, "desc_act": true,
            "sym": false, "checkpoint_format": "gptq_v2", "dynamic": {"-:.*gate": {}}}"#;
        let of_gptq = |zeros_more, reordered| {
            let ints = Ints { bits: 4, group: None };
            Ok(Some(Quantisation::Gptq { ints, zeros_more, reordered }))
        };
        assert_eq!(of(gptq), of_gptq(0, true));
        let first = gptq.replace("\"gptq_v2\"", "\"gptq\"").replace("true", "false");
        assert_eq!(of(&first), of_gptq(1, false));
        let int4 = group(int4);
        for (config, error) in [
            (
                r#"{"quant_method": "bitsandbytes", "bits": 4}"#.into(),
                "quant_method: \"bitsandbytes\" is not supported (known: fp8, modelopt, compressed-tensors, awq, gptq, mxfp4)",
            ),
            (
                r#"{"quant_method": "fp8", "weight_block_size": [128]}"#.into(),
                "weight_block_size: only blocks of [rows, columns] are supported",
            ),
            (
                modelopt.replace("\"FP8\"", "\"NVFP4_AWQ\""),
                "quant_algo: \"NVFP4_AWQ\" is not supported (known: FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4)",
            ),
            (
                int4.replace("pack-quantized", "marlin-24"),
                "config_groups.ints.format: \"marlin-24\" is not supported (known: float-quantized, \
                 int-quantized, naive-quantized, pack-quantized, mixed-precision, nvfp4-pack-quantized, \
                 mxfp4-pack-quantized)",
            ),
            (
                int4.replace("\"dense\"", "\"sparse-24-bitmask\""),
                "sparsity_config.format: \"sparse-24-bitmask\" is not supported (known: dense)",
            ),
            (
                int4.replace("\"num_bits\": 4", "\"num_bits\": 3"),
                "config_groups.ints.weights.num_bits: 3 is not supported (known: [4, 8])",
            ),
            (
                int4.replace("null", "\"group\""),
                "config_groups.ints.weights.actorder: \"group\" is not supported (known: static, weight)",
            ),
            (
                int4.replace("\"group_size\": 32", "\"group_size\": 20"),
                "config_groups.ints.weights.group_size: groups of 20 columns are not supported",
            ),
            (awq.replace("gemm", "gemv"), "version: \"gemv\" is not supported (known: gemm, GEMM)"),
            (awq.replace("true", "false"), "zero_point: false is not supported"),
            (gptq.replace("\"bits\": 4", "\"bits\": 5"), "bits: 5 is not supported (known: [2, 3, 4, 8])"),
            (
                gptq.replace("-:.*gate", "+:.*gate"),
                "dynamic.+:.*gate: bits or groups of some modules are not supported",
            ),
            (
                gptq.replace("\"gptq_v2\"", "\"marlin\""),
                "checkpoint_format: \"marlin\" is not supported (known: gptq, gptq_v2)",
            ),
            (
                group(&fp8.replace("\"num_bits\": 8, \"type\"", "\"num_bits\": 6, \"type\"")),
                "config_groups.floats.weights.num_bits: only 4 and 8 are supported of floats",
            ),
            (
                group(&fp8.replace("\"num_bits\": 8, \"type\"", "\"num_bits\": 4, \"type\"")),
                "config_groups.floats.weights.strategy: \"block\" is not supported (known: tensor_group, group)",
            ),
            (r#"{"bits": 4}"#.into(), "quant_method: missing"),
        ] {
            assert_eq!(of(&config), Err(format!("c: quantization_config.{error}")), "{config}");
        }
    }

    #[test]
    fn mlx_has_modes_by_tensor() {
        let text = r#"{"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4",
            "a": {"group_size": 16, "bits": 4, "mode": "nvfp4"}, "b": {"mode": "mxfp8"},
            "c": {"group_size": 64, "bits": 8}, "d": {"bits": 5}}}"#;
        let found = read(text).unwrap().unwrap();
        let of = |base| found.mlx_format(base);
        assert_eq!(of("x"), Some(Mlx::Mxfp4));
        assert_eq!(of("a"), Some(Mlx::Nvfp4));
        assert_eq!(of("b"), Some(Mlx::Mxfp8));
        assert_eq!(of("c"), Some(Mlx::Affine { bits: 8, group: 64 }));
        assert_eq!(of("d"), Some(Mlx::Affine { bits: 5, group: 64 }));
        for (mode, bits, group, error) in [
            ("nvfp4", 4, 32, "group_size: 32 is not supported (known: 16)"),
            ("mxfp8", 4, 32, "bits: 4 is not supported (known: 8)"),
            ("nf4", 4, 64, "mode: \"nf4\" is not supported (known: affine, mxfp4, nvfp4, mxfp8)"),
        ] {
            let numbers = format!(r#""group_size": {group}, "bits": {bits}, "mode": "{mode}""#);
            let all = read(&format!(r#"{{"quantization": {{{numbers}}}}}"#));
            assert_eq!(all, Err(format!("c: quantization.{error}")));
            let one =
                format!(r#"{{"quantization": {{"bits": 4, "group_size": 64, "lm_head": {{{numbers}}}}}}}"#);
            assert_eq!(read(&one), Err(format!("c: quantization.lm_head.{error}")));
        }
    }
}
