//! A disk without room: whatever cannot be written is refused in words, nothing that counts is lost, and work goes on where
//! it stopped as soon as there is room. The disk is one that takes files up to a size, which a process can set for itself.

use std::fs;
use std::process::Command;

use crate::{LINE_BYTES, begin, check, folder, input, open, work};

const LINES: usize = 400;

/// Not a test of its own: the process without room.
#[test]
fn cramped() {
    let Some(folder) = std::env::var_os("BATCH_FULL_FOLDER") else { return };
    // SAFETY: changes what the process does with a signal; nothing of ours handles it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let store = open(folder.as_ref());
    let batch = begin(&store, "a", &input(LINES)).expect("begins");
    let mut job = store.job(&batch.id, LINE_BYTES).expect("opens").expect("can be worked on");
    let database = fs::metadata(std::path::Path::new(&folder).join("store.redb")).expect("a database").len();

    let (mut refusals, mut bytes) = (0, 2_000);
    loop {
        // A little more room than was just found too little. The database has no room to grow by, either.
        room(bytes.max(database / 4));
        match work(&store, &mut job, 20) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                refusals += 1;
                assert!(refusals < 10_000, "never recovers: {error}");
                let message = error.to_string();
                assert!(
                    error.is_full()
                        || matches!(error, batch::StoreError::Again | batch::StoreError::Database(_)),
                    "{message}"
                );
                // Nobody is told of an upload that there is no room for.
                let upload = store.upload().and_then(|mut upload| {
                    upload.write(&vec![b'x'; 1 << 20])?;
                    Ok(upload)
                });
                assert!(bytes > 1 << 20 || upload.is_err_and(|error| error.is_full()));
                // What was told before stays.
                let told = store.record(&batch.id).expect("is there").counts;
                assert_eq!(told.completed + told.failed, (LINES - job.left()) as u64);
                bytes += bytes / 2;
            }
        }
    }
    room(u64::MAX);
    let batch = store.finish(&mut job).expect("ends");
    check(&store, &batch, LINES);
    assert!(refusals > 0, "there was always room");
    println!("refused {refusals} times");
}

fn room(bytes: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads and writes the struct that it is given, and limits of this process.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit), 0);
        limit.rlim_cur = bytes.min(limit.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    let folder = folder("full");
    // Limits are the whole process's.
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "full::cramped", "--nocapture"])
        .env("BATCH_FULL_FOLDER", &folder)
        .output()
        .expect("starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("refused "), "{text}");
    fs::remove_dir_all(folder).expect("cleans up");
}
