//! Who was turned away, on the metrics page: `baton_refused_total`, by door and reason.

use std::sync::Arc;

use cluster::Refusals;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

/// Reads the counts at every scrape.
#[derive(Debug)]
pub struct Refused(pub Arc<Refusals>);

#[derive(Debug, EncodeLabelSet)]
struct Labels {
    door: &'static str,
    reason: &'static str,
}

impl Collector for Refused {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let help = "Requests, calls and joins turned away, by door and reason";
        let mut family = encoder.encode_descriptor("baton_refused", help, None, MetricType::Counter)?;
        for (door, reason, count) in self.0.all() {
            let labels = Labels { door: door.as_str(), reason };
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
