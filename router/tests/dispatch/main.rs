//! Dispatch against mock nodes over real sockets: where requests go, what clients see when nodes die, freeze, refuse.
//! Every answer is compared with the one that a single undisturbed model would have given.

mod losses;
mod mock;
mod room;
mod scores;
mod ways;

use std::sync::Arc;
use std::time::Duration;

use cluster::{ClusterService, ClusterToken, Members, MembershipConfig, Shutdown};
use futures::StreamExt;
use mock::{Fabric, Node, answer};
use proto::v1::Role;
use router::dispatch::counts::Cause;
use router::dispatch::{Dispatch, DispatchConfig};
use router::inference::{
    FinishReason, Finished, GenerateRequest, Inference, InferenceError, Load, Sampling, Score, Served,
    Started, TokenEvent, TokenStream,
};
use router::placement::Disaggregation;
use tokio::time::timeout;
use tonic::service::Routes;

/// Nothing here takes this long; it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    dispatch: Dispatch,
    members: Members,
    token: ClusterToken,
    router: std::net::SocketAddr,
    fabric: Arc<Fabric>,
    shutdown: Shutdown,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl World {
    async fn new(disaggregation: Disaggregation, change: impl FnOnce(&mut DispatchConfig)) -> World {
        let mut config = DispatchConfig { disaggregation, ..DispatchConfig::default() };
        change(&mut config);
        let token = ClusterToken::generate().unwrap();
        let members = Members::new(MembershipConfig {
            heartbeat: Duration::from_millis(20),
            lease: Duration::from_secs(2),
            ..MembershipConfig::default()
        });
        let listener = cluster::server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let router = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let dispatch = Dispatch::new(config, members.clone(), token.clone());
        let service = ClusterService::new(members.clone(), Arc::new(|| (0, 0)), shutdown.clone());
        let routes = Routes::new(cluster::server::cluster(service));
        let (serve_token, stop) = (token.clone(), shutdown.clone());
        tokio::spawn(async move {
            cluster::server::serve(listener, &serve_token, routes, stop, Duration::ZERO).await.unwrap();
        });
        let (leases, stop) = (members.clone(), shutdown.clone());
        tokio::spawn(async move { leases.expire_leases(stop).await });
        let (watcher, stop) = (dispatch.clone(), shutdown.clone());
        tokio::spawn(async move { watcher.watch(stop).await });
        World { dispatch, members, token, router, fabric: Arc::default(), shutdown }
    }

    /// A node that has joined and is ready.
    async fn node(&self, id: &str, role: Role) -> Node {
        let node = Node::start(id, role, self.router, &self.token, &self.token, &self.fabric);
        self.until_ready(id).await;
        node
    }

    async fn until_ready(&self, id: &str) {
        let mut changes = self.members.subscribe();
        let ready = changes.wait_for(|now| now.find(id).is_some_and(|member| member.ready()));
        timeout(PATIENCE, ready).await.expect("a ready node").unwrap();
    }

    /// Until the node's next report, and the one after: what a test changed in its script is known.
    async fn until_reported(&self, id: &str) {
        let reported = |now: &Arc<cluster::Snapshot>| now.find(id).map(|member| member.reported);
        let mut changes = self.members.subscribe();
        for _ in 0..2 {
            let before = reported(&changes.borrow_and_update());
            timeout(PATIENCE, changes.wait_for(|now| reported(now) > before))
                .await
                .expect("a report")
                .unwrap();
        }
    }

    fn ask(&self, request: &GenerateRequest) -> Client {
        Client {
            stream: self.dispatch.generate(request.clone()),
            scores: Vec::new(),
            seen: Vec::new(),
            started: None,
            served: None,
        }
    }

    fn migrations(&self) -> Vec<(Cause, u64)> {
        self.dispatch.counts().migrations().filter(|(_, count)| *count > 0).collect()
    }

    async fn until_idle(&self) {
        until("an idle router", || self.dispatch.load() == Load::default()).await;
    }
}

/// Looks again and again: for state that nobody announces.
async fn until(what: &str, mut wanted: impl FnMut() -> bool) {
    let look = async {
        while !wanted() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, look).await.expect(what);
}

/// A client that reads its stream.
struct Client {
    stream: TokenStream,
    /// Of the prompt, from position 1 on.
    scores: Vec<Score>,
    seen: Vec<u32>,
    started: Option<Started>,
    served: Option<Served>,
}

impl Client {
    /// Reads one event; tokens are checked for their index.
    async fn event(&mut self) -> Result<Option<Finished>, InferenceError> {
        match timeout(PATIENCE, self.stream.next())
            .await
            .expect("an event")
            .expect("no end without Finished")?
        {
            TokenEvent::Started(started) => {
                assert!(self.started.is_none() && self.seen.is_empty(), "started late or twice");
                self.started = Some(started);
                Ok(None)
            }
            TokenEvent::Scored(scores) => {
                assert!(self.started.is_some() && self.seen.is_empty(), "scores of the prompt out of place");
                self.scores.extend(scores);
                Ok(None)
            }
            TokenEvent::Served(served) => {
                self.served = Some(served);
                Ok(None)
            }
            TokenEvent::Token(token) => {
                assert!(self.started.is_some() && self.served.is_some(), "a token before its prompt");
                assert_eq!(token.index as usize, self.seen.len(), "an index missing or twice");
                self.seen.push(token.id);
                Ok(None)
            }
            TokenEvent::Finished(finished) => {
                assert_eq!(finished.output_tokens as usize, self.seen.len());
                assert!(self.stream.next().await.is_none(), "something after the end");
                Ok(Some(finished))
            }
        }
    }

    async fn tokens(&mut self, count: usize) {
        while self.seen.len() < count {
            assert_eq!(self.event().await, Ok(None));
        }
    }

    async fn rest(&mut self) -> Result<Finished, InferenceError> {
        loop {
            if let Some(finished) = self.event().await? {
                return Ok(finished);
            }
        }
    }

    /// Reads to the end and compares with the undisturbed answer. How it was served.
    async fn finish(mut self, request: &GenerateRequest) -> Served {
        assert_eq!(self.rest().await.unwrap().reason, FinishReason::Length);
        assert_eq!(self.seen, whole(request));
        self.served.unwrap()
    }
}

fn request(prompt: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        id: format!("request-{prompt}"),
        tokens: (0..prompt).map(|at| at * 7 + prompt).collect(),
        max_tokens,
        min_tokens: 0,
        stop_ids: vec![],
        ignore_eos: true,
        sampling: Sampling { seed: 42, ..Sampling::default() },
        prompt_logprobs: None,
        prediction: Default::default(),
        cache_salt: vec![],
        priority: 0,
        grammar: None,
        trace: Default::default(),
    }
}

fn whole(request: &GenerateRequest) -> Vec<u32> {
    answer(&request.tokens, request.sampling.seed, request.max_tokens as usize)
}
