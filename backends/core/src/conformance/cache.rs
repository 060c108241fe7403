//! Cases of the KV store: what attention writes is what an export reads; what lands is what attention reads.

use super::attention::{Layer, ids, small};
use super::reference::Attention;
use super::{Case, Suite};
use crate::{
    Backend, Batch, Cut, DType, Fork, KvError, KvExport, KvLanding, KvSpec, KvStore, Piece, RopeStyle, SeqId,
    Step, checksum,
};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("kv, capacity", capacity),
        ("kv, export in wire order", export),
        ("kv, export that stays on the device", export_there),
        ("kv, export survives its sequence", export_outlives),
        ("kv, export of what is not there", export_missing),
        ("kv, land and go on", land),
        ("kv, landing of a closed sequence", land_closed),
        ("kv, fork and go on", fork),
        ("kv, truncate and write again", truncate),
    ]
}

const A: SeqId = SeqId(1);
const B: SeqId = SeqId(2);

fn ok<T>(what: &str, result: Result<T, KvError>) -> T {
    result.unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Runs `ids` of `seq` from `start` on.
fn feed<X: Backend>(layer: &mut Layer<X>, seq: SeqId, start: usize, ids: &[u32]) -> Vec<f32> {
    let mut batch = Batch::default();
    batch.push(seq, start as u32, ids);
    layer.run(&batch)
}

/// The bytes of a piece, by slices where the export offers them; checks that both ways agree.
fn read(export: &impl KvExport, piece: &Piece) -> Vec<u8> {
    let mut bytes = Vec::new();
    export.wait().unwrap_or_else(|error| panic!("wait: {error}"));
    ok("read", export.read(piece, &mut bytes));
    if let Some(slices) = export.slices(piece) {
        let joined: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
        assert_eq!(joined, bytes, "slices of {piece:?}");
    }
    bytes
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        DType::F16 => {
            bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        DType::BF16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    }
}

fn audit<K: KvStore>(kv: &mut K) {
    let usage = kv.usage();
    assert_eq!(usage.total, usage.free + usage.used + usage.quarantined, "{usage:?}");
}

fn capacity<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let options = suite.options(dtype);
    let spec = KvSpec::gqa(2, 2, 0..2, 8, dtype);
    let mut rig = suite.rig_with(&options, crate::Group::alone(), &spec, 64);
    let (kv, block) = (&mut rig.kv, options.block_tokens);
    let block = if kv.block_tokens() == 0 { block } else { kv.block_tokens() };
    let total = kv.usage().total;
    assert!(total * block >= 64, "{total} blocks of {block} for 64 tokens");
    assert_eq!(kv.usage().free, total);
    ok("open", kv.open(A, 1));
    assert_eq!(kv.open(A, 1), Err(KvError::Exists(A)));
    assert_eq!(kv.grow(B, 1), Err(KvError::Unknown(B)));
    assert_eq!(kv.usage().used, 1);
    ok("grow", kv.grow(A, block + 1));
    ok("grow to less", kv.grow(A, 1));
    assert_eq!(kv.usage().used, 2);
    let wanted = total * block;
    assert!(matches!(kv.open(B, wanted), Err(KvError::Full { .. })), "opened more than there is");
    assert_eq!(kv.usage().used, 2);
    ok("truncate", kv.truncate(A, block));
    assert_eq!(kv.usage().used, 1);
    audit(kv);
    ok("close", kv.close(A));
    assert_eq!(kv.close(A), Err(KvError::Unknown(A)));
    assert_eq!(kv.usage().free, total);
    ok("open all", kv.open(B, wanted));
    assert_eq!(kv.usage().free, 0);
}

fn export<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        let mut layer = Layer::new(suite, dtype, Attention { style, ..small() }, 50, 64);
        let ids = ids(1, 40, 50);
        layer.rig.open(A, 40);
        feed(&mut layer, A, 0, &ids[..25]);
        feed(&mut layer, A, 25, &ids[25..]);
        let export = ok("export", layer.rig.kv.export(A, 1, 3..39));
        assert_eq!((export.tokens(), export.layers()), (3..39, 1..2));
        for (plane, heads, tokens) in [(0, 0..2, 3..39), (1, 0..2, 7..8), (0, 1..2, 10..30), (1, 0..1, 3..39)]
        {
            let piece = Piece { layer: 1, plane, heads: heads.clone(), tokens: tokens.clone() };
            let got = floats(dtype, &read(&export, &piece));
            let dim = layer.attention.dim;
            let want: Vec<f64> = tokens
                .flat_map(|p| {
                    let row = layer.inputs.row(ids[p as usize] as usize);
                    layer.attention.cached(row, plane, p as usize)[heads.start * dim..heads.end * dim]
                        .to_vec()
                })
                .collect();
            suite.close(dtype, &format!("{style:?} {piece:?}"), &got, &want);
        }
        let outside = Piece { layer: 1, plane: 0, heads: 0..2, tokens: 2..4 };
        assert!(export.read(&outside, &mut Vec::new()).is_err(), "read {outside:?} of a lease on 3..39");
        assert!(export.slices(&outside).is_none(), "slices of {outside:?} of a lease on 3..39");
        let outside = Piece { layer: 1, plane: 0, heads: 1..3, tokens: 3..4 };
        assert!(export.read(&outside, &mut Vec::new()).is_err(), "read {outside:?} of 2 heads");
    }
}

/// What stays for receivers that read it there is what leaves by the host, each token with its checksum.
fn export_there<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 64);
    let ids = ids(1, 40, 50);
    layer.rig.open(A, 40);
    feed(&mut layer, A, 0, &ids);
    if layer.rig.kv.stays().is_none() {
        return;
    }
    let staged = ok("export", layer.rig.kv.export(A, 1, 3..39));
    let (batch, rig) = (Batch::default(), &mut layer.rig);
    let cuts = [Cut { plane: 0, heads: 0..2 }, Cut { plane: 1, heads: 1..2 }];
    let mut step = rig.backend.step(&mut rig.kv, &batch);
    let there = ok("export there", step.export_there(A, 1, 3..39, &cuts));
    drop(step);
    for (cut, tokens) in [(0, 3..39), (1, 3..39), (0, 7..8), (1, 10..38)] {
        let Cut { plane, heads } = cuts[cut].clone();
        let piece = Piece { layer: 1, plane, heads, tokens: tokens.clone() };
        let want = read(&staged, &piece);
        assert!(read(&there, &piece) == want, "copy of {piece:?}");
        let within = there.within(&piece).unwrap_or_else(|| panic!("{piece:?} has not stayed"));
        let sums: Vec<u32> = want.chunks(want.len() / tokens.len()).map(checksum::of).collect();
        assert_eq!((within.bytes, within.sums), (want.len(), Some(&sums[..])), "sums of {piece:?}");
    }
}

fn export_outlives<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 64);
    let ids = ids(1, 60, 50);
    layer.rig.open(A, 30);
    feed(&mut layer, A, 0, &ids[..30]);
    let export = ok("export", layer.rig.kv.export(A, 1, 0..30));
    let piece = Piece { layer: 1, plane: 0, heads: 0..2, tokens: 0..30 };
    let before = read(&export, &piece);
    ok("close", layer.rig.kv.close(A));
    audit(&mut layer.rig.kv);
    let free = layer.rig.kv.usage().free;
    // Whatever is free is written over.
    let room = free * layer.rig.kv.block_tokens();
    let len = room.min(60) as usize;
    layer.rig.open(B, len as u32);
    feed(&mut layer, B, 0, &ids[60 - len..]);
    // Another thread reads, as senders do.
    let reader = std::thread::spawn(move || read(&export, &piece));
    let after = reader.join().unwrap_or_else(|_| panic!("the reader failed"));
    assert_eq!(before, after, "the cache of a closed sequence changed under a lease");
    ok("close", layer.rig.kv.close(B));
    let usage = layer.rig.kv.usage();
    assert_eq!(usage.free, usage.total, "{usage:?} when idle");
}

fn export_missing<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 64);
    layer.rig.open(A, 30);
    feed(&mut layer, A, 0, &ids(1, 10, 50));
    let kv = &mut layer.rig.kv;
    assert!(kv.export(A, 1, 5..11).is_err(), "token 10 of 10 exported");
    assert!(kv.export(A, 0, 0..10).is_err(), "layer 0 exported, only layer 1 was computed");
    assert!(kv.export(A, 2, 0..10).is_err(), "layer 2 of 2 exported");
    assert!(kv.export(B, 1, 0..10).is_err(), "an unknown sequence exported");
    assert!(kv.land(A, 30..60).is_err(), "landed beyond the room");
    assert!(kv.land(B, 0..1).is_err(), "landed in an unknown sequence");
    ok("export", kv.export(A, 1, 0..10));
}

fn land<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 128);
    let ids = ids(1, 60, 50);
    layer.rig.open(A, 60);
    feed(&mut layer, A, 0, &ids[..50]);
    layer.rig.open(B, 60);
    // The second sequence computes the first tokens itself and is given the rest, piece by piece.
    feed(&mut layer, B, 0, &ids[..9]);
    let export = ok("export", layer.rig.kv.export(A, 1, 9..50));
    let mut landing = ok("land", layer.rig.kv.land(B, 9..50));
    assert_eq!(landing.tokens(), 9..50);
    for plane in 0..2 {
        for (heads, tokens) in [(0..2, 9..20), (0..1, 20..50), (1..2, 20..50)] {
            let piece = Piece { layer: 1, plane, heads, tokens };
            let bytes = read(&export, &piece);
            let short = landing.write(&piece, &bytes[1..]);
            assert_eq!(short, Err(KvError::Length { got: bytes.len() - 1, want: bytes.len() }));
            let whole = landing.slices(&piece).is_some();
            if whole && plane == 0 {
                let mut rest = bytes.as_slice();
                for mut slice in landing.slices(&piece).unwrap_or_default() {
                    let (now, later) = rest.split_at(slice.len());
                    slice.copy_from_slice(now);
                    rest = later;
                }
                assert!(rest.is_empty(), "{} bytes have no place in {piece:?}", rest.len());
            } else {
                ok("write", landing.write(&piece, &bytes));
            }
        }
    }
    let outside = Piece { layer: 1, plane: 0, heads: 0..1, tokens: 8..10 };
    assert!(landing.write(&outside, &[0; 1024]).is_err(), "wrote {outside:?} of a lease on 9..50");
    ok("commit", layer.rig.kv.commit(landing));
    for plane in 0..2 {
        let piece = Piece { layer: 1, plane, heads: 0..2, tokens: 9..50 };
        let landed = ok("export", layer.rig.kv.export(B, 1, 9..50));
        assert_eq!(read(&landed, &piece), read(&export, &piece), "plane {plane} after landing");
    }
    drop(export);
    let want = layer.expected(&ids);
    let (a, b) = (feed(&mut layer, A, 50, &ids[50..]), feed(&mut layer, B, 50, &ids[50..]));
    suite.close(dtype, "after a landing", &b, &want[50..].concat());
    if layer.rig.backend.caps().exact {
        assert_eq!(bits(&a), bits(&b), "after a landing");
    }
    for seq in [A, B] {
        ok("close", layer.rig.kv.close(seq));
    }
    let usage = layer.rig.kv.usage();
    assert_eq!(usage.free, usage.total, "{usage:?} when idle");
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn land_closed<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 64);
    layer.rig.open(A, 32);
    let kv = &mut layer.rig.kv;
    let landing = ok("land", kv.land(A, 0..32));
    assert!(kv.land(A, 31..32).is_err(), "two landings on one token");
    ok("close", kv.close(A));
    audit(kv);
    assert!(kv.commit(landing).is_err(), "committed to a closed sequence");
    ok("open again", kv.open(A, 32));
    let landing = ok("land", kv.land(A, 0..32));
    drop(landing);
    assert!(kv.export(A, 1, 0..1).is_err(), "exported what a dropped landing was to fill");
    ok("close", kv.close(A));
    let usage = kv.usage();
    assert_eq!(usage.free, usage.total, "{usage:?} when idle");
}

fn fork<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 192);
    let ids = ids(1, 60, 50);
    let shared = layer.rig.kv.block_tokens() * 2;
    let keep = shared as usize;
    layer.rig.open(A, 60);
    feed(&mut layer, A, 0, &ids[..50.max(keep).min(60)]);
    assert!(layer.rig.kv.fork(A, B, shared - 1, Fork::Share).is_err(), "forked within a block");
    let want = layer.expected(&ids);
    for mode in [Fork::Share, Fork::Move] {
        ok("fork", layer.rig.kv.fork(A, B, shared, mode));
        audit(&mut layer.rig.kv);
        ok("grow", layer.rig.kv.grow(B, 60));
        let got = feed(&mut layer, B, keep, &ids[keep..]);
        suite.close(dtype, &format!("{mode:?}"), &got, &want[keep..].concat());
        ok("close", layer.rig.kv.close(B));
    }
    assert_eq!(layer.rig.kv.close(A), Err(KvError::Unknown(A)), "moved away");
    let usage = layer.rig.kv.usage();
    assert_eq!(usage.free, usage.total, "{usage:?} when idle");
}

fn truncate<X: Backend>(suite: &Suite<'_, X>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 64);
    let (wrong, right) = (ids(1, 40, 50), ids(2, 40, 50));
    layer.rig.open(A, 40);
    feed(&mut layer, A, 0, &[&right[..21], &wrong[21..]].concat());
    ok("truncate", layer.rig.kv.truncate(A, 21));
    assert!(layer.rig.kv.export(A, 1, 20..22).is_err(), "exported what was cut off");
    ok("grow", layer.rig.kv.grow(A, 40));
    let want = layer.expected(&right);
    let got = feed(&mut layer, A, 21, &right[21..]);
    suite.close(dtype, "written again", &got, &want[21..].concat());
}
