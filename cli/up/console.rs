//! What `up` writes to standard error: lines, each with the name of whom it is from, and at a terminal one line of progress
//! below them that is redrawn.

use std::io::{IsTerminal, Write, stderr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Columns of the name in front of a line.
const NAME_COLUMNS: usize = 10;

/// Standard error, shared by all that write to it.
pub struct Console {
    is_terminal: bool,
    /// The line of progress as it stands; empty when there is none.
    progress: Mutex<String>,
    /// Children are being stopped: what they say of each other's absence is of no interest.
    stopping: AtomicBool,
}

impl Console {
    /// The process's own.
    pub fn new() -> Self {
        Console {
            is_terminal: stderr().is_terminal(),
            progress: Mutex::default(),
            stopping: AtomicBool::new(false),
        }
    }

    /// A log line of the child `name`; dropped once children are being stopped.
    pub fn child_line(&self, name: &str, text: &str) {
        if !self.stopping.load(Ordering::Relaxed) {
            self.line(name, text);
        }
    }

    /// From now on children's lines are dropped.
    pub fn stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// A line from `name`.
    pub fn line(&self, name: &str, text: &str) {
        let progress = self.lock();
        let line = format!("{name:<NAME_COLUMNS$} | {text}\n");
        self.write(&if progress.is_empty() { line } else { format!("\r\x1b[K{line}{progress}") });
    }

    /// Replaces the line of progress; only at a terminal.
    pub fn progress(&self, text: &str) {
        if self.is_terminal {
            *self.lock() = text.into();
            self.write(&format!("\r\x1b[K{text}"));
        }
    }

    /// Takes the line of progress away.
    pub fn end_progress(&self) {
        if !std::mem::take(&mut *self.lock()).is_empty() {
            self.write("\r\x1b[K");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, String> {
        self.progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A reader that went away must not stop the cluster, so errors are of no interest here.
    fn write(&self, text: &str) {
        let _ = stderr().lock().write_all(text.as_bytes());
    }
}
