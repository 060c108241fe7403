//! A receiver of a simulated session: what [`kvtransfer::Receiver`] does with threads.

use backend::{KvLanding, Piece, Sharding};
use kvtransfer::frame::{Head, Kind};
use kvtransfer::limits::HEADER_BYTES;
use kvtransfer::message::Message;
use kvtransfer::session::{Action, Handshake, Receiving, parse};
use kvtransfer::{SessionError, Summary};

use super::{MemLanding, Sim};

/// One rank.
pub(super) struct Node {
    pub(super) receiving: Receiving,
    pub(super) landing: MemLanding,
    pub(super) end: Option<Result<Summary, SessionError>>,
    /// Its process is another one.
    pub(super) restarted: bool,
}

impl Sim<'_> {
    pub(super) fn deliver_up(&mut self, at: usize) -> bool {
        let link = &mut self.links[at];
        if link.hung.is_some() || link.shut || link.slow && self.rng.below(32) > 0 && link.cut.is_none() {
            return false;
        }
        let Some(mut frame) = link.up.pop_front() else {
            if link.up_closed {
                self.lose(at, "closed");
                return true;
            }
            return false;
        };
        let mut whole = true;
        if let Some(left) = &mut link.cut {
            whole = frame.len() <= *left;
            frame.truncate(*left);
            *left -= frame.len();
        }
        if link.down_closed {
            return true; // the receiver reads and forgets
        }
        if !whole {
            self.part(at, &frame);
            self.lose(at, "cut");
            return true;
        }
        let actions = match self.receive(at, &frame) {
            Ok(actions) => actions,
            Err(error) => {
                // A connection that proved nothing fails alone; one that did takes its session along.
                let receiver = self.flows[self.links[at].flow].receiver;
                let proven =
                    self.links[at].handshake.is_none() && self.nodes[receiver].receiving.has(at as u64);
                let mut actions = Vec::new();
                if proven {
                    actions = self.nodes[receiver].receiving.fail(error.clone());
                }
                actions.push(Action::Close(at as u64, error));
                actions
            }
        };
        self.act(self.flows[self.links[at].flow].receiver, actions);
        true
    }

    /// A part of a frame has come, and no more will: a socket read puts it in place before it knows.
    fn part(&mut self, at: usize, part: &[u8]) {
        let node = &mut self.nodes[self.flows[self.links[at].flow].receiver];
        let Some((head, payload)) = part.split_first_chunk::<HEADER_BYTES>() else { return };
        let Ok(head) = Head::decode(head) else { return };
        if head.kind != Kind::Data || node.restarted {
            return;
        }
        if let Ok(piece) = node.receiving.data(at as u64, &head, self.now) {
            assert!(node.end.is_none(), "a session that is over takes data");
            let mut torn = payload.to_vec();
            torn.resize(head.payload_bytes as usize, 0xa5);
            node.landing.write(&piece, &torn).expect("a place");
        }
    }

    /// The receiver's end of a connection is over.
    pub(super) fn lose(&mut self, at: usize, reason: &str) {
        let link = &mut self.links[at];
        (link.shut, link.down_closed, link.up_closed) = (true, true, true);
        link.up.clear();
        let receiver = self.flows[link.flow].receiver;
        let actions = self.nodes[receiver].receiving.lost(at as u64, reason, self.now);
        self.act(receiver, actions);
    }

    fn receive(&mut self, at: usize, frame: &[u8]) -> Result<Vec<Action>, SessionError> {
        let conn = at as u64;
        let link = &mut self.links[at];
        let receiver = self.flows[link.flow].receiver;
        let node = &mut self.nodes[receiver];
        let (head, payload) = frame.split_first_chunk().expect("a whole head");
        let head = Head::decode(head)?;
        if head.payload_bytes as usize != payload.len() {
            return Err(SessionError::Protocol("out of step".into()));
        }
        if node.restarted {
            return Err(SessionError::Unknown(self.setup.case.session));
        }
        let crc = crc32c::crc32c(payload);
        if head.kind == Kind::Data {
            return Ok(match node.receiving.data(conn, &head, self.now) {
                // In place, before the checksum is known: what a socket read does.
                Ok(piece) => {
                    assert!(node.end.is_none(), "a session that is over takes data");
                    node.landing.write(&piece, payload).expect("a place");
                    let result = head.check_payload(crc).map_err(SessionError::from);
                    let pass = result.is_ok() && node.receiving.relays() && !node.receiving.is_peer(conn);
                    let actions = node.receiving.payload(conn, result, self.now);
                    if pass {
                        self.pass(receiver, &piece);
                    }
                    actions
                }
                Err(actions) => actions,
            });
        }
        match parse(&head, payload, crc)? {
            Message::Hello(hello) => {
                let mut nonce = [0; 32];
                nonce[..8].copy_from_slice(&self.rng.next().to_le_bytes());
                let (handshake, challenge) = Handshake::begin(*hello, node.receiving.ticket(), nonce);
                link.handshake = Some(handshake);
                Ok(vec![Action::Send(conn, challenge)])
            }
            Message::Proof { proof } => {
                let handshake = link.handshake.take().ok_or(SessionError::Protocol("no hello".into()))?;
                node.receiving.prove(conn, &handshake, &proof, self.now).or_else(|rejected| {
                    let mut actions = rejected.actions;
                    actions.push(Action::Close(conn, rejected.error));
                    Ok(actions)
                })
            }
            other => Ok(node.receiving.message(conn, &head, other, self.now)),
        }
    }

    /// Queues what `rank` has landed for the other ranks, if it is its to pass on.
    fn pass(&mut self, rank: usize, piece: &Piece) {
        let plane = &self.nodes[rank].landing.cache.spec.planes[piece.plane];
        let (replicated, token_bytes) = (plane.sharding == Sharding::Replicated, plane.token_bytes());
        for flow in self.flows.iter_mut().filter(|flow| replicated && flow.relays(rank)) {
            flow.queue.push_back((piece.clone(), token_bytes));
        }
    }

    pub(super) fn act(&mut self, receiver: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(conn, message) => self.links[conn as usize].answer(&message),
                Action::Close(conn, error) => {
                    let link = &mut self.links[conn as usize];
                    if !link.down_closed {
                        link.answer(&Message::fail(error.code(), &error.to_string()));
                        link.down_closed = true;
                    }
                }
                Action::Drop(conn) => self.lose(conn as usize, "another connection came"),
                Action::Relayed(close) => {
                    self.flows
                        .iter_mut()
                        .filter(|flow| flow.relays(receiver))
                        .for_each(|flow| flow.close = Some(close));
                }
                Action::End(result) => {
                    if result.is_err() {
                        self.give_up(|flow| flow.relays(receiver), &SessionError::Cancelled);
                    }
                    let end = &mut self.nodes[receiver].end;
                    assert!(end.is_none(), "ended twice");
                    *end = Some(result);
                }
            }
        }
    }
}
