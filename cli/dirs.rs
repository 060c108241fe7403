//! Where baton keeps files of its own on this machine. Called by `up` (models, run files), `status` (run files) and `key`.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use anyhow::{Context, Result, ensure};

use crate::system;

/// The user's cache directory for baton, made if it is not there, closed to others.
pub fn cache() -> Result<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || Some(named("HOME")?.join(".cache"));
    if let Some(dir) = named("XDG_CACHE_HOME").or_else(home).map(|dir| dir.join("baton"))
        && make_private(&dir).is_ok()
    {
        return Ok(dir);
    }
    // A service account may have no home that it can write to.
    let me = system::user_id();
    let dir = env::temp_dir().join(format!("baton-{me}"));
    make_private(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let owner = fs::metadata(&dir).with_context(|| format!("cannot read {}", dir.display()))?.uid();
    ensure!(owner == me, "{} belongs to another user: set XDG_CACHE_HOME", dir.display());
    Ok(dir)
}

/// The user's directory for what must last: keys.
pub fn data() -> Result<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || Some(named("HOME")?.join(".local/share"));
    let dir = named("XDG_DATA_HOME").or_else(home).context("neither XDG_DATA_HOME nor HOME is set")?;
    let dir = dir.join("baton");
    make_private(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Where `baton up` on `port` leaves its cluster address and token for its own processes and for `baton status`.
pub fn run_file(port: u16) -> Result<PathBuf> {
    let dir = cache()?.join("run");
    make_private(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir.join(format!("up-{port}.toml")))
}

fn make_private(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}
