//! Sends finished spans to a collector: OTLP over HTTP, as JSON, in batches, from a thread of its own. What cannot be sent
//! is dropped and counted; nothing is tried twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};
use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};

use super::{Open, TraceConfig, TraceError, Value};

/// Spans that wait to be sent; some hundred bytes each.
const QUEUE_SPANS_MAX: usize = 8192;

/// Spans of one message to the collector.
const BATCH_SPANS_MAX: usize = 512;

/// A span waits for others to go with it for this long.
const BATCH_WAIT: Duration = Duration::from_secs(1);

/// For the collector to take a message.
const SEND_MAX: Duration = Duration::from_secs(5);

/// After a failure nothing is sent for a time, which doubles from the first to the last.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

const _: () = assert!(BATCH_SPANS_MAX < QUEUE_SPANS_MAX);

/// A span at its end.
pub struct Finished {
    pub(super) open: Box<Open>,
    pub(super) end: SystemTime,
}

enum Message {
    Span(Finished),
    Flush(SyncSender<()>),
}

/// What became of spans.
#[derive(Debug, Default)]
pub struct Counts {
    pub(super) sent: AtomicU64,
    pub(super) dropped: AtomicU64,
}

/// The near end of the queue. Its thread ends when the last one is dropped and all is sent.
pub struct Exporter {
    queue: SyncSender<Message>,
    pub(super) counts: Arc<Counts>,
    pub(super) percent: u32,
}

impl Exporter {
    pub(super) fn start(config: TraceConfig) -> Result<Exporter, TraceError> {
        let url = url(&config.endpoint)?;
        let (queue, spans) = sync_channel(QUEUE_SPANS_MAX);
        let counts = Arc::new(Counts::default());
        let collector = Collector {
            agent: agent(),
            url,
            resource: resource(&config),
            counts: Arc::clone(&counts),
            silent_until: None,
            pause: PAUSE_MIN,
        };
        std::thread::Builder::new()
            .name("traces".into())
            .spawn(move || collector.run(&spans))
            .map_err(TraceError::Thread)?;
        Ok(Exporter { queue, counts, percent: config.percent })
    }

    /// Never waits.
    pub(super) fn offer(&self, span: Finished) {
        if self.queue.try_send(Message::Span(span)).is_err() {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn flush(&self, limit: Duration) {
        let (done, is_done) = sync_channel(1);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            // Who does not come within the limit is not waited for.
            _ = is_done.recv_timeout(limit);
        }
    }
}

/// `http://host:port`, with OTLP's own path unless there is one.
fn url(endpoint: &str) -> Result<String, TraceError> {
    let bad = || TraceError::Endpoint { endpoint: endpoint.into() };
    let trimmed = endpoint.trim_end_matches('/');
    let host =
        trimmed.strip_prefix("http://").or_else(|| trimmed.strip_prefix("https://")).ok_or_else(bad)?;
    if host.is_empty() || host.starts_with('/') || host.chars().any(char::is_whitespace) {
        return Err(bad());
    }
    Ok(if host.contains('/') { trimmed.into() } else { format!("{trimmed}/v1/traces") })
}

fn agent() -> Agent {
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(RootCerts::PlatformVerifier)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    Agent::config_builder()
        .tls_config(tls)
        .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .timeout_global(Some(SEND_MAX))
        .build()
        .into()
}

/// The far end.
struct Collector {
    agent: Agent,
    url: String,
    resource: Json,
    counts: Arc<Counts>,
    /// It failed; until then what comes is dropped.
    silent_until: Option<Instant>,
    pause: Duration,
}

impl Collector {
    fn run(mut self, spans: &Receiver<Message>) {
        let mut batch = Vec::new();
        let mut due = Instant::now();
        loop {
            let message = match batch.is_empty() {
                true => spans.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => spans.recv_timeout(due.saturating_duration_since(Instant::now())),
            };
            let mut asked = None;
            match message {
                Ok(Message::Span(span)) => {
                    if batch.is_empty() {
                        due = Instant::now() + BATCH_WAIT;
                    }
                    batch.push(span);
                    if batch.len() < BATCH_SPANS_MAX && Instant::now() < due {
                        continue;
                    }
                }
                Ok(Message::Flush(done)) => asked = Some(done),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.send(&mut batch),
            }
            self.send(&mut batch);
            // Whoever asked may have gone.
            asked.into_iter().for_each(|done| _ = done.try_send(()));
        }
    }

    fn send(&mut self, batch: &mut Vec<Finished>) {
        if batch.is_empty() {
            return;
        }
        let count = batch.len() as u64;
        let spans: Vec<Json> = batch.drain(..).map(|span| json(&span)).collect();
        if self.silent_until.is_some_and(|until| Instant::now() < until) {
            self.counts.dropped.fetch_add(count, Ordering::Relaxed);
            return;
        }
        let scope = json!({"name": "baton", "version": env!("CARGO_PKG_VERSION")});
        let body = json!({"resourceSpans": [
            {"resource": self.resource, "scopeSpans": [{"scope": scope, "spans": spans}]}
        ]});
        let answer = self.agent.post(&self.url).header("content-type", "application/json");
        let problem = match answer.send(body.to_string()) {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("status {}", answer.status().as_u16())),
            Err(error) => Some(error.to_string()),
        };
        let Some(problem) = problem else {
            self.counts.sent.fetch_add(count, Ordering::Relaxed);
            (self.silent_until, self.pause) = (None, PAUSE_MIN);
            return;
        };
        self.counts.dropped.fetch_add(count, Ordering::Relaxed);
        if self.silent_until.is_none() {
            tracing::warn!(collector = self.url, problem, "spans are dropped until the collector is back");
        }
        self.silent_until = Some(Instant::now() + self.pause);
        self.pause = (2 * self.pause).min(PAUSE_MAX);
    }
}

fn resource(config: &TraceConfig) -> Json {
    let text = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    json!({"attributes": [
        text("service.name", config.service),
        text("service.instance.id", &config.instance),
        text("service.version", env!("CARGO_PKG_VERSION")),
    ]})
}

/// OTLP's JSON: ids in hex, times as strings of nanoseconds.
fn json(span: &Finished) -> Json {
    let nanos = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    let open = &span.open;
    let attributes = open.attributes.iter().map(|(key, value)| {
        let value = match value {
            Value::Text(text) => json!({"stringValue": text}),
            Value::Int(number) => json!({"intValue": number.to_string()}),
        };
        json!({"key": key, "value": value})
    });
    let mut json = json!({
        "traceId": format!("{:032x}", open.context.trace),
        "spanId": format!("{:016x}", open.context.span),
        "name": open.name,
        "kind": open.kind as u8,
        "startTimeUnixNano": nanos(open.start),
        "endTimeUnixNano": nanos(span.end),
        "attributes": attributes.collect::<Vec<_>>(),
        "status": {},
    });
    if let Some(parent) = open.parent {
        json["parentSpanId"] = format!("{parent:016x}").into();
    }
    if let Some(error) = &open.error {
        json["status"] = json!({"code": 2, "message": error});
    }
    json
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::sync::Mutex;

    use super::*;
    use crate::traces::Tracer;

    /// A collector on a port of its own, which answers with one status.
    pub struct Collector {
        pub url: String,
        bodies: Arc<Mutex<Vec<Json>>>,
    }

    impl Collector {
        pub fn new(status: u16) -> Collector {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let url = format!("http://{}", listener.local_addr().expect("bound"));
            let bodies: Arc<Mutex<Vec<Json>>> = Arc::default();
            let kept = Arc::clone(&bodies);
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut reader = BufReader::new(stream.expect("a connection"));
                    let (mut line, mut length) = (String::new(), 0);
                    while line != "\r\n" {
                        line.clear();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            break;
                        }
                        let lower = line.to_lowercase();
                        if let Some(text) = lower.strip_prefix("content-length:") {
                            length = text.trim().parse().expect("a length");
                        }
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).expect("a body");
                    kept.lock().expect("unpoisoned").push(serde_json::from_slice(&body).expect("JSON"));
                    let answer =
                        format!("HTTP/1.1 {status} x\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}");
                    reader.get_mut().write_all(answer.as_bytes()).expect("taken");
                }
            });
            Collector { url, bodies }
        }

        pub fn spans(&self) -> Vec<Json> {
            let bodies = self.bodies.lock().expect("unpoisoned");
            let spans = |body: &Json| body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().cloned();
            bodies.iter().filter_map(spans).flatten().collect()
        }
    }

    fn tracer(endpoint: &str) -> Result<Tracer, TraceError> {
        let endpoint = endpoint.to_string();
        Tracer::start(TraceConfig { endpoint, service: "baton-test", instance: "t".into(), percent: 100 })
    }

    /// Protects: a collector that is away, or refuses, costs spans and nothing else; all of them are counted.
    #[test]
    fn a_collector_that_is_away_costs_nothing_but_spans() {
        let nobody = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
        let refuses = Collector::new(503);
        for endpoint in [format!("http://{nobody}"), refuses.url.clone()] {
            let tracer = tracer(&endpoint).expect("a tracer");
            for _ in 0..3 {
                (0..700).for_each(|_| tracer.enter(None, "request").end());
                tracer.flush(Duration::from_secs(20));
            }
            assert_eq!(tracer.counts(), (0, 2100), "{endpoint}");
        }
        assert!(!refuses.bodies.lock().expect("unpoisoned").is_empty());
    }

    /// Protects: memory stays bounded when a collector takes connections and never answers.
    #[test]
    fn a_full_queue_drops() {
        let deaf = TcpListener::bind("127.0.0.1:0").expect("a port");
        let tracer = tracer(&format!("http://{}", deaf.local_addr().expect("bound"))).expect("a tracer");
        let begun = Instant::now();
        (0..3 * QUEUE_SPANS_MAX).for_each(|_| tracer.enter(None, "request").end());
        assert!(begun.elapsed() < SEND_MAX, "offering never waits: {:?}", begun.elapsed());
        let (sent, dropped) = tracer.counts();
        assert!(sent == 0 && dropped >= (QUEUE_SPANS_MAX - BATCH_SPANS_MAX) as u64, "{dropped}");
    }

    #[test]
    fn addresses_are_checked() {
        assert_eq!(url("http://a:4318/").expect("good"), "http://a:4318/v1/traces");
        assert_eq!(url("https://a/x/v1/traces").expect("good"), "https://a/x/v1/traces");
        for bad in ["", "a:4318", "http://", "ftp://a", "http:///x", "http://a b"] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }
}
