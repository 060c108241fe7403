//! Codes that lie in a file as no backend takes them: in words, input by input, with zero points (AWQ, GPTQ,
//! compressed-tensors). A part of such a matrix becomes [`Quant::Affine`] as it is read: `(code - zero) * scale` is
//! `code * scale - zero * scale`, to the bit where scales have 16 bits, for such products are exact in f32. Called by `weights`;
//! `huggingface` finds what lies where.

use std::fmt;
use std::ops::Range;

use backend::weight::widen;
use backend::{DType, Quant};

use crate::ModelError;
use crate::data_file::{DataFile, Rows};
use crate::regroup::{self, Regrouped, narrow};
use crate::scales::Scales;
use crate::shard::gcd;
use crate::weights::Place;

/// Columns that share a scale in memory at most: backends have room for no more, so longer groups are cut.
const GROUP_MAX: usize = 128;

/// Inputs of all outputs that are turned at once: a line of the processor's cache of each output's codes.
const STRIP: usize = 128;

/// Outputs of these that stay in the first cache.
const TILE: usize = 64;

/// A quantised matrix `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub(crate) struct Recoded {
    /// What its tools call it.
    pub(crate) name: &'static str,
    /// Inputs that share a scale, a multiple of 8 that divides them.
    pub(crate) group: usize,
    /// Whether codes, scales and zero points are `[inputs, outputs]`, else `[outputs, inputs]`.
    pub(crate) by_input: bool,
    /// A code per element.
    pub(crate) codes: Packed,
    /// A scale per output and group.
    pub(crate) scales: Scales,
    /// As many as scales; `None`: the middle of the codes.
    pub(crate) zeros: Option<Packed>,
    /// What zero points are more than what is stored, all in the bits of a code.
    pub(crate) zeros_more: u8,
    /// GPTQ's group of every input, an i32.
    pub(crate) groups: Option<Place>,
}

/// Numbers `[rows, cols]` of some bits in words of 32, lowest first.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    pub(crate) bits: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) packing: Packing,
    pub(crate) place: Place,
}

/// Which numbers a word has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Consecutive ones of a row.
    Along,
    /// Eight of a row: first those of even columns.
    EvenFirst,
    /// Signed bytes; the lowest is the code 0.
    Signed,
    /// Consecutive ones of a column. Where bits do not divide a word, a number goes on in the next row's word.
    Down,
}

impl Packed {
    /// Rows and columns of the elements of `item` bytes that hold the numbers; `None` where they fill no whole words.
    pub(crate) fn stored(&self) -> Option<[usize; 2]> {
        let Packed { bits, rows, cols, packing, .. } = *self;
        let words =
            |numbers: usize| numbers.checked_mul(bits).filter(|all| all % 32 == 0).map(|all| all / 32);
        match packing {
            Packing::Along | Packing::EvenFirst if cols % 8 != 0 => None,
            Packing::Along | Packing::EvenFirst => Some([rows, words(cols)?]),
            Packing::Signed => Some([rows, cols]),
            Packing::Down => {
                let (numbers, _) = self.unit();
                Some([words(rows.checked_next_multiple_of(numbers)?)?, cols])
            }
        }
    }

    /// Numbers of a column that fill so many words.
    fn unit(&self) -> (usize, usize) {
        let common = gcd(32, self.bits);
        (32 / common, self.bits / common)
    }

    /// The numbers of a part, one per byte.
    fn read(
        &self,
        files: &[DataFile],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<u8>, ModelError> {
        let bits = self.bits;
        let fetch = |rows: Range<usize>, bytes: Range<usize>, stride: usize| {
            let start = self.place.range.start + (rows.start * stride + bytes.start) as u64;
            let (count, row, stride) = (rows.len(), bytes.len(), stride as u64);
            files[self.place.file].read_rows(Rows { start, count, row, stride })
        };
        let mask = ((1u16 << bits) - 1) as u8;
        let mut out = Vec::with_capacity(rows.len() * cols.len());
        match self.packing {
            Packing::Signed => {
                let mut bytes = fetch(rows, cols, self.cols)?;
                bytes.iter_mut().for_each(|byte| *byte ^= 128);
                return Ok(bytes);
            }
            Packing::Along | Packing::EvenFirst => {
                let (first, last) = (cols.start / 8 * 8, cols.end.next_multiple_of(8));
                let bytes = fetch(rows, first * bits / 8..last * bits / 8, self.cols * bits / 8)?;
                let mut row = vec![0; last - first];
                for stored in bytes.chunks_exact((last - first) * bits / 8) {
                    let eights = row.as_chunks_mut::<8>().0;
                    if self.packing == Packing::EvenFirst {
                        for (word, numbers) in stored.as_chunks::<4>().0.iter().zip(eights) {
                            let word = u32::from_le_bytes(*word);
                            *numbers = [0, 4, 1, 5, 2, 6, 3, 7].map(|at| (word >> (at * 4)) as u8 & 15);
                        }
                    } else {
                        for (bytes, numbers) in stored.chunks_exact(bits).zip(eights) {
                            let word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
                            *numbers = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| (word >> (at * bits)) as u8 & mask);
                        }
                    }
                    out.extend_from_slice(&row[cols.start - first..cols.end - first]);
                }
            }
            Packing::Down => {
                let (numbers, words) = self.unit();
                let (first, last) = (rows.start / numbers, rows.end.div_ceil(numbers));
                let bytes = fetch(first * words..last * words, cols.start * 4..cols.end * 4, self.cols * 4)?;
                let (words_of, _) = bytes.as_chunks::<4>();
                for row in rows {
                    let bit = row % numbers * bits;
                    let line = (row / numbers - first) * words + bit / 32;
                    let line_of = |line: usize| {
                        let words = &words_of[line * cols.len()..][..cols.len()];
                        words.iter().map(|word| u32::from_le_bytes(*word))
                    };
                    let shift = bit % 32;
                    if shift + bits <= 32 {
                        out.extend(line_of(line).map(|word| (word >> shift) as u8 & mask));
                    } else {
                        let both = line_of(line).zip(line_of(line + 1));
                        out.extend(
                            both.map(|(low, high)| (low >> shift | high << (32 - shift)) as u8 & mask),
                        );
                    }
                }
            }
        }
        Ok(out)
    }
}

impl Recoded {
    /// What it becomes.
    pub(crate) fn format(&self) -> Quant {
        let group = if self.group > GROUP_MAX { gcd(self.group, GROUP_MAX) } else { self.group };
        Quant::Affine { bits: self.codes.bits, group }
    }

    /// Bits and group of columns `cols`, which may cut groups.
    fn form(&self, cols: &Range<usize>) -> (usize, usize) {
        regroup::form(self.format(), cols).unwrap_or((self.codes.bits, self.format().align_cols()))
    }

    /// Type of scales and biases: a bias is a scale times a power of two where there are no zero points, else a product that
    /// needs more bits.
    fn dtype(&self) -> DType {
        if self.zeros.is_some() { DType::F32 } else { self.scales.kind.dtype() }
    }

    /// Bytes that a part takes.
    pub(crate) fn part_bytes(&self, rows: &Range<usize>, cols: &Range<usize>) -> u64 {
        let (bits, group) = self.form(cols);
        (rows.len() * (cols.len() * bits / 8 + 2 * cols.len() / group * self.dtype().bytes())) as u64
    }

    /// Scales and zero points: all besides the codes.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        std::iter::once(&self.scales.place).chain(self.zeros.as_ref().map(|zeros| &zeros.place))
    }

    /// Reads a part; `name` is for messages.
    pub(crate) fn read(
        &self,
        files: &[DataFile],
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Regrouped, ModelError> {
        self.check_order(files, name, &cols)?;
        let (bits, group) = self.form(&cols);
        let format = Quant::Affine { bits, group };
        let codes = self.read_codes(files, rows.clone(), cols.clone())?;
        let dtype = self.dtype();
        let groups = cols.start / self.group..cols.end.div_ceil(self.group);
        let (scales, zeros) = self.read_scales(files, rows.clone(), groups.clone())?;
        let bytes = rows.len() * (cols.len() / group) * dtype.bytes();
        let mut made = Regrouped {
            format,
            codes,
            dtype,
            scales: Vec::with_capacity(bytes),
            biases: Vec::with_capacity(bytes),
        };
        for row in 0..rows.len() {
            for col in cols.clone().step_by(group) {
                let at = col / self.group - groups.start;
                let at = if self.by_input { at * rows.len() + row } else { row * groups.len() + at };
                narrow(scales[at], dtype, &mut made.scales);
                narrow(-(f32::from(zeros[at]) * scales[at]), dtype, &mut made.biases);
            }
        }
        Ok(made)
    }

    /// Codes of rows as a stream each.
    fn read_codes(
        &self,
        files: &[DataFile],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<u8>, ModelError> {
        let bits = self.codes.bits;
        let row_bytes = cols.len() * bits / 8;
        if !self.by_input {
            // They are streams already.
            let stride = self.codes.cols * bits / 8;
            let start = self.codes.place.range.start + (rows.start * stride + cols.start * bits / 8) as u64;
            let rows = Rows { start, count: rows.len(), row: row_bytes, stride: stride as u64 };
            let mut codes = files[self.codes.place.file].read_rows(rows)?;
            if self.codes.packing == Packing::Signed {
                codes.iter_mut().for_each(|code| *code ^= 128);
            }
            return Ok(codes);
        }
        let outputs = rows.len();
        let mut codes = vec![0; outputs * row_bytes];
        for first in cols.clone().step_by(STRIP) {
            let last = cols.end.min(first + STRIP);
            let strip = self.codes.read(files, first..last, rows.clone())?;
            let from = (first - cols.start) * bits / 8;
            for tile in (0..outputs).step_by(TILE) {
                let tile = tile..outputs.min(tile + TILE);
                for (at, inputs) in strip.chunks_exact(8 * outputs).enumerate() {
                    let lines = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| &inputs[i * outputs..][tile.clone()]);
                    let mut words = [0; TILE];
                    match bits {
                        2 => turn::<2>(lines, &mut words),
                        3 => turn::<3>(lines, &mut words),
                        4 => turn::<4>(lines, &mut words),
                        _ => turn::<8>(lines, &mut words),
                    }
                    for (output, word) in tile.clone().zip(words) {
                        let start = output * row_bytes + from + at * bits;
                        codes[start..start + bits].copy_from_slice(&word.to_le_bytes()[..bits]);
                    }
                }
            }
        }
        Ok(codes)
    }

    /// Scales and zero points of outputs and groups, in the order of the file.
    fn read_scales(
        &self,
        files: &[DataFile],
        rows: Range<usize>,
        groups: Range<usize>,
    ) -> Result<(Vec<f32>, Vec<u8>), ModelError> {
        let (down, across) = if self.by_input { (groups, rows) } else { (rows, groups) };
        let Scales { kind, cols, place, .. } = &self.scales;
        let dtype = kind.dtype();
        let (item, stride) = (dtype.bytes(), (cols * dtype.bytes()) as u64);
        let start = place.range.start + down.start as u64 * stride + (across.start * item) as u64;
        let (count, row) = (down.len(), across.len() * item);
        let bytes = files[place.file].read_rows(Rows { start, count, row, stride })?;
        let mut scales = vec![0.0; count * across.len()];
        widen(dtype, &bytes, &mut scales);
        let bits = self.codes.bits;
        let zeros = match &self.zeros {
            None => vec![1 << (bits - 1); scales.len()],
            Some(zeros) => {
                let mut zeros = zeros.read(files, down, across)?;
                let mask = ((1u16 << bits) - 1) as u8;
                zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_add(self.zeros_more) & mask);
                zeros
            }
        };
        Ok((scales, zeros))
    }

    /// Errors when inputs are not in groups as they come.
    pub(crate) fn check_order(
        &self,
        files: &[DataFile],
        name: &str,
        cols: &Range<usize>,
    ) -> Result<(), ModelError> {
        let Some(place) = &self.groups else { return Ok(()) };
        let file = &files[place.file];
        let bytes = file.read(place.range.start + 4 * cols.start as u64, 4 * cols.len())?;
        let in_order = |(input, group): (usize, &[u8; 4])| {
            u32::try_from(input / self.group) == Ok(u32::from_le_bytes(*group))
        };
        if cols.clone().zip(bytes.as_chunks::<4>().0).all(in_order) {
            return Ok(());
        }
        let reason = format!(
            "tensor {name}: inputs are not in the order of their groups (desc_act), which is not supported: use a checkpoint made without desc_act, or with AWQ"
        );
        Err(ModelError::Format { path: file.path.clone(), reason })
    }
}

/// Codes of eight inputs for each output, one after the other.
fn turn<const BITS: usize>(inputs: [&[u8]; 8], words: &mut [u64; TILE]) {
    let outputs = inputs[0].len();
    let inputs = inputs.map(|line| &line[..outputs]);
    for (output, word) in words.iter_mut().enumerate().take(outputs) {
        *word = (0..8).fold(0, |word, at| word | u64::from(inputs[at][output]) << (at * BITS));
    }
}

impl fmt::Display for Recoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bits, inputs) = (self.codes.bits, if self.by_input { self.codes.rows } else { self.codes.cols });
        write!(f, "{} {bits}-bit, ", self.name)?;
        if self.group == inputs {
            return f.write_str("a scale per output");
        }
        write!(f, "groups of {}", self.group)
    }
}

#[cfg(test)]
mod tests {
    use backend::{QuantView, TensorView};
    use half::f16;

    use super::*;

    const OUTPUTS: usize = 32;

    /// Numbers that follow from their place, below `end`.
    fn number(row: usize, col: usize, end: usize) -> u8 {
        (((row * 73 + col * 29 + 5) * 0x9e37_79b1) >> 7) as u8 % end.min(255) as u8
    }

    /// Numbers bit by bit, as their libraries describe the words.
    fn words(packed: &Packed, number: impl Fn(usize, usize) -> u8) -> Vec<u8> {
        let Packed { bits, rows, cols, packing, .. } = *packed;
        let [high, wide] = packed.stored().unwrap();
        let mut bytes = vec![0; high * wide * if packing == Packing::Signed { 1 } else { 4 }];
        for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
            for bit in 0..bits {
                // Word, and bit of it.
                let (word, at) = match packing {
                    Packing::Along => (row * wide + (col * bits + bit) / 32, (col * bits + bit) % 32),
                    Packing::EvenFirst => (row * wide + col / 8, [0, 4, 1, 5, 2, 6, 3, 7][col % 8] * 4 + bit),
                    Packing::Down => ((row * bits + bit) / 32 * wide + col, (row * bits + bit) % 32),
                    Packing::Signed => {
                        bytes[row * cols + col] = number(row, col).wrapping_sub(128);
                        continue;
                    }
                };
                bytes[word * 4 + at / 8] |= (number(row, col) >> bit & 1) << (at % 8);
            }
        }
        bytes
    }

    /// A matrix in a file, and its numbers `[outputs, inputs]`.
    struct Case {
        recoded: Recoded,
        files: Vec<DataFile>,
        numbers: Vec<f32>,
        inputs: usize,
        _dir: tempfile::TempDir,
    }

    impl Case {
        fn new(bits: usize, packing: Packing, zeros: Option<(Packing, u8)>, group: usize) -> Case {
            let inputs = 256;
            let by_input = matches!(packing, Packing::Down | Packing::EvenFirst);
            let turn = |rows, cols| if by_input { (cols, rows) } else { (rows, cols) };
            let (code, zero) = (
                |output, input| number(output, input, 1 << bits),
                |output, group| match zeros {
                    Some(_) => number(output, group + 7, 1 << bits),
                    None => 1 << (bits - 1),
                },
            );
            let scale = |output: usize, group: usize| {
                f16::from_f32(0.001 + 0.0007 * f32::from(number(output, group, 200)))
            };
            let mut file = Vec::new();
            let mut add = |bytes: Vec<u8>| {
                let start = file.len() as u64;
                file.extend(bytes);
                Place { file: 0, range: start..file.len() as u64 }
            };
            let mut packed = |packing, cols, number: &dyn Fn(usize, usize) -> u8| {
                let (rows, cols) = turn(OUTPUTS, cols);
                let place = Place { file: 0, range: 0..0 };
                let packed = Packed { bits, rows, cols, packing, place };
                let number = |row, col| if by_input { number(col, row) } else { number(row, col) };
                let place = add(words(&packed, number));
                Packed { place, ..packed }
            };
            let codes = packed(packing, inputs, &code);
            let more = zeros.map_or(0, |(_, more)| more);
            let mask = ((1u16 << bits) - 1) as u8;
            let less = |output, group| zero(output, group).wrapping_sub(more) & mask;
            let zeros = zeros.map(|(packing, _)| packed(packing, inputs / group, &less));
            let (rows, cols) = turn(OUTPUTS, inputs / group);
            let places = (0..rows).flat_map(|row| (0..cols).map(move |col| turn(row, col)));
            let place = add(places.flat_map(|(output, group)| scale(output, group).to_le_bytes()).collect());
            let scales = Scales { kind: crate::scales::ScaleKind::Numbers(DType::F16), rows, cols, place };
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("w"), &file).unwrap();
            let numbers = (0..OUTPUTS).flat_map(|output| (0..inputs).map(move |input| (output, input)));
            let numbers = numbers.map(|(output, input)| {
                let group = input / group;
                let whole = i32::from(code(output, input)) - i32::from(zero(output, group));
                whole as f32 * scale(output, group).to_f32()
            });
            Case {
                numbers: numbers.collect(),
                recoded: Recoded {
                    name: "test",
                    group,
                    by_input,
                    codes,
                    scales,
                    zeros,
                    zeros_more: more,
                    groups: None,
                },
                files: vec![DataFile::open(&dir.path().join("w")).unwrap()],
                inputs,
                _dir: dir,
            }
        }

        /// A part has its numbers to the bit, and takes as many bytes as was said; gives the columns of its groups.
        fn check(&self, rows: Range<usize>, cols: Range<usize>) -> usize {
            let made = self.recoded.read(&self.files, "w", rows.clone(), cols.clone()).unwrap();
            let Quant::Affine { bits, group } = made.format else { panic!("{}", made.format) };
            let what =
                format!("{bits} bits, {:?}, rows {rows:?}, columns {cols:?}", self.recoded.codes.packing);
            let bytes = made.codes.len() + made.scales.len() + made.biases.len();
            assert_eq!(self.recoded.part_bytes(&rows, &cols), bytes as u64, "{what}");
            let numbers = |bytes| TensorView {
                name: "scales",
                dtype: made.dtype,
                rows: rows.len(),
                cols: cols.len() / group,
                row_stride_bytes: cols.len() / group * made.dtype.bytes(),
                bytes,
            };
            let view = QuantView {
                name: "w",
                format: made.format,
                rows: rows.len(),
                cols: cols.len(),
                row_stride_bytes: made.format.code_bytes(cols.len()),
                bytes: &made.codes,
                scales: Some(numbers(&made.scales)),
                biases: Some(numbers(&made.biases)),
                origin: (0, 0),
            };
            view.check().unwrap();
            for (at, row) in rows.enumerate() {
                let mut got = vec![0.0; cols.len()];
                view.decode(at, 0..cols.len(), &mut got);
                assert!(got == self.numbers[row * self.inputs..][cols.clone()], "{what}: row {row}");
            }
            group
        }
    }

    #[test]
    fn parts_of_every_packing_have_the_numbers_of_their_libraries() {
        use Packing::{Along, Down, EvenFirst, Signed};
        let gptq =
            [2, 3, 4, 8].into_iter().flat_map(|bits| [1, 0].map(|more| (bits, Down, Some((Along, more)))));
        let others = [
            (4, EvenFirst, Some((EvenFirst, 0))),
            (4, Along, Some((Down, 0))),
            (8, Along, Some((Down, 0))),
            (8, Along, None),
            (4, Along, None),
            (8, Signed, None),
            (8, Signed, Some((Signed, 0))),
        ];
        for (bits, packing, zeros) in gptq.chain(others) {
            let case = Case::new(bits, packing, zeros, 32);
            assert_eq!(case.check(0..OUTPUTS, 0..256), 32);
            assert_eq!(case.check(5..14, 32..224), 32);
            // Ends within groups, and within words.
            assert_eq!(case.check(1..2, 16..176), 16);
            assert_eq!(case.check(31..32, 200..208), 8);
            // All inputs of an output share a scale, which is repeated.
            let case = Case::new(bits, packing, zeros, 256);
            assert_eq!(case.check(3..17, 0..256), 128);
            assert_eq!(case.check(3..17, 64..192), 64);
        }
    }

    #[test]
    fn inputs_in_another_order_are_refused() {
        let mut case = Case::new(4, Packing::Down, Some((Packing::Along, 1)), 64);
        let dir = tempfile::tempdir().unwrap();
        let mut order = |swap: usize| {
            let groups = (0..256u32).map(|input| if input as usize == swap { 3 } else { input / 64 });
            std::fs::write(dir.path().join("g"), groups.flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
                .unwrap();
            case.files.truncate(1);
            case.files.push(DataFile::open(&dir.path().join("g")).unwrap());
            case.recoded.groups = Some(Place { file: 1, range: 0..1024 });
            [0..256, 0..64].map(|cols| case.recoded.read(&case.files, "w", 0..OUTPUTS, cols).err())
        };
        assert!(order(255).iter().all(Option::is_none), "in order");
        let [all, first] = order(100);
        assert!(first.is_none(), "the part is in order");
        let error = all.expect("an error").to_string();
        assert!(
            error.contains("/g: tensor w: inputs are not in the order of their groups (desc_act)"),
            "{error}"
        );
    }
}
