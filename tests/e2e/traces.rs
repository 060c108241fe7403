//! Traces: what a collector gets of one request over all processes.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::client::builder;
use crate::harness::{Cluster, LOOK, PATIENCE};

/// A collector of OTLP over HTTP. Spans by name, each with its service.
struct Collector {
    url: String,
    spans: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Collector {
    fn new() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let spans: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let kept = Arc::clone(&spans);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, kept) = (stream.expect("a connection"), Arc::clone(&kept));
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    while let Some(body) = message(&mut reader) {
                        let mut kept = kept.lock().expect("unpoisoned");
                        for resource in body["resourceSpans"].as_array().expect("a list") {
                            let service = &resource["resource"]["attributes"][0]["value"]["stringValue"];
                            let service = service.as_str().expect("service.name").to_string();
                            for span in resource["scopeSpans"][0]["spans"].as_array().expect("spans") {
                                kept.push((service.clone(), span.clone()));
                            }
                        }
                    }
                });
            }
        });
        Collector { url, spans }
    }

    /// The spans of a trace, once they are all those of `names`.
    async fn trace(&self, trace: &str, names: &[&str]) -> HashMap<String, (String, Value)> {
        let begun = std::time::Instant::now();
        loop {
            let all = self.spans.lock().expect("unpoisoned").clone();
            let of_trace = all.into_iter().filter(|(_, span)| span["traceId"] == trace);
            let spans: HashMap<_, _> = of_trace
                .map(|(service, span)| (span["name"].as_str().expect("a name").to_string(), (service, span)))
                .collect();
            if names.iter().all(|name| spans.contains_key(*name)) {
                return spans;
            }
            assert!(begun.elapsed() < PATIENCE, "only {:?} came", spans.keys());
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// The body of one POST, which is answered.
fn message(reader: &mut BufReader<std::net::TcpStream>) -> Option<Value> {
    let (mut line, mut length) = (String::new(), 0);
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(text) = line.to_lowercase().strip_prefix("content-length:") {
            length = text.trim().parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").ok()?;
    serde_json::from_slice(&body).ok()
}

/// A request is one trace, its client's: the router's spans, and those of the nodes beneath the calls that reached them.
#[tokio::test]
async fn a_request_is_one_trace_over_all_processes() {
    let collector = Collector::new();
    let cluster = Cluster::up(&[&format!("--otlp-endpoint={}", collector.url)]).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let body = json!({"model": "baton-demo", "messages": [{"role": "user", "content": "What is baton?"}], "max_tokens": 8});
    let answer = builder().build().expect("a client");
    let answer = answer
        .post(cluster.url("/v1/chat/completions"))
        .header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01"))
        .json(&body);
    assert_eq!(answer.send().await.expect("an answer").status(), 200);

    let request = "POST /v1/chat/completions";
    // Each span with its parent.
    let tree = [
        ("tokenize", request, "baton-router"),
        ("generate", request, "baton-router"),
        ("queue", "generate", "baton-router"),
        ("first token", "generate", "baton-router"),
        ("attempt", "generate", "baton-router"),
        ("reserve", "decode node", "baton-decode"),
        ("prefill", "attempt", "baton-router"),
        ("kv transfer", "attempt", "baton-router"),
        ("prefill node", "prefill", "baton-prefill"),
        ("compute", "prefill node", "baton-prefill"),
        ("push", "prefill node", "baton-prefill"),
        ("decode node", "attempt", "baton-decode"),
        ("land", "decode node", "baton-decode"),
    ];
    let names: Vec<&str> = tree.iter().map(|(name, ..)| *name).chain([request]).collect();
    let spans = collector.trace(trace, &names).await;
    assert_eq!(spans[request].1["parentSpanId"], "00f067aa0ba902b7");
    for (name, parent, service) in tree {
        // The router and the group both reserve and decode: told apart by their parents.
        let of = |service: &str| {
            let all = collector.spans.lock().expect("unpoisoned").clone();
            all.into_iter()
                .find(|(of, span)| of == service && span["name"] == name && span["traceId"] == trace)
        };
        let (_, span) = of(service).unwrap_or_else(|| panic!("no {name} of {service}"));
        assert_eq!(span["parentSpanId"], spans[parent].1["spanId"], "{name} is not beneath {parent}");
        let nanos = |key: &str| span[key].as_str().expect("nanoseconds").parse::<u64>().expect("a number");
        assert!(nanos("startTimeUnixNano") <= nanos("endTimeUnixNano"), "{name}");
    }
    // What became of spans is told, and scrapes leave none.
    let begun = std::time::Instant::now();
    while cluster.metric("baton_trace_spans_total", "outcome=\"sent\"").await == 0.0 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(LOOK).await;
    }
    assert_eq!(cluster.metric("baton_trace_spans_total", "outcome=\"dropped\"").await, 0.0);
    let all = collector.spans.lock().expect("unpoisoned");
    assert!(!all.iter().any(|(_, span)| span["name"].as_str().is_some_and(|name| name.contains("/metrics"))));
}

/// A node that dies shows as a failed attempt, a migration and another attempt, in the same trace.
#[tokio::test]
async fn a_migration_is_part_of_the_trace() {
    let collector = Collector::new();
    let cluster = Cluster::up(&["--tp=1", &format!("--otlp-endpoint={}", collector.url)]).await;
    let body = json!({"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": true, "temperature": 0});
    let mut stream = cluster.complete_begin(&body).await;
    stream.next().await.expect("a token");
    cluster.kill("decode-0.0");
    while stream.next().await.is_some() {}
    let find = |name: &str| {
        let all = collector.spans.lock().expect("unpoisoned").clone();
        all.into_iter().filter(|(_, span)| span["name"] == name).map(|(_, span)| span).collect::<Vec<_>>()
    };
    let begun = std::time::Instant::now();
    while find("generate").is_empty() {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(LOOK).await;
    }
    let (generate, attempts, migrations) = (find("generate"), find("attempt"), find("migration"));
    assert!(!migrations.is_empty() && attempts.len() > migrations.len(), "{attempts:?} {migrations:?}");
    for span in attempts.iter().chain(&migrations) {
        assert_eq!(span["parentSpanId"], generate[0]["spanId"]);
    }
    assert!(attempts.iter().any(|span| span["status"]["code"] == 2), "{attempts:?}");
}
