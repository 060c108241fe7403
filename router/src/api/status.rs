//! `GET /`, `/health`, `/live`, `/version`, `/metrics` and `/v1/models`: what a balancer, a dashboard or a client asks before it works.

use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::Gateway;
use super::error::ApiError;
use crate::metrics::classic;

/// A probe's result serves this long, so that asking often costs the nodes nothing.
const HEALTH_AGE_MAX: Duration = Duration::from_secs(1);

/// OpenMetrics, which prometheus-client writes.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Prometheus' own text, before OpenMetrics.
const CLASSIC_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The last probe; one runs at a time, whoever asks meanwhile waits for its result.
#[derive(Debug, Default)]
pub struct Health(Mutex<Option<(Instant, Result<(), String>)>>);

/// The process answers.
pub async fn live() -> StatusCode {
    StatusCode::OK
}

/// For whoever opens the server's address to see what is there.
pub async fn root(State(gateway): State<Arc<Gateway>>) -> String {
    format!(
        "baton {} serves {}.\n\n\
         POST /v1/chat/completions, /v1/completions, /v1/responses (OpenAI) or /v1/messages (Anthropic)\n\
         GET  /v1/models, /health, /metrics; every parameter is in /openapi.json\n",
        env!("CARGO_PKG_VERSION"),
        gateway.config.model
    )
}

/// As vLLM tells it.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Models served here generate text: said in so many words, for clients that try.
pub async fn embeddings(State(gateway): State<Arc<Gateway>>) -> ApiError {
    let message = format!("The model '{}' makes no embeddings: it generates text.", gateway.config.model);
    ApiError::bad("model", "unsupported_model", message)
}

/// Every role that requests need has just computed a step.
pub async fn health(State(gateway): State<Arc<Gateway>>) -> Result<StatusCode, ApiError> {
    let mut last = gateway.health.0.lock().await;
    let fresh = last.as_ref().filter(|(at, _)| at.elapsed() < HEALTH_AGE_MAX);
    let result = match fresh {
        Some((_, result)) => result.clone(),
        None => {
            let limit = gateway.config.limits.health;
            let result = match tokio::time::timeout(limit, gateway.inference.health()).await {
                Ok(result) => result,
                Err(_) => Err(format!("no step was computed within {} s", limit.as_secs_f32())),
            };
            *last = Some((Instant::now(), result.clone()));
            result
        }
    };
    result.map(|()| StatusCode::OK).map_err(ApiError::unavailable)
}

/// Prometheus' view.
pub async fn metrics(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Response {
    gateway.metrics.spans(gateway.config.tracer.counts());
    let text = gateway.metrics.encode(gateway.inference.load());
    // Whoever does not ask for the newer form gets the one that all readers know.
    let accepts =
        |value: &HeaderValue| value.to_str().is_ok_and(|v| v.contains("application/openmetrics-text"));
    match headers.get_all(header::ACCEPT).iter().any(accepts) {
        true => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        false => ([(header::CONTENT_TYPE, CLASSIC_TYPE)], classic(&text)).into_response(),
    }
}

/// All served names.
pub async fn models(State(gateway): State<Arc<Gateway>>) -> Json<Value> {
    let data: Vec<Value> = gateway.names().map(|name| model_object(&gateway, name)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One served name. It may hold slashes, as Hugging Face's do.
pub async fn model(
    State(gateway): State<Arc<Gateway>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match gateway.names().find(|known| *known == name) {
        Some(known) => Ok(Json(model_object(&gateway, known))),
        None => Err(ApiError::no_model(&name, &gateway.config.model)),
    }
}

fn model_object(gateway: &Gateway, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": gateway.since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        "owned_by": "baton",
        "root": gateway.config.model,
        "parent": null,
        "max_model_len": gateway.config.context_tokens,
    })
}
