//! What every request passes first: an id, the checks of host and origin, the API key. And what every answer passes last:
//! it is counted, and a panic becomes a 500.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::Gateway;
use super::error::ApiError;
use super::run::random;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Of a client's own id.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Asked again and again by those who wait for a cluster.
const CHECKS: [&str; 2] = ["/health", "/live"];

/// A browser may remember the permission for this long.
const PREFLIGHT_S: &str = "600";

/// API keys, of which only digests are kept.
#[derive(Debug)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Empty: everybody may ask.
    pub fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(key).into()).collect())
    }

    /// Errors with what is wrong with the header. All keys are compared, each in constant time.
    fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let missing = "You didn't provide an API key. Provide it in the header 'Authorization: Bearer KEY'.";
        let value = headers.get(header::AUTHORIZATION).ok_or_else(|| ApiError::unauthorized(missing))?;
        let (scheme, key) = split_once(value.as_bytes()).ok_or_else(|| ApiError::unauthorized(missing))?;
        if !scheme.eq_ignore_ascii_case(b"bearer") {
            return Err(ApiError::unauthorized(missing));
        }
        let digest: [u8; 32] = Sha256::digest(key.trim_ascii()).into();
        let known = self.0.iter().fold(Choice::from(0), |known, own| known | own.ct_eq(&digest));
        if bool::from(known) { Ok(()) } else { Err(ApiError::unauthorized("Incorrect API key provided.")) }
    }
}

fn split_once(value: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = value.iter().position(|&byte| byte == b' ')?;
    Some((&value[..at], &value[at + 1..]))
}

/// Outermost: gives the request an id, catches panics, counts and logs the answer.
pub async fn observe(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let given = request.headers().get(REQUEST_ID).filter(|id| {
        let bytes = id.as_bytes();
        (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    });
    let id = match given {
        Some(id) => id.clone(),
        None => {
            let random = random().unwrap_or_default();
            HeaderValue::from_str(&format!("req_{random:032x}")).unwrap_or(HeaderValue::from_static("req"))
        }
    };
    let method = request.method().clone();
    // Patterns, not paths: a label for every path that someone tries would fill the memory.
    let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_string();
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => ApiError::internal("the server failed on this request").into_response(),
    };
    let status = response.status().as_u16();
    gateway.metrics.http(&path, status);
    let (id_text, ms) = (id.to_str().unwrap_or_default(), begun.elapsed().as_secs_f64() * 1e3);
    // Whoever asks for health is told; a cluster that starts, or a node that is away, is not this request's failure.
    if status >= 500 && !CHECKS.contains(&path.as_str()) {
        tracing::warn!(id = id_text, %method, path, status, ms, "request failed");
    } else {
        tracing::debug!(id = id_text, %method, path, status, ms, "request");
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Refuses names that are not ours, if names are listed.
pub async fn host(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let allowed = &gateway.config.allowed_hosts;
    if !allowed.is_empty() {
        let given = request.uri().host().or_else(|| {
            let value = request.headers().get(header::HOST)?.to_str().ok()?;
            Some(without_port(value))
        });
        let given = given.unwrap_or_default();
        if !allowed.iter().any(|name| name.eq_ignore_ascii_case(given)) {
            return Err(ApiError::forbidden(format!("The host '{given}' is not served here.")));
        }
    }
    Ok(next.run(request).await)
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // `[::1]` has colons of its own.
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// Lets listed origins call from browsers; does nothing for others.
pub async fn cors(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let allowed = &gateway.config.allowed_origins;
    let origin = request.headers().get(header::ORIGIN).cloned();
    let origin =
        origin.filter(|origin| allowed.iter().any(|a| a == "*" || a.as_bytes() == origin.as_bytes()));
    let Some(origin) = origin else { return next.run(request).await };
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response =
        if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    if preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_S));
        asked.into_iter().for_each(|asked| _ = headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked));
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id"));
    headers.insert(header::VARY, HeaderValue::from_static("origin"));
    response
}

/// Asks for a key, if there are keys.
pub async fn key(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    gateway.keys.check(request.headers())?;
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_opens() {
        let keys = Keys::new(&["sk-one".into(), "sk-two".into()]);
        let check = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).expect("a header"));
            keys.check(&headers).is_ok()
        };
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
        assert!(keys.check(&HeaderMap::new()).is_err());
        assert!(Keys::new(&[]).check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn ports_are_no_part_of_a_host() {
        let cases = [
            ("a:80", "a"),
            ("a", "a"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("127.0.0.1:1", "127.0.0.1"),
        ];
        for (host, name) in cases {
            assert_eq!(without_port(host), name);
        }
    }
}
