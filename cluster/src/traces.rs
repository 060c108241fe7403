//! OpenTelemetry traces: one per request, over router, prefill node and decode group. A [`Tracer`] opens a process' first
//! span of a trace, a [`Scope`] travels with the request and opens those beneath, a [`Span`] ends when it is dropped.
//!
//! Callers: the router's gateway and dispatch, the services of the nodes. Without a collector all of it is off and does
//! nothing. With one, spans wait in a bounded queue for [`export`]; what finds it full is dropped and counted, so that a
//! collector that is slow or away costs requests nothing.

mod context;
mod export;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use tonic::metadata::MetadataMap;

pub use context::Context;
use export::Exporter;

/// W3C's header, and our calls' metadata.
pub const TRACEPARENT: &str = "traceparent";

/// Where spans go.
#[derive(Clone, Debug)]
pub struct TraceConfig {
    /// The collector's OTLP/HTTP address, such as `http://127.0.0.1:4318`.
    pub endpoint: String,
    /// `service.name` of this process.
    pub service: &'static str,
    /// `service.instance.id`: its name for people.
    pub instance: String,
    /// Of the requests that do not say whether they are traced, this many per cent are.
    pub percent: u32,
}

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not a URL with a host.
    #[error("`{endpoint}` is no address of a collector: wanted http://host:port or https://host:port")]
    Endpoint {
        /// What was given.
        endpoint: String,
    },
    /// No thread for it.
    #[error("no thread that sends spans: {0}")]
    Thread(std::io::Error),
}

/// Opens traces. Cheap to clone; the default one is off.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Exporter>>);

impl Tracer {
    /// One that sends to a collector, from a thread of its own. Errors when the address is none; a collector that is away is
    /// no error.
    pub fn start(config: TraceConfig) -> Result<Tracer, TraceError> {
        Exporter::start(config).map(|exporter| Tracer(Some(Arc::new(exporter))))
    }

    /// The span of a request from outside: goes on with the trace of its `traceparent`, or begins one.
    pub fn enter(&self, traceparent: Option<&str>, name: impl Into<Cow<'static, str>>) -> Span {
        let Some(exporter) = &self.0 else { return Span::default() };
        let (context, parent) = match traceparent.and_then(Context::parse) {
            Some(outer) if !outer.sampled => return Span::default(),
            Some(outer) => (Some(outer.child()), Some(outer.span)),
            None => (Context::root(exporter.percent), None),
        };
        Span::open(exporter, context, parent, name.into(), Kind::Server)
    }

    /// The span of a call from within the cluster: only goes on with a trace.
    pub fn join(&self, metadata: &MetadataMap, name: impl Into<Cow<'static, str>>) -> Span {
        match metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()) {
            Some(outer) => self.enter(Some(outer), name),
            None => Span::default(),
        }
    }

    /// Spans that were sent, and spans that were dropped.
    pub fn counts(&self) -> (u64, u64) {
        let Some(exporter) = &self.0 else { return (0, 0) };
        (exporter.counts.sent.load(Ordering::Relaxed), exporter.counts.dropped.load(Ordering::Relaxed))
    }

    /// Sends what waits, for `limit` at the longest; at the end of the process. Blocks.
    pub fn flush(&self, limit: Duration) {
        if let Some(exporter) = &self.0 {
            exporter.flush(limit);
        }
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Tracer(on)" } else { "Tracer(off)" })
    }
}

/// A place in a trace beneath which spans are opened. The default one is in no trace.
#[derive(Clone, Default)]
pub struct Scope(Option<(Arc<Exporter>, Context)>);

impl Scope {
    /// A span that begins now.
    pub fn span(&self, name: impl Into<Cow<'static, str>>) -> Span {
        match &self.0 {
            Some((exporter, context)) => {
                Span::open(exporter, Some(context.child()), Some(context.span), name.into(), Kind::Internal)
            }
            None => Span::default(),
        }
    }

    /// A span that began at `since`.
    pub fn span_since(&self, name: impl Into<Cow<'static, str>>, since: Instant) -> Span {
        let mut span = self.span(name);
        if let Some(open) = &mut span.0 {
            open.begun = since;
            open.start = SystemTime::now() - since.elapsed();
        }
        span
    }

    /// Tells a call where it belongs.
    pub fn mark(&self, metadata: &mut MetadataMap) {
        if let Some((_, context)) = &self.0
            && let Ok(value) = context.to_string().parse()
        {
            metadata.insert(TRACEPARENT, value);
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some((_, context)) => write!(f, "Scope({context})"),
            None => f.write_str("Scope(off)"),
        }
    }
}

/// On which side of a call a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Internal = 1,
    Server = 2,
}

/// Something that takes time. Ends when it is dropped; the default one is not recorded.
#[derive(Default)]
pub struct Span(Option<Box<Open>>);

struct Open {
    exporter: Arc<Exporter>,
    context: Context,
    parent: Option<u64>,
    name: Cow<'static, str>,
    kind: Kind,
    start: SystemTime,
    begun: Instant,
    attributes: Vec<(&'static str, Value)>,
    error: Option<String>,
}

/// Of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Words.
    Text(String),
    /// A number.
    Int(i64),
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.into())
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Value {
        Value::Int(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Value {
        Value::Int(number.into())
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Value {
        Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl Span {
    fn open(
        exporter: &Arc<Exporter>,
        context: Option<Context>,
        parent: Option<u64>,
        name: Cow<'static, str>,
        kind: Kind,
    ) -> Span {
        let Some(context) = context else { return Span::default() };
        Span(Some(Box::new(Open {
            exporter: Arc::clone(exporter),
            context,
            parent,
            name,
            kind,
            start: SystemTime::now(),
            begun: Instant::now(),
            attributes: Vec::new(),
            error: None,
        })))
    }

    /// Whether anything of it is recorded.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Beneath it.
    pub fn scope(&self) -> Scope {
        Scope(self.0.as_ref().map(|open| (Arc::clone(&open.exporter), open.context)))
    }

    /// Says something about it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(open) = &mut self.0 {
            open.attributes.push((key, value.into()));
        }
    }

    /// It did not succeed.
    pub fn fail(&mut self, why: impl fmt::Display) {
        if let Some(open) = &mut self.0 {
            open.error = Some(why.to_string());
        }
    }

    /// Ends it now.
    pub fn end(self) {}
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(open) => write!(f, "Span({}, {})", open.name, open.context),
            None => f.write_str("Span(off)"),
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(open) = self.0.take() {
            let took = open.begun.elapsed();
            let exporter = Arc::clone(&open.exporter);
            exporter.offer(export::Finished { end: open.start + took, open });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::export::tests::Collector;
    use super::*;

    fn tracer(collector: &Collector) -> Tracer {
        Tracer::start(TraceConfig {
            endpoint: collector.url.clone(),
            service: "baton-test",
            instance: "t0".into(),
            percent: 100,
        })
        .expect("a tracer")
    }

    const OUTER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    /// Protects: a trace from outside goes on over a call's metadata, with the right parents, names and errors.
    #[test]
    fn a_trace_goes_on_from_process_to_process() {
        let collector = Collector::new(200);
        let (router, node) = (tracer(&collector), tracer(&collector));
        let mut request = router.enter(Some(OUTER), "request");
        request.set("status", 200u32);
        let call = request.scope().span("call");
        let mut metadata = MetadataMap::new();
        call.scope().mark(&mut metadata);
        let mut work = node.join(&metadata, "work");
        work.fail("no room");
        drop((work, call, request));
        router.flush(Duration::from_secs(10));
        node.flush(Duration::from_secs(10));
        let spans = collector.spans();
        let find = |name: &str| spans.iter().find(|span| span["name"] == name).expect("the span").clone();
        let (request, call, work) = (find("request"), find("call"), find("work"));
        assert!(spans.iter().all(|span| span["traceId"] == "4bf92f3577b34da6a3ce929d0e0e4736"), "{spans:?}");
        assert_eq!(request["parentSpanId"], "00f067aa0ba902b7");
        assert_eq!((&call["parentSpanId"], &work["parentSpanId"]), (&request["spanId"], &call["spanId"]));
        assert_eq!((&request["kind"], &call["kind"]), (&serde_json::json!(2), &serde_json::json!(1)));
        assert_eq!(request["attributes"][0]["value"]["intValue"], "200");
        assert_eq!(work["status"], serde_json::json!({"code": 2, "message": "no room"}));
        assert_eq!(router.counts(), (2, 0));
    }

    /// Protects: what says that it is not traced is not; without a collector nothing is recorded or marked.
    #[test]
    fn untraced_requests_have_no_spans() {
        let collector = Collector::new(200);
        let traced = tracer(&collector);
        assert!(!traced.enter(Some(&OUTER.replace("-01", "-00")), "request").is_on());
        assert!(!traced.join(&MetadataMap::new(), "work").is_on());
        let off = Tracer::default();
        let span = off.enter(Some(OUTER), "request");
        let mut metadata = MetadataMap::new();
        span.scope().span("call").scope().mark(&mut metadata);
        assert!(!span.is_on() && metadata.is_empty());
    }
}
