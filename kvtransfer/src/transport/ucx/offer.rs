//! What both ends say to each other under a session: pure bytes, each with a bound.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use super::{Way, Ways};
use crate::frame::FrameError;

/// Runs of memory that one frame may lie in; more are copied together first.
pub(super) const RUNS_MAX: usize = 512;

/// A key of registered memory.
pub(super) const KEY_BYTES_MAX: usize = 1024;

/// Boot and process namespace: what two processes must have in common to read each other's memory.
pub(super) type Host = [u8; 24];

/// This process's.
pub(super) fn host() -> Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    *HOST.get_or_init(|| {
        let mut host = [0; 24];
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: Vec<u8> = boot.bytes().filter(u8::is_ascii_hexdigit).collect();
        for (byte, pair) in host.iter_mut().zip(digits.chunks_exact(2)) {
            let text = std::str::from_utf8(pair).unwrap_or_default();
            *byte = u8::from_str_radix(text, 16).unwrap_or(0);
        }
        let space = fs::metadata("/proc/self/ns/pid").map_or(0, |space| space.ino());
        host[16..].copy_from_slice(&space.to_le_bytes());
        host
    })
}

/// What the sender could do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub ways: Ways,
    pub host: Host,
}

impl Offer {
    pub fn encode(&self) -> Vec<u8> {
        let bit = |yes: bool, way: Way| u8::from(yes) << way as u8;
        let Ways { shm, rdma, tcp, .. } = self.ways;
        let bits = bit(shm, Way::Shm) | bit(rdma, Way::Rdma) | bit(tcp, Way::Tcp);
        [&[bits][..], &self.host].concat()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let wrong = FrameError::Message("is no offer");
        let (bits, host) = bytes.split_first().ok_or(wrong.clone())?;
        let has = |way: Way| bits >> way as u8 & 1 == 1;
        let ways = Ways { shm: has(Way::Shm), rdma: has(Way::Rdma), tcp: has(Way::Tcp), device: false };
        Ok(Offer { ways, host: host.try_into().map_err(|_| wrong)? })
    }

    /// The best way that both ends have: RDMA, shared memory where they are on one machine, the connection.
    pub fn choose(&self, ours: Ways, host: &Host) -> Way {
        // A machine that does not tell its boot is one machine with nobody.
        let together = self.host == *host && host[..16] != [0; 16];
        if self.ways.rdma && ours.rdma {
            Way::Rdma
        } else if self.ways.shm && ours.shm && together {
            Way::Shm
        } else if self.ways.tcp && ours.tcp {
            Way::Tcp
        } else {
            Way::Stream
        }
    }
}

/// Memory of the sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub address: u64,
    pub bytes: usize,
    pub key: Vec<u8>,
}

/// Where a payload lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fetch {
    pub payload_crc: u32,
    pub runs: Vec<Run>,
}

impl Fetch {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.runs.len() * 64);
        out.extend_from_slice(&self.payload_crc.to_le_bytes());
        out.extend_from_slice(&(self.runs.len() as u16).to_le_bytes());
        for run in &self.runs {
            out.extend_from_slice(&run.address.to_le_bytes());
            out.extend_from_slice(&(run.bytes as u32).to_le_bytes());
            out.extend_from_slice(&(run.key.len() as u16).to_le_bytes());
            out.extend_from_slice(&run.key);
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let wrong = || FrameError::Message("is no place of a payload");
        let mut left = bytes;
        let mut take = |count: usize| {
            let (now, rest) = left.split_at_checked(count).ok_or_else(wrong)?;
            left = rest;
            Ok::<_, FrameError>(now)
        };
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let payload_crc = number(take(4)?) as u32;
        let count = number(take(2)?) as usize;
        if count > RUNS_MAX {
            return Err(wrong());
        }
        let mut runs = Vec::with_capacity(count);
        for _ in 0..count {
            let (address, bytes) = (number(take(8)?), number(take(4)?) as usize);
            let key_bytes = number(take(2)?) as usize;
            if key_bytes > KEY_BYTES_MAX {
                return Err(wrong());
            }
            runs.push(Run { address, bytes, key: take(key_bytes)?.to_vec() });
        }
        if left.is_empty() { Ok(Fetch { payload_crc, runs }) } else { Err(wrong()) }
    }

    /// Bytes of the payload.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.bytes as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_survives_and_no_other_length_parses() {
        let offer = Offer { ways: Ways { shm: true, tcp: true, ..Ways::NONE }, host: [7; 24] };
        assert_eq!(Offer::decode(&offer.encode()), Ok(offer));
        assert!(Offer::decode(&offer.encode()[1..]).is_err() && Offer::decode(&[]).is_err());
        let run = |at: u8| Run { address: u64::from(at) << 40, bytes: 65_536, key: vec![at; 9] };
        let fetch = Fetch { payload_crc: 0xdead_beef, runs: vec![run(1), run(2)] };
        let bytes = fetch.encode();
        assert_eq!((Fetch::decode(&bytes), fetch.bytes()), (Ok(fetch), 131_072));
        for short in 0..bytes.len() {
            assert!(Fetch::decode(&bytes[..short]).is_err(), "cut to {short}");
        }
        assert!(Fetch::decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn the_best_common_way_is_taken_and_memory_is_shared_on_one_machine_only() {
        let all = Ways { shm: true, rdma: true, tcp: true, device: true };
        let (here, there) = ([1; 24], [2; 24]);
        let offer = |ways| Offer { ways, host: here };
        assert_eq!(offer(all).choose(all, &there), Way::Rdma);
        let without = Ways { rdma: false, ..all };
        assert_eq!(offer(all).choose(without, &here), Way::Shm);
        assert_eq!(offer(without).choose(all, &there), Way::Tcp);
        assert_eq!(offer(Ways { tcp: false, ..without }).choose(all, &there), Way::Stream);
        assert_eq!(offer(all).choose(Ways::NONE, &here), Way::Stream);
        let nowhere = Offer { ways: Ways { shm: true, ..Ways::NONE }, host: [0; 24] };
        assert_eq!(nowhere.choose(all, &[0; 24]), Way::Stream);
    }
}
