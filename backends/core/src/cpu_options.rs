//! What a CPU backend is asked beyond what every device is.

use std::str::FromStr;

/// Settings of a CPU backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Instruction level by name; `None`: the best of this machine.
    pub level: Option<String>,
    /// How activations meet quantised weights.
    pub activations: Activations,
    /// Whether each worker thread stays on a core of its own, of those that the process may use.
    pub pin: bool,
}

/// How activations meet quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// In the step's dtype.
    #[default]
    Exact,
    /// Rounded to 8 bits, 32 inputs by 32: coarser, and faster for few rows of 4-bit weights. What llama.cpp always does.
    Int8,
}

impl Activations {
    /// `exact` or `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Activations::Exact => "exact",
            Activations::Int8 => "int8",
        }
    }
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "exact" => Ok(Activations::Exact),
            "int8" => Ok(Activations::Int8),
            _ => Err(format!("unknown activations {s:?}: expected exact or int8")),
        }
    }
}
