//! `baton status`: the cluster as its router sees it.

use anyhow::{Context, Result};
use cluster::client::one_line;
use cluster::process::chain;
use proto::v1::{MemberStatus, NodeReport, Role, StatusReply, StatusRequest};
use serde_json::{Value, json};

use crate::config::{self, Entry, Flags, StatusSettings};
use crate::{dirs, links, print};

/// Which cluster, and how to show it.
#[derive(clap::Args)]
pub struct Args {
    /// The cluster of `baton up` on this port, when no token is given [default: 8000]
    #[arg(long, value_name = "PORT", default_value = "8000", hide_default_value = true)]
    up: u16,
    /// Everything, as JSON
    #[arg(long)]
    json: bool,
    /// The measured links between nodes, and what is wrong with them
    #[arg(long)]
    links: bool,
    #[command(flatten)]
    flags: Flags<StatusSettings>,
}

/// Asks the router and prints the answer.
pub async fn run(mut args: Args) -> Result<()> {
    let reply = ask(args.up, &mut args.flags).await?;
    if args.json {
        print(&format!("{:#}\n", json_of(&reply)));
    } else if args.links {
        print(&links::table_of(&reply));
    } else {
        print(&table_of(&reply));
    }
    Ok(())
}

/// What the router of the cluster says: the one of `baton up` on port `up` when no token is given.
pub async fn ask(up: u16, flags: &mut Flags<StatusSettings>) -> Result<StatusReply> {
    let mut settings: StatusSettings = config::load("status", flags)?;
    if settings.token.is_none() && settings.token_file.is_none() {
        let run_file = dirs::run_file(up)?;
        anyhow::ensure!(
            run_file.is_file(),
            "no `baton up` runs on port {}; for another cluster give --router and --token-file",
            up,
        );
        flags.config = Some(run_file);
        settings = config::load("status", flags)?;
    }
    let mut failed = Vec::new();
    for router in &settings.router {
        match ask_router(router, settings.entry()?).await {
            Ok(reply) => return Ok(reply),
            Err(error) => failed.push(chain(error.as_ref())),
        }
    }
    anyhow::bail!(failed.join("; "))
}

async fn ask_router(router: &str, entry: Entry) -> Result<StatusReply> {
    let token = match entry {
        Entry::Secret(secret) => secret,
        Entry::Join(token) => cluster::enroll(router, &token).await?,
    };
    let channel = cluster::connect_lazy(router, &token)?;
    let reply = cluster::channel::cluster_client(channel).status(StatusRequest {}).await;
    let reply = reply.map_err(|status| anyhow::anyhow!(one_line(&status)));
    Ok(reply.with_context(|| format!("router {router}"))?.into_inner())
}

fn table_of(reply: &StatusReply) -> String {
    let (running, queued) = (reply.requests_running, reply.requests_queued);
    let mut text = format!(
        "{} on baton {}; nodes: {}, requests running: {running}, queued: {queued}\n\n",
        reply.model,
        reply.version,
        reply.members.len()
    );
    let mut rows = vec![
        [
            "NODE",
            "ROLE",
            "STATE",
            "RANKS",
            "RUN",
            "WAIT",
            "KV BLOCKS",
            "EPOCH",
            "SPEED",
            "SEEN",
            "ADDRESS",
            "BACKEND",
        ]
        .map(str::to_owned),
    ];
    rows.extend(reply.members.iter().map(row));
    text.push_str(&aligned(&rows));

    let mut links = vec![["FROM", "TO", "GB/S", "SENT"].map(str::to_owned)];
    for member in &reply.members {
        let from = member.join.as_ref().map_or("", |join| &join.name);
        for link in member.report.iter().flat_map(|report| &report.links) {
            let rate = format!("{:.2}", link.gbytes_per_s);
            links.push([from.to_owned(), link.peer.clone(), rate, amount(link.bytes)]);
        }
    }
    if links.len() > 1 {
        text.push('\n');
        text.push_str(&aligned(&links));
    }
    text
}

fn row(member: &MemberStatus) -> [String; 12] {
    let join = member.join.clone().unwrap_or_default();
    let report = member.report.clone().unwrap_or_default();
    let kv = report.kv.unwrap_or_default();
    let blocks = format!("{} of {} free", kv.free + kv.cached, kv.total);
    [
        join.name.clone(),
        role(join.role()).into(),
        state(member.report.as_ref()).into(),
        join.ranks.to_string(),
        report.running.to_string(),
        report.waiting.to_string(),
        if kv.audit_errors == 0 { blocks } else { format!("{blocks}, {} AUDIT ERRORS", kv.audit_errors) },
        report.epoch.to_string(),
        speed(&report),
        format!("{:.1} s ago", member.reported_ms_ago as f64 / 1e3),
        join.grpc_address,
        join.backend,
    ]
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Unspecified => "?",
    }
}

fn state(report: Option<&NodeReport>) -> &'static str {
    match report {
        None => "joined",
        Some(report) if report.draining => "draining",
        Some(report) if report.ready => "ready",
        Some(_) => "loading",
    }
}

fn speed(report: &NodeReport) -> String {
    match (report.prefill_tokens_per_s, report.decode_step_ms) {
        (rate, _) if rate > 0.0 => format!("{rate:.0} tok/s"),
        (_, step) if step > 0.0 => format!("{step:.1} ms/step"),
        _ => "-".into(),
    }
}

/// Bytes for people.
pub fn amount(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.0} kB", b / 1e3),
    }
}

pub fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn json_of(reply: &StatusReply) -> Value {
    let member = |member: &MemberStatus| {
        let join = member.join.clone().unwrap_or_default();
        let report = member.report.clone().unwrap_or_default();
        let kv = report.kv.unwrap_or_default();
        let counters = report.counters.unwrap_or_default();
        let identity = join.identity.clone().unwrap_or_default();
        let links = report
            .links
            .iter()
            .map(|link| json!({
                "peer": link.peer, "gbytes_per_s": link.gbytes_per_s, "bytes": link.bytes,
                "rtt_us": link.rtt_us, "probed_gbytes_per_s": link.probed_gbytes_per_s, "skew_ms": link.skew_ms,
                "error": link.error, "striped": link.striped, "via": link.via, "faults": link.faults,
            }));
        json!({
            "name": join.name,
            "node_id": join.node_id,
            "role": role(join.role()),
            "state": state(member.report.as_ref()),
            "version": join.version,
            "model": join.model,
            "identity": { "graph": identity.graph, "vocab": identity.vocab, "weights": identity.weights },
            "ranks": join.ranks,
            "context_tokens": join.context_tokens,
            "backend": join.backend,
            "grpc_address": join.grpc_address,
            "kv_addresses": join.kv_addresses,
            "epoch": report.epoch,
            "running": report.running,
            "waiting": report.waiting,
            "waiting_tokens": report.waiting_tokens,
            "kv": {
                "block_tokens": kv.block_tokens, "total": kv.total, "free": kv.free, "used": kv.used,
                "cached": kv.cached, "reserved": kv.reserved, "quarantined": kv.quarantined,
                "audit_errors": kv.audit_errors,
            },
            "prefill_tokens_per_s": report.prefill_tokens_per_s,
            "decode_step_ms": report.decode_step_ms,
            "links": links.collect::<Vec<_>>(),
            "counters": {
                "requests": counters.requests, "prompt_tokens": counters.prompt_tokens,
                "generated_tokens": counters.generated_tokens, "cached_tokens": counters.cached_tokens,
                "kv_bytes": counters.kv_bytes, "preemptions": counters.preemptions,
                "failed_sessions": counters.failed_sessions,
                "kv_resumed": counters.kv_resumed, "kv_fallbacks": counters.kv_fallbacks,
                "kv_silent": counters.kv_silent, "kv_gpudirect_bytes": counters.kv_gpudirect_bytes,
                "drafts": counters.drafts, "draft_tokens": counters.draft_tokens,
                "accepted_tokens": counters.accepted_tokens,
                "model_draft_tokens": counters.model_draft_tokens,
                "model_accepted_tokens": counters.model_accepted_tokens,
                "model_draft_ms": counters.model_draft_ms,
            },
            "joined_ms_ago": member.joined_ms_ago,
            "reported_ms_ago": member.reported_ms_ago,
        })
    };
    json!({
        "model": reply.model,
        "version": reply.version,
        "requests_running": reply.requests_running,
        "requests_queued": reply.requests_queued,
        "nodes": reply.members.iter().map(member).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::{JoinRequest, KvBlocks, LinkReport};

    fn reply() -> StatusReply {
        let join = JoinRequest {
            name: "prefill-0".into(),
            role: Role::Prefill.into(),
            ranks: 1,
            grpc_address: "127.0.0.1:9".into(),
            backend: "cpu".into(),
            ..Default::default()
        };
        let report = NodeReport {
            ready: true,
            epoch: 3,
            running: 2,
            kv: Some(KvBlocks { total: 10, free: 4, cached: 3, used: 3, ..Default::default() }),
            prefill_tokens_per_s: 1234.4,
            links: vec![LinkReport {
                peer: "127.0.0.1:7".into(),
                gbytes_per_s: 1.17,
                bytes: 2_000_000_000,
                ..Default::default()
            }],
            ..Default::default()
        };
        let member = MemberStatus {
            join: Some(join),
            report: Some(report),
            reported_ms_ago: 400,
            ..Default::default()
        };
        StatusReply {
            members: vec![member],
            model: "demo".into(),
            version: "0.1.0".into(),
            ..Default::default()
        }
    }

    /// The table says what a person looks for: state, load, room (evictable blocks are room), speed, links.
    #[test]
    fn table() {
        assert_eq!(
            table_of(&reply()),
            "demo on baton 0.1.0; nodes: 1, requests running: 0, queued: 0\n\n\
             NODE       ROLE     STATE  RANKS  RUN  WAIT  KV BLOCKS     EPOCH  SPEED       SEEN       ADDRESS      BACKEND\n\
             prefill-0  prefill  ready  1      2    0     7 of 10 free  3      1234 tok/s  0.4 s ago  127.0.0.1:9  cpu\n\n\
             FROM       TO           GB/S  SENT\n\
             prefill-0  127.0.0.1:7  1.17  2.00 GB\n"
        );
    }

    /// Scripts read the same numbers by name.
    #[test]
    fn json() {
        let json = json_of(&reply());
        assert_eq!(json["nodes"][0]["kv"]["cached"], 3);
        assert_eq!(json["nodes"][0]["state"], "ready");
        assert_eq!(json["nodes"][0]["links"][0]["bytes"], 2_000_000_000u64);
    }
}
