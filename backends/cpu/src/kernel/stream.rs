//! Products of few rows by quantised panels: every weight is decoded in registers and used at once, so that weights
//! stream from memory as small as they are.

use super::ahead::{Ahead, next};
use super::codes::{Code, Cursor, Form, by_code, octet_of, scale_of};
use crate::lanes::{LANES, Lanes};

/// Few rows times some panels: as [`super::Sweep`] over what [`super::Decode`] gives, to the bit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream<'a> {
    pub(crate) form: &'a Form,
    pub(crate) panel: *const u8,
    /// Bytes from one panel to the next.
    pub(crate) panel_bytes: usize,
    pub(crate) panels: usize,
    /// As in [`super::Scaled`].
    pub(crate) soon: *const u8,
    pub(crate) octets: (usize, usize),
    /// `[rows][input]` from the first octet on, rows `x_stride` apart.
    pub(crate) x: *const f32,
    pub(crate) x_stride: usize,
    /// Any number; up to [`Stream::ROWS`] share each decoded weight.
    pub(crate) rows: usize,
    /// `[rows][panels * 16]`, rows `acc_stride` apart.
    pub(crate) acc: *mut f32,
    pub(crate) acc_stride: usize,
    /// Begin at zero instead of what `acc` holds.
    pub(crate) fresh: bool,
}

impl Stream<'_> {
    /// Rows that share a decoded weight.
    pub(crate) const ROWS: usize = 4;
}

/// Runs a stream.
///
/// # Safety
/// Pointers are valid for what the fields say, and the level's instructions exist.
#[inline(always)]
pub(super) unsafe fn stream<V: Lanes>(s: &Stream<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, stream_as<V>(s)) }
}

#[inline(always)]
unsafe fn stream_as<V: Lanes, const CODE: usize>(s: &Stream<'_>) {
    let mut row = 0;
    // SAFETY: rows and panels stay within the stream.
    unsafe {
        while row + 4 <= s.rows {
            rows::<V, CODE, 4>(s, row);
            row += 4;
        }
        while row + 2 <= s.rows {
            rows::<V, CODE, 2>(s, row);
            row += 2;
        }
        while row < s.rows {
            rows::<V, CODE, 1>(s, row);
            row += 1;
        }
    }
}

/// All panels for rows `[row, row + R)`: several at once where registers allow, so that enough sums are in flight.
#[inline(always)]
unsafe fn rows<V: Lanes, const CODE: usize, const R: usize>(s: &Stream<'_>, row: usize) {
    let mut panel = 0;
    // SAFETY: as above.
    unsafe {
        if const { R <= 2 && V::REGISTERS >= 24 } {
            while panel + 4 <= s.panels {
                stream_tile::<V, CODE, R, 4>(s, row, panel);
                panel += 4;
            }
        }
        if const { V::REGISTERS >= 24 || R == 1 } {
            while panel + 2 <= s.panels {
                stream_tile::<V, CODE, R, 2>(s, row, panel);
                panel += 2;
            }
        }
        while panel < s.panels {
            stream_tile::<V, CODE, R, 1>(s, row, panel);
            panel += 1;
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, scales and addresses alike
unsafe fn stream_tile<V: Lanes, const CODE: usize, const R: usize, const P: usize>(
    s: &Stream<'_>,
    row: usize,
    panel: usize,
) {
    let (chunk_bytes, scale_bytes) = (s.form.chunk_bytes(), s.form.scale_bytes());
    let mut cursor = Cursor::new(s.form, s.octets.0);
    let mut left = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and inputs, acc the rows and panels.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let next = next::<P>(s.panel_bytes, first, s.panels - panel, s.soon);
        let mut x = s.x.add(row * s.x_stride);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[V::splat(0.0); P]; R];
        if !s.fresh {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = V::load(out.add(r * s.acc_stride + p * LANES));
                }
            }
        }
        while left > 0 {
            let count = cursor.count(left);
            let base = first.add(cursor.base);
            let ahead = Ahead::of::<P>(s.panel_bytes, next, cursor.base);
            if cursor.at == 0 {
                ahead.ask_scales::<V, P>(s.panel_bytes, base, scale_bytes);
            }
            let mut scales = [(V::splat(0.0), V::splat(0.0)); P];
            for p in 0..P {
                scales[p] = scale_of::<V>(s.form, base.add(p * s.panel_bytes), cursor.at_group);
            }
            for octet in cursor.at..cursor.at + count {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                ahead.ask_octet::<V, CODE, P>(s.panel_bytes, chunk, octet % 4);
                for p in 0..P {
                    let chunk = chunk.add(p * s.panel_bytes);
                    let values = octet_of::<V, CODE>(chunk, octet % 4);
                    let (scale, offset) = scales[p];
                    // Inputs of several rows are read again for every panel: as common values they would be spilled.
                    let x = if R > 1 { std::hint::black_box(x) } else { x };
                    for k in 0..8 {
                        let weight = offset.madd(values[k], scale);
                        for r in 0..R {
                            acc[r][p] = acc[r][p].madd(V::splat(*x.add(r * s.x_stride + k)), weight);
                        }
                    }
                }
                x = x.add(8);
            }
            cursor.pass(s.form, count);
            left -= count;
        }
        for r in 0..R {
            for p in 0..P {
                acc[r][p].store(out.add(r * s.acc_stride + p * LANES));
            }
        }
    }
}
