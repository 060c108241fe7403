//! A role's settings as clap flags. Values stay text here: all layers are parsed by the same code later.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::setting::{Kind, Setting, Settings};

/// The setting that may be given without its name.
const MODEL: &str = "model";
/// The argument that gives it so.
const NAMED: &str = "named-model";

/// What the command line says of the settings `S`.
#[derive(Clone, Debug)]
pub struct Flags<S> {
    /// Values by key, as given.
    pub given: BTreeMap<String, Vec<String>>,
    /// `--config`.
    pub config: Option<PathBuf>,
    settings: PhantomData<S>,
}

impl<S> Default for Flags<S> {
    fn default() -> Self {
        Flags { given: BTreeMap::new(), config: None, settings: PhantomData }
    }
}

impl<S: Settings> FromArgMatches for Flags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = BTreeMap::new();
        for setting in S::table() {
            if matches.value_source(&setting.key) != Some(ValueSource::CommandLine) {
                continue;
            }
            let values = match setting.kind {
                Kind::Switch => vec!["true".to_owned()],
                Kind::One | Kind::Many => {
                    matches.get_many::<String>(&setting.key).into_iter().flatten().cloned().collect()
                }
            };
            given.insert(setting.key.clone(), values);
        }
        if let Ok(Some(model)) = matches.try_get_one::<String>(NAMED) {
            given.insert(MODEL.into(), vec![model.clone()]);
        }
        Ok(Flags { given, config: matches.get_one("config").cloned(), settings: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<S: Settings> Args for Flags<S> {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Settings file [default: ./baton.toml, then ~/.config/baton/baton.toml]");
        // `baton up MODEL`, as other programs have it.
        let model = S::table().iter().find(|setting| setting.key == MODEL);
        let named = model.map(|model| {
            Arg::new(NAMED).value_name(model.placeholder).help("The same as --model").conflicts_with(MODEL)
        });
        command.args(named).args(S::table().iter().map(flag)).arg(config).after_help(
            "Each setting can also be a BATON_* variable or a key of the settings file; flags win.",
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn flag(setting: &'static Setting) -> Arg {
    let default = setting.default.map_or(String::new(), |value| format!(" [default: {value}]"));
    let flag = Arg::new(setting.key.as_str()).long(setting.key.as_str());
    let flag = flag.help(format!("{}{default}", setting.help));
    match setting.kind {
        Kind::Switch => flag.action(ArgAction::SetTrue),
        Kind::One => flag.value_name(setting.placeholder).overrides_with(setting.key.as_str()),
        Kind::Many => flag.value_name(setting.placeholder).action(ArgAction::Append).value_delimiter(','),
    }
}
