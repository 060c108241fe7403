//! Lists with cursors; nobody sees or touches what is another's; what has ended stays; retention.

use std::fs;

use batch::{NewBatch, Space, Status, Store, StoreError};

use crate::{LINE_BYTES, batch_of, begin, check, folder, input, open, validate, work, work_all};

#[test]
fn a_batch_from_upload_to_output() {
    let folder = folder("whole");
    let store = open(&folder);
    let batch = begin(&store, "alice", &input(23)).expect("begins");
    assert_eq!((batch.status, batch.counts.total, batch.files()), (Status::InProgress, 23, [None, None]));
    assert!(matches!(store.remove_file("alice", &batch.input_file_id), Err(StoreError::InUse(_))));
    work_all(&store).expect("works");
    let batch = store.batch("alice", &batch.id).expect("is there");
    check(&store, &batch, 23);
    assert!(store.remove_file("alice", &batch.input_file_id).expect("removes"));
    assert!(!store.remove_file("alice", &batch.input_file_id).expect("is gone"));
    assert!(matches!(store.cancel("alice", &batch.id), Err(StoreError::Ended("completed"))));
    // Another process, or this one again: the folder is taken.
    assert!(matches!(Store::open(&folder, Space::default()), Err(StoreError::Busy(_))));
    drop(store);
    let store = open(&folder);
    assert_eq!(store.batch("alice", &batch.id), Some(batch));
    drop(store);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// Nothing of one owner is seen, read, used, cancelled or deleted by another.
#[test]
fn owners_are_apart() {
    let folder = folder("owners");
    let store = open(&folder);
    let batch = begin(&store, "alice", &input(2)).expect("begins");
    let file = batch.input_file_id.as_str();
    assert!(store.file("bob", file).is_none() && store.open_file("bob", file).expect("no error").is_none());
    assert!(!store.remove_file("bob", file).expect("no error"));
    assert!(
        store.batch("bob", &batch.id).is_none()
            && store.cancel("bob", &batch.id).expect("no error").is_none()
    );
    assert!(store.create(batch_of("bob", file)).expect("no error").is_none());
    assert!(store.files("bob", None, None, 10, true).expect("a list").items.is_empty());
    assert!(store.batches("bob", None, 10).expect("a list").items.is_empty());
    // Not even as a cursor, which would tell that it exists.
    assert!(store.files("bob", None, Some(file), 10, true).is_none());
    assert!(store.batches("bob", Some(&batch.id), 10).is_none());
    assert_eq!(store.files("alice", None, None, 10, true).expect("a list").items.len(), 1);
    fs::remove_dir_all(folder).expect("cleans up");
}

#[test]
fn lists_go_on_behind_their_cursor() {
    let folder = folder("cursors");
    let store = open(&folder);
    let batches: Vec<String> = (0..5).map(|_| begin(&store, "a", &input(1)).expect("begins").id).collect();
    let mut seen = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.batches("a", after.as_deref(), 2).expect("a list");
        seen.extend(page.items.iter().map(|batch| batch.id.clone()));
        after = seen.last().cloned();
        if !page.more {
            break;
        }
    }
    seen.reverse();
    assert_eq!(seen, batches);
    let ascending = store.files("a", None, None, 10, true).expect("a list").items;
    let mut descending = store.files("a", None, None, 10, false).expect("a list").items;
    descending.reverse();
    assert_eq!(ascending, descending);
    let behind = store.files("a", None, Some(&ascending[3].id), 10, true).expect("a list");
    assert_eq!((behind.items, behind.more), (vec![ascending[4].clone()], false));
    fs::remove_dir_all(folder).expect("cleans up");
}

/// A line that was answered before the end keeps its answer; the others get an error; the counts agree.
#[test]
fn cancelled_and_expired_batches_keep_what_was_answered() {
    let folder = folder("ends");
    let store = open(&folder);
    for end in [Status::Cancelled, Status::Expired] {
        let batch = begin(&store, "a", &input(10)).expect("begins");
        let mut job = store.job(&batch.id, LINE_BYTES).expect("opens").expect("can be worked on");
        work(&store, &mut job, 4).expect("works");
        match end {
            Status::Cancelled => _ = store.cancel("a", &batch.id).expect("cancels"),
            _ => store.expire(&batch.id).expect("expires"),
        }
        let rest = job.refuse(100, "gone", "too late").expect("reads");
        store.answer(&mut job, &rest).expect("keeps");
        let batch = store.finish(&mut job).expect("ends");
        assert_eq!((batch.status, batch.counts.completed, batch.counts.failed), (end, 4, 6));
        let [output, errors] = batch.files().map(|file| file.expect("a file").to_owned());
        let lines =
            |file: &str| fs::read_to_string(crate::store_path(&store, file)).expect("reads").lines().count();
        assert_eq!((lines(&output), lines(&errors)), (4, 6));
    }
    // Before its lines were looked at.
    let mut upload = store.upload().expect("begins");
    upload.write(input(3).as_bytes()).expect("writes");
    let file = store.keep(upload, "a", "f", None).expect("keeps");
    let batch = store.create(batch_of("a", &file.id)).expect("no error").expect("a batch");
    store.cancel("a", &batch.id).expect("cancels");
    validate(&store, &batch.id).expect("nothing to do");
    let mut job = store.job(&batch.id, LINE_BYTES).expect("opens").expect("can be ended");
    assert_eq!(store.finish(&mut job).expect("ends").status, Status::Cancelled);
    fs::remove_dir_all(folder).expect("cleans up");
}

#[test]
fn a_wrong_input_fails_and_says_where() {
    let folder = folder("wrong");
    let store = open(&folder);
    let batch = begin(&store, "a", &format!("{}nonsense\n", input(2))).expect("begins");
    assert_eq!((batch.status, batch.problems[0].line), (Status::Failed, Some(3)));
    assert!(store.unfinished().is_empty() && store.job(&batch.id, LINE_BYTES).expect("no error").is_none());
    // Changed behind our back: never half an answer.
    let batch = begin(&store, "a", &input(4)).expect("begins");
    fs::write(crate::store_path(&store, &batch.input_file_id), input(3)).expect("writes");
    assert!(store.job(&batch.id, LINE_BYTES).expect("no error").is_none());
    let batch = store.record(&batch.id).expect("is there");
    assert_eq!((batch.status, batch.problems[0].code.as_str()), (Status::Failed, "input_file_changed"));
    fs::remove_dir_all(folder).expect("cleans up");
}

/// What has expired goes, except what a batch still needs; and there is only so much room for one owner.
#[test]
fn retention_and_room() {
    let folder = folder("retention");
    let space = Space { lifetime: Some(0), owner_bytes: 3_000, owner_unfinished: 1, ..Space::default() };
    let store = Store::open(&folder, space).expect("opens");
    let batch = begin(&store, "a", &input(8)).expect("begins");
    store.sweep().expect("sweeps");
    assert!(store.file("a", &batch.input_file_id).is_some(), "still needed");
    let second = store.create(batch_of("a", &batch.input_file_id));
    assert!(matches!(second, Err(StoreError::NoRoom { limit: 1, .. })));
    let mut upload = store.upload().expect("begins");
    upload.write(&[b'x'; 3_000]).expect("writes");
    assert!(matches!(store.keep(upload, "a", "f", None), Err(StoreError::NoRoom { limit: 3_000, .. })));
    work_all(&store).expect("works");
    store.sweep().expect("sweeps");
    assert!(store.batch("a", &batch.id).is_none() && store.file("a", &batch.input_file_id).is_none());
    drop(store);
    let left = |part: &str| fs::read_dir(folder.join(part)).expect("a folder").count();
    assert_eq!((left("files"), left("incoming")), (0, 0));
    fs::remove_dir_all(folder).expect("cleans up");
}

/// A machine whose clock was set to another century, and back to the beginning of time: nothing is deleted that has time left, time
/// never goes back, and a batch goes on to answers for all its lines.
#[test]
fn a_clock_that_jumps_deletes_nothing() {
    const BEGUN: u64 = 1_800_000_000;
    const DAY: u64 = 24 * 3600;
    let folder = folder("clock");
    let open = |wall| Store::open_at(&folder, Space::default(), wall).expect("opens");
    let store = open(BEGUN);
    let new = NewBatch { window_s: 20 * DAY, ..batch_of("a", &begin_file(&store)) };
    let batch = store.create(new).expect("no error").expect("a batch");
    validate(&store, &batch.id).expect("validates");
    assert!((BEGUN..BEGUN + 60).contains(&batch.created_at), "{}", batch.created_at);
    drop(store);
    let mut last = batch.created_at;
    for wall in [BEGUN + 50 * 365 * DAY, 0, BEGUN] {
        let store = open(wall);
        store.sweep().expect("sweeps");
        let now = store.now();
        // As if the machine had been off for a week, once.
        assert!((last..BEGUN + 8 * DAY).contains(&now), "clock at {wall}: {now}, before {last}");
        last = now;
        let kept = store.record(&batch.id).expect("a batch");
        assert!(kept.expires_at > now && store.file("a", &kept.input_file_id).is_some());
    }
    let store = open(BEGUN);
    work_all(&store).expect("works");
    let batch = store.record(&batch.id).expect("a batch");
    crate::check(&store, &batch, 3);
    let times: Vec<u64> = [Status::Validating, Status::InProgress, Status::Finalizing, Status::Completed]
        .iter()
        .map(|status| batch.reached(*status).expect("was there"))
        .collect();
    assert!(times.is_sorted(), "{times:?}");
    drop(store);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// The id of a file of three lines.
fn begin_file(store: &Store) -> String {
    let mut upload = store.upload().expect("begins");
    upload.write(input(3).as_bytes()).expect("writes");
    store.keep(upload, "a", "f", None).expect("keeps").id
}
