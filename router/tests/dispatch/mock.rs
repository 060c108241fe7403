//! Prefill and decode nodes without a model: real gRPC services on a port of their own, in a runtime of their own that
//! can be killed or frozen, joined to a real membership service. A token is a function of all tokens before it, so that
//! an answer which went on from a wrong place is a wrong answer.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use cluster::{ClusterToken, Shutdown};
use proto::v1::decode_server::Decode;
use proto::v1::generate_event::Event as DecodeEvent;
use proto::v1::prefill_event::Event as PrefillEvent;
use proto::v1::prefill_server::Prefill;
use proto::v1::{self, FinishReason, Role};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

/// The token that follows `tokens`.
pub fn next_token(tokens: &[u32], seed: u64) -> u32 {
    let mut hash = seed ^ 0xcbf2_9ce4_8422_2325;
    for &token in tokens {
        hash = (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
    }
    1000 + (hash >> 40) as u32 % 50_000
}

/// What the model answers: `count` tokens after `prompt`.
pub fn answer(prompt: &[u32], seed: u64, count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens, seed));
    }
    tokens.split_off(prompt.len())
}

/// How likely the model holds the token at `position` of a prompt, and `top` others.
pub fn score(position: u32, top: u32) -> (f32, u32, Vec<(u32, f32)>) {
    let logprob = -(position as f32) / 8.0;
    (logprob, position, (0..top).map(|id| (id, logprob)).collect())
}

/// Tokens of a prompt that are scored in one message.
const SCORED: u32 = 16;

/// The scores of a prompt as a node tells them; none where nobody asks.
fn scored(sequence: &v1::Sequence) -> impl Iterator<Item = v1::Scored> {
    let top = sequence.prompt_logprobs;
    let end = if top.is_some() { sequence.output_start } else { 1 };
    let one = move |position| {
        let (logprob, rank, top) = score(position, top.unwrap_or(0));
        let top = top.into_iter().map(|(id, logprob)| v1::TopLogprob { id, logprob }).collect();
        v1::Score { logprob, rank, top }
    };
    (1..end)
        .step_by(SCORED as usize)
        .map(move |start| v1::Scored { start, scores: (start..end.min(start + SCORED)).map(one).collect() })
}

/// A place where a node waits for permission to go on, one permit each time.
pub struct Gate(Semaphore);

impl Gate {
    fn open() -> Gate {
        Gate(Semaphore::new(Semaphore::MAX_PERMITS / 2))
    }

    /// From now on every pass needs a permit.
    pub fn close(&self) {
        self.0.forget_permits(Semaphore::MAX_PERMITS);
    }

    /// Lets `count` pass.
    pub fn permit(&self, count: usize) {
        self.0.add_permits(count);
    }

    async fn pass(&self) {
        if let Ok(permit) = self.0.acquire().await {
            permit.forget();
        }
    }
}

/// One call that a node has seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub request_id: String,
    pub attempt: u32,
    pub tokens: usize,
    pub output_start: u32,
    pub seed: u64,
    /// Of a decode group: it computes the prompt. Of a prefill node: there is no handoff.
    pub alone: bool,
    /// The prompt is to be scored.
    pub scores: bool,
}

/// What a node is told by its test, and tells it.
pub struct Script {
    pub calls: Mutex<Vec<Call>>,
    /// Calls open now.
    pub open: AtomicU32,
    /// Refuse so many calls with RESOURCE_EXHAUSTED.
    pub refuse_full: AtomicU32,
    /// Refuse all calls as invalid.
    pub invalid: AtomicBool,
    /// Prefill: before the first token is told. Decode: before each token.
    pub token: Gate,
    /// Before each message of a prompt's scores.
    pub scores: Gate,
    /// Scores nothing, whoever asks.
    pub mute: AtomicBool,
    /// Prefill: before the session is closed.
    pub push: Gate,
    /// Prefill: the session is closed before the first token is told.
    pub push_first: AtomicBool,
    /// Decode: give sequences up before this index, so many times.
    pub preempt: Mutex<(u32, u32)>,
    /// Joined, but takes no work.
    pub not_ready: AtomicBool,
    /// Every thread of the node stands still.
    pub frozen: AtomicBool,
    /// Measured rates and store, as reported.
    pub report: Mutex<v1::NodeReport>,
}

impl Script {
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.calls).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// What travels on a KV session's end.
struct Close {
    token: v1::Token,
    finish: FinishReason,
}

/// The KV wire of all nodes of a test: sessions wait here for their prefill node.
#[derive(Default)]
pub struct Fabric {
    sessions: Mutex<HashMap<String, oneshot::Sender<Close>>>,
    opened: AtomicU32,
}

/// A running node.
pub struct Node {
    pub script: Arc<Script>,
    runtime: Option<Runtime>,
    /// Ends with the node's membership task: an error is a refusal.
    pub joined: Option<tokio::task::JoinHandle<Result<(), cluster::JoinError>>>,
}

impl Node {
    /// Starts a node that joins `router` with `join_token` and serves with `serve_token`.
    pub fn start(
        id: &str,
        role: Role,
        router: SocketAddr,
        join_token: &ClusterToken,
        serve_token: &ClusterToken,
        fabric: &Arc<Fabric>,
    ) -> Node {
        let kv = v1::KvBlocks { block_tokens: 16, total: 10_000, free: 10_000, ..v1::KvBlocks::default() };
        let script = Arc::new(Script {
            calls: Mutex::default(),
            open: AtomicU32::new(0),
            refuse_full: AtomicU32::new(0),
            invalid: AtomicBool::new(false),
            token: Gate::open(),
            scores: Gate::open(),
            mute: AtomicBool::new(false),
            push: Gate::open(),
            push_first: AtomicBool::new(false),
            preempt: Mutex::new((0, 0)),
            not_ready: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            report: Mutex::new(v1::NodeReport { kv: Some(kv), ..v1::NodeReport::default() }),
        });
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let service = Service { script: script.clone(), fabric: fabric.clone() };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let serve_token = serve_token.clone();
        runtime.spawn(async move {
            let routes = match role {
                Role::Prefill => Routes::new(cluster::server::prefill(service)),
                _ => Routes::new(cluster::server::decode(service)),
            };
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            cluster::server::serve(listener, &serve_token, routes, Shutdown::new(), Duration::ZERO)
                .await
                .unwrap();
        });
        let (told, token) = (script.clone(), join_token.clone());
        let request = join_request(id, role, address);
        let joined = runtime.spawn(async move {
            let report = move || {
                while told.frozen.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                let ready = !told.not_ready.load(Ordering::SeqCst);
                v1::NodeReport { ready, ..lock(&told.report).clone() }
            };
            cluster::join(&router.to_string(), request, &token, report, |_| {}, Shutdown::new()).await
        });
        Node { script, runtime: Some(runtime), joined: Some(joined) }
    }

    /// As kill -9: every connection breaks, nothing is said.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.script.frozen.store(false, Ordering::SeqCst);
        self.kill();
    }
}

fn join_request(id: &str, role: Role, address: SocketAddr) -> v1::JoinRequest {
    let plane = v1::KvPlane {
        name: "k".into(),
        heads_total: 4,
        dim: 64,
        dtype: "bf16".into(),
        ..v1::KvPlane::default()
    };
    v1::JoinRequest {
        node_id: id.into(),
        name: id.into(),
        role: role.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: proto::PROTOCOL,
        model: "mock".into(),
        identity: Some(v1::Identity { graph: "g".into(), vocab: "v".into(), weights: "w".into() }),
        kv_spec: Some(v1::KvSpec { layers: 2, planes: vec![plane] }),
        grpc_address: address.to_string(),
        kv_addresses: vec![format!("kv-{id}")],
        ranks: 1,
        context_tokens: 4096,
        backend: "mock".into(),
        allow_mixed_weights: false,
    }
}

#[derive(Clone)]
struct Service {
    script: Arc<Script>,
    fabric: Arc<Fabric>,
}

/// A call that is open; counted while it lives.
struct Open(Arc<Script>);

impl Open {
    fn new(script: &Arc<Script>) -> Open {
        script.open.fetch_add(1, Ordering::SeqCst);
        Open(script.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

type Events<T> = mpsc::Sender<Result<T, Status>>;

impl Service {
    /// Checks and notes a call.
    fn accept(&self, sequence: Option<v1::Sequence>, alone: bool) -> Result<v1::Sequence, Status> {
        let sequence = sequence.ok_or_else(|| Status::invalid_argument("no sequence"))?;
        let script = &self.script;
        if script.invalid.load(Ordering::SeqCst) {
            return Err(Status::invalid_argument("the mock takes no such thing"));
        }
        lock(&script.calls).push(Call {
            request_id: sequence.request_id.clone(),
            attempt: sequence.attempt,
            tokens: sequence.tokens.len(),
            output_start: sequence.output_start,
            seed: sequence.sampling.as_ref().map_or(0, |sampling| sampling.seed),
            alone,
            scores: sequence.prompt_logprobs.is_some(),
        });
        let refuse = |count: u32| count.checked_sub(1);
        if script.refuse_full.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuse).is_ok() {
            return Err(Status::resource_exhausted("no room for KV now"));
        }
        Ok(sequence)
    }

    async fn generate_events(
        self,
        mut sequence: v1::Sequence,
        landing: Option<oneshot::Receiver<Close>>,
        events: Events<v1::GenerateEvent>,
    ) -> Result<(), Gone> {
        let seed = sequence.sampling.as_ref().map_or(0, |sampling| sampling.seed);
        let output = |sequence: &v1::Sequence| sequence.tokens.len() as u32 - sequence.output_start;
        if let Some(landing) = landing {
            let Ok(close) = landing.await else {
                let _ = events.send(Err(Status::aborted("kv session: sender lost"))).await;
                return Ok(());
            };
            say(&events, DecodeEvent::Landed(v1::Landed { bytes: 1, last_frame_to_ready_us: 1 })).await?;
            sequence.tokens.push(close.token.id);
            if close.finish != FinishReason::None {
                return say(&events, finished(close.finish, output(&sequence))).await;
            }
        } else {
            for scored in scored(&sequence) {
                say(&events, DecodeEvent::Scored(scored)).await?;
            }
        }
        let begin = output(&sequence);
        while output(&sequence) < sequence.max_tokens {
            let index = output(&sequence);
            let preempted = {
                let mut preempt = lock(&self.script.preempt);
                let now = preempt.0 == index && preempt.1 > 0;
                preempt.1 -= u32::from(now);
                now
            };
            if preempted {
                return say(&events, DecodeEvent::Preempted(v1::Preempted { reason: "no room".into() }))
                    .await;
            }
            self.script.token.pass().await;
            if index == begin {
                say(&events, DecodeEvent::FirstStep(v1::FirstStep { wait_us: 13, step_us: 17 })).await?;
            }
            let id = next_token(&sequence.tokens, seed);
            sequence.tokens.push(id);
            let token = v1::Token { index, id, logprob: None, top: vec![], predicted: false };
            say(&events, DecodeEvent::Tokens(v1::Tokens { tokens: vec![token] })).await?;
            if sequence.stop_ids.contains(&id) {
                return say(&events, finished(FinishReason::Stop, index + 1)).await;
            }
        }
        say(&events, finished(FinishReason::Length, output(&sequence))).await
    }

    async fn prefill_events(
        self,
        sequence: v1::Sequence,
        session: Option<oneshot::Sender<Close>>,
        events: Events<v1::PrefillEvent>,
    ) -> Result<(), Gone> {
        let tell = async |event: PrefillEvent| {
            events.send(Ok(v1::PrefillEvent { event: Some(event) })).await.map_err(|_| Gone)
        };
        tell(PrefillEvent::Started(v1::PrefillStarted { queued_us: 5 })).await?;
        for scored in scored(&sequence).filter(|_| !self.script.mute.load(Ordering::SeqCst)) {
            self.script.scores.pass().await;
            tell(PrefillEvent::Scored(scored)).await?;
        }
        let seed = sequence.sampling.as_ref().map_or(0, |sampling| sampling.seed);
        let index = sequence.tokens.len() as u32 - sequence.output_start;
        let id = next_token(&sequence.tokens, seed);
        let token = v1::Token { index, id, logprob: None, top: vec![], predicted: false };
        let finish = match sequence.stop_ids.contains(&id) {
            true => FinishReason::Stop,
            false if index + 1 == sequence.max_tokens => FinishReason::Length,
            false => FinishReason::None,
        };
        let close = Close { token: token.clone(), finish };
        let first = PrefillEvent::First(v1::FirstToken {
            token: Some(token),
            finish: finish.into(),
            cached_tokens: 3,
            compute_us: 7,
        });
        if self.script.push_first.load(Ordering::SeqCst) {
            if let Some(session) = session {
                let _ = session.send(close);
            }
            self.script.token.pass().await;
            tell(first).await?;
        } else {
            self.script.token.pass().await;
            tell(first).await?;
            let Some(session) = session else { return Ok(()) };
            self.script.push.pass().await;
            let _ = session.send(close);
        }
        tell(PrefillEvent::Pushed(v1::Pushed {
            bytes: 1,
            exposed_us: 11,
            estimated_us: 7,
            codec: "int8".into(),
        }))
        .await
    }
}

/// The caller has left.
struct Gone;

async fn say(events: &Events<v1::GenerateEvent>, event: DecodeEvent) -> Result<(), Gone> {
    events.send(Ok(v1::GenerateEvent { event: Some(event) })).await.map_err(|_| Gone)
}

fn finished(reason: FinishReason, output_tokens: u32) -> DecodeEvent {
    DecodeEvent::Finished(v1::Finished { reason: reason.into(), output_tokens })
}

/// Runs the work of a call until it is done or its caller leaves.
fn run<T: Send + 'static>(
    script: &Arc<Script>,
    events: Events<T>,
    work: impl Future<Output = Result<(), Gone>> + Send + 'static,
) {
    let open = Open::new(script);
    tokio::spawn(async move {
        let _open = open;
        tokio::select! {
            _ = work => {}
            () = events.closed() => {}
        }
    });
}

#[tonic::async_trait]
impl Decode for Service {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let sequence = self.accept(request.sequence, request.prefill_here)?;
        let (events, stream) = mpsc::channel(16);
        let mut landing = None;
        let mut handoff = None;
        if !request.prefill_here {
            let name = format!("session-{}", self.fabric.opened.fetch_add(1, Ordering::SeqCst));
            let (close, closed) = oneshot::channel();
            lock(&self.fabric.sessions).insert(name.clone(), close);
            landing = Some(closed);
            handoff = Some(v1::Handoff {
                ticket: vec![7; 32],
                session: name,
                token_end: sequence.tokens.len() as u32,
                deadline_ms: 10_000,
                ..v1::Handoff::default()
            });
        }
        let admitted = DecodeEvent::Admitted(v1::Admitted { cached_tokens: 2, handoff });
        let _ = say(&events, admitted).await;
        run(&self.script, events.clone(), self.clone().generate_events(sequence, landing, events));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn probe(&self, _: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeReply>, Status> {
        Ok(Response::new(v1::ProbeReply { step_us: 1 }))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        Ok(Response::new(v1::DrainReply { running: 0 }))
    }
}

#[tonic::async_trait]
impl Prefill for Service {
    type PrefillStream = ReceiverStream<Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let request = request.into_inner();
        let sequence = self.accept(request.sequence, request.handoff.is_none())?;
        let session = match request.handoff {
            Some(handoff) => {
                let session = lock(&self.fabric.sessions).remove(&handoff.session);
                Some(session.ok_or_else(|| Status::aborted("kv session: unknown"))?)
            }
            None => None,
        };
        let (events, stream) = mpsc::channel(16);
        run(&self.script, events.clone(), self.clone().prefill_events(sequence, session, events));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn probe(&self, _: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeReply>, Status> {
        Ok(Response::new(v1::ProbeReply { step_us: 1 }))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        Ok(Response::new(v1::DrainReply { running: 0 }))
    }
}
