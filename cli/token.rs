//! `baton token`: makes, lists and revokes join tokens, beside the router and its certificate authority.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use cluster::trust::{TokenRecord, token_name};
use cluster::{Authority, Tokens};

use crate::{dirs, print};

/// What to do with join tokens.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// The cluster's directory, as given to its router [default: cluster in the user's data directory]
    #[arg(long, value_name = "DIR", global = true)]
    cluster_dir: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a join token and print it: once, it is kept nowhere
    Create {
        /// Which machines it is for, for people
        #[arg(default_value = "nodes", value_parser = token_name)]
        name: String,
        /// It lets nobody in any more after this; who is in stays [default: never]
        #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u64).range(1..))]
        expires: Option<u64>,
    },
    /// List all join tokens, without the tokens themselves
    List,
    /// Let a token admit nobody any more, and cut off the nodes that came in by it
    Revoke {
        /// Name or id
        token: String,
    },
}

/// The directory of the cluster whose router runs on this machine.
pub fn cluster_dir(named: Option<PathBuf>) -> Result<PathBuf> {
    match named {
        Some(dir) => Ok(dir),
        None => Ok(dirs::data()?.join("cluster")),
    }
}

/// Runs one command.
pub fn run(args: Args) -> Result<()> {
    let folder = &cluster_dir(args.cluster_dir)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match args.command {
        Command::Create { name, expires } => {
            let expires = expires.map(|hours| now.saturating_add(hours.saturating_mul(3600)));
            let fingerprint = Authority::open(folder)?.fingerprint();
            let token = Tokens::change(folder, |tokens| tokens.create(&name, fingerprint, now, expires))?;
            print(&format!("{}\n", token.expose()));
            eprintln!(
                "Shown once: put it into a file on the machine that is to join, and give --token-file there."
            );
        }
        Command::List => print(&table(&Tokens::read(folder)?.tokens, now)),
        Command::Revoke { token } => {
            // Where there are none, there may be no cluster whose lock could be taken.
            ensure!(!Tokens::read(folder)?.tokens.is_empty(), "no join tokens in {}", folder.display());
            let record = Tokens::change(folder, |tokens| tokens.revoke(&token, now))?;
            eprintln!(
                "revoked {} ({}): who came in by it is cut off within two seconds",
                record.name, record.id
            );
        }
    }
    Ok(())
}

fn table(tokens: &[TokenRecord], now: u64) -> String {
    if tokens.is_empty() {
        return "no join tokens; `baton token create NAME` makes one\n".into();
    }
    let width = tokens.iter().map(|token| token.name.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:<8}  {:<width$}  STATE\n", "ID", "NAME");
    for token in tokens {
        let state = match (token.revoked, token.expires) {
            (Some(_), _) => "revoked".into(),
            (None, Some(expires)) if expires <= now => "expired".into(),
            (None, Some(expires)) => format!("active, {} h left", (expires - now).div_ceil(3600)),
            (None, None) => "active".to_owned(),
        };
        text.push_str(&format!("{:<8}  {:<width$}  {state}\n", token.id, token.name));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_tokens() {
        let mut tokens = Tokens::default();
        let mut make = |name: &str, expires| tokens.create(name, [1; 32], 0, expires).expect("a token");
        let secret = make("macs", None).expose();
        make("old", Some(3_600));
        make("new", Some(9_000));
        tokens.revoke("macs", 1).expect("revokes");
        let ids: Vec<_> = tokens.tokens.iter().map(|token| token.id.clone()).collect();
        let table = table(&tokens.tokens, 3_600);
        assert_eq!(
            table,
            format!(
                "ID        NAME  STATE\n{}  macs  revoked\n{}  old   expired\n{}  new   active, 2 h left\n",
                ids[0], ids[1], ids[2]
            )
        );
        assert!(!table.contains(&secret[20..40]));
    }
}
