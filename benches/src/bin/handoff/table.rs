//! The figures as a table for people. Medians over the runs.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::args::Args;
use crate::drive::{Driven, Run};
use crate::gateway::GatewayTimes;

/// All that was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    pub model: String,
    pub dtype: String,
    pub prompt: u32,
    pub output: u32,
    pub chunk: usize,
    pub cluster: Driven,
    pub gateway: GatewayTimes,
    pub figures: Figures,
}

/// Derived figures: medians, in the units of their names.
#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    pub prefill_tokens_per_s: f64,
    pub exposed_ms: f64,
    /// Exposed transfer over bytes / link rate; `None` where the link's rate is not known.
    pub exposed_share: Option<f64>,
    pub decode_tokens_per_s_handoff: f64,
    pub decode_tokens_per_s_local: f64,
    /// Handoff over local.
    pub decode_ratio: f64,
}

impl Measured {
    pub fn new(args: &Args, cluster: Driven, gateway: GatewayTimes) -> Measured {
        let exposed_ms = median(&cluster.handoff, |run| run.exposed);
        let transfer = cluster.link_bytes_per_s.map(|rate| cluster.kv_bytes as f64 / rate * 1e3);
        let rate = |runs: &[Run]| 1e3 / median(runs, |run| run.per_token);
        let (handoff, local) = (rate(&cluster.handoff), rate(&cluster.local));
        let (model, dummy) = args.model();
        let weights = if dummy { ", random weights" } else { "" };
        Measured {
            model: format!("{}{weights}", model.display()),
            dtype: args.dtype.name().into(),
            prompt: args.prompt,
            output: args.output,
            chunk: args.chunk,
            figures: Figures {
                prefill_tokens_per_s: f64::from(args.prompt) / median(&cluster.handoff, |run| run.prefill)
                    * 1e3,
                exposed_ms,
                exposed_share: transfer.map(|ms| exposed_ms / ms),
                decode_tokens_per_s_handoff: handoff,
                decode_tokens_per_s_local: local,
                decode_ratio: handoff / local,
            },
            cluster,
            gateway,
        }
    }
}

/// The table.
pub fn render(m: &Measured) -> String {
    let mut out = String::new();
    let (c, f, g) = (&m.cluster, &m.figures, &m.gateway);
    let mid = |pick: fn(&Run) -> f64| median(&c.handoff, pick);
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<34} {value}");
    };
    line("model", format!("{}, {}", m.model, m.dtype));
    for node in &c.nodes {
        line("node", node.clone());
    }
    line("link", c.link.clone());
    let runs = c.handoff.len();
    line(
        "request",
        format!("{} tokens in chunks of {}, {} out; medians of {runs}", m.prompt, m.chunk, m.output),
    );
    line("", String::new());
    line("prefill", format!("{:.0} tok/s", f.prefill_tokens_per_s));
    let expected = u64::from(m.prompt) * c.token_bytes;
    line("KV bytes", format!("{} ({} tokens x {} B = {expected})", c.kv_bytes, m.prompt, c.token_bytes));
    line(
        "rate on the wire",
        format!("{:.2} GB/s, as the sender's socket took the bytes", c.wire_gbytes_per_s),
    );
    if let Some(rate) = c.link_bytes_per_s {
        line("bytes / link rate", format!("{:.1} ms", c.kv_bytes as f64 / rate * 1e3));
    }
    let share = f
        .exposed_share
        .map_or(String::new(), |share| format!(" = {:.1} % of bytes / link rate", share * 100.0));
    line("exposed transfer", format!("{:.2} ms{share}", f.exposed_ms));
    line("decode after a handoff", format!("{:.2} tok/s", f.decode_tokens_per_s_handoff));
    line(
        "decode after a local prefill",
        format!("{:.2} tok/s; ratio {:.3}", f.decode_tokens_per_s_local, f.decode_ratio),
    );
    line("", String::new());
    line(
        "time to first token",
        format!("{:.2} ms (local: {:.2} ms)", mid(|r| r.ttft), median(&c.local, |r| r.ttft)),
    );
    line("  queue", format!("{:.2} ms", mid(|r| r.queue)));
    line("  admission", format!("{:.2} ms", mid(|r| r.admission)));
    line("  prefill", format!("{:.2} ms", mid(|r| r.prefill)));
    line(
        "  tokenize (bundled tokenizer)",
        format!("{:.2} ms for {} tokens, not in the sum", g.tokenize, g.prompt),
    );
    line("first to second token", format!("{:.2} ms", mid(|r| r.second_token)));
    line("  exposed transfer", format!("{:.2} ms", mid(|r| r.exposed)));
    line("  wait for a step", format!("{:.2} ms", mid(|r| r.step_wait)));
    line("  first decode step", format!("{:.2} ms", mid(|r| r.first_step)));
    line("", String::new());
    let [p50, p99] = g.first_short;
    line(
        "router, short prompt, mock engine",
        format!("{p50:.2} ms to the first event (p99 {p99:.2}), HTTP and client included"),
    );
    let [p50, p99] = g.first;
    line(
        "router, this prompt, mock engine",
        format!("{p50:.2} ms to the first event (p99 {p99:.2}), tokenizing included"),
    );
    out
}

fn median(runs: &[Run], pick: impl Fn(&Run) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(pick).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
