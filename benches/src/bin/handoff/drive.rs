//! The router's part of the measured cluster: nodes join it, and it asks its own dispatch for answers, by turns handed
//! over and local. The clock is here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster::{ClusterService, Members, MembershipConfig, Shutdown, process, server};
use futures::StreamExt;
use proto::v1::Role;
use router::dispatch::{Dispatch, DispatchConfig};
use router::inference::{Decision, GenerateRequest, Inference, Sampling, Served, TokenEvent};
use router::placement::Disaggregation;
use serde::{Deserialize, Serialize};
use tonic::service::Routes;

use crate::children::{SERVED, token};

/// Loading weights and computing the warm-up must end within this.
const PATIENCE: Duration = Duration::from_secs(540);

/// What to measure.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub bind: String,
    pub model: PathBuf,
    pub prompt: u32,
    pub output: u32,
    pub runs: usize,
    pub link: String,
    pub link_bytes_per_s: Option<f64>,
}

/// What was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Driven {
    pub link: String,
    pub link_bytes_per_s: Option<f64>,
    /// KV payload bytes of one handoff, as the prefill node counted them.
    pub kv_bytes: u64,
    /// KV bytes of one token over all layers, from the model's shape.
    pub token_bytes: u64,
    /// Rate of pushes while bytes were on the wire, as the prefill node measured it, summed over decode ranks.
    pub wire_gbytes_per_s: f64,
    pub nodes: Vec<String>,
    pub handoff: Vec<Run>,
    pub local: Vec<Run>,
}

/// One answer; milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Run {
    pub ttft: f64,
    pub queue: f64,
    pub admission: f64,
    pub prefill: f64,
    pub second_token: f64,
    pub exposed: f64,
    pub step_wait: f64,
    pub first_step: f64,
    /// From the second token to the last, per token.
    pub per_token: f64,
}

/// Serves the nodes, measures, prints a [`Driven`] as JSON.
pub async fn child(plan: &str) -> Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("plan")?;
    process::init_logs(process::LogFormat::Human, "warn")?;
    let token = token()?;
    let behind = Shutdown::new();
    let members =
        Members::new(MembershipConfig { model: Some(SERVED.into()), ..MembershipConfig::default() });
    let listener = server::bind(plan.bind.parse().context("bind")?).await?;
    let service = ClusterService::new(members.clone(), Arc::new(|| (0, 0)), behind.clone());
    let routes = Routes::new(server::cluster(service));
    let dispatch = |disaggregation| {
        let config = DispatchConfig { disaggregation, start_within: PATIENCE, ..DispatchConfig::default() };
        Dispatch::new(config, members.clone(), token.clone())
    };
    let (handed, local) = (dispatch(Disaggregation::Always), dispatch(Disaggregation::Never));
    for dispatch in [handed.clone(), local.clone()] {
        let behind = behind.clone();
        tokio::spawn(async move { dispatch.watch(behind).await });
    }
    let serving = {
        let (token, behind) = (token.clone(), behind.clone());
        tokio::spawn(
            async move { server::serve(listener, &token, routes, behind, Duration::from_secs(1)).await },
        )
    };
    let driven = measure(&plan, &members, &handed, &local).await;
    behind.cancel();
    serving.await.context("membership service")??;
    println!("{}", serde_json::to_string(&driven?)?);
    Ok(())
}

async fn measure(plan: &Plan, members: &Members, handed: &Dispatch, local: &Dispatch) -> Result<Driven> {
    ready(members).await?;
    eprintln!("handoff: the nodes are ready; a warm-up of each kind");
    let mut prompts = Prompts { vocab: vocabulary(plan)?, state: 1 };
    answer(plan, handed, &mut prompts, Decision::Handoff).await?;
    answer(plan, local, &mut prompts, Decision::Local).await?;
    let shape = members.snapshot().of(Role::Prefill).next().and_then(|member| member.join.kv_spec.clone());
    let shape = shape.context("the prefill node left")?;
    let token_bytes = node::convert::spec(shape)?.token_bytes() as u64;
    let per_handoff = token_bytes * u64::from(plan.prompt);
    arrived(members, per_handoff).await?;
    let (mut handoffs, mut locals) = (Vec::new(), Vec::new());
    for run in 1..=plan.runs {
        handoffs.push(answer(plan, handed, &mut prompts, Decision::Handoff).await?);
        locals.push(answer(plan, local, &mut prompts, Decision::Local).await?);
        let (h, l) = (&handoffs[run - 1], &locals[run - 1]);
        eprintln!(
            "handoff: run {run} of {}: TTFT {:.0} ms handed over, {:.0} ms local; {:.2} and {:.2} ms per token",
            plan.runs, h.ttft, l.ttft, h.per_token, l.per_token
        );
    }
    // More than expected is a fault as well: the table shows what was counted beside what follows from the shape.
    arrived(members, per_handoff * (1 + plan.runs as u64)).await?;
    let kv_bytes = (sent(members) - per_handoff) / plan.runs as u64;
    let snapshot = members.snapshot();
    let rates =
        snapshot.of(Role::Prefill).flat_map(|m| m.report.links.iter().map(|l| f64::from(l.gbytes_per_s)));
    Ok(Driven {
        link: plan.link.clone(),
        link_bytes_per_s: plan.link_bytes_per_s,
        kv_bytes,
        token_bytes,
        wire_gbytes_per_s: rates.sum(),
        nodes: snapshot
            .members
            .iter()
            .map(|m| format!("{}: {}, tp {}", m.join.name, m.join.backend, m.join.ranks))
            .collect(),
        handoff: handoffs,
        local: locals,
    })
}

/// Waits for the heartbeat that counts `bytes` sent: it follows the last push by a moment.
async fn arrived(members: &Members, bytes: u64) -> Result<()> {
    let counted =
        within(Duration::from_secs(5), members, |members| (sent(members) >= bytes).then_some(())).await;
    if counted.is_err() {
        bail!("the prefill node counted {} bytes sent, expected {bytes}", sent(members));
    }
    Ok(())
}

/// KV bytes that prefill nodes report to have sent.
fn sent(members: &Members) -> u64 {
    let snapshot = members.snapshot();
    snapshot.of(Role::Prefill).filter_map(|m| m.report.counters).map(|c| c.kv_bytes).sum()
}

async fn ready(members: &Members) -> Result<()> {
    let both = |members: &Members| {
        let snapshot = members.snapshot();
        let ready = |role| snapshot.of(role).any(|member| member.ready());
        (ready(Role::Prefill) && ready(Role::Decode)).then_some(())
    };
    within(PATIENCE, members, both).await.context("the nodes did not become ready")
}

/// Waits until `found` finds something among the members.
async fn within<T>(most: Duration, members: &Members, found: impl Fn(&Members) -> Option<T>) -> Result<T> {
    let mut changes = members.subscribe();
    let look = async {
        loop {
            if let Some(found) = found(members) {
                return Ok(found);
            }
            changes.changed().await.context("membership ended")?;
        }
    };
    tokio::time::timeout(most, look).await.context("waited too long")?
}

/// One answer, timed. Errors when it went another way than asked.
async fn answer(plan: &Plan, dispatch: &Dispatch, prompts: &mut Prompts, way: Decision) -> Result<Run> {
    let request = GenerateRequest {
        id: format!("bench-{}", prompts.state),
        tokens: prompts.next(plan.prompt).into(),
        max_tokens: plan.output,
        min_tokens: 0,
        stop_ids: Vec::new(),
        ignore_eos: true,
        sampling: Sampling::default(),
        cache_salt: Vec::new(),
        priority: 0,
        grammar: None,
        prompt_logprobs: None,
        prediction: Default::default(),
        trace: Default::default(),
    };
    let begun = Instant::now();
    let mut events = dispatch.generate(request);
    let mut tokens = Vec::with_capacity(plan.output as usize);
    let mut served: Option<Served> = None;
    while let Some(event) = events.next().await {
        match event? {
            TokenEvent::Started(_) | TokenEvent::Scored(_) | TokenEvent::Finished(_) => {}
            TokenEvent::Token(_) => tokens.push(begun.elapsed()),
            TokenEvent::Served(how) => served = Some(how),
        }
    }
    let how = served.context("no answer")?;
    ensure!(how.decision == way, "asked for {}, got {}", way.as_str(), how.decision.as_str());
    ensure!(how.migrations == 0 && how.cached_tokens == 0, "{how:?}: not a clean run");
    ensure!(tokens.len() == plan.output as usize, "{} tokens of {}", tokens.len(), plan.output);
    let t = how.timings;
    let tail = tokens[tokens.len() - 1] - tokens[1];
    Ok(Run {
        ttft: ms(tokens[0]),
        queue: ms(t.queue),
        admission: ms(t.admission),
        prefill: ms(t.prefill),
        second_token: ms(tokens[1] - tokens[0]),
        exposed: ms(t.transfer_exposed),
        step_wait: ms(t.first_step_wait),
        first_step: ms(t.first_step),
        per_token: ms(tail) / (tokens.len() - 2) as f64,
    })
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Prompts of seeded random ids, no two alike, so that no cache helps.
struct Prompts {
    vocab: u64,
    state: u64,
}

impl Prompts {
    fn next(&mut self, tokens: u32) -> Vec<u32> {
        (0..tokens).map(|_| self.id()).collect()
    }

    fn id(&mut self) -> u32 {
        // splitmix64
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % self.vocab) as u32
    }
}

fn vocabulary(plan: &Plan) -> Result<u64> {
    let path = if plan.model.is_dir() { plan.model.join("config.json") } else { plan.model.clone() };
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let config: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    config["vocab_size"]
        .as_u64()
        .filter(|&n| n > 0)
        .with_context(|| format!("{}: no vocab_size", path.display()))
}
