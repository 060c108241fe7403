//! What may go wrong in a simulated session, and how it does.

use kvtransfer::SessionError;
use kvtransfer::session::{Outcome, PairSpec};

use super::flow::{Flow, Source};
use super::{Rng, Sim, VecDeque};

/// What goes wrong, at one moment, on a connection or at an end drawn from the seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// The connection breaks at once; of what is under way so many bytes arrive.
    Cut(usize),
    /// The sender's end closes after what is under way: end of stream without Done.
    Eof,
    /// The next frame to the receiver comes twice.
    Duplicate,
    /// The next frame to the receiver is lost, the connection stays.
    Skip,
    /// One bit of the next frame to the receiver flips.
    CorruptUp,
    /// One bit of the next frame to the sender flips.
    CorruptDown,
    /// The receiver cancels.
    CancelReceiver,
    /// The sender cancels.
    CancelSender,
    /// Nothing passes any more in either direction, and neither end hears of it.
    Hang,
    /// The receiver reads a frame now and then only.
    Slow,
    /// The receiver's process is another one: its sessions are unknown.
    RestartReceiver,
    /// The sender's process is gone.
    RestartSender,
    /// A sender of another attempt connects beside the right one.
    Race,
}

impl Fault {
    /// One of them.
    pub fn draw(rng: &mut Rng) -> Self {
        match rng.below(14) {
            0..=2 => Fault::Cut(rng.below(2000)),
            3 => Fault::Eof,
            4 => Fault::Duplicate,
            5 => Fault::Skip,
            6 => Fault::CorruptUp,
            7 => Fault::CorruptDown,
            8 => Fault::CancelReceiver,
            9 => Fault::CancelSender,
            10 => Fault::Hang,
            11 => Fault::Slow,
            12 => match rng.below(2) {
                0 => Fault::RestartReceiver,
                _ => Fault::RestartSender,
            },
            _ => Fault::Race,
        }
    }

    /// Whether sessions survive it.
    pub fn harmless(self) -> bool {
        matches!(self, Fault::None | Fault::Cut(_) | Fault::Eof | Fault::Hang | Fault::Slow | Fault::Race)
    }
}

impl Sim<'_> {
    pub(super) fn break_something(&mut self, fault: Fault) {
        if self.links.is_empty() {
            return;
        }
        let at = self.rng.below(self.links.len());
        let bit = self.rng.next() as usize;
        let flip = |frame: Option<&mut Vec<u8>>| {
            if let Some(frame) = frame {
                let bit = bit % (frame.len() * 8);
                frame[bit / 8] ^= 1 << (bit % 8);
            }
        };
        let link = &mut self.links[at];
        let (flow, receiver) = (link.flow, self.flows[link.flow].receiver);
        match fault {
            Fault::None => {}
            Fault::Cut(bytes) => {
                link.cut.get_or_insert(bytes);
                link.down.clear();
                (link.up_closed, link.down_closed) = (true, link.down_closed);
                link.sending.lost("reset");
                self.look(at);
            }
            Fault::Eof => {
                link.sending.lost("closed here");
                self.look(at);
            }
            Fault::Duplicate => {
                if let Some(front) = link.up.front().cloned() {
                    link.up.push_front(front);
                }
            }
            Fault::Skip => drop(link.up.pop_front()),
            Fault::CorruptUp => flip(link.up.front_mut()),
            Fault::CorruptDown => flip(link.down.front_mut()),
            Fault::CancelReceiver => {
                let actions = self.nodes[receiver].receiving.fail(SessionError::Cancelled);
                self.act(receiver, actions);
            }
            Fault::CancelSender => {
                let sender = self.flows[flow].spec.sender;
                self.give_up(|flow| flow.spec.sender == sender, &SessionError::Cancelled);
            }
            Fault::Hang => {
                link.hung.get_or_insert(self.now);
                self.hung.get_or_insert(self.now);
            }
            Fault::Slow => link.slow = true,
            Fault::RestartReceiver => {
                let actions = self.nodes[receiver].receiving.fail(SessionError::Stopped);
                self.act(receiver, actions);
                self.nodes[receiver].restarted = true;
                for at in 0..self.links.len() {
                    if self.flows[self.links[at].flow].receiver == receiver {
                        self.links[at].down.clear();
                        self.lose(at, "restarted");
                    }
                }
            }
            Fault::RestartSender => {
                let sender = self.flows[flow].spec.sender;
                for at in 0..self.links.len() {
                    let link = &mut self.links[at];
                    if self.flows[link.flow].spec.sender == sender {
                        (link.owned, link.up_closed) = (false, true);
                    }
                }
                for flow in self.flows.iter_mut().filter(|flow| flow.spec.sender == sender) {
                    flow.end.get_or_insert(Outcome::Failed(SessionError::Stopped));
                }
            }
            Fault::Race => {
                let spec = &self.flows[flow].spec;
                let spec = PairSpec { attempt: spec.attempt + 1, ..spec.clone() };
                self.flows.push(Flow::new(spec, receiver, Source::Nothing, VecDeque::new(), None, 1));
            }
        }
    }
}
