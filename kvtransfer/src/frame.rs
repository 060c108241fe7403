//! Frames.

/// A frame that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The head's checksum.
    #[error("head checksum {got:08x}, computed {want:08x}")]
    HeadChecksum {
        /// In the frame.
        got: u32,
        /// Computed.
        want: u32,
    },
    /// The payload's checksum.
    #[error("payload checksum {got:08x}, computed {want:08x}")]
    PayloadChecksum {
        /// In the frame.
        got: u32,
        /// Computed.
        want: u32,
    },
}
