//! What becomes of a barrier in shared memory that never completes: a block that has waited for it in vain (`kernels/blackwell.cu`)
//! answers with what are no numbers, and whoever asked is told; the device goes on, and who tries again has the answer.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use backend::{Backend, DType, DeviceOptions, Group};
use engine::{Engine, EngineOptions, Event, Job, JobError, Place, Request, Runner, Terms};
use models::{Checkpoint, Model};

use crate::device::{Device, Open};
use crate::emulator::Emulated;

const CONFIG: &str = r#"{
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;
/// With tensor memory.
const DEVICE: usize = 9;
const TOKENS: usize = 70;

fn options() -> DeviceOptions {
    DeviceOptions { dtype: DType::BF16, block_tokens: 16, ..DeviceOptions::default() }
}

struct Node {
    engine: Engine,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    fn start(driver: Emulated) -> Node {
        let (engine, commands) = engine::engine();
        let dir = std::env::temp_dir().join(format!("baton-given-up-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.json"), CONFIG).unwrap();
        let checkpoint = Checkpoint::dummy(&dir, 5).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let work = move || {
            let mut device = Device::over(driver, &options(), Group::alone()).unwrap();
            assert!(device.caps().device.contains("tcgen05"));
            let model = Model::load(&mut device, &checkpoint, 0, 1, DType::BF16, &mut |_| {}).unwrap();
            let kv_bytes = 64 * 16 * model.kv_spec().token_bytes() as u64;
            let options =
                EngineOptions { kv_bytes, context_tokens: 512, batch_max: 4, ..EngineOptions::default() };
            let mut runner = Runner::new(device, model, options).unwrap();
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
        let until = Instant::now() + Duration::from_secs(60);
        while !engine.ready() {
            assert!(Instant::now() < until, "the node does not serve");
            std::thread::yield_now();
        }
        Node { engine, thread }
    }

    /// The answer to a prompt of its own, for those with this salt.
    fn answer(&self, text: u32, salt: &[u8]) -> Result<Vec<u32>, JobError> {
        let token = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(text * 40_503) >> 7) % 96;
        let request = Request {
            tokens: (0..TOKENS as u32).map(token).collect(),
            output_start: TOKENS,
            max_tokens: 2,
            ignore_eos: true,
            cache_salt: salt.into(),
            ..Request::default()
        };
        let mut events = self.engine.submit(Job::Generate(request)).unwrap();
        let mut ids = Vec::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Token(token) => ids.push(token.id),
                Event::Failed(error) => return Err(error),
                _ => {}
            }
        }
        Ok(ids)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.engine.stop();
        // A panic of the node has failed the test already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Whichever arrival is lost: of threads that bring keys, of products that give scores, of threads that make them weights, of the
/// last products.
#[test]
fn a_wait_in_vain_fails_the_request_and_nothing_else() {
    let driver = Emulated::open(DEVICE, None).unwrap();
    let node = Node::start(driver.clone());
    for (text, arrival) in (0..).zip([1, 193, 300, 452]) {
        driver.lose("attend_tensor", arrival);
        let lost = node.answer(text, b"").map_err(|error| error.to_string());
        assert_eq!(
            lost,
            Err(format!("engine: logit of id 0 at position {TOKENS} is not finite")),
            "arrival {arrival}"
        );
        // With what is cached, which is nothing, and with a cache of its own.
        let again = node.answer(text, b"").unwrap();
        assert_eq!((again.len(), Ok(again)), (2, node.answer(text, b"another")), "arrival {arrival}");
    }
}

/// A device that is opened goes without products whose barriers do not complete, and works.
#[test]
fn a_trial_in_vain_leaves_the_products_alone() {
    let driver = Emulated::open(DEVICE, None).unwrap();
    driver.lose("attend_tensor", 1);
    let device = Device::over(driver, &options(), Group::alone()).unwrap();
    assert!(!device.caps().device.contains("tcgen05"));
}
