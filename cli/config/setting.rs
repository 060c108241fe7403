//! One setting, and the macro that declares a role's list of them. The list is the only place that knows a setting:
//! flags, environment, file keys, `--help` and `config show` are all read off it.

use anyhow::Result;

use super::layers::Values;

/// One line of a role's list.
#[derive(Debug)]
pub struct Setting {
    /// `kv-memory`: the flag is `--kv-memory`, the variable `BATON_KV_MEMORY`, the file's key `kv-memory`.
    pub key: String,
    /// What stands for the value in `--help`; empty for switches.
    pub placeholder: &'static str,
    /// One sentence for `--help`.
    pub help: &'static str,
    /// Value when nobody says otherwise.
    pub default: Option<&'static str>,
    /// How many values it takes.
    pub kind: Kind,
    /// Never printed.
    pub secret: bool,
}

/// How many values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One; the last one given wins.
    One,
    /// Any number, comma-separated or repeated.
    Many,
    /// On or off.
    Switch,
}

impl Setting {
    /// Called by [`settings!`].
    pub fn new<T: Value>(
        field: &str,
        placeholder: &'static str,
        help: &'static str,
        default: Option<&'static str>,
    ) -> Self {
        let key = field.replace('_', "-");
        Setting { key, placeholder, help: help.trim(), default, kind: T::KIND, secret: T::SECRET }
    }

    /// The environment variable.
    pub fn variable(&self) -> String {
        format!("BATON_{}", self.key.replace('-', "_").to_uppercase())
    }
}

/// A type that a setting can have.
pub trait Value: Sized {
    /// How many values it takes.
    const KIND: Kind = Kind::One;
    /// Never printed.
    const SECRET: bool = false;
    /// From what was given; `None` when nothing was. The error says what was expected.
    fn from_raw(raw: Option<&[String]>) -> Result<Self, String>;
}

/// A role's list of settings and the struct that they fill.
pub trait Settings: Sized + Send + Sync + 'static {
    /// The list, in the order of `--help`.
    fn table() -> &'static [Setting];
    /// Parses every setting and checks that they agree with each other.
    fn from_values(values: &Values) -> Result<Self>;
}

/// Declares a struct of settings: help, name, type, placeholder and default of each in one place.
/// The struct must have a method `check(&self) -> anyhow::Result<()>` for what several settings must agree on.
macro_rules! settings {
    ($(#[$meta:meta])* pub struct $Name:ident {
        $( $(#[doc = $help:literal])+ $field:ident : $T:ty [$placeholder:literal] $(= $default:literal)? ; )*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        pub struct $Name { $( $(#[doc = $help])+ pub $field: $T, )* }

        impl $crate::config::Settings for $Name {
            fn table() -> &'static [$crate::config::Setting] {
                static TABLE: std::sync::LazyLock<Vec<$crate::config::Setting>> = std::sync::LazyLock::new(|| vec![$(
                    $crate::config::Setting::new::<$T>(
                        stringify!($field), $placeholder, concat!($($help),+), settings!(@default $($default)?),
                    )
                ),*]);
                &TABLE
            }
            fn from_values(values: &$crate::config::Values) -> anyhow::Result<Self> {
                let all = Self { $( $field: values.get(stringify!($field))?, )* };
                all.check()?;
                Ok(all)
            }
        }
    };
    (@default) => { None };
    (@default $default:literal) => { Some($default) };
}
pub(crate) use settings;
