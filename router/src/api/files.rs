//! `/v1/files`: uploads on their way to the disk, lists, content. OpenAI's interface; files here are inputs and outputs of
//! batches.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use batch::{FileRecord, Purpose, Store, StoreError, Upload};
use bytes::BytesMut;
use futures::stream;
use http::{HeaderValue, header};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::task::spawn_blocking;

use super::Gateway;
use super::error::ApiError;
use super::fields::quoted;
use super::multipart::Form;
use super::quota::Caller;

/// What goes to the disk at once.
const WRITE_BYTES: usize = 256 << 10;

/// What goes out at once.
const READ_BYTES: usize = 64 << 10;

/// Longest field beside the file.
const FIELD_BYTES_MAX: usize = 512;

/// Longest name of a file.
const FILENAME_BYTES_MAX: usize = 1024;

/// Seconds that a client may have files live: an hour to 30 days, OpenAI's bounds.
pub const LIFETIME_S: std::ops::RangeInclusive<i64> = 3_600..=2_592_000;

/// Files in one list.
const LIST_MAX: usize = 10_000;

/// Who asks, if keys are asked for.
pub type Who = Option<Extension<Arc<Caller>>>;

/// Whose files and batches a request comes to.
pub fn owner(caller: Who) -> String {
    caller.map(|caller| caller.owner.clone()).unwrap_or_default()
}

impl Gateway {
    /// The store of files and batches.
    pub async fn store(&self) -> Result<Arc<Store>, ApiError> {
        let Some(batches) = &self.batches else {
            let message = "Files and batches are switched off on this server.";
            return Err(ApiError::not_found("not_available", message.into()));
        };
        batches.store().await.map_err(|reason| ApiError::unavailable(format!("Not now: {reason}.")))
    }
}

/// Runs what waits for the disk on a thread of its own.
pub async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ApiError> {
    match spawn_blocking(work).await {
        Ok(result) => result.map_err(refusal),
        Err(error) => {
            tracing::error!("a thread of the store failed: {error}");
            Err(ApiError::internal("the server failed on this request"))
        }
    }
}

/// What a client is told of it.
fn refusal(error: StoreError) -> ApiError {
    match error {
        _ if error.is_full() => {
            tracing::warn!("refused: {error}");
            ApiError::no_disk()
        }
        StoreError::InUse(batch) => {
            let message =
                format!("The file is being used by {batch}: cancel that first, or wait for its end.");
            ApiError::conflict("file_in_use", message)
        }
        StoreError::Ended(status) => ApiError::conflict(
            "batch_ended",
            format!("The batch cannot be cancelled any more: it is {status}."),
        ),
        StoreError::NoRoom { .. } => ApiError::quota(error.to_string()),
        StoreError::Again => ApiError::unavailable(error.to_string()),
        _ => {
            tracing::error!("{error}");
            ApiError::internal("the server's disk failed on this request")
        }
    }
}

/// `POST /v1/files`.
pub async fn upload(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = owner(caller);
    let store = gateway.store().await?;
    let limit = gateway.batches.as_ref().map_or(0, |batches| batches.config.file_bytes);
    let mut form = Form::new(request, gateway.config.limits.body_read)?;
    let Taken { upload, filename, lifetime } = take(&mut form, &store, limit).await?;
    let record = on_disk(move || store.keep(upload, &owner, &filename, lifetime)).await?;
    Ok(Json(object(&record)))
}

struct Taken {
    upload: Upload,
    filename: String,
    lifetime: Option<u64>,
}

async fn take(form: &mut Form, store: &Arc<Store>, limit: u64) -> Result<Taken, ApiError> {
    let (mut file, mut purpose, mut anchor, mut seconds) = (None, None, None, None);
    while let Some(part) = form.next().await? {
        match part.name.as_str() {
            "file" if file.is_some() => {
                return Err(ApiError::unsupported("file", "more than once is not supported"));
            }
            "file" => {
                let filename = part.filename.filter(|name| !name.is_empty());
                let expected = "a file with a name";
                let filename = filename.ok_or_else(|| ApiError::wrong_value("file", expected, "none"))?;
                if filename.len() > FILENAME_BYTES_MAX {
                    let expected = format!("a name of at most {FILENAME_BYTES_MAX} bytes");
                    return Err(ApiError::wrong_value("file", expected, "a longer one"));
                }
                file = Some((receive(form, store, limit).await?, filename));
            }
            "purpose" => purpose = Some(form.text("purpose", FIELD_BYTES_MAX).await?),
            "expires_after[anchor]" => {
                anchor = Some(form.text("expires_after[anchor]", FIELD_BYTES_MAX).await?)
            }
            "expires_after[seconds]" => {
                seconds = Some(form.text("expires_after[seconds]", FIELD_BYTES_MAX).await?);
            }
            name => return Err(ApiError::unknown(name.chars().take(64).collect::<String>())),
        }
    }
    match purpose.as_deref() {
        Some("batch") => {}
        None => return Err(ApiError::missing("purpose")),
        Some(other) => {
            let why = format!("{}: files here are for batches only", quoted(other));
            return Err(ApiError::wrong_value("purpose", "'batch'", why));
        }
    }
    let lifetime = match (anchor.as_deref(), seconds) {
        (None, None) => None,
        (Some("created_at"), Some(seconds)) => {
            let number = seconds.parse().ok().filter(|number| LIFETIME_S.contains(number));
            let expected = format!("{} to {} seconds", LIFETIME_S.start(), LIFETIME_S.end());
            let number: i64 = number
                .ok_or_else(|| ApiError::wrong_value("expires_after[seconds]", expected, quoted(&seconds)))?;
            u64::try_from(number).ok()
        }
        (Some("created_at"), None) => return Err(ApiError::missing("expires_after[seconds]")),
        (anchor, _) => {
            let got = anchor.map_or("none".into(), quoted);
            return Err(ApiError::wrong_value("expires_after[anchor]", "'created_at'", got));
        }
    };
    let (upload, filename) = file.ok_or_else(|| ApiError::missing("file"))?;
    Ok(Taken { upload, filename, lifetime })
}

/// Writes a part to the disk as it comes in.
async fn receive(form: &mut Form, store: &Arc<Store>, limit: u64) -> Result<Upload, ApiError> {
    let begin = Arc::clone(store);
    let mut upload = on_disk(move || begin.upload()).await?;
    let mut pending = BytesMut::with_capacity(WRITE_BYTES);
    loop {
        let piece = form.chunk().await?;
        let last = piece.is_none();
        pending.extend_from_slice(&piece.unwrap_or_default());
        if upload.bytes() + pending.len() as u64 > limit {
            return Err(ApiError::too_large(usize::try_from(limit).unwrap_or(usize::MAX)));
        }
        if pending.len() >= WRITE_BYTES || last {
            let bytes = std::mem::replace(&mut pending, BytesMut::with_capacity(WRITE_BYTES));
            upload = on_disk(move || upload.write(&bytes).map(|()| upload)).await?;
        }
        if last {
            return Ok(upload);
        }
    }
}

/// `GET /v1/files`.
pub async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let query = ListQuery::read(query, &["purpose", "order"], LIST_MAX, LIST_MAX)?;
    let ascending = match query.other("order").unwrap_or("desc") {
        "asc" => true,
        "desc" => false,
        other => return Err(ApiError::wrong_value("order", "'asc' or 'desc'", quoted(other))),
    };
    let purpose = match query.other("purpose") {
        None => None,
        Some("batch") => Some(Purpose::Batch),
        Some("batch_output") => Some(Purpose::BatchOutput),
        // There are none of any other.
        Some(_) => return Ok(Json(page(Vec::new(), false))),
    };
    let store = gateway.store().await?;
    let after = query.after.as_deref();
    let found = store.files(&owner(caller), purpose, after, query.limit, ascending);
    let found = found.ok_or_else(|| no_file(after.unwrap_or_default()))?;
    Ok(Json(page(found.items.iter().map(object).collect(), found.more)))
}

/// `GET /v1/files/{id}`.
pub async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let record = gateway.store().await?.file(&owner(caller), &id);
    record.map(|record| Json(object(&record))).ok_or_else(|| no_file(&id))
}

/// `GET /v1/files/{id}/content`.
pub async fn content(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let (store, owner, wanted) = (gateway.store().await?, owner(caller), id.clone());
    let found = on_disk(move || store.open_file(&owner, &wanted)).await?;
    let (record, file) = found.ok_or_else(|| no_file(&id))?;
    let file = tokio::fs::File::from_std(file).take(record.bytes);
    let pieces = stream::try_unfold(file, |mut file| async move {
        let mut piece = BytesMut::with_capacity(READ_BYTES);
        let read = file.read_buf(&mut piece).await?;
        Ok::<_, std::io::Error>((read > 0).then(|| (piece.freeze(), file)))
    });
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, record.bytes.into());
    Ok(response)
}

/// `DELETE /v1/files/{id}`.
pub async fn delete(
    State(gateway): State<Arc<Gateway>>,
    caller: Who,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (store, owner, wanted) = (gateway.store().await?, owner(caller), id.clone());
    match on_disk(move || store.remove_file(&owner, &wanted)).await? {
        true => Ok(Json(json!({"id": id, "object": "file", "deleted": true}))),
        false => Err(no_file(&id)),
    }
}

/// 404.
pub fn no_file(id: &str) -> ApiError {
    ApiError::not_found("file_not_found", format!("No such File object: {}.", quoted(id)))
}

fn object(file: &FileRecord) -> Value {
    json!({
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose.as_str(),
        "status": "processed",
        "status_details": null,
    })
}

/// A list as OpenAI writes it.
pub fn page(data: Vec<Value>, more: bool) -> Value {
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})
}

/// What a list is asked for.
#[derive(Debug)]
pub struct ListQuery {
    /// Goes on behind this id.
    pub after: Option<String>,
    /// Items at most.
    pub limit: usize,
    others: HashMap<String, String>,
}

impl ListQuery {
    /// Refuses what is neither `after`, `limit` nor one of `others`.
    pub fn read(
        mut query: HashMap<String, String>,
        others: &[&str],
        default: usize,
        most: usize,
    ) -> Result<ListQuery, ApiError> {
        let after = query.remove("after").filter(|id| !id.is_empty());
        let limit = match query.remove("limit") {
            None => default,
            Some(text) => {
                let limit = text.parse().ok().filter(|limit| (1..=most).contains(limit));
                limit.ok_or_else(|| {
                    ApiError::wrong_value("limit", format!("an integer from 1 to {most}"), quoted(&text))
                })?
            }
        };
        match query.keys().find(|name| !others.contains(&name.as_str())) {
            Some(name) => Err(ApiError::unknown(name.chars().take(64).collect::<String>())),
            None => Ok(ListQuery { after, limit, others: query }),
        }
    }

    fn other(&self, name: &str) -> Option<&str> {
        self.others.get(name).map(String::as_str)
    }
}
