//! What one connection moves over loopback, checksums on both ends included. Run by hand:
//! `cargo test --release -p kvtransfer --test throughput -- --ignored --nocapture`

mod common;

use std::sync::Arc;
use std::time::Instant;

use backend::{DType, KvSpec};
use common::net::{addresses, expect_all, open, receivers};
use common::{CLOSE, Cache, Case, MemExport, even, gqa_ranks};
use kvtransfer::{Limits, Sender};

/// 256 MiB of an 8B-shaped cache: 32 layers x 2 planes x 8 heads x 128 x 2 B = 128 KiB per token, 2048 tokens.
#[test]
#[ignore = "a measurement"]
fn loopback() {
    let whole = || vec![KvSpec::gqa(32, 8, 0..8, 128, DType::BF16)];
    let cache = Arc::new(Cache::full(&whole()[0], 0..2048, 64));
    for (name, to, frame_bytes) in [
        ("1 -> 1, frames of 256 KiB", whole(), 256 << 10),
        ("1 -> 1, frames of 1 MiB", whole(), 1 << 20),
        ("1 -> 1, frames of 4 MiB", whole(), 4 << 20),
        ("1 -> 2, frames of 1 MiB", gqa_ranks(32, 8, 128, &even(8, 2)), 1 << 20),
        ("1 -> 4, frames of 1 MiB", gqa_ranks(32, 8, 128, &even(8, 4)), 1 << 20),
    ] {
        let limits = Limits { frame_bytes, ..Limits::default() };
        let receivers = receivers(to.len(), &limits);
        let sender = Sender::new(limits);
        let mut rates = Vec::new();
        for _ in 0..5 {
            let case = Case::new(whole(), to.clone(), 0..2048);
            let ends = expect_all(&case, &receivers, 64, true);
            let begun = Instant::now();
            let (push, end) = open(&case, 0, &sender, &addresses(&receivers));
            for layer in 0..32 {
                let cache = cache.clone();
                push.layer(MemExport { cache, layers: layer..layer + 1, tokens: 0..2048, direct: true });
            }
            push.close(CLOSE);
            let pushed = end.recv().unwrap().unwrap();
            rates.push(pushed.bytes as f64 / (pushed.acknowledged - begun).as_secs_f64() / 1e9);
            assert!(ends.iter().all(|(_, end)| end.result.is_ok()));
        }
        rates.sort_by(f64::total_cmp);
        let measured: f32 = sender.links().iter().map(|link| link.gbytes_per_s).sum();
        println!("{name}: {:.2} GB/s (median of 5), links measured {measured:.2} GB/s", rates[2]);
    }
}
