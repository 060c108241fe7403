//! Rotary scaling of a GGUF file as `rope_scaling` of a config.json. llama.cpp keeps YaRN's numbers as keys, and those of
//! Llama 3 as a table of divisors, from which the numbers are found again: nodes compare frequencies, so a recipe must give
//! the same ones wherever it was read.

use std::f64::consts::PI;

use serde_json::{Value, json};

use crate::GgufError;
use crate::keys::Keys;

/// A divisor differs from that of its recipe by less than this.
const TOLERANCE: f64 = 1e-5;

/// Values of `high` to try first: the published one, and its neighbours.
const HIGHS: [f64; 3] = [4.0, 2.0, 8.0];

/// Numbers of Llama 3's recipe.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

/// `rope_scaling` for heads of which `dims` elements rotate, with base `theta`; null for none. `mla`: of DeepSeek's attention.
pub(crate) fn scaling(keys: &Keys<'_>, theta: f64, dims: u64, mla: bool) -> Result<Value, GgufError> {
    let table = keys.gguf.rope_freqs().filter(|table| table.iter().any(|divisor| *divisor != 1.0));
    let factor = keys.opt_number("rope.scaling.factor")?;
    let original = keys.opt_number("rope.scaling.original_context_length")?;
    // Ollama writes an empty name for none.
    let kind = match keys.opt_text("rope.scaling.type")?.filter(|kind| !kind.is_empty()) {
        Some("none") | None if factor.is_none_or(|factor| factor == 1.0 || factor == 0.0) => "none",
        // The type is left out by old writers, which knew only this one.
        None => "linear",
        Some(kind) => kind,
    };
    if let Some(table) = table {
        if kind != "none" {
            return Err(keys.error("rope.scaling.type", format!("{kind} beside the table rope_freqs.weight")));
        }
        let recipe = recover(table, theta, dims);
        let error = |reason| GgufError::format(keys.gguf.path(), "rope_freqs.weight", reason);
        let Llama3 { factor, low, high, original } = recipe.map_err(error)?;
        return Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }));
    }
    let need = || keys.error("rope.scaling.factor", "missing");
    match kind {
        "none" => Ok(Value::Null),
        "linear" => Ok(json!({ "rope_type": "linear", "factor": factor.ok_or_else(need)? })),
        "yarn" => {
            let mut yarn = json!({ "rope_type": "yarn", "factor": factor.ok_or_else(need)? });
            let original = original.or(keys.opt_number("context_length")?);
            let betas = [
                ("beta_fast", keys.opt_number("rope.scaling.yarn_beta_fast")?),
                ("beta_slow", keys.opt_number("rope.scaling.yarn_beta_slow")?),
                ("original_max_position_embeddings", original),
            ];
            for (name, number) in betas {
                if let Some(number) = number {
                    yarn[name] = json!(number);
                }
            }
            if mla {
                let key = "rope.scaling.yarn_log_multiplier";
                // A tenth of mscale_all_dim; the factor on cos and sin that mscale would add is 1 in all such files.
                let all = (keys.number(key)? * 10.0 * 1e6).round() / 1e6;
                yarn["mscale"] = json!(all);
                yarn["mscale_all_dim"] = json!(all);
            }
            Ok(yarn)
        }
        other => {
            let reason = format!("{other:?} is not supported (known: none, linear, yarn)");
            Err(keys.error("rope.scaling.type", reason))
        }
    }
}

/// Divisor of every frequency by the recipe. Source: `_compute_llama3_parameters` of transformers.
fn divisors(recipe: Llama3, theta: f64, dims: u64) -> impl Iterator<Item = f64> {
    let Llama3 { factor, low, high, original } = recipe;
    wavelengths(theta, dims).map(move |wavelength| {
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    })
}

fn wavelengths(theta: f64, dims: u64) -> impl Iterator<Item = f64> {
    (0..dims / 2).map(move |i| 2.0 * PI * theta.powf((2 * i) as f64 / dims as f64))
}

/// The recipe whose divisors are `table`. Only ratios of the last three numbers are in it, so `low` is 1, as in every
/// published model, and `high` 4 where the table leaves it open. The error says how far off the nearest recipe is.
fn recover(table: &[f32], theta: f64, dims: u64) -> Result<Llama3, String> {
    if table.len() as u64 != dims / 2 {
        return Err(format!("{} divisors for {} frequencies", table.len(), dims / 2));
    }
    let factor = table.iter().fold(1.0f64, |max, divisor| max.max((*divisor).into()));
    if !factor.is_finite() || table.iter().any(|divisor| !(1.0..).contains(divisor)) {
        return Err("a divisor below 1 or infinite".into());
    }
    let off = |recipe: &Llama3| {
        let pairs = divisors(*recipe, theta, dims).zip(table);
        pairs.map(|(want, got)| (want / f64::from(*got) - 1.0).abs()).fold(0.0, f64::max)
    };
    let originals = originals(table, factor, theta, dims);
    let recipe = |original: f64, high: f64| Llama3 { factor, low: 1.0, high, original };
    // Plain numbers before fitted ones, which carry the rounding of the table.
    let plain = originals.iter().flat_map(|original| HIGHS.map(|high| recipe(*original, high)));
    if let Some(found) = plain.clone().find(|recipe| off(recipe) < TOLERANCE) {
        return Ok(found);
    }
    let fitted = originals.iter().flat_map(|original| {
        highs(table, factor, *original, theta, dims).into_iter().map(|high| recipe(*original, high))
    });
    let nearest = plain.chain(fitted).map(|recipe| (off(&recipe), recipe)).min_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((off, found)) if off < TOLERANCE => Ok(found),
        nearest => Err(format!(
            "no recipe of Llama 3 gives these divisors (the nearest is off by {:.1e}); other tables are not supported",
            nearest.map_or(f64::INFINITY, |(off, _)| off)
        )),
    }
}

/// Frequencies between the two ends: wavelength, and how far from the low end (0) to the high (1).
fn between(table: &[f32], factor: f64, theta: f64, dims: u64) -> Vec<(f64, f64)> {
    let smooth = |divisor: f64| (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
    let inside = |divisor: &f64| *divisor > 1.0 + TOLERANCE && *divisor < factor * (1.0 - TOLERANCE);
    let divisors = table.iter().map(|divisor| f64::from(*divisor));
    wavelengths(theta, dims).zip(divisors).filter(|(_, d)| inside(d)).map(|(w, d)| (w, smooth(d))).collect()
}

/// Contexts of the pre-training to try, the usual ones first: with those the recipe is the published one exactly.
fn originals(table: &[f32], factor: f64, theta: f64, dims: u64) -> Vec<f64> {
    // 8192 first: it wins where the table leaves the number open.
    let mut list = vec![8192.0];
    list.extend((4..=24).map(|power| f64::from(1 << power)));
    let points = between(table, factor, theta, dims);
    // smooth = (original / wavelength - 1) / (high - 1): a line in 1 / wavelength.
    if let (Some((long, low)), Some((short, high))) = (points.last(), points.first())
        && short < long
    {
        let slope = (high - low) / (1.0 / short - 1.0 / long);
        let intercept = low - slope / long;
        let original = -slope / intercept;
        list.extend([original.round(), original]);
    }
    if let [(wavelength, smooth)] = points[..] {
        let original = (1.0 + 3.0 * smooth) * wavelength;
        list.extend([original.round(), original]);
    }
    list.retain(|original| *original > 0.0 && original.is_finite());
    list
}

/// Values of `high` that fit an `original`.
fn highs(table: &[f32], factor: f64, original: f64, theta: f64, dims: u64) -> Vec<f64> {
    let mut list = Vec::new();
    // The frequency that is furthest from the low end tells best.
    if let Some((wavelength, smooth)) = between(table, factor, theta, dims).first() {
        let high = 1.0 + (original / wavelength - 1.0) / smooth;
        list.extend([high.round(), (high * 2.0).round() / 2.0, high]);
    }
    list.retain(|high| *high > 1.0 && high.is_finite());
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(recipe: Llama3, theta: f64, dims: u64) -> Vec<f32> {
        divisors(recipe, theta, dims).map(|divisor| divisor as f32).collect()
    }

    fn llama3(factor: f64, low: f64, high: f64, original: f64) -> Llama3 {
        Llama3 { factor, low, high, original }
    }

    #[test]
    fn published_recipes_are_found_exactly() {
        for (theta, dims) in [(500_000.0, 128), (500_000.0, 64)] {
            for factor in [8.0, 32.0, 16.0] {
                let recipe = llama3(factor, 1.0, 4.0, 8192.0);
                assert_eq!(recover(&table(recipe, theta, dims), theta, dims), Ok(recipe), "{theta} {dims}");
            }
        }
    }

    /// Only the frequencies matter, and they are the same to the last digits.
    #[test]
    fn other_recipes_give_the_same_divisors() {
        let recipes = [
            llama3(8.0, 1.0, 4.0, 256.0),
            llama3(4.0, 2.0, 8.0, 512.0),
            llama3(32.0, 1.0, 3.0, 5000.0),
            llama3(8.0, 1.0, 4.5, 1000.0),
            llama3(2.5, 1.5, 4.0, 777.0),
        ];
        for recipe in recipes {
            for (theta, dims) in
                [(500_000.0, 16), (500_000.0, 32), (500_000.0, 128), (10_000.0, 64), (1e6, 8)]
            {
                let table = table(recipe, theta, dims);
                let found =
                    recover(&table, theta, dims).unwrap_or_else(|e| panic!("{recipe:?} {theta} {dims}: {e}"));
                let off = divisors(found, theta, dims)
                    .zip(divisors(recipe, theta, dims))
                    .map(|(a, b)| (a / b - 1.0).abs())
                    .fold(0.0, f64::max);
                assert!(off < 1e-6, "{recipe:?} {found:?} {theta} {dims}: {off}");
            }
        }
    }

    #[test]
    fn a_table_without_a_recipe_is_refused() {
        let mut other = table(llama3(8.0, 1.0, 4.0, 8192.0), 500_000.0, 128);
        other[40] *= 1.001;
        let error = recover(&other, 500_000.0, 128).unwrap_err();
        assert!(
            error.starts_with("no recipe of Llama 3 gives these divisors (the nearest is off by "),
            "{error}"
        );
        assert_eq!(recover(&[1.0], 10_000.0, 4).unwrap_err(), "1 divisors for 2 frequencies");
        for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(
                recover(&[bad, 1.0], 10_000.0, 4).unwrap_err(),
                "a divisor below 1 or infinite",
                "{bad}"
            );
        }
    }
}
