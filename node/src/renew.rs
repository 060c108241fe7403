//! Starting this process anew in place: same executable, arguments, environment and process number, so that whoever watches
//! over it sees no end. For backends that cannot leave a group and join another one.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Does not return. All sockets of the process are closed by it; what cannot be started anew ends.
pub(crate) fn renew(reason: &str) {
    tracing::warn!("this rank starts anew: {reason}");
    let error = match std::env::current_exe() {
        Ok(executable) => Command::new(executable).args(std::env::args_os().skip(1)).exec(),
        Err(error) => error,
    };
    tracing::error!("this rank cannot start anew: {error}");
    std::process::exit(1);
}
