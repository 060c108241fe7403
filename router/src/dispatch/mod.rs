//! Dispatch: the gateway's requests, served by prefill nodes and decode groups over gRPC. Implements [`Inference`].
//!
//! The way of a request: [`request`] keeps what the client was told; [`book`] queues it and grants it nodes (chosen by
//! `placement`, from reports, the [`ledger`] and the [`prefix`] map); [`attempt`] makes the calls; [`merge`] puts tokens
//! in order. The router alone retries: every failure after acceptance is a migration, counted by cause in [`counts`], shown
//! by [`collect`].

pub mod attempt;
pub mod book;
pub mod collect;
pub mod counts;
pub mod field;
pub mod ledger;
pub mod merge;
pub mod nodes;
pub mod prefix;
pub mod request;
pub mod spans;
pub mod wire;

use std::hash::RandomState;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cluster::{ClusterToken, Member, Members, Shutdown};
use futures::future::BoxFuture;
use futures::stream::Stream;
use prometheus_client::registry::Registry;
use proto::v1::{ProbeRequest, Role};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use self::book::Book;
use self::collect::ClusterMetrics;
use self::counts::Counts;
use self::nodes::{Nodes, one_line};
use crate::inference::{GenerateRequest, Inference, InferenceError, Load, TokenEvent, TokenStream};
use crate::placement::Disaggregation;

/// Events of one request that its client has not taken yet; then the request waits for the client.
const EVENTS_MAX: usize = 64;

/// Absent nodes are looked after this often, beside every change of membership.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Settings of dispatch.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchConfig {
    /// Whether prompts travel.
    pub disaggregation: Disaggregation,
    /// Requests in the queue at the most; the next is refused with advice when to come again.
    pub queue_max: usize,
    /// A request that no node has accepted within this is refused.
    pub queue_deadline: Duration,
    /// A decode group is asked for room only when a prefill node can start within this.
    pub start_within: Duration,
    /// A stream whose group is lost is held for this long.
    pub hold: Duration,
    /// After the start, requests wait so long for a decode group to join: nodes come back to a router that was restarted.
    pub start_grace: Duration,
    /// Migrations in a row that bring no token, before the request fails.
    pub migrations_without_token_max: u32,
    /// A node answers a request for room within this.
    pub admission_max: Duration,
    /// From acceptance to landing, a node says something within this: a long prompt on a slow machine fits in.
    pub prompt_silence_max: Duration,
    /// Between tokens, a group says something within this.
    pub token_silence_max: Duration,
    /// A probed node runs a step within this.
    pub probe_max: Duration,
}

impl Default for DispatchConfig {
    fn default() -> DispatchConfig {
        DispatchConfig {
            disaggregation: Disaggregation::Auto,
            queue_max: 1024,
            queue_deadline: Duration::from_secs(60),
            start_within: Duration::from_secs(2),
            hold: Duration::from_secs(60),
            start_grace: Duration::from_secs(10),
            migrations_without_token_max: 5,
            admission_max: Duration::from_secs(15),
            prompt_silence_max: Duration::from_secs(15 * 60),
            token_silence_max: Duration::from_secs(60),
            probe_max: Duration::from_secs(10),
        }
    }
}

/// What all requests share.
pub struct Shared {
    config: DispatchConfig,
    book: Arc<Book>,
    nodes: Nodes,
    counts: Arc<Counts>,
    members: Members,
    hash_keys: RandomState,
}

/// The cluster behind the gateway. Cheap to clone.
#[derive(Clone)]
pub struct Dispatch {
    shared: Arc<Shared>,
}

impl Dispatch {
    /// Over these members, whom it calls with `token`. [`Dispatch::watch`] must run beside it.
    pub fn new(config: DispatchConfig, members: Members, token: ClusterToken) -> Dispatch {
        let counts = Arc::new(Counts::default());
        let book = Arc::new(Book::new(config.clone(), members.clone(), counts.clone()));
        let nodes = Nodes::new(members.clone(), token);
        let hash_keys = RandomState::new();
        Dispatch { shared: Arc::new(Shared { config, book, nodes, counts, members, hash_keys }) }
    }

    /// Follows the membership until `shutdown`: places who waits, notices who departs. One task of the router.
    pub async fn watch(&self, shutdown: Shutdown) {
        let shared = &self.shared;
        let mut changes = shared.members.subscribe();
        let mut ticks = interval(WATCH_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
                // The sender is in the members that we hold.
                Ok(()) = changes.changed() => {}
            }
            shared.book.refresh();
            let snapshot = changes.borrow_and_update().clone();
            shared.nodes.watch(&snapshot, Instant::now());
        }
    }

    /// What was counted, for the metrics page.
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Who is in the cluster.
    pub fn members(&self) -> &Members {
        &self.shared.members
    }
}

impl Inference for Dispatch {
    fn generate(&self, request: GenerateRequest) -> TokenStream {
        let (out, events) = mpsc::channel(EVENTS_MAX);
        let driver = request::drive(self.shared.clone(), request, out);
        Box::pin(Driven { driver: Some(Box::pin(driver)), events })
    }

    fn health(&self) -> BoxFuture<'static, Result<(), String>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            let snapshot = shared.members.snapshot();
            let ready = |role| snapshot.of(role).find(|member| member.ready()).cloned();
            let decode = ready(Role::Decode).ok_or("no decode group is ready")?;
            let prefill = match shared.config.disaggregation {
                Disaggregation::Never => None,
                _ => ready(Role::Prefill),
            };
            let probed = async {
                match &prefill {
                    Some(prefill) => shared.probe(prefill).await,
                    None => Ok(()),
                }
            };
            tokio::try_join!(shared.probe(&decode), probed).map(|_| ())
        })
    }

    fn load(&self) -> Load {
        self.shared.book.load()
    }

    fn register(&self, registry: &mut Registry) {
        let (counts, members) = (self.shared.counts.clone(), self.shared.members.clone());
        registry.register_collector(Box::new(ClusterMetrics::new(counts, members)));
    }
}

impl Shared {
    /// Runs one engine step on the node.
    async fn probe(&self, member: &Arc<Member>) -> Result<(), String> {
        let role = match member.role() {
            Role::Prefill => "prefill",
            _ => "decode",
        };
        let call = async {
            match member.role() {
                Role::Prefill => self.nodes.prefill(member)?.probe(ProbeRequest {}).await,
                _ => self.nodes.decode(member)?.probe(ProbeRequest {}).await,
            }
        };
        match timeout(self.config.probe_max, call).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(format!("{role} cannot serve: {}", one_line(member, &status))),
            Err(_) => Err(format!(
                "{role} cannot serve: node {} ran no step within {:?}",
                member.join.name, self.config.probe_max
            )),
        }
    }
}

/// A request that runs while its client polls, and ends when the client drops it.
struct Driven {
    driver: Option<BoxFuture<'static, ()>>,
    events: mpsc::Receiver<Result<TokenEvent, InferenceError>>,
}

impl Stream for Driven {
    type Item = Result<TokenEvent, InferenceError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.driver.as_mut().is_some_and(|driver| driver.as_mut().poll(context).is_ready()) {
            self.driver = None;
        }
        // When the driver has ended, its sender is gone: what is left comes out, then the end.
        self.events.poll_recv(context)
    }
}
