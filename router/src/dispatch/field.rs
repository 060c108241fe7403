//! The cluster as placement sees it for one request: reports, this router's accounts and the prefix map put together.
//!
//! Caller: [`super::book`].

use std::sync::Arc;
use std::time::Instant;

use cluster::{Member, Snapshot};
use proto::v1::{KvPlane, KvSpec, Role};

use super::ledger::{Account, Ledger};
use super::prefix::{Holder, PrefixMap};
use crate::placement::{self, Ask, Candidate, Store, View};

/// Ready members in the order of a [`View`], with their names in the prefix map.
#[derive(Default)]
pub struct Field {
    /// What placement sees.
    pub view: View,
    /// Its prefill nodes.
    pub prefill: Vec<(Arc<Member>, Holder)>,
    /// Its decode groups.
    pub decode: Vec<(Arc<Member>, Holder)>,
}

impl Field {
    /// Of the members that take work. `blocks`: hashes of the request's whole blocks.
    pub fn new(
        snapshot: &Snapshot,
        ledger: &mut Ledger,
        prefixes: &PrefixMap,
        ask: Ask,
        blocks: &[u64],
        now: Instant,
    ) -> Field {
        let mut members: Vec<(&Arc<Member>, Account)> = Vec::new();
        for member in snapshot.members.iter().filter(|member| member.ready()) {
            let account = ledger.account(member, now);
            if !account.shunned {
                members.push((member, account));
            }
        }
        let holders: Vec<Holder> = members.iter().map(|(_, account)| account.holder).collect();
        let cached = prefixes.cached_tokens(&holders, blocks);
        let mut field = Field::default();
        for ((member, account), cached_tokens) in members.into_iter().zip(cached) {
            let candidate = candidate(member, &account, cached_tokens);
            match member.role() {
                Role::Decode => field.add_decode(member, candidate, account.holder),
                // A node whose whole store is too small for the prompt is no help.
                Role::Prefill
                    if candidate
                        .store
                        .is_none_or(|store| placement::blocks_for(ask.tokens, &store) <= store.total) =>
                {
                    field.add_prefill(member, candidate, account.holder);
                }
                _ => {}
            }
        }
        field.link();
        field
    }

    fn add_prefill(&mut self, member: &Arc<Member>, candidate: Candidate, holder: Holder) {
        self.prefill.push((member.clone(), holder));
        self.view.prefill.push(candidate);
    }

    fn add_decode(&mut self, member: &Arc<Member>, candidate: Candidate, holder: Holder) {
        self.decode.push((member.clone(), holder));
        self.view.decode.push(candidate);
        self.view.kv_bytes_per_token = member.join.kv_spec.as_ref().map_or(0.0, kv_bytes_per_token);
    }

    /// Finds the measured rate from each prefill node to each group, by the group's KV addresses. With several ranks
    /// the fastest counts: they share the sender's interface.
    fn link(&mut self) {
        for ((member, _), candidate) in self.prefill.iter().zip(&mut self.view.prefill) {
            for (index, (group, _)) in self.decode.iter().enumerate() {
                let rate = member
                    .report
                    .links
                    .iter()
                    .filter(|link| group.join.kv_addresses.contains(&link.peer))
                    .map(|link| f64::from(link.gbytes_per_s) * 1e9)
                    .fold(0.0, f64::max);
                if rate > 0.0 {
                    candidate.links.push((index, rate));
                }
            }
        }
    }
}

fn candidate(member: &Member, account: &Account, cached_tokens: u32) -> Candidate {
    let report = &member.report;
    let measured = |value: f32| (value.is_finite() && value > 0.0).then(|| f64::from(value));
    Candidate {
        cached_tokens,
        // The report knows what other routers gave, the account what this one gave since.
        queue_tokens: report.waiting_tokens.max(account.prompt_tokens),
        queue_prompts: report.waiting.max(account.prompts),
        rate: measured(report.prefill_tokens_per_s),
        streams: report.running.max(account.sequences),
        step_s: measured(report.decode_step_ms).map(|ms| ms / 1e3),
        store: report.kv.as_ref().filter(|kv| kv.total > 0 && kv.block_tokens > 0).map(|kv| Store {
            block_tokens: kv.block_tokens,
            total: kv.total,
            available: kv.free.saturating_add(kv.cached).saturating_sub(account.blocks_unreported),
        }),
        full: account.full,
        links: Vec::new(),
    }
}

fn kv_bytes_per_token(spec: &KvSpec) -> f64 {
    let plane_bytes = |plane: &KvPlane| {
        let value_bytes = if plane.dtype == "f32" { 4.0 } else { 2.0 };
        f64::from(plane.heads_total) * f64::from(plane.dim) * value_bytes
    };
    f64::from(spec.layers) * spec.planes.iter().map(plane_bytes).sum::<f64>()
}
