//! Reads a request's body within its bounds of size, time and type.

use axum::body::HttpBody;
use axum::extract::Request;
use bytes::Bytes;
use futures::StreamExt;
use http::header;
use tokio::time::{Instant, timeout_at};

use super::config::Limits;
use super::error::ApiError;

/// The whole body of a JSON request. 408, 413 or 415 where it is not to be had; what is left of it then is `linger`'s.
pub async fn read_body(request: Request, limits: &Limits) -> Result<Bytes, ApiError> {
    let (parts, body) = request.into_parts();
    // A web page can send other types to us without asking its browser first.
    let json = parts.headers.get(header::CONTENT_TYPE).is_some_and(|value| is_json(value.as_bytes()));
    if !json {
        return Err(ApiError::no_json_type());
    }
    // A body of a few bytes may unpack to gigabytes: packed ones are not read at all.
    if parts.headers.get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
        return Err(ApiError::packed());
    }
    // Before a client that asks first (`Expect: 100-continue`) is told to go on.
    if body.size_hint().lower() > limits.body_bytes as u64 {
        return Err(ApiError::too_large(limits.body_bytes));
    }
    let deadline = Instant::now() + limits.body_read;
    let mut chunks = body.into_data_stream();
    let mut kept = Vec::new();
    loop {
        match timeout_at(deadline, chunks.next()).await {
            Err(_) => return Err(ApiError::slow_body(limits.body_read)),
            Ok(Some(Err(error))) => return Err(ApiError::no_json(format!("the body broke off ({error})"))),
            Ok(None) => return Ok(kept.into()),
            Ok(Some(Ok(chunk))) if kept.len() + chunk.len() > limits.body_bytes => {
                return Err(ApiError::too_large(limits.body_bytes));
            }
            Ok(Some(Ok(chunk))) => kept.extend_from_slice(&chunk),
        }
    }
}

fn is_json(content_type: &[u8]) -> bool {
    let essence = content_type.split(|&byte| byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}
