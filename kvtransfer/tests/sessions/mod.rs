//! Whole sessions over real sockets on loopback: right bytes, every kind of end, and the bounds that hold against strangers.
//! The same for every way that payloads may take: `crate::WAYS` of the test binary that this is part of.

mod connections;
mod ends;
mod landing;
mod stores;
mod strangers;

use backend::{DType, KvSpec};
use kvtransfer::{Limits, Receiver, Sender};

use crate::common::net::{LOCAL, session};
use crate::common::{CLOSE, Case};

fn limits() -> Limits {
    Limits { ways: crate::WAYS, ..Limits::default() }
}

/// 4 layers of 8 heads of 64 bf16: 8 KiB per token.
fn whole(tokens: u32) -> Case {
    let spec = || vec![KvSpec::gqa(4, 8, 0..8, 64, DType::BF16)];
    Case::new(spec(), spec(), 0..tokens)
}

fn one_receiver(limits: &Limits) -> (Receiver, String) {
    let receiver = Receiver::bind(LOCAL, limits.clone()).unwrap();
    let address = receiver.local_addr().to_string();
    (receiver, address)
}

fn assert_lands(case: &Case, sender: &Sender, receiver: &Receiver, address: &str) {
    let (pushed, landed) = session(case, sender, receiver, address);
    let summary = landed.result.unwrap();
    assert_eq!((summary.bytes, summary.close), (pushed.unwrap().bytes, CLOSE));
    assert!(landed.landing.cache.is_right());
}
