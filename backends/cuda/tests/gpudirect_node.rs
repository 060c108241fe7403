//! A prefill node on the (emulated) device and a decode node on the CPU: once the connection between them reads the device's memory,
//! layers of prompts stay there until the decode node has them, and every answer is the one that it is without.

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use backend::{Backend, DType, DeviceOptions, Group};
use backend_cpu::CpuBackend;
use backend_cuda::EmulatedBackend;
use engine::{Engine, EngineOptions, Event, Job, Place, Request, Runner, Terms};
use kvtransfer::Sender;
use kvtransfer::transport::ucx::{Ways, available};
use models::{Checkpoint, Model};

const CONFIG: &str = r#"{
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": false, "torch_dtype": "float32"
}"#;

const TRIPS_MAX: usize = 20;

struct Node {
    engine: Engine,
    sender: Sender,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    fn start<B: Backend>(dir: &std::path::Path, ways: Ways) -> Node {
        let (engine, commands) = engine::engine();
        let (told, sender) = channel();
        let dir = dir.to_owned();
        let work = move || {
            let device =
                DeviceOptions { dtype: DType::F32, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
            let mut backend = B::open(&device, Group::alone()).unwrap();
            let checkpoint = Checkpoint::dummy(&dir, 5).unwrap();
            let model = Model::load(&mut backend, &checkpoint, 0, 1, DType::F32, &mut |_| {}).unwrap();
            let options = EngineOptions {
                kv_bytes: 64 * 16 * model.kv_spec().token_bytes() as u64,
                context_tokens: 512,
                batch_max: 4,
                step_tokens: 64,
                chunk_tokens: 40,
                prefix_cache: false,
                kv_ways: ways,
                ..EngineOptions::default()
            };
            let mut runner = Runner::new(backend, model, options).unwrap();
            told.send(runner.sender()).unwrap();
            let terms = Terms {
                trust: engine::tp::Trust::in_clear(b"cluster".to_vec()),
                version: "1".into(),
                identity: "tiny".into(),
                first_epoch: 1,
                native: None,
            };
            engine::serve(&mut runner, &Place::Alone, &terms, &commands).unwrap();
        };
        let thread = Some(std::thread::spawn(work));
        let sender = sender.recv().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !engine.ready() {
            assert!(Instant::now() < until, "the node does not serve");
            std::thread::yield_now();
        }
        Node { engine, sender, thread }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.engine.stop();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A prompt of 100 tokens through both nodes: the answer's ids.
fn trip(prefill: &Node, decode: &Node, text: u32) -> Vec<u32> {
    let token = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(text * 40_503) >> 7) % 96;
    let request = Request {
        id: format!("text {text}"),
        tokens: (0..100).map(token).collect(),
        output_start: 100,
        max_tokens: 5,
        ..Request::default()
    };
    let mut landing = decode.engine.submit(Job::Land(request.clone())).unwrap();
    let Some(Event::Admitted { handoff: Some(handoff), .. }) = landing.blocking_recv() else {
        panic!("not admitted")
    };
    let mut events = prefill.engine.submit(Job::Prefill(request, Some(handoff))).unwrap();
    let mut ids = Vec::new();
    let mut pushed = false;
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::Pushed { .. } => pushed = true,
            Event::Failed(error) => panic!("prefill: {error}"),
            _ => {}
        }
    }
    assert!(pushed);
    while let Some(event) = landing.blocking_recv() {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::Failed(error) => panic!("decode: {error}"),
            _ => {}
        }
    }
    assert_eq!(ids.len(), 5);
    ids
}

#[test]
fn what_stays_on_the_device_changes_no_answer() {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("gpudirect-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config.json"), CONFIG).unwrap();
    let ucx = available();
    assert!(ucx.is_ok() || std::env::var_os("BATON_NEEDS_UCX").is_none(), "{ucx:?}");
    let ways = Ways { shm: true, device: true, ..Ways::NONE };
    let decode = Node::start::<CpuBackend>(&dir, ways);
    let staged = Node::start::<EmulatedBackend>(&dir, Ways { device: false, ..ways });
    let prefill = Node::start::<EmulatedBackend>(&dir, ways);
    let mut whole = false;
    // A node's first layers may be done before its connection has agreed on the way; later ones of the same prompt are not.
    for text in 0..TRIPS_MAX as u32 {
        let before = prefill.sender.unstaged_bytes();
        assert_eq!(trip(&prefill, &decode, text), trip(&staged, &decode, text), "text {text}");
        // Two planes of 2 heads of 16 f32 in 4 layers.
        whole = prefill.sender.unstaged_bytes() - before == 100 * 2 * 2 * 16 * 4 * 4;
        if whole || (ucx.is_err() && text > 0) {
            break;
        }
    }
    assert_eq!((whole, staged.sender.unstaged_bytes(), prefill.sender.fallbacks()), (ucx.is_ok(), 0, 0));
    drop((decode, staged, prefill));
    std::fs::remove_dir_all(&dir).unwrap();
}
