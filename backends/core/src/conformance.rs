//! The suite that every backend passes: generic cases over [`crate::Backend`].
