//! A TLS connection that one thread uses both ways, over a socket that may not block: what collectives of a tensor-parallel
//! group travel over between machines. Made by the ranks of `engine` as they meet, used by the backends' collectives.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

use backend::RankLink;
use rustls::Connection;

use super::tls::{Standing, Tls};

/// Ciphertext read at once.
const READ_BYTES: usize = 128 << 10;
/// Plaintext encrypted at once, before it goes to the socket; what a write takes at the most.
const WRITE_BYTES: usize = 128 << 10;

/// One connection, past its handshake.
pub struct Sealed {
    stream: TcpStream,
    tls: Connection,
    standing: Standing,
    cipher: Box<[u8]>,
    /// Of `cipher`: read, not yet taken in.
    ready: Range<usize>,
    /// Records on their way to the socket.
    out: Vec<u8>,
    /// Of `out`: gone.
    gone: usize,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({:?})", self.stream)
    }
}

impl Sealed {
    /// Over `stream`, whose handshake `connection` has been through by `tls`.
    pub fn new(stream: TcpStream, mut connection: Connection, tls: &Tls) -> Self {
        connection.set_buffer_limit(Some(WRITE_BYTES));
        let (cipher, standing) = (vec![0; READ_BYTES].into_boxed_slice(), Standing::new(tls));
        Sealed { stream, tls: connection, standing, cipher, ready: 0..0, out: Vec::new(), gone: 0 }
    }

    /// Hands records that are ready to the socket: all of them, or an error.
    fn push(&mut self) -> io::Result<()> {
        while self.gone < self.out.len() {
            match self.stream.write(&self.out[self.gone..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => self.gone += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.gone = 0;
        Ok(())
    }

    /// Encrypted bytes of whatever the connection has to say, for [`Sealed::push`].
    fn collect(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.out)?;
        }
        Ok(())
    }
}

impl RankLink for Sealed {
    fn socket(&self) -> &TcpStream {
        &self.stream
    }

    fn is_sealed(&self) -> bool {
        true
    }
}

impl Read for Sealed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.standing.check(&self.tls, &self.stream)?;
            match self.tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A rank that closes without saying so is lost as any other.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            if self.ready.is_empty() {
                match self.stream.read(&mut self.cipher)? {
                    0 => return Ok(0),
                    read => self.ready = 0..read,
                }
            }
            let mut ready = &self.cipher[self.ready.clone()];
            self.ready.start += self.tls.read_tls(&mut ready)?;
            if let Err(error) = self.tls.process_new_packets() {
                // Said as far as the socket takes it: the link is over.
                let _ = self.collect().and_then(|()| self.push());
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }
}

impl Write for Sealed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.standing.check(&self.tls, &self.stream)?;
        // One piece at a time: what a rank does not take stays with who sends.
        self.push()?;
        let taken = self.tls.writer().write_vectored(slices)?;
        self.collect()?;
        match self.push() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.collect()?;
        self.push()
    }
}
