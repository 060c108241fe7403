//! The control link between the leader and one follower: frames, each proved by the cluster's secret to be the next one
//! of this link and epoch, and a heartbeat in both directions, so that a lost or stopped rank is noticed when idle too.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use super::TpError;
use super::trust::Duplex;

/// Time between two heartbeats.
const PING_EVERY: Duration = Duration::from_millis(400);

/// A link on which nothing came for so long is lost; also the longest that a frame may take to be sent.
pub(super) const SILENCE_MAX: Duration = Duration::from_millis(1500);

/// In so long a lost rank is noticed, hung ones too: a promise to users.
const NOTICE_MAX: Duration = Duration::from_secs(2);

/// Time between two looks at a link. Silence is counted in looks: when this whole machine stands still for seconds, that
/// is one look, and the other end gets its time.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Largest frame: a plan holds the token ids of a step, and handoffs.
pub(super) const FRAME_BYTES_MAX: usize = 16 << 20;

/// Bytes of the proof in each frame.
const PROOF_BYTES: usize = 16;

/// Length, kind and proof.
const HEAD_BYTES: usize = 4 + 1 + PROOF_BYTES;

const _: () = assert!(SILENCE_MAX.as_millis() >= 3 * PING_EVERY.as_millis());
// The looks before and after, and some time to be scheduled.
const _: () = assert!(SILENCE_MAX.as_millis() + LOOK_EVERY.as_millis() < NOTICE_MAX.as_millis());

/// HMAC-SHA256 of `parts` one after the other; each is of fixed length, or the last.
pub(super) fn proof(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else {
        unreachable!("HMAC takes keys of any length")
    };
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

/// What travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The sender lives.
    Ping,
    /// See [`super::plan::Plan`].
    Plan(Vec<u8>),
    /// See [`super::plan::Notice`].
    Notice(Vec<u8>),
    /// The leader ends the epoch, for this reason.
    End(String),
    /// A follower introduces itself.
    Join(Vec<u8>),
    /// The leader does not take it.
    Refuse(String),
    /// The group is complete.
    Welcome(Vec<u8>),
    /// A follower is connected to all others.
    Ready,
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Frame::Ping => 0,
            Frame::Plan(_) => 1,
            Frame::Notice(_) => 2,
            Frame::End(_) => 3,
            Frame::Join(_) => 4,
            Frame::Refuse(_) => 5,
            Frame::Welcome(_) => 6,
            Frame::Ready => 7,
        }
    }

    fn payload(&self) -> &[u8] {
        match self {
            Frame::Ping | Frame::Ready => &[],
            Frame::Plan(bytes) | Frame::Notice(bytes) | Frame::Join(bytes) | Frame::Welcome(bytes) => bytes,
            Frame::End(text) | Frame::Refuse(text) => text.as_bytes(),
        }
    }

    fn parse(kind: u8, payload: Vec<u8>) -> Result<Self, TpError> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(match kind {
            0 => Frame::Ping,
            1 => Frame::Plan(payload),
            2 => Frame::Notice(payload),
            3 => Frame::End(text(payload)),
            4 => Frame::Join(payload),
            5 => Frame::Refuse(text(payload)),
            6 => Frame::Welcome(payload),
            7 => Frame::Ready,
            _ => return Err(TpError::Protocol(format!("unknown frame {kind}"))),
        })
    }
}

/// The sending half of a link.
pub(super) struct Outgoing {
    stream: TcpStream,
    writer: Box<dyn Write + Send>,
    key: [u8; 32],
    sent: u64,
}

/// The receiving half of a link.
pub(super) struct Incoming {
    stream: TcpStream,
    reader: Box<dyn Read + Send>,
    key: [u8; 32],
    received: u64,
}

/// Both halves, before the link runs by itself.
pub(super) struct Halves {
    pub out: Outgoing,
    pub into: Incoming,
}

impl Halves {
    /// Over `duplex`, with one key for each direction.
    pub fn new(duplex: Duplex, out_key: [u8; 32], in_key: [u8; 32]) -> Result<Self, TpError> {
        let Duplex { stream, reader, writer } = duplex;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        let out = Outgoing { stream: stream.try_clone()?, writer, key: out_key, sent: 0 };
        Ok(Halves { out, into: Incoming { stream, reader, key: in_key, received: 0 } })
    }
}

impl Outgoing {
    /// This end's address.
    pub fn local_addr(&self) -> Result<SocketAddr, TpError> {
        Ok(self.stream.local_addr()?)
    }

    pub fn send(&mut self, frame: &Frame) -> Result<(), TpError> {
        let payload = frame.payload();
        if payload.len() > FRAME_BYTES_MAX {
            return Err(TpError::Protocol(format!(
                "frame of {} bytes, at most {FRAME_BYTES_MAX}",
                payload.len()
            )));
        }
        let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len());
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.push(frame.kind());
        let proof = proof(&self.key, &[&self.sent.to_le_bytes(), &[frame.kind()], payload]);
        bytes.extend_from_slice(&proof[..PROOF_BYTES]);
        bytes.extend_from_slice(payload);
        self.sent += 1;
        Ok(self.writer.write_all(&bytes)?)
    }
}

impl Incoming {
    /// The next frame. Errors when nothing comes for `silence`.
    pub fn receive(&mut self, silence: Duration) -> Result<Frame, TpError> {
        self.stream.set_read_timeout(Some(LOOK_EVERY))?;
        let mut head = [0; HEAD_BYTES];
        self.read(&mut head, silence)?;
        let [a, b, c, d, kind, theirs @ ..] = head;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(TpError::Protocol(format!("frame of {len} bytes, at most {FRAME_BYTES_MAX}")));
        }
        let mut payload = vec![0; len];
        self.read(&mut payload, silence)?;
        let ours = proof(&self.key, &[&self.received.to_le_bytes(), &[kind], &payload]);
        if !bool::from(ours[..PROOF_BYTES].ct_eq(&theirs)) {
            return Err(TpError::Protocol(format!("frame {} of the link is not proved", self.received)));
        }
        self.received += 1;
        Frame::parse(kind, payload)
    }

    fn read(&mut self, bytes: &mut [u8], silence: Duration) -> Result<(), TpError> {
        let (mut done, mut looks) = (0, Duration::ZERO);
        while done < bytes.len() {
            match self.reader.read(&mut bytes[done..]) {
                Ok(0) => return Err(TpError::Closed),
                Ok(count) => (done, looks) = (done + count, Duration::ZERO),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    looks += LOOK_EVERY;
                    if looks >= silence {
                        return Err(TpError::Silent { ms: silence.as_millis() as u64 });
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A running link: heartbeats are sent, what arrives is handed on. Dropping it closes the connection.
pub(super) struct Link {
    out: Arc<Mutex<Outgoing>>,
    stream: TcpStream,
    /// Dropped with the link: ends the heartbeat.
    _alive: SyncSender<()>,
}

impl Link {
    /// Calls `on` for every frame but heartbeats, on a thread of the link; an error is the last call.
    pub fn start(
        halves: Halves,
        mut on: impl FnMut(Result<Frame, TpError>) + Send + 'static,
    ) -> Result<Self, TpError> {
        let Halves { out, mut into } = halves;
        let stream = out.stream.try_clone()?;
        let out = Arc::new(Mutex::new(out));
        let (alive, ended) = sync_channel::<()>(0);
        let pings = out.clone();
        std::thread::Builder::new().name("tp-heartbeat".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(PING_EVERY) {
                let sent = pings.lock().unwrap_or_else(PoisonError::into_inner).send(&Frame::Ping);
                if sent.is_err() {
                    // The other end no longer listens: the reader says so, once.
                    return;
                }
            }
        })?;
        std::thread::Builder::new().name("tp-link".into()).spawn(move || {
            loop {
                match into.receive(SILENCE_MAX) {
                    Ok(Frame::Ping) => {}
                    Ok(frame) => on(Ok(frame)),
                    Err(error) => {
                        // What is being sent to a silent rank fails too, instead of waiting for it.
                        let _ = into.stream.shutdown(Shutdown::Both);
                        return on(Err(error));
                    }
                }
            }
        })?;
        Ok(Link { out, stream, _alive: alive })
    }

    pub fn send(&self, frame: &Frame) -> Result<(), TpError> {
        self.sender().send(frame)
    }

    /// Sends over this link as long as it lives.
    pub fn sender(&self) -> LinkSender {
        LinkSender(self.out.clone())
    }
}

/// Another handle for sending over a [`Link`].
pub(super) struct LinkSender(Arc<Mutex<Outgoing>>);

impl LinkSender {
    pub fn send(&self, frame: &Frame) -> Result<(), TpError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).send(frame)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // A connection that is gone already needs no closing.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::sync::mpsc::channel;

    fn duplex(stream: TcpStream) -> Duplex {
        let reader = Box::new(stream.try_clone().unwrap());
        Duplex { reader, writer: Box::new(stream.try_clone().unwrap()), stream }
    }

    fn pair(keys: [[u8; 32]; 2]) -> (Halves, Halves) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = duplex(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let far = duplex(listener.accept().unwrap().0);
        (Halves::new(near, [1; 32], [2; 32]).unwrap(), Halves::new(far, keys[0], keys[1]).unwrap())
    }

    #[test]
    fn frames_arrive_in_order_and_heartbeats_stay_below() {
        let (near, far) = pair([[2; 32], [1; 32]]);
        let (sender, frames) = channel();
        let near = Link::start(near, |_| {}).unwrap();
        let far =
            Link::start(far, move |frame| sender.send(frame.map_err(|e| e.to_string())).unwrap()).unwrap();
        let sent = [Frame::Plan(vec![1, 2]), Frame::Ready, Frame::End("enough".into())];
        for frame in &sent {
            near.send(frame).unwrap();
        }
        for frame in sent {
            assert_eq!(frames.recv().unwrap(), Ok(frame));
        }
        drop(near);
        assert_eq!(frames.recv().unwrap(), Err("the link was closed".into()));
        drop(far);
    }

    #[test]
    fn an_idle_link_stays_and_a_silent_one_is_lost() {
        let (near, far) = pair([[2; 32], [1; 32]]);
        let (sender, frames) = channel();
        let near = Link::start(near, |_| {}).unwrap();
        let _far =
            Link::start(far, move |frame| sender.send(frame.map_err(|e| e.to_string())).unwrap()).unwrap();
        // Longer than the silence that is allowed: only heartbeats keep it.
        assert!(frames.recv_timeout(SILENCE_MAX + PING_EVERY).is_err());
        // A stopped process: its lock is held, nothing is sent any more.
        let _stopped = near.out.lock().unwrap();
        assert_eq!(frames.recv().unwrap(), Err("silent for 1500 ms".into()));
    }

    #[test]
    fn frames_of_another_key_or_repeated_are_refused() {
        let (mut near, mut far) = pair([[2; 32], [9; 32]]);
        near.out.send(&Frame::Ready).unwrap();
        assert!(matches!(far.into.receive(SILENCE_MAX), Err(TpError::Protocol(_))));
        let (mut near, mut far) = pair([[2; 32], [1; 32]]);
        near.out.send(&Frame::Ready).unwrap();
        near.out.sent = 0;
        near.out.send(&Frame::Ready).unwrap();
        assert_eq!(far.into.receive(SILENCE_MAX).unwrap(), Frame::Ready);
        let error = far.into.receive(SILENCE_MAX).unwrap_err();
        assert_eq!(error.to_string(), "tensor-parallel link: frame 1 of the link is not proved");
    }
}
