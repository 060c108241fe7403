//! Rows of the table, each one run.

use anyhow::Result;
use serde::Serialize;

use super::children::Gateway;
use super::load::{self, Schedule};

/// One run of one gateway.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    round: usize,
    gateway: &'static str,
    /// Concurrent; 0: the run that counts CPU.
    streams: usize,
    failed: usize,
    /// Milliseconds after the schedule: median and 99th percentile, of first tokens and of all others.
    first_ms: Option<[f64; 2]>,
    others_ms: Option<[f64; 2]>,
    /// CPU seconds of the gateway's process.
    cpu_s: f64,
    /// Requests for a second of CPU.
    per_core_s: Option<f64>,
    /// Tokens for a second of CPU.
    tokens_per_core_s: Option<f64>,
}

impl Row {
    /// What requests cost.
    pub async fn cost(round: usize, gateway: &Gateway, requests: usize) -> Result<Row> {
        load::many(gateway.port, requests / 10 + 1).await?; // warm
        let before = gateway.cpu_s()?;
        load::many(gateway.port, requests).await?;
        let cpu_s = gateway.cpu_s()? - before;
        let per_core_s = Some(requests as f64 / cpu_s.max(0.01));
        Ok(Row { round, gateway: gateway.name, cpu_s, per_core_s, ..Row::default() })
    }

    /// How late tokens come.
    pub async fn latency(round: usize, gateway: &Gateway, schedule: Schedule) -> Result<Row> {
        let before = gateway.cpu_s()?;
        let mut late = load::streams(gateway.port, schedule).await;
        let cpu_s = gateway.cpu_s()? - before;
        let tokens = (late.first.len() + late.others.len()) as f64;
        Ok(Row {
            round,
            gateway: gateway.name,
            streams: schedule.streams,
            failed: late.failed,
            first_ms: quantiles(&mut late.first),
            others_ms: quantiles(&mut late.others),
            cpu_s,
            per_core_s: None,
            tokens_per_core_s: Some(tokens / cpu_s.max(0.01)),
        })
    }
}

fn quantiles(seconds: &mut [f64]) -> Option<[f64; 2]> {
    seconds.sort_by(f64::total_cmp);
    let at = |q: f64| seconds.get((seconds.len() as f64 * q) as usize).map(|s| s * 1e3);
    Some([at(0.5)?, at(0.99)?])
}

/// To standard output.
pub fn print(rows: &[Row], json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(rows)?);
        return Ok(());
    }
    println!(
        "| round | gateway | streams | first token late, ms: p50 / p99 | others late, ms: p50 / p99 | failed | CPU s | per core and second |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let pair = |pair: Option<[f64; 2]>| pair.map_or("-".into(), |[p50, p99]| format!("{p50:.2} / {p99:.2}"));
    for row in rows {
        let streams = if row.streams == 0 { "requests".into() } else { row.streams.to_string() };
        let rate = match (row.per_core_s, row.tokens_per_core_s) {
            (Some(requests), _) => format!("{requests:.0} requests"),
            (None, Some(tokens)) => format!("{tokens:.0} tokens"),
            (None, None) => "-".into(),
        };
        let (first, others) = (pair(row.first_ms), pair(row.others_ms));
        println!(
            "| {} | {} | {streams} | {first} | {others} | {} | {:.2} | {rate} |",
            row.round, row.gateway, row.failed, row.cpu_s
        );
    }
    Ok(())
}
