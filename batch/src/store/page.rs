//! Parts of lists: what is behind a cursor, in order of creation or against it. Pure.

use std::collections::{BTreeMap, HashMap};

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// In order.
    pub items: Vec<T>,
    /// There are more behind.
    pub more: bool,
}

/// The number of the item that a list goes on behind: `None`: there is none; `Some(None)`: it begins.
pub(super) fn cursor<'a>(
    after: Option<&str>,
    owner: &str,
    numbers: &HashMap<String, u64>,
    owner_of: impl FnOnce(u64) -> &'a String,
) -> Option<Option<u64>> {
    let Some(id) = after else { return Some(None) };
    let number = *numbers.get(id)?;
    (owner_of(number) == owner).then_some(Some(number))
}

pub(super) fn page<T: Clone>(
    all: &BTreeMap<u64, T>,
    after: Option<u64>,
    limit: usize,
    ascending: bool,
    wanted: impl Fn(&T) -> bool,
) -> Page<T> {
    let behind: Box<dyn Iterator<Item = &T>> = match (ascending, after) {
        (true, Some(after)) => Box::new(all.range(after + 1..).map(|(_, item)| item)),
        (false, Some(after)) => Box::new(all.range(..after).rev().map(|(_, item)| item)),
        (true, None) => Box::new(all.values()),
        (false, None) => Box::new(all.values().rev()),
    };
    let mut items: Vec<T> = behind.filter(|item| wanted(item)).take(limit + 1).cloned().collect();
    let more = items.len() > limit;
    items.truncate(limit);
    Page { items, more }
}
