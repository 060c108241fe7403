//! How a node gets its certificate: it knows the router by the fingerprint in its join token, shows the token, and is given a
//! certificate for its key and the cluster's secret. The router's end is [`Enrolment`], the node's [`enroll`].

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::v1::enrolment_client::EnrolmentClient;
use proto::v1::enrolment_server::{Enrolment as Service, EnrolmentServer};
use proto::v1::{EnrollReply, EnrollRequest};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use tonic::transport::ClientTlsConfig;
use tonic::{Code, Request, Response, Status};

use super::pinned::Pinned;
use super::{Authority, Identity, JoinToken, ROUTER, Tokens};
use crate::auth::ClusterToken;
use crate::channel::{BadAddress, CONNECT_TIMEOUT, behind, endpoint};
use crate::refusals::{Door, Refusals};

/// A router that answers takes no longer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Messages of this service are small; whoever sends more has no certificate and is not heard.
const MESSAGE_BYTES_MAX: usize = 16 << 10;

/// The router's end.
pub struct Enrolment {
    authority: Arc<Authority>,
    refusals: Arc<Refusals>,
}

impl Enrolment {
    /// Lets in whoever has a token of `authority`'s cluster, and counts the others.
    pub fn service(authority: Arc<Authority>, refusals: Arc<Refusals>) -> EnrolmentServer<Enrolment> {
        EnrolmentServer::new(Enrolment { authority, refusals }).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }
}

#[tonic::async_trait]
impl Service for Enrolment {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollReply>, Status> {
        let request = request.into_inner();
        let authority = Arc::clone(&self.authority);
        let enrolled = tokio::task::spawn_blocking(move || admit(&authority, &request)).await;
        if let Ok(Err(status)) = &enrolled
            && status.code() == Code::Unauthenticated
        {
            self.refusals.count(Door::Join, "join token");
        }
        enrolled.unwrap_or_else(|_| Err(Status::internal("the router failed"))).map(Response::new)
    }
}

fn admit(authority: &Authority, request: &EnrollRequest) -> Result<EnrollReply, Status> {
    let refused = || Status::unauthenticated("wrong join token, or one that has expired or was revoked");
    let token: JoinToken = request.join_token.parse().map_err(|_| refused())?;
    let tokens = Tokens::read(authority.folder()).map_err(|error| {
        tracing::error!("{error}");
        Status::unavailable("the router cannot read its join tokens")
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let Some(record) = tokens.admits(&token, now) else {
        tracing::warn!("a node was refused: wrong join token, or one that has expired or was revoked");
        return Err(refused());
    };
    let certificate = authority
        .certify(&record.id, &request.public_key)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    tracing::info!("certificate for a node by join token {} ({})", record.name, record.id);
    Ok(EnrollReply {
        certificate,
        authority: authority.certificate().into(),
        cluster_secret: authority.secret().expose().into(),
    })
}

/// Why a node got no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The address of the router is no address.
    #[error("router address: {0}")]
    Address(#[from] BadAddress),
    /// Worth another attempt: nobody answers.
    #[error("router {router}: {reason}")]
    Away {
        /// Address of the router.
        router: String,
        /// What the connection ended with.
        reason: String,
    },
    /// The router, or whoever answers in its place, says no.
    #[error("router {router} refused this node: {reason}")]
    Refused {
        /// Address of the router.
        router: String,
        /// What it said.
        reason: String,
    },
    /// Someone answers whom the cluster's authority does not know.
    #[error("router {router} is not the one of this join token: its certificate is of another cluster")]
    Stranger {
        /// Address of the router.
        router: String,
    },
    /// This machine cannot make a key.
    #[error("cannot make a key: {0}")]
    Key(String),
}

/// Shows `token` to the router at `router` and returns what the node is part of the cluster by. One attempt.
pub async fn enroll(router: &str, token: &JoinToken) -> Result<ClusterToken, EnrollError> {
    let away = |reason: String| EnrollError::Away { router: router.into(), reason };
    let refused = |reason: String| EnrollError::Refused { router: router.into(), reason };
    let key = KeyPair::generate().map_err(|error| EnrollError::Key(error.to_string()))?;
    let tls = ClientTlsConfig::new().domain_name(ROUTER).timeout(CONNECT_TIMEOUT);
    let endpoint = endpoint(router, true)?
        .tls_config_with_verifier(tls, Pinned::new(token.authority))
        .map_err(|error| away(error.to_string()))?;
    let channel = match tokio::time::timeout(TIMEOUT, endpoint.connect()).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => {
            let reason = behind(&error);
            return Err(match reason.contains("UnknownIssuer") {
                true => EnrollError::Stranger { router: router.into() },
                false => away(reason),
            });
        }
        Err(_) => return Err(away("no connection in time".into())),
    };
    let mut client = EnrolmentClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = EnrollRequest { join_token: token.expose(), public_key: key.public_key_raw().to_vec() };
    let reply = match tokio::time::timeout(TIMEOUT, client.enroll(request)).await {
        Ok(Ok(reply)) => reply.into_inner(),
        Ok(Err(status)) if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal) => {
            return Err(away(status.message().into()));
        }
        Ok(Err(status)) => return Err(refused(status.message().into())),
        Err(_) => return Err(away("no answer in time".into())),
    };
    let authority = CertificateDer::from_pem_slice(reply.authority.as_bytes());
    let is_ours = authority.is_ok_and(|cert| <[u8; 32]>::from(Sha256::digest(&cert)) == token.authority);
    if !is_ours {
        return Err(EnrollError::Stranger { router: router.into() });
    }
    let secret = ClusterToken::parse(&reply.cluster_secret).map_err(|error| refused(error.to_string()))?;
    let identity = Identity::node(reply.certificate, reply.authority, key.serialize_pem());
    Ok(secret.with_identity(Arc::new(identity)))
}
