//! Cache that leaves the (emulated) device's memory without passing the host: what lies there is what was computed, its sums are the
//! wire's, and sessions out of it land every byte or nothing. The emulated device's memory is this process's, so that UCX's shared
//! memory reads it; without libucp.so.0 the same leases go by the host.

use std::sync::mpsc::{Receiver as Results, channel};
use std::time::{Duration, Instant};

use backend::{
    Backend, Batch, Cut, DType, DeviceOptions, Group, KvExport, KvLanding, KvSpec, KvStore, Piece, Place,
    Plane, SeqId, Sharding, Step,
};
use backend_cpu::CpuBackend;
use backend_cuda::EmulatedBackend;
use kvtransfer::transport::ucx::{Ways, available};
use kvtransfer::{
    Close, Expect, Landed, Limits, Push, PushSpec, Pushed, Receiver, Sender, SessionError, SessionId,
    TargetSpec, Ticket,
};

const SEQ: SeqId = SeqId(1);
const CLOSE: Close = Close { token: 7, finish: 0 };
const DEADLINE: Duration = Duration::from_secs(20);

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }

    /// A range within `0..end`, not empty.
    fn range(&mut self, end: usize) -> std::ops::Range<usize> {
        let start = self.below(end);
        start..start + 1 + self.below(end - start)
    }
}

/// The byte of a place.
fn byte(layer: usize, plane: usize, head: usize, token: u32, at: usize) -> u8 {
    let x = (layer as u64) << 48 ^ (plane as u64) << 40 ^ (head as u64) << 32 ^ u64::from(token) << 12;
    ((x ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// What a piece has to be.
fn truth(spec: &KvSpec, piece: &Piece) -> Vec<u8> {
    let head_bytes = spec.planes[piece.plane].head_bytes();
    let mut bytes = Vec::new();
    for token in piece.tokens.clone() {
        for head in piece.heads.clone() {
            bytes.extend((0..head_bytes).map(|at| byte(piece.layer, piece.plane, head, token, at)));
        }
    }
    bytes
}

fn pieces(spec: &KvSpec, tokens: u32) -> impl Iterator<Item = Piece> {
    let planes = spec.planes.iter().map(Plane::heads).enumerate().collect::<Vec<_>>();
    let of = move |layer| {
        let piece = move |(plane, heads)| Piece { layer, plane, heads, tokens: 0..tokens };
        planes.clone().into_iter().map(piece)
    };
    (0..spec.layers).flat_map(of)
}

/// A device with the truth in its cache.
struct Device {
    backend: EmulatedBackend,
    kv: <EmulatedBackend as Backend>::Kv,
    spec: KvSpec,
    tokens: u32,
}

impl Device {
    fn filled(spec: KvSpec, tokens: u32) -> Self {
        let options = DeviceOptions { dtype: DType::BF16, block_tokens: 16, ..DeviceOptions::default() };
        let mut backend = EmulatedBackend::open(&options, Group::alone()).unwrap();
        let blocks = u64::from(tokens.div_ceil(16));
        let mut kv = backend.kv(&spec, blocks * 16 * spec.token_bytes() as u64).unwrap();
        kv.open(SEQ, tokens).unwrap();
        let mut landing = kv.land(SEQ, 0..tokens).unwrap();
        for piece in pieces(&spec, tokens) {
            landing.write(&piece, &truth(&spec, &piece)).unwrap();
        }
        kv.commit(landing).unwrap();
        Device { backend, kv, spec, tokens }
    }

    fn export(&mut self, layer: usize, cuts: &[Cut]) -> impl KvExport + use<> {
        let batch = Batch::default();
        let mut step = self.backend.step(&mut self.kv, &batch);
        step.export_there(SEQ, layer, 0..self.tokens, cuts).unwrap()
    }
}

fn mla(latent: usize, rope: usize) -> KvSpec {
    let plane =
        |name, dim| Plane { name, heads_total: 1, dim, dtype: DType::BF16, sharding: Sharding::Replicated };
    KvSpec { layers: 2, planes: vec![plane("latent", latent), plane("rope", rope)] }
}

/// Protects: bytes and sums of every receiver's heads, whatever the shape. Rows below, at and above a whole number of a warp's words.
#[test]
fn the_device_sums_as_the_wire_does() {
    for seed in 1..=24u64 {
        let mut rng = Rng(seed * 0x9e37_79b9);
        let heads = 1 + rng.below(5);
        let dim = 2 * (1 + rng.below(100));
        let spec = match seed % 4 {
            0 => mla(dim * 3, 2 * (1 + rng.below(16))),
            _ => KvSpec::gqa(2, heads + 2, 1..1 + heads, dim, DType::BF16),
        };
        let tokens = 1 + rng.below(70) as u32;
        let mut device = Device::filled(spec.clone(), tokens);
        let cuts: Vec<Cut> = (0..spec.planes.len())
            .map(|plane| {
                let own = spec.planes[plane].heads();
                let range = rng.range(own.len());
                Cut { plane, heads: own.start + range.start..own.start + range.end }
            })
            .collect();
        let layer = rng.below(2);
        let export = device.export(layer, &cuts);
        export.wait().unwrap();
        for cut in &cuts {
            let range = rng.range(tokens as usize);
            let tokens = range.start as u32..range.end as u32;
            let piece = Piece { layer, plane: cut.plane, heads: cut.heads.clone(), tokens };
            let want = truth(&spec, &piece);
            let within = export.within(&piece).unwrap();
            assert_eq!((within.bytes, within.region.place()), (want.len(), Place::Host), "seed {seed}");
            let at = (within.region.address() + within.at as u64) as *const u8;
            // SAFETY: the emulated device's memory, which is this process's, while the lease lives.
            let there = unsafe { std::slice::from_raw_parts(at, within.bytes) };
            assert!(there == want, "seed {seed}: {piece:?} of {spec:?}");
            let row = want.len() / piece.tokens.len();
            let sums: Vec<u32> = want.chunks(row).map(crc32c::crc32c).collect();
            assert_eq!(within.sums, Some(&sums[..]), "seed {seed}: rows of {row} bytes");
            let mut copied = Vec::new();
            export.read(&piece, &mut copied).unwrap();
            assert!(copied == want && *export.slices(&piece).unwrap()[0] == want[..], "seed {seed}");
        }
        // Heads that nobody asked for are not there.
        let other = Piece { layer, plane: 0, heads: 90..91, tokens: 0..1 };
        assert!(export.within(&other).is_none() && export.read(&other, &mut Vec::new()).is_err());
    }
}

/// A CPU store with a receiver.
struct Rank {
    kv: <CpuBackend as Backend>::Kv,
    spec: KvSpec,
    receiver: Receiver,
}

type Land = <<CpuBackend as Backend>::Kv as KvStore>::Landing;

struct Rig {
    device: Device,
    ranks: Vec<Rank>,
    sender: Sender,
    ucx: bool,
}

impl Rig {
    /// So many receivers of 4 heads together.
    fn new(ranks: usize) -> Self {
        let ucx = available().is_ok();
        assert!(ucx || std::env::var_os("BATON_NEEDS_UCX").is_none(), "{:?}", available());
        let limits = Limits { ways: Ways { shm: true, device: true, ..Ways::NONE }, ..Limits::default() };
        let tokens = 500;
        let rank = |rank: usize| {
            let heads = rank * 4 / ranks..(rank + 1) * 4 / ranks;
            let spec = KvSpec::gqa(2, 4, heads, 64, DType::BF16);
            let options = DeviceOptions { dtype: DType::BF16, threads: 1, ..DeviceOptions::default() };
            let mut backend = CpuBackend::open(&options, Group::alone()).unwrap();
            let kv = backend.kv(&spec, 1024 * spec.token_bytes() as u64).unwrap();
            Rank { kv, spec, receiver: Receiver::bind(([127, 0, 0, 1], 0).into(), limits.clone()).unwrap() }
        };
        Rig {
            device: Device::filled(KvSpec::gqa(2, 4, 0..4, 64, DType::BF16), tokens),
            ranks: (0..ranks).map(rank).collect(),
            sender: Sender::new(limits),
            ucx,
        }
    }

    /// Opens a session by `sender`: its push, its end, and what the ranks land.
    #[allow(clippy::type_complexity)]
    fn open(
        &mut self,
        sender: &Sender,
    ) -> (Push, Results<Result<Pushed, SessionError>>, Results<(usize, Landed<Land>)>) {
        let (session, ticket) = (SessionId::random(), Ticket::random());
        let (landed, ends) = channel();
        let tokens = 0..self.device.tokens;
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            rank.kv.open(SEQ, tokens.end).unwrap();
            let landing = rank.kv.land(SEQ, tokens.clone()).unwrap();
            let expect = Expect {
                session,
                ticket: ticket.clone(),
                request: "r".into(),
                attempt: 1,
                epoch: 1,
                spec: rank.spec.clone(),
                tokens: tokens.clone(),
                deadline: DEADLINE,
                peers: None,
            };
            let landed = landed.clone();
            rank.receiver.expect(expect, landing, move |end| drop(landed.send((index, end)))).unwrap();
        }
        let target = |(rank, of): (usize, &Rank)| TargetSpec {
            rank,
            addresses: vec![of.receiver.local_addr().to_string()],
            spec: of.spec.clone(),
        };
        let spec = PushSpec {
            session,
            ticket,
            request: "r".into(),
            attempt: 1,
            epoch: 1,
            from: vec![self.device.spec.clone()],
            from_rank: 0,
            to: self.ranks.iter().enumerate().map(target).collect(),
            tokens,
            deadline: DEADLINE,
            compute_bytes_per_s: None,
            chunk_tokens: 512,
        };
        let (pushed, end) = channel();
        let push = sender.open(spec, move |result| drop(pushed.send(result)));
        (push, end, ends)
    }

    /// What the receivers take: once they read the device's memory, where that can be.
    fn cuts(&self, push: &Push) -> Vec<Cut> {
        let of = |rank: &Rank| {
            let heads = rank.spec.planes[0].heads();
            [0, 1].map(|plane| Cut { plane, heads: heads.clone() })
        };
        let all: Vec<Cut> = self.ranks.iter().flat_map(of).collect();
        let until = Instant::now() + DEADLINE;
        while let (true, None) = (self.ucx, push.reads(Place::Host)) {
            assert!(Instant::now() < until, "nobody reads the device's memory");
            std::thread::yield_now();
        }
        assert!(!self.ucx || push.reads(Place::Host).as_ref() == Some(&all));
        all
    }

    /// A whole session by `sender`, of leases that `spoil` has seen; what came of it at both ends. Everything is given back.
    fn run(
        &mut self,
        sender: &Sender,
        waits: bool,
        spoil: impl Fn(&dyn KvExport),
    ) -> (Result<Pushed, SessionError>, Vec<Result<bool, SessionError>>) {
        let (push, end, ends) = self.open(sender);
        let cuts = if waits {
            self.cuts(&push)
        } else {
            vec![Cut { plane: 0, heads: 0..4 }, Cut { plane: 1, heads: 0..4 }]
        };
        for layer in 0..2 {
            let export = self.device.export(layer, &cuts);
            spoil(&export);
            push.layer(export);
        }
        push.close(CLOSE);
        let pushed = end.recv_timeout(2 * DEADLINE).unwrap();
        let mut results = Vec::new();
        for _ in 0..self.ranks.len() {
            let (index, landed) = ends.recv_timeout(2 * DEADLINE).unwrap();
            let rank = &mut self.ranks[index];
            results.push(landed.result.map(|_| {
                rank.kv.commit(landed.landing).unwrap();
                let right = |piece: Piece| {
                    let export = rank.kv.export(SEQ, piece.layer, piece.tokens.clone()).unwrap();
                    let mut bytes = Vec::new();
                    export.read(&piece, &mut bytes).unwrap();
                    bytes == truth(&rank.spec, &piece)
                };
                pieces(&rank.spec.clone(), self.device.tokens).all(right)
            }));
            rank.kv.close(SEQ).unwrap();
        }
        (pushed, results)
    }

    /// All blocks of the device are free once its sequence is closed.
    fn assert_given_back(mut self) {
        self.device.kv.close(SEQ).unwrap();
        let until = Instant::now() + DEADLINE;
        loop {
            let usage = self.device.kv.usage();
            if usage.free == usage.total {
                return;
            }
            assert!(Instant::now() < until, "{usage:?}");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_cache_leaves_the_device_without_the_host() {
    // One receiver of everything; two of which each reads its own heads.
    for ranks in [1, 2] {
        let mut rig = Rig::new(ranks);
        let sender = rig.sender.clone();
        for _ in 0..2 {
            let (pushed, landed) = rig.run(&sender, true, |_| ());
            assert_eq!(pushed.unwrap().bytes, 2 * 2 * 4 * 128 * 500);
            assert_eq!(landed.into_iter().collect::<Result<Vec<_>, _>>().unwrap(), vec![true; ranks]);
        }
        let want = if rig.ucx { 2 * 2 * 2 * 4 * 128 * 500 } else { 0 };
        assert_eq!((sender.unstaged_bytes(), sender.fallbacks()), (want, 0));
        rig.assert_given_back();
    }
}

/// Protects: a lease that stays, for a receiver that cannot read it there.
#[test]
fn a_receiver_without_the_way_gets_a_copy() {
    let mut rig = Rig::new(1);
    let sender = Sender::new(Limits::default());
    let (pushed, landed) = rig.run(&sender, false, |_| ());
    assert!(pushed.is_ok() && matches!(landed[..], [Ok(true)]), "{landed:?}");
    assert_eq!(sender.unstaged_bytes(), 0);
    rig.assert_given_back();
}

/// Protects: what changes in the device's memory after it was summed is not taken.
#[test]
fn what_is_not_what_was_summed_is_refused() {
    let mut rig = Rig::new(1);
    let sender = rig.sender.clone();
    // The first payload is read by this process itself, and is right.
    assert!(rig.run(&sender, true, |_| ()).0.is_ok());
    let spoil = |export: &dyn KvExport| {
        export.wait().unwrap();
        let piece = Piece { layer: export.layers().start, plane: 1, heads: 0..4, tokens: 250..251 };
        let within = export.within(&piece).unwrap();
        let at = (within.region.address() + within.at as u64) as *mut u8;
        // SAFETY: memory of the emulated device, which nothing else writes to any more.
        unsafe { *at ^= 1 };
    };
    let (pushed, landed) = rig.run(&sender, true, spoil);
    if rig.ucx {
        let error = landed[0].as_ref().unwrap_err().to_string();
        assert!(error.contains("checksum") && pushed.is_err(), "{error}");
    }
    rig.assert_given_back();
}

/// Protects: a push that is given up while its receiver may still read lets go of everything.
#[test]
fn a_push_that_is_given_up_returns_its_leases() {
    let mut rig = Rig::new(1);
    let sender = rig.sender.clone();
    let (push, end, ends) = rig.open(&sender);
    let cuts = rig.cuts(&push);
    push.layer(rig.device.export(0, &cuts));
    push.cancel();
    assert!(end.recv_timeout(2 * DEADLINE).unwrap().is_err());
    assert!(ends.recv_timeout(2 * DEADLINE).unwrap().1.result.is_err());
    rig.assert_given_back();
}
