//! A hub for tests, on a port of its own: lists, tags, redirects to another host, ranges; and faults on demand. Standard
//! library only. Used by the tests of `hub` and, with the executable, by `tests/e2e`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// The commit that `main` is at.
pub const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// One file of a repository.
#[derive(Clone)]
pub struct Content {
    /// Hash, as the protocol wants it.
    pub tag: String,
    /// What the server sends; a test of damage lets it differ from the tag.
    pub bytes: Vec<u8>,
    /// Kept on another host, as large files are.
    pub linked: bool,
}

/// What goes wrong; counts go down with every answer that they spoil.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Answers with content that break off after so many bytes.
    pub cut: Option<usize>,
    /// Answers with content that stop sending halfway and stay open.
    pub stall: usize,
    /// Answers `503` before anything else.
    pub busy: usize,
    /// Ranges are not understood.
    pub no_ranges: bool,
    /// Only this token may see the repository; `true`: it exists but must be asked for.
    pub locked: Option<(String, bool)>,
}

/// One request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path, as sent.
    pub path: String,
    /// `Range`, as sent.
    pub range: Option<String>,
    /// Whether a token came along.
    pub token: bool,
}

struct State {
    repo: String,
    files: BTreeMap<String, Content>,
    faults: Faults,
    requests: Vec<Request>,
}

/// A running server. Dropping it ends it.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub endpoint: String,
    state: Arc<Mutex<State>>,
    ended: Arc<AtomicBool>,
}

impl Server {
    /// Serves `repo` with these files, and the name `old/name` for it, which is redirected.
    pub fn start(repo: &str, files: impl IntoIterator<Item = (&'static str, Content)>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let files = files.into_iter().map(|(name, content)| (name.to_owned(), content)).collect();
        let faults = Faults { cut: None, stall: 0, busy: 0, no_ranges: false, locked: None };
        let state = State { repo: repo.into(), files, faults, requests: Vec::new() };
        let (state, ended) = (Arc::new(Mutex::new(state)), Arc::new(AtomicBool::new(false)));
        thread::spawn({
            let (state, ended) = (state.clone(), ended.clone());
            move || {
                for stream in listener.incoming().flatten() {
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    let (state, ended) = (state.clone(), ended.clone());
                    thread::spawn(move || serve(stream, port, &state, &ended));
                }
            }
        });
        Server { endpoint: format!("http://127.0.0.1:{port}"), state, ended }
    }

    /// Changes what goes wrong from now on.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut lock(&self.state).faults);
    }

    /// Changes a file.
    pub fn put(&self, name: &str, content: Content) {
        lock(&self.state).files.insert(name.into(), content);
    }

    /// The requests so far, which are forgotten.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.state).requests)
    }

    /// Starts of the ranges in which content was asked for, of files on the other host; forgets all requests.
    pub fn take_starts(&self) -> Vec<u64> {
        let start = |request: Request| {
            let is_content = request.method == "GET" && request.path.starts_with("/cdn/");
            let range = request.range.unwrap_or_else(|| "bytes=0-".into());
            let start =
                range.trim_start_matches("bytes=").split('-').next().and_then(|text| text.parse().ok());
            start.filter(|_| is_content)
        };
        self.take_requests().into_iter().filter_map(start).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let address = self.endpoint.trim_start_matches("http://").to_owned();
        let _ = TcpStream::connect(address);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection: request after request.
fn serve(stream: TcpStream, port: u16, state: &Mutex<State>, ended: &AtomicBool) {
    let Ok(clone) = stream.try_clone() else { return };
    let mut reader = BufReader::new(clone);
    let mut stream = stream;
    while let Some((request, host, token)) = read(&mut reader) {
        lock(state).requests.push(request.clone());
        if !answer(&mut stream, &request, &host, token.as_deref(), port, state, ended) {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<(Request, String, Option<String>)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&read| read > 0)?;
    let mut parts = line.split_whitespace();
    let (method, path) = (parts.next()?.to_owned(), parts.next()?.to_owned());
    let (mut range, mut host, mut token) = (None, String::new(), None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|&read| read > 0)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "host" => host = value.to_owned(),
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    Some((Request { method, path, range, token: token.is_some() }, host, token))
}

/// Whether the connection goes on.
fn answer(
    stream: &mut TcpStream,
    request: &Request,
    host: &str,
    token: Option<&str>,
    port: u16,
    state: &Mutex<State>,
    ended: &AtomicBool,
) -> bool {
    let mut state = lock(state);
    let refuse = |stream: &mut TcpStream, status: &str, code: &str| {
        let text = format!("HTTP/1.1 {status}\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(text.as_bytes()).is_ok()
    };
    if state.faults.busy > 0 {
        state.faults.busy -= 1;
        return refuse(stream, "503 Busy", "");
    }
    let path = request.path.clone();
    if let Some(rest) = path.strip_prefix("/cdn/") {
        // The other host: it must not be shown a token, and goes by another name.
        if token.is_some() || !host.starts_with("localhost") {
            return refuse(stream, "400 Bad Request", "");
        }
        let Some(content) = state.files.values().find(|content| content.tag == rest).cloned() else {
            return refuse(stream, "404 Not Found", "");
        };
        let faults = state.faults.clone();
        state.faults.stall = faults.stall.saturating_sub(1);
        drop(state);
        return send(stream, request, &content, &faults, ended);
    }
    if let Some((needed, exists)) = &state.faults.locked
        && token != Some(needed)
    {
        return match (exists, token) {
            (true, None) => refuse(stream, "401 Unauthorized", "GatedRepo"),
            (true, Some(_)) => refuse(stream, "403 Forbidden", "GatedRepo"),
            (false, _) => refuse(stream, "401 Unauthorized", "RepoNotFound"),
        };
    }
    // A renamed repository.
    if path.contains("/old/name/") {
        let to = path.replace("/old/name/", &format!("/{}/", state.repo));
        let text = format!("HTTP/1.1 307 Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
        return stream.write_all(text.as_bytes()).is_ok();
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{}/revision/", state.repo)) {
        if revision != "main" && revision != COMMIT {
            return refuse(stream, "404 Not Found", "RevisionNotFound");
        }
        let names: Vec<_> = state.files.keys().map(|name| format!("{{\"rfilename\": {name:?}}}")).collect();
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(", "));
        let text = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        return stream.write_all(text.as_bytes()).is_ok();
    }
    let Some(file) = path.strip_prefix(&format!("/{}/resolve/{COMMIT}/", state.repo)) else {
        return refuse(stream, "404 Not Found", "RepoNotFound");
    };
    let Some(content) = state.files.get(file).cloned() else {
        return refuse(stream, "404 Not Found", "EntryNotFound");
    };
    let faults = Faults { cut: None, stall: 0, ..state.faults.clone() };
    drop(state);
    if content.linked {
        let text = format!(
            "HTTP/1.1 302 Found\r\nLocation: http://localhost:{port}/cdn/{tag}\r\nETag: \"of-the-redirect\"\r\n\
             X-Linked-ETag: \"{tag}\"\r\nX-Linked-Size: {}\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: 0\r\n\r\n",
            content.bytes.len(),
            tag = content.tag,
        );
        return stream.write_all(text.as_bytes()).is_ok();
    }
    send(stream, request, &content, &faults, ended)
}

fn send(
    stream: &mut TcpStream,
    request: &Request,
    content: &Content,
    faults: &Faults,
    ended: &AtomicBool,
) -> bool {
    let all = &content.bytes;
    let range = request.range.as_deref().filter(|_| !faults.no_ranges);
    let (status, from, to) = match range.and_then(|text| text.strip_prefix("bytes=")?.split_once('-')) {
        Some((from, to)) => {
            let from = from.parse().unwrap_or(0).min(all.len());
            let to = to.parse().map_or(all.len(), |last: usize| (last + 1).min(all.len()));
            (
                format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{}", to.max(1) - 1, all.len()),
                from,
                to,
            )
        }
        None => ("200 OK".to_owned(), 0, all.len()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {}\r\n\r\n",
        content.tag,
        to - from
    );
    let mut sent = stream.write_all(head.as_bytes()).is_ok();
    if request.method == "HEAD" {
        return sent;
    }
    let body = &all[from..to];
    if faults.stall > 0 {
        let _ = stream.write_all(&body[..body.len() / 2]);
        while !ended.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(10));
        }
        return false;
    }
    let cut = faults.cut.unwrap_or(usize::MAX).min(body.len());
    sent &= stream.write_all(&body[..cut]).is_ok();
    sent && cut == body.len()
}
