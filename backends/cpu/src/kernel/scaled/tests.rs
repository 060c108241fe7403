//! Rows and ranges have the bits that each has alone, at every level.

use std::ops::Range;

use backend::CodeTable;

use super::super::codes::{Form, Scale, Zero};
use super::super::tiles::model::Tiles;
use super::super::{CodedPairs, Decode, Kernels};
use super::{Code, LANES, Scaled, WholeInputs, by_code, by_tiles, bytes_vnni};
use crate::level::Level;
use crate::memory::Memory;

const OCTETS: usize = 160;
const PANELS: usize = 5;
const ROWS: usize = 97;

/// Levels that multiply codes of a form as they are.
fn each(check: impl Fn(&'static Kernels, unsafe fn(&Scaled<'_>), Form, String)) {
    for level in Level::ALL.into_iter().filter(|level| level.available()) {
        let kernels = level.kernels();
        for form in forms() {
            let halves = match kernels.pairs.map(|pairs| pairs.coded) {
                Some(CodedPairs::Scaled(product)) => Some(product),
                _ => None,
            };
            let whole = kernels.whole.map(|whole| whole.product);
            if let Some(product) = if form.is_whole() { whole } else { halves } {
                check(kernels, product, form, format!("{level}, {form:?}"));
            }
        }
    }
}

/// A row's bits are those that it has alone, however many rows tiles share codes with, and where parts of K begin and
/// end within groups and chunks.
#[test]
fn rows_do_not_depend_on_each_other() {
    each(|kernels, kernel, form, name| {
        for octets in [(0, OCTETS), (8, OCTETS - 4), (3, OCTETS - 5)] {
            let alone: Vec<u32> =
                (0..ROWS).flat_map(|row| product(kernels, kernel, &form, octets, 1, row..row + 1)).collect();
            for rows in (2..=34).chain([45, 86, 96, ROWS]) {
                let together = product(kernels, kernel, &form, octets, 1, 0..rows);
                assert!(together == alone[..together.len()], "{name}, octets {octets:?}, {rows} rows");
            }
        }
    });
}

/// Ranges that are summed at once have the sums that each has by itself, wherever they begin and end.
#[test]
fn ranges_do_not_depend_on_each_other() {
    each(|kernels, kernel, form, name| {
        // Of whole blocks, of neither.
        for (first, each, ranges) in [(0, 32, 5), (0, OCTETS / 8, 8), (3, 19, 8)] {
            for rows in 1..=Scaled::ROWS_RANGES {
                let alone: Vec<u32> = (0..ranges)
                    .map(|range| (first + range * each, first + (range + 1) * each))
                    .flat_map(|octets| product(kernels, kernel, &form, octets, 1, 0..rows))
                    .collect();
                let together = product(kernels, kernel, &form, (first, first + each), ranges, 0..rows);
                assert!(
                    together == alone,
                    "{name}, {ranges} ranges of {each} octets from {first} on, {rows} rows"
                );
            }
        }
    });
}

/// Sums are those of the numbers that codes stand for, also where codes, scales and inputs are as large as they can be and of one
/// sign: no whole number is too large for its 32 bits.
#[test]
fn the_largest_numbers_add_up() {
    each(|kernels, kernel, form, name| {
        // The largest scales and the smallest, of the bits that a form has.
        let scales: &[u8] = match (form.scale, form.code) {
            (Scale::Signed(_), Code::Planes(6)) => &[0x80, 0x7f],
            (Scale::Signed(_), _) => &[0xe0, 0x1f],
            (Scale::Minima | Scale::Fours, _) => &[0xff],
            _ => &[0x3f],
        };
        // E4M3 is not a number with all bits.
        let codes: &[u8] = if form.is_whole() { &[0, 0xff] } else { &[0x7e] };
        let cases = scales.iter().flat_map(|scale| codes.iter().map(move |code| (*scale, *code)));
        for ((scale, code), sign) in cases.flat_map(|case| [(case, 1.0), (case, -1.0)]) {
            // What comes first are halves of `d`, no infinity.
            let (factors, scales) = (form.scale.first(), form.scale_bytes());
            let weights = weights(&form, |at| match at % panel_bytes(&form) % form.block_bytes() {
                within if within < factors => 0x35,
                within if within < scales => scale,
                _ => code,
            });
            let input = |at: usize| sign * if at.is_multiple_of(7) { 1.9921875 } else { 1.984375 };
            let rows = 13;
            let got = product_of(kernels, kernel, &form, &weights, input, (0, OCTETS), 1, 0..rows);
            let mut lines = vec![0f32; OCTETS * 8 * LANES];
            let out = lines.as_mut_ptr();
            // SAFETY: the panel has these octets, and `lines` room for them.
            unsafe {
                (kernels.decode)(&Decode { form: &form, panel: weights.at(0), octets: (0, OCTETS), out });
            }
            for row in 0..rows {
                let products = lines.iter().step_by(LANES).enumerate();
                let want: f64 =
                    products.map(|(k, w)| f64::from(*w) * f64::from(input(row * OCTETS * 8 + k))).sum();
                let got = f64::from(f32::from_bits(got[row * PANELS * LANES]));
                let case = format!("{name}, scales {scale:#x}, codes {code:#x}");
                assert!((got - want).abs() <= want.abs() * 1e-5, "{case}: {got} for {want}");
            }
        }
    });
}

/// Tiles of bytes give the sums of pairs of whole numbers, to the bit: any rows, tiles that are filled and that are not, parts of K
/// that begin and end within units, and ranges one after the other.
#[test]
fn tiles_have_the_same_sums() {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
    unsafe fn modelled(s: &Scaled<'_>) {
        // SAFETY: the caller's.
        unsafe { by_code!(s.form.code, by_tiles<Tiles>((&mut Tiles::new(), s))) }
    }
    if !Level::Avx512Vnni.available() {
        println!("this machine has no {}: not tested", Level::Avx512Vnni);
        return;
    }
    let kernels = Level::Avx512Vnni.kernels();
    let few = kernels.whole.unwrap().product;
    for form in forms().into_iter().filter(Form::is_whole) {
        for (octets, ranges) in [((0, OCTETS), 1), ((8, OCTETS - 4), 1), ((3, OCTETS - 5), 1), ((3, 22), 8)] {
            for rows in [7, 9, 16, 17, 31, 34] {
                let tiles = product(kernels, modelled, &form, octets, ranges, 0..rows);
                let want: Vec<u32> = (0..ranges)
                    .map(|range| range * (octets.1 - octets.0))
                    .map(|behind| (octets.0 + behind, octets.1 + behind))
                    .flat_map(|octets| product(kernels, few, &form, octets, 1, 0..rows))
                    .collect();
                assert!(tiles == want, "{form:?}, {ranges} of octets {octets:?}, {rows} rows");
            }
        }
    }
}

fn forms() -> [Form; 14] {
    let form = |code, scale, group, span| Form { code, scale, group, span };
    [
        form(Code::Planes(4), Scale::Minima, 32, 256),
        form(Code::Planes(5), Scale::Minima, 32, 256),
        form(Code::Planes(6), Scale::Signed(32), 16, 256),
        form(Code::Planes(2), Scale::Fours, 16, 256),
        form(Code::Planes(3), Scale::Signed(4), 16, 256),
        form(Code::Table(CodeTable::Iq4), Scale::Signed(128), 32, 256),
        form(Code::Table(CodeTable::Iq4), Scale::F16(Zero::Code(128.0)), 32, 64),
        form(Code::Table(CodeTable::E2m1), Scale::F32(Zero::Code(16.0)), 16, 32),
        form(Code::Planes(6), Scale::F16(Zero::Bias), 64, 64),
        form(Code::Planes(5), Scale::F16(Zero::Code(16.0)), 32, 64),
        form(Code::Planes(3), Scale::F32(Zero::Bias), 8, 32),
        form(Code::Planes(2), Scale::Bf16(Zero::Bias), 128, 128),
        form(Code::Bytes, Scale::F16(Zero::Code(128.0)), 32, 64),
        form(Code::E4m3, Scale::F32(Zero::Code(0.0)), 128, 128),
    ]
}

/// Bits of the sums of some rows over `octets` and as many ranges behind them; weights and inputs are always the same.
fn product(
    kernels: &Kernels,
    kernel: unsafe fn(&Scaled<'_>),
    form: &Form,
    octets: (usize, usize),
    ranges: usize,
    rows: Range<usize>,
) -> Vec<u32> {
    // Whatever they are part of, such bytes are no infinity.
    let weights = weights(form, |at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8 & 0x3b);
    // Between a half and two in size.
    let input =
        |at: usize| f32::from_bits((0x3f00_0000 | (at.wrapping_mul(0x85eb_ca6b) >> 7) & 0x80ff_0000) as u32);
    product_of(kernels, kernel, form, &weights, input, octets, ranges, rows)
}

fn panel_bytes(form: &Form) -> usize {
    (OCTETS * 8).div_ceil(form.span) * form.block_bytes()
}

fn weights(form: &Form, byte: impl Fn(usize) -> u8) -> Memory {
    let weights = Memory::zeroed(PANELS * panel_bytes(form)).unwrap();
    for at in 0..PANELS * panel_bytes(form) {
        // SAFETY: within the weights.
        unsafe { *weights.at(at) = byte(at) };
    }
    weights
}

/// The same of these weights and inputs, counted through all rows.
#[allow(clippy::too_many_arguments)] // what makes a case
fn product_of(
    kernels: &Kernels,
    kernel: unsafe fn(&Scaled<'_>),
    form: &Form,
    weights: &Memory,
    input: impl Fn(usize) -> f32,
    octets: (usize, usize),
    ranges: usize,
    rows: Range<usize>,
) -> Vec<u32> {
    let panel_bytes = panel_bytes(form);
    let units = form.units((octets.1 - octets.0) * 8);
    // Pairs, the same as bytes, and then what the units of each range have; and what tiles read behind the last.
    let (pairs, known_range) = (OCTETS * 4, (OCTETS + 1) * units.words());
    let stride = 2 * pairs + ranges * known_range + LANES;
    let mut x = vec![0i32; rows.len() * stride];
    for (row, out) in rows.clone().zip(x.chunks_exact_mut(stride)) {
        let floats: Vec<f32> = (row * pairs * 2..(row + 1) * pairs * 2).map(&input).collect();
        let (out, known) = out.split_at_mut(pairs);
        let (bytes, known) = known.split_at_mut(pairs);
        for (range, known) in known.chunks_exact_mut(known_range).enumerate() {
            let behind = range * (octets.1 - octets.0);
            let octets = (octets.0 + behind, octets.1 + behind);
            let (x, out) = (floats[octets.0 * 8..].as_ptr(), out[octets.0 * 4..].as_mut_ptr());
            let (known, bytes) = (known.as_mut_ptr(), bytes[behind * 4..].as_mut_ptr());
            // SAFETY: the row's inputs and pairs, and room for as many units as octets.
            unsafe {
                match kernels.whole.filter(|_| form.is_whole()) {
                    Some(whole) => {
                        (whole.inputs)(&WholeInputs { x, octets, units, out, known });
                        if Level::Avx512Vnni.available() {
                            bytes_vnni(out, (octets.1 - octets.0) * 8, bytes.cast());
                        }
                    }
                    None => (kernels.narrow)(x, out.cast(), (octets.1 - octets.0) * 8),
                }
            }
        }
    }
    let acc_range = rows.len() * PANELS * LANES;
    let mut acc = vec![f32::NAN; ranges * acc_range];
    let buffer = Memory::zeroed(Scaled::BUFFER_FLOATS * 4).unwrap();
    let product = Scaled {
        form,
        units,
        panel: weights.at(0),
        panel_bytes,
        panels: PANELS,
        soon: std::ptr::null(),
        octets,
        ranges,
        x: x[octets.0 * 4..].as_ptr(),
        x_stride: stride,
        known: x[2 * pairs..].as_ptr(),
        known_range,
        bytes: x[pairs..].as_ptr().cast(),
        bytes_range: (octets.1 - octets.0) * 16,
        rows: rows.len(),
        acc: acc.as_mut_ptr(),
        acc_range,
        acc_stride: PANELS * LANES,
        buffer: buffer.at(0).cast(),
    };
    // SAFETY: the level is available, and all are as long as the product says.
    unsafe { kernel(&product) };
    acc.into_iter().map(f32::to_bits).collect()
}
