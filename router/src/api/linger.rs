//! A connection whose request was answered before all of it had come is read on for a while before it is closed. Closed at
//! once, what still comes would be answered by the system with a reset, and a client that sends all before it reads would see
//! that in place of the refusal. Used by `server` around every connection.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::HttpBody;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, Request, header};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::{Service, service_fn};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// So much is read on at the most. What is larger still is no request that went wrong by accident.
const BYTES_MAX: u64 = 256 << 20;

/// And for so long.
const TIME_MAX: Duration = Duration::from_secs(30);

/// A client from which nothing comes for so long has had its time to read the answer.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Read at once.
const PIECE_BYTES: usize = 64 << 10;

/// Whether a request of a connection was answered before all of it had come.
#[derive(Debug, Clone, Default)]
pub struct Unread(Arc<AtomicBool>);

impl Unread {
    /// It was.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The service that tells it: `app`, but an answer to half of a request says that the connection ends with it.
    pub fn watch(
        &self,
        app: Router,
    ) -> impl Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send> {
        let app = TowerToHyperService::new(app);
        let unread = self.clone();
        service_fn(move |request: Request<Incoming>| {
            let unread = unread.clone();
            let watched = request.map(|body| Watched { body, ended: false, unread: unread.clone() });
            let response = app.call(watched);
            async move {
                let mut response = response.await?;
                if unread.is_set() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok(response)
            }
        })
    }
}

/// The body of a request; dropped before its end, it says so.
pub struct Watched {
    body: Incoming,
    ended: bool,
    unread: Unread,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            self.unread.0.store(true, Ordering::Relaxed);
        }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.ended = frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Says that no more will be sent, and reads on, within bounds, until the client closes.
pub async fn linger(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let read_on = async {
        _ = stream.shutdown().await;
        let (mut piece, mut left) = (vec![0; PIECE_BYTES], BYTES_MAX);
        while left > 0
            && let Ok(Ok(read @ 1..)) = timeout(SILENCE_MAX, stream.read(&mut piece)).await
        {
            left = left.saturating_sub(read as u64);
        }
    };
    _ = timeout(TIME_MAX, read_on).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// Protects: nobody holds a connection by sending on, fast or slowly, or by not closing it.
    #[tokio::test(start_paused = true)]
    async fn nobody_is_read_for_ever() {
        for (pause, piece, most) in [
            (Duration::from_secs(1), 1, TIME_MAX),
            (SILENCE_MAX * 2, 1, SILENCE_MAX),
            (Duration::ZERO, PIECE_BYTES, Duration::ZERO),
        ] {
            let (mut client, mut server) = duplex(PIECE_BYTES);
            let begun = Instant::now();
            let sender = tokio::spawn(async move {
                let mut sent = 0;
                loop {
                    sleep(pause).await;
                    match client.write_all(&vec![0; piece]).await {
                        Ok(()) => sent += piece as u64,
                        Err(_) => return sent,
                    }
                }
            });
            linger(&mut server).await;
            assert_eq!(begun.elapsed(), most, "{piece} bytes every {pause:?}");
            drop(server);
            let sent = sender.await.expect("the sender");
            assert!(sent <= BYTES_MAX + PIECE_BYTES as u64, "{sent} bytes");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_closes_is_waited_for_no_longer() {
        let (mut client, mut server) = duplex(PIECE_BYTES);
        let begun = Instant::now();
        let reader = tokio::spawn(async move {
            client.write_all(&[0; 3 * PIECE_BYTES]).await.expect("it is read on");
            assert_eq!(client.read(&mut [0]).await.expect("the end"), 0);
        });
        linger(&mut server).await;
        reader.await.expect("the reader");
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
