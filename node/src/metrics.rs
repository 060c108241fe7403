//! A node's own metrics page, in Prometheus' text form, for those who scrape every machine: the same numbers as the node's
//! heartbeats, which the router's page shows of all nodes. Served by `run` where the settings name an address. A page for
//! one reader on a trusted network: one request per connection, nothing of it is kept.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use cluster::Refusals;
use engine::{Engine, Report};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Of a request's head.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// For a request to come and its answer to be taken.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Readers at once; further ones wait in the listener's queue.
const READERS_MAX: usize = 16;

/// After an error of `accept` that will pass.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until it is dropped. `model`, `name` and `role` are labels.
pub async fn serve(
    listener: TcpListener,
    engine: Engine,
    refusals: Arc<Refusals>,
    model: String,
    name: String,
    role: &'static str,
) {
    let mut readers = JoinSet::new();
    loop {
        while readers.len() >= READERS_MAX {
            // How a reader ended is its own affair.
            _ = readers.join_next().await;
        }
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("metrics page: cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while readers.try_join_next().is_some() {}
        let text = page(&engine.report(), &refusals, &model, &name, role);
        readers.spawn(tokio::time::timeout(TIME_MAX, answer(stream, text)));
    }
}

async fn answer(mut stream: TcpStream, page: String) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > HEAD_BYTES_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = match head.strip_prefix(b"GET ").map(|rest| rest.split(|byte| *byte == b' ').next())
    {
        Some(Some(b"/metrics")) => ("200 OK", page),
        Some(_) => ("404 Not Found", "metrics are at /metrics\n".to_string()),
        None => ("405 Method Not Allowed", "GET /metrics\n".to_string()),
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// The page. Names are vLLM's where vLLM has one.
pub fn page(report: &Report, refusals: &Refusals, model: &str, name: &str, role: &str) -> String {
    let labels = format!("model_name={},engine={},role={}", quoted(model), quoted(name), quoted(role));
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
        // Writing into a String cannot fail.
        _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (more, value) in samples {
            _ = writeln!(out, "{name}{{{labels}{more}}} {value}");
        }
    };
    let one = |value: f64| [(String::new(), value)];
    let (counters, blocks) = (&report.counters, &report.blocks);
    let held = blocks.total.saturating_sub(blocks.free.saturating_add(blocks.cached));
    let usage = f64::from(held) / f64::from(blocks.total.max(1));
    for (name, help, value) in [
        ("vllm:num_requests_running", "Sequences being computed or generated", report.running as f64),
        ("vllm:num_requests_waiting", "Jobs waiting", report.waiting as f64),
        ("vllm:kv_cache_usage_perc", "Share of the KV store that is in use; 1 is all", usage),
        ("baton_node_waiting_tokens", "Prompt tokens not yet computed", report.waiting_tokens as f64),
        (
            "baton_node_prefill_tokens_per_second",
            "Measured, 0: not yet",
            f64::from(report.prefill_tokens_per_s),
        ),
        ("baton_node_decode_step_seconds", "Measured, 0: not yet", f64::from(report.decode_step_ms) / 1e3),
    ] {
        family(name, "gauge", help, &one(value));
    }
    for (name, help, value) in [
        ("vllm:prompt_tokens_total", "Prompt tokens computed", counters.prompt_tokens),
        ("vllm:generation_tokens_total", "Tokens generated", counters.generated_tokens),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache", counters.cached_tokens),
        ("vllm:num_preemptions_total", "Sequences given up for want of room", counters.preemptions),
        ("vllm:spec_decode_num_drafts_total", "Times that tokens were guessed ahead", counters.drafts),
        ("vllm:spec_decode_num_draft_tokens_total", "Tokens guessed ahead", counters.draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens_total", "Of them, those drawn", counters.accepted_tokens),
        (
            "baton_draft_model_tokens_total",
            "Of the tokens guessed ahead, those of the draft model",
            counters.model_draft_tokens,
        ),
        (
            "baton_draft_model_accepted_tokens_total",
            "Of those, the ones drawn",
            counters.model_accepted_tokens,
        ),
        ("baton_node_jobs_total", "Jobs accepted", counters.requests),
        ("baton_node_kv_bytes_total", "KV payload sent or received", counters.kv_bytes),
        ("baton_node_failed_sessions_total", "KV sessions that failed", counters.failed_sessions),
        ("baton_kv_resumed_total", "Connections of KV pushes lost and replaced", counters.kv_resumed),
        ("baton_kv_fallbacks_total", "Of them, those by UCX, now over TCP", counters.kv_fallbacks),
        ("baton_kv_silent_total", "Of them, those left since their path fell silent", counters.kv_silent),
        (
            "baton_kv_gpudirect_bytes_total",
            "KV payload sent that receivers read out of a GPU's memory",
            counters.kv_unstaged_bytes,
        ),
        ("baton_kv_audit_errors_total", "Audits of the idle store that failed", blocks.audit_errors.into()),
    ] {
        family(name, "counter", help, &one(value as f64));
    }
    let help = "Time that the draft model has taken";
    let seconds = counters.model_draft_time.as_secs_f64();
    family("baton_draft_model_seconds_total", "counter", help, &one(seconds));
    let refused = refusals.all().into_iter().map(|(door, reason, count)| {
        (format!(",door={},reason={}", quoted(door.as_str()), quoted(reason)), count as f64)
    });
    let refused: Vec<_> = refused.collect();
    family(
        "baton_refused_total",
        "counter",
        "Connections and calls turned away, by door and reason",
        &refused,
    );
    let states = [
        ("free", blocks.free),
        ("used", blocks.used),
        ("cached", blocks.cached),
        ("reserved", blocks.reserved),
        ("quarantined", blocks.quarantined),
    ];
    let states = states.map(|(state, count)| (format!(",state={}", quoted(state)), f64::from(count)));
    family("baton_kv_blocks", "gauge", "Blocks of the KV store by owner", &states);
    let links: Vec<(String, f64)> = report
        .links
        .iter()
        .map(|(peer, rate, _)| (format!(",peer={}", quoted(peer)), f64::from(*rate) * 1e9))
        .collect();
    family("baton_link_bytes_per_second", "gauge", "Measured rate of KV pushes", &links);
    out
}

/// A label's value.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::Door;
    use engine::{Blocks, Counters};

    #[test]
    fn the_page_holds_the_report() {
        let report = Report {
            running: 2,
            blocks: Blocks { total: 10, free: 4, used: 4, cached: 2, ..Blocks::default() },
            counters: Counters { prompt_tokens: 7, ..Counters::default() },
            links: vec![("10.0.0.2:1".into(), 0.5, 9)],
            ..Report::default()
        };
        let refusals = Refusals::default();
        refusals.count(Door::Kv, "ticket not proved");
        let text = page(&report, &refusals, "m\"1", "p0", "prefill");
        let labels = "model_name=\"m\\\"1\",engine=\"p0\",role=\"prefill\"";
        for line in [
            format!("vllm:num_requests_running{{{labels}}} 2"),
            format!("vllm:kv_cache_usage_perc{{{labels}}} 0.4"),
            format!("vllm:prompt_tokens_total{{{labels}}} 7"),
            format!("baton_kv_blocks{{{labels},state=\"cached\"}} 2"),
            format!("baton_refused_total{{{labels},door=\"kv\",reason=\"ticket not proved\"}} 1"),
            format!("baton_link_bytes_per_second{{{labels},peer=\"10.0.0.2:1\"}} 500000000"),
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
    }

    #[tokio::test]
    async fn a_reader_gets_the_page_and_others_are_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (engine, _commands) = engine::engine();
        tokio::spawn(serve(listener, engine, Arc::default(), "m".into(), "n".into(), "decode"));
        for (request, begins) in [
            ("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
            ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 405"),
        ] {
            let mut stream = TcpStream::connect(address).await.expect("served");
            stream.write_all(request.as_bytes()).await.expect("taken");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("an answer");
            assert!(answer.starts_with(begins), "{answer}");
            assert_eq!(answer.contains("vllm:num_requests_running"), begins.contains("200"));
        }
    }
}
