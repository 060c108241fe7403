//! Products of FP8 weights with activations that are rounded to FP8 too, where that was asked for: `kernels/fp8.cu`.

use backend::BackendError;

use crate::args::{Fp8Args, ProductArgs, RoundArgs};
use crate::device::{Device, THREADS};
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::product::{MANY, Tiling};
use crate::weight::FP8;

/// Inputs that share a scale.
const CHUNK: usize = 128;
/// Rows and outputs of a block: rows are those of [`MANY`], whose tiles it takes.
const TILE: usize = MANY.rows;
/// Two stages of padded codes, and a factor for every row and output of each.
const SHARED_BYTES: usize = 2 * 2 * TILE * (CHUNK + 16 + 4);

/// Activations in FP8, with their scales.
pub(crate) struct Rounded<D: Driver> {
    codes: Buffer<D>,
    scales: Buffer<D>,
}

impl<D: Driver> Rounded<D> {
    /// Of `[rows, width]` in bf16, made when first asked for.
    pub(crate) fn once<'a>(
        made: &'a mut Option<Self>,
        device: &Device<D>,
        x: u64,
        rows: usize,
        width: usize,
    ) -> Result<&'a Self, BackendError> {
        if let Some(made) = made {
            return Ok(made);
        }
        let chunks = width.div_ceil(CHUNK);
        let (codes, scales) = (device.pool.take(rows * width)?, device.pool.take(rows * chunks * 4)?);
        let args = RoundArgs {
            x,
            codes: codes.address,
            scales: scales.address,
            width: width as u32,
            chunks: chunks as u32,
        };
        device.each("round_rows", rows, &args)?;
        Ok(made.insert(Rounded { codes, scales }))
    }
}

impl<D: Driver> Device<D> {
    /// Whether this product is one of FP8 on both sides: asked for, many rows, and chunks of inputs that have one scale each.
    pub(crate) fn multiplies_rounded(&self, tiling: Tiling, args: &ProductArgs) -> bool {
        let quant = &args.quant;
        self.rounds
            && tiling.kernel == MANY.kernel
            && args.w == 0
            && quant.format == FP8
            && args.k.is_multiple_of(16)
            && quant.row_bytes.is_multiple_of(16)
            && quant.group.is_multiple_of(CHUNK as u32)
            && quant.origin_col.is_multiple_of(CHUNK as u32)
    }

    /// `args` with `x` rounded, over so many tiles of rows.
    pub(crate) fn product_fp8(
        &self,
        x: &Rounded<D>,
        tiles: usize,
        args: ProductArgs,
    ) -> Result<(), BackendError> {
        let grid = [(args.n as usize).div_ceil(TILE) as u32, tiles as u32, 1];
        let args =
            Fp8Args { product: ProductArgs { x: x.codes.address, ..args }, x_scales: x.scales.address };
        self.launch("product_fp8", grid, THREADS, SHARED_BYTES, &args)
    }
}
