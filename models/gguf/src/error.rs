//! What can be wrong with a GGUF file.

/// A file is not what it should be; one line that names it.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// It cannot be read.
    #[error("{path}: {reason}")]
    Io {
        /// File.
        path: String,
        /// What the system said.
        reason: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{path}: {field}: {reason}")]
    Format {
        /// File.
        path: String,
        /// Metadata key, tensor, or part of the header.
        field: String,
        /// What disagreed.
        reason: String,
    },
}

impl GgufError {
    pub(crate) fn format(path: &str, field: impl Into<String>, reason: impl Into<String>) -> GgufError {
        GgufError::Format { path: path.into(), field: field.into(), reason: reason.into() }
    }
}
