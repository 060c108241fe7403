//! The prefill role: computes prompts, pushes their KV to a decode group layer by layer, samples the first token.
//! Called by the command line and by tests.

use cluster::server;
use cluster::traces::{Scope, Span, Tracer};
use engine::{Engine, Event, Events, Job};
use futures::stream::{self, BoxStream, StreamExt};
use node::{Grammars, NodeConfig, NodeError, convert};
use proto::v1::prefill_event::Event as Message;
use proto::v1::prefill_server::Prefill;
use proto::v1::{self, Role};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

/// Runs one rank of a prefill node until `shutdown` ends.
pub async fn serve(config: NodeConfig, shutdown: cluster::Shutdown) -> Result<(), NodeError> {
    let tracer = config.tracer.clone();
    node::run(config, Role::Prefill, shutdown, |engine, grammars| {
        Routes::new(server::prefill(Service { engine, grammars, tracer }))
    })
    .await
}

struct Service {
    engine: Engine,
    grammars: Grammars,
    tracer: Tracer,
}

#[tonic::async_trait]
impl Prefill for Service {
    type PrefillStream = BoxStream<'static, Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let mut trace = Trace::new(self.tracer.join(request.metadata(), "prefill node"));
        let message = request.into_inner();
        let sequence = self.grammars.request(message.sequence).await?;
        let handoff = message.handoff.map(convert::handoff).transpose()?;
        let job = Job::Prefill(sequence, handoff);
        let events = self.engine.submit(job).map_err(|refusal| {
            trace.node.fail(&refusal);
            convert::refusal_status(&refusal)
        })?;
        Ok(Response::new(stream(events, trace)))
    }

    async fn probe(&self, _: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeReply>, Status> {
        node::probe(&self.engine).await
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        node::drain(&self.engine)
    }
}

/// The spans of one call: its own, and that of what it does now.
struct Trace {
    node: Span,
    within: Scope,
    phase: Span,
}

impl Trace {
    fn new(node: Span) -> Trace {
        let within = node.scope();
        Trace { phase: within.span("wait"), node, within }
    }

    fn heard(&mut self, event: &Event) {
        match event {
            Event::Started { .. } => self.phase = self.within.span("compute"),
            Event::Token(_) => self.phase = self.within.span("push"),
            Event::Failed(error) => self.node.fail(error),
            Event::Preempted => self.node.fail("preempted"),
            Event::Pushed { .. } | Event::Finished { .. } => self.phase = Span::default(),
            Event::Admitted { .. }
            | Event::Landed { .. }
            | Event::FirstStep { .. }
            | Event::Scored { .. } => {}
        }
    }
}

/// What the router still needs of earlier events when a later one is reported.
#[derive(Default)]
struct Progress {
    cached_tokens: u32,
    started: Option<std::time::Instant>,
}

/// The events as messages. Dropping the stream drops `events`, which cancels the job.
fn stream(events: Events, trace: Trace) -> BoxStream<'static, Result<v1::PrefillEvent, Status>> {
    stream::unfold((events, Progress::default(), trace), |(mut events, mut progress, mut trace)| async {
        loop {
            let event = events.recv().await?;
            trace.heard(&event);
            if let Some(message) = progress.message(event) {
                return Some((message, (events, progress, trace)));
            }
        }
    })
    .boxed()
}

impl Progress {
    /// The message for `event`; `None` where the router needs none.
    fn message(&mut self, event: Event) -> Option<Result<v1::PrefillEvent, Status>> {
        let message = match event {
            Event::Started { queued, cached_tokens } => {
                self.cached_tokens = cached_tokens as u32;
                self.started = Some(std::time::Instant::now());
                Message::Started(v1::PrefillStarted { queued_us: convert::micros(queued) })
            }
            Event::Scored { start, scores } => Message::Scored(convert::scored_message(start, &scores)),
            Event::Token(token) => Message::First(v1::FirstToken {
                finish: convert::finish_message(token.finish),
                cached_tokens: self.cached_tokens,
                compute_us: self.started.map_or(0, |at| convert::micros(at.elapsed())),
                token: Some(convert::token_message(&token)),
            }),
            Event::Pushed { bytes, exposed, estimate, codec } => Message::Pushed(v1::Pushed {
                bytes,
                exposed_us: convert::micros(exposed),
                estimated_us: estimate.map_or(0, convert::micros),
                codec: codec.to_string(),
            }),
            Event::Failed(error) => return Some(Err(convert::error_status(&error))),
            Event::Preempted => {
                return Some(Err(Status::aborted("preempted: no room to compute the prompt")));
            }
            // Without a handoff the end of the stream says it.
            Event::Finished { .. }
            | Event::Admitted { .. }
            | Event::Landed { .. }
            | Event::FirstStep { .. } => return None,
        };
        Some(Ok(v1::PrefillEvent { event: Some(message) }))
    }
}
