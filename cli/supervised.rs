//! A child of `baton up` ends with it, also when `up` is killed without a chance to say so: `up` holds the write end of the
//! child's standard input, and the system closes it with `up`. Works on every Unix.

use std::io::Read;
use std::thread;

use tokio_util::sync::CancellationToken;

use crate::system;
use crate::up::STOP_GRACE;

/// Set by `up` in the environment of its children.
pub const VARIABLE: &str = "BATON_SUPERVISED";

/// In a child of `up`: cancels `shutdown` when `up` is gone, and ends the process if it does not end by itself.
pub fn watch_parent(shutdown: &CancellationToken) {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let shutdown = shutdown.clone();
    thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut nothing = [0u8; 64];
        while matches!(input.read(&mut nothing), Ok(1..)) {}
        system::silence_stderr();
        shutdown.cancel();
        thread::sleep(STOP_GRACE);
        std::process::exit(1);
    });
}
