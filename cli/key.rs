//! `baton key`: makes, lists and revokes the API keys of a key file, which a router follows.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use router::key_file::{KeyFile, KeyFileError, KeyLimits, KeyRecord, key_name};

use crate::{dirs, print};

/// What to do with keys.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// File of keys, as given to the router with --key-file [default: keys.json in the user's data directory]
    #[arg(long, value_name = "FILE", global = true)]
    file: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a key and print it: once, it is kept nowhere
    Create {
        /// Whose it is
        #[arg(value_parser = key_name)]
        name: String,
        /// Requests that it may make per minute
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        requests_per_minute: Option<u32>,
        /// Tokens of prompts and answers that it may use per minute
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        tokens_per_minute: Option<u32>,
        /// Requests that it may have running at once
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        concurrent: Option<u32>,
    },
    /// List all keys, without the keys themselves
    List,
    /// Let a key open nothing any more; a running router learns it within seconds
    Revoke {
        /// Name or id
        key: String,
    },
}

/// Runs one command.
pub fn run(args: Args) -> Result<()> {
    let path = match args.file {
        Some(path) => path,
        None => dirs::data()?.join("keys.json"),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match args.command {
        Command::Create { name, requests_per_minute, tokens_per_minute, concurrent } => {
            let limits = KeyLimits { requests_per_minute, tokens_per_minute, concurrent };
            let key = KeyFile::change(&path, |file| file.create(&name, limits, now))?;
            print(&format!("{key}\n"));
            eprintln!(
                "This key is shown once. A router that runs with --key-file {} knows it within seconds.",
                path.display()
            );
        }
        Command::List => {
            let file = match KeyFile::read(&path) {
                Err(KeyFileError::Io { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => {
                    KeyFile::default()
                }
                other => other?,
            };
            print(&table(&file.keys, now));
        }
        Command::Revoke { key } => {
            // Without a file there is none, and nothing to lock.
            ensure!(path.exists(), "no keys: {} is not there", path.display());
            let record = KeyFile::change(&path, |file| file.revoke(&key, now))?;
            eprintln!("revoked {} ({})", record.name, record.id);
        }
    }
    Ok(())
}

fn table(keys: &[KeyRecord], now: u64) -> String {
    if keys.is_empty() {
        return "no keys; `baton key create NAME` makes one\n".into();
    }
    let width = keys.iter().map(|key| key.name.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:<8}  {:<width$}  {:<8}  {:<12}  LIMITS\n", "ID", "NAME", "STATE", "MADE");
    for key in keys {
        let state = if key.revoked.is_some() { "revoked" } else { "active" };
        let made = format!("{} ago", age(now.saturating_sub(key.created)));
        let line =
            format!("{:<8}  {:<width$}  {state:<8}  {made:<12}  {}", key.id, key.name, limits(&key.limits));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn limits(limits: &KeyLimits) -> String {
    let parts = [
        limits.requests_per_minute.map(|n| format!("{n} requests/min")),
        limits.tokens_per_minute.map(|n| format!("{n} tokens/min")),
        limits.concurrent.map(|n| format!("{n} at once")),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table tells who has a key and what it may use; of the key nothing is in it.
    #[test]
    fn a_table_of_keys() {
        let mut file = KeyFile::default();
        let some = KeyLimits { requests_per_minute: Some(60), concurrent: Some(4), ..KeyLimits::default() };
        let key = file.create("alice", some, 1_000).expect("a key");
        file.create("b", KeyLimits::default(), 1_000).expect("a key");
        file.revoke("b", 1_001).expect("revokes");
        let table = table(&file.keys, 1_000 + 3 * 3_600);
        let (a, b) = (&file.keys[0].id, &file.keys[1].id);
        assert_eq!(
            table,
            format!(
                "ID        NAME   STATE     MADE          LIMITS\n\
                 {a}  alice  active    3 h ago       60 requests/min, 4 at once\n\
                 {b}  b      revoked   3 h ago\n"
            )
        );
        assert!(!table.contains(&key[9..17]) && !table.contains(&file.keys[0].digest[..8]));
    }
}
