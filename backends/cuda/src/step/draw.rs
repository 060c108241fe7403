//! Ids that steps draw: where they lie on the device for the next step, and how they come to the host.

use std::rc::Rc;

use backend::draw::Noise;
use backend::{BackendError, Draw, Drawn, Input};

use super::{CudaStep, Fetched, ROWS_MAX, padded};
use crate::act::CudaAct;
use crate::args::{DrawArgs, ResolveArgs};
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::nccl::Element;

/// Marks an id in flight, as `resolve` in `kernels/draw.cu` reads it.
const IN_FLIGHT: u32 = 1 << 31;
/// Words of a rule and of a choice in `kernels/draw.cu`.
const RULE_WORDS: usize = 7;
const CHOICE_WORDS: usize = 2;
/// Threads of a block that draws.
const DRAW_THREADS: u32 = 1024;

impl<D: Driver> CudaStep<'_, D> {
    /// The batch's token ids on the device.
    pub(super) fn ids(&self, count: usize) -> Result<Buffer<D>, BackendError> {
        let mut words = Vec::with_capacity(self.batch.ids.len());
        for input in &self.batch.ids {
            words.push(match *input {
                Input::Id(id) if (id as usize) < count => id,
                Input::Id(id) => {
                    return Err(BackendError::Device(format!("token {id} in an embedding table of {count}")));
                }
                Input::Drawn(row) => match &self.device.drawn {
                    Some((drew, _)) if drew.get(row as usize) == Some(&true) => row | IN_FLIGHT,
                    _ => {
                        let reason = format!("row {row} of the step before drew no token");
                        return Err(BackendError::Device(reason));
                    }
                },
            });
        }
        let inputs = self.device.pool.send(&words)?;
        let Some((_, drawn)) = self.device.drawn.as_ref().filter(|_| self.batch.in_flight()) else {
            return Ok(inputs);
        };
        if let Some(ranks) = &self.device.ranks {
            // The ids are rank 0's: the others add nothing. Places beyond them are nobody's, and make steps alike.
            let words = padded(self.device.drawn.as_ref().map_or(0, |(drew, _)| drew.len())) * CHOICE_WORDS;
            if ranks.rank() != 0 {
                self.device.queue().clear(drawn.address, words * 4)?;
            }
            ranks.sum(self.device, drawn.address, words, Element::U32)?;
        }
        let out = self.device.pool.take(words.len() * 4)?;
        let args = ResolveArgs {
            inputs: inputs.address,
            drawn: drawn.address,
            out: out.address,
            count: words.len() as u32,
        };
        self.device.each("resolve", 1, &args)?;
        Ok(out)
    }

    /// Queues the drawing of rows of logits.
    pub(super) fn draw(
        &mut self,
        act: &CudaAct<D>,
        draws: &[Draw],
    ) -> Result<Option<Drawing<D>>, BackendError> {
        if draws.len() != act.asked {
            return Err(BackendError::Device(format!(
                "{} draws for {} rows of logits",
                draws.len(),
                act.asked
            )));
        }
        let choices = self.choices(act.rows)?;
        let Some((logits, width)) = self.logits(act)? else {
            // Room for what rank 0 draws.
            self.device.drawn = Some((drew(draws), choices));
            return Ok(None);
        };
        let mut words = Vec::with_capacity(act.rows * RULE_WORDS);
        for draw in draws {
            match draw {
                Draw::Token(rule) if rule.is_greedy() => words.extend([1, 0, 0, 0, 0, 0, 0]),
                Draw::Token(rule) => {
                    let [low, high] = Noise::new(rule.seed, rule.position).keys;
                    let [temperature, top_p, min_p] =
                        [rule.temperature, rule.top_p, rule.min_p].map(f32::to_bits);
                    words.extend([2, low, high, temperature, rule.top_k, top_p, min_p]);
                }
                Draw::Logits => words.extend([0; RULE_WORDS]),
            }
        }
        words.resize(act.rows * RULE_WORDS, 0);
        let rules = self.device.pool.send(&words)?;
        let args = DrawArgs {
            logits: logits.address,
            rules: rules.address,
            out: choices.address,
            width: width as u32,
        };
        self.device.launch("draw_rows", [act.rows as u32, 1, 1], DRAW_THREADS, 0, &args)?;
        self.device.queue().finish()?;
        let logits = match draws.contains(&Draw::Logits) {
            true => Some(Fetched::of(self.device, logits.address, act.asked * width * 4)?),
            false => None,
        };
        let choices_fetched = Fetched::of(self.device, choices.address, draws.len() * CHOICE_WORDS * 4)?;
        self.device.drawn = Some((drew(draws), choices));
        Ok(Some(Drawing { draws: draws.to_vec(), width, logits, choices: choices_fetched }))
    }

    /// Room for what so many rows draw.
    fn choices(&mut self, rows: usize) -> Result<Rc<Buffer<D>>, BackendError> {
        let bytes = rows.next_power_of_two().max(ROWS_MAX) * CHOICE_WORDS * 4;
        match &self.device.choices {
            Some(choices) if choices.bytes() >= bytes => Ok(choices.clone()),
            _ => Ok(self.device.choices.insert(Rc::new(self.device.pool.take(bytes)?)).clone()),
        }
    }
}

/// Which rows drew an id.
fn drew(draws: &[Draw]) -> Vec<bool> {
    draws.iter().map(|draw| matches!(draw, Draw::Token(_))).collect()
}

/// Rows that are being drawn.
pub(super) struct Drawing<D: Driver> {
    draws: Vec<Draw>,
    width: usize,
    /// Of all rows, where the host gets some.
    logits: Option<Fetched<D>>,
    choices: Fetched<D>,
}

impl<D: Driver> Drawing<D> {
    /// Waits for them.
    pub(super) fn rows(&self) -> Result<Vec<Drawn>, BackendError> {
        let choices: Vec<u32> = self.choices.words()?.collect();
        let logits: Vec<f32> = match &self.logits {
            Some(logits) => logits.words()?.map(f32::from_bits).collect(),
            None => Vec::new(),
        };
        let row = |(at, draw): (usize, &Draw)| match draw {
            Draw::Logits => Drawn::Logits(logits[at * self.width..(at + 1) * self.width].to_vec()),
            Draw::Token(_) => match choices[at * CHOICE_WORDS..(at + 1) * CHOICE_WORDS] {
                [id, u32::MAX] => Drawn::Token(id),
                [_, id] => Drawn::NotFinite { id },
                _ => Drawn::NotFinite { id: 0 },
            },
        };
        Ok(self.draws.iter().enumerate().map(row).collect())
    }
}
