//! The sums of one span of positions: scores, softmax weights, weighted V.

use std::ops::Range;

use backend::DType;

use super::{Attention, Planes, QUERIES_CUT, Rows, SPAN, Unit};
use crate::kernel::{Layout, Pairs, Softmax, Soon, Sums, Sweep};
use crate::lanes::LANES;

/// Keys that nobody has asked for before ([`Attention::soon`]) are asked for so many positions ahead.
const AHEAD: usize = 64;

impl Attention<'_> {
    /// Where `group` sees each of `positions` in a plane.
    fn addresses(
        &self,
        run: &Rows<'_>,
        plane: usize,
        group: usize,
        positions: Range<usize>,
        out: &mut [*const u8],
    ) {
        let (row, block) = (self.slab.spec.planes[plane].token_bytes(), self.slab.block_tokens as usize);
        let mut position = positions.start;
        while position < positions.end {
            let first = self.place(run, plane, position, group).cast_const();
            let count = (block - (position & (block - 1))).min(positions.end - position);
            for (at, out) in out[position - positions.start..][..count].iter_mut().enumerate() {
                *out = first.wrapping_add(at * row);
            }
            position += count;
        }
    }

    /// Words of 4 bytes of a key.
    fn key_words(&self) -> usize {
        self.planes.keys().iter().map(|plane| self.slab.spec.planes[*plane].head_bytes() / 4).sum()
    }

    /// The sums of one span: scores, weights, weighted V.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn span(
        &self,
        unit: &Unit,
        span: usize,
        q: *const f32,
        k_turned: *mut f32,
        v_padded: *mut f32,
        scores: *mut f32,
        sums: Sums,
    ) {
        let run = &self.runs[unit.run];
        let queries = unit.rows.len() * self.group();
        let base = span * SPAN;
        // [low, high): what any of the rows attends to, as offsets in the span
        let low = self.first(run.start + unit.rows.start).saturating_sub(base);
        let high = (run.start + unit.rows.end - base).min(SPAN);
        let (first_panel, panels) = (self.turn(low) / LANES, high.div_ceil(LANES));
        // SAFETY: positions [base + low, base + high) are readable; scratch parts have their full sizes.
        unsafe {
            // K of 16 positions a panel, K-major; positions behind the last are stood in for by the last.
            let to = k_turned.cast::<u32>().add(first_panel * self.key_words() * LANES);
            // Behind this span the next one's first keys are asked for.
            let last = (run.start + unit.rows.end).min(base + SPAN + AHEAD);
            let asked = self.pairs.is_none() && span > unit.spans.start && self.soon(unit, 0, base).is_some();
            let mut before = 0;
            for plane in self.planes.keys() {
                let mut keys = [std::ptr::null(); SPAN + AHEAD];
                self.addresses(run, *plane, unit.group, base + low..last, &mut keys[low..]);
                let words = self.slab.spec.planes[*plane].head_bytes() / 4;
                for panel in first_panel..panels {
                    let rows = std::array::from_fn(|lane| keys[(panel * LANES + lane).clamp(low, high - 1)]);
                    let soon =
                        (panel * LANES + AHEAD).max(low)..((panel + 1) * LANES + AHEAD).min(last - base);
                    let to = to.add(((panel - first_panel) * self.key_words() + before) * LANES);
                    (self.kernels.transpose)(
                        &rows,
                        words,
                        to,
                        keys.get(soon).filter(|_| !asked).unwrap_or(&[]),
                    );
                }
                before += words;
            }
            match self.pairs {
                Some(_) if self.in_place(unit).is_some() => {}
                Some(kernels) => self.pair_values(&kernels, unit, base, low..high, v_padded),
                None if !self.value_dim.is_multiple_of(LANES) => {
                    self.pad_values(unit, base, low..high, v_padded);
                }
                None => {}
            }
            self.clear(&sums, queries);
            let mut query = 0;
            while query < queries {
                let (first, last) = (self.within(unit, span, query), self.within(unit, span, queries - 1));
                // All rows see the same positions: one piece. Else a mask passes through: a few rows at a time.
                let count = if first == last { queries - query } else { QUERIES_CUT };
                let of = query..queries.min(query + count);
                self.piece(unit, span, of.clone(), q, k_turned, v_padded, scores, sums);
                query = of.end;
            }
        }
    }

    /// The sums of some query rows over one span.
    #[allow(clippy::too_many_arguments)]
    unsafe fn piece(
        &self,
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        q: *const f32,
        k_turned: *const f32,
        v_padded: *mut f32,
        scores: *mut f32,
        sums: Sums,
    ) {
        let present = || of.clone().map(|query| self.within(unit, span, query)).filter(|own| !own.is_empty());
        let Some(low) = present().map(|range| range.start).min() else { return };
        let high = present().map(|range| range.end).max().unwrap_or(low);
        let (first, panels) = (self.turn(low) / LANES, high.div_ceil(LANES));
        let panel_stride = self.key_dim * LANES;
        let acc = scores.wrapping_add(of.start * SPAN + first * LANES);
        let w = k_turned.cast::<u8>().wrapping_add(first * panel_stride * self.dtype(0).bytes());
        // SAFETY: panels [first, panels) are turned; scores has a line of 256 floats per query row.
        unsafe {
            match self.pairs {
                Some(kernels) => (kernels.multiply)(&Pairs {
                    x: q.add(of.start * self.key_dim).cast(),
                    // A row of pairs begins where one of floats would.
                    x_stride: self.key_dim,
                    rows: of.len(),
                    w: w.cast(),
                    panel_stride,
                    panels: panels - first,
                    pairs: self.key_dim / 2,
                    acc,
                    acc_stride: SPAN,
                    fresh: true,
                }),
                None => (self.kernels.sweep)(&Sweep {
                    x: q.add(of.start * self.key_dim),
                    x_stride: self.key_dim,
                    rows: of.len(),
                    layout: if self.dtype(0) == DType::F32 { Layout::F32 } else { Layout::Bf16Pairs },
                    w,
                    panel_stride,
                    k_stride: LANES,
                    panels: panels - first,
                    k: self.key_dim,
                    acc,
                    acc_stride: SPAN,
                    fresh: true,
                    soon: self.soon_of_keys(unit, span * SPAN + first * LANES),
                }),
            }
            for query in of.clone() {
                let (line, own) = (scores.add(query * SPAN), self.within(unit, span, query));
                let softmax = Softmax { scores: line, touched: self.turn(low)..high, own, scale: self.scale };
                (*sums.peak.add(query), *sums.total.add(query)) = (self.kernels.softmax)(&softmax);
                if self.pairs.is_some() {
                    let (from, count) = (first * LANES, (panels - first) * LANES);
                    (self.kernels.narrow)(line.add(from), line.cast::<u16>().add(from), count);
                }
            }
            // All rows sum all of these positions in ascending order. What a row does not attend to has a weight of zero, which
            // changes no sum of its own.
            match self.pairs {
                Some(kernels) => self.weigh(&kernels, unit, span, of, low..high, v_padded, scores, sums),
                None => self.values(unit, span, of, low..high, v_padded, scores, sums),
            }
        }
    }

    /// Adds weight times V of positions `range` (offsets in the span) for some query rows, in ascending position.
    #[allow(clippy::too_many_arguments)]
    unsafe fn values(
        &self,
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        range: Range<usize>,
        v_padded: *const f32,
        scores: *const f32,
        sums: Sums,
    ) {
        let run = &self.runs[unit.run];
        let pad = !self.value_dim.is_multiple_of(LANES);
        let plane = self.planes.values();
        let row = self.slab.spec.planes[plane].token_bytes() / self.dtype(plane).bytes();
        let mut from = range.start;
        while from < range.end {
            let (layout, w, k_stride, count) = if pad {
                let w = v_padded.wrapping_add(from * self.padded_dim()).cast();
                (Layout::F32, w, self.padded_dim(), range.end - from)
            } else {
                let layout = if self.dtype(plane) == DType::F32 { Layout::F32 } else { Layout::Bf16 };
                let w = self.place(run, plane, span * SPAN + from, unit.group).cast_const();
                let count = self.adjacent(run, span * SPAN + from).min(range.end - from);
                (layout, w, row, count)
            };
            // SAFETY: `count` positions follow each other at `w`; rows of scores and sums are those of the unit.
            unsafe {
                (self.kernels.sweep)(&Sweep {
                    x: scores.add(of.start * SPAN + from),
                    x_stride: SPAN,
                    rows: of.len(),
                    layout,
                    w,
                    panel_stride: LANES,
                    k_stride,
                    panels: self.padded_dim() / LANES,
                    k: count,
                    acc: sums.value.add(of.start * self.padded_dim()),
                    acc_stride: self.padded_dim(),
                    fresh: false,
                    soon: self.soon_of_values(unit, span * SPAN + from),
                });
            }
            from += count;
        }
    }

    /// What lies in a plane from `position` on, for as much of a span as the unit's rows attend to, if it is in one piece.
    fn soon(&self, unit: &Unit, plane: usize, position: usize) -> Option<Soon> {
        let (run, spec) = (&self.runs[unit.run], &self.slab.spec.planes[plane]);
        let end = (run.start + unit.rows.end).min(unit.spans.end * SPAN);
        let count = SPAN.min(end.saturating_sub(position));
        let lines = spec.head_bytes() / 64;
        let some = lines.is_power_of_two() && count > 0 && self.adjacent(run, position) >= count;
        some.then(|| Soon {
            at: self.place(run, plane, position, unit.group),
            lines: lines.ilog2(),
            row: spec.token_bytes(),
        })
    }

    /// What is asked for while keys are multiplied: the values of these positions, or, where keys have them, what comes next.
    fn soon_of_keys(&self, unit: &Unit, position: usize) -> Option<Soon> {
        match self.planes {
            Planes::Heads => self.soon(unit, self.planes.values(), position),
            Planes::Latent => self.soon(unit, self.planes.values(), position + SPAN),
        }
    }

    /// What is asked for while values are: the keys of the next span.
    fn soon_of_values(&self, unit: &Unit, position: usize) -> Option<Soon> {
        (self.planes == Planes::Heads).then(|| self.soon(unit, 0, position + SPAN)).flatten()
    }

    /// Positions from `position` on that lie in memory one after the other.
    pub(super) fn adjacent(&self, run: &Rows<'_>, position: usize) -> usize {
        let block_tokens = self.slab.block_tokens as usize;
        let mut block = position / block_tokens;
        while block + 1 < run.table.len() && run.table[block + 1] == run.table[block] + 1 {
            block += 1;
            if (block + 1) * block_tokens - position >= SPAN {
                break;
            }
        }
        (block + 1) * block_tokens - position
    }

    /// V of a head whose size is not a multiple of 16, as f32 in padded rows.
    unsafe fn pad_values(&self, unit: &Unit, base: usize, range: Range<usize>, out: *mut f32) {
        let (run, plane) = (&self.runs[unit.run], self.planes.values());
        for offset in range {
            let place = self.place(run, plane, base + offset, unit.group);
            // SAFETY: a value has value_dim elements; out has a padded row per position of the span.
            unsafe {
                let row = out.add(offset * self.padded_dim());
                std::ptr::write_bytes(row, 0, self.padded_dim());
                for at in 0..self.value_dim {
                    *row.add(at) = match self.dtype(plane) {
                        DType::F32 => *place.cast::<f32>().add(at),
                        _ => f32::from_bits(u32::from(*place.cast::<u16>().add(at)) << 16),
                    };
                }
            }
        }
    }
}
