//! Settings of every role: flag over environment (`BATON_*`) over TOML file over default, read once, checked once.
//!
//! Called by `main` for the command at hand and by `config show`. Nothing else reads the environment for settings.

mod file;
mod flags;
mod hub;
mod layers;
mod node;
mod router;
mod setting;
mod show;
mod status;
mod up;
mod value;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cluster::small_file::{self, TOKEN_BYTES_MAX};
use cluster::{ClusterToken, JoinToken};

use file::File;
use layers::Layers;
use setting::Setting;

pub use flags::Flags;
pub use layers::Values;
pub use node::NodeSettings;
pub use router::RouterSettings;
pub use setting::{Settings, Value};
pub use show::{ShowRole, show};
pub use status::StatusSettings;
pub use up::UpSettings;
pub use value::{Memory, Secret};

/// What a settings file may hold.
fn sections() -> [(&'static str, &'static [Setting]); 5] {
    [
        ("router", RouterSettings::table()),
        ("prefill", NodeSettings::table()),
        ("decode", NodeSettings::table()),
        ("up", UpSettings::table()),
        ("status", StatusSettings::table()),
    ]
}

/// The settings of the command `section`.
pub fn load<S: Settings>(section: &str, flags: &Flags<S>) -> Result<S> {
    S::from_values(&values(section, flags, &environment)?)
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn values<S: Settings>(
    section: &str,
    flags: &Flags<S>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Values> {
    let variable = env("BATON_CONFIG");
    let named = flags.config.as_deref().or(variable.as_deref().map(Path::new));
    let file = File::find(named, env).map(|path| File::read(&path, &sections())).transpose()?;
    let layers = Layers { flags: &flags.given, env, file: file.as_ref() };
    Ok(Values::resolve(S::table(), section, &layers))
}

/// Where models of the Hugging Face hub come from and are kept.
pub fn hub() -> ::hub::Settings {
    hub::settings(&environment, &|path| small_file::text(path, TOKEN_BYTES_MAX).ok())
}

/// Where this user's programs keep what they can make again.
pub fn cache_dir() -> Option<PathBuf> {
    let named = |name: &str| environment(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    base.map(|base| base.join("baton"))
}

/// What makes a process part of a cluster.
#[derive(Debug)]
pub enum Entry {
    /// The cluster's secret itself: for a network that is one's own.
    Secret(ClusterToken),
    /// What the router gives a certificate for.
    Join(JoinToken),
}

/// Tokens guessed ahead at most; a step has no rows for more.
const DRAFT_MAX: usize = 31;

fn check_drafts(draft_max: usize, draft_model: bool) -> Result<()> {
    ensure!(draft_max <= DRAFT_MAX, "draft-max is {draft_max}: at most {DRAFT_MAX}");
    ensure!(draft_max > 0 || !draft_model, "draft-model with draft-max 0: it would guess nothing");
    Ok(())
}

/// From one of the two settings that can hold it.
fn entry(token: &Option<Secret>, file: Option<&Path>) -> Result<Entry> {
    match (token, file) {
        (Some(Secret(text)), None) if JoinToken::is_one(text) => {
            Ok(Entry::Join(text.parse().context("token")?))
        }
        (Some(Secret(text)), None) => Ok(Entry::Secret(ClusterToken::parse(text).context("token")?)),
        (None, Some(path)) => {
            let text = small_file::text(path, TOKEN_BYTES_MAX);
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            let named = || path.display().to_string();
            match JoinToken::is_one(&text) {
                true => Ok(Entry::Join(text.parse().with_context(named)?)),
                false => Ok(Entry::Secret(ClusterToken::parse(&text).with_context(named)?)),
            }
        }
        (Some(_), Some(_)) => anyhow::bail!("token and token-file are both set: give one of them"),
        (None, None) => anyhow::bail!(
            "no cluster token: give --token-file FILE, with what `baton token create` prints beside the router"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::layers::Source;
    use super::*;

    fn given(pairs: &[(&str, &str)]) -> BTreeMap<String, Vec<String>> {
        pairs.iter().map(|(key, value)| ((*key).into(), vec![(*value).into()])).collect()
    }

    fn parse(text: &str) -> Result<File> {
        File::parse(Path::new("baton.toml"), text, &sections())
    }

    fn node(flags: &[(&str, &str)], env: &[(&str, &str)], file: &str) -> Values {
        let file = parse(file).expect("the test's file is valid");
        let flags = given(flags);
        let env = given(env);
        let env = |name: &str| env.get(name).and_then(|v| v.first().cloned());
        Values::resolve(
            NodeSettings::table(),
            "decode",
            &Layers { flags: &flags, env: &env, file: Some(&file) },
        )
    }

    fn source(values: &Values, key: &str) -> (String, Source) {
        let entry = values.entries.iter().find(|e| e.setting.key == key).expect("a setting");
        (entry.shown(), entry.source.clone())
    }

    /// The order of precedence, one layer taken away at a time.
    #[test]
    fn flag_over_environment_over_file_over_default() {
        let flag: &[(&str, &str)] = &[("max-batch", "1")];
        let env: &[(&str, &str)] = &[("BATON_MAX_BATCH", "2")];
        let file = "max-batch = 4\n[decode]\nmax-batch = 3\n[prefill]\nmax-batch = 5";
        let of = |flag, env, file| source(&node(flag, env, file), "max-batch");
        assert_eq!(of(flag, env, file), ("1".into(), Source::Flag("max-batch".into())));
        assert_eq!(of(&[], env, file), ("2".into(), Source::Env("BATON_MAX_BATCH".into())));
        assert_eq!(of(&[], &[], file), ("3".into(), Source::File(PathBuf::from("baton.toml"))));
        assert_eq!(of(&[], &[], "max-batch = 4"), ("4".into(), Source::File(PathBuf::from("baton.toml"))));
        assert_eq!(of(&[], &[], "").1, Source::Default);
    }

    /// A typing error in the file is an error, never a setting that silently stays at its default.
    #[test]
    fn unknown_keys_are_refused_by_name() {
        for (text, wanted) in [
            (
                "[decode]\nkv-memry = \"1GiB\"",
                "baton.toml: unknown key kv-memry in [decode]; `baton decode --help` lists them",
            ),
            (
                "[decoder]\nmodel = \"x\"",
                "unknown section [decoder]; there are router, prefill, decode, up, status",
            ),
            ("modl = \"x\"", "unknown key modl;"),
            ("model = 1979-05-27", "model cannot be a datetime"),
            ("model = \"a\"\nport = = 1", "baton.toml, line 2:"),
            // Never the last one in silence.
            ("max-batch = [4, 8]", "baton.toml: max-batch takes one value, not a list"),
            ("[decode]\nmodel = [\"a\"]", "baton.toml: model takes one value, not a list"),
            ("[router]\ninsecure = [true]", "baton.toml: insecure takes one value, not a list"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn a_setting_of_several_takes_a_list() {
        for text in ["allowed-host = [\"a\", \"b\"]", "[router]\nallowed-host = [\"a\", \"b\"]"] {
            let file = parse(text).expect(text);
            assert_eq!(file.get("router", "allowed-host"), Some(&["a".to_owned(), "b".to_owned()][..]));
        }
    }

    /// A wrong value says which setting, what was given, by whom, and what was expected; a missing one where to put it.
    #[test]
    fn wrong_values_name_their_source() {
        fn error(flags: &[(&str, &str)], env: &[(&str, &str)], file: &str) -> String {
            NodeSettings::from_values(&node(flags, env, file)).expect_err("a wrong value").to_string()
        }
        let model = ("model", "m");
        assert_eq!(
            error(&[model], &[("BATON_KV_MEMORY", "2gigs")], ""),
            "kv-memory = \"2gigs\" (BATON_KV_MEMORY): expected a size such as 512MiB or 2GiB, or auto"
        );
        assert_eq!(
            error(&[model], &[], "[decode]\ndtype = \"int3\""),
            "dtype = \"int3\" (baton.toml): expected one of bf16, f32"
        );
        assert_eq!(
            error(&[], &[], ""),
            "model is not set: give --model, BATON_MODEL, or model in baton.toml"
        );
        assert_eq!(
            error(&[model, ("token", "not hex"), ("rank", "2"), ("tp", "2")], &[], ""),
            "rank 2 is not below tp 2"
        );
    }

    /// Every role's defaults parse, so that a role starts with nothing but what it must be told.
    #[test]
    fn defaults_are_valid() {
        fn check<S: Settings>(section: &str, flags: &[(&str, &str)]) {
            let layers = Layers { flags: &given(flags), env: &|_| None, file: None };
            let values = Values::resolve(S::table(), section, &layers);
            if let Err(error) = S::from_values(&values) {
                panic!("{section}: {error:#}");
            }
        }
        check::<RouterSettings>("router", &[("model", "m")]);
        check::<NodeSettings>("prefill", &[("model", "m")]);
        check::<NodeSettings>("decode", &[("model", "m")]);
        check::<UpSettings>("up", &[]);
        check::<StatusSettings>("status", &[]);
    }
}
