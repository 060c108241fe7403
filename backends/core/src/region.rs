//! Memory that lives longer than the leases in it: buffers that a backend fills again and again. A transport makes such memory known
//! to a network card once, and ties that to it, so that it ends before the memory does. Made by backends, used by `kvtransfer`.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Whose memory it is, as a transport has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The processor's.
    Host,
    /// An NVIDIA GPU's.
    Cuda,
}

/// A piece of memory and what is tied to it. Its owner drops it before the memory.
pub struct Region {
    address: u64,
    bytes: usize,
    place: Place,
    tied: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of {:?} from {:#x}", self.bytes, self.place, self.address)
    }
}

impl Region {
    /// `bytes` from `address` on, in `place`'s addresses.
    pub fn new(address: u64, bytes: usize, place: Place) -> Self {
        Region { address, bytes, place, tied: Mutex::default() }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whose memory it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// What is tied to the memory already and `is` the one, or what `make` makes, which is tied from now on.
    pub fn tie<T: Any + Send + Sync>(&self, is: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> Arc<T> {
        let mut tied = self.tied.lock().unwrap_or_else(PoisonError::into_inner);
        let found = tied.iter().filter_map(|tied| tied.clone().downcast::<T>().ok()).find(|tied| is(tied));
        found.unwrap_or_else(|| {
            let made = Arc::new(make());
            tied.push(made.clone());
            made
        })
    }
}

/// The bytes of a piece in such memory, in wire order.
#[derive(Clone, Copy, Debug)]
pub struct Within<'a> {
    /// The memory.
    pub region: &'a Region,
    /// Where the bytes begin in it.
    pub at: usize,
    /// How many there are.
    pub bytes: usize,
    /// Of bytes that are not to be read by the host: CRC32C of each token's, all of the same length.
    pub sums: Option<&'a [u32]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: what is tied is made once for each kind, and ends with the region at the latest.
    #[test]
    fn what_is_tied_is_made_once_and_ends_with_the_memory() {
        let region = Region::new(4096, 100, Place::Host);
        let tie = |number: u8| region.tie(|tied: &u8| *tied == number, || number);
        let (one, two) = (tie(1), tie(2));
        assert!(Arc::ptr_eq(&one, &tie(1)) && !Arc::ptr_eq(&one, &two));
        let word = region.tie(|_: &String| true, || "tied".to_owned());
        assert_eq!((Arc::strong_count(&one), Arc::strong_count(&word)), (2, 2));
        drop(region);
        assert_eq!((Arc::strong_count(&one), Arc::strong_count(&word)), (1, 1));
    }
}
