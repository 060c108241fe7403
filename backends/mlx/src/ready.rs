//! A step's attention, prepared when its first layer asks: calls (see `plan`) with their indices and masks on the device, the
//! same for all layers. Used by `attend` and `latent`.

use std::ops::Range;

use mlx_rs::{Array, ops};

use crate::graph::{Failure, Recorded, first, indices, int};
use crate::plan::{Call, Sight};

/// The attention of a step.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) calls: Vec<Ready>,
    /// Position of each row: `[rows]`, or `[1]` for all.
    pub(crate) positions: Array,
    /// Where each row of the batch is among the calls' rows; `None`: there already.
    order: Option<Array>,
    /// Per window that a layer asked for, what each call sees.
    sights: Vec<(Option<u32>, Vec<Seen>)>,
}

/// A call with its indices on the device.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) call: Call,
    /// Its rows, in its order.
    rows: Pick,
    /// A row for every slot.
    spread: Pick,
    /// Of all slots' results those of rows; `None`: all.
    held: Option<Array>,
    /// Where its rows are written.
    pub(crate) put: Put,
}

/// Rows of an array.
#[derive(Debug)]
enum Pick {
    /// One after the other.
    Run(Range<usize>),
    /// Any: `[n]`.
    Rows(Array),
}

/// Where the rows of a call are written.
#[derive(Debug)]
pub(crate) enum Put {
    /// One after the other, to these tokens of one slot.
    Run(Range<usize>),
    /// To this token of every slot.
    Column(usize),
    /// Each to its own; both `[n, 1]`.
    Each { slots: Array, positions: Array },
}

/// What a call sees of its keys.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) keys: Range<usize>,
    pub(crate) mask: Sighted,
}

#[derive(Debug)]
pub(crate) enum Sighted {
    All,
    Causal,
    /// `[rows, keys]` of a chunk, `[slots, 1, 1, keys]` of tokens: true where seen.
    Mask(Array),
}

impl Attention {
    pub(crate) fn new(calls: Vec<Call>) -> Self {
        let rows: Vec<usize> = calls.iter().flat_map(Call::rows).collect();
        let mut positions = vec![0; rows.len()];
        let mut order = vec![0; rows.len()];
        let all = calls.iter().flat_map(Call::positions);
        for (at, (row, position)) in rows.iter().zip(all).enumerate() {
            positions[*row] = position as usize;
            order[*row] = at;
        }
        let flat = |values: Vec<usize>| {
            let shape = [int(values.len())];
            indices(values, &shape)
        };
        let sorted = rows.is_sorted();
        if level(&positions) {
            positions.truncate(1);
        }
        Attention {
            calls: calls.into_iter().map(Ready::new).collect(),
            positions: flat(positions),
            order: (!sorted).then(|| flat(order)),
            sights: Vec::new(),
        }
    }

    /// Works out what calls see through `window`, once.
    pub(crate) fn look(&mut self, window: Option<u32>) -> Result<(), Failure> {
        if self.sights.iter().all(|(known, _)| *known != window) {
            let seen = self.calls.iter().map(|ready| Seen::new(&ready.call, window));
            let seen = seen.collect::<Result<_, _>>()?;
            self.sights.push((window, seen));
        }
        Ok(())
    }

    /// What each call sees through `window`, which was looked through before.
    pub(crate) fn seen(&self, window: Option<u32>) -> &[Seen] {
        self.sights.iter().find(|(known, _)| *known == window).map_or(&[], |(_, seen)| seen)
    }

    /// The calls' results, `[rows of the call, width]` each, in the order of the batch.
    pub(crate) fn in_order(&self, mut outs: Vec<Array>) -> Recorded {
        let out = match outs.len() {
            1 => outs.swap_remove(0),
            _ => ops::concatenate(&outs, 0)?,
        };
        match &self.order {
            Some(order) => Ok(out.take_axis(order, 0)?),
            None => Ok(out),
        }
    }
}

impl Ready {
    fn new(call: Call) -> Self {
        match &call {
            Call::Chunk { rows, start, .. } => {
                let start = *start as usize;
                let (own, put) = (|| Pick::Run(rows.clone()), Put::Run(start..start + rows.len()));
                Ready { rows: own(), spread: own(), held: None, put, call }
            }
            Call::Tokens { slots, held, rows, positions, .. } => {
                let n = int(rows.len());
                let whole = held.len() == slots.len();
                let spread: Vec<usize> = call.spread().into_iter().map(|at| rows[at.unwrap_or(0)]).collect();
                let positions: Vec<usize> = positions.iter().map(|position| *position as usize).collect();
                let put = if level(&positions) && whole {
                    Put::Column(positions[0])
                } else {
                    let slots = indices(held.iter().copied(), &[n, 1]);
                    Put::Each { slots, positions: indices(positions, &[n, 1]) }
                };
                let of_rows = || indices(held.iter().map(|slot| slot - slots.start), &[n]);
                Ready {
                    rows: Pick::new(rows),
                    spread: Pick::new(&spread),
                    held: (!whole).then(of_rows),
                    put,
                    call,
                }
            }
        }
    }

    /// The slots of its bank.
    pub(crate) fn slots(&self) -> (usize, Range<usize>) {
        match &self.call {
            Call::Tokens { bank, slots, .. } => (*bank, slots.clone()),
            Call::Chunk { place, .. } => (place.bank, place.slot..place.slot + 1),
        }
    }

    /// This call's rows of `[rows, heads, dim]`, as attention takes them: `[n, heads, rows of each, dim]`.
    pub(crate) fn rows_of(&self, x: &Array) -> Recorded {
        self.turned(self.spread.of(x)?)
    }

    /// The same as the cache takes them: `[n, heads, tokens of each, dim]`.
    pub(crate) fn written(&self, x: &Array) -> Recorded {
        self.turned(self.rows.of(x)?)
    }

    fn turned(&self, x: Array) -> Recorded {
        match self.call {
            Call::Chunk { .. } => Ok(x.transpose_axes(&[1, 0, 2])?.expand_dims(0)?),
            Call::Tokens { .. } => Ok(x.expand_dims(2)?),
        }
    }

    /// Of the attention's results, `[rows of all slots, width]`, those that were asked for.
    pub(crate) fn held(&self, out: Array) -> Recorded {
        match &self.held {
            Some(held) => Ok(out.take_axis(held, 0)?),
            None => Ok(out),
        }
    }
}

impl Pick {
    fn new(rows: &[usize]) -> Self {
        match rows {
            [first, ..] if rows.iter().copied().eq(*first..*first + rows.len()) => {
                Pick::Run(*first..*first + rows.len())
            }
            _ => Pick::Rows(indices(rows.iter().copied(), &[int(rows.len())])),
        }
    }

    /// Those rows of `x`, a view where it can be.
    fn of(&self, x: &Array) -> Recorded {
        match self {
            Pick::Run(run) if *run == (0..x.dim(0) as usize) => Ok(x.clone()),
            Pick::Run(run) => first(x, run.clone()),
            Pick::Rows(rows) => Ok(x.take_axis(rows, 0)?),
        }
    }
}

impl Seen {
    fn new(call: &Call, window: Option<u32>) -> Result<Self, Failure> {
        let (keys, sight) = call.sight(window);
        let keys = keys.start as usize..keys.end as usize;
        let mask = match sight {
            Sight::All => Sighted::All,
            Sight::Causal => Sighted::Causal,
            Sight::Masked => Sighted::Mask(mask(call, &keys, window)?),
        };
        Ok(Seen { keys, mask })
    }

    /// The same as an explicit mask; `None`: all keys are seen.
    pub(crate) fn mask(&self, call: &Call) -> Result<Option<Array>, Failure> {
        match &self.mask {
            Sighted::All => Ok(None),
            Sighted::Causal => mask(call, &self.keys, None).map(Some),
            Sighted::Mask(mask) => Ok(Some(mask.clone())),
        }
    }
}

/// True where a row sees a key.
fn mask(call: &Call, keys: &Range<usize>, window: Option<u32>) -> Recorded {
    let known = call.positions();
    // A slot without a row sees one key: the least that attention takes.
    let position = |row: Option<usize>| row.map_or(keys.start as u32, |row| known[row]);
    let positions: Vec<u32> = call.spread().into_iter().map(position).collect();
    let rows = int(positions.len());
    let shape = if matches!(call, Call::Tokens { .. }) { vec![rows, 1, 1, 1] } else { vec![rows, 1] };
    let at = indices(positions.into_iter().map(|position| position as usize), &shape);
    let key = ops::arange::<i32, i32>(int(keys.start), int(keys.end), 1)?;
    let seen = key.le(&at)?;
    let Some(window) = window else { return Ok(seen) };
    let hidden = at.subtract(Array::from_int(int(window as usize)))?;
    Ok(seen.logical_and(key.gt(&hidden)?)?)
}

/// Whether all are the same.
fn level(positions: &[usize]) -> bool {
    positions.windows(2).all(|pair| pair[0] == pair[1])
}
