//! Who may bring a session: connections present their proofs, and what they say they bring is what is expected. Pure.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{Action, ConnId, Pair, Receiving, Rejected, State};
use crate::SessionError;
use crate::layout::describe;
use crate::limits::{LANES_MAX, PEER_BASE};
use crate::message::{Hello, Message};
use crate::session::handshake::Handshake;
use crate::session::lane::Lane;

impl Receiving {
    /// A connection presents its proof. An error concerns the connection alone, not the session.
    pub fn prove(
        &mut self,
        conn: ConnId,
        handshake: &Handshake,
        proof: &[u8; 32],
        now: Instant,
    ) -> Result<Vec<Action>, Rejected> {
        let hello = &handshake.hello;
        let name = || format!("sender rank {}", hello.sender);
        if !handshake.proves(&self.expect.ticket, proof) {
            return Err(SessionError::Proof(name()).into());
        }
        if let State::Failed(_) = self.state {
            return Err(SessionError::Unknown(self.expect.session).into());
        }
        self.same(hello)?;
        if self.landed() {
            return self.repeat(conn, hello);
        }
        if hello.lane >= LANES_MAX {
            return Err(SessionError::Busy { what: "lanes", max: LANES_MAX.into() }.into());
        }
        if let Some(pair) = self.pairs.get(&hello.sender) {
            if hello.bytes != pair.total_bytes {
                return Err(
                    stale("number of bytes", hello.bytes.to_string(), pair.total_bytes.to_string()).into()
                );
            }
            if let Some(lane) = pair.lanes.get(&hello.lane) {
                if hello.connection <= lane.connection {
                    return Err(SessionError::Protocol(format!("{} is connected already", name())).into());
                }
                if let Some(old) = lane.conn {
                    // Its thread may be reading into the landing: the new one comes back when it has let go.
                    let error = SessionError::Busy { what: "connections of a lane", max: 1 };
                    return Err(Rejected { error, actions: vec![Action::Drop(old)] });
                }
            }
        } else {
            let announced =
                self.pairs.values().map(|pair| pair.total_bytes).fold(hello.bytes, u64::saturating_add);
            if announced > self.coverage.wanted_bytes() {
                let got = announced.to_string();
                return Err(stale("number of bytes", got, self.coverage.wanted_bytes().to_string()).into());
            }
        }
        self.state = State::Receiving;
        if hello.sender < PEER_BASE {
            self.senders = hello.senders.clone();
        }
        self.first_pair.get_or_insert(now);
        let pair = self
            .pairs
            .entry(hello.sender)
            .or_insert_with(|| Pair { total_bytes: hello.bytes, lanes: BTreeMap::new() });
        if let Some(lane) = pair.lanes.get_mut(&hello.lane) {
            lane.resume(conn, hello.connection, now);
            self.resumed += 1;
        }
        let lane = pair.lanes.entry(hello.lane).or_insert_with(|| Lane::new(conn, hello.connection, now));
        lane.grant(self.window_bytes, pair.total_bytes);
        Ok(vec![Action::Send(conn, lane.credit(self.frame_bytes))])
    }

    /// A sender whose connection was lost before it had heard the acknowledgement hears it again.
    fn repeat(&mut self, conn: ConnId, hello: &Hello) -> Result<Vec<Action>, Rejected> {
        let frame_bytes = self.frame_bytes;
        let pair = self.pairs.get_mut(&hello.sender);
        match pair.and_then(|pair| pair.lanes.get_mut(&hello.lane)) {
            Some(lane) if hello.connection > lane.connection => {
                (lane.conn, lane.connection) = (Some(conn), hello.connection);
                let ack = Message::Ack { bytes: lane.received_bytes };
                Ok(vec![Action::Send(conn, lane.credit(frame_bytes)), Action::Send(conn, ack)])
            }
            _ => Err(SessionError::Unknown(self.expect.session).into()),
        }
    }

    /// Whether the sender means this very session.
    fn same(&self, hello: &Hello) -> Result<(), SessionError> {
        let expect = &self.expect;
        let text = |range: &std::ops::Range<u32>| format!("{}..{}", range.start, range.end);
        let pairs = [
            ("request", hello.request.clone(), expect.request.clone()),
            ("attempt", hello.attempt.to_string(), expect.attempt.to_string()),
            ("epoch", hello.epoch.to_string(), expect.epoch.to_string()),
            ("token range", text(&hello.tokens), text(&expect.tokens)),
            ("cache", hello.spec.clone(), describe(&expect.spec)),
        ];
        for (what, got, want) in pairs {
            if got != want {
                return Err(stale(what, got, want));
            }
        }
        if hello.sender >= PEER_BASE && hello.senders == [hello.sender] && self.peers.contains(&hello.sender)
        {
            return Ok(());
        }
        let ascending = hello.senders.windows(2).all(|pair| pair[0] < pair[1]);
        let strange = hello.senders.last().is_none_or(|last| *last >= PEER_BASE);
        if !ascending || strange || !hello.senders.contains(&hello.sender) {
            return Err(SessionError::Protocol(format!(
                "sender rank {} of {:?}",
                hello.sender, hello.senders
            )));
        }
        if !self.senders.is_empty() && hello.senders != self.senders {
            return Err(stale(
                "list of senders",
                format!("{:?}", hello.senders),
                format!("{:?}", self.senders),
            ));
        }
        Ok(())
    }
}

fn stale(what: &'static str, got: String, want: String) -> SessionError {
    SessionError::Stale { what, got, want }
}
