//! Whether a node may join: versions, identities and KV specification compared, both values named in a refusal. Pure.
//!
//! Caller: [`crate::membership`].

use proto::v1::{Identity, JoinRequest, KvSpec, Role};

use crate::membership::MembershipConfig;
use crate::trust::REVOKED;

/// Layers of a model at the most; a join that claims more is nonsense.
const LAYERS_MAX: u32 = 4096;

/// Planes of one layer at the most.
const PLANES_MAX: usize = 16;

/// Tensor-parallel ranks of one group at the most.
const RANKS_MAX: u32 = 1024;

/// Characters of an id, a name or an address at the most.
pub const TEXT_CHARS_MAX: usize = 256;

/// KV addresses of one node at the most.
const KV_ADDRESSES_MAX: usize = 256;

/// Why a node is not let in. The node process ends with this message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A field that no node of this version sends so.
    #[error("join request of node {node}: {field} is {value}")]
    Invalid {
        /// Name of the node.
        node: String,
        /// Field of the request.
        field: &'static str,
        /// What is wrong with it.
        value: String,
    },
    /// The two sides differ.
    #[error(transparent)]
    Differs(Box<Difference>),
    /// The table is full.
    #[error("the cluster has {members} members, no room for node {node}")]
    Full {
        /// Name of the node.
        node: String,
        /// Members now.
        members: usize,
    },
    /// It came in by a token that was revoked since.
    #[error("{REVOKED}")]
    Revoked,
}

/// A value of the node that is not the cluster's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} of node {node} is {theirs}, {of} is {ours}{hint}")]
pub struct Difference {
    /// What was compared.
    pub what: String,
    /// Name of the node.
    pub node: String,
    /// The node's value.
    pub theirs: String,
    /// Whose value it is compared to: `the router's`, `the cluster's`.
    pub of: &'static str,
    /// That value.
    pub ours: String,
    /// What the user can do, or nothing.
    pub hint: &'static str,
}

/// Compares a node with the router's own settings and with `cluster`, the first of the present members, if there is one.
pub fn check(
    node: &JoinRequest,
    router: &MembershipConfig,
    cluster: Option<&JoinRequest>,
) -> Result<(), Refusal> {
    let same = |what: &str, theirs: &str, of, ours: &str, hint| match theirs == ours {
        true => Ok(()),
        false => Err(Refusal::Differs(Box::new(Difference {
            what: what.to_string(),
            node: display_name(node),
            theirs: shown(theirs),
            of,
            ours: shown(ours),
            hint,
        }))),
    };
    // Versions first: the fields of another protocol may not mean what they say.
    same("protocol", &node.protocol.to_string(), "the router's", &router.protocol.to_string(), SAME_VERSION)?;
    same("version", &node.version, "the router's", &router.version, SAME_VERSION)?;
    well_formed(node)?;
    let identity = identity(node);
    if let Some(model) = &router.model {
        same("model", &node.model, "the router's", model, "")?;
    }
    if let Some(vocab) = &router.vocab {
        same("vocab identity", &identity.vocab, "the router's tokenizer's", vocab, "")?;
    }
    let Some(cluster) = cluster else { return Ok(()) };
    let present = self::identity(cluster);
    same("model", &node.model, "the cluster's", &cluster.model, "")?;
    same("graph identity", &identity.graph, "the cluster's", &present.graph, "")?;
    same("vocab identity", &identity.vocab, "the cluster's", &present.vocab, "")?;
    if !(node.allow_mixed_weights || router.allow_mixed_weights) {
        same(
            "weights identity",
            &identity.weights,
            "the cluster's",
            &present.weights,
            " (--allow-mixed-weights permits it)",
        )?;
    }
    let (theirs, ours) = (spec(node), spec(cluster));
    same("kv layers", &theirs.layers.to_string(), "the cluster's", &ours.layers.to_string(), "")?;
    same("kv planes", &plane_names(theirs), "the cluster's", &plane_names(ours), "")?;
    for (plane, present) in theirs.planes.iter().zip(&ours.planes) {
        let of = |what: &str| format!("kv {what} of plane {}", plane.name);
        same(&of("dtype"), &plane.dtype, "the cluster's", &present.dtype, "")?;
        let shape = |p: &proto::v1::KvPlane| {
            format!(
                "{} heads x {}{}",
                p.heads_total,
                p.dim,
                if p.replicated { ", replicated" } else { ", by heads" }
            )
        };
        same(&of("shape"), &shape(plane), "the cluster's", &shape(present), "")?;
    }
    Ok(())
}

const SAME_VERSION: &str = " (run the same baton everywhere)";

fn well_formed(node: &JoinRequest) -> Result<(), Refusal> {
    let wrong = |field, value: &str| {
        Err(Refusal::Invalid { node: display_name(node), field, value: value.to_string() })
    };
    let texts = [
        ("node_id", &node.node_id),
        ("name", &node.name),
        ("model", &node.model),
        ("grpc_address", &node.grpc_address),
        ("identity.graph", &identity(node).graph),
        ("identity.vocab", &identity(node).vocab),
        ("identity.weights", &identity(node).weights),
    ];
    for (field, text) in texts {
        if text.is_empty() {
            return wrong(field, "empty");
        }
        if text.chars().count() > TEXT_CHARS_MAX {
            return wrong(field, "longer than 256 characters");
        }
    }
    if node.role() == Role::Unspecified {
        return wrong("role", "neither prefill nor decode");
    }
    if node.ranks == 0 || node.ranks > RANKS_MAX {
        return wrong("ranks", &node.ranks.to_string());
    }
    if node.context_tokens == 0 || node.context_tokens as usize > proto::SEQUENCE_TOKENS_MAX {
        return wrong("context_tokens", &node.context_tokens.to_string());
    }
    if node.kv_addresses.len() > KV_ADDRESSES_MAX {
        return wrong("kv_addresses", "a list of more than 256");
    }
    let spec = spec(node);
    if spec.layers == 0 || spec.layers > LAYERS_MAX {
        return wrong("kv_spec.layers", &spec.layers.to_string());
    }
    if spec.planes.is_empty() || spec.planes.len() > PLANES_MAX {
        return wrong("kv_spec.planes", &format!("a list of {}", spec.planes.len()));
    }
    Ok(())
}

static NO_IDENTITY: Identity =
    Identity { graph: String::new(), vocab: String::new(), weights: String::new() };
static NO_SPEC: KvSpec = KvSpec { layers: 0, planes: Vec::new() };

fn identity(node: &JoinRequest) -> &Identity {
    node.identity.as_ref().unwrap_or(&NO_IDENTITY)
}

fn spec(node: &JoinRequest) -> &KvSpec {
    node.kv_spec.as_ref().unwrap_or(&NO_SPEC)
}

fn plane_names(spec: &KvSpec) -> String {
    spec.planes.iter().map(|plane| plane.name.as_str()).collect::<Vec<_>>().join("+")
}

fn display_name(node: &JoinRequest) -> String {
    shown(if node.name.is_empty() { &node.node_id } else { &node.name })
}

/// Text of another machine, short and printable.
fn shown(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).take(TEXT_CHARS_MAX).collect();
    if clean.is_empty() { "(none)".to_string() } else { clean }
}

#[cfg(test)]
pub(crate) mod tests {
    use proto::v1::KvPlane;

    use super::*;

    /// A node as it should be: model `tiny`, identities g, v, w.
    pub(crate) fn node(id: &str, role: Role) -> JoinRequest {
        let plane = |name: &str| KvPlane {
            name: name.into(),
            heads_total: 4,
            dim: 64,
            dtype: "bf16".into(),
            replicated: false,
            head_start: 0,
            head_end: 4,
        };
        JoinRequest {
            node_id: id.into(),
            name: id.into(),
            role: role.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: proto::PROTOCOL,
            model: "tiny".into(),
            identity: Some(Identity { graph: "g".into(), vocab: "v".into(), weights: "w".into() }),
            kv_spec: Some(KvSpec { layers: 2, planes: vec![plane("k"), plane("v")] }),
            grpc_address: "127.0.0.1:1".into(),
            kv_addresses: vec!["127.0.0.1:2".into()],
            ranks: 1,
            context_tokens: 4096,
            backend: "cpu".into(),
            allow_mixed_weights: false,
        }
    }

    fn refused(change: impl Fn(&mut JoinRequest)) -> String {
        let first = node("d0", Role::Decode);
        let mut joining = node("p0", Role::Prefill);
        assert_eq!(check(&joining, &MembershipConfig::default(), Some(&first)), Ok(()));
        change(&mut joining);
        check(&joining, &MembershipConfig::default(), Some(&first)).unwrap_err().to_string()
    }

    /// Protects: every refusal names what differs and both values.
    #[test]
    fn both_values_are_named() {
        assert_eq!(
            refused(|node| node.protocol = 99),
            format!(
                "protocol of node p0 is 99, the router's is {} (run the same baton everywhere)",
                proto::PROTOCOL
            )
        );
        assert_eq!(
            refused(|node| node.version = "9.9.9".into()),
            "version of node p0 is 9.9.9, the router's is 0.1.0 (run the same baton everywhere)"
        );
        assert_eq!(
            refused(|node| node.model = "large".into()),
            "model of node p0 is large, the cluster's is tiny"
        );
        assert_eq!(
            refused(|node| node.identity.as_mut().unwrap().graph = "h".into()),
            "graph identity of node p0 is h, the cluster's is g"
        );
        assert_eq!(
            refused(|node| node.identity.as_mut().unwrap().vocab = "u".into()),
            "vocab identity of node p0 is u, the cluster's is v"
        );
        assert_eq!(
            refused(|node| node.identity.as_mut().unwrap().weights = "x".into()),
            "weights identity of node p0 is x, the cluster's is w (--allow-mixed-weights permits it)"
        );
        assert_eq!(
            refused(|node| node.kv_spec.as_mut().unwrap().layers = 3),
            "kv layers of node p0 is 3, the cluster's is 2"
        );
        assert_eq!(
            refused(|node| node.kv_spec.as_mut().unwrap().planes[1].dtype = "f32".into()),
            "kv dtype of plane v of node p0 is f32, the cluster's is bf16"
        );
        assert_eq!(
            refused(|node| node.kv_spec.as_mut().unwrap().planes[0].dim = 128),
            "kv shape of plane k of node p0 is 4 heads x 128, by heads, the cluster's is 4 heads x 64, by heads"
        );
        assert_eq!(
            refused(|node| node.kv_spec.as_mut().unwrap().planes.truncate(1)),
            "kv planes of node p0 is k, the cluster's is k+v"
        );
        assert_eq!(
            refused(|node| node.role = 0),
            "join request of node p0: role is neither prefill nor decode"
        );
        assert_eq!(refused(|node| node.ranks = 0), "join request of node p0: ranks is 0");
        assert_eq!(refused(|node| node.identity = None), "join request of node p0: identity.graph is empty");
    }

    /// Protects: other weights need a flag, the node's or the router's; graph and vocabulary never may differ.
    #[test]
    fn mixed_weights_need_a_flag() {
        let first = node("d0", Role::Decode);
        let mut other = node("p0", Role::Prefill);
        other.identity.as_mut().unwrap().weights = "fp8".into();
        let strict = MembershipConfig::default();
        assert!(check(&other, &strict, Some(&first)).is_err());
        assert!(
            check(&other, &MembershipConfig { allow_mixed_weights: true, ..strict.clone() }, Some(&first))
                .is_ok()
        );
        other.allow_mixed_weights = true;
        assert!(check(&other, &strict, Some(&first)).is_ok());
        other.identity.as_mut().unwrap().graph = "h".into();
        assert!(check(&other, &strict, Some(&first)).is_err());
    }

    /// Protects: the router's own tokenizer and model name count even before any node is there.
    #[test]
    fn the_router_has_a_say() {
        let first = node("d0", Role::Decode);
        let config = MembershipConfig { vocab: Some("other".into()), ..MembershipConfig::default() };
        assert_eq!(
            check(&first, &config, None).unwrap_err().to_string(),
            "vocab identity of node d0 is v, the router's tokenizer's is other"
        );
        let config = MembershipConfig { model: Some("m".into()), ..MembershipConfig::default() };
        assert_eq!(
            check(&first, &config, None).unwrap_err().to_string(),
            "model of node d0 is tiny, the router's is m"
        );
    }
}
