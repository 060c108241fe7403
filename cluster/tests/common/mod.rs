//! A node as it asks to join.

use proto::v1::{Identity, JoinRequest, KvPlane, KvSpec, Role};

pub fn node(id: &str, role: Role) -> JoinRequest {
    let plane =
        KvPlane { name: "k".into(), heads_total: 1, dim: 8, dtype: "f32".into(), ..KvPlane::default() };
    JoinRequest {
        node_id: id.into(),
        name: id.into(),
        role: role.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: proto::PROTOCOL,
        model: "tiny".into(),
        identity: Some(Identity { graph: "g".into(), vocab: "v".into(), weights: "w".into() }),
        kv_spec: Some(KvSpec { layers: 1, planes: vec![plane] }),
        grpc_address: "0.0.0.0:7001".into(),
        kv_addresses: vec![],
        ranks: 1,
        context_tokens: 128,
        backend: "test".into(),
        allow_mixed_weights: false,
    }
}
