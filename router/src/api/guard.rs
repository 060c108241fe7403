//! What every request passes first: an id, the checks of host and origin, the API key. And what every answer passes last:
//! it is counted, and a panic becomes a 500.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{MatchedPath, RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cluster::traces::{Span, TRACEPARENT};
use futures::FutureExt;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use hyper::body::{Frame, SizeHint};

use cluster::Door;

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

/// Outermost: gives the request an id, catches panics, counts and logs the answer.
pub async fn observe(State(gateway): State<Arc<Gateway>>, mut request: Request, next: Next) -> Response {
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
    let mut span = if path.starts_with("/v1/") {
        let outer = request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok());
        gateway.config.tracer.enter(outer, format!("{method} {path}"))
    } else {
        Span::default() // health, metrics and wrong ways: nobody's requests
    };
    request.extensions_mut().insert(span.scope());
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => ApiError::internal("the server failed on this request").into_response(),
    };
    if path.starts_with("/v1/messages")
        && let Some(error) = response.extensions().get::<ApiError>().cloned()
    {
        let mut body = error.anthropic();
        body["request_id"] = id.to_str().unwrap_or_default().into();
        *response.body_mut() = axum::body::Body::from(body.to_string());
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    let status = response.status().as_u16();
    gateway.metrics.http(&path, status);
    let (id_text, ms) = (id.to_str().unwrap_or_default(), begun.elapsed().as_secs_f64() * 1e3);
    // Whoever asks for health is told; a cluster that starts, or a node that is away, is not this request's failure.
    if status >= 500 && !CHECKS.contains(&path.as_str()) {
        tracing::warn!(id = id_text, %method, path, status, ms, "request failed");
    } else {
        tracing::debug!(id = id_text, %method, path, status, ms, "request");
    }
    if span.is_on() {
        span.set("http.request.method", method.as_str());
        span.set("http.route", path.as_str());
        span.set("http.response.status_code", u32::from(status));
        span.set("baton.request_id", id_text);
        if status >= 500 {
            span.fail(format_args!("status {status}"));
        }
        response = response.map(|body| Body::new(Held { body, _held: span }));
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Refuses two names at once, and names that are not ours, if names are listed. Who gives none, as probes of HTTP/1.0 do, is no
/// browser. Source: RFC 9112, section 3.2.
pub async fn host(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let mut values = request.headers().get_all(header::HOST).iter();
    let value = values.next();
    // Whoever stands before us may have judged another one.
    if values.next().is_some() || value.is_some_and(|value| value.as_bytes().contains(&b',')) {
        gateway.config.refusals.count(Door::Http, "host");
        return Err(ApiError::hosts());
    }
    let allowed = &gateway.config.allowed_hosts;
    let header = || Some(without_port(value?.to_str().unwrap_or_default()));
    let given = request.uri().host().or_else(header).filter(|_| !allowed.is_empty());
    if let Some(given) = given.filter(|given| !allowed.iter().any(|name| name.eq_ignore_ascii_case(given))) {
        gateway.config.refusals.count(Door::Http, "host");
        let refusal =
            format!("The host '{given}' is not served here: the router's --allowed-host adds names.");
        return Err(ApiError::forbidden(refusal));
    }
    Ok(next.run(request).await)
}

/// Whether a page at `origin` comes from the server that it calls.
fn is_own(origin: &HeaderValue, request: &Request) -> bool {
    let origin = origin.to_str().unwrap_or_default();
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let page = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    page.zip(host).is_some_and(|(page, host)| page.eq_ignore_ascii_case(host))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // `[::1]` has colons of its own.
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// Lets listed origins call from browsers; refuses others, except pages of this very server.
pub async fn cors(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let allowed = &gateway.config.allowed_origins;
    let origin = request.headers().get(header::ORIGIN).cloned();
    let origin =
        origin.filter(|origin| allowed.iter().any(|a| a == "*" || a.as_bytes() == origin.as_bytes()));
    let Some(origin) = origin else {
        // A page of another site: its browser would hide the answer from it, but the work would be done.
        return match request.headers().get(header::ORIGIN) {
            Some(origin) if !is_own(origin, &request) => {
                gateway.config.refusals.count(Door::Http, "origin");
                let origin = String::from_utf8_lossy(origin.as_bytes());
                let help = "the router's --allowed-origin adds some";
                ApiError::forbidden(format!("The origin '{origin}' is not allowed here: {help}."))
                    .into_response()
            }
            _ => next.run(request).await,
        };
    };
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response =
        if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    if preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_S));
        asked.into_iter().for_each(|asked| _ = headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked));
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id"));
    headers.insert(header::VARY, HeaderValue::from_static("origin"));
    response
}

/// Asks for a key, if there are keys, and holds its owner to what they may use; to look at models, files or a batch on its way, or
/// to delete something, is no use. The answer holds a place until it has been sent, or nobody wants it any more.
pub async fn key(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let refusals = &gateway.config.refusals;
    let caller = gateway.keys.caller(request.headers());
    let caller = caller.inspect_err(|_| refusals.count(Door::Http, "key"))?;
    let Some(caller) = caller else { return Ok(next.run(request).await) };
    let enter = || caller.enter(Instant::now());
    let place = (request.method() == Method::POST).then(enter).transpose().map_err(|exhausted| {
        refusals.count(Door::Http, exhausted.what);
        ApiError::exhausted(&exhausted)
    })?;
    request.extensions_mut().insert(caller);
    let response = next.run(request).await;
    Ok(response.map(|body| Body::new(Held { body, _held: place })))
}

/// Refuses ids and names that are no text, before a handler's `Path` does in words of its own.
pub async fn path(
    params: Result<RawPathParams, RawPathParamsRejection>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match params {
        Err(RawPathParamsRejection::InvalidUtf8InPathParam(_)) => {
            Err(ApiError::no_text(request.uri().path()))
        }
        _ => Ok(next.run(request).await),
    }
}

/// A body that keeps something until it ends: its caller's place, its span.
struct Held<T> {
    body: Body,
    _held: T,
}

impl<T: Unpin> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
