//! How every process serves gRPC: bound port, cluster token on every service, message limits, keepalive, bounded drain.
//!
//! Callers: the router and both node kinds.
//! `let listener = bind(addr).await?; serve(listener, &token, Routes::new(decode(service)), shutdown, drain).await?`

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::v1::cluster_server::{Cluster, ClusterServer};
use proto::v1::decode_server::{Decode, DecodeServer};
use proto::v1::prefill_server::{Prefill, PrefillServer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::auth::ClusterToken;
use crate::channel::{CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, STREAM_WINDOW_BYTES};
use crate::doorway;

/// Calls at once on one connection; the router's queue holds the rest.
const CALLS_PER_CONNECTION_MAX: u32 = 4096;

/// Why a port is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another process has the port.
    #[error("port taken: {address} is in use by another process")]
    Taken {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The system refuses the address otherwise.
    #[error("cannot listen on {address}: {error}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// This process's certificate cannot be used.
    #[error("TLS on {address}: {error}")]
    Tls {
        /// The address served.
        address: SocketAddr,
        /// What is wrong.
        error: rustls::Error,
    },
    /// The server broke while it ran.
    #[error("gRPC server on {address} failed: {error}")]
    Broken {
        /// The address served.
        address: SocketAddr,
        /// What it says.
        error: tonic::transport::Error,
    },
}

/// Takes a port; port 0 takes any, ask the listener which.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => ServeError::Taken { address },
        _ => ServeError::Bind { address, error },
    })
}

/// Serves `routes` until `shutdown`; then takes no new connection and returns when the last call has ended, after
/// `drain` at the latest. Every call needs the cluster token.
pub async fn serve(
    listener: TcpListener,
    token: &ClusterToken,
    routes: Routes,
    shutdown: CancellationToken,
    drain: Duration,
) -> Result<(), ServeError> {
    serve_open(listener, token, routes, Routes::default(), shutdown, drain).await
}

/// As [`serve`]; `open` is served to whoever reaches the port, token or not.
pub async fn serve_open(
    listener: TcpListener,
    token: &ClusterToken,
    routes: Routes,
    open: Routes,
    shutdown: CancellationToken,
    drain: Duration,
) -> Result<(), ServeError> {
    let address = listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
    let broken = |error| ServeError::Broken { address, error };
    let guarded = routes.into_axum_router().layer(InterceptorLayer::new(token.server()));
    // What neither knows is refused as everything is that carries no token.
    let open = open.into_axum_router().reset_fallback();
    let identity = token.identity().map(|identity| identity.server()).transpose();
    let identity = identity.map_err(|error| ServeError::Tls { address, error })?;
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(CALLS_PER_CONNECTION_MAX)
        .add_routes(open.merge(guarded).into());
    let server = async {
        let end = shutdown.clone().cancelled_owned();
        match identity {
            None => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                router.serve_with_incoming_shutdown(incoming, end).await
            }
            Some(config) => {
                let (acceptor, refusals) =
                    (TlsAcceptor::from(Arc::new(config)), Arc::clone(token.refusals()));
                let incoming = doorway::sealed(listener, acceptor, refusals, shutdown.clone());
                router.serve_with_incoming_shutdown(incoming, end).await
            }
        }
    };
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(drain).await;
    };
    tokio::select! {
        result = server => result.map_err(broken),
        () = overdue => {
            tracing::warn!(%address, ?drain, "calls still open at the end of the drain are dropped");
            Ok(())
        }
    }
}

/// A router's membership service with the limits of [`proto`].
pub fn cluster<T: Cluster>(service: T) -> ClusterServer<T> {
    ClusterServer::new(service)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

/// A prefill node's service with the limits of [`proto`].
pub fn prefill<T: Prefill>(service: T) -> PrefillServer<T> {
    PrefillServer::new(service)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

/// A decode group's service with the limits of [`proto`].
pub fn decode<T: Decode>(service: T) -> DecodeServer<T> {
    DecodeServer::new(service)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a taken port is named, so that the person at the terminal knows which.
    #[tokio::test]
    async fn a_taken_port_is_named() {
        let first = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = first.local_addr().unwrap();
        let error = bind(address).await.unwrap_err();
        assert_eq!(error.to_string(), format!("port taken: {address} is in use by another process"));
    }
}
