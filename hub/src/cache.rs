//! One repository in the cache, laid out as every tool of the hub does:
//!
//! ```text
//! models--ORG--NAME/blobs/TAG                     content, by tag; TAG.incomplete while it arrives
//! models--ORG--NAME/snapshots/COMMIT/FILE         link to the blob
//! models--ORG--NAME/refs/REVISION                 the commit that a branch or tag was last seen at
//! .locks/models--ORG--NAME/TAG.lock               held while a blob is written
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::{HubError, ModelName};

/// Directories below a snapshot; repositories are flat, hostile ones need not be.
const DEPTH_MAX: usize = 8;

/// A repository's directory.
#[derive(Clone, Debug)]
pub(crate) struct Repo {
    root: PathBuf,
    locks: PathBuf,
}

impl Repo {
    pub(crate) fn new(cache: &Path, name: &ModelName) -> Repo {
        Repo { root: cache.join(name.folder()), locks: cache.join(".locks").join(name.folder()) }
    }

    pub(crate) fn blob(&self, tag: &str) -> PathBuf {
        self.root.join("blobs").join(tag)
    }

    pub(crate) fn incomplete(&self, tag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{tag}.incomplete"))
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Makes the directories for blobs and locks.
    pub(crate) fn make(&self) -> Result<(), HubError> {
        for dir in [self.root.join("blobs"), self.locks.clone()] {
            fs::create_dir_all(&dir).map_err(|reason| HubError::Io { path: dir, reason })?;
        }
        Ok(())
    }

    /// Bytes of a file that are here: of the blob, or of what has arrived.
    pub(crate) fn there(&self, tag: &str, len: u64) -> u64 {
        let of = |path: PathBuf| fs::metadata(path).map(|found| found.len()).ok();
        match of(self.blob(tag)) {
            Some(found) if found == len => len,
            _ => of(self.incomplete(tag)).unwrap_or(0).min(len),
        }
    }

    /// The commit that `revision` was last seen at.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        let is_commit = |text: &str| text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_commit(revision) {
            return Some(revision.into());
        }
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes that `revision` is at `commit` now.
    pub(crate) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        replace(&path, |aside| fs::write(aside, commit)).map_err(|reason| HubError::Io { path, reason })
    }

    /// Files of the snapshot that are whole, by name, in order.
    pub(crate) fn names(&self, commit: &str) -> Vec<String> {
        let mut names = Vec::new();
        walk(&self.snapshot(commit), "", 0, &mut names);
        names.sort();
        names
    }

    /// Gives the blob `tag` its name `file` in the snapshot.
    pub(crate) fn link(&self, commit: &str, file: &str, tag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{tag}"));
        if fs::read_link(&path).is_ok_and(|found| found == target) {
            return Ok(());
        }
        replace(&path, |aside| std::os::unix::fs::symlink(&target, aside))
            .map_err(|reason| HubError::Io { path, reason })
    }

    /// The lock of a blob, opened but not held.
    pub(crate) fn lock(&self, tag: &str) -> Result<(PathBuf, File), HubError> {
        let path = self.locks.join(format!("{tag}.lock"));
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        match file {
            Ok(file) => Ok((path, file)),
            Err(reason) => Err(HubError::Io { path, reason }),
        }
    }
}

/// Makes `path` by way of a name beside it, so that nobody ever sees half of it.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = folder.join(format!(".{name}.{}-{:?}", std::process::id(), std::thread::current().id()));
    let _ = fs::remove_file(&aside);
    make(&aside)?;
    fs::rename(&aside, path).inspect_err(|_| drop(fs::remove_file(&aside)))
}

fn walk(dir: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Follows links: one to a blob that is gone counts as no file.
        let Ok(found) = fs::metadata(entry.path()) else { continue };
        if name.starts_with('.') && found.is_file() {
            continue;
        }
        let name = format!("{prefix}{name}");
        if found.is_file() {
            names.push(name);
        } else if found.is_dir() && depth < DEPTH_MAX {
            walk(&entry.path(), &format!("{name}/"), depth + 1, names);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tools find what we put here, and a link whose blob is gone is no file.
    #[test]
    fn the_usual_layout() {
        let cache = tempfile::tempdir().unwrap();
        let repo = Repo::new(cache.path(), &"org/name".parse().unwrap());
        let commit = "0123456789012345678901234567890123456789";
        repo.make().unwrap();
        fs::write(repo.blob("t1"), "content").unwrap();
        repo.link(commit, "config.json", "t1").unwrap();
        repo.link(commit, "sub/dir/x.json", "t1").unwrap();
        repo.link(commit, "gone.json", "t2").unwrap();
        repo.link(commit, "config.json", "t1").unwrap();
        assert_eq!(repo.commit("main"), None);
        repo.write_ref("main", commit).unwrap();
        repo.write_ref("refs/pr/1", commit).unwrap();
        assert_eq!(repo.commit("main").as_deref(), Some(commit));
        assert_eq!(repo.commit("refs/pr/1").as_deref(), Some(commit));
        assert_eq!(repo.commit(commit).as_deref(), Some(commit));
        assert_eq!(repo.names(commit), ["config.json", "sub/dir/x.json"]);

        let root = cache.path().join("models--org--name");
        let link = fs::read_link(root.join("snapshots").join(commit).join("config.json")).unwrap();
        assert_eq!(link, Path::new("../../blobs/t1"));
        assert_eq!(fs::read(root.join("snapshots").join(commit).join("sub/dir/x.json")).unwrap(), b"content");
        assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), commit);
    }
}
