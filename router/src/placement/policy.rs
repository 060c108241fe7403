//! The setting that says whether prompts travel.

use serde::{Deserialize, Serialize};

/// Whether prompts travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Disaggregation {
    /// Where it is estimated to be sooner.
    #[default]
    Auto,
    /// Whenever a prefill node is there.
    Always,
    /// Decode groups compute every prompt themselves.
    Never,
}

impl std::str::FromStr for Disaggregation {
    type Err = String;

    fn from_str(text: &str) -> Result<Disaggregation, String> {
        match text {
            "auto" => Ok(Disaggregation::Auto),
            "always" => Ok(Disaggregation::Always),
            "never" => Ok(Disaggregation::Never),
            other => Err(format!("disaggregation `{other}` is unknown: auto, always or never")),
        }
    }
}

impl std::fmt::Display for Disaggregation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Disaggregation::Auto => "auto",
            Disaggregation::Always => "always",
            Disaggregation::Never => "never",
        })
    }
}
