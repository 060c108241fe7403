//! Reads what a device is given one by one, a little ahead of it and by several threads. Used by `load` for experts: those
//! of a layer together are gigabytes.

use std::sync::mpsc::sync_channel;
use std::thread;

/// Threads that read; each is one ahead, so that `READERS` things are in memory besides the one in hand.
pub(crate) const READERS: usize = 4;

/// Gives `use_one` what `make` makes of `0..count`, in order. Stops at the first error of either.
pub(crate) fn ahead<T: Send, E: Send>(
    count: usize,
    make: impl Fn(usize) -> Result<T, E> + Sync,
    mut use_one: impl FnMut(T) -> Result<(), E>,
) -> Result<(), E> {
    let readers = READERS.min(count);
    thread::scope(|scope| {
        let make = &make;
        // Reader `r` makes r, r + readers, ..; a meeting place each, so that none runs away.
        let lanes: Vec<_> = (0..readers)
            .map(|first| {
                let (give, lane) = sync_channel(0);
                scope.spawn(move || {
                    // A failure ends this reader when it is delivered, all of them when the lanes go.
                    let _ = (first..count).step_by(readers).try_for_each(|at| {
                        let made = make(at);
                        let failed = made.is_err();
                        match give.send(made) {
                            Ok(()) if !failed => Ok(()),
                            _ => Err(()),
                        }
                    });
                });
                lane
            })
            .collect();
        for at in 0..count {
            match lanes[at % readers].recv() {
                Ok(made) => use_one(made?)?,
                // The reader panicked, which the scope passes on.
                Err(_) => break,
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts itself while it lives.
    struct Held<'c>(usize, &'c AtomicUsize);

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// In order, each once, and never more than the bound at a time, however slow the device is.
    #[test]
    fn few_are_held_at_once() {
        let (held, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let make = |at| {
            let now = held.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(now, Ordering::SeqCst);
            Ok::<_, ()>(Held(at, &held))
        };
        let mut seen = Vec::new();
        ahead(300, make, |one| {
            seen.push(one.0);
            thread::yield_now();
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, (0..300).collect::<Vec<_>>());
        let most = most.load(Ordering::SeqCst);
        assert!((2..=READERS + 1).contains(&most), "{most} at once");
        assert_eq!(held.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn an_error_of_either_side_ends_it() {
        let read = |at| if at == 5 { Err("unread") } else { Ok(at) };
        let mut last = None;
        let done = ahead(100, read, |at| {
            last = Some(at);
            Ok(())
        });
        assert_eq!((done, last), (Err("unread"), Some(4)));
        let done = ahead(100, Ok, |at| if at == 7 { Err("refused") } else { Ok(()) });
        assert_eq!(done, Err("refused"));
        assert_eq!(ahead(0, Ok::<usize, ()>, |_| Err(())), Ok(()));
    }
}
