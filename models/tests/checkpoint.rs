//! A model directory that is not what it should be is refused with one line that names the file, the tensor and both
//! values; nothing panics. And what is right opens.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use models::{Checkpoint, Config, Identity, ModelError, tensors};
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
        format!(
            "model.safetensors: tensor {name} is missing; the llama model of config.json has it with shape [24, 16]"
        )
    );
    assert_eq!(
        with(&|t| t.get_mut(name).unwrap().1 = vec![16, 24]),
        format!("model.safetensors: tensor {name} has shape [16, 24], config.json gives [24, 16]")
    );
    assert_eq!(
        with(&|t| t.get_mut(name).unwrap().0 = Dtype::I32),
        format!("model.safetensors: tensor {name} has dtype I32, expected BF16, F16 or F32")
    );
    let bias = "model.layers.0.self_attn.q_proj.bias";
    assert_eq!(
        with(&|t| drop(t.insert(bias.into(), (Dtype::F32, vec![16], vec![0; 64])))),
        format!("model.safetensors: tensor {bias} is not part of the llama model of config.json")
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
    let mut bad = index.clone();
    bad["weight_map"].as_object_mut().unwrap().remove(norm);
    write(&bad);
    assert_eq!(
        error(&dir),
        "model.safetensors.index.json: tensor model.norm.weight is missing; the llama model of config.json has it with shape [16]"
    );
    write(&index);
    fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    assert!(error(&dir).starts_with("b.safetensors: "), "{}", error(&dir));
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
