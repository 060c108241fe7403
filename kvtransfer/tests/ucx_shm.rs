//! Whole sessions whose payloads are read out of shared memory (UCX: posix, cma). Without libucp.so.0 on this machine the same sessions run over TCP and nothing more is tried.

mod common;
mod processes;
mod regions;
mod sessions;

use kvtransfer::transport::ucx::{Way, Ways};

const WAYS: Ways = Ways { shm: true, device: true, ..Ways::NONE };
const WAY: Way = Way::Shm;
