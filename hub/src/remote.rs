//! Requests to a hub: what a repository has, what a file is, and a range of its bytes. Redirects are followed here, since
//! the token must not follow them to another host, and since the answer that redirects says what the file is.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Body};

use crate::{Event, HubError, ModelName, Patience, Settings, Token, Watch};

/// Longest list of a repository's files; the largest known is some MB.
const LIST_BYTES_MAX: u64 = 64 << 20;
/// Redirects in a row.
const REDIRECTS_MAX: usize = 8;
/// To find the host and reach it.
const CONNECT: Duration = Duration::from_secs(20);
/// A hub that is too busy may ask for a pause; longer ones are cut.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What a repository has at a revision.
#[derive(Clone, Debug)]
pub(crate) struct Listing {
    /// Full commit id.
    pub(crate) commit: String,
    /// Names of all files.
    pub(crate) files: Vec<String>,
}

/// What a file is.
#[derive(Clone, Debug)]
pub(crate) struct FileInfo {
    /// Name in the repository.
    pub(crate) name: String,
    /// The entity tag: a hash of the content. Fit for a file name.
    pub(crate) tag: String,
    /// Bytes.
    pub(crate) len: u64,
}

/// Bytes on their way.
pub(crate) struct Reading {
    /// Position of the first byte in the file. 0 when the server ignores ranges.
    pub(crate) from: u64,
    pub(crate) body: Box<dyn Read + Send>,
}

/// Why a request brought nothing.
pub(crate) enum Failure {
    /// Worth another attempt, perhaps after this pause.
    Passing(String, Option<Duration>),
    /// The same again would bring the same.
    Final(HubError),
}

/// One hub.
pub(crate) struct Remote {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
    patience: Patience,
    /// For whom the hub cannot be reached: what is there without it.
    cache: PathBuf,
    /// Somebody has answered: what fails from now on may work the next time.
    reached: AtomicBool,
    /// It was told that a question is asked again; once is enough.
    told: AtomicBool,
}

impl Remote {
    pub(crate) fn new(settings: &Settings) -> Remote {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let patience = settings.patience;
        let mut config = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(patience.silence))
            .timeout_per_read(Some(patience.silence));
        if is_loopback(&settings.endpoint) {
            config = config.proxy(None);
        }
        let endpoint = settings.endpoint.trim_end_matches('/').to_owned();
        Remote {
            agent: config.build().into(),
            endpoint,
            token: settings.token.clone(),
            patience,
            cache: settings.cache.clone(),
            reached: AtomicBool::new(false),
            told: AtomicBool::new(false),
        }
    }

    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    /// What `name` has at its revision.
    pub(crate) fn list(&self, name: &ModelName, watch: Watch<'_>) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!(
            "{}/api/models/{}/revision/{}",
            self.endpoint,
            name.repo(),
            encode(name.revision(), false)
        );
        watch(Event::Asks(&self.endpoint));
        let body = self.patiently(&url, watch, || {
            let (answer, url) = self.ask("GET", &url, None, true)?;
            let answer = self.checked(answer, &url, name, None)?;
            read_all(answer.into_body().into_reader(), LIST_BYTES_MAX)
        })?;
        let wrong = |reason: String| HubError::Protocol { url: url.clone(), reason };
        let info: Info = serde_json::from_slice(&body).map_err(|error| wrong(error.to_string()))?;
        // It becomes a directory's name.
        if info.sha.len() != 40 || !info.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong(format!("{:?} is not a commit", info.sha)));
        }
        let files = info.siblings.into_iter().map(|sibling| sibling.rfilename);
        Ok(Listing { commit: info.sha, files: files.filter(|file| crate::select::is_inside(file)).collect() })
    }

    /// What `file` is at `commit`, without its bytes.
    pub(crate) fn head(
        &self,
        name: &ModelName,
        commit: &str,
        file: &str,
        watch: Watch<'_>,
    ) -> Result<FileInfo, HubError> {
        let url = self.address(name, commit, file);
        self.patiently(&url, watch, || {
            let (answer, at) = self.ask("HEAD", &url, None, false)?;
            let answer = if answer.status().is_redirection() {
                answer
            } else {
                self.checked(answer, &at, name, Some(file))?
            };
            info(answer.headers(), file)
                .map_err(|reason| Failure::Final(HubError::Protocol { url: url.clone(), reason }))
        })
    }

    /// The bytes of `file` from `from`, to its end or below `to`. One attempt.
    pub(crate) fn read(
        &self,
        name: &ModelName,
        commit: &str,
        file: &str,
        from: u64,
        to: Option<u64>,
    ) -> Result<Reading, Failure> {
        let url = self.address(name, commit, file);
        let range = match to {
            Some(to) => Some(format!("bytes={from}-{}", to.saturating_sub(1))),
            None if from > 0 => Some(format!("bytes={from}-")),
            None => None,
        };
        let (answer, at) = self.ask("GET", &url, range.as_deref(), true)?;
        let answer = self.checked(answer, &at, name, Some(file))?;
        let got = if answer.status() == StatusCode::PARTIAL_CONTENT {
            let text = header(answer.headers(), "content-range").unwrap_or_default();
            let start = text.strip_prefix("bytes ").and_then(|rest| rest.split('-').next()?.parse().ok());
            start.ok_or_else(|| Failure::Passing(format!("content-range {text:?}"), None))?
        } else {
            0
        };
        if got > from {
            return Err(Failure::Passing(format!("asked for byte {from}, got byte {got}"), None));
        }
        Ok(Reading { from: got, body: Box::new(answer.into_body().into_reader()) })
    }

    /// Bytes `[from, to)` of `file`, as many of them as it has.
    pub(crate) fn range(
        &self,
        name: &ModelName,
        commit: &str,
        file: &str,
        (from, to): (u64, u64),
        watch: Watch<'_>,
    ) -> Result<Vec<u8>, HubError> {
        let url = self.address(name, commit, file);
        self.patiently(&url, watch, || {
            let mut reading = self.read(name, commit, file, from, Some(to))?;
            let skip = from - reading.from;
            io::copy(&mut reading.body.by_ref().take(skip), &mut io::sink()).map_err(passing)?;
            let mut bytes = Vec::new();
            reading.body.take(to - from).read_to_end(&mut bytes).map_err(passing)?;
            Ok(bytes)
        })
    }

    fn address(&self, name: &ModelName, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.endpoint, name.repo(), encode(commit, false), encode(file, true))
    }

    /// Tries until it works, until it is known not to, or until patience ends.
    fn patiently<T>(
        &self,
        url: &str,
        watch: Watch<'_>,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        let mut tries = 0;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason, wait)) => {
                    tries += 1;
                    if tries >= self.patience.attempts {
                        return Err(HubError::Network { url: url.into(), reason, attempts: tries });
                    }
                    if !self.told.swap(true, Ordering::Relaxed) {
                        watch(Event::AsksAgain(&reason));
                    }
                    sleep(pause(self.patience, tries, wait));
                }
            }
        }
    }

    /// Sends a request and follows redirects: all of them, or only those within the host. Returns the address that
    /// answered, too.
    fn ask(
        &self,
        method: &str,
        url: &str,
        range: Option<&str>,
        everywhere: bool,
    ) -> Result<(Response<Body>, String), Failure> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS_MAX {
            let mut request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            };
            if let Some(range) = range {
                request = request.header("range", range);
            }
            if let Some(Token(token)) = self.token.as_ref().filter(|_| same_host(&url, &self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let answer = request.call().map_err(|error| self.failure(error, &url))?;
            self.reached.store(true, Ordering::Relaxed);
            let next = header(answer.headers(), "location").filter(|_| answer.status().is_redirection());
            match next.map(|location| absolute(&url, location)) {
                Some(next) if everywhere || same_host(&next, &url) => url = next,
                _ => return Ok((answer, url)),
            }
        }
        Err(Failure::Final(HubError::Protocol {
            url,
            reason: format!("more than {REDIRECTS_MAX} redirects"),
        }))
    }

    fn failure(&self, error: ureq::Error, url: &str) -> Failure {
        let reason = match &error {
            ureq::Error::Io(error) => error.to_string(),
            other => other.to_string(),
        };
        match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                Failure::Final(HubError::Protocol { url: url.into(), reason })
            }
            _ if self.reached.load(Ordering::Relaxed) => Failure::Passing(reason, None),
            // No network, or the wrong name: who waits in vain wants to know it at once.
            _ => {
                let (endpoint, cache) = (self.endpoint.clone(), self.cache.clone());
                Failure::Final(HubError::Unreachable { endpoint, reason, cache })
            }
        }
    }

    /// The answer, if it is one.
    fn checked(
        &self,
        answer: Response<Body>,
        url: &str,
        name: &ModelName,
        file: Option<&str>,
    ) -> Result<Response<Body>, Failure> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let (repo, endpoint) = (name.repo(), self.endpoint.clone());
        let code = header(answer.headers(), "x-error-code").unwrap_or_default();
        let error = match (status.as_u16(), code) {
            (401 | 403, "GatedRepo") => HubError::Gated { repo, endpoint, token_given: self.token.is_some() },
            // A hub tells strangers that a private repository does not exist, and says so with 401.
            (401, "RepoNotFound") => HubError::NotFound { repo, endpoint },
            (401, _) if self.token.is_none() => HubError::NotFound { repo, endpoint },
            (401 | 403, _) if same_host(url, &self.endpoint) => {
                HubError::Token { endpoint, status: status.as_u16() }
            }
            (404, "RevisionNotFound") => HubError::Revision { repo, revision: name.revision().into() },
            (404, _) => match file {
                Some(file) => HubError::File { repo, file: file.into() },
                None => HubError::NotFound { repo, endpoint },
            },
            // Signed addresses of another host run out: the next attempt gets a new one.
            (401 | 403 | 408 | 429 | 500..=599, _) => {
                let wait = header(answer.headers(), "retry-after").and_then(|text| text.parse().ok());
                return Err(Failure::Passing(format!("status {status}"), wait.map(Duration::from_secs)));
            }
            _ => HubError::Protocol { url: url.into(), reason: format!("status {status}") },
        };
        Err(Failure::Final(error))
    }
}

/// How long to wait after `tries` attempts that brought nothing.
pub(crate) fn pause(patience: Patience, tries: u32, asked: Option<Duration>) -> Duration {
    let own = patience.pause.saturating_mul(1 << tries.saturating_sub(1).min(10));
    asked.unwrap_or(own).min(PAUSE_MAX)
}

/// A broken connection is worth another attempt.
pub(crate) fn passing(error: io::Error) -> Failure {
    Failure::Passing(error.to_string(), None)
}

/// Tag and length of a file: those that a redirect announces for its target, else the answer's own.
fn info(headers: &HeaderMap, file: &str) -> Result<FileInfo, String> {
    let either = |linked: &str, own: &str| header(headers, linked).or_else(|| header(headers, own));
    let tag = either("x-linked-etag", "etag").ok_or("no ETag")?;
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    // It becomes a file's name.
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if tag.is_empty() || tag.len() > 128 || tag.starts_with('.') || !tag.chars().all(plain) {
        return Err(format!("ETag {tag:?}"));
    }
    let len = either("x-linked-size", "content-length").ok_or("no length")?;
    let len = len.parse().map_err(|_| format!("length {len:?}"))?;
    Ok(FileInfo { name: file.into(), tag: tag.into(), len })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn read_all(body: impl Read, most: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    body.take(most + 1).read_to_end(&mut bytes).map_err(passing)?;
    if bytes.len() as u64 > most {
        return Err(Failure::Passing(format!("an answer of more than {most} bytes"), None));
    }
    Ok(bytes)
}

/// Percent-encodes all but unreserved characters, and slashes where they separate.
fn encode(text: &str, slashes: bool) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || slashes && byte == b'/' {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// `https://host:port` of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

fn same_host(a: &str, b: &str) -> bool {
    origin(a).eq_ignore_ascii_case(origin(b))
}

fn absolute(base: &str, location: &str) -> String {
    if location.contains("://") {
        location.into()
    } else if let Some(rest) = location.strip_prefix("//") {
        let scheme = base.split("://").next().unwrap_or("https");
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{}{location}", origin(base))
    } else {
        let folder = base.split(['?', '#']).next().unwrap_or(base).rfind('/').unwrap_or(base.len());
        format!("{}/{location}", &base[..folder])
    }
}

fn is_loopback(url: &str) -> bool {
    let host = origin(url).rsplit("://").next().unwrap_or_default();
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    host == "localhost" || host.starts_with("127.") || host == "[::1]"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The token goes to the endpoint and to no other host, whatever its address looks like.
    #[test]
    fn hosts_are_compared_whole() {
        assert!(same_host("https://huggingface.co/a", "https://HuggingFace.co"));
        for other in [
            "http://huggingface.co/",
            "https://huggingface.co.evil/",
            "https://huggingface.co@evil/",
            "https://huggingface.co:444/",
        ] {
            assert!(!same_host(other, "https://huggingface.co"), "{other}");
        }
        assert_eq!(absolute("https://h:1/a/b?x", "/c"), "https://h:1/c");
        assert_eq!(absolute("https://h:1/a/b?x", "c"), "https://h:1/a/c");
        assert_eq!(absolute("https://h:1/a/b", "//i/c"), "https://i/c");
        assert_eq!(absolute("https://h:1/a/b", "http://i/c"), "http://i/c");
        assert!(is_loopback("http://127.0.0.1:80") && !is_loopback("https://huggingface.co"));
    }

    #[test]
    fn addresses_are_encoded() {
        assert_eq!(encode("a b/ü#?.json", true), "a%20b/%C3%BC%23%3F.json");
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
    }

    /// A server that is asked to wait for decides for how long, within reason.
    #[test]
    fn pauses_grow_and_are_bounded() {
        let patience = Patience { pause: Duration::from_secs(1), ..Patience::default() };
        let of = |tries, asked: Option<u64>| pause(patience, tries, asked.map(Duration::from_secs)).as_secs();
        assert_eq!((of(1, None), of(2, None), of(3, None), of(30, None)), (1, 2, 4, 60));
        assert_eq!((of(1, Some(7)), of(1, Some(7000))), (7, 60));
    }

    /// What becomes a file's name is checked like one.
    #[test]
    fn tags_are_plain() {
        let of = |tag: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("etag", tag.parse().unwrap());
            headers.insert("content-length", "5".parse().unwrap());
            info(&headers, "f").map(|info| info.tag)
        };
        assert_eq!(of("W/\"abc-1\""), Ok("abc-1".into()));
        for tag in ["\"../x\"", "\"\"", "\"a/b\"", "\".hidden\""] {
            assert!(of(tag).is_err(), "{tag}");
        }
    }
}
