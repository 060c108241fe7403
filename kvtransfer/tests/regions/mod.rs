//! Sessions out of memory that outlives its leases: registered once and read where it lies, also where the host itself does not touch
//! it (as a device's). Protects: nothing is copied on the way, nothing wrong is taken, and a lost way costs a copy and no byte.

use std::io::IoSlice;
use std::ops::Range;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backend::{Cut, DType, KvError, KvExport, KvSpec, Piece, Place, Region, Within};
use kvtransfer::{Landed, Push, Pushed, Receiver, Sender, SessionError};

use crate::common::net::{Harm, LOCAL, Proxy, expect_all, open, session};
use crate::common::{CLOSE, Cache, Case, MemLanding};
use crate::processes::{here, limits};

const TOKENS: u32 = 3000;

/// A layer of a cache, `[plane][token][head][dim]`, as a device gathers it. What is in it outlives every lease.
struct Gathered {
    // Before its memory.
    region: Region,
    bytes: Vec<u8>,
    /// CRC32C by plane and token.
    sums: Vec<u32>,
    spec: KvSpec,
    layer: usize,
}

impl Gathered {
    fn new(spec: &KvSpec, layer: usize, tokens: &Range<u32>) -> Self {
        let cache = Cache::full(spec, tokens.clone(), 64);
        let mut bytes = Vec::new();
        let mut sums = Vec::new();
        for (index, plane) in spec.planes.iter().enumerate() {
            let begin = bytes.len();
            let piece = Piece { layer, plane: index, heads: plane.heads(), tokens: tokens.clone() };
            cache.read(&piece, &mut bytes);
            sums.extend(bytes[begin..].chunks(plane.token_bytes()).map(crc32c::crc32c));
        }
        let region = Region::new(bytes.as_ptr() as u64, bytes.len(), Place::Host);
        Gathered { region, bytes, sums, spec: spec.clone(), layer }
    }
}

struct Lease {
    layer: Arc<Gathered>,
    tokens: Range<u32>,
    how: How,
}

/// How a lease tells of its bytes.
#[derive(Clone)]
enum How {
    /// As slices alone.
    Slices,
    /// In memory that outlives it.
    Known,
    /// There, and the host does not read it but by a copy, each of which is counted.
    Unstaged(Arc<AtomicUsize>),
}

impl Lease {
    /// The bytes of whole heads, and which sums are theirs.
    fn place(&self, piece: &Piece) -> (Range<usize>, Range<usize>) {
        let Gathered { spec, sums, .. } = &*self.layer;
        let rows = sums.len() / spec.planes.len();
        let before: usize = spec.planes[..piece.plane].iter().map(|plane| plane.token_bytes() * rows).sum();
        let row = spec.planes[piece.plane].token_bytes();
        let tokens = piece.tokens.start as usize..piece.tokens.end as usize;
        assert_eq!(piece.heads, spec.planes[piece.plane].heads());
        let sums = piece.plane * rows + tokens.start..piece.plane * rows + tokens.end;
        (before + tokens.start * row..before + tokens.end * row, sums)
    }
}

impl KvExport for Lease {
    fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.layer.layer..self.layer.layer + 1
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        out.extend_from_slice(&self.layer.bytes[self.place(piece).0]);
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        if let How::Unstaged(copies) = &self.how {
            copies.fetch_add(1, Ordering::Relaxed);
        }
        Some(vec![IoSlice::new(&self.layer.bytes[self.place(piece).0])])
    }

    fn within(&self, piece: &Piece) -> Option<Within<'_>> {
        if matches!(self.how, How::Slices) {
            return None;
        }
        let (place, sums) = self.place(piece);
        let sums = matches!(self.how, How::Unstaged(_)).then(|| &self.layer.sums[sums]);
        Some(Within { region: &self.layer.region, at: place.start, bytes: place.len(), sums })
    }
}

struct Rig {
    spec: KvSpec,
    receiver: Receiver,
    sender: Sender,
    layers: Vec<Arc<Gathered>>,
    copies: Arc<AtomicUsize>,
}

impl Rig {
    fn new() -> Self {
        let spec = KvSpec::gqa(2, 8, 0..8, 64, DType::BF16);
        let layers = (0..2).map(|layer| Arc::new(Gathered::new(&spec, layer, &(0..TOKENS)))).collect();
        Rig {
            receiver: Receiver::bind(LOCAL, limits()).unwrap(),
            sender: Sender::new(limits()),
            layers,
            copies: Arc::default(),
            spec,
        }
    }

    fn case(&self) -> Case {
        let spec = || vec![self.spec.clone()];
        Case { deadline: Duration::from_secs(10), ..Case::new(spec(), spec(), 0..TOKENS) }
    }

    /// Once over `address`, so that its connection has agreed on the way: chunks of 32 tokens of 2 layers of 2 planes, and a Done.
    fn warm(&self, address: &str) {
        let (pushed, landed) = session(&self.case(), &self.sender, &self.receiver, address);
        assert!(pushed.is_ok() && landed.result.is_ok());
        assert!(self.sender.links().iter().any(|link| link.way == crate::WAY));
    }

    fn unstaged(&self) -> How {
        How::Unstaged(self.copies.clone())
    }

    fn run(&self, addresses: Vec<String>, how: How) -> (Result<Pushed, SessionError>, Landed<MemLanding>) {
        let case = self.case();
        let ends = expect_all(&case, std::slice::from_ref(&self.receiver), 16, true);
        let (push, end) = open(&case, 0, &self.sender, &[addresses]);
        let cuts = await_reads(&push);
        assert_eq!(cuts, [0, 1].map(|plane| Cut { plane, heads: 0..8 }));
        for layer in &self.layers {
            push.layer(Lease { layer: layer.clone(), tokens: case.tokens.clone(), how: how.clone() });
        }
        push.close(CLOSE);
        (end.recv().unwrap(), ends.recv().unwrap().1)
    }
}

/// What the receivers take, once all connections are there.
fn await_reads(push: &Push) -> Vec<Cut> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match push.reads(Place::Host) {
            Some(cuts) => return cuts,
            None => assert!(Instant::now() < until, "no connection reads memory of the host"),
        }
        std::thread::yield_now();
    }
}

#[test]
fn memory_that_outlives_its_leases_is_read_where_it_lies() {
    if !here() {
        return;
    }
    let rig = Rig::new();
    let address = rig.receiver.local_addr().to_string();
    rig.warm(&address);
    let bytes = u64::from(TOKENS) * 4096;
    for (how, so_far) in [(How::Known, 0), (rig.unstaged(), bytes), (rig.unstaged(), 2 * bytes)] {
        let (pushed, landed) = rig.run(vec![address.clone()], how);
        assert_eq!(pushed.unwrap().bytes, bytes);
        assert!(landed.result.is_ok() && landed.landing.cache.is_right());
        assert_eq!(rig.sender.unstaged_bytes(), so_far);
        assert!(
            rig.layers.iter().all(|layer| Arc::strong_count(layer) == 1),
            "leases of a push that has ended"
        );
    }
    assert_eq!((rig.copies.load(Ordering::Relaxed), rig.sender.fallbacks()), (0, 0));
}

/// Protects: where memory of a device cannot be read from outside, as the first payload shows, everything goes by the host.
#[test]
fn what_cannot_be_read_goes_by_the_host() {
    if !here() {
        return;
    }
    // In a process of its own: it is found out once.
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["regions::refused_process", "--exact", "--ignored"])
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}

#[test]
#[ignore = "the other process of the test above"]
fn refused_process() {
    let mut rig = Rig::new();
    let address = rig.receiver.local_addr().to_string();
    rig.warm(&address);
    for layer in &mut rig.layers {
        Arc::get_mut(layer).unwrap().sums.iter_mut().for_each(|sum| *sum ^= 1);
    }
    let (pushed, landed) = rig.run(vec![address], rig.unstaged());
    assert!(pushed.is_ok() && landed.result.is_ok() && landed.landing.cache.is_right());
    assert!(rig.copies.load(Ordering::Relaxed) > 0);
    assert_eq!((rig.sender.unstaged_bytes(), rig.sender.fallbacks()), (0, 0));
}

/// Protects: a GPU's memory is not offered on a way that only reads the host's.
#[test]
fn no_way_without_a_network_card_reads_a_gpu() {
    if !here() {
        return;
    }
    let rig = Rig::new();
    let address = rig.receiver.local_addr().to_string();
    rig.warm(&address);
    let case = rig.case();
    let _ends = expect_all(&case, std::slice::from_ref(&rig.receiver), 16, true);
    let (push, _end) = open(&case, 0, &rig.sender, &[vec![address]]);
    await_reads(&push);
    assert_eq!(push.reads(Place::Cuda), None);
}

#[test]
fn bytes_that_are_not_those_that_were_summed_end_the_session() {
    if !here() {
        return;
    }
    let mut rig = Rig::new();
    let address = rig.receiver.local_addr().to_string();
    rig.warm(&address);
    // The first payload is read by its own process, and this one is right.
    let (pushed, _) = rig.run(vec![address.clone()], rig.unstaged());
    pushed.unwrap();
    let layer = Arc::get_mut(&mut rig.layers[1]).unwrap();
    let middle = layer.sums.len() / 2;
    layer.sums[middle] ^= 1;
    let (pushed, landed) = rig.run(vec![address], rig.unstaged());
    let error = landed.result.unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
    assert!(pushed.is_err());
    assert_eq!(Arc::strong_count(&rig.layers[1]), 1, "leases of a push that has failed");
}

#[test]
fn a_lost_way_costs_a_copy_and_no_byte() {
    if !here() {
        return;
    }
    let rig = Rig::new();
    let address = rig.receiver.local_addr().to_string();
    // Of a session of Rig::warm.
    let frames = TOKENS.div_ceil(32) as usize * 4 + 1;
    // 12 frames of up to 1 MiB: lost in the middle.
    let proxy = Proxy::new(rig.receiver.local_addr(), Harm::CutInFrame(frames + 6), Harm::None);
    rig.warm(&proxy.address);
    let (pushed, landed) = rig.run(vec![proxy.address.clone(), address.clone()], rig.unstaged());
    assert_eq!((pushed.unwrap().resumed, landed.result.unwrap().resumed, rig.sender.fallbacks()), (1, 1, 1));
    assert!(landed.landing.cache.is_right());
    assert!(rig.copies.load(Ordering::Relaxed) > 0 && rig.sender.unstaged_bytes() > 0);
    let way = |peer: &String| rig.sender.links().iter().find(|link| link.peer == *peer).map(|link| link.way);
    assert_eq!(way(&proxy.address), Some(crate::WAY));
    assert!(rig.layers.iter().all(|layer| Arc::strong_count(layer) == 1), "leases of a push that has ended");
}

/// Prints what sessions take, by turns, whose payloads are copied to a ring or registered one by one, and whose memory is known.
#[test]
#[ignore = "measures"]
fn how_fast() {
    let rig = Rig::new();
    let address = rig.receiver.local_addr().to_string();
    rig.warm(&address);
    let mut took = [(); 3].map(|()| Vec::new());
    for turn in 0..31 {
        for (how, took) in [How::Slices, How::Known, rig.unstaged()].into_iter().zip(&mut took) {
            let begun = (Instant::now(), cpu_s());
            let (pushed, landed) = rig.run(vec![address.clone()], how);
            assert!(pushed.is_ok() && landed.result.is_ok());
            if turn > 0 {
                took.push((begun.0.elapsed().as_secs_f64() * 1e3, (cpu_s() - begun.1) * 1e3));
            }
        }
    }
    for (name, took) in ["slices", "known", "unstaged"].iter().zip(&mut took) {
        took.sort_by(|a, b| a.0.total_cmp(&b.0));
        let wall = took[took.len() / 2].0;
        took.sort_by(|a, b| a.1.total_cmp(&b.1));
        println!(
            "{name}: {wall:.1} ms, {:.1} ms of CPU for 12 MB at both ends (medians)",
            took[took.len() / 2].1
        );
    }
}

/// Processor seconds of this process.
fn cpu_s() -> f64 {
    // SAFETY: plain numbers, of which zeros are valid.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: a place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
