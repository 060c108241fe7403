//! One socket per pair of ranks for collectives: the higher rank dials the lower one, and both prove that they belong to
//! this epoch of the group.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;

use super::TpError;
use super::link::proof;

/// Time for all pairs to be connected.
const MESH_WAIT: Duration = Duration::from_secs(10);

/// Time for one connection to prove itself.
const GREETING_WAIT: Duration = Duration::from_secs(1);

/// Time between two looks at a listener.
pub(super) const ACCEPT_EVERY: Duration = Duration::from_millis(20);

/// Connects `rank` with all others, in order of rank. `addresses`: where each rank listens. `key`: of this epoch.
pub(super) fn connect(
    listener: &TcpListener,
    key: &[u8; 32],
    rank: usize,
    addresses: &[SocketAddr],
) -> Result<Vec<Option<TcpStream>>, TpError> {
    let deadline = Instant::now() + MESH_WAIT;
    let mut sockets: Vec<Option<TcpStream>> = addresses.iter().map(|_| None).collect();
    for (lower, address) in addresses.iter().enumerate().take(rank) {
        sockets[lower] = Some(dial(address, key, rank, lower)?);
    }
    listener.set_nonblocking(true)?;
    while let Some(missing) = (rank + 1..addresses.len()).find(|other| sockets[*other].is_none()) {
        match listener.accept() {
            Ok((stream, from)) => match accept(stream, key, rank) {
                Ok((other, stream)) if other < sockets.len() && sockets[other].is_none() => {
                    sockets[other] = Some(stream);
                }
                Ok((other, _)) => tracing::warn!("rank {other} of the group connected twice, from {from}"),
                Err(error) => tracing::warn!("connection from {from} to the group: {error}"),
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return Err(TpError::Lost {
                        rank: missing,
                        reason: "did not connect to its peers".into(),
                    });
                }
                std::thread::sleep(ACCEPT_EVERY);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sockets)
}

/// `rank | proof`, answered by a proof.
fn dial(address: &SocketAddr, key: &[u8; 32], rank: usize, lower: usize) -> Result<TcpStream, TpError> {
    let lost = |error: TpError| TpError::Lost { rank: lower, reason: format!("{address}: {error}") };
    let run = || {
        let mut stream = TcpStream::connect_timeout(address, GREETING_WAIT)?;
        prepare(&stream)?;
        let ranks = pair(rank, lower);
        stream.write_all(&(rank as u32).to_le_bytes())?;
        stream.write_all(&proof(key, &[b"dial", &ranks]))?;
        // The other rank answers when it has dialled its own lower ones.
        stream.set_read_timeout(Some(MESH_WAIT))?;
        let mut answer = [0; 32];
        stream.read_exact(&mut answer)?;
        verify(&answer, &proof(key, &[b"took", &ranks]))?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(stream)
    };
    run().map_err(lost)
}

fn accept(mut stream: TcpStream, key: &[u8; 32], rank: usize) -> Result<(usize, TcpStream), TpError> {
    stream.set_nonblocking(false)?;
    prepare(&stream)?;
    let (mut other, mut answer) = ([0; 4], [0; 32]);
    stream.read_exact(&mut other)?;
    stream.read_exact(&mut answer)?;
    let other = u32::from_le_bytes(other) as usize;
    let ranks = pair(other, rank);
    verify(&answer, &proof(key, &[b"dial", &ranks]))?;
    if other <= rank {
        return Err(TpError::Protocol(format!("rank {other} dialled rank {rank}")));
    }
    stream.write_all(&proof(key, &[b"took", &ranks]))?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok((other, stream))
}

fn prepare(stream: &TcpStream) -> Result<(), TpError> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GREETING_WAIT))?;
    Ok(stream.set_write_timeout(Some(GREETING_WAIT))?)
}

fn pair(from: usize, to: usize) -> [u8; 8] {
    ((from as u64) << 32 | to as u64).to_le_bytes()
}

fn verify(theirs: &[u8; 32], ours: &[u8; 32]) -> Result<(), TpError> {
    if ours.ct_eq(theirs).into() { Ok(()) } else { Err(TpError::Proof) }
}
