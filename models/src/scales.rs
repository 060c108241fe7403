//! Scales and biases of quantised tensors as they lie in files: numbers, or bytes that become numbers as they are read.

use backend::quant::e4m3;
use backend::{DType, e8m0};
use half::bf16;
use safetensors::Dtype;

use crate::ModelError;
use crate::data_file::DataFile;
use crate::weights::{Place, plain};

/// Scales or biases of a quantised tensor, `[rows, cols]`.
#[derive(Clone, Debug)]
pub(crate) struct Scales {
    pub(crate) kind: ScaleKind,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) place: Place,
}

/// What the bytes of a scale are.
#[derive(Clone, Debug)]
pub(crate) enum ScaleKind {
    Numbers(DType),
    /// The power of two is a byte.
    E8m0,
    /// A byte, times one number for all where there is one.
    E4m3(Option<Factor>),
}

/// An f32 that multiplies all scales, or divides them.
#[derive(Clone, Debug)]
pub(crate) struct Factor {
    pub(crate) place: Place,
    pub(crate) divides: bool,
}

impl Scales {
    /// The bytes that make them.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        let factor = match &self.kind {
            ScaleKind::E4m3(Some(factor)) => Some(&factor.place),
            _ => None,
        };
        std::iter::once(&self.place).chain(factor)
    }
}

impl ScaleKind {
    /// Numbers of a file's type; `None` where they are none.
    pub(crate) fn numbers(dtype: Dtype) -> Option<Self> {
        plain(dtype).map(ScaleKind::Numbers)
    }

    /// The type in memory, which has every number exactly, but for products with a factor, which are rounded to it.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            ScaleKind::Numbers(dtype) => *dtype,
            ScaleKind::E8m0 | ScaleKind::E4m3(None) => DType::BF16,
            ScaleKind::E4m3(Some(_)) => DType::F32,
        }
    }

    /// Bytes of one in the file.
    pub(crate) fn stored_bytes(&self) -> usize {
        match self {
            ScaleKind::Numbers(dtype) => dtype.bytes(),
            ScaleKind::E8m0 | ScaleKind::E4m3(_) => 1,
        }
    }

    /// What was read of the file, as numbers of [`ScaleKind::dtype`].
    pub(crate) fn widened(&self, files: &[DataFile], stored: Vec<u8>) -> Result<Vec<u8>, ModelError> {
        let halves = |number: fn(u8) -> f32| {
            stored.iter().flat_map(|code| bf16::from_f32(number(*code)).to_le_bytes()).collect()
        };
        Ok(match self {
            ScaleKind::Numbers(_) => stored,
            ScaleKind::E8m0 => halves(e8m0),
            ScaleKind::E4m3(None) => halves(e4m3),
            ScaleKind::E4m3(Some(Factor { place, divides })) => {
                let bytes = files[place.file].read(place.range.start, place.len() as usize)?;
                let factor = bytes.first_chunk().map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes));
                let number = |code| if *divides { e4m3(code) / factor } else { e4m3(code) * factor };
                stored.iter().flat_map(|code| number(*code).to_le_bytes()).collect()
            }
        })
    }
}
