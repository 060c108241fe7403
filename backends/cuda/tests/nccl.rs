//! Groups that sum by NCCL: the host's part of it, with a library that has NCCL's calls and adds up on the host.

#[path = "nccl/library.rs"]
mod library;

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{
    Backend, BackendError, Batch, DType, DeviceOptions, Group, KvSpec, Out, Peers, SeqId, Step, TensorView,
    WeightSource,
};
use backend_cuda::EmulatedBackend;

use crate::library::library;

const DTYPES: &[DType] = &[DType::F32, DType::BF16];

/// Kernels run one at a time in a process: tests do, too, so that no rank of a group is silent because of another test.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything that concerns groups holds, a lost rank too, and it was NCCL that added.
#[test]
fn a_group_with_nccl_conforms() {
    let _alone = alone();
    let sums = library();
    let suite = Suite {
        open: &EmulatedBackend::open,
        tolerance: Tolerance { f32: 3e-6, bf16: 2e-2 },
        dtypes: DTYPES,
        group: Some(Group::local),
        quants: QUANTS,
        plain_experts: DTYPES,
    };
    for (name, case) in suite.cases() {
        if ["in a group", "ranks", "exact, tensor parallel", "lost rank"]
            .iter()
            .any(|part| name.contains(part))
        {
            println!("conformance: {name}");
            let before = sums();
            DTYPES.iter().for_each(|dtype| case(&suite, *dtype));
            println!("  {} sums", sums() - before);
        }
    }
    assert!(sums() > 0, "sums went elsewhere");
}

/// A rank that is lost between the greeting and NCCL's group is told as lost, and soon: NCCL alone would wait on.
#[test]
fn a_rank_lost_while_joining_is_told() {
    let _alone = alone();
    library();
    let mut groups = Group::local(2).unwrap();
    let (theirs, mine) = (groups.pop().unwrap(), groups.pop().unwrap());
    let options = DeviceOptions { dtype: DType::F32, block_tokens: 16, ..DeviceOptions::default() };
    let mut backend = EmulatedBackend::open(&options, mine).unwrap();
    let spec = KvSpec::gqa(1, 1, 0..1, 8, DType::F32);
    let mut kv = backend.kv(&spec, 16 * spec.token_bytes() as u64).unwrap();
    let bytes = [0; 8 * 4];
    let table =
        TensorView { name: "test", dtype: DType::F32, rows: 1, cols: 8, row_stride_bytes: 32, bytes: &bytes };
    let table = backend.load(&WeightSource::Embedding(table.into())).unwrap();
    // The device is there: from now on no rank keeps the other waiting.
    let other = std::thread::spawn(move || {
        let mut peers = Peers::new(theirs, "test").unwrap();
        // It has NCCL, and a device of its own.
        let mut hello = [[0; 17]; 2];
        let [first, second] = &mut hello;
        peers.exchange(&[1; 17], &mut [&mut first[..], &mut second[..]]).unwrap();
        peers.hear(&mut [0; 128]).unwrap();
    });
    let mut batch = Batch::default();
    batch.push(SeqId(1), 0, &[0]);
    let mut step = backend.step(&mut kv, &batch);
    let x = step.embed(&table);
    let x = step.all_reduce(x);
    match step.submit(Out::Hidden(x)).wait() {
        Err(BackendError::Group { rank: 1, reason }) => assert!(!reason.contains("within"), "{reason}"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("a sum of one rank"),
    }
    other.join().unwrap();
}
