//! Whether prompts are attended by the products of a GPU's generation ([`Wide`]: `kernels/hopper.cu`, `kernels/blackwell.cu`), and
//! multiplied with weights by warp groups (`kernels/product_group.cu`). A device that has them gets a small prompt and some small
//! products when it is opened, to which both kinds of kernels must answer alike: who trusts an instruction looks first.

use backend::{BackendError, GgufBlock};
use half::bf16;

use crate::args::{AttendArgs, ProductArgs, QuantArgs};
use crate::attend::{FLASH, Flash, Kernel};
use crate::device::Device;
use crate::driver::{Driver, Wide};
use crate::product::{MANY, in_groups};
use crate::step::Fetched;
use crate::weight::{AFFINE, gguf_code};

/// Tokens of the prompt, the last of which are attended: some tiles of keys, so that every part of the kernels' loops has its turn,
/// and every place for a tile and parity of a barrier comes round.
const SEEN: usize = 800;
const TOKENS: usize = 150;
/// Its heads of queries, all of which share keys and values.
const HEADS: usize = 2;
/// Largest difference, as a part of the largest value: weights are rounded to bf16 by both, against other peaks.
const LIMIT: f32 = 0.02;
/// The same of products, whose sums are f32 of the same numbers in another order.
const PRODUCT_LIMIT: f32 = 1e-3;
/// Of products: experts, outputs and inputs of one, which end within tiles, and rows.
const EXPERTS: usize = 3;
const OUTPUTS: usize = 72;
const INPUTS: usize = 160;
const ROWS: usize = 150;

/// Whether both kinds attend alike on `device`; says so where they do not.
pub(crate) fn attends<D: Driver>(device: &Device<D>, wide: Wide) -> bool {
    FLASH.iter().filter_map(|flash| Some((flash, flash.kinds(wide)?))).all(|(flash, kinds)| {
        let what = format!("attention with keys of {}", flash.key_max);
        alike(wide, &what, difference(device, flash, kinds), LIMIT)
    })
}

/// Whether a trial's `difference` is within its limit; says so where it is not.
fn alike(wide: Wide, what: &str, difference: Result<f32, BackendError>, limit: f32) -> bool {
    let reason = match difference {
        Ok(difference) if difference <= limit => return true,
        Ok(difference) => format!("off by {difference} of the largest value"),
        Err(error) => error.to_string(),
    };
    eprintln!("cuda: goes without {wide}, which failed a trial: {what}: {reason}");
    false
}

/// The largest difference between the two kernels' answers, as a part of the largest value. Not a number where one is.
fn difference<D: Driver>(device: &Device<D>, flash: &Flash, kinds: [Kernel; 2]) -> Result<f32, BackendError> {
    let (dim, value_dim) = (flash.key_max, flash.value_max);
    let q = device.pool.send(&numbers(1, TOKENS * HEADS * dim))?;
    let k = device.pool.send(&numbers(2, SEEN * dim))?;
    let v = device.pool.send(&numbers(3, SEEN * value_dim))?;
    let firsts = device.pool.send(&[0])?;
    let mut answers = Vec::new();
    for kernel in kinds {
        let rows = kernel.queries / HEADS;
        let tiles = (0..TOKENS).step_by(rows).flat_map(|first| {
            let position = SEEN - TOKENS + first;
            [0, first as u32, rows.min(TOKENS - first) as u32, position as u32]
        });
        let tiles = device.pool.send(&tiles.collect::<Vec<u32>>())?;
        let bytes = TOKENS * HEADS * value_dim * 2;
        let out = device.pool.take(bytes)?;
        let args = AttendArgs {
            q: q.address,
            out: out.address,
            k: k.address,
            v: v.address,
            firsts: firsts.address,
            tiles: tiles.address,
            q_row: (HEADS * dim) as u32,
            q_head: dim as u32,
            k_token: dim as u32,
            k_head: dim as u32,
            v_token: value_dim as u32,
            v_head: value_dim as u32,
            heads: HEADS as u32,
            group: HEADS as u32,
            pack: HEADS as u32,
            key_dim: dim as u32,
            value_dim: value_dim as u32,
            splits: 1,
            scale: (dim as f32).powf(-0.5),
            ..AttendArgs::default()
        };
        flash.launch(device, kernel, [TOKENS.div_ceil(rows), 1, 1], &args)?;
        answers.push(Fetched::of(device, out.address, bytes)?);
    }
    let values = |answer: &Fetched<D>| -> Result<Vec<f32>, BackendError> {
        let (halves, _) = answer.bytes()?.as_chunks();
        Ok(halves.iter().map(|half| bf16::from_le_bytes(*half).to_f32()).collect())
    };
    Ok(apart(&values(&answers[0])?, &values(&answers[1])?))
}

/// The largest difference, as a part of the largest value. Not a number where one is.
fn apart(left: &[f32], right: &[f32]) -> f32 {
    let largest = left.iter().fold(0f32, |most, x| most.max(x.abs()));
    let differences = left.iter().zip(right).map(|(x, y)| (x - y).abs() / largest);
    differences.fold(0f32, |most, x| if x > most || x.is_nan() { x } else { most })
}

/// Whether both kinds multiply alike on `device`; says so where they do not.
pub(crate) fn multiplies<D: Driver>(device: &Device<D>) -> bool {
    ["numbers", "words of codes", "blocks of codes"].iter().all(|kind| {
        let what = format!("products with {kind}");
        alike(Wide::Groups, &what, product_difference(device, kind), PRODUCT_LIMIT)
    })
}

/// The largest difference of experts' products by the two kernels, as a part of the largest value.
fn product_difference<D: Driver>(device: &Device<D>, kind: &str) -> Result<f32, BackendError> {
    let x = device.pool.send(&numbers(1, ROWS * INPUTS))?;
    // Tiles as `routes` makes them: full, ragged and of an expert that is not the next, and none.
    let tiles = [[0, 0, 128], [2, 128, 70], [0, 0, 0]];
    let places = 198u32;
    let tiles_sent = device.pool.send(tiles.as_flattened())?;
    let sources = device.pool.send(&(0..places).map(|at| at * 7 % ROWS as u32).collect::<Vec<_>>())?;
    let of = |codes: u64, scales: u64, format, group: usize, row_bytes: usize| QuantArgs {
        codes,
        scales,
        biases: scales,
        format,
        bits: 8,
        group: group as u32,
        group_rows: 1,
        scale_type: 2,
        scale_cols: (INPUTS / group) as u32,
        row_bytes: row_bytes as u32,
        cols: INPUTS as u32,
        ..QuantArgs::default()
    };
    let lines = EXPERTS * OUTPUTS;
    let scales = device.pool.send(&numbers(3, lines * INPUTS / 32))?;
    let (weights, w, quant, row_bytes) = match kind {
        "numbers" => {
            let weights = device.pool.send(&numbers(2, lines * INPUTS))?;
            let at = weights.address;
            (weights, at, QuantArgs::default(), 0)
        }
        "words of codes" => {
            let weights = device.pool.send(&numbers(2, lines * INPUTS / 2))?;
            let quant = of(weights.address, scales.address, AFFINE, 32, INPUTS);
            (weights, 0, quant, INPUTS)
        }
        _ => {
            // Q8_0: blocks of a half-precision scale, here 1, and 32 codes.
            let row_bytes = INPUTS / 32 * 34;
            let mut codes: Vec<u8> =
                numbers(2, lines * row_bytes / 2).iter().flat_map(|word| word.to_le_bytes()).collect();
            codes.chunks_exact_mut(34).for_each(|block| block[..2].copy_from_slice(&0x3c00u16.to_le_bytes()));
            let (words, _) = codes.as_chunks();
            let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
            let weights = device.pool.send(&words)?;
            let quant = of(weights.address, scales.address, gguf_code(GgufBlock::Q8_0), 32, row_bytes);
            (weights, 0, quant, row_bytes)
        }
    };
    let mut answers = Vec::new();
    for groups in [false, true] {
        let bytes = places as usize * OUTPUTS * 4;
        let out = device.pool.take(bytes)?;
        let args = ProductArgs {
            quant,
            w,
            x: x.address,
            out: out.address,
            rows: sources.address,
            tiles: tiles_sent.address,
            codes_expert: (OUTPUTS * row_bytes) as u64,
            scales_expert: (OUTPUTS * INPUTS / 32) as u64,
            m: places,
            n: OUTPUTS as u32,
            k: INPUTS as u32,
            out_stride: OUTPUTS as u32,
            out_f32: 1,
            ..ProductArgs::default()
        };
        let tiling = if groups { in_groups(&args) } else { MANY };
        device.run_as(tiling, tiles.len(), OUTPUTS, &args)?;
        answers.push(Fetched::of(device, out.address, bytes)?);
    }
    drop(weights);
    let values = |answer: &Fetched<D>| -> Result<Vec<f32>, BackendError> {
        let (words, _) = answer.bytes()?.as_chunks();
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    };
    Ok(apart(&values(&answers[0])?, &values(&answers[1])?))
}

/// So many numbers in bf16 between -2 and 2, two in a word.
fn numbers(seed: u32, count: usize) -> Vec<u32> {
    let mut state = seed;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        u32::from(bf16::from_f32((state >> 8) as f32 / (1u32 << 22) as f32 - 2.0).to_bits())
    };
    (0..count / 2).map(|_| number() | number() << 16).collect()
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use backend::{Backend, DType, DeviceOptions, Group};

    use super::*;
    use crate::EmulatedBackend;
    use crate::device::Open;
    use crate::driver::{Launch, fault};
    use crate::emulator::Emulated;

    /// What fails a trial is left alone, and what brings the device down is named to whoever starts the node.
    #[test]
    fn a_trial_is_passed_by_what_is_within_its_limit() {
        let options = DeviceOptions { dtype: DType::BF16, ..DeviceOptions::default() };
        let device = EmulatedBackend::open(&options, Group::alone()).unwrap();
        let passes = |difference| alike(Wide::Memory, "test", difference, LIMIT);
        assert!(passes(Ok(LIMIT)));
        assert!(!passes(Ok(LIMIT * 1.1)));
        assert!(!passes(Ok(apart(&[1.0, 2.0], &[1.0, f32::NAN]))));
        assert!(!passes(Err(fault("kernel", "refused"))));
        device.works(Wide::Memory).unwrap();
        let outside = Launch { kernel: "fault_outside", grid: [1, 1, 1], threads: 64, shared_bytes: 0 };
        device.driver().launch(outside, &[0, 1]).unwrap();
        let error = device.works(Wide::Memory).unwrap_err().to_string();
        assert!(error.contains("tcgen05") && error.contains("--cuda-attention mma"), "{error}");
    }

    /// A device that is opened beside another tries only what that has not tried: the next trial would fail.
    #[test]
    fn a_device_beside_another_knows_what_that_has_tried() {
        let of = |dtype| DeviceOptions { dtype, ..DeviceOptions::default() };
        let driver = Emulated::open(9, None).unwrap();
        let uses = |device: Device<Emulated>| device.caps().device.contains("tcgen05");
        let first = Device::over(driver.clone(), &of(DType::BF16), Group::alone()).unwrap();
        driver.lose("attend_tensor", 1);
        assert!(uses(first.beside(&of(DType::BF16), Group::alone()).unwrap()));
        let plain = first.beside(&of(DType::F32), Group::alone()).unwrap();
        assert!(!uses(plain.beside(&of(DType::BF16), Group::alone()).unwrap()));
        assert!(uses(first));
    }
}
