//! Whole sessions over TCP.

mod common;
mod sessions;

use kvtransfer::transport::ucx::Ways;

const WAYS: Ways = Ways::NONE;
