//! One connection per pair of ranks for collectives: the higher rank dials the lower one, and both prove that they belong to
//! this epoch of the group.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use backend::RankLink;

use super::TpError;
use super::link::proof;
use super::trust::{Trust, Use, check, read_by};

/// Opens every connection: name and version of this protocol. Not how TLS begins.
const MAGIC: [u8; 8] = *b"baton-m1";

/// A link to another rank.
type Linked = Box<dyn RankLink>;

/// Time for all pairs to be connected.
const MESH_WAIT: Duration = Duration::from_secs(10);

/// Time for one connection to prove itself.
const GREETING_WAIT: Duration = Duration::from_secs(3);

/// Time between two looks at a listener.
pub(super) const ACCEPT_EVERY: Duration = Duration::from_millis(20);

/// Connects `rank` with all others, in order of rank. `addresses`: where each rank listens. `key`: of this epoch.
pub(super) fn connect(
    listener: &TcpListener,
    trust: &Trust,
    key: &[u8; 32],
    rank: usize,
    addresses: &[SocketAddr],
) -> Result<Vec<Option<Linked>>, TpError> {
    let deadline = Instant::now() + MESH_WAIT;
    let mut sockets: Vec<Option<Linked>> = addresses.iter().map(|_| None).collect();
    for (lower, address) in addresses.iter().enumerate().take(rank) {
        sockets[lower] = Some(dial(address, trust, key, rank, lower)?);
    }
    listener.set_nonblocking(true)?;
    while let Some(missing) = (rank + 1..addresses.len()).find(|other| sockets[*other].is_none()) {
        match listener.accept() {
            Ok((stream, from)) => match accept(stream, trust, key, rank) {
                Ok((other, stream)) if other < sockets.len() && sockets[other].is_none() => {
                    sockets[other] = Some(stream);
                }
                Ok((other, _)) => tracing::warn!("rank {other} of the group connected twice, from {from}"),
                Err(error) => {
                    trust.turned_away(&error);
                    tracing::warn!("connection from {from} to the group: {error}");
                }
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

/// `magic | rank | proof`, answered by a proof.
fn dial(
    address: &SocketAddr,
    trust: &Trust,
    key: &[u8; 32],
    rank: usize,
    lower: usize,
) -> Result<Linked, TpError> {
    let lost = |error: TpError| TpError::Lost { rank: lower, reason: format!("{address}: {error}") };
    let run = || {
        let stream = TcpStream::connect_timeout(address, GREETING_WAIT)?;
        stream.set_nodelay(true)?;
        // The other rank answers when it has dialled its own lower ones.
        let until = Instant::now() + MESH_WAIT;
        let mut link = trust.dialled(Use::Collectives, stream, until, |_| Ok(until))?.link();
        let socket = link.socket().try_clone()?;
        socket.set_write_timeout(Some(GREETING_WAIT))?;
        let ranks = pair(rank, lower);
        let mut greeting = MAGIC.to_vec();
        greeting.extend_from_slice(&(rank as u32).to_le_bytes());
        greeting.extend_from_slice(&proof(key, &[b"dial", &ranks]));
        link.write_all(&greeting)?;
        link.flush()?;
        let mut answer = [0; 32];
        read_by(&mut *link, &socket, &mut answer, until)?;
        check(&answer, &proof(key, &[b"took", &ranks]))?;
        settle(&socket)?;
        Ok(link)
    };
    run().map_err(lost)
}

fn accept(stream: TcpStream, trust: &Trust, key: &[u8; 32], rank: usize) -> Result<(usize, Linked), TpError> {
    let until = Instant::now() + GREETING_WAIT;
    stream.set_nodelay(true)?;
    let mut link = trust.accepted(Use::Collectives, stream, until)?.link();
    let socket = link.socket().try_clone()?;
    socket.set_write_timeout(Some(GREETING_WAIT))?;
    let (mut magic, mut other, mut answer) = ([0; 8], [0; 4], [0; 32]);
    read_by(&mut *link, &socket, &mut magic, until)?;
    if magic != MAGIC {
        return Err(TpError::Protocol("not a rank of this version".into()));
    }
    read_by(&mut *link, &socket, &mut other, until)?;
    read_by(&mut *link, &socket, &mut answer, until)?;
    let other = u32::from_le_bytes(other) as usize;
    let ranks = pair(other, rank);
    check(&answer, &proof(key, &[b"dial", &ranks]))?;
    if other <= rank {
        return Err(TpError::Protocol(format!("rank {other} dialled rank {rank}")));
    }
    link.write_all(&proof(key, &[b"took", &ranks]))?;
    link.flush()?;
    settle(&socket)?;
    Ok((other, link))
}

/// Backends have their own ways to wait.
fn settle(socket: &TcpStream) -> Result<(), TpError> {
    socket.set_read_timeout(None)?;
    Ok(socket.set_write_timeout(None)?)
}

fn pair(from: usize, to: usize) -> [u8; 8] {
    ((from as u64) << 32 | to as u64).to_le_bytes()
}
