//! Work of a lane that the driver queues again by one call: captured from the lane's stream, so that whatever queues there,
//! cuBLASLt and NCCL too, is part of it.

use std::rc::Rc;

use backend::BackendError;
use cudarc::driver::{result, sys};

use super::{Gpu, failed};
use crate::driver::Lane;

/// An executable graph.
pub struct Graph {
    gpu: Rc<Gpu>,
    exec: sys::CUgraphExec,
}

impl Graph {
    /// What `queue` queues in the compute lane. Other threads may use the driver meanwhile; NCCL's own allocations on this one
    /// are relaxed by itself.
    pub(super) fn capture(
        gpu: &Rc<Gpu>,
        queue: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<Self, BackendError> {
        let stream = gpu.lane(Lane::Compute);
        // SAFETY: the stream lives as long as the GPU, and this thread owns it.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(stream, mode).map_err(failed("beginning a capture"))?;
        }
        let queued = queue();
        // SAFETY: begun above; ended whatever happened, so that the stream does its work again.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(failed("ending a capture"));
        // What did not queue is the reason, whatever the driver says of the rest.
        let graph = match (queued, graph) {
            (Ok(()), graph) => graph?,
            (Err(error), graph) => {
                if let Ok(graph) = graph {
                    // SAFETY: just made.
                    let _ = unsafe { result::graph::destroy(graph) };
                }
                return Err(error);
            }
        };
        // SAFETY: just made; the executable one is a copy.
        let exec = unsafe {
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0));
            let _ = result::graph::destroy(graph);
            exec.map_err(failed("making a graph"))?
        };
        Ok(Graph { gpu: gpu.clone(), exec })
    }

    pub(super) fn replay(&self) -> Result<(), BackendError> {
        // SAFETY: both live.
        unsafe { result::graph::launch(self.exec, self.gpu.lane(Lane::Compute)) }
            .map_err(failed("replaying a step"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; one that is being done is freed behind that.
        let _ = unsafe {
            let _ = result::ctx::set_current(self.gpu.context);
            result::graph::exec_destroy(self.exec)
        };
    }
}
