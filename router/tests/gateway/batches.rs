//! `/v1/files` and `/v1/batches` over HTTP, with a cluster that says what the test wants.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;
use router::inference::{BACKGROUND, InferenceError};
use serde_json::{Value, json};

use crate::mock::{Gateway, PATIENCE, Step, batch_config, says};

/// A form as clients write it.
fn form(parts: &[(&str, Option<&str>, &str)]) -> (String, String) {
    let boundary = "----------------------------0123456789";
    let mut body = String::new();
    for (name, filename, content) in parts {
        let filename = filename.map_or(String::new(), |name| format!("; filename=\"{name}\""));
        body += &format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"{filename}\r\n\r\n{content}\r\n"
        );
    }
    (format!("multipart/form-data; boundary={boundary}"), body + &format!("--{boundary}--\r\n"))
}

fn line(id: usize, prompt: &str) -> String {
    let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 4});
    let line =
        json!({"custom_id": format!("c{id}"), "method": "POST", "url": "/v1/completions", "body": body});
    format!("{line}\n")
}

/// A client with a key, or without.
struct Client<'g>(&'g Gateway, Option<&'static str>);

impl Client<'_> {
    async fn send(&self, method: Method, path: &str, body: Option<(String, String)>) -> (u16, String) {
        let mut request = self.0.client.request(method, format!("{}{path}", self.0.url)).timeout(PATIENCE);
        if let Some((kind, body)) = body {
            request = request.header("content-type", kind).body(body);
        }
        if let Some(key) = self.1 {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    async fn json(&self, method: Method, path: &str, body: Option<(String, String)>) -> (u16, Value) {
        let (status, text) = self.send(method, path, body).await;
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{path}: {text}")))
    }

    async fn upload(&self, content: &str) -> String {
        let body = form(&[("purpose", None, "batch"), ("file", Some("in.jsonl"), content)]);
        let (status, file) = self.json(Method::POST, "/v1/files", Some(body)).await;
        assert_eq!(
            (status, &file["object"], &file["bytes"]),
            (200, &json!("file"), &json!(content.len())),
            "{file}"
        );
        file["id"].as_str().unwrap().to_owned()
    }

    async fn create(&self, file: &str) -> (u16, Value) {
        let body = json!({"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h",
            "metadata": {"for": "a test"}});
        self.json(Method::POST, "/v1/batches", Some(("application/json".into(), body.to_string()))).await
    }

    /// The batch, once it has come to `status`.
    async fn until(&self, id: &str, status: &str) -> Value {
        let begun = std::time::Instant::now();
        loop {
            let (code, batch) = self.json(Method::GET, &format!("/v1/batches/{id}"), None).await;
            assert_eq!(code, 200, "{batch}");
            if batch["status"] == status {
                return batch;
            }
            assert!(begun.elapsed() < PATIENCE, "never {status}: {batch}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Lines of one of a batch's files, by `custom_id`.
    async fn lines(&self, file: &Value) -> BTreeMap<String, Value> {
        let path = format!("/v1/files/{}/content", file.as_str().unwrap());
        let (status, text) = self.send(Method::GET, &path, None).await;
        assert_eq!(status, 200, "{text}");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let count = lines.len();
        let map: BTreeMap<_, _> =
            lines.into_iter().map(|line| (line["custom_id"].as_str().unwrap().to_owned(), line)).collect();
        assert_eq!(map.len(), count, "a line was answered twice");
        map
    }
}

/// From the upload to both files: good lines in the one, refused ones in the other, with the same bodies as over HTTP; at the
/// lowest priority; and a cluster that has no room is asked again.
#[tokio::test]
async fn every_line_is_answered() {
    let tries = std::sync::atomic::AtomicU32::new(0);
    let gateway = Gateway::with(batch_config("whole"), move |_| {
        match tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3 {
            0 => vec![Step::Fail(InferenceError::Overloaded { retry_after: Duration::ZERO })],
            _ => says("x"),
        }
    })
    .await;
    let client = Client(&gateway, None);
    let mut input: String = (0..20).map(|i| line(i, "a")).collect();
    input += &line(20, "a").replace("\"max_tokens\":4", "\"max_tokens\":-4");
    let file = client.upload(&input).await;
    let (status, batch) = client.create(&file).await;
    assert_eq!((status, &batch["object"], &batch["status"]), (200, &json!("batch"), &json!("validating")));
    let batch = client.until(batch["id"].as_str().unwrap(), "completed").await;
    assert_eq!(batch["request_counts"], json!({"total": 21, "completed": 20, "failed": 1}));
    assert_eq!((&batch["metadata"]["for"], &batch["errors"]), (&json!("a test"), &Value::Null));
    let times: Vec<u64> = ["created_at", "in_progress_at", "finalizing_at", "completed_at", "expires_at"]
        .iter()
        .map(|name| batch[name].as_u64().unwrap())
        .collect();
    assert!(times.is_sorted(), "{times:?}");
    let output = client.lines(&batch["output_file_id"]).await;
    assert_eq!(output.len(), 20);
    let response = &output["c7"]["response"];
    assert_eq!(
        (&response["status_code"], &response["body"]["choices"][0]["text"]),
        (&json!(200), &json!("x"))
    );
    assert!(output["c7"]["id"].as_str().unwrap().starts_with("batch_req_"));
    let errors = client.lines(&batch["error_file_id"]).await;
    assert_eq!(errors["c20"]["response"]["status_code"], 400);
    assert_eq!(errors["c20"]["response"]["body"]["error"]["param"], "max_tokens");
    assert!(gateway.cluster.seen.lock().unwrap().iter().all(|request| request.priority == BACKGROUND));
    let metrics = gateway.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("baton_batch_lines_total{outcome=\"completed\"} 20"), "{metrics}");
    // The files are listed, and their output can be deleted.
    let (_, list) = client.json(Method::GET, "/v1/files?purpose=batch_output&order=asc", None).await;
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    let path = format!("/v1/files/{file}");
    assert_eq!(
        client.json(Method::DELETE, &path, None).await.1,
        json!({"id": file, "object": "file", "deleted": true})
    );
    assert_eq!(client.json(Method::GET, &path, None).await.0, 404);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let gateway = Gateway::with(batch_config("wrong"), |_| says("x")).await;
    let client = Client(&gateway, None);
    let upload = async |parts: &[(&str, Option<&str>, &str)]| {
        let (status, error) = client.json(Method::POST, "/v1/files", Some(form(parts))).await;
        (status, error["error"]["param"].clone())
    };
    let file = ("file", Some("f"), "x");
    assert_eq!(upload(&[file]).await, (400, json!("purpose")));
    assert_eq!(upload(&[file, ("purpose", None, "fine-tune")]).await, (400, json!("purpose")));
    assert_eq!(upload(&[("purpose", None, "batch")]).await, (400, json!("file")));
    assert_eq!(upload(&[("purpose", None, "batch"), ("file", None, "x")]).await, (400, json!("file")));
    assert_eq!(
        upload(&[("purpose", None, "batch"), file, ("other", None, "x")]).await,
        (400, json!("other"))
    );
    let lifetime = [("expires_after[anchor]", None, "created_at"), ("expires_after[seconds]", None, "3")];
    assert_eq!(
        upload(&[file, ("purpose", None, "batch"), lifetime[0], lifetime[1]]).await,
        (400, json!("expires_after[seconds]"))
    );
    for (path, status) in [
        ("/v1/files?limit=0", 400),
        ("/v1/files?order=up", 400),
        ("/v1/files?unknown=1", 400),
        ("/v1/files?after=file-1", 404),
        ("/v1/files?limit=3&order=asc", 200),
        ("/v1/batches?limit=101", 400),
        ("/v1/batches/batch_1", 404),
        ("/v1/files/file-1/content", 404),
    ] {
        assert_eq!(client.json(Method::GET, path, None).await.0, status, "{path}");
    }
    assert_eq!(client.create("file-1").await.0, 404);
    let other = line(1, "a").replace("tiny", "other");
    let input = format!("{}\n{}nonsense\n{other}", line(0, "a"), line(0, "a"));
    let (_, batch) = client.create(&client.upload(&input).await).await;
    let batch = client.until(batch["id"].as_str().unwrap(), "failed").await;
    let errors = batch["errors"]["data"].as_array().unwrap();
    assert_eq!(
        errors.iter().map(|e| (e["line"].as_u64(), e["code"].as_str())).collect::<Vec<_>>(),
        [
            (Some(3), Some("duplicate_custom_id")),
            (Some(4), Some("invalid_json_line")),
            (Some(5), Some("model_not_found"))
        ]
    );
    assert_eq!(errors[2]["message"], "The model 'other' does not exist: 'tiny' is served here.");
}

/// A list goes on behind the last that a client has seen, in either order, and says whether there is more.
#[tokio::test]
async fn lists_go_on_behind_a_cursor() {
    let gateway = Gateway::with(batch_config("cursor"), |_| says("x")).await;
    let client = Client(&gateway, None);
    let mut files = Vec::new();
    for _ in 0..3 {
        files.push(client.upload("x").await);
    }
    let page = async |query: &str| {
        let (status, list) = client.json(Method::GET, &format!("/v1/files?limit=2{query}"), None).await;
        assert_eq!((status, &list["object"]), (200, &json!("list")), "{list}");
        let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|file| file["id"].clone()).collect();
        assert_eq!((Some(&list["first_id"]), Some(&list["last_id"])), (ids.first(), ids.last()), "{list}");
        (ids, list["has_more"] == true)
    };
    assert_eq!(page("&order=asc").await, (vec![json!(files[0]), json!(files[1])], true));
    assert_eq!(page(&format!("&order=asc&after={}", files[1])).await, (vec![json!(files[2])], false));
    assert_eq!(page("").await, (vec![json!(files[2]), json!(files[1])], true));
    assert_eq!(page(&format!("&after={}", files[1])).await, (vec![json!(files[0])], false));
}

/// A file that is too large is refused while it comes in, and leaves nothing.
#[tokio::test]
async fn uploads_are_bounded() {
    let mut config = batch_config("bounded");
    let batch = config.batch.as_mut().unwrap();
    batch.file_bytes = 1000;
    let folder = batch.folder.clone();
    let gateway = Gateway::with(config, |_| says("x")).await;
    let client = Client(&gateway, None);
    client.upload(&"x".repeat(1000)).await;
    let body = form(&[("purpose", None, "batch"), ("file", Some("f"), &"x".repeat(1001))]);
    assert_eq!(client.send(Method::POST, "/v1/files", Some(body)).await.0, 413);
    assert_eq!(std::fs::read_dir(folder.join("incoming")).unwrap().count(), 0);
}

/// Cancelled while its lines run: what runs stops in the cluster, and every line has an answer or an error.
#[tokio::test]
async fn a_batch_is_cancelled() {
    let mut gateway = Gateway::with(batch_config("cancel"), |_| [vec![Step::Wait], says("x")].concat()).await;
    let file = Client(&gateway, None).upload(&(0..5).map(|i| line(i, "a")).collect::<String>()).await;
    let (_, batch) = Client(&gateway, None).create(&file).await;
    let id = batch["id"].as_str().unwrap().to_owned();
    Client(&gateway, None).until(&id, "in_progress").await;
    gateway.go();
    assert!(gateway.gone().await.1, "the first line ended");
    let client = Client(&gateway, None);
    let path = format!("/v1/batches/{id}/cancel");
    assert_eq!(client.json(Method::DELETE, &format!("/v1/files/{file}"), None).await.0, 409);
    assert_eq!(client.json(Method::POST, &path, None).await.0, 200);
    let batch = client.until(&id, "cancelled").await;
    let counts = &batch["request_counts"];
    let (completed, failed) = (counts["completed"].as_u64().unwrap(), counts["failed"].as_u64().unwrap());
    assert!(completed <= 1 && completed + failed == 5, "{counts}");
    let errors = client.lines(&batch["error_file_id"]).await;
    assert!(errors.values().all(|line| line["error"]["code"] == "batch_cancelled"));
    assert_eq!(client.json(Method::POST, &path, None).await.0, 409);
}

/// A window that closes while lines run: they stop in the cluster, and every line has an answer or an error that says so.
#[tokio::test]
async fn a_batch_expires() {
    let config = batch_config("expires");
    let folder = config.batch.as_ref().unwrap().folder.clone();
    // Clients may ask for hours at the least: this one asked for a second, behind their back.
    let store = batch::Store::open(&folder, batch::Space::default()).unwrap();
    let mut upload = store.upload().unwrap();
    upload.write((0..5).map(|i| line(i, "a")).collect::<String>().as_bytes()).unwrap();
    let file = store.keep(upload, "", "in.jsonl", None).unwrap();
    let new = batch::NewBatch {
        owner: String::new(),
        endpoint: batch::Endpoint::Completions,
        input_file_id: file.id,
        completion_window: "1s".into(),
        window_s: 1,
        metadata: None,
        output_lifetime: None,
    };
    let id = store.create(new).unwrap().unwrap().id;
    drop(store);
    let gateway = Gateway::with(config, |_| vec![Step::Wait]).await;
    let client = Client(&gateway, None);
    let batch = client.until(&id, "expired").await;
    assert_eq!(batch["request_counts"], json!({"total": 5, "completed": 0, "failed": 5}));
    assert!(batch["expired_at"].as_u64().unwrap() >= batch["expires_at"].as_u64().unwrap(), "{batch}");
    let errors = client.lines(&batch["error_file_id"]).await;
    assert_eq!(errors.len(), 5);
    assert!(errors.values().all(|line| line["error"]["code"] == "batch_expired"), "{errors:?}");
}

/// Files that another process has open: clients hear so at once, and of the server's folders nothing; when it lets go, they are
/// served.
#[tokio::test]
async fn a_store_in_use_is_told_at_once() {
    let config = batch_config("in-use");
    let folder = config.batch.as_ref().unwrap().folder.clone();
    let other = batch::Store::open(&folder, batch::Space::default()).unwrap();
    let gateway = Gateway::with(config, |_| says("x")).await;
    let client = Client(&gateway, None);
    let begun = std::time::Instant::now();
    let (status, error) = client.json(Method::GET, "/v1/files", None).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let message = "Not now: another process of the server has its files and batches open.";
    assert_eq!((status, &error["error"]["message"]), (503, &json!(message)));
    drop(other);
    while client.json(Method::GET, "/v1/files", None).await.0 != 200 {
        assert!(begun.elapsed() < PATIENCE, "never opened");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A gateway that stops in the middle of a batch goes on with it after its next start; while it stops, it says so.
#[tokio::test]
async fn a_batch_goes_on_after_a_restart() {
    let config = batch_config("restart");
    let mut gateway = Gateway::with(config.clone(), |_| [vec![Step::Wait], says("x")].concat()).await;
    let file = Client(&gateway, None).upload(&(0..30).map(|i| line(i, "a")).collect::<String>()).await;
    let (_, batch) = Client(&gateway, None).create(&file).await;
    let id = batch["id"].as_str().unwrap().to_owned();
    for _ in 0..7 {
        gateway.go();
        assert!(gateway.gone().await.1);
    }
    gateway.shutdown.cancel();
    gateway.served.await.unwrap().unwrap();
    let gateway = Gateway::with(config, |_| says("y")).await;
    let client = Client(&gateway, None);
    let batch = client.until(&id, "completed").await;
    assert_eq!(batch["request_counts"], json!({"total": 30, "completed": 30, "failed": 0}));
    let output = client.lines(&batch["output_file_id"]).await;
    assert_eq!(output.len(), 30);
    let text = |line: &Value| line["response"]["body"]["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(output.values().filter(|line| text(line) == "x").count() <= 7);
}

/// Nothing of one key is seen with another, whether the keys are of the settings or of a file.
#[tokio::test]
async fn keys_are_apart() {
    let mut config = batch_config("apart");
    config.keys = vec!["alice".into(), "bob".into()];
    let gateway = Gateway::with(config, |_| says("x")).await;
    let (alice, bob) = (Client(&gateway, Some("alice")), Client(&gateway, Some("bob")));
    assert_eq!(Client(&gateway, None).json(Method::GET, "/v1/files", None).await.0, 401);
    let metrics = gateway.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("baton_refused_total{door=\"http\",reason=\"key\"} 1"), "{metrics}");
    let file = alice.upload(&line(0, "a")).await;
    let (_, batch) = alice.create(&file).await;
    let id = batch["id"].as_str().unwrap();
    let batch = alice.until(id, "completed").await;
    let output = batch["output_file_id"].as_str().unwrap();
    for path in
        [format!("/v1/files/{file}"), format!("/v1/files/{output}/content"), format!("/v1/batches/{id}")]
    {
        assert_eq!(alice.send(Method::GET, &path, None).await.0, 200, "{path}");
        assert_eq!(bob.send(Method::GET, &path, None).await.0, 404, "{path}");
    }
    assert_eq!(bob.json(Method::DELETE, &format!("/v1/files/{file}"), None).await.0, 404);
    assert_eq!(bob.json(Method::POST, &format!("/v1/batches/{id}/cancel"), None).await.0, 404);
    assert_eq!(bob.create(&file).await.0, 404);
    for path in ["/v1/files", "/v1/batches"] {
        assert_eq!(bob.json(Method::GET, path, None).await.1["data"], json!([]), "{path}");
        assert_ne!(alice.json(Method::GET, path, None).await.1["data"], json!([]), "{path}");
    }
    // A kept response, too.
    let ask = json!({"model": "tiny", "input": "a"}).to_string();
    let (_, kept) = alice.json(Method::POST, "/v1/responses", Some(("application/json".into(), ask))).await;
    let path = format!("/v1/responses/{}", kept["id"].as_str().unwrap());
    assert_eq!(alice.send(Method::GET, &path, None).await.0, 200);
    assert_eq!(bob.send(Method::GET, &path, None).await.0, 404);
}
