//! What every object of one response carries: its id, when it was made, and by which model.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::answer::Usage;
use super::choice::End;

/// What makes the same request with the same seed give the same answer, as far as clients are told.
pub const FINGERPRINT: &str = concat!("fp_baton_", env!("CARGO_PKG_VERSION"));

/// Identity of one response.
#[derive(Debug, Clone)]
pub struct Head {
    /// `chatcmpl-...`, `cmpl-...`, `resp_...` or `msg_...`, unique.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served name.
    pub model: Arc<str>,
    /// Of chats whose request names one.
    pub service_tier: Option<&'static str>,
}

impl Head {
    /// `prefix`: what the id begins with, such as `chatcmpl-`. `random`: 128 bits that nobody else has.
    pub fn new(prefix: &str, random: u128, now: SystemTime, model: Arc<str>) -> Self {
        let created = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { id: format!("{prefix}{random:032x}"), created, model, service_tier: None }
    }

    /// The id without its prefix.
    pub fn suffix(&self) -> &str {
        self.id.rsplit(['-', '_']).next().unwrap_or(&self.id)
    }

    /// A complete response.
    pub fn object(&self, object: &str, choices: Vec<Value>, usage: Usage) -> Value {
        let mut whole = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": &*self.model,
            "choices": choices,
            "usage": usage,
            "system_fingerprint": FINGERPRINT,
        });
        if let Some(tier) = self.service_tier {
            whole["service_tier"] = tier.into();
        }
        whole
    }
}

impl End {
    /// vLLM's `stop_reason`: the client's stop string or id.
    pub fn stop_reason(&self) -> Option<Value> {
        match self {
            End::StopString(text) => Some(text.as_str().into()),
            End::StopId(id) => Some((*id).into()),
            End::Stop | End::Length | End::ToolCalls => None,
        }
    }
}
