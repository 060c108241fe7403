//! Refusals in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`. Every failing path of the gateway ends here.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use super::fields::quoted;
use super::openapi;
use super::quota::Exhausted;
use crate::inference::InferenceError;
use crate::text::{TemplateError, TextError};

/// Nodes that restart are back after some seconds.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(5);

/// Why a request is not served, or not to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// Of the HTTP response.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`, for programs.
    pub code: Option<&'static str>,
    /// The parameter that is wrong, as a path: `messages[0].content`.
    pub param: Option<String>,
    /// For people.
    pub message: String,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self { status, kind, code, param: None, message: message.into(), retry_after: None }
    }

    /// 400 about one parameter.
    pub fn bad(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some(code), message);
        Self { param: Some(param.into()), ..error }
    }

    /// 400: the value is of another type. `expected`, `got`: with article.
    pub fn wrong_type(param: &str, expected: &str, got: &Value) -> Self {
        let message = format!("Invalid type for '{param}': expected {expected}, but got {}.", type_name(got));
        Self::bad(param, "invalid_type", message)
    }

    /// 400: the value is out of its range. `expected`: with article.
    pub fn wrong_value(param: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Self {
        let message = format!("Invalid value for '{param}': expected {expected}, but got {got}.");
        Self::bad(param, "invalid_value", message)
    }

    /// 400: a parameter that others know and we do not serve; never ignored in silence.
    pub fn unsupported(param: impl Into<String>, why: &str) -> Self {
        let param = param.into();
        let message = format!("Unsupported parameter: '{param}' {why}.");
        Self::bad(param, "unsupported_parameter", message)
    }

    /// 400: a parameter that nobody knows.
    pub fn unknown(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("Unknown parameter: '{param}'.");
        Self::bad(param, "unknown_parameter", message)
    }

    /// 400: without it nothing can be done.
    pub fn missing(param: &str) -> Self {
        Self::bad(param, "missing_required_parameter", format!("Missing required parameter: '{param}'."))
    }

    /// 400: the body is no JSON.
    pub fn no_json(reason: impl std::fmt::Display) -> Self {
        let message = format!("The body of the request is not valid JSON: {reason}.");
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_json"), message)
    }

    /// 400: more than one host is named.
    pub fn hosts() -> Self {
        let message = "The request names more than one host.";
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_host"), message)
    }

    /// 400: prompt and answer do not fit.
    pub fn context(param: &str, context: usize, prompt: impl std::fmt::Display, output: Option<u32>) -> Self {
        let message = match output {
            None => format!(
                "This model's maximum context length is {context} tokens. However, your prompt has {prompt} tokens, \
                 which leaves no room for an answer. Please reduce the length of the prompt."
            ),
            Some(output) => format!(
                "This model's maximum context length is {context} tokens. However, your prompt has {prompt} tokens and \
                 you asked for {output} tokens of output. Please reduce the length of either one."
            ),
        };
        Self::bad(param, "context_length_exceeded", message)
    }

    /// 401.
    pub fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    /// 429: the caller has used up what they may.
    pub fn exhausted(exhausted: &Exhausted) -> Self {
        let message = format!("Rate limit reached: your key allows {} {}.", exhausted.limit, exhausted.what);
        let kind = "rate_limit_error";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, kind, Some("rate_limit_exceeded"), message);
        Self { retry_after: Some(exhausted.wait), ..error }
    }

    /// 403: not from there.
    pub fn forbidden(message: String) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", None, message)
    }

    /// 404.
    pub fn not_found(code: &'static str, message: String) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some(code), message)
    }

    /// 400: the conversation that was to go on is not kept, or not any more.
    pub fn previous_not_found(id: &str) -> Self {
        let message =
            format!("Previous response with id '{}' not found.", id.chars().take(64).collect::<String>());
        Self::bad("previous_response_id", "previous_response_not_found", message)
    }

    /// 404: no such model. `served`: the name of the one that is.
    pub fn no_model(model: &str, served: &str) -> Self {
        let message = format!("The model {} does not exist: '{served}' is served here.", quoted(model));
        let error =
            Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
        Self { param: Some("model".into()), ..error }
    }

    /// 404 or 405: no such route.
    pub fn no_route(status: StatusCode, method: &http::Method, path: &str) -> Self {
        let (code, message) = match (status, openapi::meant(path)) {
            (StatusCode::METHOD_NOT_ALLOWED, _) => {
                ("method_not_allowed", format!("Not allowed to {method} on {path}."))
            }
            (_, None) => ("unknown_url", format!("Unknown request URL: {method} {path}.")),
            (_, Some(meant)) => {
                ("unknown_url", format!("Unknown request URL: {method} {path}. Did you mean {meant}?"))
            }
        };
        Self::new(status, "invalid_request_error", Some(code), message)
    }

    /// 400: percent-encoded bytes of the path are no text.
    pub fn no_text(path: &str) -> Self {
        let message = format!("Invalid request URL: {path} is not percent-encoded UTF-8.");
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_url"), message)
    }

    /// 408: the body did not come in time.
    pub fn slow_body(limit: Duration) -> Self {
        let message = format!("The body of the request was not complete within {} s.", limit.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout"), message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("The body of the request is larger than {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), message)
    }

    /// 415.
    pub fn no_json_type() -> Self {
        let message = "Unsupported media type: the header Content-Type must be application/json.";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", None, message)
    }

    /// 415: compressed.
    pub fn packed() -> Self {
        let message =
            "Unsupported content encoding: send the body as it is, without the header Content-Encoding.";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", None, message)
    }

    /// 409: something else must be done first.
    pub fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "invalid_request_error", Some(code), message)
    }

    /// 429: the owner of the key has as much as one may have.
    pub fn quota(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("quota_exceeded"), message)
    }

    /// 507.
    pub fn no_disk() -> Self {
        let message = "The server's disk is full.";
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", Some("insufficient_storage"), message)
    }

    /// 415 where a form is wanted.
    pub fn no_form_type() -> Self {
        let message =
            "Unsupported media type: the header Content-Type must be multipart/form-data with a boundary.";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", None, message)
    }

    /// 400: the body is no form.
    pub fn no_form(reason: impl std::fmt::Display) -> Self {
        let message = format!("The body of the request is not a valid form: {reason}.");
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_form"), message)
    }

    /// 500. The message is for the client: nothing of the inside.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message)
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("service_unavailable"), message);
        Self { retry_after: Some(UNAVAILABLE_RETRY), ..error }
    }

    /// Anthropic's envelope.
    pub fn anthropic(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }

    /// OpenAI's envelope; also the data of an error event within a stream.
    pub fn envelope(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

/// A JSON value's type, with article.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a decimal number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl From<InferenceError> for ApiError {
    fn from(error: InferenceError) -> Self {
        let message = error.to_string();
        match error {
            InferenceError::Overloaded { retry_after } => Self {
                retry_after: Some(retry_after),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("overloaded"), message)
            },
            InferenceError::Unavailable(_) => Self::unavailable(message),
            InferenceError::Invalid(_) => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_request"), message)
            }
            InferenceError::Internal(_) => Self::internal(message),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        Self::internal(error.to_string())
    }
}

impl From<TemplateError> for ApiError {
    /// A template fails on what the client sent, as vLLM judges too.
    fn from(error: TemplateError) -> Self {
        Self::bad("messages", "invalid_messages", error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.envelope())).into_response();
        // For interfaces whose errors look otherwise.
        response.extensions_mut().insert(self.clone());
        if let Some(after) = self.retry_after {
            // Whole seconds, at least one: 0 would have clients hammer.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, seconds.max(1).into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
