//! A process that keeps one core busy: what a server's neighbours do.

use std::process::{Child, Command, Stdio};

use anyhow::Result;

use crate::process;

/// Computes until it is dropped.
pub struct Neighbour(Child);

impl Neighbour {
    pub fn start() -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let command = process::anywhere(command.arg("--only-spin").stdin(Stdio::null()));
        Ok(Neighbour(command.spawn()?))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It may have ended by itself: all the same.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the process does.
pub fn spin() -> ! {
    let mut x = 1u64;
    loop {
        for _ in 0..1_000_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        }
        std::hint::black_box(x);
        // The parent may have been killed.
        #[cfg(unix)]
        if std::os::unix::process::parent_id() == 1 {
            std::process::exit(0);
        }
    }
}
