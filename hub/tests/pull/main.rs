//! Models by name against a server that speaks the hub's protocol: what is fetched, where it goes, and what happens when
//! the network or the server misbehaves.

mod server;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use hub::{Event, Found, Hub, HubError, ModelName, Patience, Settings, Token, Want};
use server::{COMMIT, Content, Server};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const INDEX: &str =
    r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A small file, kept by git.
fn small(text: &str) -> Content {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0{text}", text.len()));
    Content { tag: hex(&hash.finalize()), bytes: text.into(), linked: false }
}

/// A large one: `len` bytes that differ with `seed` and position.
fn large(seed: u32, len: u32) -> Content {
    let bytes: Vec<u8> =
        (0..len).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed << 13) >> 13) as u8).collect();
    Content { tag: hex(&Sha256::digest(&bytes)), bytes, linked: true }
}

fn server() -> Server {
    Server::start(
        "org/model",
        [
            ("README.md", small("# hello")),
            ("config.json", small("{}")),
            ("tokenizer.json", large(7, 2_000)),
            ("model.safetensors.index.json", small(INDEX)),
            ("model-00001-of-00002.safetensors", large(1, 300_000)),
            ("model-00002-of-00002.safetensors", large(2, 200_000)),
            ("pytorch_model.bin", large(3, 100)),
        ],
    )
}

fn settings(server: &Server, cache: &Path) -> Settings {
    let patience =
        Patience { attempts: 3, pause: Duration::from_millis(1), silence: Duration::from_secs(20) };
    Settings { endpoint: server.endpoint.clone(), token: None, cache: cache.into(), offline: false, patience }
}

fn quiet(_: Event<'_>) {}

fn name(text: &str) -> ModelName {
    text.parse().expect("a name")
}

fn pull(server: &Server, cache: &TempDir, model: &str) -> Result<Found, HubError> {
    Hub::new(settings(server, cache.path())).pull(&name(model), &Want::Model, &quiet)
}

fn cache() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Everything in the cache that is not finished.
fn leftovers(cache: &TempDir) -> Vec<String> {
    let blobs = fs::read_dir(cache.path().join("models--org--model/blobs")).expect("blobs");
    let names = blobs.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".incomplete")).collect()
}

/// What a model needs and nothing else, where other tools look for it; the next time nothing is fetched.
#[test]
fn a_model_is_fetched_once() {
    let (server, cache) = (server(), cache());
    let found = pull(&server, &cache, "org/model").expect("pulls");
    assert_eq!(found.commit, COMMIT);
    assert_eq!(found.path, cache.path().join("models--org--model/snapshots").join(COMMIT));
    let mut names: Vec<_> = fs::read_dir(&found.path)
        .expect("lists")
        .map(|e| e.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    assert!(
        fs::read(found.path.join("model-00001-of-00002.safetensors")).expect("reads")
            == large(1, 300_000).bytes
    );
    assert_eq!(fs::read_to_string(cache.path().join("models--org--model/refs/main")).expect("a ref"), COMMIT);
    assert_eq!(leftovers(&cache), Vec::<String>::new());

    server.take_requests();
    assert_eq!(pull(&server, &cache, "org/model").expect("again"), found);
    assert!(
        server
            .take_requests()
            .iter()
            .all(|request| request.method == "HEAD" || request.path.starts_with("/api/"))
    );
    // A start asks nobody.
    let hub = Hub::new(settings(&server, cache.path()));
    assert_eq!(hub.find(&name("org/model"), &Want::Model, &quiet).expect("there"), found);
    assert_eq!(server.take_requests(), []);
}

/// A connection that breaks again and again goes on where it stopped, and no byte is asked for twice.
#[test]
fn broken_connections_go_on() {
    let (server, cache) = (server(), cache());
    server.faults(|faults| faults.cut = Some(100_000));
    let again = Mutex::new(0);
    let watch = |event: Event<'_>| {
        if let Event::Again(..) = event {
            *again.lock().expect("a counter") += 1;
        }
    };
    let hub = Hub::new(settings(&server, cache.path()));
    let found = hub.pull(&name("org/model"), &Want::Model, &watch).expect("pulls");
    assert!(
        fs::read(found.path.join("model-00002-of-00002.safetensors")).expect("reads")
            == large(2, 200_000).bytes
    );
    let mut starts = server.take_starts();
    starts.sort_unstable();
    // Two files by 100,000 bytes, and the tokenizer in one go.
    assert_eq!(starts, [0, 0, 0, 100_000, 100_000, 200_000]);
    assert_eq!(*again.lock().expect("a counter"), 3);
}

/// What an earlier process left is used, if it is right, and thrown away if it is not.
#[test]
fn a_killed_download_goes_on() {
    for (left, first) in [(large(1, 300_000).bytes[..123_456].to_vec(), 123_456), (vec![0; 123_456], 123_456)]
    {
        let (server, cache) = (server(), cache());
        let blobs = cache.path().join("models--org--model/blobs");
        fs::create_dir_all(&blobs).expect("a folder");
        let right = left[..] == large(1, 300_000).bytes[..123_456];
        fs::write(blobs.join(format!("{}.incomplete", large(1, 300_000).tag)), left).expect("writes");
        let found = pull(&server, &cache, "org/model").expect("pulls");
        let got = fs::read(found.path.join("model-00001-of-00002.safetensors")).expect("reads");
        assert!(got == large(1, 300_000).bytes);
        let starts = server.take_starts();
        assert!(starts.contains(&first), "{starts:?}");
        assert_eq!(starts.len(), if right { 3 } else { 4 }, "{starts:?}");
    }
}

/// Content that is not what its tag says never gets a name, however often it is sent.
#[test]
fn damage_is_refused() {
    let (server, cache) = (server(), cache());
    let mut damaged = large(2, 200_000);
    damaged.bytes[77_777] ^= 1;
    server.put("model-00002-of-00002.safetensors", damaged);
    let error = pull(&server, &cache, "org/model").expect_err("damaged").to_string();
    let want = large(2, 200_000).tag;
    assert!(
        error.starts_with("org/model: model-00002-of-00002.safetensors arrived damaged twice: SHA-256 is ")
            && error.ends_with(&format!("announced was {want}")),
        "{error}"
    );
    assert!(!cache.path().join("models--org--model/blobs").join(&want).exists());
    let hub = Hub::new(settings(&server, cache.path()));
    assert_eq!(hub.cached(&name("org/model"), &Want::Model), None);
    // A small file, too.
    let cache = self::cache();
    server.put("config.json", Content { bytes: b"[]".into(), ..small("{}") });
    let error = pull(&server, &cache, "org/model").expect_err("damaged").to_string();
    assert!(error.contains("config.json arrived damaged twice: git hash is "), "{error}");
}

/// Servers that are busy, silent, or know no ranges.
#[test]
fn difficult_servers() {
    let (server, cache) = (server(), cache());
    server.faults(|faults| faults.busy = 2);
    pull(&server, &cache, "org/model").expect("pulls");

    let (server, cache) = (self::server(), self::cache());
    server.faults(|faults| faults.stall = 1);
    let mut settings = settings(&server, cache.path());
    settings.patience.silence = Duration::from_millis(300);
    let hub = Hub::new(settings);
    hub.pull(&name("org/model"), &Want::Model, &quiet).expect("pulls after the silence");

    let (server, cache) = (self::server(), self::cache());
    let blobs = cache.path().join("models--org--model/blobs");
    fs::create_dir_all(&blobs).expect("a folder");
    fs::write(blobs.join(format!("{}.incomplete", large(1, 300_000).tag)), &large(1, 300_000).bytes[..5])
        .expect("writes");
    server.faults(|faults| faults.no_ranges = true);
    let found = pull(&server, &cache, "org/model").expect("pulls");
    assert!(
        fs::read(found.path.join("model-00001-of-00002.safetensors")).expect("reads")
            == large(1, 300_000).bytes
    );
}

/// The token goes to the hub and nowhere else (the server refuses content requests that carry one); a renamed repository
/// is followed.
#[test]
fn the_token_stays_with_the_hub() {
    let (server, cache) = (server(), cache());
    server.faults(|faults| faults.locked = Some(("secret".into(), true)));
    let mut settings = settings(&server, cache.path());
    settings.token = Some(Token("secret".into()));
    assert!(!format!("{settings:?}").contains("secret"));
    let hub = Hub::new(settings.clone());
    hub.pull(&name("org/model"), &Want::Model, &quiet).expect("pulls");
    hub.pull(&name("old/name"), &Want::Model, &quiet).expect("follows");
    assert!(server.take_requests().iter().all(|request| request.token != request.path.starts_with("/cdn/")));

    let refusals = [
        (
            None,
            true,
            "is gated: accept its terms at ENDPOINT/org/model and set HF_TOKEN to a token of that account",
        ),
        (
            Some("wrong"),
            true,
            "is gated: accept its terms at ENDPOINT/org/model and set HF_TOKEN to a token of that account (the one that is set has no access)",
        ),
        (None, false, "is not at ENDPOINT; if it is private, set HF_TOKEN to a token that may read it"),
    ];
    for (token, gated, said) in refusals {
        server.faults(|faults| faults.locked = Some(("secret".into(), gated)));
        settings.token = token.map(|token| Token(token.into()));
        let error =
            Hub::new(settings.clone()).pull(&name("org/model"), &Want::Model, &quiet).expect_err("refused");
        assert_eq!(error.to_string(), format!("org/model {}", said.replace("ENDPOINT", &server.endpoint)));
    }
}

/// Errors say what is not there.
#[test]
fn what_is_missing_is_named() {
    let (server, cache) = (server(), cache());
    let error = |model: &str| pull(&server, &cache, model).expect_err("nothing").to_string();
    assert_eq!(error("org/model@v9"), "org/model has no revision \"v9\"");
    assert_eq!(error("org/model:Q4_0"), "org/model: no GGUF files, so there is no Q4_0 of it");
    assert!(error("org/other").starts_with("org/other is not at http://127.0.0.1:"));
    server.put("model.safetensors.index.json", small(r#"{"weight_map": {"a": "../../x"}}"#));
    assert_eq!(
        error("org/model"),
        "org/model: model.safetensors.index.json: weight file \"../../x\" is not a plain file name"
    );
}

/// Without a network: from the cache, or a refusal that says where it looked.
#[test]
fn offline() {
    let (server, cache) = (server(), cache());
    let mut settings = settings(&server, cache.path());
    settings.offline = true;
    let hub = Hub::new(settings);
    let error = hub.find(&name("org/model"), &Want::Model, &quiet).expect_err("offline").to_string();
    let at = cache.path().display();
    assert_eq!(
        error,
        format!("org/model is not in the cache at {at}, and HF_HUB_OFFLINE forbids to ask for it")
    );
    assert_eq!(server.take_requests(), []);
    let found = pull(&server, &cache, "org/model").expect("pulls");
    server.take_requests();
    for model in ["org/model", &format!("org/model@{COMMIT}")] {
        assert_eq!(hub.find(&name(model), &Want::Model, &quiet).expect("cached"), found);
        assert_eq!(hub.pull(&name(model), &Want::Text, &quiet).expect("cached"), found);
    }
    assert_eq!(server.take_requests(), []);
}

/// Nobody there is said at once, with what can be done; who answers that they are busy is asked again, and that is told once.
#[test]
fn nobody_answers() {
    let (server, cache) = (server(), cache());
    let settings = settings(&server, cache.path());
    let told = Mutex::new(Vec::new());
    let watch = |event: Event<'_>| match event {
        Event::Asks(whom) => told.lock().expect("told").push(format!("asks {whom}")),
        Event::AsksAgain(why) => told.lock().expect("told").push(format!("again: {why}")),
        _ => {}
    };
    server.faults(|faults| faults.busy = 100);
    let error = Hub::new(settings.clone()).find(&name("org/model"), &Want::Model, &watch).expect_err("busy");
    assert!(error.is_network() && error.to_string().ends_with(", after 3 attempts"), "{error}");
    let asks = format!("asks {}", server.endpoint);
    assert_eq!(*told.lock().expect("told"), [&asks, "again: status 503 Service Unavailable"]);
    drop(server);
    told.lock().expect("told").clear();
    let error =
        Hub::new(settings.clone()).find(&name("org/model"), &Want::Model, &watch).expect_err("nobody");
    assert!(error.is_network(), "{error}");
    let (endpoint, cache) = (settings.endpoint, cache.path().display());
    let start = format!("{endpoint} cannot be reached: ");
    let end = format!(
        "name a directory, a GGUF file or a model that is in the cache ({cache}); HF_ENDPOINT names a mirror"
    );
    assert!(error.to_string().starts_with(&start) && error.to_string().ends_with(&end), "{error}");
    assert_eq!(*told.lock().expect("told"), [asks]);
}

/// A router takes no weights; a rank, or a person, may name files; what was half fetched is no model.
#[test]
fn parts_of_a_model() {
    let (server, cache) = (server(), cache());
    let hub = Hub::new(settings(&server, cache.path()));
    let text = hub.find(&name("org/model"), &Want::Text, &quiet).expect("pulls");
    assert!(text.path.join("tokenizer.json").exists());
    assert_eq!(server.take_starts().len(), 1);
    assert_eq!(hub.cached(&name("org/model"), &Want::Model), None);
    let second = Want::Files(vec!["model-*2-of-*".into()]);
    hub.pull(&name("org/model"), &second, &quiet).expect("pulls");
    assert_eq!(server.take_starts().len(), 1);
    let none = Want::Files(vec!["*.gguf".into()]);
    let error = hub.pull(&name("org/model"), &none, &quiet).expect_err("none").to_string();
    assert_eq!(error, "org/model: no file matches *.gguf");
    // The rest.
    hub.find(&name("org/model"), &Want::Model, &quiet).expect("pulls");
    assert_eq!(server.take_starts().len(), 1);
}

/// One quantisation of a GGUF repository, its parts in order, found again without being named.
#[test]
fn gguf() {
    let server = Server::start(
        "org/model",
        [
            ("m-Q4_K_M.gguf", large(1, 1000)),
            ("m-Q8_0-00001-of-00002.gguf", large(2, 1000)),
            ("m-Q8_0-00002-of-00002.gguf", large(3, 1000)),
        ],
    );
    let cache = cache();
    let hub = Hub::new(settings(&server, cache.path()));
    let found = hub.find(&name("org/model:q8_0"), &Want::Model, &quiet).expect("pulls");
    assert!(found.path.ends_with("m-Q8_0-00001-of-00002.gguf"), "{found:?}");
    assert!(found.path.with_file_name("m-Q8_0-00002-of-00002.gguf").exists());
    assert_eq!(server.take_starts().len(), 2);
    assert_eq!(hub.cached(&name("org/model:Q4_K_M"), &Want::Model), None);
    let found = hub.pull(&name("org/model"), &Want::Model, &quiet).expect("pulls");
    assert!(found.path.ends_with("m-Q4_K_M.gguf"), "{found:?}");
}

/// Processes that start at once fetch a file once.
#[test]
fn two_at_once() {
    let (server, cache) = (server(), cache());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| pull(&server, &cache, "org/model").expect("pulls"));
        }
    });
    assert_eq!(server.take_starts(), [0, 0, 0]);
}

/// Headers are read without fetching the rest.
#[test]
fn a_look_inside() {
    let (server, cache) = (server(), cache());
    let hub = Hub::new(settings(&server, cache.path()));
    let model = name("org/model");
    let peek = hub.peek(&model, &quiet).expect("lists");
    assert_eq!(peek.commit(), COMMIT);
    assert!(peek.names().contains(&"config.json"));
    let file = "model-00001-of-00002.safetensors";
    assert_eq!(peek.len(file).expect("a length"), 300_000);
    assert_eq!(peek.read(file, 1_000, 1_100).expect("reads"), large(1, 300_000).bytes[1_000..1_100]);
    assert_eq!(peek.read("config.json", 0, 1 << 20).expect("reads"), b"{}");
    // A server that knows no ranges sends more; it is not taken.
    server.faults(|faults| faults.no_ranges = true);
    assert_eq!(peek.read(file, 1_000, 1_100).expect("reads"), large(1, 300_000).bytes[1_000..1_100]);
    assert!(!cache.path().join("models--org--model").exists());
}
