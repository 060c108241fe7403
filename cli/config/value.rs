//! The types that settings have, each with the words for "that is not one".

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use cluster::admission::TEXT_CHARS_MAX;

use super::setting::{Kind, Value};

/// A number of bytes: `512MiB`, `2GiB`, `1.5GB` or plain `1048576`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        const UNITS: [(&str, u64); 7] = [
            ("KiB", 1 << 10),
            ("MiB", 1 << 20),
            ("GiB", 1 << 30),
            ("KB", 1_000),
            ("MB", 1_000_000),
            ("GB", 1_000_000_000),
            ("B", 1),
        ];
        let (number, unit) = UNITS
            .iter()
            .find_map(|&(name, bytes)| Some((text.strip_suffix(name)?, bytes)))
            .unwrap_or((text, 1));
        let bytes = number.trim().parse::<f64>().map_err(|_| ())? * unit as f64;
        // Beyond 2^53 a double is not exact, and no machine has that much memory.
        if (0.0..9e15).contains(&bytes) { Ok(Size(bytes as u64)) } else { Err(()) }
    }
}

/// The memory of a machine: as [`Size`], a plain number is GB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory(pub u64);

impl FromStr for Memory {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, &'static str> {
        let gigabytes = text.parse::<f64>().is_ok().then(|| format!("{text}GB"));
        let size = gigabytes.as_deref().unwrap_or(text).parse::<Size>();
        size.map(|Size(bytes)| Memory(bytes)).map_err(|()| "expected a size such as 64, 64GB or 48GiB")
    }
}

/// Memory for KV: as [`Size`], or what the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvMemory {
    /// What is free beside the weights.
    Auto,
    /// So much.
    Bytes(Size),
}

impl KvMemory {
    /// Bytes, where somebody has said how many.
    pub fn bytes(self) -> Option<u64> {
        match self {
            KvMemory::Auto => None,
            KvMemory::Bytes(Size(bytes)) => Some(bytes),
        }
    }
}

impl FromStr for KvMemory {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "auto" { Ok(KvMemory::Auto) } else { text.parse().map(KvMemory::Bytes) }
    }
}

/// A duration in seconds: `10` or `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seconds(pub Duration);

impl FromStr for Seconds {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let seconds = text.strip_suffix('s').unwrap_or(text).parse::<f64>().map_err(|_| ())?;
        if (0.0..=86_400.0).contains(&seconds) {
            Ok(Seconds(Duration::from_secs_f64(seconds)))
        } else {
            Err(())
        }
    }
}

/// What a model or a node is called: text of one line that the router takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(pub String);

impl FromStr for Name {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        let fits = (1..=TEXT_CHARS_MAX).contains(&text.chars().count());
        if fits && !text.contains(char::is_control) { Ok(Name(text.into())) } else { Err(()) }
    }
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(set)")
    }
}

impl FromStr for Secret {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        if text.is_empty() { Err(()) } else { Ok(Secret(text.into())) }
    }
}

/// Implements [`Value`] for a type that parses from one piece of text.
macro_rules! one {
    ($($T:ty, $expected:expr, $secret:expr;)*) => { $(
        impl Value for $T {
            const SECRET: bool = $secret;
            fn from_raw(raw: Option<&[String]>) -> Result<Self, String> {
                let text = raw.and_then(|r| r.last()).ok_or("not set")?;
                text.parse().map_err(|_| format!("expected {}", $expected))
            }
        }
    )* };
}
one! {
    String, "text", false;
    PathBuf, "a path", false;
    u16, "a port, 0 to 65535", false;
    u32, "a whole number", false;
    usize, "a whole number", false;
    IpAddr, "an address such as 127.0.0.1", false;
    SocketAddr, "address:port such as 127.0.0.1:8001", false;
    Size, "a size such as 512MiB or 2GiB", false;
    KvMemory, "a size such as 512MiB or 2GiB, or auto", false;
    Seconds, "seconds, at most 86400", false;
    Name, format!("a name of 1 to {TEXT_CHARS_MAX} characters in one line"), false;
    Secret, "text that is not empty", true;
}

/// Implements [`Value`] for an enum of named choices.
macro_rules! choice {
    ($T:ty { $($name:literal => $value:expr),+ $(,)? }) => {
        impl $crate::config::Value for $T {
            fn from_raw(raw: Option<&[String]>) -> Result<Self, String> {
                match raw.and_then(|r| r.last()).map(String::as_str) {
                    $( Some($name) => Ok($value), )+
                    Some(_) => Err(format!("expected one of {}", [$($name),+].join(", "))),
                    None => Err("not set".into()),
                }
            }
        }
    };
}
pub(crate) use choice;

impl Value for bool {
    const KIND: Kind = Kind::Switch;
    fn from_raw(raw: Option<&[String]>) -> Result<Self, String> {
        match raw.and_then(|r| r.last()).map(String::as_str) {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(_) => Err("expected true or false".into()),
        }
    }
}

impl<T: Value> Value for Option<T> {
    const SECRET: bool = T::SECRET;
    fn from_raw(raw: Option<&[String]>) -> Result<Self, String> {
        raw.map(|_| T::from_raw(raw)).transpose()
    }
}

impl<T: Value> Value for Vec<T> {
    const KIND: Kind = Kind::Many;
    const SECRET: bool = T::SECRET;
    fn from_raw(raw: Option<&[String]>) -> Result<Self, String> {
        raw.unwrap_or_default().chunks(1).map(|one| T::from_raw(Some(one))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes are what decides how much memory a node takes: units must not be confused.
    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("512MiB", 512 << 20),
            ("2GiB", 2 << 30),
            ("2GB", 2_000_000_000),
            ("1.5 GiB", 3 << 29),
            ("7B", 7),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "2gib", "2TiB", "nan", "1e30"] {
            assert_eq!(text.parse::<Size>(), Err(()), "{text}");
        }
    }

    /// The device's own memory is asked for by name, not by a slip.
    #[test]
    fn memory_for_kv() {
        assert_eq!("auto".parse(), Ok(KvMemory::Auto));
        assert_eq!("2GiB".parse::<KvMemory>().map(KvMemory::bytes), Ok(Some(2 << 30)));
        assert!(["", "Auto", "automatic", "all"].iter().all(|text| text.parse::<KvMemory>().is_err()));
    }

    #[test]
    fn memory_is_in_gigabytes_unless_told() {
        for (text, bytes) in [("64", 64_000_000_000), ("0.5", 500_000_000), ("2GiB", 2 << 30), ("7B", 7)] {
            assert_eq!(text.parse(), Ok(Memory(bytes)), "{text}");
        }
        assert!("lots".parse::<Memory>().is_err());
    }

    /// A secret can be logged with the struct that holds it without being shown.
    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(format!("{:?}", Some(Secret("hunter2".into()))), "Some((set))");
    }
}
