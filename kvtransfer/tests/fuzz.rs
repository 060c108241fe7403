//! Whatever bytes a stranger sends, the decoders answer with a frame, a message or an error: they never panic, never ask for
//! more memory than a frame's bound, and take nothing that they would not write themselves. Seeded, so a failure repeats.

mod common;

use common::Rng;
use kvtransfer::codec::{Codec, Row};
use kvtransfer::frame::{Head, Kind};
use kvtransfer::limits::{HEADER_BYTES, PAYLOAD_BYTES_MAX};
use kvtransfer::message::{Hello, Message};
use kvtransfer::{Close, FailCode, SessionId};

const ROUNDS: usize = 300_000;

/// Flips, overwrites, cuts, repeats or appends at a place drawn from the seed.
fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(bytes.len().max(1));
        match rng.below(6) {
            _ if bytes.is_empty() => bytes.push(rng.next() as u8),
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5)],
            2 => bytes.truncate(at),
            3 => bytes.extend_from_within(at..),
            4 => bytes.insert(at, rng.next() as u8),
            _ => {
                let word = [0, 1, u32::MAX, 1 << 31, PAYLOAD_BYTES_MAX as u32 + 1][rng.below(5)];
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&word.to_le_bytes()[..end - at]);
            }
        }
    }
}

fn messages() -> Vec<Message> {
    vec![
        Message::Hello(Box::new(Hello {
            session: SessionId::from_bytes([3; 16]),
            epoch: 1 << 40,
            attempt: 2,
            sender: 5,
            lane: 3,
            connection: 1,
            senders: vec![1, 5, 9],
            tokens: 64..3000,
            bytes: 1 << 33,
            nonce: [9; 32],
            request: "request".into(),
            spec: "2 layers k 8x64 bf16 0..4".into(),
        })),
        Message::Challenge { nonce: [1; 32], proof: [2; 32] },
        Message::Proof { proof: [4; 32] },
        Message::Credit { limit_bytes: 7, received_bytes: 6, received_frames: 1, frame_bytes: 5 },
        Message::Done { frames: 1, bytes: 2, lanes: 2, close: Close { token: 3, finish: 4 } },
        Message::Ack { bytes: 8 },
        Message::Fail { code: FailCode::Stale, reason: "attempt 1, expected 2".into() },
        Message::Ping,
        Message::Pong { received_bytes: 9, received_frames: 2 },
    ]
}

#[test]
fn heads_of_any_bytes_are_refused_or_are_what_they_say() {
    let mut rng = Rng::new(1);
    let data = Head {
        kind: Kind::Data,
        tag: 7,
        number: 9,
        layer: 3,
        plane: 1,
        heads: 4..6,
        tokens: 100..164,
        codec: Codec::Int8,
        payload_bytes: 4096,
        payload_crc: 0xdead_beef,
    };
    let mut taken = 0;
    for _ in 0..ROUNDS {
        let mut bytes = data.encode().to_vec();
        mutate(&mut bytes, &mut rng);
        bytes.resize(HEADER_BYTES, rng.next() as u8);
        let mut bytes: [u8; HEADER_BYTES] = bytes.try_into().expect("resized");
        if rng.chance(2) {
            // A sender that breaks the rules knows how to compute a checksum.
            let crc = crc(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(head) = Head::decode(&bytes) {
            taken += 1;
            assert_eq!(head.encode(), bytes, "{head:?}");
            assert!(head.payload_bytes as usize <= head.kind.payload_bytes_max());
            assert!(head.kind != Kind::Data || !head.heads.is_empty() && !head.tokens.is_empty());
        }
    }
    assert!(taken > ROUNDS / 20, "{taken} heads got through");
}

#[test]
fn messages_of_any_bytes_are_refused_or_are_what_they_say() {
    let mut rng = Rng::new(2);
    let (all, mut taken) = (messages(), 0);
    let kinds: Vec<Kind> = all.iter().map(Message::kind).chain([Kind::Data]).collect();
    for _ in 0..ROUNDS {
        let mut bytes = all[rng.below(all.len())].encode();
        mutate(&mut bytes, &mut rng);
        let kind = kinds[rng.below(kinds.len())];
        if let Ok(message) = Message::decode(kind, &bytes) {
            taken += 1;
            // Codes that are not known are read as Other.
            if !matches!(message, Message::Fail { .. }) {
                assert_eq!(message.encode(), bytes, "{message:?}");
            }
        }
    }
    assert!(taken > ROUNDS / 100, "{taken} messages got through");
}

#[test]
fn payloads_of_any_bytes_decode_to_a_place_of_the_right_size_or_not_at_all() {
    let mut rng = Rng::new(3);
    for _ in 0..ROUNDS / 10 {
        let codec = Codec::ALL[rng.below(4)];
        let dtype = [backend::DType::F32, backend::DType::F16, backend::DType::BF16][rng.below(3)];
        let row = Row { dim: rng.below(40), dtype, keys: rng.below(2) == 0 };
        // Some of them with a rest after a group of 64 tokens.
        let (heads, tokens) = (rng.below(4), if rng.below(8) == 0 { rng.below(150) } else { rng.below(8) });
        let rows = heads * tokens;
        let bytes: Vec<u8> = (0..rng.below(200)).map(|_| rng.next() as u8).collect();
        let mut exact = Vec::new();
        if codec.decode(row, heads, tokens, &bytes, &mut exact) {
            assert_eq!(
                (bytes.len(), exact.len()),
                (codec.wire_bytes(row, heads, tokens), rows * row.bytes())
            );
        }
        let wire: Vec<u8> = (0..codec.wire_bytes(row, heads, tokens)).map(|_| rng.next() as u8).collect();
        assert!(codec.decode(row, heads, tokens, &wire, &mut exact));
        assert_eq!(exact.len(), rows * row.bytes());
    }
}

/// CRC32C as its definition has it.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}
