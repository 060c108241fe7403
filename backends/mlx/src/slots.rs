//! Which slot each sequence has. Pure: the arrays are in `kv`.
//!
//! A *bank* is one array per layer and plane, `[slots, heads, capacity, dim]`; its slots have one capacity, its class: 256,
//! 512, 1k, .. tokens. All banks hold about [`BANK_TOKENS`] tokens, and a longer sequence has a bank for itself, so banks come
//! and go without moving anybody. A sequence lies in one slot from its first token on and moves to a larger one as it grows.
//! Slots are taken lowest first: the sequences of a step tend to be neighbours, which one attention call serves.

use std::collections::HashMap;

use backend::SeqId;

/// Tokens of the smallest slot.
pub(crate) const SLOT_TOKENS_MIN: u32 = 256;
/// Tokens of a bank, and the step in which the slot of a longer sequence grows. Llama 3 8B: 512 MB in bf16.
pub(crate) const BANK_TOKENS: u32 = 4096;
const _: () = assert!(BANK_TOKENS.is_multiple_of(SLOT_TOKENS_MIN));

/// Where a sequence lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) bank: usize,
    pub(crate) slot: usize,
}

/// The shape of a bank's arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) slots: usize,
    /// Tokens of a slot.
    pub(crate) capacity: u32,
}

#[derive(Debug)]
struct Bank {
    shape: Shape,
    taken: Vec<bool>,
}

/// All banks of a store.
#[derive(Debug)]
pub(crate) struct Slots {
    bank_tokens: u32,
    banks: Vec<Option<Bank>>,
    places: HashMap<SeqId, Place>,
}

impl Slots {
    /// For a store of `tokens` in all.
    pub(crate) fn new(tokens: u32) -> Self {
        let bank_tokens = tokens.clamp(SLOT_TOKENS_MIN, BANK_TOKENS).next_power_of_two();
        Slots { bank_tokens, banks: Vec::new(), places: HashMap::new() }
    }

    pub(crate) fn place(&self, seq: SeqId) -> Option<Place> {
        self.places.get(&seq).copied()
    }

    /// Tokens that fit where `seq` lies.
    pub(crate) fn capacity(&self, seq: SeqId) -> u32 {
        let bank = self.place(seq).and_then(|place| self.banks[place.bank].as_ref());
        bank.map_or(0, |bank| bank.shape.capacity)
    }

    /// Takes a slot for `tokens`, which nobody has yet. The second value is the shape of a bank that is to be made for it.
    pub(crate) fn take(&mut self, tokens: u32) -> (Place, Option<Shape>) {
        let shape = self.shape(tokens);
        for (index, bank) in self.banks.iter_mut().enumerate() {
            let Some(bank) = bank.as_mut().filter(|bank| bank.shape == shape) else { continue };
            if let Some(slot) = bank.taken.iter().position(|taken| !taken) {
                bank.taken[slot] = true;
                return (Place { bank: index, slot }, None);
            }
        }
        let index = self.banks.iter().position(Option::is_none).unwrap_or_else(|| {
            self.banks.push(None);
            self.banks.len() - 1
        });
        let mut taken = vec![false; shape.slots];
        taken[0] = true;
        self.banks[index] = Some(Bank { shape, taken });
        (Place { bank: index, slot: 0 }, Some(shape))
    }

    /// Gives a slot to a sequence; returns the slot that it had.
    pub(crate) fn assign(&mut self, seq: SeqId, place: Place) -> Option<Place> {
        self.places.insert(seq, place)
    }

    /// Takes the sequence out; its slot is still taken.
    pub(crate) fn remove(&mut self, seq: SeqId) -> Option<Place> {
        self.places.remove(&seq)
    }

    /// Frees a slot. Returns a bank to be dropped: this one, when it is empty and another empty one is there already. One is
    /// kept, so that short sequences that come and go do not make a bank each.
    pub(crate) fn give(&mut self, place: Place) -> Option<usize> {
        if let Some(bank) = &mut self.banks[place.bank] {
            bank.taken[place.slot] = false;
        }
        let empty = |bank: &&Option<Bank>| bank.as_ref().is_some_and(|bank| !bank.taken.contains(&true));
        if !empty(&&self.banks[place.bank]) || self.banks.iter().filter(empty).count() < 2 {
            return None;
        }
        self.banks[place.bank] = None;
        Some(place.bank)
    }

    /// Forgets a bank that could not be made.
    pub(crate) fn unmake(&mut self, bank: usize) {
        self.banks[bank] = None;
    }

    fn shape(&self, tokens: u32) -> Shape {
        if tokens > self.bank_tokens {
            return Shape { slots: 1, capacity: tokens.next_multiple_of(self.bank_tokens) };
        }
        let capacity = tokens.max(SLOT_TOKENS_MIN).next_power_of_two();
        Shape { slots: (self.bank_tokens / capacity) as usize, capacity }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(bank: usize, slot: usize) -> Place {
        Place { bank, slot }
    }

    /// Sequences of one class are neighbours in one bank; a class has banks of its own, of about the same size.
    #[test]
    fn classes_have_banks() {
        let mut slots = Slots::new(1 << 20);
        assert_eq!(slots.take(1), (at(0, 0), Some(Shape { slots: 16, capacity: 256 })));
        assert_eq!(slots.take(256), (at(0, 1), None));
        assert_eq!(slots.take(257), (at(1, 0), Some(Shape { slots: 8, capacity: 512 })));
        assert_eq!(slots.take(4096), (at(2, 0), Some(Shape { slots: 1, capacity: 4096 })));
        assert_eq!(slots.take(9000), (at(3, 0), Some(Shape { slots: 1, capacity: 12288 })));
        slots.give(at(0, 0));
        assert_eq!(slots.take(100), (at(0, 0), None));
    }

    /// A store smaller than a bank does not make a larger one.
    #[test]
    fn small_stores_have_small_banks() {
        assert_eq!(Slots::new(64).take(64).1, Some(Shape { slots: 1, capacity: 256 }));
        assert_eq!(Slots::new(1000).take(64).1, Some(Shape { slots: 4, capacity: 256 }));
    }

    /// One empty bank is kept; the second is dropped and its number used again.
    #[test]
    fn one_empty_bank_is_kept() {
        let mut slots = Slots::new(1 << 20);
        let ((a, _), (b, _)) = (slots.take(256), slots.take(512));
        assert_eq!(slots.give(a), None);
        assert_eq!(slots.give(b), Some(1));
        assert_eq!(slots.take(1024), (at(1, 0), Some(Shape { slots: 4, capacity: 1024 })));
        assert_eq!(slots.take(256), (at(0, 0), None));
    }
}
