//! How the ranks of a group know each other, and which of their links are encrypted. Both ends of every link prove the cluster's
//! secret; between machines of a cluster with certificates, a link is TLS 1.3 with certificates of both ends before that.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use backend::RankLink;
use kvtransfer::transport::sealed::Sealed;
use kvtransfer::transport::tls::{self, Connection, Revoked, Tls};
use kvtransfer::{OnTurned, Turned};
use subtle::ConstantTimeEq;

use super::TpError;

/// First byte of whoever begins with TLS: a handshake record.
const TLS_HANDSHAKE: u8 = 22;

/// Which links are encrypted where this process has a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sealing {
    /// Those to other machines.
    #[default]
    Network,
    /// All, on loopback too.
    Always,
    /// Of those to other machines, the leader's control links only: what is computed (activations, logits) travels in clear, for
    /// a network that is ours alone.
    Control,
}

/// What the ranks of a group know each other by.
#[derive(Clone, Debug)]
pub struct Trust {
    /// The cluster's, never sent.
    pub secret: Vec<u8>,
    /// The certificate of this process and whom it trusts; `None`: all links are in clear.
    pub tls: Option<Tls>,
    /// Which links are TLS.
    pub sealing: Sealing,
    /// Hears of those who were turned away.
    pub turned: OnTurned,
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Plans, notices, tickets.
    Control,
    /// Sums and columns of activations.
    Collectives,
}

impl Trust {
    /// By the secret alone.
    pub fn in_clear(secret: Vec<u8>) -> Trust {
        Trust { secret, tls: None, sealing: Sealing::default(), turned: OnTurned::default() }
    }

    /// How to talk to `peer`, if not in clear.
    fn sealed(&self, kind: Use, peer: IpAddr) -> Option<&Tls> {
        let away = !peer.to_canonical().is_loopback();
        let wanted = match self.sealing {
            Sealing::Always => true,
            Sealing::Network => away,
            Sealing::Control => away && kind == Use::Control,
        };
        self.tls.as_ref().filter(|_| wanted)
    }

    /// A socket that this end has dialled. `wait` as in [`tls::connect`].
    pub(super) fn dialled(
        &self,
        kind: Use,
        mut stream: TcpStream,
        until: Instant,
        wait: impl FnOnce(&TcpStream) -> Result<Instant, TpError>,
    ) -> Result<Opened, TpError> {
        let peer = stream.peer_addr()?.ip();
        let Some(tls) = self.sealed(kind, peer) else { return Ok(Opened { stream, sealed: None }) };
        let mut stopped = None;
        let waited = |stream: &TcpStream| {
            wait(stream).map_err(|error| {
                stopped = Some(error);
                io::Error::from(ErrorKind::Interrupted)
            })
        };
        match tls::connect(&mut stream, tls, until, waited) {
            Ok(connection) => Ok(Opened { stream, sealed: Some((connection, tls.clone())) }),
            Err(error) => Err(stopped.unwrap_or(TpError::Io(error))),
        }
    }

    /// A socket that this end has accepted. Whoever must not talk in clear is turned away.
    pub(super) fn accepted(
        &self,
        kind: Use,
        mut stream: TcpStream,
        until: Instant,
    ) -> Result<Opened, TpError> {
        stream.set_nonblocking(false)?;
        let Some(tls) = &self.tls else { return Ok(Opened { stream, sealed: None }) };
        let peer = stream.peer_addr()?.ip();
        stream.set_read_timeout(Some(left(until)?))?;
        let mut first = [0];
        let seen = loop {
            match stream.peek(&mut first) {
                // Stopped and resumed: a wait with a limit ends then.
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    stream.set_read_timeout(Some(left(until)?))?
                }
                seen => break seen?,
            }
        };
        if seen == 0 {
            return Err(TpError::Closed);
        }
        if first[0] == TLS_HANDSHAKE {
            let connection = tls::accepted(&mut stream, tls, until).map_err(TpError::Tls)?;
            return Ok(Opened { stream, sealed: Some((connection, tls.clone())) });
        }
        match self.sealed(kind, peer) {
            Some(_) => Err(TpError::InClear),
            None => Ok(Opened { stream, sealed: None }),
        }
    }

    /// Counts whoever was turned away as the ranks met. One that merely left is nobody's refusal.
    pub(super) fn turned_away(&self, error: &TpError) {
        let silent = |error: &io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        let turned = match error {
            TpError::Tls(error) | TpError::Io(error) if silent(error) => Turned::Because("silent"),
            TpError::Tls(error) if error.kind() == ErrorKind::InvalidData => Turned::Handshake(error),
            TpError::Tls(error) if Revoked::is(error) => Turned::Because("join token revoked"),
            TpError::InClear => Turned::Because("in clear"),
            TpError::Proof | TpError::Unproved => Turned::Because("secret not proved"),
            TpError::Protocol(_) => Turned::Because("not a rank"),
            _ => return,
        };
        self.turned.tell(turned);
    }
}

/// A link whose ends know each other's certificates, where they have some.
pub(super) struct Opened {
    stream: TcpStream,
    sealed: Option<(Connection, Tls)>,
}

impl Opened {
    /// For one thread.
    pub fn link(self) -> Box<dyn RankLink> {
        match self.sealed {
            None => Box::new(self.stream),
            Some((connection, tls)) => Box::new(Sealed::new(self.stream, connection, &tls)),
        }
    }

    /// For a thread each way.
    pub fn duplex(self) -> Result<Duplex, TpError> {
        let stream = self.stream.try_clone()?;
        Ok(match self.sealed {
            None => {
                let reader = Box::new(self.stream.try_clone()?);
                Duplex { stream, reader, writer: Box::new(self.stream) }
            }
            Some((connection, tls)) => {
                let (reader, writer) = tls::halves(self.stream, connection, &tls)?;
                Duplex { stream, reader: Box::new(reader), writer: Box::new(writer) }
            }
        })
    }
}

/// Both directions of a link, with the socket that they share.
pub(super) struct Duplex {
    pub stream: TcpStream,
    pub reader: Box<dyn Read + Send>,
    pub writer: Box<dyn Write + Send>,
}

/// Fills `bytes` from `reader`, over `socket`, by `until`: however slowly it comes.
pub(super) fn read_by(
    reader: &mut (impl Read + ?Sized),
    socket: &TcpStream,
    bytes: &mut [u8],
    until: Instant,
) -> Result<(), TpError> {
    let mut done = 0;
    while done < bytes.len() {
        socket.set_read_timeout(Some(left(until)?))?;
        match reader.read(&mut bytes[done..]) {
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn left(until: Instant) -> Result<Duration, TpError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::Error::from(ErrorKind::TimedOut).into()) } else { Ok(left) }
}

/// Whether the other end holds the secret that our proof was made with; constant time.
pub(super) fn check(theirs: &[u8; 32], ours: &[u8; 32]) -> Result<(), TpError> {
    if ours.ct_eq(theirs).into() { Ok(()) } else { Err(TpError::Proof) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tp::certificates::{Authority, tls};

    /// Protects: what leaves the machine is encrypted unless somebody says otherwise by name; plans and tickets always.
    #[test]
    fn links_between_machines_are_sealed() {
        let authority = Authority::new();
        let with = |sealing| Trust {
            tls: Some(tls(&authority, &authority)),
            sealing,
            ..Trust::in_clear(b"s".to_vec())
        };
        let (here, away) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let sealed = |trust: &Trust| {
            [(Use::Control, here), (Use::Collectives, here), (Use::Control, away), (Use::Collectives, away)]
                .map(|(kind, peer)| trust.sealed(kind, peer).is_some())
        };
        assert_eq!(sealed(&with(Sealing::Network)), [false, false, true, true]);
        assert_eq!(sealed(&with(Sealing::Always)), [true; 4]);
        assert_eq!(sealed(&with(Sealing::Control)), [false, false, true, false]);
        assert_eq!(sealed(&Trust::in_clear(Vec::new())), [false; 4]);
    }
}
