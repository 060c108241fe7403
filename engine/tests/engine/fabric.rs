//! Ranks whose backend has a fabric of its own, which does not come up: nothing waits for it for ever.

use std::net::TcpListener;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::Duration;

use backend::{DType, DeviceOptions};
use engine::{EngineError, EngineOptions, Native, Place, Runner, Terms};
use models::Model;

use crate::late::{Calls, Late};
use crate::node::{checkpoint, until};

/// Why ranks were to be started anew.
static ANEW: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Both ranks have met and wait for the fabric; each is started anew, though its own thread hangs.
#[test]
fn ranks_that_wait_for_their_fabric_are_started_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let leader = listener.local_addr().expect("bound").to_string();
    let places = [Place::Lead { listener, world: 2 }, Place::Follow { leader, rank: 1 }];
    let (mut hold, mut ranks) = (Vec::new(), Vec::new());
    for (rank, place) in places.into_iter().enumerate() {
        let (gate, fabric) = mpsc::channel();
        hold.push(gate);
        ranks.push(std::thread::spawn(move || serve(rank, &place, fabric)));
    }
    until("both ranks are to start anew", || ANEW.lock().unwrap().len() >= 2);
    for reason in ANEW.lock().unwrap().iter() {
        assert_eq!(reason, "the ranks' fabric did not come up in 0.2 s");
    }
    drop(hold);
    for rank in ranks {
        let ended = rank.join().expect("no panic");
        assert!(matches!(ended, Err(EngineError::Backend(_))), "{ended:?}");
    }
}

fn serve(rank: usize, place: &Place, fabric: mpsc::Receiver<()>) -> Result<(), EngineError> {
    let options = DeviceOptions { dtype: DType::F32, threads: 1, ..DeviceOptions::default() };
    let unmet = engine::tp::unmet(rank, 2).expect("loopback sockets");
    let mut backend = Late::open(&options, unmet, false, Calls::default())?;
    backend.fabric = Some(fabric);
    let model = Model::load(&mut backend, checkpoint(), rank, 2, DType::F32, &mut |_| {}).expect("a model");
    let kv_bytes = 64 * u64::from(options.block_tokens) * model.kv_spec().token_bytes() as u64;
    let mut runner = Runner::new(backend, model, EngineOptions { kv_bytes, ..EngineOptions::default() })?;
    let native = Native {
        about: String::new(),
        join_max: Duration::from_millis(200),
        renew: |reason| ANEW.lock().unwrap().push(reason.into()),
    };
    let terms = Terms {
        trust: engine::tp::Trust::in_clear(b"cluster".to_vec()),
        version: "1".into(),
        identity: "tiny".into(),
        first_epoch: 1,
        native: Some(native),
    };
    let (_engine, commands) = engine::engine();
    engine::serve(&mut runner, place, &terms, &commands)
}
