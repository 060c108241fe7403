//! Columns of a quantised matrix that begin or end within a group: the same codes in smaller groups, each with its
//! scale and bias again, so that the numbers stay the same to the bit. For ranks that are more than the groups.

use std::ops::Range;

use backend::{DType, Quant, QuantView};
use half::{bf16, f16};

/// Columns can be cut at multiples of this, whatever the group: codes of any width fill whole bytes, and backends take
/// such groups.
pub(crate) const CUT_COLS: usize = 8;

/// Codes with scales and biases of their own.
pub(crate) struct Regrouped {
    /// [`Quant::Affine`].
    pub(crate) format: Quant,
    /// Rows of codes, without gaps.
    pub(crate) codes: Vec<u8>,
    /// Type of scales and biases.
    pub(crate) dtype: DType,
    /// `[rows, cols / group]`.
    pub(crate) scales: Vec<u8>,
    /// As many.
    pub(crate) biases: Vec<u8>,
}

/// Bits of a code and columns of a group of `cols` columns of `format`; `None` where groups need not be cut, or cannot.
pub(crate) fn form(format: Quant, cols: &Range<usize>) -> Option<(usize, usize)> {
    let align = format.align_cols();
    if cols.start.is_multiple_of(align) && cols.end.is_multiple_of(align) {
        return None;
    }
    let form = format.affine()?;
    let fits = |group: &usize| cols.start.is_multiple_of(*group) && cols.end.is_multiple_of(*group);
    let halves = std::iter::successors(Some(form.group), |group| Some(group / 2));
    let group = halves.take_while(|group| *group > 0).find(fits)?;
    Some((form.bits, group))
}

/// Columns `cols` of `view`, of which `(bits, group)` is the [`form`].
pub(crate) fn regroup(view: &QuantView<'_>, cols: Range<usize>, (bits, group): (usize, usize)) -> Regrouped {
    let wide = view.format.affine().map_or(view.cols, |form| form.group);
    // Codes with scales of a type have numbers of that type: a bias is a scale times a power of two, or given.
    let dtype = view.scales.map_or(DType::F32, |scales| scales.dtype);
    let format = Quant::Affine { bits, group };
    let (groups, groups_of_row) = (view.cols / wide, cols.len() / group);
    let (mut codes, mut scales, mut biases) = (vec![0; view.cols], vec![0.0; groups], vec![0.0; groups]);
    let scale_bytes = view.rows * groups_of_row * dtype.bytes();
    let mut out = Regrouped {
        format,
        codes: Vec::with_capacity(view.rows * format.code_bytes(cols.len())),
        dtype,
        scales: Vec::with_capacity(scale_bytes),
        biases: Vec::with_capacity(scale_bytes),
    };
    for row in 0..view.rows {
        view.affine_row(row, &mut codes, &mut scales, &mut biases);
        pack(&codes[cols.clone()], bits, &mut out.codes);
        for at in cols.clone().step_by(group) {
            narrow(scales[at / wide], dtype, &mut out.scales);
            narrow(biases[at / wide], dtype, &mut out.biases);
        }
    }
    out
}

/// Codes as a little-endian stream of `bits` each; a multiple of 8 codes.
fn pack(codes: &[u8], bits: usize, out: &mut Vec<u8>) {
    for eight in codes.chunks(8) {
        let word = eight.iter().rev().fold(0u64, |word, code| word << bits | u64::from(*code));
        out.extend_from_slice(&word.to_le_bytes()[..bits]);
    }
}

/// Adds `x` as a number of type `dtype`.
pub(crate) fn narrow(x: f32, dtype: DType, out: &mut Vec<u8>) {
    match dtype {
        DType::F32 => out.extend(x.to_le_bytes()),
        DType::F16 => out.extend(f16::from_f32(x).to_le_bytes()),
        DType::BF16 => out.extend(bf16::from_f32(x).to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use backend::{GgufBlock, TensorView};

    use super::*;

    /// Numbers of columns `cols` of `view`, and of what they are regrouped to.
    fn both(view: &QuantView<'_>, cols: Range<usize>) -> (Vec<f32>, Vec<f32>, Quant) {
        view.check().unwrap();
        let made = regroup(view, cols.clone(), form(view.format, &cols).unwrap());
        let Quant::Affine { group, .. } = made.format else { panic!("{}", made.format) };
        let numbers = |bytes| TensorView {
            name: "scales",
            dtype: made.dtype,
            rows: view.rows,
            cols: cols.len() / group,
            row_stride_bytes: cols.len() / group * made.dtype.bytes(),
            bytes,
        };
        let part = QuantView {
            name: "part",
            format: made.format,
            rows: view.rows,
            cols: cols.len(),
            row_stride_bytes: made.format.code_bytes(cols.len()),
            bytes: &made.codes,
            scales: Some(numbers(&made.scales)),
            biases: Some(numbers(&made.biases)),
            origin: (0, 0),
        };
        part.check().unwrap();
        let (mut want, mut got) = (Vec::new(), Vec::new());
        for row in 0..view.rows {
            let mut whole = vec![0.0; view.cols];
            view.decode(row, 0..view.cols, &mut whole);
            want.extend_from_slice(&whole[cols.clone()]);
            let mut out = vec![0.0; cols.len()];
            part.decode(row, 0..cols.len(), &mut out);
            got.extend(out);
        }
        (want, got, made.format)
    }

    #[test]
    fn every_format_keeps_its_numbers_in_smaller_groups() {
        let (rows, cols) = (3, 256);
        let others = [2, 3, 4, 5, 6, 8].map(|bits| Quant::Affine { bits, group: 64 });
        let gguf = GgufBlock::ALL.map(Quant::Gguf);
        let formats =
            others.into_iter().chain([Quant::Int4 { group: 64 }, Quant::Fp4 { group: 64 }]).chain(gguf);
        for format in formats {
            let row_bytes = format.code_bytes(cols);
            // Bytes whose halves are small numbers: no infinities.
            let bytes: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 37 + i / 5) as u8 & 0xbf).collect();
            let halves: Vec<u8> =
                (0..rows * 4).flat_map(|i| bf16::from_f32(0.25 + i as f32 * 0.01).to_le_bytes()).collect();
            let scales = TensorView {
                name: "scales",
                dtype: DType::BF16,
                rows,
                cols: 4,
                row_stride_bytes: 8,
                bytes: &halves,
            };
            let gguf = matches!(format, Quant::Gguf(_));
            let view = QuantView {
                name: "test",
                format,
                rows,
                cols,
                row_stride_bytes: row_bytes,
                bytes: &bytes,
                scales: (!gguf).then_some(scales),
                biases: matches!(format, Quant::Affine { .. }).then_some(scales),
                origin: (0, 0),
            };
            for (cols, group) in [(16..80, 16), (0..8, 8), (200..248, 8)] {
                let (want, got, made) = both(&view, cols.clone());
                assert!(want == got, "{format}, columns {cols:?}");
                let Quant::Affine { group: small, .. } = made else { panic!("{made}") };
                assert_eq!(small, group, "{format}, columns {cols:?}");
            }
            assert_eq!(form(format, &(0..256)), None, "{format}");
        }
        assert_eq!(form(Quant::Fp8 { rows: 128, cols: 128 }, &(3..5)), None);
    }
}
