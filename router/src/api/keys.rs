//! Who may ask: the keys of the settings, and those of a file whose changes are followed. Of all of them only digests are
//! kept, and every comparison takes the same time.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::quota::Caller;
use crate::key_file::{KeyFile, KeyFileError, KeyLimits};

/// The file is looked at this often; a revoked key opens nothing after it.
const LOOK: Duration = Duration::from_secs(1);

/// API keys.
#[derive(Debug)]
pub struct Keys {
    /// Of the settings: without limits, and never revoked while this process runs.
    fixed: Vec<Key>,
    file: Option<PathBuf>,
    ring: RwLock<Arc<Ring>>,
}

/// All keys that open now.
#[derive(Debug, Default)]
struct Ring {
    keys: Vec<Key>,
    /// The file as it was read.
    seen: Option<Seen>,
}

/// What changes with every change of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    changed: Option<SystemTime>,
    len: u64,
    inode: u64,
}

#[derive(Clone, Debug)]
struct Key {
    /// Empty for those of the settings.
    id: String,
    digest: [u8; 32],
    caller: Arc<Caller>,
}

impl Keys {
    /// Neither keys nor a file: everybody may ask. Errors when the file cannot be used.
    pub fn new(keys: &[String], file: Option<PathBuf>) -> Result<Self, KeyFileError> {
        let fixed = keys.iter().map(|key| {
            let digest: [u8; 32] = Sha256::digest(key).into();
            // Part of a digest names the key and does not open.
            let start = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            let owner = format!("settings:{start}");
            let caller = Caller::new("settings", &owner, KeyLimits::default(), Instant::now());
            Key { id: String::new(), digest, caller }
        });
        let keys = Keys { fixed: fixed.collect(), file, ring: RwLock::default() };
        keys.read()?;
        Ok(keys)
    }

    /// Follows the file's changes until `shutdown`. A file that cannot be read leaves the keys as they are.
    pub async fn watch(self: Arc<Self>, shutdown: CancellationToken) {
        if self.file.is_none() {
            return;
        }
        let mut said = String::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let keys = Arc::clone(&self);
            let read = tokio::task::spawn_blocking(move || keys.read()).await;
            let problem = match read {
                Ok(Ok(())) => String::new(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            if problem != said && !problem.is_empty() {
                tracing::warn!("{problem}; keys stay as they were");
            }
            said = problem;
        }
    }

    /// Reads the file if it has changed. Callers that stay keep what they have used up.
    fn read(&self) -> Result<(), KeyFileError> {
        let old = self.ring();
        let mut keys = self.fixed.clone();
        let mut seen = None;
        if let Some(path) = &self.file {
            let found = fs::metadata(path).map_err(|error| KeyFileError::Io { path: path.clone(), error })?;
            let inode = std::os::unix::fs::MetadataExt::ino(&found);
            seen = Some(Seen { changed: found.modified().ok(), len: found.len(), inode });
            if old.seen == seen {
                return Ok(());
            }
            let now = Instant::now();
            for record in KeyFile::read(path)?.keys {
                let Some(digest) = record.opens() else { continue };
                let known =
                    old.keys.iter().find(|key| key.id == record.id && key.caller.limits() == record.limits);
                let caller = match known {
                    Some(key) => Arc::clone(&key.caller),
                    None => Caller::new(&record.name, &format!("key:{}", record.id), record.limits, now),
                };
                keys.push(Key { id: record.id, digest, caller });
            }
        }
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Ring { keys, seen });
        Ok(())
    }

    /// Whether a key of this owner opens now. Without any keys, nobody has a name.
    pub fn knows(&self, owner: &str) -> bool {
        if self.fixed.is_empty() && self.file.is_none() {
            return owner.is_empty();
        }
        self.ring().keys.iter().any(|key| key.caller.owner == owner)
    }

    fn ring(&self) -> Arc<Ring> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whose key the request carries; `None` when nobody needs one. Errors with what is wrong with the header.
    pub fn caller(&self, headers: &HeaderMap) -> Result<Option<Arc<Caller>>, ApiError> {
        if self.fixed.is_empty() && self.file.is_none() {
            return Ok(None);
        }
        let missing = "You didn't provide an API key. Provide it in the header 'Authorization: Bearer KEY'.";
        // The second is Anthropic's.
        let key = match (headers.get(header::AUTHORIZATION), headers.get("x-api-key")) {
            (Some(value), _) => {
                let (scheme, key) =
                    split_once(value.as_bytes()).ok_or_else(|| ApiError::unauthorized(missing))?;
                if !scheme.eq_ignore_ascii_case(b"bearer") {
                    return Err(ApiError::unauthorized(missing));
                }
                key
            }
            (None, Some(key)) => key.as_bytes(),
            (None, None) => return Err(ApiError::unauthorized(missing)),
        };
        let ring = self.ring();
        match find(&ring.keys, &Sha256::digest(key.trim_ascii()).into()) {
            Some(key) => Ok(Some(Arc::clone(&key.caller))),
            None => Err(ApiError::unauthorized("Incorrect API key provided.")),
        }
    }
}

/// The key of this digest. All are compared, whole, whichever it is.
fn find<'k>(keys: &'k [Key], digest: &[u8; 32]) -> Option<&'k Key> {
    let none = u32::MAX;
    let at = keys
        .iter()
        .zip(0..)
        .fold(none, |at, (key, i)| u32::conditional_select(&at, &i, key.digest.ct_eq(digest)));
    keys.get(at as usize)
}

fn split_once(value: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = value.iter().position(|&byte| byte == b' ')?;
    Some((&value[..at], &value[at + 1..]))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn header(value: &str) -> HeaderMap {
        let value = HeaderValue::from_str(value).expect("a header");
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    }

    #[test]
    fn only_a_whole_key_opens() {
        let keys = Keys::new(&["sk-one".into(), "sk-two".into()], None).unwrap();
        let check = |value: &str| keys.caller(&header(value)).is_ok();
        assert!(check("Bearer sk-one") && check("bearer  sk-two"));
        for wrong in [
            "Bearer sk-on",
            "Bearer sk-onex",
            "Bearer ",
            "Bearer",
            "sk-one",
            "Basic sk-one",
            "Bearer sk-one sk-two",
        ] {
            assert!(!check(wrong), "{wrong}");
        }
        assert!(keys.caller(&HeaderMap::new()).is_err());
        assert!(Keys::new(&[], None).unwrap().caller(&HeaderMap::new()).unwrap().is_none());
    }

    /// The file is followed: new keys open, revoked ones do not, and who stays keeps their count. A file that breaks changes
    /// nothing, and one without keys opens to nobody.
    #[test]
    fn a_file_is_followed() {
        let folder = std::env::temp_dir().join(format!("baton-key-ring-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        let path = folder.join("keys.json");
        assert!(Keys::new(&[], Some(path.clone())).is_err(), "no file");
        let limits = KeyLimits { requests_per_minute: Some(1), ..KeyLimits::default() };
        let alice = KeyFile::change(&path, |file| file.create("alice", limits, 1)).unwrap();
        let keys = Keys::new(&[], Some(path.clone())).unwrap();
        let caller = |key: &str| keys.caller(&header(&format!("Bearer {key}"))).ok().flatten();
        let now = Instant::now();
        assert_eq!(caller(&alice).expect("opens").name, "alice");
        let owner = caller(&alice).expect("opens").owner.clone();
        assert!(keys.knows(&owner) && !keys.knows("") && Keys::new(&[], None).unwrap().knows(""));
        assert!(caller(&alice).expect("opens").enter(now).is_ok());

        let bob = KeyFile::change(&path, |file| file.create("bob", limits, 1)).unwrap();
        assert!(caller(&bob).is_none());
        keys.read().unwrap();
        assert!(caller(&bob).is_some());
        assert!(caller(&alice).expect("opens").enter(now).is_err(), "forgot what was used");

        KeyFile::change(&path, |file| file.revoke("alice", 2)).unwrap();
        keys.read().unwrap();
        assert!(caller(&alice).is_none() && caller(&bob).is_some() && !keys.knows(&owner));
        fs::write(&path, "{").unwrap();
        assert!(keys.read().is_err());
        assert!(caller(&bob).is_some());
        fs::write(&path, r#"{"keys": []}"#).unwrap();
        keys.read().unwrap();
        assert!(caller(&bob).is_none() && keys.caller(&HeaderMap::new()).is_err());
        fs::remove_dir_all(folder).unwrap();
    }

    /// Where a wrong key differs, and which key is right, must not show in time. A scan that stops early is many times
    /// faster for the first key than for the last; noise is taken out by the median over alternating rounds.
    #[test]
    fn comparison_takes_the_same_time() {
        let ring: Vec<Key> = (0..2_000u32)
            .map(|i| Key {
                id: i.to_string(),
                digest: Sha256::digest(i.to_le_bytes()).into(),
                caller: Caller::new("x", "x", KeyLimits::default(), Instant::now()),
            })
            .collect();
        let mut late = ring[0].digest;
        late[31] ^= 1;
        let wanted = [ring[0].digest, ring[1_999].digest, late, [0; 32]];
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..61 {
            for (digest, times) in wanted.iter().zip(&mut times) {
                let begun = Instant::now();
                std::hint::black_box(find(&ring, std::hint::black_box(digest)));
                times.push(begun.elapsed());
            }
        }
        let medians = times.map(|mut times| {
            times.sort();
            times[30].as_secs_f64()
        });
        let most = medians.iter().copied().fold(0.0, f64::max);
        let least = medians.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(most < 2.0 * least, "{medians:?}");
    }
}
