//! Free ports for the processes of one `up`.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;

use anyhow::{Context, Result, bail};

/// Below the ports that Linux (32768..) and macOS (49152..) give to outgoing connections and to port 0, so that none of
/// those takes a port between the moment it was found free and the moment a child, or its successor, binds it.
const PORTS: Range<u16> = 20_000..32_000;
/// Tries per port.
const TRIES: usize = 200;

/// `count` different free ports on 127.0.0.1.
pub fn free(count: usize) -> Result<Vec<u16>> {
    // Held until all are found, so that they differ.
    let mut held: Vec<(u16, TcpListener)> = Vec::with_capacity(count);
    for _ in 0..count * TRIES {
        if held.len() == count {
            break;
        }
        let mut random = [0u8; 2];
        getrandom::fill(&mut random).context("no random bytes")?;
        let port = PORTS.start + u16::from_le_bytes(random) % (PORTS.end - PORTS.start);
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push((port, listener));
        }
    }
    if held.len() < count {
        bail!("no {count} free ports among {} to {}", PORTS.start, PORTS.end);
    }
    Ok(held.into_iter().map(|(port, _)| port).collect())
}
