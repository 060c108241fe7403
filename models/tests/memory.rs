//! A rank reads its own bytes of the files and no others, and a load takes little more memory than what it leaves: large
//! models are larger than a machine. Measured on the whole process, so this test is alone in its binary.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use backend::{Backend, DType, DeviceOptions, Group};
use backend_cpu::CpuBackend;
use models::{Checkpoint, Config, Model, Progress, TensorSpec, tensors};
use serde_json::{Map, Value, json};

/// 24 experts of this width that are most of the model; their sources together are far more than [`SPARE_BYTES`].
fn config(width: usize) -> Value {
    json!({
        "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 8192,
        "moe_intermediate_size": width, "num_experts": 24, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
        "max_position_embeddings": 64
    })
}

/// Of experts whose rows are long, in every format.
const WIDE: usize = 8192;

/// Of the experts of DeepSeek V3 and Kimi K2. A row of `down_proj` has 2 KiB in FP8 and 1 KiB in INT4; each of four ranks
/// needs 512 or 256 bytes of it.
const NARROW: usize = 2048;

/// How the matrices of a directory of safetensors are stored, but for tables and routers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Bf16,
    Fp8,
    /// Packed codes of the experts only.
    Int4,
    /// Inputs as rows.
    Awq,
}

/// What a load may take besides the part that it leaves: the experts that are read ahead, buffers, the heap's own.
const SPARE_BYTES: u64 = 56 << 20;

/// A number of `/proc/self/FILE`.
fn measure(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

fn specs(config: &Value) -> Vec<TensorSpec> {
    tensors(&Config::parse("c", config.to_string().as_bytes()).unwrap())
}

/// Zeros take no place on the disk.
fn zeros(file: &mut File, bytes: u64) {
    let end = file.seek(SeekFrom::End(0)).unwrap() + bytes;
    file.set_len(end).unwrap();
}

/// A directory with a model of experts of this width.
fn safetensors(dir: &Path, width: usize, form: Form) {
    let mut config = config(width);
    match form {
        Form::Bf16 => {}
        Form::Fp8 => {
            config["quantization_config"] =
                json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128] });
        }
        Form::Awq => {
            config["quantization_config"] = json!({ "quant_method": "awq", "bits": 4, "group_size": 128 });
        }
        Form::Int4 => {
            let weights = json!({ "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32 });
            config["quantization_config"] = json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": { "group_0": { "targets": ["Linear"], "weights": weights } }
            });
        }
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut header = Map::new();
    let mut end = 0;
    let mut put = |name: String, dtype: &str, shape: &[usize], item: usize| {
        let start = end;
        end += shape.iter().product::<usize>() * item;
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
    };
    for TensorSpec { name, shape, .. } in specs(&config) {
        if form == Form::Fp8 && name.contains("_proj") {
            let blocks: Vec<usize> = shape.iter().map(|n| n.div_ceil(128)).collect();
            put(format!("{name}_scale_inv"), "F32", &blocks, 4);
            put(name, "F8_E4M3", &shape, 1);
        } else if form == Form::Int4 && name.contains(".experts.") {
            put(format!("{name}_packed"), "I32", &[shape[0], shape[1] / 8], 4);
            put(format!("{name}_scale"), "BF16", &[shape[0], shape[1] / 32], 2);
            put(format!("{name}_shape"), "I64", &[2], 8);
        } else if form == Form::Awq && name.contains("_proj") {
            let (base, groups) = (name.trim_end_matches(".weight"), shape[1] / 128);
            put(format!("{base}.qweight"), "I32", &[shape[1], shape[0] / 8], 4);
            put(format!("{base}.qzeros"), "I32", &[groups, shape[0] / 8], 4);
            put(format!("{base}.scales"), "F16", &[groups, shape[0]], 2);
        } else {
            put(name, "BF16", &shape, 2);
        }
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    zeros(&mut file, end as u64);
}

/// A GGUF file of the wide model: Q8_0, norms and routers in f32.
fn gguf(path: &Path) {
    const Q8_0: u32 = 8;
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut head = Vec::new();
    let numbers = [
        ("embedding_length", 512u32),
        ("block_count", 2),
        ("attention.head_count", 64),
        ("attention.head_count_kv", 4),
        ("attention.key_length", 128),
        ("attention.value_length", 128),
        ("feed_forward_length", 8192),
        ("expert_feed_forward_length", 8192),
        ("expert_count", 24),
        ("expert_used_count", 2),
        ("context_length", 64),
    ];
    head.extend(string("general.architecture"));
    head.extend(8u32.to_le_bytes());
    head.extend(string("qwen3moe"));
    for (key, value) in numbers {
        head.extend(string(&format!("qwen3moe.{key}")));
        head.extend(4u32.to_le_bytes());
        head.extend(value.to_le_bytes());
    }
    for (key, value) in [("attention.layer_norm_rms_epsilon", 1e-6f32), ("rope.freq_base", 1e4)] {
        head.extend(string(&format!("qwen3moe.{key}")));
        head.extend(6u32.to_le_bytes());
        head.extend(value.to_le_bytes());
    }
    let mut tensors: Vec<(String, Vec<u64>, bool)> = vec![
        ("token_embd.weight".into(), vec![512, 1024], true),
        ("output.weight".into(), vec![512, 1024], true),
        ("output_norm.weight".into(), vec![512], false),
    ];
    for layer in 0..2 {
        let mut put = |name: &str, shape: &[u64], coded: bool| {
            tensors.push((format!("blk.{layer}.{name}.weight"), shape.to_vec(), coded));
        };
        put("attn_norm", &[512], false);
        put("ffn_norm", &[512], false);
        put("attn_q_norm", &[128], false);
        put("attn_k_norm", &[128], false);
        put("attn_q", &[512, 8192], true);
        put("attn_k", &[512, 512], true);
        put("attn_v", &[512, 512], true);
        put("attn_output", &[8192, 512], true);
        put("ffn_gate_inp", &[512, 24], false);
        put("ffn_gate_exps", &[512, 8192, 24], true);
        put("ffn_up_exps", &[512, 8192, 24], true);
        put("ffn_down_exps", &[8192, 512, 24], true);
    }
    let mut table = Vec::new();
    let mut end = 0u64;
    for (name, shape, coded) in &tensors {
        let elements: u64 = shape.iter().product();
        table.extend(string(name));
        table.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|n| table.extend(n.to_le_bytes()));
        table.extend(if *coded { Q8_0 } else { 0 }.to_le_bytes());
        table.extend(end.to_le_bytes());
        end += if *coded { elements / 32 * 34 } else { elements * 4 }.next_multiple_of(32);
    }
    let mut file = File::create(path).unwrap();
    file.write_all(b"GGUF").unwrap();
    file.write_all(&3u32.to_le_bytes()).unwrap();
    file.write_all(&(tensors.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&(3 + numbers.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&head).unwrap();
    file.write_all(&table).unwrap();
    let at = file.stream_position().unwrap();
    zeros(&mut file, at.next_multiple_of(32) - at);
    zeros(&mut file, end);
}

/// What a load did.
struct Load {
    /// Bytes that were read.
    read: u64,
    /// Bytes of memory at its peak, beyond those before.
    held: u64,
    last: Progress,
    /// Reports of progress.
    steps: usize,
}

/// Loads one rank of `world`.
fn load(checkpoint: &Checkpoint, rank: usize, world: usize) -> Load {
    let options =
        DeviceOptions { dtype: DType::BF16, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
    let group = Group::local(world).unwrap().swap_remove(rank);
    let mut backend = CpuBackend::open(&options, group).unwrap();
    // The peak so far is forgotten.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (read, held) = (measure("io", "rchar"), measure("status", "VmRSS") << 10);
    let (mut last, mut steps) = (Progress::default(), 0);
    let model = Model::load(&mut backend, checkpoint, rank, world, DType::BF16, &mut |progress| {
        assert!(progress.bytes >= last.bytes && progress.layers >= last.layers, "{progress:?}");
        (last, steps) = (progress, steps + 1);
    })
    .unwrap();
    let read = measure("io", "rchar") - read;
    let held = (measure("status", "VmHWM") << 10) - held;
    drop(model);
    Load { read, held, last, steps }
}

/// The last of `world` ranks reads and holds its part, and not more.
fn check(what: &str, checkpoint: &Checkpoint, world: usize) {
    let what = format!("{what}, rank of {world}");
    let rank = world - 1;
    let part = checkpoint.rank_bytes(world).unwrap()[rank];
    let Load { read, held, last, steps } = load(checkpoint, rank, world);
    assert_eq!((last.bytes, last.bytes_total, last.layers), (part, part, 2), "{what}");
    assert!(steps > 10, "{what}: {steps} reports of progress");
    // A few kilobytes are the measuring itself.
    assert!((part..part + (1 << 20)).contains(&read), "{what}: {read} bytes read of a part of {part}");
    assert!(held < part + SPARE_BYTES, "{what}: {held} bytes of memory for a part of {part}");
    println!("{what}: part {} MiB, {} MiB more held", part >> 20, (held as i64 - part as i64) >> 20);
}

#[test]
fn a_rank_reads_and_holds_its_own_part() {
    let dir = tempfile::tempdir().unwrap();
    for form in [Form::Bf16, Form::Fp8] {
        safetensors(dir.path(), WIDE, form);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let whole = checkpoint.weight_bytes();
        let worlds = if form == Form::Fp8 { &[1, 2, 4][..] } else { &[4] };
        for world in worlds {
            let part = checkpoint.rank_bytes(*world).unwrap()[0];
            // The embedding table is whole on every rank.
            assert!(part < whole / *world as u64 + (2 << 20), "{part} of {whole} on {world} ranks");
            check(&format!("{form:?}"), &checkpoint, *world);
        }
    }
    // Of rows shorter than a page, which are cut by columns, every rank reads all: a drive would do so, too. No more than that.
    for form in [Form::Fp8, Form::Int4] {
        safetensors(dir.path(), NARROW, form);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let down = 24 * 512 * NARROW as u64;
        let down = if form == Form::Fp8 { down } else { down / 2 + down / 32 * 2 };
        for world in [2, 4] {
            let parts: u64 = checkpoint.rank_bytes(world).unwrap().iter().sum();
            let read: u64 = (0..world).map(|rank| load(&checkpoint, rank, world).read).sum();
            let most = parts + (world as u64 - 1) * down + (world as u64) * (1 << 20);
            assert!(
                (parts..most).contains(&read),
                "{form:?}: {world} ranks read {read} bytes, at most {most}"
            );
            let whole = checkpoint.weight_bytes() as f64;
            println!("{form:?}: {world} ranks read {:.2} times the files", read as f64 / whole);
        }
    }
    // Where inputs are rows, what is cut by outputs is read by all ranks, in rows shorter than a page; by inputs, once.
    safetensors(dir.path(), NARROW, Form::Awq);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let whole = fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
    let down = 24 * 512 * NARROW as u64 / 2;
    for world in [1, 2, 4] {
        let mut all = 0;
        for (rank, part) in checkpoint.rank_bytes(world).unwrap().into_iter().enumerate() {
            let Load { read, held, last, .. } = load(&checkpoint, rank, world);
            assert_eq!((last.bytes, last.bytes_total), (part, part), "AWQ, rank {rank} of {world}");
            assert!(
                held < part + SPARE_BYTES,
                "AWQ, rank {rank} of {world}: {held} bytes for a part of {part}"
            );
            all += read;
        }
        let most = down + world as u64 * (whole - down + (1 << 20));
        assert!(all < most, "AWQ: {world} ranks read {all} bytes, at most {most}");
        println!("AWQ: {world} ranks read {:.2} times the files", all as f64 / whole as f64);
    }
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let file = dir.path().join("model.gguf");
    gguf(&file);
    let checkpoint = Checkpoint::open(&file).unwrap();
    for world in [1, 2, 4] {
        check("gguf q8_0", &checkpoint, world);
    }
}
