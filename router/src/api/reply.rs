//! Sends an answer to the client: as server-sent events while it is made, or as one JSON object when it is complete. The
//! forms of chats and completions are theirs (`chat_format`, `completion_format`).

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures::Stream;
use http::{HeaderName, HeaderValue, header};
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::answer::{Answer, Update, Usage};
use super::choice::{Delta, End};
use super::error::ApiError;
use crate::text::answer::append;

/// A comment goes out when nothing else did for this long (twice, at the worst), so that proxies and clients keep the
/// connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A chunk of the body is sent at this size at the latest.
const CHUNK_BYTES: usize = 16 << 10;

/// A complete choice.
#[derive(Debug)]
pub struct Whole {
    /// All that was told.
    pub delta: Delta,
    /// Why it ended.
    pub end: End,
    /// Where its time went, if asked for.
    pub timings: Option<Value>,
}

/// How answers look on the wire.
pub trait Format: Send + Unpin + 'static {
    /// Whether `so_far` is to be told.
    fn wants_usage(&self) -> bool {
        false
    }
    /// The usage up to the event that follows.
    fn so_far(&mut self, usage: Usage) {
        _ = usage;
    }
    /// The first event of a choice, sent when the request is admitted.
    fn open(&mut self, index: usize, out: &mut Events);
    /// What is new in a choice.
    fn delta(&mut self, index: usize, delta: &Delta, out: &mut Events);
    /// The last event of a choice.
    fn end(&mut self, index: usize, end: &End, timings: Option<Value>, out: &mut Events);
    /// After all choices.
    fn close(&mut self, usage: Usage, out: &mut Events);
    /// Instead of the rest.
    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.push(&error.envelope());
        out.done();
    }
    /// The response without streaming; choices in order.
    fn whole(self, choices: Vec<Whole>, usage: Usage) -> Value;
}

/// Collects events that go out together.
#[derive(Debug, Default)]
pub struct Events(BytesMut);

impl Events {
    /// One event.
    pub fn push(&mut self, data: &impl Serialize) {
        self.0.put_slice(b"data: ");
        // Our own types have string keys and finite numbers: this cannot fail, and a buffer takes all bytes.
        _ = serde_json::to_writer((&mut self.0).writer(), data);
        self.0.put_slice(b"\n\n");
    }

    /// One event with a name.
    pub fn push_named(&mut self, name: &str, data: &impl Serialize) {
        self.0.put_slice(b"event: ");
        self.0.put_slice(name.as_bytes());
        self.0.put_slice(b"\n");
        self.push(data);
    }

    /// OpenAI's last event.
    pub fn done(&mut self) {
        self.0.put_slice(b"data: [DONE]\n\n");
    }

    fn keep_alive(&mut self) {
        self.0.put_slice(b": keep-alive\n\n");
    }
}

/// The answer as one object.
pub async fn complete<F: Format>(mut answer: Answer, format: F) -> Result<Response, ApiError> {
    let mut parts: Vec<Delta> = (0..answer.choices()).map(|_| Delta::default()).collect();
    let mut ends: Vec<Option<End>> = vec![None; parts.len()];
    while let Some(update) = answer.next().await {
        let index = match update {
            Update::Failed(error) => return Err(error),
            Update::Progress(index) => index,
            Update::Ended(index, end) => {
                ends[index] = Some(end);
                index
            }
        };
        let new = answer.delta(index);
        new.parts.iter().for_each(|part| append(&mut parts[index].parts, part.clone()));
        parts[index].prompt.append(&mut new.prompt);
        parts[index].logprobs.append(&mut new.logprobs);
        new.clear();
    }
    let wholes = answer.kept().into_iter().map(|index| Whole {
        delta: std::mem::take(&mut parts[index]),
        end: ends[index].take().unwrap_or(End::Stop),
        timings: answer.timings(index),
    });
    let wholes = wholes.collect();
    Ok(axum::Json(format.whole(wholes, answer.usage())).into_response())
}

/// The answer as events. The request has been admitted.
pub fn stream<F: Format>(answer: Answer, format: F) -> Response {
    let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut body =
        EventStream { answer, format, out: Events::default(), done: false, quiet: false, keep_alive };
    body.tell_usage();
    (0..body.answer.choices()).for_each(|index| body.format.open(index, &mut body.out));
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

struct EventStream<F> {
    answer: Answer,
    format: F,
    out: Events,
    done: bool,
    /// Nothing was sent since the last tick.
    quiet: bool,
    keep_alive: Interval,
}

impl<F: Format> EventStream<F> {
    fn take(&mut self, update: Option<Update>) {
        self.quiet = false;
        match update {
            Some(Update::Progress(index)) => self.delta(index),
            Some(Update::Ended(index, end)) => {
                self.delta(index);
                self.tell_usage();
                self.format.end(index, &end, self.answer.timings(index), &mut self.out);
            }
            Some(Update::Failed(error)) => {
                self.format.fail(&error, &mut self.out);
                self.done = true;
            }
            None => {
                self.format.close(self.answer.usage(), &mut self.out);
                self.done = true;
            }
        }
    }

    fn tell_usage(&mut self) {
        if self.format.wants_usage() {
            self.format.so_far(self.answer.usage());
        }
    }

    fn delta(&mut self, index: usize) {
        self.tell_usage();
        let delta = self.answer.delta(index);
        if !delta.is_empty() {
            self.format.delta(index, delta, &mut self.out);
            delta.clear();
        }
    }
}

impl<F: Format> Stream for EventStream<F> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while !this.done && this.out.0.len() < CHUNK_BYTES {
            match this.answer.poll_next(cx) {
                Poll::Ready(update) => this.take(update),
                Poll::Pending => break,
            }
        }
        if this.out.0.is_empty() && !this.done {
            while this.keep_alive.poll_tick(cx).is_ready() {
                if this.quiet {
                    this.out.keep_alive();
                }
                this.quiet = true;
            }
        }
        if !this.out.0.is_empty() {
            return Poll::Ready(Some(Ok(this.out.0.split().freeze())));
        }
        if this.done { Poll::Ready(None) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::StreamExt;
    use prometheus_client::registry::Registry;
    use serde_json::json;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::api::answer::Lane;
    use crate::api::chat_format::ChatFormat;
    use crate::api::choice::Choice;
    use crate::api::config::Limits;
    use crate::api::fields::Fields;
    use crate::api::head::Head;
    use crate::api::params::{Params, Rules, UsageIn};
    use crate::api::run::Reading;
    use crate::metrics::{Metrics, SequenceMeter};
    use crate::text::pieces::Pieces;
    use crate::text::{Beginning, Defaults};

    /// A stream whose cluster says nothing.
    fn silent() -> Response {
        let pieces = Arc::new(Pieces::new(&[], &json!({"type": "ByteLevel"})).expect("supported"));
        let limits = Limits::for_context(10);
        let rules = Rules { defaults: &Defaults::default(), vocab: 1, limits: &limits };
        let mut fields = Fields::parse(b"{}").expect("an object");
        let params = Params::read(&mut fields, &rules, &[], 1).expect("valid");
        let choice = Choice::new(&params, Arc::clone(&pieces), &Reading::plain(Beginning::Text, None), 0);
        let meter = SequenceMeter::new(Metrics::new(Registry::default(), "m"), std::time::Instant::now(), 1);
        let lane = (Lane::new(choice, meter, 1), futures::stream::pending().boxed());
        let head = Head::new("chatcmpl-", 0, std::time::UNIX_EPOCH, "m".into());
        let answer = Answer::new(vec![lane], &params, 0.0, &CancellationToken::new());
        stream(answer, ChatFormat::new(head, pieces, UsageIn::No, None))
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_is_kept_alive_by_comments() {
        let mut chunks = silent().into_body().into_data_stream();
        let first = chunks.next().await.expect("a chunk").expect("no error");
        assert!(first.starts_with(b"data: {"), "{first:?}");
        let begun = Instant::now();
        for _ in 0..2 {
            assert_eq!(chunks.next().await.expect("a chunk").expect("no error"), ": keep-alive\n\n");
        }
        // The first tick falls into the time of the opening event; from then on each tick finds silence.
        assert!(begun.elapsed() <= 3 * KEEP_ALIVE, "{:?}", begun.elapsed());
    }
}
