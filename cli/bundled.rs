//! The bundled model: carried by the executable, unpacked once per content. Called by `up`.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// Name under which it is served.
pub const NAME: &str = "baton-demo";

/// Names and contents of `models/demo/weights`, as the build script found them.
const FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/bundled.rs"));

/// The directory of the bundled model under `cache`, made if it is not there.
pub fn unpack(cache: &Path) -> Result<PathBuf> {
    unpack_files(FILES, cache)
}

fn unpack_files(files: &[(&str, &[u8])], cache: &Path) -> Result<PathBuf> {
    ensure!(!files.is_empty(), "this build carries no model: name one with --model DIR");
    let mut hash = Sha256::new();
    for (name, content) in files {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    let key: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let home = cache.join("models").join(format!("{NAME}-{key}"));
    if is_complete(files, &home) {
        return Ok(home);
    }
    // Written aside and renamed, so that no one ever reads half a model, however many `up` start at once.
    let aside = cache.join("models").join(format!(".{NAME}-{key}-{}", std::process::id()));
    write(files, &aside, &home)
        .inspect_err(|_| drop(fs::remove_dir_all(&aside)))
        .with_context(|| format!("cannot unpack the bundled model into {}", home.display()))?;
    Ok(home)
}

fn is_complete(files: &[(&str, &[u8])], home: &Path) -> bool {
    files.iter().all(|(name, content)| {
        fs::metadata(home.join(name)).is_ok_and(|found| found.len() == content.len() as u64)
    })
}

fn write(files: &[(&str, &[u8])], aside: &Path, home: &Path) -> io::Result<()> {
    fs::create_dir_all(aside)?;
    for (name, content) in files {
        fs::write(aside.join(name), content)?;
    }
    match fs::rename(aside, home) {
        // Another process was first: the same content under the same key.
        Err(_) if is_complete(files, home) => fs::remove_dir_all(aside),
        Err(_) => {
            fs::remove_dir_all(home)?; // a damaged one
            fs::rename(aside, home)
        }
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model that was damaged in the cache is unpacked anew; another content gets another directory.
    #[test]
    fn unpacks_once_and_repairs() {
        let cache = std::env::temp_dir().join(format!("baton-bundled-{}", std::process::id()));
        let files: &[(&str, &[u8])] = &[("config.json", b"{}"), ("model.safetensors", b"12345678")];
        let home = unpack_files(files, &cache).expect("unpacks");
        assert_eq!(fs::read(home.join("model.safetensors")).expect("is there"), b"12345678");

        fs::write(home.join("model.safetensors"), b"1234").expect("truncates");
        assert_eq!(unpack_files(files, &cache).expect("repairs"), home);
        assert_eq!(fs::read(home.join("model.safetensors")).expect("is there"), b"12345678");

        let other = unpack_files(&[("config.json", b"{ }")], &cache).expect("unpacks");
        assert_ne!(other, home);
        let left = fs::read_dir(cache.join("models")).expect("lists").count();
        assert_eq!(left, 2, "nothing half-written is left");
        fs::remove_dir_all(&cache).expect("cleans up");
    }

    /// A build without a model says so and names the way out.
    #[test]
    fn no_model_is_said() {
        let error = unpack_files(&[], Path::new("/nowhere")).expect_err("nothing to unpack").to_string();
        assert_eq!(error, "this build carries no model: name one with --model DIR");
    }
}
