//! A model's tensors as they lie in files, whatever the format: by their Hugging Face names, numbers or codes with
//! scales. A format's reader (`huggingface`) makes the table; everything else asks it for rows and columns, and only
//! those bytes are read.

use std::collections::BTreeMap;
use std::ops::Range;

use backend::{DType, MatrixView, Quant, QuantView, TensorView};
use safetensors::Dtype;

use crate::data_file::{DataFile, Rows};
use crate::recode::Recoded;
use crate::regroup::Regrouped;
use crate::scales::Scales;
use crate::{ModelError, regroup};

/// All tensors of a model.
pub(crate) struct Weights {
    /// The files that the tensors lie in.
    pub(crate) files: Vec<DataFile>,
    /// The file that lists the tensors, for messages.
    pub(crate) table: String,
    /// By Hugging Face name; experts one by one.
    pub(crate) tensors: BTreeMap<String, Stored>,
    /// What the format calls a tensor, where it has names of its own.
    pub(crate) own_name: OwnName,
    /// Whether the rows of q and k pair for the rotation as `(2 i, 2 i + 1)`, where the format says so itself.
    pub(crate) interleaved: Option<bool>,
}

/// From a Hugging Face name to the format's.
pub(crate) type OwnName = Box<dyn Fn(&str) -> Option<String>>;

/// Bytes of a file.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Index into [`Weights::files`].
    pub(crate) file: usize,
    /// Bytes of it.
    pub(crate) range: Range<u64>,
}

/// One tensor.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// `[rows, cols]`, or `[dim]`, which is one row.
    pub(crate) shape: Vec<usize>,
    /// Numbers or codes, row-major.
    pub(crate) place: Place,
    pub(crate) form: Form,
}

/// What the bytes of a tensor are.
#[derive(Clone, Debug)]
pub(crate) enum Form {
    Plain(DType),
    /// Numbers of a matrix whose rows in the file are its columns.
    Turned(DType),
    Quantised {
        format: Quant,
        scales: Option<Scales>,
        /// As many as scales.
        biases: Option<Scales>,
    },
    /// Codes that lie in another way than backends take them.
    Recoded(Box<Recoded>),
    /// A type that no backend takes, by its name in the file.
    Foreign(String),
}

/// The type of numbers; `None` where they are codes.
pub(crate) fn plain(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Place {
    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Part `index` of `count` equal ones.
    fn part(&self, index: usize, count: usize) -> Place {
        let each = self.len() / count as u64;
        let start = self.range.start + each * index as u64;
        Place { file: self.file, range: start..start + each }
    }
}

impl Stored {
    /// Rows and columns; a vector is one row.
    pub(crate) fn extent(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, self.shape.iter().product()),
        }
    }

    /// Columns are better cut at multiples of this.
    pub(crate) fn align_cols(&self) -> usize {
        match &self.form {
            Form::Quantised { format, .. } => format.align_cols(),
            Form::Recoded(recoded) => recoded.format().align_cols(),
            _ => 1,
        }
    }

    /// Matrix `index` of the `count` that are stacked by rows in this one.
    pub(crate) fn part(&self, index: usize, count: usize) -> Stored {
        let (rows, cols) = self.extent();
        let scales = |scales: &Option<Scales>| {
            scales.as_ref().map(|scales| Scales {
                rows: scales.rows / count,
                place: scales.place.part(index, count),
                ..scales.clone()
            })
        };
        let form = match &self.form {
            Form::Quantised { format, scales: s, biases } => {
                Form::Quantised { format: *format, scales: scales(s), biases: scales(biases) }
            }
            form => form.clone(),
        };
        Stored { shape: vec![rows / count, cols], place: self.place.part(index, count), form }
    }

    /// Row `index`, as a vector.
    pub(crate) fn row(&self, index: usize) -> Stored {
        let (rows, cols) = self.extent();
        Stored { shape: vec![cols], place: self.place.part(index, rows), form: self.form.clone() }
    }

    /// The bytes that make it, in order: numbers or codes, scales, biases.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        let (scales, biases, recoded) = match &self.form {
            Form::Quantised { scales, biases, .. } => (scales.as_ref(), biases.as_ref(), None),
            Form::Recoded(recoded) => (None, None, Some(recoded.places())),
            _ => (None, None, None),
        };
        let scales = [scales, biases].into_iter().flatten().flat_map(Scales::places);
        std::iter::once(&self.place).chain(scales).chain(recoded.into_iter().flatten())
    }

    /// Bytes of all of it, as it is held.
    pub(crate) fn len_bytes(&self) -> u64 {
        match &self.form {
            Form::Recoded(_) | Form::Quantised { .. } => {
                let (rows, cols) = self.extent();
                self.part_bytes(&(0..rows), &(0..cols))
            }
            Form::Plain(_) | Form::Turned(_) | Form::Foreign(_) => self.places().map(Place::len).sum(),
        }
    }

    /// Bytes that rows and columns of it take, scales included.
    pub(crate) fn part_bytes(&self, rows: &Range<usize>, cols: &Range<usize>) -> u64 {
        match &self.form {
            Form::Plain(dtype) | Form::Turned(dtype) => (rows.len() * cols.len() * dtype.bytes()) as u64,
            Form::Foreign(_) => 0,
            Form::Recoded(recoded) => recoded.part_bytes(rows, cols),
            Form::Quantised { format, scales, .. }
                if let Some((bits, group)) = regroup::form(*format, cols) =>
            {
                let item = scales.as_ref().map_or(DType::F32, |scales| scales.kind.dtype()).bytes();
                (rows.len() * (cols.len() * bits / 8 + 2 * cols.len() / group * item)) as u64
            }
            Form::Quantised { format, scales, biases } => {
                let (down, across, _) = scale_ranges(*format, rows, cols);
                let both = [scales, biases].into_iter().flatten();
                let scales: usize = both.map(|s| down.len() * across.len() * s.kind.dtype().bytes()).sum();
                (rows.len() * format.code_bytes(cols.len()) + scales) as u64
            }
        }
    }

    /// What it is in words.
    pub(crate) fn format(&self) -> String {
        match &self.form {
            Form::Plain(dtype) | Form::Turned(dtype) => dtype.to_string(),
            Form::Quantised { format: Quant::Fp8 { rows: 1, cols }, .. } if *cols >= self.extent().1 => {
                "fp8, a scale per output".into()
            }
            Form::Quantised { format: Quant::Fp8 { rows, cols }, .. } if (*rows, *cols) == self.extent() => {
                "fp8, one scale".into()
            }
            Form::Quantised { format, .. } => format.to_string(),
            Form::Recoded(recoded) => recoded.to_string(),
            Form::Foreign(name) => name.clone(),
        }
    }

    /// Reads rows and columns, which lie within it; columns that cut a group, in smaller groups. `name` is for messages.
    pub(crate) fn read<'n>(
        &self,
        files: &[DataFile],
        name: &'n str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Slice<'n>, ModelError> {
        let (height, width) = self.extent();
        if let Form::Quantised { format, .. } = self.form
            && let Some(smaller) = regroup::form(format, &cols)
        {
            let align = format.align_cols();
            let (first, last) = (cols.start / align * align, cols.end.next_multiple_of(align));
            let whole = self.read(files, name, rows, first..last)?;
            return Ok(whole.regroup(cols.start - first..cols.end - first, smaller));
        }
        let fetch = |place: &Place, row_bytes: usize, rows: &Range<usize>, part: Range<usize>| {
            let stride = row_bytes as u64;
            let start = place.range.start + rows.start as u64 * stride + part.start as u64;
            files[place.file].read_rows(Rows { start, count: rows.len(), row: part.len(), stride })
        };
        let form = match &self.form {
            Form::Plain(dtype) => Held::Plain(*dtype),
            Form::Turned(dtype) => {
                let item = dtype.bytes();
                let stored = fetch(&self.place, height * item, &cols, rows.start * item..rows.end * item)?;
                let bytes = turned(&stored, rows.len() * item, item);
                return Ok(Slice::made(name, *dtype, rows.len(), cols.len(), bytes));
            }
            Form::Recoded(recoded) => {
                let (count, width) = (rows.len(), cols.len());
                let made = recoded.read(files, name, rows, cols)?;
                return Ok(Slice::regrouped(name, count, width, made));
            }
            Form::Foreign(got) => {
                let path = files[self.place.file].path.clone();
                return Err(ModelError::Type { path, name: name.into(), got: got.clone() });
            }
            Form::Quantised { format, scales, biases } => {
                let (down, across, origin) = scale_ranges(*format, &rows, &cols);
                let held = |scales: &Option<Scales>| {
                    let Some(scales) = scales else { return Ok::<_, ModelError>(None) };
                    let item = scales.kind.stored_bytes();
                    let part = across.start * item..across.end * item;
                    let stored = fetch(&scales.place, scales.cols * item, &down, part)?;
                    let (dtype, bytes) = (scales.kind.dtype(), scales.kind.widened(files, stored)?);
                    Ok(Some(Plain { dtype, rows: down.len(), cols: across.len(), bytes }))
                };
                Held::Quantised { format: *format, scales: held(scales)?, biases: held(biases)?, origin }
            }
        };
        let bytes_of = |cols: usize| match &form {
            Held::Plain(dtype) => cols * dtype.bytes(),
            Held::Quantised { format, .. } => format.code_bytes(cols),
        };
        let part = bytes_of(cols.start)..bytes_of(cols.end);
        let bytes = fetch(&self.place, bytes_of(width), &rows, part)?;
        Ok(Slice { name, rows: rows.len(), cols: cols.len(), bytes, form })
    }
}

/// Elements of `item` bytes whose rows of `row` bytes become columns.
fn turned(bytes: &[u8], row: usize, item: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for at in (0..row).step_by(item) {
        bytes.chunks_exact(row).for_each(|row| out.extend_from_slice(&row[at..at + item]));
    }
    out
}

/// Rows and columns of the scales of a part, and where the part begins within its first block.
fn scale_ranges(
    format: Quant,
    rows: &Range<usize>,
    cols: &Range<usize>,
) -> (Range<usize>, Range<usize>, (usize, usize)) {
    match format {
        Quant::Affine { group, .. } | Quant::Int4 { group } | Quant::Fp4 { group } => {
            (rows.clone(), cols.start / group..cols.end / group, (0, 0))
        }
        Quant::Fp8 { rows: high, cols: wide } => (
            rows.start / high..rows.end.div_ceil(high),
            cols.start / wide..cols.end.div_ceil(wide),
            (rows.start % high, cols.start % wide),
        ),
        Quant::Gguf(_) => (0..0, 0..0, (0, 0)),
    }
}

/// Rows and columns of a tensor, in memory.
pub(crate) struct Slice<'n> {
    name: &'n str,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    form: Held,
}

enum Held {
    Plain(DType),
    Quantised { format: Quant, scales: Option<Plain>, biases: Option<Plain>, origin: (usize, usize) },
}

struct Plain {
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Plain {
    fn view<'s>(&'s self, name: &'s str) -> TensorView<'s> {
        let row_stride_bytes = self.cols * self.dtype.bytes();
        let (dtype, rows, cols) = (self.dtype, self.rows, self.cols);
        TensorView { name, dtype, rows, cols, row_stride_bytes, bytes: &self.bytes }
    }
}

impl<'n> Slice<'n> {
    /// Numbers that were made, not read.
    pub(crate) fn made(name: &'n str, dtype: DType, rows: usize, cols: usize, bytes: Vec<u8>) -> Slice<'n> {
        Slice { name, rows, cols, bytes, form: Held::Plain(dtype) }
    }

    /// Columns of it that cut groups, in groups of the form `smaller`.
    fn regroup(self, cols: Range<usize>, smaller: (usize, usize)) -> Slice<'n> {
        let MatrixView::Quantised(view) = self.view() else { return self };
        let made = regroup::regroup(&view, cols.clone(), smaller);
        Slice::regrouped(self.name, self.rows, cols.len(), made)
    }

    /// Rows and columns that were made of others.
    fn regrouped(name: &'n str, rows: usize, cols: usize, made: Regrouped) -> Slice<'n> {
        let groups = cols / made.format.align_cols();
        let numbers = |bytes| Some(Plain { dtype: made.dtype, rows, cols: groups, bytes });
        let (scales, biases) = (numbers(made.scales), numbers(made.biases));
        let form = Held::Quantised { format: made.format, scales, biases, origin: (0, 0) };
        Slice { name, rows, cols, bytes: made.codes, form }
    }

    /// As the seam takes it.
    pub(crate) fn view(&self) -> MatrixView<'_> {
        let (name, rows, cols) = (self.name, self.rows, self.cols);
        match &self.form {
            Held::Plain(dtype) => {
                let row_stride_bytes = cols * dtype.bytes();
                TensorView { name, dtype: *dtype, rows, cols, row_stride_bytes, bytes: &self.bytes }.into()
            }
            Held::Quantised { format, scales, biases, origin } => QuantView {
                name,
                format: *format,
                rows,
                cols,
                row_stride_bytes: format.code_bytes(cols),
                bytes: &self.bytes,
                scales: scales.as_ref().map(|scales| scales.view(name)),
                biases: biases.as_ref().map(|biases| biases.view(name)),
                origin: *origin,
            }
            .into(),
        }
    }

    /// Rows `first`, `first + 2` and so on, where no two rows share a scale.
    pub(crate) fn rows_in_turn(&self, first: usize) -> MatrixView<'_> {
        fn cut(view: TensorView<'_>, first: usize) -> TensorView<'_> {
            let stride = view.row_stride_bytes;
            let bytes = view.bytes.get(first * stride..).unwrap_or_default();
            TensorView { rows: view.rows / 2, row_stride_bytes: 2 * stride, bytes, ..view }
        }
        match self.view() {
            MatrixView::Plain(view) => cut(view, first).into(),
            MatrixView::Quantised(view) => {
                let stride = view.row_stride_bytes;
                QuantView {
                    rows: view.rows / 2,
                    row_stride_bytes: 2 * stride,
                    bytes: view.bytes.get(first * stride..).unwrap_or_default(),
                    scales: view.scales.map(|scales| cut(scales, first)),
                    biases: view.biases.map(|biases| cut(biases, first)),
                    ..view
                }
                .into()
            }
        }
    }

    /// Numbers `first`, `first + 2` and so on of a vector.
    pub(crate) fn in_turn(&self, first: usize) -> Slice<'n> {
        let Held::Plain(dtype) = self.form else { panic!("{} is quantised", self.name) };
        let items = self.bytes.chunks_exact(dtype.bytes()).skip(first).step_by(2);
        Slice::made(self.name, dtype, 1, self.cols / 2, items.flatten().copied().collect())
    }

    /// As the seam takes numbers that are not multiplied. Panics on codes: the checkpoint has refused those.
    pub(crate) fn numbers(&self) -> TensorView<'_> {
        match self.view() {
            MatrixView::Plain(view) => view,
            MatrixView::Quantised(view) => panic!("{} is quantised", view.name),
        }
    }
}
