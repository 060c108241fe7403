//! How the ranks of a group meet: followers dial the leader, both prove the cluster's secret, the leader compares what
//! they are, and when all are there, tells everyone about everyone and they connect pairwise.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use backend::Links;

use super::link::{Halves, proof};
use super::mesh::{self, ACCEPT_EVERY};
use super::trust::{Duplex, Trust, Use, check, read_by};
use super::wire::{Reader, Writer};
use super::{Frame, Group, TpError};
use crate::request::Target;

/// Opens every connection to a leader: name and version of this protocol.
const MAGIC: [u8; 8] = *b"baton-t1";

/// Time for a connection to prove itself and say who it is.
const GREETING_WAIT: Duration = Duration::from_secs(2);

/// Time between two signs of life to ranks that wait for the others.
const WAITING_PING: Duration = Duration::from_millis(500);

/// A leader that says nothing for so long while ranks gather is lost. Longer than the heartbeat of a running group: a
/// leader that gathers greets one rank at a time.
const GATHER_SILENCE: Duration = Duration::from_secs(10);

/// Time for all ranks to be connected with each other.
const READY_WAIT: Duration = Duration::from_secs(15);

/// What a rank is. Version, identity and block size are equal on all ranks of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Of the program.
    pub version: String,
    /// Of the model: architecture, vocabulary and weights.
    pub identity: String,
    /// Its cache and KV addresses; says which rank it is.
    pub target: Target,
    /// Free blocks of its store.
    pub blocks: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// For a backend with a fabric of its own, what it tells the backends of the other ranks; `None`: ours connect the
    /// ranks with sockets.
    pub native: Option<String>,
}

struct Joined {
    member: Member,
    halves: Halves,
    /// Where it listens for the other ranks.
    mesh: SocketAddr,
}

/// Gathers the other `world - 1` ranks on `listener`. Ends early, with [`TpError::Stopped`], when `stop` says so.
pub fn lead(
    listener: &TcpListener,
    trust: &Trust,
    world: usize,
    epoch: u64,
    member: &Member,
    stop: &dyn Fn() -> bool,
) -> Result<Group, TpError> {
    listener.set_nonblocking(true)?;
    let mut joined = BTreeMap::<usize, Joined>::new();
    let mut pinged = Instant::now();
    while joined.len() + 1 < world {
        if stop() {
            return Err(TpError::Stopped);
        }
        match listener.accept() {
            Ok((stream, from)) => match greet(stream, trust, world, member) {
                Ok(rank) => {
                    tracing::info!("rank {} of {world} joined from {from}", rank.member.target.rank);
                    // A rank that comes again has lost its earlier connection.
                    joined.insert(rank.member.target.rank, rank);
                }
                Err(error) => {
                    trust.turned_away(&error);
                    tracing::warn!("{from} did not join the group: {error}");
                }
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(ACCEPT_EVERY),
            Err(error) => return Err(error.into()),
        }
        if pinged.elapsed() >= WAITING_PING {
            pinged = Instant::now();
            joined.retain(|_, rank| rank.halves.out.send(&Frame::Ping).is_ok());
        }
    }
    welcome(trust, epoch, member, joined)
}

/// Joins the group that is led at `leader` (`host:port`). Errors at once when nobody listens there.
pub fn join(leader: &str, trust: &Trust, member: &Member, stop: &dyn Fn() -> bool) -> Result<Group, TpError> {
    let stream = dial(leader)?;
    let (near, far) = (stream.local_addr()?, stream.peer_addr()?);
    let mut halves = prove(stream, trust, stop)?;
    // A backend with a fabric of its own listens there itself later: until then the port is ours.
    let listener = TcpListener::bind((near.ip(), 0))?;
    let mut w = Writer::default();
    w.u32(listener.local_addr()?.port().into());
    encode(&mut w, member);
    halves.out.send(&Frame::Join(w.0))?;
    let begun = loop {
        if stop() {
            return Err(TpError::Stopped);
        }
        match halves.into.receive(GATHER_SILENCE)? {
            Frame::Ping => {}
            Frame::Welcome(bytes) => break bytes,
            Frame::Refuse(reason) => return Err(TpError::Refused(reason)),
            other => return Err(unexpected(&other)),
        }
    };
    let mut r = Reader(&begun);
    let (epoch, nonce, blocks) = (r.u64()?, r.array::<32>()?, r.u32()?);
    let ranks = r.list(|r| Ok((r.text()?, target(r)?)))?;
    let native = r.text()?;
    r.end()?;
    let (addresses, targets): (Vec<String>, Vec<Target>) = ranks.into_iter().unzip();
    let mut mesh = Vec::new();
    for address in addresses {
        let parsed: SocketAddr =
            address.parse().map_err(|_| TpError::Protocol(format!("address {address:?} of a rank")))?;
        // The leader does not know by which of its addresses we reach it.
        mesh.push(if parsed.ip().is_unspecified() {
            SocketAddr::new(far.ip(), parsed.port())
        } else {
            parsed
        });
    }
    let rank = member.target.rank;
    if member.native.is_some() {
        drop(listener);
        halves.out.send(&Frame::Ready)?;
        return Group::met(rank, epoch, targets, blocks, Links::Native(native), vec![(0, halves)]);
    }
    let sockets = mesh::connect(&listener, trust, &mesh_key(&trust.secret, &nonce), rank, &mesh)?;
    halves.out.send(&Frame::Ready)?;
    Group::met(rank, epoch, targets, blocks, Links::Sockets(sockets), vec![(0, halves)])
}

fn dial(leader: &str) -> Result<TcpStream, TpError> {
    let mut last = TpError::Protocol(format!("{leader} has no address"));
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, GREETING_WAIT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Follower's side of the proof: `magic | nonce`, then the leader's `nonce | proof`, then ours.
fn prove(stream: TcpStream, trust: &Trust, stop: &dyn Fn() -> bool) -> Result<Halves, TpError> {
    stream.set_nodelay(true)?;
    let mut answered = false;
    let wait = |stream: &TcpStream| {
        answered = true;
        await_answer(stream, stop)?;
        Ok(Instant::now() + GREETING_WAIT)
    };
    let opened = trust.dialled(Use::Control, stream, Instant::now() + GREETING_WAIT, wait)?;
    let mut link = opened.duplex()?;
    timeouts(&link.stream, GREETING_WAIT)?;
    let mine = nonce()?;
    link.writer.write_all(&MAGIC)?;
    link.writer.write_all(&mine)?;
    if !answered {
        await_answer(&link.stream, stop)?;
    }
    let until = Instant::now() + GREETING_WAIT;
    let (mut theirs, mut answer) = ([0; 32], [0; 32]);
    read_by(&mut link.reader, &link.stream, &mut theirs, until)?;
    read_by(&mut link.reader, &link.stream, &mut answer, until)?;
    let secret = &trust.secret;
    check(&answer, &proof(secret, &[b"baton group leader", &mine, &theirs]))?;
    link.writer.write_all(&proof(secret, &[b"baton group rank", &mine, &theirs]))?;
    keys(link, secret, &mine, &theirs, false)
}

/// Until the leader has said something: it may still be busy with the group that was.
fn await_answer(stream: &TcpStream, stop: &dyn Fn() -> bool) -> Result<(), TpError> {
    let begun = Instant::now();
    stream.set_read_timeout(Some(WAITING_PING))?;
    loop {
        match stream.peek(&mut [0]) {
            Ok(0) => return Err(TpError::Closed),
            Ok(_) => return timeouts(stream, GREETING_WAIT),
            // Interrupted: this process was stopped and resumed.
            Err(error)
                if !matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                return Err(error.into());
            }
            Err(_) if stop() => return Err(TpError::Stopped),
            Err(_) if begun.elapsed() > READY_WAIT => {
                return Err(TpError::Silent { ms: READY_WAIT.as_millis() as u64 });
            }
            Err(_) => {}
        }
    }
}

/// Leader's side of the proof.
fn ask_proof(stream: TcpStream, trust: &Trust) -> Result<Halves, TpError> {
    let until = Instant::now() + GREETING_WAIT;
    stream.set_nodelay(true)?;
    let mut link = trust.accepted(Use::Control, stream, until)?.duplex()?;
    timeouts(&link.stream, GREETING_WAIT)?;
    let (mut magic, mut theirs, mut answer) = ([0; 8], [0; 32], [0; 32]);
    read_by(&mut link.reader, &link.stream, &mut magic, until)?;
    if magic != MAGIC {
        return Err(TpError::Protocol("not a rank of this version".into()));
    }
    read_by(&mut link.reader, &link.stream, &mut theirs, until)?;
    let (mine, secret) = (nonce()?, &trust.secret);
    link.writer.write_all(&mine)?;
    link.writer.write_all(&proof(secret, &[b"baton group leader", &theirs, &mine]))?;
    match read_by(&mut link.reader, &link.stream, &mut answer, until) {
        // A rank that finds that the leader has another secret than itself leaves without a word.
        Err(TpError::Io(error)) if left(&error) => return Err(TpError::Unproved),
        read => read?,
    }
    check(&answer, &proof(secret, &[b"baton group rank", &theirs, &mine]))?;
    keys(link, secret, &theirs, &mine, true)
}

/// Whether the other end is gone.
fn left(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted
    )
}

fn keys(
    link: Duplex,
    secret: &[u8],
    rank: &[u8; 32],
    leader: &[u8; 32],
    leads: bool,
) -> Result<Halves, TpError> {
    let down = proof(secret, &[b"baton group down", rank, leader]);
    let up = proof(secret, &[b"baton group up", rank, leader]);
    let (out, into) = if leads { (down, up) } else { (up, down) };
    Halves::new(link, out, into)
}

/// Lets one connection prove itself and compares what it is; the reason of a refusal is told to it.
fn greet(stream: TcpStream, trust: &Trust, world: usize, leader: &Member) -> Result<Joined, TpError> {
    let from = stream.peer_addr()?;
    let mut halves = ask_proof(stream, trust)?;
    let Frame::Join(bytes) = halves.into.receive(GREETING_WAIT)? else {
        return Err(TpError::Protocol("no introduction".into()));
    };
    let mut r = Reader(&bytes);
    let port = r.u32()?;
    let port = u16::try_from(port).map_err(|_| TpError::Protocol(format!("port {port}")))?;
    let member = decode(&mut r)?;
    r.end()?;
    if let Err(reason) = agree(world, leader, &member) {
        halves.out.send(&Frame::Refuse(reason.clone()))?;
        return Err(TpError::Refused(reason));
    }
    Ok(Joined { member, halves, mesh: SocketAddr::new(from.ip(), port) })
}

/// Names the first thing that keeps `member` from working with `leader`.
fn agree(world: usize, leader: &Member, member: &Member) -> Result<(), String> {
    let differs = |what: &str, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
        Err(format!("{what}: the leader has {ours}, rank {} has {theirs}", member.target.rank))
    };
    if leader.version != member.version {
        return differs("version", &leader.version, &member.version);
    }
    if leader.identity != member.identity {
        return differs("model identity", &leader.identity, &member.identity);
    }
    if leader.block_tokens != member.block_tokens {
        return differs("tokens per kv block", &leader.block_tokens, &member.block_tokens);
    }
    let fabric = |member: &Member| match member.native {
        Some(_) => "the backend's own",
        None => "sockets",
    };
    if leader.native.is_some() != member.native.is_some() {
        return differs("links between ranks", &fabric(leader), &fabric(member));
    }
    let shape = |target: &Target| kvtransfer::layout::describe(&target.spec);
    let layers = |target: &Target| (target.spec.layers, target.spec.planes.len());
    if layers(&leader.target) != layers(&member.target) {
        return differs("kv cache", &shape(&leader.target), &shape(&member.target));
    }
    match member.target.rank {
        rank if rank == 0 || rank >= world => {
            Err(format!("rank {rank} does not follow in a group of {world}"))
        }
        _ => Ok(()),
    }
}

/// Tells everyone about everyone and connects.
fn welcome(
    trust: &Trust,
    epoch: u64,
    leader: &Member,
    mut joined: BTreeMap<usize, Joined>,
) -> Result<Group, TpError> {
    let lost = |rank: usize| move |error: TpError| TpError::Lost { rank, reason: error.to_string() };
    // All ranks dial the leader at the address that their control connection goes to.
    let mut ours = Vec::new();
    for rank in joined.values() {
        ours.push(rank.halves.out.local_addr()?.ip());
    }
    let bind = match ours.first() {
        None => return Ok(Group::alone(epoch, leader.target.clone(), leader.blocks)),
        Some(first) if ours.iter().all(|ip| ip == first) => *first,
        Some(IpAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
        Some(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let listener = TcpListener::bind((bind, 0))?;
    let unspecified = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), listener.local_addr()?.port());
    let blocks = joined.values().map(|rank| rank.member.blocks).fold(leader.blocks, u32::min);
    let mut ranks = vec![(unspecified, leader.target.clone())];
    ranks.extend(joined.values().map(|rank| (rank.mesh, rank.member.target.clone())));
    let nonce = nonce()?;
    let fabric = match native(leader, &ours, &listener, &joined)? {
        None => Fabric::Sockets(listener),
        // Dropped: nobody may reach our listener who means that of the fabric, which takes its port, and would wait for ever.
        Some(specification) => {
            drop(listener);
            Fabric::Native(specification)
        }
    };
    let mut w = Writer::default();
    w.u64(epoch);
    w.0.extend_from_slice(&nonce);
    w.u32(blocks);
    w.list(&ranks, |w, (address, target)| {
        w.text(&address.to_string());
        encode_target(w, target);
    });
    w.text(match &fabric {
        Fabric::Sockets(_) => "",
        Fabric::Native(specification) => specification,
    });
    let frame = Frame::Welcome(w.0);
    for (rank, entry) in &mut joined {
        entry.halves.out.send(&frame).map_err(lost(*rank))?;
    }
    let (addresses, targets): (Vec<SocketAddr>, Vec<Target>) = ranks.into_iter().unzip();
    let collective = match fabric {
        Fabric::Sockets(listener) => {
            Links::Sockets(mesh::connect(&listener, trust, &mesh_key(&trust.secret, &nonce), 0, &addresses)?)
        }
        Fabric::Native(specification) => Links::Native(specification),
    };
    let mut links = Vec::new();
    for (rank, mut entry) in joined {
        match entry.halves.into.receive(READY_WAIT).map_err(lost(rank))? {
            Frame::Ready => links.push((rank, entry.halves)),
            other => return Err(unexpected(&other)),
        }
    }
    Group::met(0, epoch, targets, blocks, collective, links)
}

/// What is going to connect the ranks.
enum Fabric {
    /// Ours, which meet here.
    Sockets(TcpListener),
    /// The backend's, by what it is told.
    Native(String),
}

/// What a backend with a fabric of its own is told: a line per rank, its address and what its backend says.
fn native(
    leader: &Member,
    ours: &[IpAddr],
    listener: &TcpListener,
    joined: &BTreeMap<usize, Joined>,
) -> Result<Option<String>, TpError> {
    // In a ring the last rank dials the first: at the address by which it reached us.
    let (Some(about), Some(ip)) = (&leader.native, ours.last()) else { return Ok(None) };
    let mut text = format!("{}\t{about}\n", SocketAddr::new(*ip, listener.local_addr()?.port()));
    for rank in joined.values() {
        let about = rank.member.native.as_deref().unwrap_or_default();
        // One line each, whatever a rank says.
        text.push_str(&format!("{}\t{}\n", rank.mesh, about.replace(['\n', '\t'], " ")));
    }
    Ok(Some(text))
}

fn mesh_key(secret: &[u8], nonce: &[u8; 32]) -> [u8; 32] {
    proof(secret, &[b"baton group mesh", nonce])
}

fn nonce() -> Result<[u8; 32], TpError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| TpError::Protocol(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

fn timeouts(stream: &TcpStream, wait: Duration) -> Result<(), TpError> {
    stream.set_read_timeout(Some(wait))?;
    Ok(stream.set_write_timeout(Some(wait))?)
}

fn unexpected(frame: &Frame) -> TpError {
    TpError::Protocol(format!("{frame:?} while ranks gather"))
}

fn encode(w: &mut Writer, member: &Member) {
    w.text(&member.version);
    w.text(&member.identity);
    encode_target(w, &member.target);
    w.u32(member.blocks);
    w.u32(member.block_tokens);
    w.list(member.native.as_slice(), |w, about| w.text(about));
}

fn decode(r: &mut Reader<'_>) -> Result<Member, TpError> {
    Ok(Member {
        version: r.text()?,
        identity: r.text()?,
        target: target(r)?,
        blocks: r.u32()?,
        block_tokens: r.u32()?,
        native: r.list(Reader::text)?.pop(),
    })
}

fn encode_target(w: &mut Writer, target: &Target) {
    w.u32(target.rank as u32);
    w.list(&target.addresses, |w, address| w.text(address));
    w.spec(&target.spec);
}

fn target(r: &mut Reader<'_>) -> Result<Target, super::wire::WireError> {
    Ok(Target { rank: r.u32()? as usize, addresses: r.list(Reader::text)?, spec: r.spec()? })
}

#[cfg(test)]
mod tests;
