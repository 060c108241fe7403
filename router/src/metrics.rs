//! What the gateway measures, in Prometheus' form. Names are vLLM's where vLLM has one, so that its dashboards work; ours
//! begin with `baton_`. Written by `api::answer` through one `SequenceMeter` per sequence, read by `GET /metrics`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

mod sequence;

pub use sequence::SequenceMeter;

use crate::inference::Load;

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

/// Choices of a prompt.
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

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
    /// As `itl`, by the name that boards of some years know.
    itl_before: Histogram,
    tpot: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    request_generation_max: Histogram,
    asked_tokens: Histogram,
    asked_choices: Histogram,
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

    /// A prompt's answer is begun: `n` choices of `max_tokens` each at the most.
    pub fn asked(&self, n: usize, max_tokens: u32) {
        self.series.asked_choices.observe(n as f64);
        self.series.asked_tokens.observe(max_tokens.into());
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
            itl_before: histogram(
                r,
                "vllm:time_per_output_token_seconds",
                "Between tokens of a sequence, by its older name",
                &ITL_S,
            ),
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
            inference: histogram(
                r,
                "vllm:request_inference_time_seconds",
                "From a node's acceptance to the last token",
                &REQUEST_S,
            ),
            request_prompt: histogram(r, "vllm:request_prompt_tokens", "Prompt tokens per sequence", &TOKENS),
            request_generation: histogram(
                r,
                "vllm:request_generation_tokens",
                "Tokens generated per sequence",
                &TOKENS,
            ),
            request_generation_max: histogram(
                r,
                "vllm:request_max_num_generation_tokens",
                "Tokens of the longest choice; here each choice counts for itself",
                &TOKENS,
            ),
            asked_tokens: histogram(
                r,
                "vllm:request_params_max_tokens",
                "Output tokens that a prompt may have",
                &TOKENS,
            ),
            asked_choices: histogram(r, "vllm:request_params_n", "Choices asked for of a prompt", &CHOICES),
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::inference::{Decision, Served, Started, Timings};

    #[test]
    fn a_dashboard_for_vllm_finds_its_names() {
        let metrics = Metrics::new(Registry::default(), "tiny");
        let mut meter = SequenceMeter::new(Arc::clone(&metrics), Instant::now(), 7);
        let now = Instant::now();
        metrics.asked(1, 16);
        meter.started(&Started { queue: Duration::from_millis(1), ..Started::default() });
        meter.token(now);
        meter.token(now);
        let timings = Timings {
            first_step: Duration::from_millis(2),
            prefill: Duration::from_millis(3),
            ..Timings::default()
        };
        meter.served(Served { cached_tokens: 4, decision: Decision::Handoff, migrations: 1, timings });
        meter.finished("stop");
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
        // Of the board that vLLM's repository offers, and of its other names of the same kind: each with a value.
        for name in [
            "e2e_request_latency_seconds",
            "time_per_output_token_seconds",
            "inter_token_latency_seconds",
            "time_to_first_token_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_max_num_generation_tokens",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
            "request_time_per_output_token_seconds",
            "request_params_max_tokens",
            "request_params_n",
        ] {
            for series in ["count", "sum", "bucket"] {
                let begin = format!("vllm:{name}_{series}{{model_name=\"tiny\"");
                assert!(old.lines().any(|line| line.starts_with(&begin)), "{begin} is not in\n{old}");
            }
            let count = format!("vllm:{name}_count{{model_name=\"tiny\"}} 1");
            assert!(old.lines().any(|line| line == count), "{count} is not in\n{old}");
        }
    }
}
