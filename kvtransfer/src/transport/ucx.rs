//! Payloads by UCX beside a connection: RDMA between machines, shared memory between processes of one. The connection itself stays
//! what it is (TCP, TLS) and carries everything but the payloads of data frames; those lie where the sender has them until
//! the receiver reads them, one-sided, straight into their place.
//!
//! ```text
//! sender                               receiver
//! Offer (ways, host)               ->
//!                                  <-  Choose (way; 0: none)
//! Address (of a UCX worker)        ->
//! Fetch (head of a Data frame, keys) ->  reads the payload, checks it    <- Fetched (how many)
//! ```
//!
//! The receiver reads, the sender never writes: a sender that is late, lost or wrong can touch no byte of a landing, so blocks
//! return as with any other transport. What it may read is registered for reading only: memory that lives longer than the leases in
//! it ([`backend::Region`]) once, of the host or of a device; else for one frame (shared memory) or one connection (a ring that
//! payloads are copied to). Until the receiver has answered, and for whatever does not fit, payloads go
//! over the connection as always; a connection whose payloads cannot be read is lost like any other, and the lane comes back
//! without UCX. Sessions know nothing of it.

mod device;
mod give;
mod offer;
mod take;

use std::fs;
use std::sync::atomic::{AtomicU8, Ordering};

use backend::Place;

pub(crate) use give::give;
pub(crate) use take::take;

/// What carries the payloads of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Way {
    /// The connection itself.
    #[default]
    Stream = 0,
    /// UCX between processes of one machine: one copy, no socket.
    Shm = 1,
    /// UCX over RoCE or InfiniBand.
    Rdma = 2,
    /// UCX over its own TCP: slower than [`Way::Stream`], for tests of the same code where there is no RDMA. Not for anything else: a
    /// receiver that is killed while it reads may take its sender's process along (`ucp_get_req_handler` of 1.22 aborts when the
    /// answer's endpoint has failed; by RDMA and in shared memory nobody answers reads).
    Tcp = 3,
}

impl Way {
    const ALL: [Way; 4] = [Way::Stream, Way::Shm, Way::Rdma, Way::Tcp];

    /// A word for people and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Way::Stream => "tcp",
            Way::Shm => "shm",
            Way::Rdma => "rdma",
            Way::Tcp => "ucx-tcp",
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Way::ALL.into_iter().find(|way| *way as u8 == number)
    }
}

/// The way of a connection, which may change from [`Way::Stream`] to another while it lives.
#[derive(Debug, Default)]
pub struct WayCell {
    way: AtomicU8,
    /// A bit for each place whose memory the receiver reads.
    places: AtomicU8,
}

impl WayCell {
    /// What it is now.
    pub fn get(&self) -> Way {
        Way::from_number(self.way.load(Ordering::Relaxed)).unwrap_or(Way::Stream)
    }

    fn set(&self, way: Way) {
        self.way.store(way as u8, Ordering::Relaxed);
    }

    /// Whether the receiver reads payloads that lie in memory of `place` and that the host does not touch.
    pub fn reads(&self, place: Place) -> bool {
        self.places.load(Ordering::Relaxed) & 1 << place as u8 != 0
    }

    fn set_reads(&self, place: Place, reads: bool) {
        match reads {
            true => self.places.fetch_or(1 << place as u8, Ordering::Relaxed),
            false => self.places.fetch_and(!(1 << place as u8), Ordering::Relaxed),
        };
    }
}

/// Which ways beside the connection itself an end may use. Both ends must agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// See [`Way::Shm`].
    pub shm: bool,
    /// See [`Way::Rdma`].
    pub rdma: bool,
    /// See [`Way::Tcp`].
    pub tcp: bool,
    /// Whether payloads may be read out of a device's memory on such a way, where sender and way can do that (GPUDirect).
    pub device: bool,
}

impl Ways {
    /// Payloads go over the connection.
    pub const NONE: Ways = Ways { shm: false, rdma: false, tcp: false, device: false };

    /// Whether there is one.
    pub fn any(self) -> bool {
        self.shm || self.rdma || self.tcp
    }

    /// Those that this machine has.
    fn here(self) -> Ways {
        if !self.any() || ucx_sys::load().is_err() {
            return Ways::NONE;
        }
        Ways { rdma: self.rdma && rdma_ports() > 0, ..self }
    }
}

/// Makes ready in the background what the first connection would otherwise wait for: the library and its contexts take a tenth
/// of a second.
pub(crate) fn warm(ways: Ways) {
    if !ways.any() {
        return;
    }
    let work = move || {
        let ways = ways.here();
        for (way, wanted) in [(Way::Shm, ways.shm), (Way::Rdma, ways.rdma), (Way::Tcp, ways.tcp)] {
            if wanted && let Err(words) = device::context(way).and_then(device::Worker::new) {
                tracing::debug!(way = way.name(), words, "UCX way not to be had");
            }
        }
    };
    // Without a thread the first connection waits.
    let _ = std::thread::Builder::new().name("kv-ucx-warm".into()).spawn(work);
}

/// The release of UCX on this machine, or why there is none, in words.
pub fn available() -> Result<String, String> {
    let (a, b, c) = ucx_sys::load().map_err(|error| error.to_string())?.version;
    Ok(format!("{a}.{b}.{c}"))
}

/// Whether network cards may read memory of `place` here for peers that `ways` lead to: why not, in words. Whether one can is tried with
/// the first payload.
pub fn reaches(place: Place, ways: Ways) -> Result<(), String> {
    if !ways.any() || !ways.device {
        let why = if ways.any() { "it is turned off" } else { "UCX is not used" };
        return Err(why.into());
    }
    available()?;
    if place == Place::Host {
        return Ok(());
    }
    if !ways.here().rdma {
        let why = if ways.rdma { "no RDMA port is up" } else { "RDMA is not used" };
        return Err(why.into());
    }
    match device::context(Way::Rdma)?.knows(place) {
        true => Ok(()),
        false => Err("UCX has no CUDA transports (libuct_cuda.so)".into()),
    }
}

/// RDMA ports of this machine that are up.
pub fn rdma_ports() -> usize {
    let list = |path: &std::path::Path| fs::read_dir(path).into_iter().flatten().flatten();
    list("/sys/class/infiniband".as_ref())
        .flat_map(|device| list(&device.path().join("ports")).collect::<Vec<_>>())
        .filter(|port| {
            fs::read_to_string(port.path().join("state")).is_ok_and(|state| state.contains("ACTIVE"))
        })
        .count()
}
