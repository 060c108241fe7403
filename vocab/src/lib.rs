//! What token ids mean: their bytes, the special ids, and the identity that router and nodes compare at join.
