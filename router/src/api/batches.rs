//! `/v1/batches`: batch jobs as OpenAI has them. `crate::batch` does the work.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, Request, State};
use batch::{BatchRecord, Endpoint, NewBatch, Status};
use serde_json::{Value, json};

use super::Gateway;
use super::body::read_body;
use super::error::ApiError;
use super::fields::{Fields, quoted};
use super::files::{LIFETIME_S, ListQuery, Who, no_file, on_disk, owner, page};

/// Batches in one list.
const LIST_DEFAULT: usize = 20;
const LIST_MAX: usize = 100;

/// OpenAI's bounds.
const METADATA_MAX: usize = 16;
const METADATA_KEY_CHARS: usize = 64;
const METADATA_VALUE_CHARS: usize = 512;

/// Longest window.
const WINDOW_HOURS_MAX: u64 = 30 * 24;

/// `POST /v1/batches`.
pub async fn create(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let store = gateway.store().await?;
    let body = read_body(request, &gateway.config.limits).await?;
    let new = read(Fields::parse(&body)?, owner(caller))?;
    let input = new.input_file_id.clone();
    let made = on_disk(move || store.create(new)).await?.ok_or_else(|| no_file(&input))?;
    gateway.wake();
    Ok(Json(object(&made, None)))
}

fn read(mut fields: Fields, owner: String) -> Result<NewBatch, ApiError> {
    let input = fields.string("input_file_id")?.ok_or_else(|| ApiError::missing("input_file_id"))?;
    let names = Endpoint::ALL.map(Endpoint::as_str);
    let name = fields.word("endpoint", &names)?.ok_or_else(|| ApiError::missing("endpoint"))?;
    // One of them, as `word` has seen.
    let endpoint =
        Endpoint::ALL.into_iter().find(|endpoint| endpoint.as_str() == name).unwrap_or(Endpoint::Chat);
    let window = fields.string("completion_window")?.ok_or_else(|| ApiError::missing("completion_window"))?;
    let window_s = window_s(&window).ok_or_else(|| {
        let expected = format!("hours or days such as '24h' or '7d', at most {}d", WINDOW_HOURS_MAX / 24);
        ApiError::wrong_value("completion_window", expected, quoted(&window))
    })?;
    let metadata = metadata(fields.object("metadata")?)?;
    let mut output_lifetime = None;
    if let Some(mut after) = fields.object("output_expires_after")? {
        after
            .word("anchor", &["created_at"])?
            .ok_or_else(|| ApiError::missing("output_expires_after.anchor"))?;
        let seconds = after.integer("seconds", LIFETIME_S)?;
        let seconds = seconds.ok_or_else(|| ApiError::missing("output_expires_after.seconds"))?;
        output_lifetime = u64::try_from(seconds).ok();
        after.finish()?;
    }
    fields.finish()?;
    Ok(NewBatch {
        owner,
        endpoint,
        input_file_id: input,
        completion_window: window,
        window_s,
        metadata,
        output_lifetime,
    })
}

fn window_s(text: &str) -> Option<u64> {
    let hours = match (text.strip_suffix('h'), text.strip_suffix('d')) {
        (Some(hours), _) => hours.parse::<u64>().ok()?,
        (_, Some(days)) => days.parse::<u64>().ok()?.checked_mul(24)?,
        _ => return None,
    };
    (1..=WINDOW_HOURS_MAX).contains(&hours).then_some(hours * 3600)
}

/// Pairs of texts that a client keeps with a request; also for requests whose pairs nobody reads.
pub fn metadata(fields: Option<Fields>) -> Result<Option<BTreeMap<String, String>>, ApiError> {
    let Some(fields) = fields else { return Ok(None) };
    let mut metadata = BTreeMap::new();
    for (name, value) in fields.rest() {
        let Value::String(text) = value else {
            return Err(ApiError::wrong_type("metadata", "an object of strings", &value));
        };
        if name.chars().count() > METADATA_KEY_CHARS || text.chars().count() > METADATA_VALUE_CHARS {
            let expected =
                format!("names of {METADATA_KEY_CHARS} and values of {METADATA_VALUE_CHARS} characters");
            return Err(ApiError::wrong_value("metadata", expected, "longer ones"));
        }
        metadata.insert(name, text);
    }
    if metadata.len() > METADATA_MAX {
        let expected = format!("at most {METADATA_MAX} entries");
        return Err(ApiError::wrong_value("metadata", expected, metadata.len()));
    }
    Ok(Some(metadata))
}

/// `GET /v1/batches`.
pub async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let query = ListQuery::read(query, &[], LIST_DEFAULT, LIST_MAX)?;
    let store = gateway.store().await?;
    let after = query.after.as_deref();
    let found = store.batches(&owner(caller), after, query.limit);
    let found = found.ok_or_else(|| no_batch(after.unwrap_or_default()))?;
    let trouble = gateway.trouble();
    let data = found.items.iter().map(|batch| object(batch, trouble)).collect();
    Ok(Json(page(data, found.more)))
}

/// `GET /v1/batches/{id}`.
pub async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let batch = gateway.store().await?.batch(&owner(caller), &id).ok_or_else(|| no_batch(&id))?;
    Ok(Json(object(&batch, gateway.trouble())))
}

/// `POST /v1/batches/{id}/cancel`.
pub async fn cancel(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (store, owner, wanted) = (gateway.store().await?, owner(caller), id.clone());
    let batch = on_disk(move || store.cancel(&owner, &wanted)).await?.ok_or_else(|| no_batch(&id))?;
    gateway.wake();
    Ok(Json(object(&batch, None)))
}

impl Gateway {
    fn wake(&self) {
        if let Some(batches) = &self.batches {
            batches.wake();
        }
    }

    /// Why batches stand still, if they do.
    fn trouble(&self) -> Option<&'static str> {
        self.batches.as_ref().and_then(|batches| batches.trouble())
    }
}

fn no_batch(id: &str) -> ApiError {
    ApiError::not_found("batch_not_found", format!("No batch found with id {}.", quoted(id)))
}

/// `trouble`: why no batch goes on; shown where it matters, under a name of our own.
fn object(batch: &BatchRecord, trouble: Option<&str>) -> Value {
    let at = |status: Status| batch.reached(status);
    let problem = |problem: &batch::Problem| json!({"code": problem.code, "message": problem.message, "param": problem.param, "line": problem.line});
    let errors = (!batch.problems.is_empty())
        .then(|| json!({"object": "list", "data": batch.problems.iter().map(problem).collect::<Vec<_>>()}));
    let [output, error] = batch.files();
    let mut object = json!({
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint.as_str(),
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.as_str(),
        "output_file_id": output,
        "error_file_id": error,
        "created_at": batch.created_at,
        "in_progress_at": at(Status::InProgress),
        "expires_at": batch.expires_at,
        "finalizing_at": at(Status::Finalizing),
        "completed_at": at(Status::Completed),
        "failed_at": at(Status::Failed),
        "expired_at": at(Status::Expired),
        "cancelling_at": at(Status::Cancelling),
        "cancelled_at": at(Status::Cancelled),
        "request_counts": {
            "total": batch.counts.total, "completed": batch.counts.completed, "failed": batch.counts.failed,
        },
        "metadata": batch.metadata,
    });
    if let Some(trouble) = trouble.filter(|_| !batch.status.ended()) {
        object["baton_waits_for"] = trouble.into();
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows() {
        assert_eq!(
            [window_s("24h"), window_s("7d"), window_s("1h")],
            [Some(86_400), Some(604_800), Some(3_600)]
        );
        for wrong in ["", "h", "0h", "24", "31d", "-1h", "1.5h", "99999999999999999999d"] {
            assert_eq!(window_s(wrong), None, "{wrong}");
        }
    }
}
