//! What a node tells the router of itself: once at join, then with every heartbeat.

use std::net::SocketAddr;

use engine::Engine;
use proto::v1::{Identity, JoinRequest, NodeReport, Role};

use crate::config::NodeConfig;
use crate::convert;
use crate::error::NodeError;
use crate::rank::Opened;

/// Random bytes of a node's id.
const ID_BYTES: usize = 8;

/// Who this node is; what only the loaded model tells (KV addresses, device) is still empty.
pub fn join_request(
    config: &NodeConfig,
    role: Role,
    opened: &Opened,
    grpc: SocketAddr,
) -> Result<JoinRequest, NodeError> {
    Ok(JoinRequest {
        node_id: node_id()?,
        name: config.name.clone(),
        role: role.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: proto::PROTOCOL,
        model: config.served_name.clone(),
        identity: Some(Identity {
            graph: opened.identity.graph.clone(),
            vocab: opened.identity.vocab.clone(),
            weights: opened.identity.weights.clone(),
        }),
        kv_spec: Some(convert::spec_message(&opened.kv_spec)),
        grpc_address: advertised(config, grpc)?,
        kv_addresses: Vec::new(),
        ranks: config.group.world as u32,
        context_tokens: opened.context_tokens,
        backend: String::new(),
        allow_mixed_weights: config.allow_mixed_weights,
    })
}

/// How the node is now.
pub fn heartbeat(engine: &Engine, sender: &kvtransfer::Sender) -> NodeReport {
    let links = sender.links().into_iter().map(convert::link_message).collect();
    NodeReport { links, ..convert::report_message(engine.report(), engine.ready(), engine.draining()) }
}

/// Where others reach `bound`. Errors for a wildcard address without a host to tell.
pub fn advertised(config: &NodeConfig, bound: SocketAddr) -> Result<String, NodeError> {
    match &config.advertise {
        Some(host) if host.contains(':') && !host.starts_with('[') => {
            Ok(format!("[{host}]:{}", bound.port()))
        }
        Some(host) => Ok(format!("{host}:{}", bound.port())),
        None if bound.ip().is_unspecified() => Err(NodeError::Advertise { bind: bound }),
        None => Ok(bound.to_string()),
    }
}

fn node_id() -> Result<String, NodeError> {
    let mut bytes = [0; ID_BYTES];
    getrandom::fill(&mut bytes).map_err(|e| NodeError::System {
        what: "random numbers",
        reason: std::io::Error::other(e.to_string()),
    })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
