//! Dispatch and the cluster on the metrics page: placements, migrations, and what every node reported last.
//!
//! Caller: the gateway's registry, once at start-up; encoded at every scrape.

use std::fmt;
use std::sync::Arc;

use cluster::{Member, Members};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use proto::v1::Role;

use super::counts::Counts;

/// Reads the counters and the membership at every scrape.
pub struct ClusterMetrics {
    counts: Arc<Counts>,
    members: Members,
}

impl ClusterMetrics {
    /// Of these.
    pub fn new(counts: Arc<Counts>, members: Members) -> ClusterMetrics {
        ClusterMetrics { counts, members }
    }
}

impl fmt::Debug for ClusterMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterMetrics")
    }
}

#[derive(Debug, EncodeLabelSet)]
struct PlacementLabel {
    decision: &'static str,
    reason: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct CauseLabel {
    cause: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct RoleLabel {
    role: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct NodeLabel {
    node: String,
    role: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct BlocksLabel {
    node: String,
    role: &'static str,
    state: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct EngineLabel {
    model_name: String,
    engine: String,
}

#[derive(Debug, EncodeLabelSet)]
struct LinkLabel {
    node: String,
    peer: String,
}

impl Collector for ClusterMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let counts = &self.counts;
        counters(
            &mut encoder,
            "baton_placements",
            "Placements by who computes the prompt and why",
            counts.decisions().map(|(decision, reason, count)| {
                (PlacementLabel { decision: decision.as_str(), reason: reason.as_str() }, count)
            }),
        )?;
        counters(
            &mut encoder,
            "baton_migrations_by_cause",
            "Requests that went on elsewhere, or again, by cause",
            counts.migrations().map(|(cause, count)| (CauseLabel { cause: cause.as_str() }, count)),
        )?;
        counters(
            &mut encoder,
            "baton_refusals",
            "Calls that a node did not accept",
            [
                (RoleLabel { role: "prefill" }, counts.refusals_prefill()),
                (RoleLabel { role: "decode" }, counts.refusals_decode()),
            ]
            .into_iter(),
        )?;
        self.nodes(&mut encoder)
    }
}

impl ClusterMetrics {
    fn nodes(&self, encoder: &mut DescriptorEncoder) -> Result<(), fmt::Error> {
        let snapshot = self.members.snapshot();
        let each = |value: fn(&Member) -> f64| {
            snapshot.members.iter().map(move |member| {
                (NodeLabel { node: member.join.name.clone(), role: role(member) }, value(member))
            })
        };
        gauges(
            encoder,
            "baton_node_ready",
            "1: the node takes work",
            each(|m| f64::from(u8::from(m.ready()))),
        )?;
        gauges(
            encoder,
            "baton_node_running",
            "Sequences on the node",
            each(|m| f64::from(m.report.running)),
        )?;
        gauges(
            encoder,
            "baton_node_prefill_tokens_per_second",
            "Measured by the node, 0: not yet",
            each(|m| f64::from(m.report.prefill_tokens_per_s)),
        )?;
        gauges(
            encoder,
            "baton_node_decode_step_seconds",
            "Measured by the node, 0: not yet",
            each(|m| f64::from(m.report.decode_step_ms) / 1e3),
        )?;
        gauges(
            encoder,
            "baton_kv_audit_errors",
            "Times that an idle store's blocks did not add up; stays 0",
            each(|m| m.report.kv.as_ref().map_or(0.0, |kv| f64::from(kv.audit_errors))),
        )?;
        // vLLM's, of whatever holds a cache; `engine` is the node.
        let engines = || snapshot.members.iter().map(|member| (engine(member), member));
        let usage = engines().map(|(label, member)| {
            let kv = member.report.kv.unwrap_or_default();
            // What is only cached gives way to whoever needs room.
            let held = kv.total.saturating_sub(kv.free.saturating_add(kv.cached));
            (label, f64::from(held) / f64::from(kv.total.max(1)))
        });
        gauges(encoder, "vllm:kv_cache_usage_perc", "Share of the KV store that is in use; 1 is all", usage)?;
        let by_engine = |value: fn(&proto::v1::Counters) -> u64| {
            engines().map(move |(label, member)| (label, member.report.counters.as_ref().map_or(0, value)))
        };
        counters(
            encoder,
            "vllm:num_preemptions",
            "Sequences given up for want of room",
            by_engine(|c| c.preemptions),
        )?;
        counters(
            encoder,
            "vllm:spec_decode_num_drafts",
            "Times that tokens of a sequence were guessed ahead",
            by_engine(|c| c.drafts),
        )?;
        counters(
            encoder,
            "vllm:spec_decode_num_draft_tokens",
            "Tokens guessed ahead",
            by_engine(|c| c.draft_tokens),
        )?;
        counters(
            encoder,
            "vllm:spec_decode_num_accepted_tokens",
            "Of them, those that were drawn",
            by_engine(|c| c.accepted_tokens),
        )?;
        counters(
            encoder,
            "baton_draft_model_tokens",
            "Of the tokens guessed ahead, those of a draft model",
            by_engine(|c| c.model_draft_tokens),
        )?;
        counters(
            encoder,
            "baton_draft_model_accepted_tokens",
            "Of those, the ones that were drawn",
            by_engine(|c| c.model_accepted_tokens),
        )?;
        counters(
            encoder,
            "baton_draft_model_seconds",
            "Time that draft models have taken",
            by_engine(|c| c.model_draft_ms).map(|(label, ms)| (label, ms as f64 / 1e3)),
        )?;
        let bytes = snapshot.members.iter().map(|member| {
            let label = NodeLabel { node: member.join.name.clone(), role: role(member) };
            (label, member.report.counters.as_ref().map_or(0, |counters| counters.kv_bytes))
        });
        counters(encoder, "baton_node_kv_bytes", "KV payload that the node has sent or received", bytes)?;
        let of = |value: fn(&proto::v1::Counters) -> u64| {
            snapshot.members.iter().map(move |member| {
                let label = NodeLabel { node: member.join.name.clone(), role: role(member) };
                (label, member.report.counters.as_ref().map_or(0, value))
            })
        };
        counters(
            encoder,
            "baton_kv_resumed",
            "Connections of KV pushes lost and replaced",
            of(|c| c.kv_resumed),
        )?;
        counters(
            encoder,
            "baton_kv_fallbacks",
            "Of them, those by UCX, now over TCP",
            of(|c| c.kv_fallbacks),
        )?;
        counters(
            encoder,
            "baton_kv_silent",
            "Of them, those left since their path fell silent",
            of(|c| c.kv_silent),
        )?;
        counters(
            encoder,
            "baton_kv_gpudirect_bytes",
            "KV payload sent that receivers read out of a GPU's memory",
            of(|c| c.kv_gpudirect_bytes),
        )?;
        let blocks = snapshot.members.iter().flat_map(|member| {
            let kv = member.report.kv.unwrap_or_default();
            let states = [
                ("free", kv.free),
                ("used", kv.used),
                ("cached", kv.cached),
                ("reserved", kv.reserved),
                ("quarantined", kv.quarantined),
            ];
            states.map(|(state, blocks)| {
                let label = BlocksLabel { node: member.join.name.clone(), role: role(member), state };
                (label, f64::from(blocks))
            })
        });
        gauges(encoder, "baton_kv_blocks", "Blocks of the node's KV store by owner", blocks)?;
        let links = snapshot.members.iter().flat_map(|member| {
            member.report.links.iter().map(|link| {
                let label = LinkLabel { node: member.join.name.clone(), peer: link.peer.clone() };
                (label, f64::from(link.gbytes_per_s) * 1e9)
            })
        });
        gauges(encoder, "baton_link_bytes_per_second", "Measured rate of KV pushes", links)
    }
}

fn engine(member: &Member) -> EngineLabel {
    EngineLabel { model_name: member.join.model.clone(), engine: member.join.name.clone() }
}

fn role(member: &Member) -> &'static str {
    match member.role() {
        Role::Prefill => "prefill",
        _ => "decode",
    }
}

fn counters<L: EncodeLabelSet, N: EncodeCounterValue>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, N)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (label, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&label)?)?;
    }
    Ok(())
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, f64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (label, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&label)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cluster::MembershipConfig;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::dispatch::counts::Cause;

    /// Protects: the names that dashboards use, and that a label's count is its own.
    #[test]
    fn the_page() {
        let counts = Arc::new(Counts::default());
        counts.migrated(Cause::Preempted);
        let mut registry = Registry::default();
        let members = Members::new(MembershipConfig::default());
        registry.register_collector(Box::new(ClusterMetrics::new(counts, members)));
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        for line in [
            "baton_migrations_by_cause_total{cause=\"preempted\"} 1",
            "baton_migrations_by_cause_total{cause=\"session\"} 0",
            "baton_placements_total{decision=\"handoff\",reason=\"sooner\"} 0",
            "baton_refusals_total{role=\"decode\"} 0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
        }
    }
}
