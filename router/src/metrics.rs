//! What the gateway measures, in Prometheus' form. Names are vLLM's where vLLM has one, so that its dashboards work; ours
//! begin with `baton_`. Written by `api::answer` through one `SequenceMeter` per sequence, read by `GET /metrics`.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::api::Caller;
use crate::inference::{Finished, Load, Started};

/// Seconds to the first token; upper bounds of buckets.
const TTFT_S: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0,
];
/// Seconds between tokens.
const ITL_S: [f64; 19] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
    40.0,
];
/// Seconds of whole requests and of their long parts.
const REQUEST_S: [f64; 21] = [
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0,
];
/// Seconds of the short parts.
const PART_S: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Tokens of a request.
const TOKENS: [f64; 17] = [
    1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0, 131072.0, 1048576.0,
];

/// How a sequence ended, as a label: `stop`, `length`, `abort` (the client went away), `error`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    finished_reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabel {
    decision: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabel {
    path: String,
    status: u16,
}

/// What became of a span: `sent` or `dropped`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SpanLabel {
    outcome: &'static str,
}

/// All metrics of one gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    series: Series,
}

#[derive(Debug)]
struct Series {
    running: Gauge,
    waiting: Gauge,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    ended: Family<Reason, Counter>,
    ttft: Histogram,
    itl: Histogram,
    tpot: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    prepare: Histogram,
    admission: Histogram,
    transfer_exposed: Histogram,
    transfer_estimated: Histogram,
    first_step_wait: Histogram,
    first_step: Histogram,
    decisions: Family<DecisionLabel, Counter>,
    migrations: Counter,
    http: Family<HttpLabel, Counter>,
    spans: Family<SpanLabel, Counter>,
}

impl Metrics {
    /// `registry`: where others may have registered before. Every metric of the gateway carries `model_name`.
    pub fn new(mut registry: Registry, model: &str) -> Arc<Self> {
        let model = ("model_name".into(), model.to_string().into());
        let series = Series::register(registry.sub_registry_with_label(model));
        Arc::new(Self { registry: Mutex::new(registry), series })
    }

    /// The text of `GET /metrics`, with the load of this moment.
    pub fn encode(&self, load: Load) -> String {
        self.series.running.set(load.running.into());
        self.series.waiting.set(load.queued.into());
        let mut out = String::new();
        let registry = self.registry.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Writing into a String cannot fail.
        _ = text::encode(&mut out, &registry);
        out
    }

    /// Spans of traces, in all.
    pub fn spans(&self, (sent, dropped): (u64, u64)) {
        for (outcome, now) in [("sent", sent), ("dropped", dropped)] {
            let counter = self.series.spans.get_or_create(&SpanLabel { outcome });
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }

    /// Counts an answer. `path`: the route's pattern, of which there are few.
    pub fn http(&self, path: &str, status: u16) {
        self.series.http.get_or_create(&HttpLabel { path: path.into(), status }).inc();
    }

    /// A request is checked, rendered and tokenized.
    pub fn prepared(&self, took: Duration) {
        self.series.prepare.observe(took.as_secs_f64());
    }
}

/// An OpenMetrics page in Prometheus' older text form: there a counter's family has the name of its samples, and there is no
/// mark of the end.
pub fn classic(page: &str) -> String {
    let mut out = String::with_capacity(page.len() + 1024);
    let mut help = None;
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = Some(text);
            continue;
        }
        let Some(text) = line.strip_prefix("# TYPE ") else {
            if !line.starts_with('#') {
                out.push_str(line);
                out.push('\n');
            }
            continue;
        };
        let (name, kind) = text.split_once(' ').unwrap_or((text, "untyped"));
        let suffix = if kind == "counter" { "_total" } else { "" };
        let kind = if kind == "unknown" { "untyped" } else { kind };
        if let Some((_, help)) = help.take().and_then(|help: &str| help.split_once(' ')) {
            out.push_str(&format!("# HELP {name}{suffix} {help}\n"));
        }
        out.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
    }
    out
}

impl Series {
    fn register(r: &mut Registry) -> Self {
        Self {
            running: gauge(r, "vllm:num_requests_running", "Sequences that a node has admitted"),
            waiting: gauge(r, "vllm:num_requests_waiting", "Sequences in the router's queue"),
            prompt_tokens: counter(r, "vllm:prompt_tokens", "Prompt tokens of sequences begun"),
            generation_tokens: counter(r, "vllm:generation_tokens", "Tokens generated"),
            prefix_queries: counter(r, "vllm:prefix_cache_queries", "Prompt tokens of finished sequences"),
            prefix_hits: counter(r, "vllm:prefix_cache_hits", "Of these, tokens that no node had to compute"),
            ended: family(r, "vllm:request_success", "Sequences by how they ended"),
            ttft: histogram(
                r,
                "vllm:time_to_first_token_seconds",
                "From the request to its first token",
                &TTFT_S,
            ),
            itl: histogram(r, "vllm:inter_token_latency_seconds", "Between tokens of a sequence", &ITL_S),
            tpot: histogram(
                r,
                "vllm:request_time_per_output_token_seconds",
                "Per sequence: mean time of a token after the first",
                &ITL_S,
            ),
            e2e: histogram(r, "vllm:e2e_request_latency_seconds", "From the request to its end", &REQUEST_S),
            queue: histogram(r, "vllm:request_queue_time_seconds", "In the router's queue", &REQUEST_S),
            prefill: histogram(
                r,
                "vllm:request_prefill_time_seconds",
                "Queued and computed by a node",
                &REQUEST_S,
            ),
            decode: histogram(
                r,
                "vllm:request_decode_time_seconds",
                "From the first token to the last",
                &REQUEST_S,
            ),
            request_prompt: histogram(r, "vllm:request_prompt_tokens", "Prompt tokens per sequence", &TOKENS),
            request_generation: histogram(
                r,
                "vllm:request_generation_tokens",
                "Tokens generated per sequence",
                &TOKENS,
            ),
            prepare: histogram(
                r,
                "baton_prepare_seconds",
                "Checking, rendering and tokenizing a request",
                &PART_S,
            ),
            admission: histogram(
                r,
                "baton_admission_seconds",
                "From asking a decode group to its reservation",
                &PART_S,
            ),
            transfer_exposed: histogram(
                r,
                "baton_transfer_exposed_seconds",
                "From the end of the prompt's compute to the cache being usable",
                &PART_S,
            ),
            transfer_estimated: histogram(
                r,
                "baton_transfer_estimated_seconds",
                "What the former was estimated to be when the push began",
                &PART_S,
            ),
            first_step_wait: histogram(
                r,
                "baton_first_step_wait_seconds",
                "From a usable cache to the first step",
                &PART_S,
            ),
            first_step: histogram(r, "baton_first_step_seconds", "The first decode step", &PART_S),
            decisions: family(r, "baton_request_decisions", "Finished sequences by who computed the prompt"),
            migrations: counter(
                r,
                "baton_request_migrations",
                "Attempts after the first, of finished sequences",
            ),
            http: family(r, "baton_http_responses", "Answers by route and status"),
            spans: family(r, "baton_trace_spans", "Spans of traces by what became of them"),
        }
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let metric = Gauge::default();
    registry.register(name, help, metric.clone());
    metric
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let metric = Counter::default();
    registry.register(name, help, metric.clone());
    metric
}

fn family<S>(registry: &mut Registry, name: &str, help: &str) -> Family<S, Counter>
where
    S: EncodeLabelSet + Clone + std::fmt::Debug + std::hash::Hash + Eq + Send + Sync + 'static,
{
    let metric = Family::default();
    registry.register(name, help, metric.clone());
    metric
}

fn histogram(registry: &mut Registry, name: &str, help: &str, bounds: &[f64]) -> Histogram {
    let metric = Histogram::new(bounds.iter().copied());
    registry.register(name, help, metric.clone());
    metric
}

/// Follows one sequence. Dropped before an end was reported, it counts as aborted: the client went away.
#[derive(Debug)]
pub struct SequenceMeter {
    metrics: Arc<Metrics>,
    arrived: Instant,
    first: Option<Instant>,
    last: Instant,
    prompt_tokens: u32,
    tokens: u32,
    ended: bool,
    /// Whose tokens they are; `None` where nobody needs a key.
    caller: Option<Arc<Caller>>,
}

impl SequenceMeter {
    /// `arrived`: when the request's body was complete.
    pub fn new(metrics: Arc<Metrics>, arrived: Instant, prompt_tokens: u32) -> Self {
        metrics.series.prompt_tokens.inc_by(prompt_tokens.into());
        let (first, last) = (None, arrived);
        Self { metrics, arrived, first, last, prompt_tokens, tokens: 0, ended: false, caller: None }
    }

    /// Counts the sequence's tokens as `caller`'s.
    pub fn of(mut self, caller: Option<Arc<Caller>>) -> Self {
        if let Some(caller) = &caller {
            caller.used(self.prompt_tokens, self.arrived);
        }
        self.caller = caller;
        self
    }

    /// The sequence is admitted.
    pub fn started(&self, started: &Started) {
        self.metrics.series.queue.observe(started.queue.as_secs_f64());
        self.metrics.series.admission.observe(started.admission.as_secs_f64());
    }

    /// A token came.
    pub fn token(&mut self, now: Instant) {
        self.tokens += 1;
        self.metrics.series.generation_tokens.inc();
        if let Some(caller) = &self.caller {
            caller.used(1, now);
        }
        match self.first {
            None => {
                self.first = Some(now);
                self.metrics.series.ttft.observe((now - self.arrived).as_secs_f64());
            }
            Some(_) => self.metrics.series.itl.observe((now - self.last).as_secs_f64()),
        }
        self.last = now;
    }

    /// From the request to the first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.first.map(|first| first - self.arrived)
    }

    /// The sequence is complete. `reason`: `stop` or `length`. `finished`: what the cluster said; none if a stop string ended it.
    pub fn finished(&mut self, reason: &'static str, finished: Option<&Finished>) {
        self.end(reason);
        let m = &self.metrics.series;
        m.e2e.observe(self.arrived.elapsed().as_secs_f64());
        m.request_prompt.observe(self.prompt_tokens.into());
        m.request_generation.observe(self.tokens.into());
        if let Some(first) = self.first.filter(|_| self.tokens > 1) {
            let decode = (self.last - first).as_secs_f64();
            m.decode.observe(decode);
            m.tpot.observe(decode / f64::from(self.tokens - 1));
        }
        let Some(finished) = finished else { return };
        m.prefix_queries.inc_by(self.prompt_tokens.into());
        m.prefix_hits.inc_by(finished.cached_tokens.into());
        m.decisions.get_or_create(&DecisionLabel { decision: finished.decision.as_str() }).inc();
        m.migrations.inc_by(finished.migrations.into());
        let t = &finished.timings;
        let parts = [
            (&m.prefill, t.prefill),
            (&m.transfer_exposed, t.transfer_exposed),
            (&m.transfer_estimated, t.transfer_estimated),
            (&m.first_step_wait, t.first_step_wait),
            (&m.first_step, t.first_step),
        ];
        for (metric, part) in parts.into_iter().filter(|(_, part)| !part.is_zero()) {
            metric.observe(part.as_secs_f64());
        }
    }

    /// The sequence failed.
    pub fn failed(&mut self) {
        self.end("error");
    }

    fn end(&mut self, finished_reason: &'static str) {
        self.ended = true;
        self.metrics.series.ended.get_or_create(&Reason { finished_reason }).inc();
    }
}

impl Drop for SequenceMeter {
    fn drop(&mut self) {
        if !self.ended {
            self.end("abort");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{Decision, FinishReason, Timings};

    #[test]
    fn a_dashboard_for_vllm_finds_its_names() {
        let metrics = Metrics::new(Registry::default(), "tiny");
        let mut meter = SequenceMeter::new(Arc::clone(&metrics), Instant::now(), 7);
        let now = Instant::now();
        meter.token(now);
        meter.token(now);
        let timings = Timings { first_step: Duration::from_millis(2), ..Timings::default() };
        let finished = Finished {
            reason: FinishReason::Stop,
            output_tokens: 2,
            cached_tokens: 4,
            decision: Decision::Handoff,
            migrations: 1,
            timings,
        };
        meter.finished("stop", Some(&finished));
        drop(meter);
        drop(SequenceMeter::new(Arc::clone(&metrics), now, 1));
        metrics.http("/v1/models", 200);
        let old = classic(&metrics.encode(Load::default()));
        for part in [
            "# HELP vllm:prompt_tokens_total Prompt tokens of sequences begun.\n# TYPE vllm:prompt_tokens_total counter\n",
            "# TYPE vllm:num_requests_running gauge\n",
            "# TYPE vllm:time_to_first_token_seconds histogram\n",
            "\nvllm:prompt_tokens_total{model_name=\"tiny\"} 8\n",
        ] {
            assert!(old.contains(part), "{part} is not in\n{old}");
        }
        assert!(!old.contains("EOF"));
        let text = metrics.encode(Load { running: 3, queued: 2, waiting: 2 });
        for line in [
            "vllm:num_requests_running{model_name=\"tiny\"} 3",
            "vllm:num_requests_waiting{model_name=\"tiny\"} 2",
            "vllm:prompt_tokens_total{model_name=\"tiny\"} 8",
            "vllm:generation_tokens_total{model_name=\"tiny\"} 2",
            "vllm:prefix_cache_hits_total{model_name=\"tiny\"} 4",
            "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"stop\"} 1",
            "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"abort\"} 1",
            "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"tiny\"} 1",
            "vllm:e2e_request_latency_seconds_count{model_name=\"tiny\"} 1",
            "baton_first_step_seconds_sum{model_name=\"tiny\"} 0.002",
            "baton_request_decisions_total{model_name=\"tiny\",decision=\"handoff\"} 1",
            "baton_request_migrations_total{model_name=\"tiny\"} 1",
            "baton_http_responses_total{model_name=\"tiny\",path=\"/v1/models\",status=\"200\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
