//! From codes to numbers: panels of quantised weights as [`crate::coded`] packs them, decoded to f32 lines of 16 outputs.

use backend::CodeTable;

use crate::lanes::{E2M1, E4M3_FACTOR, IQ4, LANES, Lanes};

/// How a panel's codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// 2 to 6 bits, in planes; see [`crate::coded`].
    Planes(usize),
    /// Four bits in planes, which stand for values.
    Table(CodeTable),
    /// Unsigned bytes, eight inputs in the order of [`super::ORDER`].
    Bytes,
    /// E4M3 bytes.
    E4m3,
}

/// How a group's scale is stored, 16 lanes side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scale {
    /// IEEE halves.
    F16(Zero),
    /// bf16.
    Bf16(Zero),
    /// f32.
    F32(Zero),
    /// Halves `d` and `dmin` for 256 inputs, then six bits of scale and of minimum for each of 8 groups: `d s q - dmin m`. See
    /// [`Lanes::load_six`]: the scales come first.
    Minima,
    /// Halves `d` and `dmin` for 256 inputs, then a byte per group, scale below minimum: `d s q - dmin m`.
    Fours,
    /// Halves `d` for 256 inputs, then a signed byte of scale per group: `d s (q - zero)`, of this code of zero.
    Signed(u8),
}

/// Groups of a block of [`Scale::Minima`].
pub(crate) const MINIMA_GROUPS: usize = 8;

/// What is added to `code * scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Zero {
    /// `-zero * scale`: the code of zero.
    Code(f32),
    /// A bias, stored behind the scale as the scale is.
    Bias,
}

impl Scale {
    /// Bytes before the first group's.
    pub(crate) const fn first(self) -> usize {
        match self {
            Scale::Minima | Scale::Fours | Scale::Signed(_) => 64,
            _ => 0,
        }
    }

    /// Whether groups have whole numbers as scales.
    pub(super) const fn is_whole(self) -> bool {
        matches!(self, Scale::Minima | Scale::Fours | Scale::Signed(_))
    }

    /// Bytes of a group; of minima, which lie together, what each has of them.
    pub(crate) const fn stride(self) -> usize {
        match self {
            Scale::Minima => 3 * 64 / MINIMA_GROUPS,
            Scale::F16(Zero::Code(_)) | Scale::Bf16(Zero::Code(_)) => 32,
            Scale::F16(Zero::Bias) | Scale::Bf16(Zero::Bias) | Scale::F32(Zero::Code(_)) => 64,
            Scale::F32(Zero::Bias) => 128,
            Scale::Fours | Scale::Signed(_) => 16,
        }
    }
}

/// How products of codes and inputs as whole numbers add up before they are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Units {
    /// Inputs whose products make one whole number: they share a factor.
    pub(crate) unit: usize,
    /// Inputs of a group, some groups to a unit.
    pub(crate) part: usize,
    /// Whether the unit's groups have scales that are whole numbers.
    pub(crate) scales: bool,
    /// The code of zero, where codes count from there.
    pub(crate) zero: i32,
    /// Whether groups have offsets, by which sums of inputs are multiplied.
    pub(crate) offsets: bool,
    /// Whole numbers of inputs are less than 2 to this.
    pub(crate) bits: u32,
}

impl Units {
    /// Groups of a unit. Both are powers of two, which spares divisions where units are small.
    pub(crate) const fn parts(&self) -> usize {
        self.unit >> self.part.trailing_zeros()
    }

    /// Octets of a group, as a power of two.
    pub(super) const fn part_shift(&self) -> u32 {
        self.part.trailing_zeros() - 3
    }

    /// Words that a unit of a row has: the factor (f32), in the first not a number where one of the row's inputs is none; then for each group
    /// the sum of its inputs, as f32, or, where codes have a zero, that many times the sum of the whole numbers, negated.
    pub(crate) const fn words(&self) -> usize {
        1 + self.parts()
    }
}

/// The layout of a panel: blocks of `span` inputs, each the scales of its groups and then the codes, 32 inputs after 32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Form {
    pub(crate) code: Code,
    pub(crate) scale: Scale,
    /// Inputs that share a scale, a multiple of 8.
    pub(crate) group: usize,
    /// Inputs of a block, a multiple of `group` and of 32.
    pub(crate) span: usize,
}

impl Form {
    /// Whether codes are whole numbers.
    pub(crate) const fn is_whole(&self) -> bool {
        !matches!(self.code, Code::E4m3)
    }

    /// Inputs at whose multiples a matrix is cut without being stored in another form.
    const fn cut(&self) -> usize {
        if self.scale.is_whole() { self.span } else { self.group }
    }

    /// How products with inputs as whole numbers add up, in sums of `inputs` inputs (of a range, which all ranks have alike).
    pub(crate) fn units(&self, inputs: usize) -> Units {
        // What 16 bits have beside a sign.
        const BITS_MAX: u32 = 15;
        let plain = Units {
            unit: self.group,
            part: self.group,
            scales: false,
            zero: 0,
            offsets: false,
            bits: BITS_MAX,
        };
        if !self.is_whole() {
            return plain;
        }
        if !inputs.is_multiple_of(self.cut()) {
            // A rank's part may be stored with offsets where the whole matrix is not, and gives the same sums.
            return Units { offsets: true, ..plain };
        }
        let code = self.code.constant();
        let units = match self.scale {
            Scale::F16(zero) | Scale::Bf16(zero) | Scale::F32(zero) => match zero {
                Zero::Code(zero) => Units { zero: zero as i32, ..plain },
                Zero::Bias => Units { offsets: true, ..plain },
            },
            Scale::Minima | Scale::Fours => {
                Units { unit: unit_groups(code) * self.group, scales: true, offsets: true, ..plain }
            }
            Scale::Signed(zero) => {
                let unit = unit_groups(code) * self.group;
                Units { unit, scales: true, zero: zero.into(), ..plain }
            }
        };
        let codes = match self.code {
            Code::Planes(bits) => (1 << bits) - 1,
            Code::Table(CodeTable::E2m1) => 31,
            _ => 255,
        };
        // The largest that a code comes to, and products of a unit must fit into 32 bits with their sign.
        let largest = match (self.scale, self.code) {
            (Scale::Minima, _) => codes * 63,
            (Scale::Fours, _) => codes * 15,
            // Codes may be as far from their zero as that itself, scales have eight bits or six.
            (Scale::Signed(zero), Code::Planes(6)) => u32::from(zero) * 128,
            (Scale::Signed(zero), _) => u32::from(zero) * 32,
            _ => codes,
        };
        let room = (1u32 << 31) / (largest * units.unit as u32);
        Units { bits: room.ilog2().min(BITS_MAX), ..units }
    }

    /// Bytes of the codes of 32 inputs.
    pub(crate) const fn chunk_bytes(&self) -> usize {
        match self.code {
            Code::Planes(bits) => bits * 64,
            Code::Table(_) => 4 * 64,
            Code::Bytes | Code::E4m3 => 512,
        }
    }

    /// Bytes of a block's scales, whole cache lines.
    pub(crate) const fn scale_bytes(&self) -> usize {
        (self.scale.first() + self.span / self.group * self.scale.stride()).next_multiple_of(64)
    }

    /// Bytes of a block.
    pub(crate) const fn block_bytes(&self) -> usize {
        self.scale_bytes() + self.span / 32 * self.chunk_bytes()
    }
}

/// The form of a code, of those whose groups have whole numbers as scales.
pub(super) const fn scaled_form(code: usize) -> Form {
    let (scale, group) = match code {
        2 => (Scale::Fours, 16),
        3 => (Scale::Signed(4), 16),
        6 => (Scale::Signed(32), 16),
        IQ4 => (Scale::Signed(CodeTable::Iq4.zero()), 32),
        _ => (Scale::Minima, 32),
    };
    let code = if code == IQ4 { Code::Table(CodeTable::Iq4) } else { Code::Planes(code) };
    Form { code, scale, group, span: 256 }
}

/// Groups of a unit of such a form, so many that inputs are left 13 bits or more; a block's at most.
pub(super) const fn unit_groups(code: usize) -> usize {
    match code {
        2 | 3 => 16,
        4 => 8,
        IQ4 => 2,
        _ => 4,
    }
}

/// Inputs `[octets.0 * 8, octets.1 * 8)` of one panel to `out[input][16]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decode<'a> {
    pub(crate) form: &'a Form,
    pub(crate) panel: *const u8,
    pub(crate) octets: (usize, usize),
    pub(crate) out: *mut f32,
}

/// Calls a function with [`Code`] as a constant behind its type, if it has one: `by_code!(form.code, f<V>(x))` is one of
/// `f::<V, CODE>(x)`.
macro_rules! by_code {
    ($code:expr, $f:ident $(<$lanes:ty>)? ($argument:expr)) => {
        match $code {
            Code::Planes(2) => $f::<$($lanes,)? 2>($argument),
            Code::Planes(3) => $f::<$($lanes,)? 3>($argument),
            Code::Planes(4) => $f::<$($lanes,)? 4>($argument),
            Code::Planes(5) => $f::<$($lanes,)? 5>($argument),
            Code::Planes(_) => $f::<$($lanes,)? 6>($argument),
            Code::Table(backend::CodeTable::Iq4) => $f::<$($lanes,)? { $crate::lanes::IQ4 }>($argument),
            Code::Table(backend::CodeTable::E2m1) => $f::<$($lanes,)? { $crate::lanes::E2M1 }>($argument),
            Code::Bytes => $f::<$($lanes,)? { $crate::kernel::codes::BYTES }>($argument),
            Code::E4m3 => $f::<$($lanes,)? { $crate::kernel::codes::E4M3 }>($argument),
        }
    };
}
pub(super) use by_code;

/// [`Code`] as a constant: the bits of planes, [`IQ4`], [`E2M1`], or these.
pub(super) const BYTES: usize = 8;
pub(super) const E4M3: usize = 9;

impl Code {
    const fn constant(self) -> usize {
        match self {
            Code::Planes(bits) => bits,
            Code::Table(CodeTable::Iq4) => IQ4,
            Code::Table(CodeTable::E2m1) => E2M1,
            Code::Bytes => BYTES,
            Code::E4m3 => E4M3,
        }
    }
}

/// Bits of a code in planes; 0 where it has none.
pub(super) const fn plane_bits(code: usize) -> usize {
    match code {
        2..=6 => code,
        IQ4 | E2M1 => 4,
        _ => 0,
    }
}

/// Runs a decode.
///
/// # Safety
/// Pointers are valid for what the fields say, and the level's instructions exist.
#[inline(always)]
pub(super) unsafe fn decode<V: Lanes>(d: &Decode<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(d.form.code, decode_as<V>(d)) }
}

/// Where a panel is read: groups follow each other, then blocks.
#[derive(Clone, Copy)]
pub(super) struct Cursor {
    /// Octets of a block, and of a group.
    block: usize,
    group: usize,
    /// Bytes from the first panel's start to this block.
    pub(super) base: usize,
    /// Group and octet within the block.
    pub(super) at_group: usize,
    pub(super) at: usize,
}

impl Cursor {
    #[inline(always)]
    pub(super) fn new(form: &Form, octet: usize) -> Self {
        Cursor::by(form, form.group, octet)
    }

    /// By groups of so many inputs, which divide blocks.
    #[inline(always)]
    pub(super) fn by(form: &Form, inputs: usize, octet: usize) -> Self {
        let (block, group) = (form.span / 8, inputs / 8);
        let (base, at) = (octet / block * form.block_bytes(), octet % block);
        Cursor { block, group, base, at_group: at / group, at }
    }

    /// Octets of this group from here on, at most `left`.
    #[inline(always)]
    pub(super) fn count(&self, left: usize) -> usize {
        left.min((self.at_group + 1) * self.group - self.at)
    }

    /// Past `count` octets of this group.
    #[inline(always)]
    pub(super) fn pass(&mut self, form: &Form, count: usize) {
        self.at += count;
        self.at_group += 1;
        if self.at == self.block {
            self.base += form.block_bytes();
            (self.at, self.at_group) = (0, 0);
        }
    }
}

/// Bytes that are asked for ahead of use.
const AHEAD_BYTES: usize = 1024;

/// Starts bringing what lies behind octet `octet` of the chunk at `codes`.
#[inline(always)]
pub(super) unsafe fn ahead<V: Lanes>(codes: *const u8, octet_bytes: usize, octet: usize) {
    let at = codes.wrapping_add(AHEAD_BYTES + octet * octet_bytes);
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        V::prefetch(at);
        if octet_bytes > 64 {
            V::prefetch(at.wrapping_add(64));
        }
    }
}

#[inline(always)]
unsafe fn decode_as<V: Lanes, const CODE: usize>(d: &Decode<'_>) {
    let (chunk_bytes, scale_bytes) = (d.form.chunk_bytes(), d.form.scale_bytes());
    let mut cursor = Cursor::new(d.form, d.octets.0);
    let mut left = d.octets.1 - d.octets.0;
    let mut out = d.out;
    while left > 0 {
        let count = cursor.count(left);
        // SAFETY: the panel has this block, and the block this group; `out` has room for all octets.
        unsafe {
            let base = d.panel.add(cursor.base);
            let (scale, offset) = scale_of::<V>(d.form, base, cursor.at_group);
            for octet in cursor.at..cursor.at + count {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                ahead::<V>(chunk, chunk_bytes / 4, octet % 4);
                let values = octet_of::<V, CODE>(chunk, octet % 4);
                for (k, value) in values.into_iter().enumerate() {
                    offset.madd(value, scale).store(out.add(k * LANES));
                }
                out = out.add(8 * LANES);
            }
        }
        cursor.pass(d.form, count);
        left -= count;
    }
}

/// Scale of a group and what is added.
#[inline(always)]
pub(super) unsafe fn scale_of<V: Lanes>(form: &Form, block: *const u8, group: usize) -> (V, V) {
    // SAFETY: the caller's block has this group.
    unsafe {
        let at = block.add(form.scale.first() + group * form.scale.stride());
        match form.scale {
            Scale::F16(Zero::Code(zero)) => from_zero(V::load_f16(at.cast()), zero),
            Scale::Bf16(Zero::Code(zero)) => from_zero(V::load_bf16(at.cast()), zero),
            Scale::F32(Zero::Code(zero)) => from_zero(V::load(at.cast()), zero),
            Scale::F16(Zero::Bias) => (V::load_f16(at.cast()), V::load_f16(at.add(32).cast())),
            Scale::Bf16(Zero::Bias) => (V::load_bf16(at.cast()), V::load_bf16(at.add(32).cast())),
            Scale::F32(Zero::Bias) => (V::load(at.cast()), V::load(at.add(64).cast())),
            Scale::Minima => {
                let (d, least) = (V::load_f16(block.cast()), V::load_f16(block.add(32).cast()));
                let six = block.add(form.scale.first());
                let minimum = least.mul(V::load_six(six, MINIMA_GROUPS + group));
                (d.mul(V::load_six(six, group)), V::splat(0.0).sub(minimum))
            }
            Scale::Fours => {
                let (d, least) = (V::load_f16(block.cast()), V::load_f16(block.add(32).cast()));
                let minimum = least.mul(V::load_four::<true>(at));
                (d.mul(V::load_four::<false>(at)), V::splat(0.0).sub(minimum))
            }
            Scale::Signed(zero) => from_zero(V::load_f16(block.cast()).mul(V::load_i8(at)), zero.into()),
        }
    }
}

/// The minimum of group `group` of a block whose groups have whole numbers as scales.
#[inline(always)]
pub(super) unsafe fn minimum_of<V: Lanes, const CODE: usize>(block: *const u8, group: usize) -> V {
    // SAFETY: the caller's block has this group.
    unsafe {
        let scales = block.add(const { scaled_form(CODE).scale.first() });
        match const { scaled_form(CODE).scale } {
            Scale::Fours => V::load_four::<true>(scales.add(group * const { Scale::Fours.stride() })),
            _ => V::load_six(scales, MINIMA_GROUPS + group),
        }
    }
}

/// What the whole number of group `group`'s unit is scaled by: the scale that its groups' whole numbers leave, or the group's.
#[inline(always)]
pub(super) unsafe fn unit_scale<V: Lanes>(form: &Form, block: *const u8, group: usize, units: &Units) -> V {
    // SAFETY: the caller's block has this group.
    unsafe {
        match units.scales {
            true => V::load_f16(block.cast()),
            false => scale_of::<V>(form, block, group).0,
        }
    }
}

/// A scale with `-zero * scale`: exact, as zeros are powers of two.
#[inline(always)]
unsafe fn from_zero<V: Lanes>(scale: V, zero: f32) -> (V, V) {
    // SAFETY: register arithmetic of this level.
    unsafe { (scale, scale.mul(V::splat(-zero))) }
}

/// The codes of 8 inputs as numbers.
#[inline(always)]
pub(super) unsafe fn octet_of<V: Lanes, const CODE: usize>(chunk: *const u8, octet: usize) -> [V; 8] {
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        let line = |k: usize| chunk.add((octet * 8 + k) * LANES);
        match CODE {
            // See [`super::bytes::ORDER`].
            BYTES => [
                V::load_u8(line(0)),
                V::load_u8(line(2)),
                V::load_u8(line(4)),
                V::load_u8(line(6)),
                V::load_u8(line(1)),
                V::load_u8(line(3)),
                V::load_u8(line(5)),
                V::load_u8(line(7)),
            ],
            E4M3 => [
                V::load_e4m3(line(0)),
                V::load_e4m3(line(1)),
                V::load_e4m3(line(2)),
                V::load_e4m3(line(3)),
                V::load_e4m3(line(4)),
                V::load_e4m3(line(5)),
                V::load_e4m3(line(6)),
                V::load_e4m3(line(7)),
            ],
            _ => V::codes::<CODE>(chunk, octet),
        }
    }
}

/// What an E4M3 scale is stored times, so that [`Lanes::load_e4m3`] comes out right.
pub(crate) const E4M3_SCALE: f32 = 1.0 / E4M3_FACTOR;
