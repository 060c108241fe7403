//! kill -9 at 200 random points of a process that uploads, begins, answers and ends batches: whatever it was doing, every
//! line of every batch ends up answered once, and nothing else is left on the disk.

use std::collections::HashSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{begin, check, folder, input, open, work_all};

const KILLS: u64 = 200;
const LINES: usize = 15;

/// Not a test of its own: what is killed.
#[test]
fn victim() {
    let Some(folder) = std::env::var_os("BATCH_CRASH_FOLDER") else { return };
    let store = open(folder.as_ref());
    loop {
        work_all(&store).expect("works");
        begin(&store, "a", &input(LINES)).expect("begins");
    }
}

#[test]
fn every_line_is_answered_once_whenever_the_process_dies() {
    let folder = folder("crash");
    let mut seed = [0; 8];
    getrandom(&mut seed);
    let mut random = u64::from_le_bytes(seed) | 1;
    for kill in 0..KILLS {
        let mut victim = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "crash::victim", "--nocapture"])
            .env("BATCH_CRASH_FOLDER", &folder)
            .stdout(Stdio::null())
            .spawn()
            .expect("starts");
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // From before the store is open to some batches later.
        std::thread::sleep(Duration::from_micros(random % 80_000));
        assert!(victim.try_wait().expect("a child").is_none(), "ended by itself before kill {kill}");
        victim.kill().expect("SIGKILL");
        victim.wait().expect("a child");
    }
    let store = open(&folder);
    work_all(&store).expect("works");
    let batches = store.batches("a", None, usize::MAX >> 1).expect("a list").items;
    assert!(!batches.is_empty(), "nothing was ever begun");
    let mut known = HashSet::new();
    for batch in &batches {
        check(&store, batch, LINES);
        known.insert(batch.input_file_id.clone());
        known.extend(batch.files().into_iter().flatten().map(str::to_owned));
    }
    // Inputs that no batch was begun of are files all the same.
    known.extend(
        store.files("a", None, None, usize::MAX >> 1, true).expect("a list").items.into_iter().map(|f| f.id),
    );
    let there = fs::read_dir(folder.join("files")).expect("a folder");
    for file in there {
        let name = file.expect("an entry").file_name().into_string().expect("a name");
        assert!(known.contains(&name), "{name} belongs to nobody");
    }
    assert_eq!(fs::read_dir(folder.join("incoming")).expect("a folder").count(), 0);
    println!("{} batches of {LINES} lines over {KILLS} kills", batches.len());
    drop(store);
    fs::remove_dir_all(folder).expect("cleans up");
}

fn getrandom(bytes: &mut [u8; 8]) {
    use std::hash::{BuildHasher, RandomState};
    bytes.copy_from_slice(&RandomState::new().hash_one(0).to_le_bytes());
}
