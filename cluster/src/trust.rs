//! Who belongs to a cluster whose machines talk over a network that others use too.
//!
//! The first start makes a certificate authority, kept beside the router ([`Authority`]). A join token ([`JoinToken`]) carries
//! the fingerprint of that authority and a secret: a node knows the router by the one and shows the other, once per start, and
//! gets a certificate ([`enroll`]). From then on every gRPC connection is TLS with certificates of both ends ([`Identity`]);
//! nodes take calls from the router only.

mod authority;
mod enrolment;
mod identity;
mod join_token;
mod pinned;
mod private_file;
mod revocations;
mod standing;

pub use authority::{Authority, AuthorityError};
pub use enrolment::{EnrollError, Enrolment, enroll};
pub(crate) use identity::{Caller, REVOKED};
pub use identity::{Identity, bulk_provider};
pub use join_token::{JoinToken, JoinTokenError, TokenRecord, Tokens, token_name};
pub use revocations::Revocations;
pub(crate) use standing::TOKENS_AGE_MAX;

/// Name of the router in its certificate, whatever its address.
pub(crate) const ROUTER: &str = "router.baton.internal";

/// Name of every node in its certificate.
pub(crate) const NODE: &str = "node.baton.internal";

/// Behind the id of the join token by which a node came in.
pub(crate) const TOKEN_SUFFIX: &str = ".token.baton.internal";

/// Lowercase hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `N` bytes of lowercase or uppercase hex.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}
