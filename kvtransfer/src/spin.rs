//! A short wait that does not sleep, for a receiver whose sender is on the same machine: there, being woken costs as much as the
//! bytes do. It is left to others as soon as they want the processor. Used by the streams of [`crate::wire`].

use std::thread;
use std::time::{Duration, Instant};

/// Longest wait: what comes later is worth a sleep.
const LONGEST: Duration = Duration::from_micros(100);

/// Hints to the processor between two looks: about a microsecond.
const PAUSES: u32 = 64;

/// Giving way took so long: somebody else has something to do here.
const WANTED: Duration = Duration::from_micros(100);

/// Then nobody spins for so long.
const PAUSE: Duration = Duration::from_millis(5);

/// One end of one connection.
#[derive(Debug)]
pub(crate) struct Spin {
    on: bool,
    not_before: Option<Instant>,
}

impl Spin {
    /// One that does nothing unless `on`, nor where there is a single processor.
    pub fn new(on: bool) -> Self {
        let on = on && thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        Spin { on, not_before: None }
    }

    /// Whether it does anything.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Tries until there is something; `None`: it is to be slept for.
    pub fn until<T>(&mut self, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
        if !self.on {
            return None;
        }
        let begun = Instant::now();
        if self.not_before.is_some_and(|at| begun < at) {
            return None;
        }
        let mut last = begun;
        loop {
            if let Some(found) = attempt() {
                return Some(found);
            }
            // The other end works on the socket that this one looks at: a look takes its lock.
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
            thread::yield_now();
            let now = Instant::now();
            if now - last > WANTED {
                self.not_before = Some(now + PAUSE);
                return None;
            }
            if now - begun > LONGEST {
                return None;
            }
            last = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_what_is_found_or_without() {
        let mut spin = Spin { on: true, not_before: None };
        assert_eq!(spin.until(|| Some(1)), Some(1));
        assert_eq!(spin.until(|| None::<u32>), None);
        spin.not_before = Some(Instant::now() + Duration::from_secs(3600));
        assert_eq!(spin.until(|| Some(1)), None, "others want the processor");
        assert_eq!(Spin { on: false, not_before: None }.until(|| Some(1)), None);
    }
}
