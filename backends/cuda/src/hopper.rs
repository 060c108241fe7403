//! Whether prompts are attended by the products of warp groups (`kernels/hopper.cu`). A device that has them gets a small prompt
//! when it is opened, which both kinds of kernels must answer alike: who trusts an instruction looks first.

use backend::BackendError;
use half::bf16;

use crate::args::AttendArgs;
use crate::attend::{FLASH, Flash, Kernel};
use crate::device::Device;
use crate::driver::Driver;
use crate::step::Fetched;

/// Tokens of the prompt: three tiles of keys, so that every part of the kernel's loop has its turn.
const TOKENS: usize = 300;
/// Its heads of queries, and how many of them share keys and values.
const HEADS: usize = 4;
const GROUP: usize = 2;
/// Largest difference, as a part of the largest value: weights are rounded to bf16 by both, against other peaks.
const LIMIT: f32 = 0.02;

/// Whether both kinds agree on `device`; says so where they do not.
pub(crate) fn agrees<D: Driver>(device: &Device<D>) -> bool {
    for (flash, kinds) in FLASH.iter().filter_map(|flash| Some((flash, flash.kinds()?))) {
        let reason = match difference(device, flash, kinds) {
            Ok(difference) if difference <= LIMIT => continue,
            Ok(difference) => format!("off by {difference} of the largest value"),
            Err(error) => error.to_string(),
        };
        eprintln!(
            "cuda: attention goes without products of warp groups: with keys of {} they were {reason}",
            flash.key_max
        );
        return false;
    }
    true
}

/// The largest difference between the two kernels' answers, as a part of the largest value. Not a number where one is.
fn difference<D: Driver>(device: &Device<D>, flash: &Flash, kinds: [Kernel; 2]) -> Result<f32, BackendError> {
    let (dim, value_dim, kv_heads) = (flash.key_max, flash.value_max, HEADS / GROUP);
    let q = device.pool.send(&numbers(1, TOKENS * HEADS * dim))?;
    let k = device.pool.send(&numbers(2, TOKENS * kv_heads * dim))?;
    let v = device.pool.send(&numbers(3, TOKENS * kv_heads * value_dim))?;
    let firsts = device.pool.send(&[0])?;
    let mut answers = Vec::new();
    for kernel in kinds {
        let rows = kernel.queries / GROUP;
        let tiles = (0..TOKENS).step_by(rows).flat_map(|first| {
            let position = first as u32;
            [0, position, rows.min(TOKENS - first) as u32, position]
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
            k_token: (kv_heads * dim) as u32,
            k_head: dim as u32,
            v_token: (kv_heads * value_dim) as u32,
            v_head: value_dim as u32,
            heads: HEADS as u32,
            group: GROUP as u32,
            pack: GROUP as u32,
            key_dim: dim as u32,
            value_dim: value_dim as u32,
            splits: 1,
            scale: (dim as f32).powf(-0.5),
            ..AttendArgs::default()
        };
        flash.launch(device, kernel, [TOKENS.div_ceil(rows), kv_heads, 1], &args)?;
        answers.push(Fetched::of(device, out.address, bytes)?);
    }
    let values = |answer: &Fetched<D>| -> Result<Vec<f32>, BackendError> {
        let (halves, _) = answer.bytes()?.as_chunks();
        Ok(halves.iter().map(|half| bf16::from_le_bytes(*half).to_f32()).collect())
    };
    let (left, right) = (values(&answers[0])?, values(&answers[1])?);
    let largest = left.iter().fold(0f32, |most, x| most.max(x.abs()));
    let differences = left.iter().zip(&right).map(|(x, y)| (x - y).abs() / largest);
    Ok(differences.fold(0f32, |most, x| if x > most || x.is_nan() { x } else { most }))
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
