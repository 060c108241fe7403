//! Responses that clients may come back to, in memory and bounded: the oldest is forgotten first. A router that is started
//! anew remembers none.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

/// Responses kept.
const ENTRIES_MAX: usize = 4096;

/// Bytes of all of them, as JSON.
const BYTES_MAX: usize = 64 << 20;

/// One response, and the conversation up to it.
#[derive(Debug)]
pub struct Kept {
    /// The object that the client got.
    pub response: Value,
    /// As chats have them, the answer included, instructions not.
    pub messages: Vec<Value>,
}

/// The store.
#[derive(Debug, Default)]
pub struct ResponseStore(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    by_id: HashMap<String, (Arc<Kept>, usize)>,
    /// Oldest first; may name some that are gone.
    order: VecDeque<String>,
    bytes: usize,
}

impl ResponseStore {
    /// Keeps one.
    pub fn insert(&self, id: &str, kept: Kept) {
        let size = |value: &Value| value.to_string().len();
        let bytes = id.len() + size(&kept.response) + kept.messages.iter().map(size).sum::<usize>();
        let mut inner = self.lock();
        inner.remove(id);
        inner.by_id.insert(id.to_string(), (Arc::new(kept), bytes));
        inner.order.push_back(id.to_string());
        inner.bytes += bytes;
        while inner.bytes > BYTES_MAX || inner.order.len() > ENTRIES_MAX {
            let Some(oldest) = inner.order.pop_front() else { break };
            inner.remove(&oldest);
        }
    }

    /// One that is kept.
    pub fn get(&self, id: &str) -> Option<Arc<Kept>> {
        self.lock().by_id.get(id).map(|(kept, _)| Arc::clone(kept))
    }

    /// Forgets one; false: there was none.
    pub fn remove(&self, id: &str) -> bool {
        let mut inner = self.lock();
        inner.order.retain(|known| known != id);
        inner.remove(id)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every change is complete before the lock is let go.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, id: &str) -> bool {
        let Some((_, bytes)) = self.by_id.remove(id) else { return false };
        self.bytes -= bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(bytes: usize) -> Kept {
        Kept { response: "x".repeat(bytes).into(), messages: Vec::new() }
    }

    #[test]
    fn the_oldest_goes_first_by_number_and_by_bytes() {
        let store = ResponseStore::default();
        (0..ENTRIES_MAX + 2).for_each(|i| store.insert(&format!("r{i}"), kept(1)));
        assert!(store.get("r1").is_none() && store.get("r2").is_some());
        store.insert("large", kept(BYTES_MAX - 1000));
        assert!(store.get("r2").is_none() && store.get("large").is_some());
        assert!(store.remove("large") && !store.remove("large"));
        assert!(store.lock().bytes < 1000);
        store.insert("too large", kept(BYTES_MAX));
        assert!(store.get("too large").is_none() && store.lock().bytes == 0);
    }
}
