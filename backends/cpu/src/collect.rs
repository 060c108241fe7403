//! Where a step meets the other ranks: sums joined over the group, logits gathered on rank 0, drawn ids told by it.

use backend::draw::drawn;
use backend::{BackendError, Draw, Drawn, Output};

use crate::act::{CpuAct, Raw};
use crate::memory::Floats;
use crate::step::CpuStep;

/// Logits per row that one rank may announce: more than any model's, so a broken peer cannot ask for all memory.
const VOCABULARY_MAX: usize = 1 << 24;

/// Looking at a logit takes about as long as so many multiply-adds.
const WORK: usize = 16;

/// In place of an id where a row drew none.
const NO_ID: u32 = u32::MAX;

impl CpuStep<'_> {
    /// Joins partial sums over the group, rank by rank as a tree.
    pub(crate) fn join(&mut self, x: &mut CpuAct) -> Result<(), BackendError> {
        let (rank, world, len) = (self.device.peers.rank(), self.device.peers.world(), x.floats.len());
        let mut theirs: Vec<Floats> =
            (0..world).map(|peer| self.device.arena.floats(if peer == rank { 0 } else { len })).collect();
        {
            let mut places: Vec<&mut [u8]> = theirs.iter_mut().map(Floats::as_bytes_mut).collect();
            self.device.peers.exchange(x.floats.as_bytes(), &mut places)?;
        }
        let sums: Vec<Raw> = theirs
            .iter_mut()
            .enumerate()
            .map(|(peer, floats)| Raw(if peer == rank { x.floats.as_mut_ptr() } else { floats.as_mut_ptr() }))
            .collect();
        let (kernels, width) = (self.device.kernels, x.width);
        self.each_row(x.rows, width * world, |row| {
            let mut apart = 1;
            while apart < world {
                for low in (0..world - apart).step_by(apart * 2) {
                    // SAFETY: every rank's sums have this row; each row is one task's.
                    unsafe {
                        (kernels.add)(
                            sums[low].row(row, width),
                            sums[low + apart].row(row, width),
                            width,
                            false,
                        )
                    };
                }
                apart *= 2;
            }
        });
        if rank != 0 {
            x.floats.as_mut_slice().copy_from_slice(theirs[0].as_slice());
        }
        Ok(())
    }

    /// The batch's token ids. Those in flight are known on rank 0, which tells them when a step first asks: steps whose
    /// ids are known to everybody, which is all where nobody runs ahead, cost nothing. The list is the device's: see [`crate::lists`].
    pub(crate) fn ids(&mut self) -> Result<Vec<u32>, BackendError> {
        let peers = &mut self.device.peers;
        if self.batch.in_flight() && peers.world() > 1 {
            let mut bytes: Vec<u8> =
                self.device.drawn.iter().flat_map(|id| id.unwrap_or(NO_ID).to_le_bytes()).collect();
            if peers.rank() == 0 {
                peers.tell(&bytes)?;
            } else {
                peers.hear(&mut bytes)?;
                let (ids, _) = bytes.as_chunks();
                let ids = ids.iter().map(|id| Some(u32::from_le_bytes(*id)).filter(|id| *id != NO_ID));
                self.device.drawn = ids.collect();
            }
        }
        let mut ids = std::mem::take(&mut self.device.lists.ids);
        self.batch.resolve(&self.device.drawn, &mut ids).map_err(BackendError::Device)?;
        Ok(ids)
    }

    /// What becomes of each row of logits, on rank 0.
    pub(crate) fn draw(&mut self, x: CpuAct, draws: &[Draw]) -> Result<Output<CpuAct>, BackendError> {
        if draws.len() != x.rows {
            let reason = format!("{} draws for {} rows of logits", draws.len(), x.rows);
            self.device.peers.leave(&reason);
            return Err(BackendError::Device(reason));
        }
        self.device.drawn.clear();
        self.device.drawn.resize(draws.len(), None);
        let alone = self.device.peers.world() == 1;
        let gathered;
        let logits = if alone {
            x.floats.as_slice()
        } else {
            match self.gather(x)? {
                Some(logits) => gathered = logits,
                None => return Ok(Output::Nothing),
            }
            &gathered
        };
        let width = logits.len() / draws.len().max(1);
        let mut rows = vec![Drawn::Token(0); draws.len()];
        self.device.pool.each(&mut rows, logits.len() * WORK, |at, row| {
            *row = drawn(&logits[at * width..][..width], &draws[at]);
        });
        self.device.drawn.clear();
        self.device.drawn.extend(rows.iter().map(|row| match row {
            Drawn::Token(id) => Some(*id),
            Drawn::NotFinite { .. } => Some(0),
            Drawn::Logits(_) => None,
        }));
        Ok(Output::Drawn(rows))
    }

    /// All ranks' logits side by side, on rank 0; nothing on the others.
    pub(crate) fn gather(&mut self, x: CpuAct) -> Result<Option<Vec<f32>>, BackendError> {
        let peers = &mut self.device.peers;
        let world = peers.world();
        if world == 1 {
            return Ok(Some(x.floats.as_slice().to_vec()));
        }
        if peers.rank() != 0 {
            peers.give(&(x.width as u64).to_le_bytes())?;
            peers.give(x.floats.as_bytes())?;
            return Ok(None);
        }
        let mut widths = vec![[0u8; 8]; world];
        peers.take(
            widths.iter_mut().enumerate().skip(1).map(|(peer, bytes)| (peer, &mut bytes[..])).collect(),
        )?;
        let widths: Vec<usize> = std::iter::once(x.width)
            .chain(widths[1..].iter().map(|bytes| u64::from_le_bytes(*bytes) as usize))
            .collect();
        if let Some(peer) = widths.iter().position(|width| *width > VOCABULARY_MAX) {
            let reason = format!("logits of {} tokens from rank {peer}", widths[peer]);
            peers.leave(&reason);
            return Err(BackendError::Group { rank: peer, reason });
        }
        let mut theirs: Vec<Floats> =
            widths.iter().map(|width| self.device.arena.floats(x.rows * width)).collect();
        let places =
            theirs.iter_mut().enumerate().skip(1).map(|(peer, floats)| (peer, floats.as_bytes_mut()));
        peers.take(places.collect())?;
        theirs[0] = x.floats;
        let mut logits = Vec::with_capacity(x.rows * widths.iter().sum::<usize>());
        for row in 0..x.rows {
            for (floats, width) in theirs.iter().zip(&widths) {
                logits.extend_from_slice(&floats.as_slice()[row * width..(row + 1) * width]);
            }
        }
        Ok(Some(logits))
    }
}
