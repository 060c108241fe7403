//! A model directory that is not what it should be is refused with one line that names the file, the tensor and both
//! values; nothing panics. And what is right opens.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use backend::{Backend, DType, DeviceOptions, Group};
use backend_cpu::CpuBackend;
use models::{Checkpoint, Config, Identity, Model, ModelError, shards, tensors};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tempfile::TempDir;

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "torch_dtype": "float32",
    "eos_token_id": 3}"#;

type Tensors = HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of [`CONFIG`], as zeros of f32.
fn zeros() -> Tensors {
    let config = Config::parse("c", CONFIG.as_bytes()).unwrap();
    let zero = |shape: &[usize]| vec![0; shape.iter().product::<usize>() * 4];
    tensors(&config).into_iter().map(|t| (t.name, (Dtype::F32, t.shape.clone(), zero(&t.shape)))).collect()
}

fn write_file(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, path).unwrap();
}

/// A model directory of one weight file.
fn model(tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    write_file(&dir.path().join("model.safetensors"), tensors);
    dir
}

/// The error, with the directory cut off.
fn error(dir: &TempDir) -> String {
    let error: ModelError = Checkpoint::open(dir.path()).err().expect("an error");
    error.to_string().replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn a_complete_model_opens() {
    let dir = model(&zeros());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config().layers, 2);
    assert_eq!(checkpoint.generation().eos_ids, [3]);
    // 2 * 32 x 16 tables, per layer 4 * 16 x 16 + 3 * 16 x 24 and 2 norms of 16, one norm of 16.
    assert_eq!(checkpoint.weight_bytes(), 4 * (2 * 512 + 2 * (1024 + 1152 + 32) + 16));
}

#[test]
fn a_truncated_file_names_the_tensor_that_is_cut() {
    let dir = model(&zeros());
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let text = error(&dir);
    let (front, back) = text.split_once(" ends at byte ").unwrap();
    assert!(front.starts_with("model.safetensors: truncated: tensor "), "{text}");
    assert_eq!(back, format!("{}, the file has {}", bytes.len(), bytes.len() - 1));

    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
    fs::write(&path, &bytes[..100]).unwrap();
    assert_eq!(
        error(&dir),
        format!("model.safetensors: truncated: the header ends at byte {header}, the file has 100")
    );
    fs::write(&path, &bytes[..5]).unwrap();
    assert_eq!(error(&dir), "model.safetensors: truncated: 5 bytes, a safetensors file has at least 8");
    fs::write(&path, "<html>not found</html>").unwrap();
    assert!(
        error(&dir).starts_with("model.safetensors: not a safetensors file: header of "),
        "{}",
        error(&dir)
    );
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = zeros();
        change(&mut tensors);
        error(&model(&tensors))
    };
    assert_eq!(
        with(&|t| drop(t.remove(name))),
        format!("model.safetensors: tensor {name} is missing; the llama model has it with shape [24, 16]")
    );
    assert_eq!(
        with(&|t| t.get_mut(name).unwrap().1 = vec![16, 24]),
        format!("model.safetensors: tensor {name} has shape [16, 24], the model's numbers give [24, 16]")
    );
    assert_eq!(
        with(&|t| t.get_mut(name).unwrap().0 = Dtype::I32),
        format!("model.safetensors: tensor {name} is stored as I32, which is not supported")
    );
    let bias = "model.layers.0.self_attn.q_proj.bias";
    assert_eq!(
        with(&|t| drop(t.insert(bias.into(), (Dtype::F32, vec![16], vec![0; 64])))),
        format!("model.safetensors: tensor {bias} is not part of the llama model")
    );
    // Tables that are computed are not missed, nor in the way.
    let mut tensors = zeros();
    let table = "model.layers.0.self_attn.rotary_emb.inv_freq";
    tensors.insert(table.into(), (Dtype::F32, vec![4], vec![0; 16]));
    Checkpoint::open(model(&tensors).path()).unwrap();
}

#[test]
fn a_place_of_the_wrong_size_is_named() {
    let dir = model(&zeros());
    let path = dir.path().join("model.safetensors");
    let header = r#"{"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend([0; 20]);
    fs::write(&path, &bytes).unwrap();
    assert_eq!(error(&dir), "model.safetensors: tensor x: F32 [2, 3] in a place of 20 bytes");
    let overflow = header.replace("[2, 3]", "[9223372036854775807, 9223372036854775807]");
    let mut bytes = (overflow.len() as u64).to_le_bytes().to_vec();
    bytes.extend(overflow.bytes());
    fs::write(&path, &bytes).unwrap();
    assert!(error(&dir).ends_with("in a place of 20 bytes"), "{}", error(&dir));
}

/// A model directory of two shards, and its index.
fn sharded() -> (TempDir, serde_json::Value) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let (first, second): (Tensors, Tensors) =
        zeros().into_iter().partition(|(name, _)| name.contains("layers.0."));
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", first), ("b.safetensors", second)] {
        write_file(&dir.path().join(file), &part);
        map.extend(part.into_keys().map(|name| (name, file.into())));
    }
    (dir, serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map }))
}

#[test]
fn shards_open_and_a_broken_index_is_refused() {
    let (dir, index) = sharded();
    let write = |index: &serde_json::Value| {
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    let text = error(&dir);
    let reason = "neither model.safetensors nor model.safetensors.index.json (a.safetensors is there)";
    assert!(text.ends_with(reason), "{text}");
    write(&index);
    Checkpoint::open(dir.path()).unwrap();

    let norm = "model.norm.weight";
    for escape in [
        "../b.safetensors",
        "/etc/passwd",
        "x/b.safetensors",
        "..",
        "",
        "C:b.safetensors",
        "x\\b.safetensors",
    ] {
        let mut bad = index.clone();
        bad["weight_map"][norm] = escape.into();
        write(&bad);
        assert_eq!(
            error(&dir),
            format!("model.safetensors.index.json: weight file {escape:?} is not a plain file name")
        );
    }
    let mut bad = index.clone();
    bad["weight_map"][norm] = "a.safetensors".into();
    write(&bad);
    assert_eq!(error(&dir), "model.safetensors.index.json: tensor model.norm.weight is not in a.safetensors");
    // An index that names itself, and a link that leads to itself: followed once.
    bad["weight_map"][norm] = "model.safetensors.index.json".into();
    write(&bad);
    let text = error(&dir);
    assert!(text.starts_with("model.safetensors.index.json: not a safetensors file: header of "), "{text}");
    std::os::unix::fs::symlink("c.safetensors", dir.path().join("c.safetensors")).unwrap();
    bad["weight_map"][norm] = "c.safetensors".into();
    write(&bad);
    assert!(error(&dir).starts_with("c.safetensors: "), "{}", error(&dir));
    fs::create_dir(dir.path().join("d.safetensors")).unwrap();
    bad["weight_map"][norm] = "d.safetensors".into();
    write(&bad);
    assert_eq!(error(&dir), "d.safetensors: not a regular file");
    // Deep or broken text, and values of other types.
    for (text, reason) in [
        ("[".repeat(100_000), "invalid type: sequence"),
        (format!(r#"{{"weight_map": {}"#, r#"{"a": "#.repeat(100_000)), "invalid type: map"),
        (r#"{"weight_map": {"a": 3}}"#.into(), "invalid type: integer"),
        (r#"{"metadata": {}}"#.into(), "missing field `weight_map`"),
        (r#"{"weight_map": {"a": "b"#.into(), "EOF while parsing"),
    ] {
        fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        let text = error(&dir);
        assert!(text.starts_with("model.safetensors.index.json: ") && text.contains(reason), "{text}");
    }
    let mut bad = index.clone();
    bad["weight_map"].as_object_mut().unwrap().remove(norm);
    write(&bad);
    assert_eq!(
        error(&dir),
        "model.safetensors.index.json: tensor model.norm.weight is missing; the llama model has it with shape [16]"
    );
    write(&index);
    fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    assert!(error(&dir).starts_with("b.safetensors: "), "{}", error(&dir));
}

/// A file that shrinks, or goes, between the look at its tables and the reading of its weights is an error with its name on
/// every rank, where a mapping would end the process.
#[test]
fn a_file_that_shrinks_before_it_is_loaded_is_an_error() {
    let load = |checkpoint: &Checkpoint| {
        let options = DeviceOptions { dtype: DType::F32, threads: 1, ..DeviceOptions::default() };
        let mut backend = CpuBackend::open(&options, Group::alone()).unwrap();
        Model::load(&mut backend, checkpoint, 0, 1, DType::F32, &mut |_| {})
            .err()
            .map(|error| error.to_string())
    };
    // Dense weights, and experts, which threads read ahead of the device.
    let experts = r#"{"model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "torch_dtype": "float32"}"#;
    for config in [CONFIG, experts] {
        let specs = tensors(&Config::parse("c", config.as_bytes()).unwrap());
        let zero = |shape: &[usize]| vec![0; shape.iter().product::<usize>() * 4];
        let all =
            specs.into_iter().map(|t| (t.name, (Dtype::F32, t.shape.clone(), zero(&t.shape)))).collect();
        let dir = directory(config, &all);
        let path = dir.path().join("model.safetensors");
        let len = fs::metadata(&path).unwrap().len();
        for left in [len - 1, len / 2, 8, 0] {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(load(&checkpoint), None);
            fs::File::options().write(true).open(&path).unwrap().set_len(left).unwrap();
            let error = load(&checkpoint).expect("an error");
            let wanted =
                format!("model.safetensors: changed while it was read: it had {len} bytes and has {left}");
            assert!(error.contains(&wanted), "{error}");
            write_file(&path, &all);
        }
    }
}

/// A model directory of one weight file and the given configuration.
fn directory(config: &str, numbers: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    write_file(&dir.path().join("model.safetensors"), numbers);
    dir
}

/// [`CONFIG`] with one more field.
fn with_field(field: &str) -> String {
    CONFIG.replacen('{', &format!("{{{field}, "), 1)
}

const UP: &str = "model.layers.0.mlp.up_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";

/// Zeros, with the matrix `base` as `parts` (name after the base, type, shape, bytes of an element).
fn with_parts(base: &str, parts: &[(&str, Dtype, &[usize], usize)]) -> Tensors {
    let mut tensors = zeros();
    tensors.remove(&format!("{base}.weight"));
    for (end, dtype, shape, bytes) in parts {
        let len = shape.iter().product::<usize>() * bytes;
        tensors.insert(format!("{base}.{end}"), (*dtype, shape.to_vec(), vec![0; len]));
    }
    tensors
}

#[test]
fn quantised_tensors_are_found_with_their_scales() {
    let formats = |config: &str, tensors: &Tensors| {
        let checkpoint = Checkpoint::open(directory(config, tensors).path()).unwrap();
        let all = checkpoint.weight_bytes();
        let formats = checkpoint.formats();
        assert_eq!(formats.iter().map(|(_, bytes)| bytes).sum::<u64>(), all);
        assert_eq!(checkpoint.rank_bytes(1).unwrap(), [all]);
        formats.into_iter().find(|(name, _)| name != "f32").unwrap()
    };
    // 24 x 16 in 4 bits with two groups of 8 in a row.
    let mlx = with_parts(
        UP,
        &[
            ("weight", Dtype::U32, &[24, 2], 4),
            ("scales", Dtype::BF16, &[24, 2], 2),
            ("biases", Dtype::BF16, &[24, 2], 2),
        ],
    );
    let config = with_field(r#""quantization": {"group_size": 8, "bits": 4}"#);
    assert_eq!(formats(&config, &mlx), ("mlx 4-bit, groups of 8".into(), 24 * 8 + 2 * 24 * 2 * 2));
    let fp8 = with_parts(
        UP,
        &[("weight", Dtype::F8_E4M3, &[24, 16], 1), ("weight_scale_inv", Dtype::F32, &[2, 1], 4)],
    );
    let config =
        with_field(r#""quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}"#);
    assert_eq!(formats(&config, &fp8), ("fp8, blocks of 16 x 16".into(), 24 * 16 + 2 * 4));
    let int4 = with_parts(
        UP,
        &[
            ("weight_packed", Dtype::I32, &[24, 2], 4),
            ("weight_scale", Dtype::BF16, &[24, 2], 2),
            ("weight_shape", Dtype::I64, &[2], 8),
        ],
    );
    let config = with_field(
        r#""quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}}}}"#,
    );
    assert_eq!(formats(&config, &int4), ("int4, groups of 8".into(), 24 * 8 + 24 * 2 * 2));
}

#[test]
fn scales_of_fp8_are_one_or_one_per_output_or_per_block() {
    const METHODS: [&str; 3] = [
        r#""quant_method": "fp8", "activation_scheme": "static""#,
        r#""quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8}"#,
        r#""quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {"weights":
            {"num_bits": 8, "type": "float", "strategy": "tensor"}, "input_activations": {"num_bits": 8}}}"#,
    ];
    let file = |dtype, scale: &[usize], bytes| {
        let mut tensors = with_parts(
            UP,
            &[
                ("weight", Dtype::F8_E4M3, &[24, 16], 1),
                ("weight_scale", dtype, scale, bytes),
                ("input_scale", Dtype::F32, &[], 4),
            ],
        );
        let cache = "model.layers.0.self_attn.k_proj.k_scale";
        tensors.insert(cache.into(), (Dtype::F32, vec![], vec![0; 4]));
        tensors
    };
    let format = |dir: &TempDir| {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.rank_bytes(1).unwrap(), [checkpoint.weight_bytes()]);
        checkpoint.formats().into_iter().find(|(name, _)| name != "f32").unwrap()
    };
    let one = ("fp8, one scale".to_owned(), 24 * 16 + 4);
    for method in METHODS {
        let config = with_field(&format!(r#""quantization_config": {{{method}}}"#));
        for shape in [&[][..], &[1], &[1, 1]] {
            assert_eq!(format(&directory(&config, &file(Dtype::F32, shape, 4))), one, "{method} {shape:?}");
        }
        for shape in [&[24][..], &[24, 1]] {
            let each = ("fp8, a scale per output".into(), 24 * 16 + 24 * 2);
            assert_eq!(format(&directory(&config, &file(Dtype::BF16, shape, 2))), each, "{method} {shape:?}");
        }
        for shape in [&[2][..], &[2, 1], &[16], &[1, 16], &[24, 2]] {
            let got = error(&directory(&config, &file(Dtype::F32, shape, 4)));
            let front = format!("model.safetensors: tensor {UP}.weight: [24, 16] with scales [");
            assert!(got.starts_with(&front), "{method} {shape:?}: {got}");
        }
    }
    // ModelOpt's word beside a configuration that has none.
    let dir = model(&file(Dtype::F32, &[], 4));
    assert!(error(&dir).contains(UP));
    let beside = dir.path().join("hf_quant_config.json");
    let modelopt = |algorithm: &str| {
        format!(
            r#"{{"producer": {{"name": "modelopt"}}, "quantization": {{"quant_algo": "{algorithm}",
            "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}}}"#
        )
    };
    fs::write(&beside, modelopt("FP8")).unwrap();
    assert_eq!(format(&dir), one);
    fs::write(&beside, modelopt("NVFP4_AWQ")).unwrap();
    assert_eq!(
        error(&dir),
        "hf_quant_config.json: quantization.quant_algo: \"NVFP4_AWQ\" is not supported (known: FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4)"
    );
}

/// `config.json` for AWQ, GPTQ and compressed-tensors in groups of 8, and for one scale per output.
const AWQ: &str =
    r#""quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": true, "version": "gemm""#;
const GPTQ: &str = r#""quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": false"#;
const INTS: &str = r#""quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {
    "a": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": false}},
    "b": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}"#;

/// The same for FP4, by ModelOpt and by compressed-tensors.
const NVFP4: &str = r#""quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16"#;
const FP4: &str = r#""quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {
    "a": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}}"#;
const FP4_BY_8: &str = r#""quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {
    "a": {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 8}}}"#;

type Part<'p> = (&'p str, Dtype, &'p [usize], usize);

/// The matrix [`UP`], 24 x 16, in every way of whole numbers and of FP4.
fn codes() -> Vec<(&'static str, &'static str, u64, Vec<Part<'static>>)> {
    // Codes of 4 or 8 bits, and two numbers of so many bytes for every group, of which a row has two or one.
    let bytes = |bits: u64, groups: u64, item: u64| 24 * 16 * bits / 8 + 24 * groups * 2 * item;
    vec![
        (
            AWQ,
            "awq 4-bit, groups of 8",
            bytes(4, 2, 4),
            vec![
                ("qweight", Dtype::I32, &[16, 3], 4),
                ("qzeros", Dtype::I32, &[2, 3], 4),
                ("scales", Dtype::F16, &[2, 24], 2),
            ],
        ),
        (
            GPTQ,
            "gptq 4-bit, groups of 8",
            bytes(4, 2, 4),
            vec![
                ("qweight", Dtype::I32, &[2, 24], 4),
                ("qzeros", Dtype::I32, &[2, 3], 4),
                ("scales", Dtype::F16, &[2, 24], 2),
                ("g_idx", Dtype::I32, &[16], 4),
            ],
        ),
        (
            INTS,
            "int 4-bit, groups of 8",
            bytes(4, 2, 4),
            vec![
                ("weight_packed", Dtype::I32, &[24, 2], 4),
                ("weight_zero_point", Dtype::I32, &[3, 2], 4),
                ("weight_scale", Dtype::BF16, &[24, 2], 2),
                ("weight_shape", Dtype::I64, &[2], 8),
            ],
        ),
        (
            INTS,
            "int 8-bit, a scale per output",
            bytes(8, 1, 2),
            vec![("weight_packed", Dtype::I32, &[24, 4], 4), ("weight_scale", Dtype::BF16, &[24, 1], 2)],
        ),
        (
            INTS,
            "int 8-bit, a scale per output",
            bytes(8, 1, 2),
            vec![("weight", Dtype::I8, &[24, 16], 1), ("weight_scale", Dtype::BF16, &[24, 1], 2)],
        ),
        (
            NVFP4,
            "fp4, groups of 16",
            24 * 16 / 2 + 24 * 4,
            vec![
                ("weight", Dtype::U8, &[24, 8], 1),
                ("weight_scale", Dtype::F8_E4M3, &[24, 1], 1),
                ("weight_scale_2", Dtype::F32, &[1], 4),
            ],
        ),
        (
            FP4,
            "fp4, groups of 16",
            24 * 16 / 2 + 24 * 4,
            vec![
                ("weight_packed", Dtype::U8, &[24, 8], 1),
                ("weight_scale", Dtype::F8_E4M3, &[24, 1], 1),
                ("weight_global_scale", Dtype::F32, &[1], 4),
            ],
        ),
        (
            FP4_BY_8,
            "fp4, groups of 8",
            24 * 16 / 2 + 24 * 2 * 2,
            vec![("weight_packed", Dtype::U8, &[24, 8], 1), ("weight_scale", Dtype::U8, &[24, 2], 1)],
        ),
    ]
}

/// The experts of gpt-oss, 2 of 32 x 32, in MXFP4 and as numbers, whose rows are inputs.
#[test]
fn experts_of_gpt_oss_are_found_in_one_tensor() {
    const OSS: &str = r#"{"model_type": "gpt_oss", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32,
        "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "torch_dtype": "float32",
        "quantization_config": {"quant_method": "mxfp4"}}"#;
    const EXPERTS: &str = "model.layers.0.mlp.experts";
    let tensor = |dtype, shape: &[usize], bytes: usize| {
        (dtype, shape.to_vec(), vec![0; shape.iter().product::<usize>() * bytes])
    };
    let specs = tensors(&Config::parse("c", OSS.as_bytes()).unwrap());
    let plain = specs.into_iter().filter(|spec| !spec.name.contains(".experts."));
    let plain = plain.map(|spec| (spec.name, tensor(Dtype::F32, &spec.shape, 4)));
    let mut numbers: Tensors = plain.collect();
    for (name, shape) in [("gate_up_proj_bias", [2, 64]), ("down_proj_bias", [2, 32])] {
        numbers.insert(format!("{EXPERTS}.{name}"), tensor(Dtype::F32, &shape, 4));
    }
    let mut codes = numbers.clone();
    for (name, rows) in [("gate_up_proj", 64), ("down_proj", 32)] {
        numbers.insert(format!("{EXPERTS}.{name}"), tensor(Dtype::BF16, &[2, 32, rows], 2));
        codes.insert(format!("{EXPERTS}.{name}_blocks"), tensor(Dtype::U8, &[2, rows, 1, 16], 1));
        codes.insert(format!("{EXPERTS}.{name}_scales"), tensor(Dtype::U8, &[2, rows, 1], 1));
    }
    for (all, format, bytes) in
        [(&codes, "fp4, groups of 32", 2 * 96 * (16 + 2)), (&numbers, "bf16", 2 * 96 * 64)]
    {
        let checkpoint = Checkpoint::open(directory(OSS, all).path()).unwrap();
        let found = checkpoint.formats().into_iter().find(|(name, _)| name != "f32").unwrap();
        assert_eq!(found, (format.into(), bytes));
        // The first of two ranks has the biases of down.
        let ranks = checkpoint.rank_bytes(2).unwrap();
        assert_eq!(ranks[0], ranks[1] + 2 * 32 * 4, "{format}");
        Identity::read(&checkpoint).unwrap();
    }
    let wrong = |all: &Tensors, end: &str, shape: &[usize], kept: &str| {
        let mut all = all.clone();
        let dtype = all[&format!("{EXPERTS}.{end}")].0;
        let bytes = if dtype == Dtype::U8 { 1 } else { 4 };
        all.insert(format!("{EXPERTS}.{end}"), tensor(dtype, shape, bytes));
        if shape.is_empty() {
            all.remove(&format!("{EXPERTS}.{end}"));
        }
        let error = error(&directory(OSS, &all));
        assert!(error.contains(kept), "{end} {shape:?}: {error}");
    };
    wrong(
        &codes,
        "down_proj_blocks",
        &[2, 32, 1, 8],
        "down_proj_blocks: [2, 32, 1, 8] with scales [2, 32, 1]",
    );
    wrong(&codes, "down_proj_blocks", &[2, 32, 16], "down_proj_blocks: shape [2, 32, 16] has no blocks");
    wrong(
        &codes,
        "down_proj_blocks",
        &[1, 32, 1, 16],
        "down_proj_blocks: [1, 32, 1, 16] with scales [2, 32, 1]",
    );
    wrong(&codes, "down_proj_scales", &[], "down_proj_blocks: has no ");
    wrong(&codes, "down_proj_bias", &[3, 32], "model.layers.0.mlp.experts.2.down_proj.bias");
    wrong(&codes, "down_proj_bias", &[2, 31], "experts.0.down_proj.bias");
    wrong(&codes, "gate_up_proj_bias", &[2, 32], "experts.0.gate_up_proj.bias");
}

fn quantised(method: &str) -> String {
    with_field(&format!(r#""quantization_config": {{{method}}}"#))
}

#[test]
fn codes_are_found_and_take_what_is_said() {
    for (method, format, bytes, parts) in codes() {
        let dir = directory(&quantised(method), &with_parts(UP, &parts));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let found = checkpoint.formats().into_iter().find(|(name, _)| name != "f32").unwrap();
        assert_eq!(found, (format.into(), bytes));
        assert_eq!(checkpoint.rank_bytes(1).unwrap(), [checkpoint.weight_bytes()]);
        Identity::read(&checkpoint).unwrap();
    }
}

/// Whatever is wrong with a part of a matrix is an error that names the matrix.
#[test]
fn codes_that_disagree_are_named() {
    for (method, format, _, parts) in codes() {
        for at in 0..parts.len() {
            let (end, dtype, shape, item) = parts[at];
            let failed = |what: &str, change: &dyn Fn(&mut Vec<Part<'_>>)| {
                let mut parts = parts.clone();
                change(&mut parts);
                let dir = directory(&quantised(method), &with_parts(UP, &parts));
                // Order is looked at when a rank reads; zero points may be left out where there need be none.
                let optional = ["g_idx", "weight_shape"].contains(&end)
                    || end == "weight_zero_point" && what == "missing";
                match Checkpoint::open(dir.path()).err().map(|error| error.to_string()) {
                    Some(error) => assert!(error.contains(UP), "{format}: {end} {what}: {error}"),
                    None => assert!(optional, "{format}: {end} {what} is taken"),
                }
            };
            let longer: Vec<usize> = [&shape[..shape.len() - 1], &[shape[shape.len() - 1] + 1]].concat();
            let higher: Vec<usize> = [&[shape[0] + 1], &shape[1..]].concat();
            let flat = [shape.iter().product()];
            failed("missing", &|parts| {
                parts.remove(at);
            });
            failed("longer", &|parts| parts[at] = (end, dtype, longer.clone().leak(), item));
            failed("higher", &|parts| parts[at] = (end, dtype, higher.clone().leak(), item));
            failed("empty", &|parts| parts[at] = (end, dtype, &[0, 3], item));
            let other = if dtype == Dtype::U8 { Dtype::I8 } else { Dtype::U8 };
            failed("of another type", &|parts| parts[at] = (end, other, shape, 1));
            if shape.len() > 1 {
                failed("flat", &|parts| parts[at] = (end, dtype, flat.to_vec().leak(), item));
            }
        }
        let dir = directory(CONFIG, &with_parts(UP, &parts));
        assert!(error(&dir).contains(UP), "{format} without a word in config.json");
    }
}

#[test]
fn gptq_in_another_order_is_refused_and_empty_biases_are_left_out() {
    let (_, _, _, parts) = codes().swap_remove(1);
    let mut tensors = with_parts(UP, &parts);
    let bias = format!("{UP}.bias");
    tensors.insert(bias.clone(), (Dtype::F16, vec![24], vec![0; 48]));
    // g_idx of zeros: the second group never comes.
    let act = GPTQ.replace("false", "true");
    assert_eq!(
        error(&directory(&quantised(&act), &tensors)),
        format!(
            "model.safetensors: tensor {UP}.weight: inputs are not in the order of their groups (desc_act), which is not \
             supported: use a checkpoint made without desc_act, or with AWQ"
        )
    );
    let order: Vec<u8> = (0..16).flat_map(|input: i32| (input / 8).to_le_bytes()).collect();
    tensors.get_mut(&format!("{UP}.g_idx")).unwrap().2 = order;
    Checkpoint::open(directory(&quantised(&act), &tensors).path()).unwrap();
    tensors.get_mut(&bias).unwrap().2[4] = 1;
    let wanted = format!("model.safetensors: tensor {bias} is not part of the llama model");
    assert_eq!(error(&directory(&quantised(&act), &tensors)), wanted);
}

#[test]
fn quantised_tensors_that_disagree_are_named() {
    let failed = |config: &str, tensors: &Tensors| error(&directory(config, tensors));
    let mlx = |words: usize, groups: usize| {
        with_parts(
            UP,
            &[
                ("weight", Dtype::U32, &[24, words], 4),
                ("scales", Dtype::BF16, &[24, groups], 2),
                ("biases", Dtype::BF16, &[24, groups], 2),
            ],
        )
    };
    assert_eq!(
        failed(CONFIG, &mlx(2, 2)),
        format!(
            "model.safetensors: tensor {UP}.weight: has scales, but config.json gives it no quantization"
        )
    );
    let config = with_field(r#""quantization": {"group_size": 8, "bits": 4}"#);
    assert_eq!(
        failed(&config, &mlx(2, 1)),
        format!(
            "model.safetensors: tensor {UP}.weight: U32 [24, 2] with scales [24, 1] of 4 bits in groups of 8"
        )
    );
    assert_eq!(
        failed(&config, &mlx(4, 4)),
        format!(
            "model.safetensors: tensor {UP}.weight has shape [24, 32], the model's numbers give [24, 16]"
        )
    );
    let mut without = mlx(2, 2);
    without.remove(&format!("{UP}.biases"));
    assert_eq!(
        failed(&config, &without),
        format!("model.safetensors: tensor {UP} is quantised, and has no {UP}.biases")
    );
    // Tensors of nothing may have dimensions that overflow.
    for end in ["weight", "scales", "biases"] {
        let mut empty = mlx(2, 2);
        let name = format!("{UP}.{end}");
        let dtype = empty[&name].0;
        empty.insert(name.clone(), (dtype, vec![1 << 40, 0, 1 << 40], Vec::new()));
        assert!(failed(&config, &empty).contains(UP), "{end}");
    }
    // Codes without a scale, or a format that the configuration does not name, are types that nobody takes.
    let bare = with_parts(UP, &[("weight", Dtype::F8_E4M3, &[24, 16], 1)]);
    assert_eq!(
        failed(CONFIG, &bare),
        format!("model.safetensors: tensor {UP}.weight is stored as F8_E4M3, which is not supported")
    );
    let fp8 = with_parts(
        UP,
        &[("weight", Dtype::F8_E4M3, &[24, 16], 1), ("weight_scale_inv", Dtype::F32, &[1, 1], 4)],
    );
    let config =
        with_field(r#""quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}"#);
    assert_eq!(
        failed(&config, &fp8),
        format!("model.safetensors: tensor {UP}.weight: [24, 16] with scales [1, 1] in blocks of 16 x 16")
    );
}

#[test]
fn columns_are_cut_between_groups_of_eight_at_least() {
    // 16 x 24 in 4 bits, groups of 8: three groups for two ranks, none for a fourth.
    let parts: [(&str, Dtype, &[usize], usize); 3] = [
        ("weight", Dtype::U32, &[16, 3], 4),
        ("scales", Dtype::BF16, &[16, 3], 2),
        ("biases", Dtype::BF16, &[16, 3], 2),
    ];
    let config = with_field(r#""quantization": {"group_size": 8, "bits": 4}"#);
    let config = config.replace("\"num_attention_heads\": 2", "\"num_attention_heads\": 4");
    let dir = directory(&config, &with_parts(DOWN, &parts));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let ffn = |world| {
        shards(checkpoint.config(), world).map(|all| all.into_iter().map(|s| s.ffn).collect::<Vec<_>>())
    };
    assert_eq!(ffn(2).unwrap(), [0..16, 16..24]);
    assert_eq!(ffn(3).unwrap(), [0..8, 8..16, 16..24]);
    assert_eq!(
        ffn(4).unwrap_err().to_string(),
        format!(
            "cannot split {DOWN}.weight over 4 tensor-parallel ranks: its 24 columns stay together in groups of 8"
        )
    );
    let bytes = checkpoint.rank_bytes(2).unwrap();
    assert!(bytes[0] > bytes[1] && bytes[0] < checkpoint.weight_bytes(), "{bytes:?}");
}

#[test]
fn a_text_model_within_another_is_opened_alone() {
    let text = r#""model_type": "kimi_k2", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "kv_lora_rank": 8,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "dtype": "float32""#;
    let outer = format!(
        r#"{{"model_type": "kimi_k25", "text_config": {{{text}}}, "vision_config": {{"depth": 2}}}}"#
    );
    let config = Config::parse("c", outer.as_bytes()).unwrap();
    let zero = |shape: &[usize]| vec![0; shape.iter().product::<usize>() * 4];
    let mut all: Tensors = tensors(&config)
        .into_iter()
        .map(|t| (format!("language_model.{}", t.name), (Dtype::F32, t.shape.clone(), zero(&t.shape))))
        .collect();
    let bytes: usize = all.values().map(|(_, _, bytes)| bytes.len()).sum();
    all.insert("vision_tower.patch.weight".into(), (Dtype::F32, vec![4], vec![0; 16]));
    let checkpoint = Checkpoint::open(directory(&outer, &all).path()).unwrap();
    assert_eq!(checkpoint.weight_bytes(), bytes as u64);
}

#[test]
fn weights_have_an_identity_of_content_not_of_files() {
    let identity = |dir: &TempDir| Identity::read(&Checkpoint::open(dir.path()).unwrap()).unwrap();
    let base = identity(&model(&zeros()));
    let (dir, index) = sharded();
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    assert_eq!(identity(&dir), base, "shards are the same model");
    let mut tensors = zeros();
    tensors.get_mut("model.norm.weight").unwrap().2[63] = 1;
    let other = identity(&model(&tensors));
    assert_eq!((&other.graph, &other.vocab), (&base.graph, &base.vocab));
    assert_ne!(other.weights, base.weights);
    assert_eq!(base.vocab, "none");

    let dummy =
        |seed| Identity::read(&Checkpoint::dummy(&dir.path().join("config.json"), seed).unwrap()).unwrap();
    assert_eq!(dummy(1), dummy(1));
    assert_ne!(dummy(1).weights, dummy(2).weights);
    assert_eq!(dummy(1).graph, base.graph);
}
