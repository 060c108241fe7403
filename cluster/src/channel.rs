//! Channels to other processes of the cluster: the token in every call, dead peers noticed, messages bounded.
//!
//! Callers: [`crate::client`] (node to router), the router's dispatch (router to nodes), the binary's `status`.

use std::error::Error;
use std::time::Duration;

use proto::v1::cluster_client::ClusterClient;
use proto::v1::decode_client::DecodeClient;
use proto::v1::prefill_client::PrefillClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::auth::{ClientAuth, ClusterToken};
use crate::process::chain;

/// A channel that carries the cluster token.
pub type NodeChannel = InterceptedService<Channel, ClientAuth>;

/// A peer that does not take a connection for this long is not there.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// HTTP/2 pings go out this often, also on an idle connection: it survives hours, and a peer that vanished is noticed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// A ping without an answer for this long ends the connection and every call on it.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// HTTP/2 window of one call: a whole prompt of usual length without a round trip.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 512 << 10;

/// HTTP/2 window of a connection: answers that slow clients leave unread must not stop the other calls.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 256 * STREAM_WINDOW_BYTES;

/// Text that names no peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{address}` is not an address: wanted host:port or http://host:port")]
pub struct BadAddress {
    /// What was given.
    pub address: String,
}

/// A channel to `address` (`host:port`, or a URL with scheme http), over TLS where the token comes with a certificate. It
/// connects with the first call and again after each failure, so making one cannot fail for want of a peer. Must be called
/// within a tokio runtime.
pub fn connect_lazy(address: &str, token: &ClusterToken) -> Result<NodeChannel, BadAddress> {
    let endpoint = match token.identity() {
        None => endpoint(address, false)?,
        Some(identity) => identity
            .client(endpoint(address, true)?)
            .map_err(|_| BadAddress { address: address.to_string() })?,
    };
    Ok(InterceptedService::new(endpoint.connect_lazy(), token.client()))
}

/// How to reach `address`, as all processes do.
pub(crate) fn endpoint(address: &str, tls: bool) -> Result<Endpoint, BadAddress> {
    let bad = || BadAddress { address: address.to_string() };
    let host = match address.split_once("://") {
        None => address,
        Some(("http", host)) => host,
        Some(_) => return Err(bad()),
    };
    let url = format!("{}://{host}", if tls { "https" } else { "http" });
    let endpoint = Endpoint::from_shared(url).map_err(|_| bad())?;
    if endpoint.uri().port_u16().is_none() || endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(bad());
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

/// Why a router was not reached, in one line. Where something else answers, most likely its port for clients, that is said.
pub(crate) fn behind(error: &dyn Error) -> String {
    let text = chain(error);
    let other = ["http2 error", "received fatal alert: NoApplicationProtocol", "received corrupt message"];
    match other.iter().any(|part| text.contains(part)) {
        true => {
            format!("{text} (nodes join at the router's --cluster-bind, another port than that for clients)")
        }
        false => text,
    }
}

/// Client of a router's membership service, with the limits of [`proto`].
pub fn cluster_client(channel: NodeChannel) -> ClusterClient<NodeChannel> {
    ClusterClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

/// Client of a prefill node, with the limits of [`proto`].
pub fn prefill_client(channel: NodeChannel) -> PrefillClient<NodeChannel> {
    PrefillClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

/// Client of a decode group's leader, with the limits of [`proto`].
pub fn decode_client(channel: NodeChannel) -> DecodeClient<NodeChannel> {
    DecodeClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: addresses as people write them are taken, what names no port or another protocol is refused by name.
    #[tokio::test]
    async fn addresses_are_checked() {
        let token = ClusterToken::generate().unwrap();
        for good in ["127.0.0.1:7000", "mac.local:7000", "http://[::1]:7000", "[::1]:7000"] {
            assert!(connect_lazy(good, &token).is_ok(), "{good}");
        }
        for bad in ["", "mac.local", "https://mac.local:1", ":7000", "a b:1", "mac.local:99999"] {
            let error = connect_lazy(bad, &token).err().map(|error| error.to_string());
            assert_eq!(
                error,
                Some(format!("`{bad}` is not an address: wanted host:port or http://host:port")),
                "{bad}"
            );
        }
    }
}
