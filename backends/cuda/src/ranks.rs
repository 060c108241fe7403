//! The other ranks of a tensor-parallel group: sums over all of them, as operations of the step. One process a GPU. Ranks
//! meet over the links they are given; where all have NCCL and a GPU of their own and links are in clear, sums go through it and
//! the links only tell who is gone, else sums pass through the host.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use backend::{BackendError, Group, Peers};

use crate::args::SideBySideArgs;
use crate::ballot::Ballot;
use crate::device::Device;
use crate::driver::{Driver, Lane};
use crate::memory::Buffer;
use crate::nccl::{Element, ID_BYTES, Nccl, Shared, Sum};
use crate::step::Fetched;

/// How often links are looked at while NCCL computes: a lost rank is noticed within this time.
const WATCH: Duration = Duration::from_millis(100);
/// Longest time for all ranks to join NCCL's group: it looks for the ways between them first.
const JOIN_MAX: Duration = Duration::from_secs(60);
/// A rank that closes its links may have ended in order, its last sums complete: the device has so long to come past them.
const GRACE: Duration = Duration::from_millis(500);
/// Logits per row that one rank may announce.
const VOCABULARY_MAX: usize = 1 << 24;
/// What a rank tells first: whether it has NCCL and may use it, for steps that are replayed too, and its device.
const HELLO_BYTES: usize = 17;
/// Of its first byte.
const HAS_NCCL: u8 = 1;
const REPLAYS: u8 = 2;

/// Logits of the whole vocabulary in f32, with its size.
pub(crate) type Logits<D> = (Rc<Buffer<D>>, usize);

/// The group of one rank, as long as its links last.
pub(crate) struct Ranks {
    peers: Rc<RefCell<Peers>>,
    fabric: RefCell<Fabric>,
    /// Widths of all ranks' logits where this one has so many.
    widths: RefCell<HashMap<usize, Vec<usize>>>,
}

enum Fabric {
    /// Ranks meet at the first operation: a device is opened before its links are there.
    Unmet,
    Host,
    /// With the votes on steps that generate, where all ranks may replay them.
    Nccl(Shared, Watch, Option<Rc<Ballot>>),
}

/// A rank that is gone, and why.
type Gone = Option<(usize, String)>;

/// The thread that gives the group up when a rank is gone, so that nobody waits for it on the device for ever.
struct Watch {
    lost: Arc<Mutex<Gone>>,
    links: Vec<TcpStream>,
    thread: Option<thread::JoinHandle<()>>,
    end: Arc<std::sync::atomic::AtomicBool>,
}

impl Ranks {
    pub(crate) fn new(group: Group) -> Result<Self, BackendError> {
        Ok(Ranks {
            peers: Rc::new(RefCell::new(Peers::new(group, "cuda")?)),
            fabric: RefCell::new(Fabric::Unmet),
            widths: RefCell::default(),
        })
    }

    pub(crate) fn rank(&self) -> usize {
        self.peers.borrow().rank()
    }

    pub(crate) fn world(&self) -> usize {
        self.peers.borrow().world()
    }

    /// The votes on steps that generate; `None`: they are queued call by call. The same on every rank, from its first logits on.
    pub(crate) fn ballot(&self) -> Option<Rc<Ballot>> {
        match &*self.fabric.borrow() {
            // With widths known a step that generates exchanges nothing else.
            Fabric::Nccl(_, _, ballot) if !self.widths.borrow().is_empty() => ballot.clone(),
            _ => None,
        }
    }

    /// How sums travel, in words.
    pub(crate) fn describe(&self) -> &'static str {
        match &*self.fabric.borrow() {
            Fabric::Unmet => "ranks have not met",
            Fabric::Host => "sums through the host",
            Fabric::Nccl(_, _, None) => "sums by NCCL",
            Fabric::Nccl(_, _, Some(_)) => "sums by NCCL, in graphs too",
        }
    }

    /// Sends `mine` to all ranks and receives theirs.
    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, BackendError> {
        let mut peers = self.peers.borrow_mut();
        let mut theirs = vec![vec![0; mine.len()]; peers.world()];
        let mut places: Vec<&mut [u8]> = theirs.iter_mut().map(Vec::as_mut_slice).collect();
        peers.exchange(mine, &mut places)?;
        let rank = peers.rank();
        theirs[rank] = mine.to_vec();
        Ok(theirs)
    }

    /// Chooses how sums travel, once: the same on every rank.
    fn meet<D: Driver>(&self, device: &Device<D>) -> Result<(), BackendError> {
        if !matches!(*self.fabric.borrow(), Fabric::Unmet) {
            return Ok(());
        }
        let driver = device.driver();
        // NCCL encrypts nothing: it is not for groups whose links are.
        let sealed = self.peers.borrow().is_sealed();
        let nccl = Nccl::open(&driver.nccl_library()).filter(|_| !sealed);
        let mut hello = [0; HELLO_BYTES];
        hello[0] = match &nccl {
            None => 0,
            Some(nccl) if nccl.captures() && device.queue().writes_down() => REPLAYS,
            Some(_) => HAS_NCCL,
        };
        hello[1..].copy_from_slice(&driver.identity());
        let mut all = self.exchange(&hello)?;
        let everybody = all.iter().all(|hello| hello[0] >= HAS_NCCL);
        let replays = all.iter().all(|hello| hello[0] >= REPLAYS);
        all.sort_unstable();
        let apart = all.windows(2).all(|pair| pair[0] != pair[1]);
        let Some(nccl) = nccl.filter(|_| everybody && apart) else {
            *self.fabric.borrow_mut() = Fabric::Host;
            return Ok(());
        };
        let mut id = [0; ID_BYTES];
        if self.rank() == 0 {
            id = nccl.unique_id()?;
            self.peers.borrow_mut().tell(&id)?;
        } else {
            self.peers.borrow_mut().hear(&mut id)?;
        }
        let links = self.peers.borrow().watched();
        let links = links.map_err(|error| BackendError::Device(format!("links between ranks: {error}")))?;
        let gone = || {
            let lost = |(rank, link): &(usize, TcpStream)| {
                Some(BackendError::Group { rank: *rank, reason: closed(link)? })
            };
            links.iter().find_map(lost)
        };
        let seat = (self.rank(), self.world());
        let shared = Arc::new(nccl.join(id, seat, driver.attach(), JOIN_MAX, gone)?);
        let watch = Watch::over(links, shared.clone())?;
        let ballot = replays.then(|| Rc::new(Ballot::new(self.peers.clone())));
        *self.fabric.borrow_mut() = Fabric::Nccl(shared, watch, ballot);
        Ok(())
    }

    /// Queues the sum over all ranks of `count` elements at `at`, in place.
    pub(crate) fn sum<D: Driver>(
        &self,
        device: &Device<D>,
        at: u64,
        count: usize,
        element: Element,
    ) -> Result<(), BackendError> {
        self.meet(device)?;
        if let Fabric::Nccl(shared, watch, _) = &*self.fabric.borrow() {
            watch.check()?;
            return device.queue().sum(Sum { group: shared.clone(), at, count, element });
        }
        let fetched = Fetched::of(device, at, count * 4)?;
        let mine = fetched.bytes()?;
        let theirs = self.exchange(mine)?;
        let mut sent = device.pool.pinned(count * 4)?;
        let joined = &mut sent.as_mut()[..count * 4];
        match element {
            Element::F32 => {
                let mut parts: Vec<Vec<f32>> = theirs.iter().map(|bytes| floats(bytes)).collect();
                joined_as_tree(&mut parts);
                let out = joined.chunks_exact_mut(4).zip(&parts[0]);
                out.for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
            }
            Element::U32 => {
                for (at, to) in joined.chunks_exact_mut(4).enumerate() {
                    let word = |bytes: &Vec<u8>| {
                        bytes[at * 4..at * 4 + 4]
                            .iter()
                            .rev()
                            .fold(0, |word: u32, byte| word << 8 | u32::from(*byte))
                    };
                    let sum = theirs.iter().map(word).fold(0, u32::wrapping_add);
                    to.copy_from_slice(&sum.to_le_bytes());
                }
            }
        }
        device.queue().to_device(Lane::Compute, at, &sent, 0, count * 4)?;
        device.pool.keep(sent)
    }

    /// All ranks' columns of logits side by side, f32, with their number; on rank 0, and on others where it costs nothing.
    pub(crate) fn side_by_side<D: Driver>(
        &self,
        device: &Device<D>,
        mine: &Rc<Buffer<D>>,
        rows: usize,
        width: usize,
    ) -> Result<Option<Logits<D>>, BackendError> {
        self.meet(device)?;
        let known = self.widths.borrow().get(&width).cloned();
        let widths = match known {
            Some(widths) => widths,
            None => {
                // Not between a vote and what comes out of it.
                device.queue().close()?;
                device.queue().finish()?;
                device.driver().go_on();
                let all = self.exchange(&(width as u32).to_le_bytes())?;
                let widths: Vec<usize> = all
                    .iter()
                    .map(|bytes| bytes.iter().rev().fold(0, |word, byte| word << 8 | usize::from(*byte)))
                    .collect();
                if let Some(rank) = widths.iter().position(|width| *width > VOCABULARY_MAX) {
                    let reason = format!("logits of {} tokens", widths[rank]);
                    return Err(BackendError::Group { rank, reason });
                }
                self.widths.borrow_mut().insert(width, widths.clone());
                widths
            }
        };
        let out_width: usize = widths.iter().sum();
        let firsts: Vec<usize> = (0..widths.len()).map(|rank| widths[..rank].iter().sum()).collect();
        let rank = self.rank();
        let place = |out: u64, parts: u64, rank: usize| {
            let args = SideBySideArgs {
                parts,
                out,
                width: widths[rank] as u32,
                out_width: out_width as u32,
                first: firsts[rank] as u32,
            };
            device.each("side_by_side", rows, &args)
        };
        let host = matches!(*self.fabric.borrow(), Fabric::Host);
        if host && rank != 0 {
            let fetched = Fetched::of(device, mine.address, rows * width * 4)?;
            self.peers.borrow_mut().give(fetched.bytes()?)?;
            return Ok(None);
        }
        let out = Rc::new(device.pool.take(rows * out_width * 4)?);
        if !host {
            // Zeros in the others' places: the sum is exact.
            device.queue().clear(out.address, rows * out_width * 4)?;
            place(out.address, mine.address, rank)?;
            self.sum(device, out.address, rows * out_width, Element::F32)?;
            return Ok(Some((out, out_width)));
        }
        place(out.address, mine.address, 0)?;
        let mut theirs: Vec<Vec<u8>> = widths.iter().map(|width| vec![0; rows * width * 4]).collect();
        let places = theirs.iter_mut().enumerate().skip(1).map(|(rank, bytes)| (rank, bytes.as_mut_slice()));
        self.peers.borrow_mut().take(places.collect())?;
        for (rank, bytes) in theirs.iter().enumerate().skip(1) {
            let part = device.pool.take(bytes.len())?;
            device.queue().upload(part.address, bytes)?;
            place(out.address, part.address, rank)?;
        }
        Ok(Some((out, out_width)))
    }

    /// Tells the other ranks, by closed links, that this one cannot go on. Its graphs are gone: NCCL would wait for them.
    pub(crate) fn leave(&self, reason: &str) {
        self.peers.borrow_mut().leave(reason);
        if let Fabric::Nccl(shared, ..) = &*self.fabric.borrow() {
            shared.abort();
        }
    }

    /// What a step that waits for the device asks about its failure, or about its success, which a group that was given up
    /// may have feigned.
    pub(crate) fn lost(&self) -> Lost {
        match &*self.fabric.borrow() {
            Fabric::Nccl(_, watch, _) => Lost(Some(watch.lost.clone())),
            _ => Lost(None),
        }
    }
}

/// Who was lost, if anybody.
pub(crate) struct Lost(Option<Arc<Mutex<Gone>>>);

impl Lost {
    /// In a group of one.
    pub(crate) fn never() -> Self {
        Lost(None)
    }

    pub(crate) fn check(&self) -> Result<(), BackendError> {
        let Some(lost) = &self.0 else { return Ok(()) };
        match &*lost.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some((rank, reason)) => Err(BackendError::Group { rank: *rank, reason: reason.clone() }),
        }
    }
}

impl Watch {
    fn over(links: Vec<(usize, TcpStream)>, shared: Shared) -> Result<Self, BackendError> {
        let failed =
            |error: std::io::Error| BackendError::Device(format!("watching over the group: {error}"));
        let lost = Arc::new(Mutex::new(None));
        let end = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let kept: Vec<TcpStream> =
            links.iter().map(|(_, link)| link.try_clone()).collect::<Result<_, _>>().map_err(failed)?;
        let (told, ended) = (lost.clone(), end.clone());
        let thread = thread::Builder::new().name("nccl watch".into()).spawn(move || {
            while !ended.load(std::sync::atomic::Ordering::Acquire) {
                let reason = links.iter().find_map(|(rank, link)| Some((*rank, closed(link)?)));
                let reason = reason.or_else(|| Some((links.first()?.0, shared.failure()?)));
                if let Some(reason) = reason {
                    let since = std::time::Instant::now();
                    while since.elapsed() < GRACE && !ended.load(std::sync::atomic::Ordering::Acquire) {
                        thread::sleep(GRACE / 50);
                    }
                    if ended.load(std::sync::atomic::Ordering::Acquire) {
                        return;
                    }
                    // Said before the group is given up: whoever waits finds it.
                    told.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
                    // Whoever votes hears of it at once; the owner gives graphs back once it does.
                    links.iter().for_each(|(_, link)| drop(link.shutdown(Shutdown::Both)));
                    shared.abort();
                    return;
                }
                sleep(&links);
            }
        });
        Ok(Watch { lost, links: kept, thread: Some(thread.map_err(failed)?), end })
    }

    fn check(&self) -> Result<(), BackendError> {
        Lost(Some(self.lost.clone())).check()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end.store(true, std::sync::atomic::Ordering::Release);
        // Wakes the thread; the links have no other use once the group is gone.
        self.links.iter().for_each(|link| drop(link.shutdown(Shutdown::Both)));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Why a link cannot be used any more.
fn closed(link: &TcpStream) -> Option<String> {
    match link.peek(&mut [0]) {
        Ok(0) => Some("closed its link".to_owned()),
        Ok(_) => None,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Until a link closes, for [`WATCH`] at most.
fn sleep(links: &[(usize, TcpStream)]) {
    let events = libc::POLLRDHUP;
    let mut waits: Vec<libc::pollfd> =
        links.iter().map(|(_, link)| libc::pollfd { fd: link.as_raw_fd(), events, revents: 0 }).collect();
    // SAFETY: a valid array of that many entries. Errors and interruptions are met by looking again.
    unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, WATCH.as_millis() as libc::c_int) };
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// The ranks' sums as a binary tree by rank, into the first.
fn joined_as_tree(parts: &mut [Vec<f32>]) {
    let mut apart = 1;
    while apart < parts.len() {
        for low in (0..parts.len() - apart).step_by(apart * 2) {
            let (left, right) = parts.split_at_mut(low + apart);
            left[low].iter_mut().zip(&right[0]).for_each(|(x, y)| *x += y);
        }
        apart *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_join_as_a_tree() {
        // 1 + (2^-24 + 2^-24) is seen, (1 + 2^-24) + 2^-24 is not.
        let small = 2f32.powi(-24);
        let mut parts = vec![vec![1.0], vec![0.0], vec![small], vec![small]];
        joined_as_tree(&mut parts);
        assert_eq!(parts[0], [1.0 + 2.0 * small]);
    }
}
