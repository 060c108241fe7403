//! The KV wire: frames, sessions, reshard plans and transports.
