//! Answers lines of batches the way requests over HTTP are answered, in the name of the batch's owner and behind everybody
//! who waits. Called by `crate::batch`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::IntoResponse;
use batch::Endpoint;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, StatusCode, header};
use serde_json::{Value, json};

use super::quota::Caller;
use super::run::random;
use super::{Gateway, chat, completions, responses};
use crate::batch::{Answered, Answers};
use crate::inference::Load;

/// Longest answer: many choices with log probabilities of every token.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A gateway as batches see it.
pub struct Lines(pub Arc<Gateway>);

impl Answers for Lines {
    fn answer(&self, owner: &str, endpoint: Endpoint, body: Value) -> BoxFuture<'static, Answered> {
        let gateway = Arc::clone(&self.0);
        let caller = Caller::background(owner, Instant::now());
        async move {
            let request_id = format!("req_{:032x}", random().unwrap_or_default());
            let mut request = Request::new(Body::from(body.to_string()));
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            request.extensions_mut().insert(caller);
            let state = State(gateway);
            let response = match endpoint {
                Endpoint::Chat => chat::handle(state, request).await,
                Endpoint::Completions => completions::handle(state, request).await,
                Endpoint::Responses => responses::handle(state, request).await,
            };
            let response = response.unwrap_or_else(IntoResponse::into_response);
            let status = response.status().as_u16();
            let after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            let retry_after = after.and_then(|text| text.parse().ok()).map(Duration::from_secs);
            let bytes = to_bytes(response.into_body(), ANSWER_BYTES_MAX).await.unwrap_or_default();
            match serde_json::from_slice(&bytes) {
                Ok(body) => Answered { status, request_id, body, retry_after },
                // Only an answer that was too long is not JSON.
                Err(error) => {
                    let error =
                        json!({"error": {"message": format!("no answer: {error}"), "type": "server_error"}});
                    let status = StatusCode::INTERNAL_SERVER_ERROR.as_u16();
                    Answered { status, request_id, body: error, retry_after: None }
                }
            }
        }
        .boxed()
    }

    fn check_model(&self, model: &str) -> Result<(), String> {
        self.0.check_name(model).map_err(|error| error.message)
    }

    fn knows(&self, owner: &str) -> bool {
        self.0.keys.knows(owner)
    }

    fn load(&self) -> Load {
        self.0.inference.load()
    }

    fn line_bytes(&self) -> u64 {
        self.0.config.limits.body_bytes as u64
    }
}
