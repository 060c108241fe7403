//! `baton config show`: effective values and where each came from.

use std::fmt::Write;

use anyhow::{Error, Result};
use clap::Subcommand;

use super::setting::Kind;
use super::{Flags, NodeSettings, RouterSettings, Settings, StatusSettings, UpSettings, environment, values};

/// Whose settings; flags after the role are taken into account.
#[derive(Subcommand)]
pub enum ShowRole {
    /// Of `baton router`
    Router(Flags<RouterSettings>),
    /// Of `baton prefill`
    Prefill(Flags<NodeSettings>),
    /// Of `baton decode`
    Decode(Flags<NodeSettings>),
    /// Of `baton up`
    Up(Flags<UpSettings>),
    /// Of `baton status`
    Status(Flags<StatusSettings>),
}

/// The settings of one role, or of all, as a settings file with comments; and what is wrong with one role's settings.
pub fn show(role: Option<ShowRole>) -> Result<(String, Option<Error>)> {
    match role {
        Some(ShowRole::Router(flags)) => section("router", &flags),
        Some(ShowRole::Prefill(flags)) => section("prefill", &flags),
        Some(ShowRole::Decode(flags)) => section("decode", &flags),
        Some(ShowRole::Up(flags)) => section("up", &flags),
        Some(ShowRole::Status(flags)) => section("status", &flags),
        None => {
            // Nobody runs every role at once, so what one of them lacks is no error here.
            let sections = [
                section("router", &Flags::<RouterSettings>::default())?.0,
                section("prefill", &Flags::<NodeSettings>::default())?.0,
                section("decode", &Flags::<NodeSettings>::default())?.0,
                section("up", &Flags::<UpSettings>::default())?.0,
                section("status", &Flags::<StatusSettings>::default())?.0,
            ];
            Ok((sections.join("\n"), None))
        }
    }
}

fn section<S: Settings>(name: &str, flags: &Flags<S>) -> Result<(String, Option<Error>)> {
    let values = values(name, flags, &environment)?;
    let mut text = format!("[{name}]\n");
    for entry in &values.entries {
        // Unset values and secrets are comments, so that the text is a valid settings file.
        let unset = entry.raw.is_none() && entry.setting.kind != Kind::Switch;
        let comment = if unset || entry.setting.secret { "# " } else { "" };
        let line = format!("{comment}{} = {}", entry.setting.key, entry.shown());
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line:<44} # {}", entry.source);
    }
    Ok((text, S::from_values(&values).err()))
}
