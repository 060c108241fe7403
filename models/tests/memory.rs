//! A rank reads its own bytes of the files and no others, and a load takes little more memory than what it leaves: large
//! models are larger than a machine. Measured on the whole process, so this test is alone in its binary.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::Write;

use backend::{Backend, DType, DeviceOptions, Group};
use backend_cpu::CpuBackend;
use models::{Checkpoint, Config, Model, tensors};

/// 310 MB, most of it in matrices of 6 MB, whose half rows are longer than a page.
const CONFIG: &str = r#"{"model_type": "qwen3_moe", "vocab_size": 4096, "hidden_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 6144, "num_experts": 6, "num_experts_per_tok": 2,
    "decoder_sparse_step": 2, "max_position_embeddings": 64}"#;

/// What a load may take besides the part that it leaves: the sources of one weight (a layer's experts), buffers.
const SPARE_BYTES: u64 = 64 << 20;

/// A number of `/proc/self/FILE`.
fn measure(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_rank_reads_and_holds_its_own_part() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    // Zeros take no place on the disk.
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for spec in tensors(&Config::parse("c", CONFIG.as_bytes()).unwrap()) {
        let start = end;
        end += spec.shape.iter().product::<usize>() * 2;
        let entry = serde_json::json!({ "dtype": "BF16", "shape": spec.shape, "data_offsets": [start, end] });
        header.insert(spec.name, entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let part = checkpoint.rank_bytes(2).unwrap()[0];
    assert!(part > 128 << 20 && part < checkpoint.weight_bytes() * 6 / 10, "{part}");
    let options =
        DeviceOptions { dtype: DType::BF16, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
    let group = Group::local(2).unwrap().swap_remove(0);
    let mut backend = CpuBackend::open(&options, group).unwrap();
    let (read, held) = (measure("io", "rchar"), measure("status", "VmHWM") << 10);
    let mut last = models::Progress::default();
    let model =
        Model::load(&mut backend, &checkpoint, 0, 2, DType::BF16, &mut |progress| last = progress).unwrap();
    let read = measure("io", "rchar") - read;
    let held = (measure("status", "VmHWM") << 10) - held;
    drop(model);
    assert_eq!((last.bytes, last.bytes_total, last.layers), (part, part, 4));
    // A few kilobytes are the measuring itself.
    assert!((part..part + (1 << 20)).contains(&read), "{read} bytes read of a part of {part}");
    assert!(held < part + SPARE_BYTES, "{held} bytes of memory for a part of {part}");
}
