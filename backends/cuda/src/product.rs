//! Which kernel computes a product: by rows, widths, format and type.

use backend::BackendError;

use crate::args::{ConvertArgs, DecodeArgs, ProductArgs, QuantArgs};
use crate::device::{Device, THREADS};
use crate::driver::{Dense, Driver};
use crate::fp8::Rounded;
use crate::weight::{AFFINE, Data, FP4, FP8, INT4, Matrix, Part};

/// A kernel of `product.cu`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    pub(crate) kernel: &'static str,
    /// Rows of a block.
    pub(crate) rows: usize,
    /// Outputs of a block.
    outputs: usize,
    threads: u32,
    shared_bytes: usize,
}

/// Stages of shared memory for `rows` by 128 outputs, 40 padded inputs each.
const fn stages(rows: usize) -> usize {
    3 * (rows + 128) * 40 * 2
}

/// For many rows.
pub(crate) const MANY: Tiling =
    Tiling { kernel: "product_many", rows: 128, outputs: 128, threads: 256, shared_bytes: stages(128) };
/// The same where warp groups multiply (`kernels/product_group.cu`): three stages of 64 inputs, for numbers, words and codes.
const GROUPS: [Tiling; 3] =
    [groups("product_group_plain"), groups("product_group_words"), groups("product_group_codes")];
const SOME: Tiling =
    Tiling { kernel: "product_some", rows: 32, outputs: 128, threads: 128, shared_bytes: stages(32) };
const FEW: Tiling = Tiling { kernel: "product_few", rows: 8, outputs: 8, threads: 256, shared_bytes: 0 };
const PLAIN_F32: Tiling =
    Tiling { kernel: "product_plain_f32", rows: 32, outputs: 32, threads: 256, shared_bytes: 0 };
const PLAIN_BF16: Tiling = Tiling { kernel: "product_plain_bf16", ..PLAIN_F32 };

const fn groups(kernel: &'static str) -> Tiling {
    let shared_bytes = 3 * (MANY.rows + MANY.outputs) * 64 * 2;
    Tiling { kernel, shared_bytes, ..MANY }
}

/// From so many rows on a quantised matrix is decoded once and given to the library.
const ROWS_DECODED: usize = 256;

/// Where a bias begins that a library takes, in bytes.
const BIAS_ALIGN: u64 = 16;

/// Rows that meet the experts of a layer, as `routes` has placed them.
pub(crate) struct Routed {
    pub(crate) tiling: Tiling,
    pub(crate) tiles: u64,
    pub(crate) tiles_max: usize,
    /// Source row of every place, or 0: inputs lie in order of place.
    pub(crate) rows: u64,
    /// Rows of the inputs.
    pub(crate) rows_count: usize,
    pub(crate) places: usize,
}

impl<D: Driver> Device<D> {
    /// The kernel for `rows` rows of `inputs`.
    pub(crate) fn tiling(&self, rows: usize, inputs: usize) -> Tiling {
        if !self.bf16() {
            return PLAIN_F32;
        }
        match rows {
            _ if !inputs.is_multiple_of(8) => PLAIN_BF16,
            0..=8 => FEW,
            9..=64 => SOME,
            _ => MANY,
        }
    }

    /// `x W^T + bias` of `rows` rows, dense, in the step's dtype or f32.
    pub(crate) fn product(
        &self,
        matrix: &Matrix<D>,
        x: u64,
        rows: usize,
        out: u64,
        out_f32: bool,
    ) -> Result<(), BackendError> {
        self.multiply(matrix, true, x, rows, out, out_f32)
    }

    /// `x W^T` of `rows` rows, dense, in f32: who reads it adds the bias.
    pub(crate) fn product_unbiased(
        &self,
        matrix: &Matrix<D>,
        x: u64,
        rows: usize,
        out: u64,
    ) -> Result<(), BackendError> {
        self.multiply(matrix, false, x, rows, out, true)
    }

    fn multiply(
        &self,
        matrix: &Matrix<D>,
        biased: bool,
        x: u64,
        rows: usize,
        out: u64,
        out_f32: bool,
    ) -> Result<(), BackendError> {
        let item = if out_f32 { 4 } else { self.dtype.bytes() };
        let mut rounded: Option<Rounded<D>> = None;
        for part in &matrix.parts {
            let at = out + (part.first * item) as u64;
            let of_part = self.of(matrix, part);
            let tiling = self.tiling(rows, matrix.inputs);
            let args = ProductArgs {
                x,
                out: at,
                bias: if biased { of_part.bias } else { 0 },
                m: rows as u32,
                out_f32: u32::from(out_f32),
                ..of_part
            };
            if self.multiplies_rounded(tiling, &args) {
                let rounded = Rounded::once(&mut rounded, self, x, rows, matrix.inputs)?;
                self.product_fp8(rounded, rows.div_ceil(tiling.rows), args)?;
                continue;
            }
            if rows > FEW.rows && self.dense_part(matrix, part, &args)? {
                continue;
            }
            self.run(tiling, rows.div_ceil(tiling.rows), part.outputs, &args)?;
        }
        Ok(())
    }

    /// What a part of a matrix brings to a product.
    fn of(&self, matrix: &Matrix<D>, part: &Part<D>) -> ProductArgs {
        let first = (part.first * self.dtype.bytes()) as u64;
        let args = ProductArgs {
            bias: matrix.bias.as_ref().map_or(0, |bias| bias.address + first),
            n: part.outputs as u32,
            k: matrix.inputs as u32,
            out_stride: matrix.outputs as u32,
            ..ProductArgs::default()
        };
        match &part.data {
            Data::Plain(memory) => ProductArgs { w: memory.address, ..args },
            Data::Quantised { args: quant, strides: (codes_expert, scales_expert), .. } => ProductArgs {
                quant: *quant,
                codes_expert: *codes_expert,
                scales_expert: *scales_expert,
                ..args
            },
        }
    }

    /// Through the device's library, where it has one: the dense product that `args` are of.
    fn dense_part(
        &self,
        matrix: &Matrix<D>,
        part: &Part<D>,
        args: &ProductArgs,
    ) -> Result<bool, BackendError> {
        let out_f32 = args.out_f32 != 0 || !self.bf16();
        // A library wants a bias of the type that it writes, in its places.
        if args.bias != 0 && (out_f32 == self.bf16() || !args.bias.is_multiple_of(BIAS_ALIGN)) {
            return Ok(false);
        }
        let rows = args.m as usize;
        let dense = |w| Dense {
            dtype: self.dtype,
            x: args.x,
            w,
            bias: args.bias,
            out: args.out,
            out_f32,
            m: rows,
            n: part.outputs,
            k: matrix.inputs,
            out_stride: matrix.outputs,
        };
        match &part.data {
            Data::Plain(memory) => self.queue().dense(&dense(memory.address)),
            Data::Quantised { args, .. } if rows >= ROWS_DECODED && self.bf16() => {
                let decoded = self.elements(part.outputs * matrix.inputs)?;
                self.decode(*args, 0, part.outputs, matrix.inputs, decoded.address)?;
                self.queue().dense(&dense(decoded.address))
            }
            Data::Quantised { .. } => Ok(false),
        }
    }

    /// The product of every place with the matrix of its expert.
    pub(crate) fn experts(
        &self,
        matrix: &Matrix<D>,
        routed: &Routed,
        x: u64,
        out: u64,
        out_f32: bool,
    ) -> Result<(), BackendError> {
        let item = if out_f32 { 4 } else { self.dtype.bytes() };
        let mut rounded = None;
        for part in &matrix.parts {
            let args = ProductArgs {
                x,
                out: out + (part.first * item) as u64,
                rows: routed.rows,
                tiles: routed.tiles,
                m: routed.places as u32,
                out_f32: u32::from(out_f32),
                ..self.of(matrix, part)
            };
            if self.multiplies_rounded(routed.tiling, &args) {
                let rounded = Rounded::once(&mut rounded, self, x, routed.rows_count, matrix.inputs)?;
                self.product_fp8(rounded, routed.tiles_max, args)?;
                continue;
            }
            self.run(routed.tiling, routed.tiles_max, part.outputs, &args)?;
        }
        Ok(())
    }

    fn run(
        &self,
        tiling: Tiling,
        tiles: usize,
        outputs: usize,
        args: &ProductArgs,
    ) -> Result<(), BackendError> {
        let tiling = match tiling.kernel == MANY.kernel && self.group_products {
            true => in_groups(args),
            false => tiling,
        };
        self.run_as(tiling, tiles, outputs, args)
    }

    /// With no other kernel than this.
    pub(crate) fn run_as(
        &self,
        tiling: Tiling,
        tiles: usize,
        outputs: usize,
        args: &ProductArgs,
    ) -> Result<(), BackendError> {
        let grid = [outputs.div_ceil(tiling.outputs) as u32, tiles as u32, 1];
        self.launch(tiling.kernel, grid, tiling.threads, tiling.shared_bytes, args)
    }

    /// Rows of a quantised matrix as elements of the step's dtype; `rows`: which, or 0 for the first `count`.
    pub(crate) fn decode(
        &self,
        quant: QuantArgs,
        rows: u64,
        count: usize,
        cols: usize,
        out: u64,
    ) -> Result<(), BackendError> {
        let args = DecodeArgs { quant, rows, out, cols: cols as u32 };
        self.launch(
            self.of_type("decode_rows_f32", "decode_rows_bf16"),
            [count as u32, 1, 1],
            THREADS,
            0,
            &args,
        )
    }

    /// bf16 to f32.
    pub(crate) fn widen(&self, x: u64, out: u64, count: usize) -> Result<(), BackendError> {
        self.over_all("widen", count, &ConvertArgs { x, out, count: count as u64 })
    }

    /// f32 to bf16.
    pub(crate) fn narrow(&self, x: u64, out: u64, count: usize) -> Result<(), BackendError> {
        self.over_all("narrow", count, &ConvertArgs { x, out, count: count as u64 })
    }

    /// `x W^T` with `outputs` rows of numbers at `w`: some heads of a product of heads.
    pub(crate) fn plain_product(
        &self,
        w: u64,
        outputs: usize,
        inputs: usize,
        x: u64,
        rows: usize,
        out: u64,
    ) -> Result<(), BackendError> {
        let dense = Dense {
            dtype: self.dtype,
            x,
            w,
            bias: 0,
            out,
            out_f32: !self.bf16(),
            m: rows,
            n: outputs,
            k: inputs,
            out_stride: outputs,
        };
        if rows > FEW.rows && self.queue().dense(&dense)? {
            return Ok(());
        }
        let (m, n, k, out_stride) = (rows as u32, outputs as u32, inputs as u32, outputs as u32);
        let args = ProductArgs { w, x, out, m, n, k, out_stride, ..ProductArgs::default() };
        let tiling = self.tiling(rows, inputs);
        self.run(tiling, rows.div_ceil(tiling.rows), outputs, &args)
    }
}

/// The kernel of warp groups for these weights.
pub(crate) fn in_groups(args: &ProductArgs) -> Tiling {
    let [plain, words, codes] = GROUPS;
    match args {
        ProductArgs { w: 0, quant, .. } if in_words(quant) => words,
        ProductArgs { w: 0, .. } => codes,
        _ => plain,
    }
}

/// Whether eight numbers lie in whole words and share a scale: FP8, FP4, INT4, and MLX's formats of 4 and 8 bits.
fn in_words(quant: &QuantArgs) -> bool {
    let aligned = quant.row_bytes.is_multiple_of(4) && quant.group.is_multiple_of(8);
    match quant.format {
        FP8 => aligned && quant.origin_col.is_multiple_of(8) && quant.cols.is_multiple_of(8),
        AFFINE | INT4 | FP4 => aligned && [4, 8].contains(&quant.bits),
        _ => false,
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use backend::{Backend, DType, DeviceOptions, Group, KSum, Linear, TensorView, WeightSource};
    use half::bf16;

    use super::*;
    use crate::device::Open;
    use crate::emulator::Emulated;
    use crate::step::Fetched;
    use crate::weight::Kind;

    const ROWS: usize = 20;
    const INPUTS: usize = 16;
    const OUTPUTS: usize = 24;

    /// Whole numbers that are exact in both types, as are their products.
    fn numbers(count: usize, dtype: DType) -> Vec<u8> {
        let numbers = (0..count).map(|at| (at * 7 % 5) as f32 - 2.0);
        match dtype {
            DType::BF16 => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => numbers.flat_map(f32::to_le_bytes).collect(),
        }
    }

    /// The product on emulated device `number`, and whether a kernel of ours made it.
    fn product(number: usize, dtype: DType, out_f32: bool) -> (Vec<u8>, bool) {
        let driver = Emulated::open(number, None).unwrap();
        let options = DeviceOptions { dtype, block_tokens: 16, ..DeviceOptions::default() };
        let mut device = Device::over(driver.clone(), &options, Group::alone()).unwrap();
        let [x, w, bias] = [ROWS * INPUTS, OUTPUTS * INPUTS, OUTPUTS].map(|count| numbers(count, dtype));
        let view = |bytes, rows, cols| {
            let row_stride_bytes = cols * dtype.bytes();
            TensorView { name: "test", dtype, rows, cols, row_stride_bytes, bytes }
        };
        let parts = vec![view(&w, OUTPUTS, INPUTS).into()];
        let linear = Linear { parts, bias: Some(vec![view(&bias, 1, OUTPUTS)]), sum: KSum::Ascending };
        let weight = device.load(&WeightSource::Linear(linear)).unwrap();
        let Kind::Product(matrix) = &*weight.0 else { panic!("no product") };
        let (words, _) = x.as_chunks();
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let x = device.pool.send(&words).unwrap();
        let bytes = ROWS * OUTPUTS * if out_f32 { 4 } else { dtype.bytes() };
        let out = device.pool.take(bytes).unwrap();
        device.product(matrix, x.address, ROWS, out.address, out_f32).unwrap();
        let fetched = Fetched::of(&device, out.address, bytes).unwrap();
        (fetched.bytes().unwrap().to_vec(), driver.launched().any(|kernel| kernel.starts_with("product")))
    }

    #[test]
    fn experts_have_biases_all_or_none() {
        let options = DeviceOptions { dtype: DType::F32, block_tokens: 16, ..DeviceOptions::default() };
        let mut device = Device::over(Emulated::open(0, None).unwrap(), &options, Group::alone()).unwrap();
        let [w, bias] = [OUTPUTS * INPUTS, OUTPUTS].map(|count| numbers(count, DType::F32));
        let view = |bytes, rows, cols| TensorView {
            name: "test",
            dtype: DType::F32,
            rows,
            cols,
            row_stride_bytes: cols * 4,
            bytes,
        };
        let mut load = |biases: &[Option<usize>]| {
            let expert = |count: &Option<usize>| Linear {
                parts: vec![view(&w, OUTPUTS, INPUTS).into()],
                bias: count.map(|count| vec![view(&bias[..count * 4], 1, count)]),
                sum: KSum::Tree { ranges: 8 },
            };
            let experts: Vec<Linear<'_>> = biases.iter().map(expert).collect();
            device.load(&WeightSource::Experts(&&experts[..])).map(drop).map_err(|error| error.to_string())
        };
        load(&[None, None]).unwrap();
        load(&[Some(OUTPUTS), Some(OUTPUTS)]).unwrap();
        for wrong in [[None, Some(OUTPUTS)], [Some(OUTPUTS), None], [Some(OUTPUTS), Some(8)]] {
            assert!(load(&wrong).unwrap_err().contains("bias"), "{wrong:?}");
        }
    }

    /// A library adds biases of the type that it writes; others are added by kernels.
    #[test]
    fn biases_go_to_the_library_with_their_products() {
        for (dtype, out_f32, ours) in
            [(DType::BF16, false, false), (DType::BF16, true, true), (DType::F32, true, false)]
        {
            let (with_library, by_kernel) = product(2, dtype, out_f32);
            assert_eq!(by_kernel, ours, "{dtype}, f32 out: {out_f32}");
            assert_eq!((with_library, true), product(0, dtype, out_f32), "{dtype}, f32 out: {out_f32}");
        }
    }
}
