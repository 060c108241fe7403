//! Finds matrices of whole numbers among the tensors of safetensors files: compressed-tensors' `weight_packed` and bytes, AWQ's
//! and GPTQ's `qweight`. Called by `huggingface`; all shapes are checked here, none is believed later.

use backend::Quant;
use safetensors::Dtype;

use crate::file::Entry;
use crate::quantisation::{Ints, Quantisation};
use crate::recode::{Packed, Packing, Recoded};
use crate::scales::{ScaleKind, Scales};
use crate::weights::{Form, Place, Stored};

/// Tensors that are read with the one of the codes: the end of their names, and of that one's.
pub(crate) const PARTS: [(&str, &str); 10] = [
    (".weight_scale", "weight_packed"),
    (".weight_shape", "weight_packed"),
    (".weight_zero_point", "weight_packed"),
    (".weight_global_scale", "weight_packed"),
    (".weight_scale_2", "weight"),
    (".weight_scale", "weight"),
    (".weight_zero_point", "weight"),
    (".scales", "qweight"),
    (".qzeros", "qweight"),
    (".g_idx", "qweight"),
];

/// How a matrix of whole numbers is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Words of a row's codes.
    Words,
    /// A byte per code.
    Bytes,
    /// Words by input.
    ByInput,
}

impl Kind {
    /// The kind of the tensor `name`, and its name without the end.
    pub(crate) fn of(name: &str, dtype: Dtype, has: impl Fn(&str, &str) -> bool) -> Option<(&str, Kind)> {
        let (base, end) = name.rsplit_once('.')?;
        match end {
            "weight_packed" if dtype != Dtype::U8 => Some((base, Kind::Words)),
            "qweight" => Some((base, Kind::ByInput)),
            "weight" if dtype == Dtype::I8 && has(base, "weight_scale") => Some((base, Kind::Bytes)),
            _ => None,
        }
    }

    /// What the file may mean by it.
    fn forms(self, quantisation: Option<&Quantisation>) -> Vec<Stock> {
        let stock =
            |name, ints: &Ints, codes, zeros| Stock { name, ints: *ints, codes, zeros, zeros_more: 0 };
        match (self, quantisation) {
            (Kind::Words, Some(Quantisation::Compressed { ints, .. })) => {
                ints.iter().map(|ints| stock("int", ints, Packing::Along, Packing::Down)).collect()
            }
            (Kind::Bytes, Some(Quantisation::Compressed { ints, .. })) => {
                let bytes = ints.iter().filter(|ints| ints.bits == 8);
                bytes.map(|ints| stock("int", ints, Packing::Signed, Packing::Signed)).collect()
            }
            (Kind::ByInput, Some(Quantisation::Awq(ints))) => {
                vec![stock("awq", ints, Packing::EvenFirst, Packing::EvenFirst)]
            }
            (Kind::ByInput, Some(Quantisation::Gptq { ints, zeros_more, .. })) => {
                let stock = stock("gptq", ints, Packing::Down, Packing::Along);
                vec![Stock { zeros_more: *zeros_more, ..stock }]
            }
            _ => Vec::new(),
        }
    }

    /// The matrix whose codes are `entry`; `part` finds its other tensors by the ends of their names.
    pub(crate) fn read<'e>(
        self,
        quantisation: Option<&Quantisation>,
        place: Place,
        entry: &Entry,
        part: impl Fn(&str) -> Option<(Place, &'e Entry)>,
    ) -> Result<Stored, String> {
        let by_input = self == Kind::ByInput;
        let Entry { dtype, shape, .. } = entry;
        let &[high, wide] = &shape[..] else { return Err(format!("shape {shape:?} is no matrix")) };
        if part("weight_g_idx").is_some() {
            return Err(
                "its inputs are not in the order of their groups (actorder), which is not supported".into()
            );
        }
        let end = if by_input { "scales" } else { "weight_scale" };
        let (scales_place, scales) = part(end).ok_or_else(|| format!("is quantised, and has no {end}"))?;
        let Some(kind) = ScaleKind::numbers(scales.dtype) else {
            return Err(format!("scales of type {}, expected BF16, F16 or F32", scales.dtype));
        };
        let forms = self.forms(quantisation);
        let fitting = forms.iter().find_map(|form| {
            let codes = form.codes(high, wide, &place)?;
            let (outputs, inputs) =
                if by_input { (codes.cols, codes.rows) } else { (codes.rows, codes.cols) };
            let group = form.ints.group.unwrap_or(inputs);
            let fits = group > 0 && group % 8 == 0 && inputs % group == 0;
            let grid =
                fits.then(|| if by_input { [inputs / group, outputs] } else { [outputs, inputs / group] });
            grid.filter(|grid| scales.shape == grid).map(|grid| (form, codes, group, grid))
        });
        let byte = self == Kind::Bytes;
        let Some((form, codes, group, grid)) =
            fitting.filter(|_| *dtype == if byte { Dtype::I8 } else { Dtype::I32 })
        else {
            let known: Vec<String> = forms.iter().map(Stock::describe).collect();
            return Err(match known.is_empty() {
                true => "quantised in a way that config.json does not name".into(),
                false => {
                    format!("{dtype} {shape:?} with scales {:?} of {}", scales.shape, known.join(" or "))
                }
            });
        };
        let (outputs, inputs) = if by_input { (codes.cols, codes.rows) } else { (codes.rows, codes.cols) };
        let scales = Scales { kind, rows: grid[0], cols: grid[1], place: scales_place };
        let zeros = part(if by_input { "qzeros" } else { "weight_zero_point" });
        if by_input && zeros.is_none() {
            return Err("is quantised, and has no qzeros".into());
        }
        let shape = vec![outputs, inputs];
        if let (4, Some(group), Packing::Along, None) =
            (form.ints.bits, form.ints.group, codes.packing, &zeros)
        {
            let form = Form::Quantised { format: Quant::Int4 { group }, scales: Some(scales), biases: None };
            return Ok(Stored { shape, place, form });
        }
        let zeros = zeros.map(|(place, entry)| form.zeros(grid, place, entry)).transpose()?;
        let order = part("g_idx").filter(|_| by_input);
        if let Some((_, order)) = &order
            && (order.dtype != Dtype::I32 || order.shape != [inputs])
        {
            return Err(format!("g_idx {} {:?}, expected I32 [{inputs}]", order.dtype, order.shape));
        }
        let groups = order.map(|(place, _)| place);
        let zeros_more = form.zeros_more;
        let recoded = Recoded { name: form.name, group, by_input, codes, scales, zeros, zeros_more, groups };
        Ok(Stored { shape, place, form: Form::Recoded(Box::new(recoded)) })
    }
}

/// One way to store a matrix.
struct Stock {
    name: &'static str,
    ints: Ints,
    codes: Packing,
    zeros: Packing,
    zeros_more: u8,
}

impl Stock {
    /// Codes that are `[high, wide]` in the file; `None` where they cannot be so many.
    fn codes(&self, high: usize, wide: usize, place: &Place) -> Option<Packed> {
        let bits = self.ints.bits;
        let numbers =
            |words: usize| words.checked_mul(32).filter(|all| all % bits == 0).map(|all| all / bits);
        let (rows, cols) = match self.codes {
            Packing::Along | Packing::EvenFirst => (high, numbers(wide)?),
            Packing::Down => (numbers(high)?, wide),
            Packing::Signed => (high, wide),
        };
        let codes = Packed { bits, rows, cols, packing: self.codes, place: place.clone() };
        (codes.stored() == Some([high, wide])).then_some(codes)
    }

    /// Zero points of `[rows, cols]` scales.
    fn zeros(&self, [rows, cols]: [usize; 2], place: Place, entry: &Entry) -> Result<Packed, String> {
        let zeros = Packed { bits: self.ints.bits, rows, cols, packing: self.zeros, place };
        let dtype = if self.zeros == Packing::Signed { Dtype::I8 } else { Dtype::I32 };
        match zeros.stored() {
            Some(shape) if entry.shape == shape && entry.dtype == dtype => Ok(zeros),
            wanted => {
                let (got, shape) = (entry.dtype, &entry.shape);
                let wanted = wanted.map_or("whole words".into(), |shape| format!("{dtype} {shape:?}"));
                Err(format!("zero points {got} {shape:?}, expected {wanted}"))
            }
        }
    }

    fn describe(&self) -> String {
        let Ints { bits, group } = self.ints;
        match group {
            Some(group) => format!("{bits} bits in groups of {group}"),
            None => format!("{bits} bits, one per output"),
        }
    }
}
