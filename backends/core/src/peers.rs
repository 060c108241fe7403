//! Collectives of a tensor-parallel group over one connection per pair of ranks, for backends whose sums pass through the
//! host: the CPU, and GPUs without a fabric of their own. Sending and receiving go on at the same
//! time, so payloads of any size cannot block each other; waits sleep in `poll`.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::{BackendError, Group, Links, RankLink};

/// A rank from which nothing comes for so long, in the middle of a collective, is lost. Ranks run in lock-step, so
/// they are at most a few steps apart; a killed process is seen at once by its closed socket.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// `operation number, payload bytes`, little endian u64 each, before every payload.
const HEADER_BYTES: usize = 16;

/// The other ranks of a group.
#[derive(Debug)]
pub struct Peers {
    rank: usize,
    world: usize,
    links: Vec<Option<Box<dyn RankLink>>>,
    /// Collectives so far: both ends of a link count alike.
    operation: u64,
    /// The first failure; every later collective repeats it.
    lost: Option<(usize, String)>,
    silence_max: Duration,
}

/// One direction of one link: header and payload, as far as they have come.
struct Transfer<P> {
    peer: usize,
    header: [u8; HEADER_BYTES],
    payload: P,
    done: usize,
    /// All of it has left, or come.
    over: bool,
}

impl<P> Transfer<P> {
    fn new(peer: usize, header: [u8; HEADER_BYTES], payload: P) -> Self {
        Transfer { peer, header, payload, done: 0, over: false }
    }
}

impl Peers {
    /// The ranks that `group`'s sockets lead to. Errors, in the words of `backend`, when one is missing.
    pub fn new(group: Group, backend: &'static str) -> Result<Self, BackendError> {
        let refused = |reason| Err(BackendError::Unavailable { backend, reason });
        let Group { rank, world, links } = group;
        if world == 0 || rank >= world {
            return refused(format!("rank {rank} of {world}"));
        }
        let links = match links {
            Links::Alone if world == 1 => vec![None],
            Links::Sockets(links) if links.len() == world => links,
            Links::Sockets(links) => return refused(format!("{} links for {world} ranks", links.len())),
            Links::Alone | Links::Native(_) => return refused(format!("{world} ranks need sockets")),
        };
        for (peer, link) in links.iter().enumerate() {
            match link {
                Some(link) => {
                    let socket = link.socket();
                    let ready = socket.set_nonblocking(true).and_then(|()| socket.set_nodelay(true));
                    ready.map_err(|error| BackendError::Group { rank: peer, reason: error.to_string() })?;
                }
                None if peer != rank => return refused(format!("rank {rank} has no link to rank {peer}")),
                None => {}
            }
        }
        Ok(Peers { rank, world, links, operation: 0, lost: None, silence_max: SILENCE_MAX })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Whether a link is encrypted: then what the ranks exchange must not leave the machine another way.
    pub fn is_sealed(&self) -> bool {
        self.links.iter().flatten().any(|link| link.is_sealed())
    }

    /// Sends `mine` to all ranks and receives theirs, of equal length, into `theirs[rank]` (own place unused).
    pub fn exchange(&mut self, mine: &[u8], theirs: &mut [&mut [u8]]) -> Result<(), BackendError> {
        let others: Vec<usize> = (0..self.world).filter(|peer| *peer != self.rank).collect();
        let outgoing = others.iter().map(|peer| (*peer, mine)).collect();
        let rank = self.rank;
        let incoming = theirs
            .iter_mut()
            .enumerate()
            .filter(|(peer, _)| *peer != rank)
            .map(|(peer, bytes)| (peer, &mut **bytes));
        self.run(outgoing, incoming.collect())
    }

    /// Sends `mine` to rank 0.
    pub fn give(&mut self, mine: &[u8]) -> Result<(), BackendError> {
        self.run(vec![(0, mine)], Vec::new())
    }

    /// Receives what every other rank gives, `(rank, place)` each.
    pub fn take(&mut self, theirs: Vec<(usize, &mut [u8])>) -> Result<(), BackendError> {
        self.run(Vec::new(), theirs)
    }

    /// Sends `mine` from rank 0 to all others, who call [`Peers::hear`].
    pub fn tell(&mut self, mine: &[u8]) -> Result<(), BackendError> {
        self.run((1..self.world).map(|peer| (peer, mine)).collect(), Vec::new())
    }

    /// Receives what rank 0 tells.
    pub fn hear(&mut self, theirs: &mut [u8]) -> Result<(), BackendError> {
        self.run(Vec::new(), vec![(0, theirs)])
    }

    /// Tells the other ranks, by closed links, that this one cannot go on.
    pub fn leave(&mut self, reason: &str) {
        let rank = self.rank;
        self.lose(rank, reason.to_owned());
    }

    /// The links to the other ranks, to be watched by another thread: one that closes has lost its rank.
    pub fn watched(&self) -> io::Result<Vec<(usize, TcpStream)>> {
        let links = self.links.iter().enumerate();
        links
            .filter_map(|(peer, link)| Some((peer, link.as_ref()?)))
            .map(|(peer, link)| Ok((peer, link.socket().try_clone()?)))
            .collect()
    }

    fn lose(&mut self, rank: usize, reason: String) -> BackendError {
        for link in self.links.iter().flatten() {
            // A link that is closed already needs no closing.
            let _ = link.socket().shutdown(Shutdown::Both);
        }
        let (rank, reason) = self.lost.get_or_insert((rank, reason)).clone();
        BackendError::Group { rank, reason }
    }

    fn run(&mut self, out: Vec<(usize, &[u8])>, into: Vec<(usize, &mut [u8])>) -> Result<(), BackendError> {
        if let Some((rank, reason)) = self.lost.clone() {
            return Err(BackendError::Group { rank, reason });
        }
        self.operation += 1;
        let number = self.operation;
        let mut sends: Vec<Transfer<&[u8]>> = out
            .into_iter()
            .map(|(peer, payload)| Transfer::new(peer, header(number, payload.len()), payload))
            .collect();
        let mut receives: Vec<Transfer<&mut [u8]>> =
            into.into_iter().map(|(peer, payload)| Transfer::new(peer, [0; HEADER_BYTES], payload)).collect();
        let mut progress = Instant::now();
        loop {
            let mut moved = false;
            for send in &mut sends {
                let Some(link) = &mut self.links[send.peer] else { continue };
                match send.send(&mut **link) {
                    Ok(bytes) => moved |= bytes > 0,
                    Err(error) => {
                        let peer = send.peer;
                        return Err(self.lose(peer, reason_of(&error)));
                    }
                }
            }
            for receive in &mut receives {
                let Some(link) = &mut self.links[receive.peer] else { continue };
                match receive.receive(&mut **link, number) {
                    Ok(bytes) => moved |= bytes > 0,
                    Err(error) => {
                        let peer = receive.peer;
                        return Err(self.lose(peer, reason_of(&error)));
                    }
                }
            }
            sends.retain(|send| !send.over);
            receives.retain(|receive| !receive.over);
            if sends.is_empty() && receives.is_empty() {
                return Ok(());
            }
            if moved {
                progress = Instant::now();
            }
            let left = self.silence_max.saturating_sub(progress.elapsed());
            if left.is_zero() {
                let waiting = receives.iter().map(|r| r.peer).chain(sends.iter().map(|s| s.peer)).next();
                let reason = format!("silent for {:?}", self.silence_max);
                return Err(self.lose(waiting.unwrap_or(self.rank), reason));
            }
            self.sleep(sends.iter().map(|s| s.peer), receives.iter().map(|r| r.peer), left);
        }
    }

    /// Until a link can go on, or `left` has passed.
    fn sleep(
        &self,
        sends: impl Iterator<Item = usize>,
        receives: impl Iterator<Item = usize>,
        left: Duration,
    ) {
        let poll = |peer: usize, events| {
            let fd = self.links[peer].as_ref()?.socket().as_raw_fd();
            Some(libc::pollfd { fd, events, revents: 0 })
        };
        let mut waits: Vec<libc::pollfd> = sends
            .filter_map(|peer| poll(peer, libc::POLLOUT))
            .chain(receives.filter_map(|peer| poll(peer, libc::POLLIN)))
            .collect();
        let timeout_ms = left.as_millis().clamp(1, 60_000) as libc::c_int;
        // SAFETY: `waits` is a valid array of that many entries. Errors and interruptions are met by trying again.
        unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, timeout_ms) };
    }
}

impl Transfer<&[u8]> {
    /// Sends as much as the link takes now.
    fn send(&mut self, link: &mut dyn RankLink) -> io::Result<usize> {
        let before = self.done;
        while self.done < HEADER_BYTES + self.payload.len() {
            let ready = if self.done < HEADER_BYTES {
                let parts = [io::IoSlice::new(&self.header[self.done..]), io::IoSlice::new(self.payload)];
                link.write_vectored(&parts)
            } else {
                link.write(&self.payload[self.done - HEADER_BYTES..])
            };
            match ready {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(bytes) => self.done += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match link.flush() {
            Ok(()) => self.over = self.done == HEADER_BYTES + self.payload.len(),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(self.done - before)
    }
}

impl Transfer<&mut [u8]> {
    /// Receives as much as has come.
    fn receive(&mut self, link: &mut dyn RankLink, number: u64) -> io::Result<usize> {
        let before = self.done;
        while self.done < HEADER_BYTES + self.payload.len() {
            let ready = if self.done < HEADER_BYTES {
                link.read(&mut self.header[self.done..])
            } else {
                link.read(&mut self.payload[self.done - HEADER_BYTES..])
            };
            match ready {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => self.done += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.done == HEADER_BYTES && self.header != header(number, self.payload.len()) {
                let (theirs, bytes) = parse(&self.header);
                return Err(io::Error::other(format!(
                    "out of step: sent collective {theirs} of {bytes} bytes, expected {number} of {}",
                    self.payload.len()
                )));
            }
        }
        self.over = self.done == HEADER_BYTES + self.payload.len();
        Ok(self.done - before)
    }
}

fn header(number: u64, bytes: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&number.to_le_bytes());
    header[8..].copy_from_slice(&(bytes as u64).to_le_bytes());
    header
}

fn parse(header: &[u8; HEADER_BYTES]) -> (u64, u64) {
    let (number, bytes) = header.split_at(8);
    let word = |half: &[u8]| half.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    (word(number), word(bytes))
}

fn reason_of(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "closed its link".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Peers, Peers) {
        let mut both = Group::local(2).unwrap().into_iter().map(|group| Peers::new(group, "cpu").unwrap());
        (both.next().unwrap(), both.next().unwrap())
    }

    fn exchange(peers: &mut Peers, mine: &[u8]) -> Result<(), String> {
        let mut theirs = [vec![0; mine.len()], vec![0; mine.len()]];
        let [low, high] = &mut theirs;
        peers.exchange(mine, &mut [low, high]).map_err(|error| error.to_string())
    }

    /// A rank that is alive but says nothing is lost after a bounded time, and stays lost.
    #[test]
    fn a_silent_rank_is_lost() {
        let (mut near, mut far) = pair();
        near.silence_max = Duration::from_millis(20);
        let lost = Err("tensor-parallel group lost: rank 1: silent for 20ms".to_owned());
        assert_eq!(exchange(&mut near, &[1; 4]), lost);
        assert_eq!(exchange(&mut near, &[1; 4]), lost);
        // The other rank learns of it too; what was sent to it before may still have arrived.
        let _ = exchange(&mut far, &[2; 4]);
        assert!(exchange(&mut far, &[2; 4]).is_err());
    }

    /// Ranks that run different plans notice at once instead of summing unlike things.
    #[test]
    fn ranks_out_of_step_are_refused() {
        let (mut near, mut far) = pair();
        let (near, far) = std::thread::scope(|scope| {
            let far = scope.spawn(move || exchange(&mut far, &[2; 8]));
            (exchange(&mut near, &[1; 4]), far.join().unwrap())
        });
        let out_of_step = |error: &str| error.contains("out of step: sent collective 1 of");
        let errors = [near.unwrap_err(), far.unwrap_err()];
        // One notices first and closes the link; the other may only see that.
        assert!(errors.iter().any(|error| out_of_step(error)), "{errors:?}");
    }
}
