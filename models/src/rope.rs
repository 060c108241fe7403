//! Rotary embeddings: from the fields of `config.json` to a table of frequencies. Formulae as in Hugging Face
//! transformers (`modeling_rope_utils.py`), computed in f64 and rounded once.

use std::f64::consts::PI;

use backend::{Rope, RopeStyle};

use crate::ModelError;
use crate::fields::Fields;

/// Default base of the frequencies, used where a configuration gives none.
const THETA: f64 = 10_000.0;

/// A rotary embedding as a configuration gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Elements of a head that are rotated, its first ones; even.
    pub dim: usize,
    /// Which of them form a pair in the checkpoint's projections.
    pub style: RopeStyle,
    /// Base of the frequencies (`rope_theta`).
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: Scaling,
}

/// Stretching of frequencies (`rope_scaling`, or `rope_parameters` of transformers 5).
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// At least 1 in practice.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, smooth between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low: f64,
        /// Wavelengths below `original / high` are high frequencies.
        high: f64,
        /// Context of the pre-training, in tokens.
        original: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Context of the pre-training, in tokens.
        original: f64,
        /// Rotations within `original` above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Factor on cos and sin.
        attention: f64,
        /// `mscale_all_dim`, by which latent attention scales its scores.
        mscale_all: Option<f64>,
    },
}

/// How much of a head a family rotates.
pub(crate) enum Rotary {
    /// All of these elements.
    Whole(usize),
    /// A part of these elements: `partial_rotary_factor`, or `rotary_dim`, or this part.
    Part(usize, f64),
}

impl RopeConfig {
    /// Reads `rope_theta` and `rope_scaling` or `rope_parameters`. `positions` is `max_position_embeddings`.
    pub(crate) fn read(
        fields: &mut Fields,
        positions: usize,
        rotary: Rotary,
    ) -> Result<RopeConfig, ModelError> {
        let style = RopeStyle::HalfSplit;
        let theta = fields.opt_positive("rope_theta")?;
        // Some configurations give the context of the pre-training beside the object; then that one counts.
        let original = fields.opt_positive("original_max_position_embeddings")?;
        let scaling = fields.opt_object("rope_scaling")?;
        let parameters = fields.opt_object("rope_parameters")?;
        if scaling.is_some() && parameters.is_some() {
            return Err(fields.error("rope_scaling", "given beside rope_parameters: which one counts?"));
        }
        let mut nested = scaling.or(parameters);
        let dim = rotary.dim(fields, nested.as_mut())?;
        let Some(mut rope) = nested else {
            return Ok(RopeConfig { dim, style, theta: theta.unwrap_or(THETA), scaling: Scaling::Default });
        };
        let theta = rope.opt_positive("rope_theta")?.or(theta).unwrap_or(THETA);
        let old_kind = rope.opt_text("type")?;
        let kind = rope.opt_text("rope_type")?.or(old_kind).unwrap_or_else(|| "default".into());
        let inside = rope.opt_positive("original_max_position_embeddings")?;
        let original = original.or(inside).unwrap_or(positions as f64);
        let scaling = match kind.as_str() {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: rope.positive("factor")? },
            "llama3" => {
                let low = rope.positive("low_freq_factor")?;
                let high = rope.positive("high_freq_factor")?;
                if high <= low {
                    return Err(
                        rope.error("high_freq_factor", format!("{high} is not above low_freq_factor {low}"))
                    );
                }
                Scaling::Llama3 { factor: rope.positive("factor")?, low, high, original }
            }
            "yarn" => {
                let factor = rope.opt_positive("factor")?.unwrap_or(positions as f64 / original);
                let mscale = rope.opt_number("mscale")?.filter(|number| *number != 0.0);
                let mscale_all = rope.opt_number("mscale_all_dim")?.filter(|number| *number != 0.0);
                let attention = match (rope.opt_positive("attention_factor")?, mscale, mscale_all) {
                    (Some(given), _, _) => given,
                    (None, Some(one), Some(all)) => yarn_mscale(factor, one) / yarn_mscale(factor, all),
                    (None, _, _) => yarn_mscale(factor, 1.0),
                };
                Scaling::Yarn {
                    factor,
                    original,
                    beta_fast: rope.opt_positive("beta_fast")?.unwrap_or(32.0),
                    beta_slow: rope.opt_positive("beta_slow")?.unwrap_or(1.0),
                    truncate: rope.flag("truncate", true)?,
                    attention,
                    mscale_all,
                }
            }
            other => {
                let known = "default, linear, llama3, yarn";
                return Err(rope.error("rope_type", format!("{other:?} is not supported (known: {known})")));
            }
        };
        rope.finish()?;
        Ok(RopeConfig { dim, style, theta, scaling })
    }

    /// What latent attention multiplies its scores with besides the root of the head's width: `mscale` squared.
    pub(crate) fn score_factor(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { factor, mscale_all: Some(mscale), .. } => yarn_mscale(factor, mscale).powi(2),
            _ => 1.0,
        }
    }

    /// The frequencies, one per two rotated elements.
    pub fn table(&self) -> Rope {
        let count = self.dim / 2;
        let plain = |i: usize| self.theta.powf(-((2 * i) as f64) / self.dim as f64);
        let mut attention = 1.0;
        let inv_freq: Vec<f64> = match &self.scaling {
            Scaling::Default => (0..count).map(plain).collect(),
            Scaling::Linear { factor } => (0..count).map(|i| plain(i) / factor).collect(),
            Scaling::Llama3 { factor, low, high, original } => (0..count)
                .map(|i| {
                    let freq = plain(i);
                    let wavelength = 2.0 * PI / freq;
                    if wavelength < original / high {
                        freq
                    } else if wavelength > original / low {
                        freq / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * freq / factor + smooth * freq
                    }
                })
                .collect(),
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention: given, .. } => {
                attention = *given;
                let dim = self.dim as f64;
                // The dimension that rotates `rotations` times within the pre-training context.
                let dimension =
                    |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                (0..count)
                    .map(|i| {
                        // 0: kept, 1: divided.
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        plain(i) / factor * ramp + plain(i) * (1.0 - ramp)
                    })
                    .collect()
            }
        };
        Rope {
            inv_freq: inv_freq.into_iter().map(|freq| freq as f32).collect(),
            factor: attention as f32,
            style: self.style,
        }
    }

    /// Longest context in tokens that the stretched frequencies are meant for.
    pub(crate) fn context(&self, positions: usize) -> usize {
        match self.scaling {
            Scaling::Default | Scaling::Llama3 { .. } => positions,
            // Such configurations keep the length from before the stretching.
            Scaling::Linear { factor } => (positions as f64 * factor) as usize,
            Scaling::Yarn { factor, original, .. } => positions.max((original * factor) as usize),
        }
    }
}

impl Rotary {
    /// Elements that are rotated. Errors when the configuration names two numbers of them.
    fn dim(self, fields: &mut Fields, nested: Option<&mut Fields>) -> Result<usize, ModelError> {
        let (head, default) = match self {
            Rotary::Whole(dim) => return Ok(dim),
            Rotary::Part(head, default) => (head, default),
        };
        let of = |factor: f64| (head as f64 * factor) as usize;
        let mut given = vec![fields.opt_size("rotary_dim")?];
        given.push(fields.opt_positive("partial_rotary_factor")?.map(of));
        if let Some(nested) = nested {
            given.push(nested.opt_positive("partial_rotary_factor")?.map(of));
        }
        let given: Vec<usize> = given.into_iter().flatten().collect();
        let dim = given.first().copied().unwrap_or(of(default));
        match given.iter().find(|other| **other != dim) {
            Some(other) => Err(fields.error("partial_rotary_factor", format!("{dim} or {other} elements?"))),
            None if dim == 0 || dim % 2 != 0 || dim > head => {
                Err(fields.error("partial_rotary_factor", format!("{dim} of {head} elements")))
            }
            None => Ok(dim),
        }
    }
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    /// The rotation of a model with `fields`, 4,096 positions and heads of 16 elements.
    fn config(fields: &str) -> Result<Config, ModelError> {
        let json = format!(
            r#"{{"model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8,
                "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 4096, {fields}}}"#
        );
        Config::parse("c", json.as_bytes())
    }

    /// Expected numbers are those of transformers 5.23 (`ROPE_INIT_FUNCTIONS`), which computes in f32.
    fn check(fields: &str, factor: f64, context: usize, expected: [f64; 8]) {
        let config = config(fields).unwrap();
        let rope = config.rope.table();
        assert_eq!(rope.inv_freq.len(), 8, "{fields}");
        for (i, (got, want)) in rope.inv_freq.iter().zip(expected).enumerate() {
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "{fields}: {i}: {got} {want}");
        }
        assert!((f64::from(rope.factor) / factor - 1.0).abs() < 1e-7, "{fields}: {} {factor}", rope.factor);
        assert_eq!(config.context, context, "{fields}");
    }

    #[test]
    fn every_kind_gives_the_numbers_of_transformers() {
        let plain = [1.0, 0.316_227_76, 0.1, 0.031_622_777, 0.01, 0.003_162_277_7, 0.001, 0.000_316_227_77];
        check(r#""rope_theta": 10000.0"#, 1.0, 4096, plain);
        check(r#""rope_scaling": null"#, 1.0, 4096, plain);
        check(
            r#""rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}"#,
            1.0,
            16384,
            plain.map(|freq| freq / 4.0),
        );
        let llama3 = [
            1.0,
            0.193_922_76,
            0.010_538_231,
            0.000_911_583_13,
            0.000_176_776_68,
            3.428_102_4e-5,
            6.647_869_7e-6,
            1.289_173_2e-6,
        ];
        let scaling = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256, "rope_type": "llama3""#;
        check(&format!(r#""rope_theta": 500000, "rope_scaling": {{{scaling}}}"#), 1.0, 4096, llama3);
        check(&format!(r#""rope_parameters": {{{scaling}, "rope_theta": 500000}}"#), 1.0, 4096, llama3);
        check(
            r#""rope_theta": 1e6, "rope_scaling":
                {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}"#,
            1.138_629_4,
            4096,
            [
                1.0,
                0.111_142_464,
                0.007_905_694_7,
                0.001_405_853_3,
                0.000_25,
                4.445_698_5e-5,
                7.905_693_6e-6,
                1.405_853_4e-6,
            ],
        );
        check(
            r#""rope_scaling": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
                "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false}"#,
            1.155_722,
            163_840,
            [
                1.0,
                0.316_227_76,
                0.1,
                0.031_622_779,
                0.005_790_104_6,
                0.000_123_952_46,
                2.5e-5,
                7.905_694_5e-6,
            ],
        );
        check(
            r#""rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
                "attention_factor": 1.25}"#,
            1.25,
            4096,
            [
                1.0,
                0.316_227_76,
                0.081_250_004,
                0.019_764_237,
                0.004_375,
                0.000_790_569_47,
                0.000_25,
                7.905_694_7e-5,
            ],
        );
    }

    #[test]
    fn kinds_and_fields_that_are_not_understood_are_named() {
        let error = |fields: &str| config(fields).unwrap_err().to_string();
        assert_eq!(
            error(r#""rope_scaling": {"type": "dynamic", "factor": 2.0}"#),
            "c: rope_scaling.rope_type: \"dynamic\" is not supported (known: default, linear, llama3, yarn)"
        );
        assert_eq!(
            error(r#""rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}"#),
            "c: rope_parameters.partial_rotary_factor: 0.5 is not supported: it may change the computation"
        );
        assert_eq!(
            error(r#""rope_parameters": {"full_attention": {"rope_theta": 1e6}}"#),
            "c: rope_parameters.full_attention: {\"rope_theta\":1000000.0} is not supported: it may change the computation"
        );
        assert_eq!(error(r#""rope_scaling": {"type": "linear"}"#), "c: rope_scaling.factor: missing");
        assert_eq!(error(r#""rope_theta": 0"#), "c: rope_theta: 0 is not positive");
        assert_eq!(
            error(
                r#""rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}"#
            ),
            "c: rope_scaling.high_freq_factor: 1 is not above low_freq_factor 4"
        );
    }
}
