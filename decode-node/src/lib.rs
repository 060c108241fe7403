//! The decode role: a group of tensor-parallel ranks that receives KV from prefill nodes and generates tokens.
//! Rank 0 serves [`Decode`] to the router; the other ranks only follow it. Called by the command line and by tests.

use cluster::server;
use cluster::traces::{Scope, Span, Tracer};
use engine::{Engine, Event, Events, Job};
use futures::stream::{self, BoxStream, StreamExt};
use node::{Grammars, NodeConfig, NodeError, convert};
use proto::v1::decode_server::Decode;
use proto::v1::{self, Role};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

/// Runs one rank of a decode group until `shutdown` ends.
pub async fn serve(config: NodeConfig, shutdown: cluster::Shutdown) -> Result<(), NodeError> {
    let tracer = config.tracer.clone();
    node::run(config, Role::Decode, shutdown, |engine, grammars| {
        Routes::new(server::decode(Service { engine, grammars, tracer }))
    })
    .await
}

struct Service {
    engine: Engine,
    grammars: Grammars,
    tracer: Tracer,
}

/// The spans of one call: its own, and that of what it does now.
struct Trace {
    node: Span,
    within: Scope,
    phase: Span,
    decodes: bool,
}

impl Trace {
    fn new(node: Span) -> Trace {
        let within = node.scope();
        Trace { phase: within.span("reserve"), node, within, decodes: false }
    }

    fn heard(&mut self, event: &Event) {
        match event {
            Event::Admitted { handoff, .. } => {
                self.phase = self.within.span(if handoff.is_some() { "land" } else { "compute" });
            }
            Event::Landed { .. } | Event::Token(_) if !self.decodes => {
                self.decodes = true;
                self.phase = self.within.span("decode");
            }
            Event::Failed(error) => self.node.fail(error),
            Event::Preempted => self.node.fail("preempted"),
            Event::Finished { .. } => self.phase = Span::default(),
            _ => {}
        }
    }
}

#[tonic::async_trait]
impl Decode for Service {
    type GenerateStream = BoxStream<'static, Result<v1::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut trace = Trace::new(self.tracer.join(request.metadata(), "decode node"));
        let message = request.into_inner();
        let sequence = self.grammars.request(message.sequence).await?;
        let job = if message.prefill_here { Job::Generate(sequence) } else { Job::Land(sequence) };
        let mut events = self.engine.submit(job).map_err(|refusal| {
            trace.node.fail(&refusal);
            convert::refusal_status(&refusal)
        })?;
        // A refusal is the call's status, not an event of its stream.
        let first = match events.recv().await {
            Some(Event::Failed(error)) => {
                trace.node.fail(&error);
                return Err(convert::error_status(&error));
            }
            Some(event) => event,
            None => return Err(Status::unavailable("engine stopped")),
        };
        trace.heard(&first);
        Ok(Response::new(stream(first, events, trace)))
    }

    async fn probe(&self, _: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeReply>, Status> {
        node::probe(&self.engine).await
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        node::drain(&self.engine)
    }
}

/// The events as messages. Dropping the stream drops `events`, which cancels the job.
fn stream(
    first: Event,
    events: Events,
    trace: Trace,
) -> BoxStream<'static, Result<v1::GenerateEvent, Status>> {
    let rest = stream::unfold((events, trace), |(mut events, mut trace)| async {
        let event = events.recv().await?;
        trace.heard(&event);
        Some((event, (events, trace)))
    });
    stream::once(async { first })
        .chain(rest)
        .filter_map(|event| async { convert::generate_event(event) })
        .boxed()
}
