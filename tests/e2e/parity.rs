//! Promise: an answer is the same, bit for bit, however the cluster is cut: tokens and log probabilities through router,
//! prefill node and decode group equal those of one process that computes each prompt alone, from nothing.

use futures::future::join_all;
use serde_json::{Value, json};

use crate::parts::{Parts, ids};

/// How a cluster is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    dtype: &'static str,
    prefill_tp: usize,
    decode_tp: usize,
    prefill_block: usize,
    decode_block: usize,
    chunk: usize,
}

const fn cut(
    dtype: &'static str,
    (prefill_tp, decode_tp): (usize, usize),
    (prefill_block, decode_block): (usize, usize),
    chunk: usize,
) -> Cut {
    Cut { dtype, prefill_tp, decode_tp, prefill_block, decode_block, chunk }
}

/// Every value of every column meets every value of every other column; see `every_pair_is_covered`.
const CUTS: [Cut; 10] = [
    cut("f32", (1, 1), (16, 16), 512),
    cut("f32", (1, 1), (64, 128), 37),
    cut("f32", (1, 2), (16, 32), 37),
    cut("f32", (1, 2), (32, 128), 512),
    cut("f32", (2, 2), (64, 16), 100),
    cut("f32", (1, 4), (16, 128), 100),
    cut("bf16", (2, 1), (32, 32), 100),
    cut("bf16", (2, 2), (16, 128), 512),
    cut("bf16", (2, 4), (32, 16), 37),
    cut("bf16", (1, 4), (64, 32), 512),
];

#[test]
fn every_pair_is_covered() {
    let columns = |cut: &Cut| {
        [cut.dtype.len(), cut.prefill_tp, cut.decode_tp, cut.prefill_block, cut.decode_block, cut.chunk]
    };
    let values = |column: usize| -> std::collections::BTreeSet<usize> {
        CUTS.iter().map(|cut| columns(cut)[column]).collect()
    };
    for (one, other) in (0..6).flat_map(|one| (0..one).map(move |other| (one, other))) {
        for (a, b) in values(one).iter().flat_map(|&a| values(other).into_iter().map(move |b| (a, b))) {
            let is_covered = CUTS.iter().any(|cut| columns(cut)[one] == a && columns(cut)[other] == b);
            assert!(is_covered, "column {one} = {a} never meets column {other} = {b}");
        }
    }
}

#[tokio::test]
async fn f32_answers_are_the_same_however_the_cluster_is_cut() {
    parity("f32").await;
}

#[tokio::test]
async fn bf16_answers_are_the_same_however_the_cluster_is_cut() {
    parity("bf16").await;
}

async fn parity(dtype: &str) {
    let asks = Asks::new();
    let wanted = reference(dtype, &asks).await;
    for cut in CUTS.iter().filter(|cut| cut.dtype == dtype) {
        check(cut, &asks, &wanted).await;
    }
}

/// A completion of token ids and how it is sampled.
#[derive(Clone)]
struct Ask {
    prompt: Vec<u32>,
    sampling: Value,
}

impl Ask {
    fn new(prompt: &[u32], sampling: Value) -> Ask {
        Ask { prompt: prompt.to_vec(), sampling }
    }

    fn body(&self) -> Value {
        let mut body = self.sampling.clone();
        body["prompt"] = json!(self.prompt);
        body["ignore_eos"] = json!(true);
        body["logprobs"] = json!(5);
        if body.get("max_tokens").is_none() {
            body["max_tokens"] = json!(24);
        }
        body
    }
}

fn greedy() -> Value {
    json!({ "temperature": 0 })
}

fn seeded(seed: u64) -> Value {
    json!({ "temperature": 1.0, "top_p": 0.9, "seed": seed })
}

/// All questions of a run.
struct Asks {
    /// Asked at once.
    together: Vec<Ask>,
    /// Asked one after the other: what each finds in the caches depends on those before it.
    first: Ask,
    again: Ask,
    branch: Ask,
    read_only: Ask,
    after_reading: Ask,
}

/// Prompts that begin alike share this much; not a whole number of blocks of any size in use.
const SHARED: usize = 500;

impl Asks {
    fn new() -> Asks {
        let mut together = Vec::new();
        for (i, len) in [3000, 1, 2, 255, 256, 257].into_iter().enumerate() {
            let start = 10_000 * (i as u32 + 1);
            together.push(Ask::new(&ids(start, len), greedy()));
            together.push(Ask::new(&ids(start, len), seeded(start.into())));
        }
        let penalties = json!({
            "temperature": 0.7, "seed": 5, "top_k": 40, "min_p": 0.02,
            "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1,
        });
        together.push(Ask::new(&ids(70_000, 31), penalties));
        together.push(Ask::new(&ids(80_000, 32), seeded(80)));
        together.push(Ask::new(&ids(90_000, 33), greedy()));
        together.push(Ask::new(&ids(100_000, 700), seeded(100)));
        let base = ids(110_000, 600);
        let branch = [&base[..SHARED], &ids(120_000, 150)].concat();
        let unread = ids(130_000, 700);
        let one_token = json!({ "temperature": 0, "max_tokens": 1 });
        Asks {
            together,
            first: Ask::new(&base, greedy()),
            again: Ask::new(&base, seeded(7)),
            branch: Ask::new(&branch, greedy()),
            read_only: Ask::new(&unread, one_token),
            after_reading: Ask::new(&unread, seeded(8)),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Ask> {
        let alone =
            [&self.first, &self.again, &self.branch, &self.read_only, &self.after_reading, &self.again];
        self.together.iter().chain(alone)
    }
}

/// What one process says that computes every prompt alone and from nothing, in the order of [`Asks::all`].
async fn reference(dtype: &str, asks: &Asks) -> Vec<Value> {
    let mut one = Parts::router(&["--disaggregation=never"]);
    one.decode("one", 1, &[&format!("--dtype={dtype}")]);
    one.wait_until_ready(&["one.0"]).await;
    let mut answers = Vec::new();
    for (i, ask) in asks.all().enumerate() {
        let mut body = ask.body();
        body["cache_salt"] = json!(i.to_string());
        answers.push(one.complete(&body).await);
    }
    let nodes = one.wait_until_idle().await;
    assert_eq!(counter(&nodes, "one.0", "cached_tokens"), 0, "the reference took something from its cache");
    assert_eq!(counter(&nodes, "one.0", "kv_bytes"), 0, "the reference received something");
    for (ask, answer) in asks.all().zip(&answers) {
        let tokens = answer["logprobs"]["token_logprobs"].as_array().map_or(0, Vec::len);
        assert_eq!(json!(tokens), ask.body()["max_tokens"], "log probabilities of {answer}");
    }
    answers
}

async fn check(cut: &Cut, asks: &Asks, wanted: &[Value]) {
    let dtype = format!("--dtype={}", cut.dtype);
    let chunk = format!("--chunk-tokens={}", cut.chunk);
    let block = |tokens: usize| format!("--block-tokens={tokens}");
    let mut parts = Parts::router(&["--disaggregation=always"]);
    parts.prefill("p", cut.prefill_tp, &[&dtype, &chunk, &block(cut.prefill_block)]);
    parts.decode("d", cut.decode_tp, &[&dtype, &chunk, &block(cut.decode_block)]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;

    let mut wanted = wanted.iter();
    let mut same = |what: &str, ask: &Ask, answer: &Value| {
        let wanted = wanted.next().expect("as many answers as asks");
        let len = ask.prompt.len();
        assert_eq!(answer, wanted, "{what}, prompt of {len} tokens, {} on {cut:?}", ask.sampling);
    };
    let bodies: Vec<_> = asks.together.iter().map(Ask::body).collect();
    let answers = join_all(bodies.iter().map(|body| parts.complete(body))).await;
    for (ask, answer) in asks.together.iter().zip(&answers) {
        same("together", ask, answer);
    }

    // Each with what the caches of the prefill node and of the decode group hold of it, at the least and at the most.
    let shared = |block: usize| (SHARED / block * block) as u64;
    let all = |ask: &Ask, block: usize| (ask.prompt.len() - block) as u64..=ask.prompt.len() as u64;
    let (in_prefill, in_decode) = (cut.prefill_block, cut.decode_block);
    let steps = [
        ("new", &asks.first, [0..=0, 0..=0]),
        ("held by both", &asks.again, [all(&asks.again, in_prefill), all(&asks.again, in_decode)]),
        ("begun in both", &asks.branch, [shared(in_prefill)..=500, shared(in_decode)..=500]),
        ("one token", &asks.read_only, [0..=0, 0..=0]),
        ("held by the prefill node", &asks.after_reading, [all(&asks.after_reading, in_prefill), 0..=0]),
        ("held by the decode group", &asks.again, [0..=0, all(&asks.again, in_decode)]),
    ];
    let mut before = parts.wait_until_idle().await;
    for (what, ask, cached) in steps {
        if what == "held by the decode group" {
            parts.restart_all("p", cut.prefill_tp);
            parts.wait_until_ready(&["p.0", "d.0"]).await;
            before = parts.wait_until_idle().await;
        }
        same(what, ask, &parts.complete(&ask.body()).await);
        let after = parts.wait_until_idle().await;
        for (node, cached) in ["p.0", "d.0"].into_iter().zip(cached) {
            let found = counter(&after, node, "cached_tokens") - counter(&before, node, "cached_tokens");
            assert!(cached.contains(&found), "{what}: {node} found {found} tokens, not {cached:?}; {cut:?}");
        }
        before = after;
    }
    assert!(counter(&before, "d.0", "kv_bytes") > 0, "nothing travelled on {cut:?}");
    assert_eq!(counter(&before, "d.0", "prompt_tokens"), 0, "the group computed prompts on {cut:?}");
}

/// A counter of the node `name`.
fn counter(nodes: &[Value], name: &str, counter: &str) -> u64 {
    let node = nodes.iter().find(|node| node["name"] == name).expect("a node of that name");
    node["counters"][counter].as_u64().expect("a number")
}
