//! What a store of files and batches promises: lists and owners, every line answered once whatever ends the process, nothing
//! lost on a full disk.

mod crash;
mod full;
mod lists;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use batch::{Answer, BatchRecord, Endpoint, Job, NewBatch, Rules, Space, Status, Store, StoreError};
use serde_json::{Value, json};

/// Longest line of a test.
const LINE_BYTES: u64 = 1 << 20;

/// A folder for one test, empty.
fn folder(name: &str) -> PathBuf {
    let folder =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("batch-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

/// An input of `lines` lines.
fn input(lines: usize) -> String {
    let line = |i: usize| {
        let body = json!({"prompt": format!("say {i}"), "max_tokens": 3});
        json!({"custom_id": format!("line-{i}"), "method": "POST", "url": "/v1/completions", "body": body})
    };
    (0..lines).map(|i| format!("{}\n", line(i))).collect()
}

/// Uploads `text`, begins a batch of it, and has it checked.
fn begin(store: &Store, owner: &str, text: &str) -> Result<BatchRecord, StoreError> {
    let mut upload = store.upload()?;
    upload.write(text.as_bytes())?;
    let file = store.keep(upload, owner, "in.jsonl", None)?;
    let batch = store.create(batch_of(owner, &file.id))?.expect("the file is there");
    validate(store, &batch.id)?;
    Ok(store.record(&batch.id).expect("the batch is there"))
}

fn batch_of(owner: &str, file: &str) -> NewBatch {
    NewBatch {
        owner: owner.into(),
        endpoint: Endpoint::Completions,
        input_file_id: file.into(),
        completion_window: "24h".into(),
        window_s: 86_400,
        metadata: None,
        output_lifetime: None,
    }
}

fn validate(store: &Store, id: &str) -> Result<(), StoreError> {
    let rules = Rules {
        endpoint: Endpoint::Completions,
        model: &|_| Ok(()),
        line_bytes: LINE_BYTES,
        lines: 1_000_000,
        stop: &|| false,
    };
    store.validate(id, &rules)
}

/// Answers the next `most` lines; every fifth is refused. False: none is left.
fn work(store: &Store, job: &mut Job, most: usize) -> Result<bool, StoreError> {
    let answers = answers(job, most);
    store.answer(job, &answers)?;
    Ok(!answers.is_empty())
}

fn answers(job: &mut Job, most: usize) -> Vec<Answer> {
    let (mut answers, mut from) = (Vec::new(), 0);
    while let Some(line) = job.next(from).filter(|_| answers.len() < most) {
        from = line.index + 1;
        let (id, body) = line.read().expect("the input is there");
        let (status, body) = match line.index % 5 {
            4 => (400, json!({"error": {"message": "no"}})),
            _ => (200, json!({"echo": body["prompt"]})),
        };
        answers.push(line.answer(&id, status, "req", body));
    }
    answers
}

/// Ends all batches that have not ended.
fn work_all(store: &Store) -> Result<(), StoreError> {
    for id in store.unfinished() {
        validate(store, &id)?;
        let Some(mut job) = store.job(&id, LINE_BYTES)? else { continue };
        while work(store, &mut job, 7)? {}
        store.finish(&mut job)?;
    }
    Ok(())
}

/// Holds a batch that has ended to its input: every line is in one of the two files, once.
fn check(store: &Store, batch: &BatchRecord, lines: usize) {
    assert_eq!(batch.status, Status::Completed);
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (i, file) in batch.files().into_iter().enumerate() {
        let Some(file) = file else { continue };
        let (record, _) = store.open_file(&batch.owner, file).expect("opens").expect("is there");
        let text = fs::read_to_string(store_path(store, file)).expect("reads");
        assert_eq!((record.bytes, text.ends_with('\n')), (text.len() as u64, true));
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).expect("a whole line");
            let id = line["custom_id"].as_str().expect("an id").to_owned();
            let number: usize = id.trim_start_matches("line-").parse().expect("a number");
            let status = line["response"]["status_code"].as_u64();
            assert_eq!((status, i), if number % 5 == 4 { (Some(400), 1) } else { (Some(200), 0) });
            if i == 0 {
                assert_eq!(line["response"]["body"]["echo"], format!("say {number}"));
            }
            *seen.entry(id).or_default() += 1;
        }
    }
    assert_eq!(seen.len(), lines, "lines are missing");
    assert!(seen.values().all(|&times| times == 1), "answered twice: {seen:?}");
    let counts = batch.counts;
    assert_eq!((counts.total, counts.completed + counts.failed), (lines as u64, lines as u64));
}

/// Where a file is: known to tests only.
fn store_path(store: &Store, id: &str) -> PathBuf {
    let text = format!("{store:?}");
    let folder = text.split("folder: \"").nth(1).and_then(|rest| rest.split('"').next()).expect("a folder");
    PathBuf::from(folder).join("files").join(id)
}

fn open(folder: &std::path::Path) -> Store {
    Store::open(folder, Space::default()).expect("opens")
}
