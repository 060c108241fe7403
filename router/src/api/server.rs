//! Accepts connections and serves HTTP/1.1 on them, within bounds; at a shutdown lets running requests end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::config::Limits;
use super::linger::{Unread, linger};
use super::stall::Stalling;

/// After an error of `accept` that will pass (no more file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Between two lines about such errors.
const ACCEPT_SAID_EVERY: Duration = Duration::from_secs(10);

/// At a shutdown, how long a connection on which nothing has come yet is waited for: its request may be on its way.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// After the time to drain, running requests have this long to tell their clients that they are cut short.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Serves until `shutdown`, then waits for running requests, `limits.drain` at the longest; what runs still hears by `over` that
/// it must end, and is cut off if it does not. With `tls`, HTTPS.
pub async fn run(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    app: Router,
    limits: &Limits,
    shutdown: CancellationToken,
    over: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let connections = TaskTracker::new();
    let cut_off = CancellationToken::new();
    let mut said: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if said.is_none_or(|at| at.elapsed() >= ACCEPT_SAID_EVERY) {
                    said = Some(Instant::now());
                    tracing::warn!("cannot accept a connection, clients wait: {error}");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Tokens are small and must not wait for each other.
        _ = stream.set_nodelay(true);
        let ends = Ends { shutdown: shutdown.clone(), cut_off: cut_off.clone() };
        let (tls, app, limits) = (tls.clone(), app.clone(), limits.clone());
        connections.spawn(async move {
            let _place = place;
            let Some(tls) = tls else { return serve(stream, app, &limits, ends).await };
            // Whoever takes a place and says nothing loses it, as with a request's head.
            match timeout(limits.head_read, tls.accept(stream)).await {
                Ok(Ok(stream)) => serve(stream, app, &limits, ends).await,
                Ok(Err(error)) => tracing::debug!("no TLS: {error}"),
                Err(_) => tracing::debug!("no TLS in time"),
            }
        });
    }
    drop(listener);
    connections.close();
    if timeout(limits.drain, connections.wait()).await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "requests still run after the time to drain: cut short"
        );
        over.cancel();
        if timeout(LAST_WORD, connections.wait()).await.is_err() {
            cut_off.cancel();
            connections.wait().await;
        }
    }
}

/// When a connection ends.
struct Ends {
    /// After the request that runs.
    shutdown: CancellationToken,
    /// At once.
    cut_off: CancellationToken,
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, app: Router, limits: &Limits, ends: Ends) {
    let (heard, unread) = (CancellationToken::new(), Unread::default());
    let mut stream = Stalling::new(stream, limits.write_stall, heard.clone());
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_read)
        .max_buf_size(limits.head_bytes)
        .max_header_size(limits.head_bytes)
        .max_headers(limits.headers)
        .serve_connection(TokioIo::new(&mut stream), unread.watch(app));
    let mut connection = Box::pin(connection);
    // `graceful_shutdown` closes a connection that has said nothing at once.
    let last_call = async {
        ends.shutdown.cancelled().await;
        _ = timeout(FIRST_WORD, heard.cancelled()).await;
    };
    let result = tokio::select! {
        result = &mut connection => result,
        () = ends.cut_off.cancelled() => Ok(()),
        () = last_call => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                result = &mut connection => result,
                () = ends.cut_off.cancelled() => Ok(()),
            }
        }
    };
    drop(connection);
    if let Err(error) = &result {
        tracing::debug!("connection: {error}");
    }
    // A head that is none has been answered, too.
    if unread.is_set() || result.is_err_and(|error| error.is_parse()) {
        tokio::select! {
            () = linger(&mut stream) => {}
            () = ends.cut_off.cancelled() => {}
        }
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, Option<tokio::sync::OwnedSemaphorePermit>)> {
    // The semaphore is never closed.
    let place = Arc::clone(places).acquire_owned().await.ok();
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// A client's end of a connection that was accepted just before a shutdown.
    fn at_shutdown() -> DuplexStream {
        let (client, server) = duplex(4096);
        let ends = Ends { shutdown: CancellationToken::new(), cut_off: CancellationToken::new() };
        ends.shutdown.cancel();
        let app = Router::new().route("/", get(async || "here"));
        tokio::spawn(async move { serve(server, app, &Limits::for_context(0), ends).await });
        client
    }

    /// Protects: a request that is on its way on a new connection when the shutdown comes is answered.
    #[tokio::test(start_paused = true)]
    async fn the_first_request_of_a_connection_is_waited_for() {
        let mut client = at_shutdown();
        tokio::time::sleep(FIRST_WORD / 2).await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_stays_silent_does_not_hold_a_shutdown() {
        let (mut client, begun) = (at_shutdown(), Instant::now());
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(begun.elapsed(), FIRST_WORD);
    }
}
