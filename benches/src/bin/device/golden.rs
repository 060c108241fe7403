//! Golden cases on a device beside the CPU, in one process: the largest difference of any logit.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use backend::{Backend, DType, DeviceOptions, Group, SeqId};
use backend_cpu::CpuBackend;
use models::Checkpoint;
use models::golden::Case;
use models::replay::Rank;

/// Largest differences that pass, in standard deviations of the CPU's logits.
const LIMIT_F32: f64 = 2e-4;
const LIMIT_BF16: f64 = 0.5;
/// Prompt tokens per step.
const CHUNK: usize = 512;

/// Runs every model below `root` that has a golden.json; a row of the table for each dtype. Whether all passed.
pub fn run<B: Backend>(root: &Path, options: &DeviceOptions) -> Result<bool> {
    let entries = std::fs::read_dir(root).with_context(|| root.display().to_string())?;
    let mut models: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("golden.json").exists())
        .collect();
    models.sort();
    ensure!(!models.is_empty(), "{}: no golden cases", root.display());
    let mut all = true;
    for (dtype, limit) in [(DType::F32, LIMIT_F32), (DType::BF16, LIMIT_BF16)] {
        let options = DeviceOptions { dtype, ..options.clone() };
        let (mut passed, mut worst, mut where_worst) = (0, 0.0, String::new());
        for model in &models {
            let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match compare::<B>(model, &options) {
                Ok(difference) => {
                    println!("golden {name} {dtype}: {difference:.1e} standard deviations");
                    passed += usize::from(difference <= limit);
                    // Not-a-number is the worst.
                    if difference > worst || difference.is_nan() {
                        (worst, where_worst) = (difference, name);
                    }
                }
                Err(error) => println!("golden {name} {dtype}: FAILED: {error:#}"),
            }
        }
        all &= passed == models.len();
        let verdict = if passed == models.len() { "ok" } else { "FAILED" };
        println!(
            "| golden cases, {dtype} | {verdict}: {passed} of {} | largest difference {worst:.1e} deviations ({where_worst}), limit {limit} |",
            models.len()
        );
    }
    Ok(all)
}

fn compare<B: Backend>(model: &Path, options: &DeviceOptions) -> Result<f64> {
    let checkpoint = Checkpoint::open(model)?;
    let cases = Case::read(&model.join("golden.json"), checkpoint.config())?;
    let want = logits::<CpuBackend>(&checkpoint, &cases, options)?;
    let got = logits::<B>(&checkpoint, &cases, options)?;
    ensure!(want.len() == got.len(), "{} logits, not {}", got.len(), want.len());
    let mean = want.iter().map(|x| f64::from(*x)).sum::<f64>() / want.len() as f64;
    let variance = want.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / want.len() as f64;
    let most = want.iter().zip(&got).fold(0f64, |most, (x, y)| {
        let difference = f64::from((x - y).abs());
        if difference > most || difference.is_nan() { difference } else { most }
    });
    Ok(most / variance.sqrt())
}

/// Of all cases one after the other: after the prompt, and after each id that is fed.
fn logits<B: Backend>(checkpoint: &Checkpoint, cases: &[Case], options: &DeviceOptions) -> Result<Vec<f32>> {
    let tokens = cases.iter().map(Case::tokens).max().unwrap_or(1);
    let mut rank = Rank::<B>::open(options, Group::alone(), checkpoint, tokens)?;
    let mut all = Vec::new();
    for (seq, case) in (0..).map(SeqId).zip(cases) {
        all.extend(rank.replay(seq, case, CHUNK)?);
    }
    Ok(all)
}
