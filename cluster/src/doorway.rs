//! The TLS handshake of those who come to a gRPC port, before tonic hears of them: bounded in number and time, and whoever is not
//! let in is counted. Used by [`crate::server`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::refusals::{Door, Refusals};

/// A peer that is not through its handshake by then is not heard.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes at once; further connections wait in the listener's queue.
const HANDSHAKES_MAX: usize = 64;
/// After an error of `accept` that will pass, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections to `listener` that are through TLS, until `shutdown`.
pub(crate) fn sealed(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    refusals: Arc<Refusals>,
    shutdown: CancellationToken,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (ready, come) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut handshakes = JoinSet::new();
        loop {
            while handshakes.len() >= HANDSHAKES_MAX {
                // How one ended is its own affair.
                _ = handshakes.join_next().await;
            }
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                () = ready.closed() => return,
                accepted = listener.accept() => accepted,
            };
            while handshakes.try_join_next().is_some() {}
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("gRPC: cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (acceptor, refusals, ready) = (acceptor.clone(), Arc::clone(&refusals), ready.clone());
            handshakes.spawn(async move {
                let handshake = async {
                    stream.set_nodelay(true)?;
                    acceptor.accept(stream).await
                };
                let silent = |_| Err(io::ErrorKind::TimedOut.into());
                match tokio::time::timeout(HANDSHAKE, handshake).await.unwrap_or_else(silent) {
                    // A server that ends takes nobody any more.
                    Ok(stream) => _ = ready.send(Ok(stream)).await,
                    Err(error) => refusals.handshake(Door::Grpc, &error),
                }
            });
        }
    });
    ReceiverStream::new(come)
}
