//! Whole sessions whose payloads go by UCX over its own TCP: the code that RDMA takes. Without libucp.so.0 on this machine the same sessions run over TCP and nothing more is tried.

mod common;
mod processes;
mod regions;
mod sessions;

use kvtransfer::transport::ucx::{Way, Ways};

const WAYS: Ways = Ways { tcp: true, device: true, ..Ways::NONE };
const WAY: Way = Way::Tcp;
