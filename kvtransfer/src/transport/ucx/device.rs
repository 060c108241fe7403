//! UCX's objects as guards: a context per way for the life of the process; workers, their endpoints, registered memory. Used by
//! one thread at a time each.

use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use backend::{Place, Region};
use ucx_sys::raw::{
    UCP_API_MAJOR, UCP_API_MINOR, UCP_ATTR_FIELD_MEMORY_TYPES, UCP_EP_CLOSE_FLAG_FORCE,
    UCP_EP_PARAM_FIELD_ERR_HANDLER, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE, UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
    UCP_ERR_HANDLING_MODE_NONE, UCP_ERR_HANDLING_MODE_PEER, UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP,
    UCP_MEM_MAP_PARAM_FIELD_ADDRESS, UCP_MEM_MAP_PARAM_FIELD_LENGTH, UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
    UCP_MEM_MAP_PARAM_FIELD_PROT, UCP_MEM_MAP_PROT_LOCAL_READ, UCP_MEM_MAP_PROT_LOCAL_WRITE,
    UCP_MEM_MAP_PROT_REMOTE_READ, UCP_OP_ATTR_FIELD_FLAGS, UCP_OP_ATTR_FIELD_MEMORY_TYPE,
    UCP_PARAM_FIELD_FEATURES, UCP_PARAM_FIELD_MT_WORKERS_SHARED, UCP_WORKER_PARAM_FIELD_THREAD_MODE,
    UCS_INPROGRESS, UCS_MEMORY_TYPE_CUDA, UCS_MEMORY_TYPE_HOST, UCS_OK, UCS_THREAD_MODE_SERIALIZED,
    ucp_context_attr_t, ucp_context_h, ucp_ep_h, ucp_ep_params_t, ucp_err_handler_t, ucp_mem_h,
    ucp_mem_map_params_t, ucp_params_t, ucp_request_param_t, ucp_rkey_h, ucp_worker_h, ucp_worker_params_t,
    ucs_status_t,
};
use ucx_sys::{Posted, Ucx};

use super::Way;

/// Rounds without anything to do before a thread waits for an event.
const IDLE_ROUNDS: u32 = 64;

/// Longest wait for an event: who waits looks up in between.
const EVENT_WAIT: Duration = Duration::from_millis(20);

/// Longest wait for an endpoint to close in order.
const CLOSE_WAIT: Duration = Duration::from_millis(200);

/// A way's transports; lives as long as the process.
pub(super) struct Context {
    ucx: &'static Ucx,
    raw: ucp_context_h,
    way: Way,
}

// SAFETY: made with `mt_workers_shared`: the library locks what several threads use of a context.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// The context of `way`, made with its first use.
pub(super) fn context(way: Way) -> Result<&'static Context, String> {
    static MADE: [OnceLock<Result<Context, String>>; 4] = [const { OnceLock::new() }; 4];
    MADE[way as usize].get_or_init(|| Context::new(way)).as_ref().map_err(Clone::clone)
}

impl Context {
    fn new(way: Way) -> Result<Self, String> {
        let ucx = ucx_sys::load().map_err(|error| error.to_string())?;
        // What a peer of that way is reached by; names that the library lacks count for nothing.
        let transports = match way {
            Way::Stream => return Err("a stream needs no UCX".into()),
            Way::Shm => "posix,sysv,cma,knem,xpmem,self",
            // The second finds out how a network card is told of a GPU's memory.
            Way::Rdma => "ib,cuda_copy",
            Way::Tcp => "tcp",
        };
        // SAFETY: all zeros are valid for both structs; their masks say that nothing is set.
        let mut params: ucp_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
        params.features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
        params.mt_workers_shared = 1;
        let (mut config, mut raw) = (null_mut(), null_mut());
        let names = [("TLS", transports), ("MEMTYPE_CACHE", "n")];
        // SAFETY: places for what the calls make; the configuration is released once, after its last use.
        unsafe {
            ucx.check((ucx.ucp_config_read)(null(), null(), &mut config))?;
            for (name, value) in names {
                let (name, value) =
                    (CString::new(name).expect("no zero"), CString::new(value).expect("no zero"));
                // A release that does not know the name goes without it.
                let _ = (ucx.ucp_config_modify)(config, name.as_ptr(), value.as_ptr());
            }
            let made = (ucx.ucp_init_version)(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &mut raw);
            (ucx.ucp_config_release)(config);
            ucx.check(made)?;
        }
        Ok(Context { ucx, raw, way })
    }

    /// Whether its library knows memory of `place`.
    pub fn knows(&self, place: Place) -> bool {
        // SAFETY: zeros are valid, the mask says what is asked for.
        let mut attr: ucp_context_attr_t = unsafe { std::mem::zeroed() };
        attr.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
        // SAFETY: a context that lives for ever, and a place for the answer.
        let asked = unsafe { (self.ucx.ucp_context_query)(self.raw, &mut attr) };
        asked == UCS_OK && attr.memory_types >> memory_type(place) & 1 == 1
    }

    /// Whether peers can read memory of `place`, by this way: as `tried` says, which is asked once in the life of the process.
    pub fn proven(&self, place: Place, tried: impl FnOnce() -> Result<(), String>) -> bool {
        let tried = || {
            let tried = tried();
            let way = self.way.name();
            match &tried {
                Ok(()) => tracing::info!(
                    way,
                    "KV leaves the device's memory without a copy on the host (GPUDirect)"
                ),
                Err(words) => {
                    tracing::warn!(
                        way,
                        words,
                        "KV leaves by the host: the device's memory cannot be read from outside"
                    )
                }
            }
            tried.is_ok()
        };
        *self.proof(place).get_or_init(tried)
    }

    /// What [`Context::proven`] has found, if it was asked.
    pub fn proof(&self, place: Place) -> &'static OnceLock<bool> {
        static PROOFS: [[OnceLock<bool>; 2]; 4] = [const { [const { OnceLock::new() }; 2] }; 4];
        &PROOFS[self.way as usize][place as usize]
    }

    /// Lets peers read `bytes` from `start` on, until it is dropped. The caller keeps them there.
    pub fn register(&'static self, start: u64, bytes: usize, place: Place) -> Result<Memory, String> {
        // SAFETY: zeros are valid, the mask says what is set.
        let mut params: ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS
            | UCP_MEM_MAP_PARAM_FIELD_LENGTH
            | UCP_MEM_MAP_PARAM_FIELD_PROT
            | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
        (params.address, params.length) = (start as usize as *mut libc::c_void, bytes);
        params.prot =
            UCP_MEM_MAP_PROT_LOCAL_READ | UCP_MEM_MAP_PROT_LOCAL_WRITE | UCP_MEM_MAP_PROT_REMOTE_READ;
        params.memory_type = memory_type(place);
        let mut raw = null_mut();
        // SAFETY: the context lives for ever; registering reads no byte.
        unsafe { self.ucx.check((self.ucx.ucp_mem_map)(self.raw, &params, &mut raw))? };
        Ok(Memory { context: self, raw })
    }
}

fn memory_type(place: Place) -> u32 {
    match place {
        Place::Host => UCS_MEMORY_TYPE_HOST,
        Place::Cuda => UCS_MEMORY_TYPE_CUDA,
    }
}

/// Registered memory.
pub(super) struct Memory {
    context: &'static Context,
    raw: ucp_mem_h,
}

// SAFETY: a handle of a context that locks itself.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// What a peer needs to read it.
    pub fn key(&self) -> Result<Vec<u8>, String> {
        let ucx = self.context.ucx;
        let (mut key, mut bytes) = (null_mut(), 0);
        // SAFETY: places for a buffer of the library and its length; copied before it is released.
        unsafe {
            ucx.check((ucx.ucp_rkey_pack)(self.context.raw, self.raw, &mut key, &mut bytes))?;
            let copy = std::slice::from_raw_parts(key.cast::<u8>(), bytes).to_vec();
            (ucx.ucp_rkey_buffer_release)(key);
            Ok(copy)
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: registered with this context, taken back once.
        let status = unsafe { (self.context.ucx.ucp_mem_unmap)(self.context.raw, self.raw) };
        if status != UCS_OK {
            tracing::warn!(status, "UCX did not let go of memory");
        }
    }
}

/// Memory that outlives leases, known to a way's devices for as long as it is there: tied to its region.
pub(super) struct Known {
    way: Way,
    /// With the key; the words of a refusal, which is final.
    registered: Result<(Memory, Vec<u8>), String>,
}

impl Known {
    /// That of `region`, which is registered here if it is not yet.
    pub fn of(context: &'static Context, region: &Region) -> Arc<Known> {
        let register = || {
            let memory = context.register(region.address(), region.bytes(), region.place())?;
            let key = memory.key()?;
            Ok((memory, key))
        };
        let make = || Known { way: context.way, registered: register() };
        region.tie(|known: &Known| known.way == context.way, make)
    }

    /// What a peer needs to read it.
    pub fn key(&self) -> Result<&[u8], String> {
        self.registered.as_ref().map(|(_, key)| &key[..]).map_err(Clone::clone)
    }
}

/// Progress of one connection's operations.
pub(super) struct Worker {
    context: &'static Context,
    raw: ucp_worker_h,
    efd: i32,
}

// SAFETY: made for serialised use by any threads.
unsafe impl Send for Worker {}

/// Wakes a thread in [`Worker::wait`] from another one, while the worker lives.
#[derive(Clone, Copy)]
pub(super) struct Waker {
    ucx: &'static Ucx,
    raw: ucp_worker_h,
}

// SAFETY: the one call that it makes may come from any thread.
unsafe impl Send for Waker {}
// SAFETY: as above.
unsafe impl Sync for Waker {}

impl Waker {
    /// # Safety
    /// The worker lives.
    pub unsafe fn wake(&self) {
        // SAFETY: the caller's promise.
        unsafe { (self.ucx.ucp_worker_signal)(self.raw) };
    }
}

impl Worker {
    pub fn new(context: &'static Context) -> Result<Self, String> {
        let ucx = context.ucx;
        // SAFETY: zeros are valid, the mask says what is set.
        let mut params: ucp_worker_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
        params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
        let (mut raw, mut efd) = (null_mut(), -1);
        // SAFETY: a context that lives for ever, and places for the results.
        unsafe {
            ucx.check((ucx.ucp_worker_create)(context.raw, &params, &mut raw))?;
            if let Err(words) = ucx.check((ucx.ucp_worker_get_efd)(raw, &mut efd)) {
                (ucx.ucp_worker_destroy)(raw);
                return Err(words);
            }
        }
        Ok(Worker { context, raw, efd })
    }

    pub fn address(&self) -> Result<Vec<u8>, String> {
        let ucx = self.context.ucx;
        let (mut address, mut bytes) = (null_mut(), 0);
        // SAFETY: as in Memory::key.
        unsafe {
            ucx.check((ucx.ucp_worker_get_address)(self.raw, &mut address, &mut bytes))?;
            let copy = std::slice::from_raw_parts(address.cast::<u8>(), bytes).to_vec();
            (ucx.ucp_worker_release_address)(self.raw, address);
            Ok(copy)
        }
    }

    pub fn waker(&self) -> Waker {
        Waker { ucx: self.context.ucx, raw: self.raw }
    }

    /// Does what there is to do.
    pub fn progress(&self) -> bool {
        // SAFETY: this worker, by one thread at a time.
        unsafe { (self.context.ucx.ucp_worker_progress)(self.raw) > 0 }
    }

    /// Waits for something to do, at most `most`.
    pub fn wait(&self, most: Duration) {
        // SAFETY: as above. Busy, or an error: the caller looks again at once, and what is wrong shows there.
        if unsafe { (self.context.ucx.ucp_worker_arm)(self.raw) } != UCS_OK {
            return;
        }
        let mut poll = libc::pollfd { fd: self.efd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, which the worker owns.
        unsafe { libc::poll(&mut poll, 1, most.as_millis() as i32) };
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: made by this context, ended once; nothing of it is used after.
        unsafe { (self.context.ucx.ucp_worker_destroy)(self.raw) };
    }
}

/// A worker with one peer, whose memory it reads.
pub(super) struct Reader {
    worker: Worker,
    ep: ucp_ep_h,
    /// Set by [`peer_lost`]. It must be asked for nothing after: the library ends the process.
    lost: Box<AtomicBool>,
}

// SAFETY: as its worker.
unsafe impl Send for Reader {}

/// Key of a peer's memory, unpacked. Freed by [`Reader::forget`], or with the worker.
#[derive(Clone, Copy)]
pub(super) struct RemoteKey(ucp_rkey_h);

/// Called when a peer is lost: what is under way ends with an error, which says so too.
unsafe extern "C" fn peer_lost(lost: *mut libc::c_void, _: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: the reader's flag, which outlives its endpoint and its worker.
    unsafe { &*lost.cast::<AtomicBool>() }.store(true, Ordering::Release);
    tracing::debug!(status, "UCX has lost a peer");
}

impl Reader {
    /// A reader of the worker at `address`.
    pub fn new(context: &'static Context, address: &[u8]) -> Result<Self, String> {
        let worker = Worker::new(context)?;
        let lost = Box::new(AtomicBool::new(false));
        // SAFETY: zeros are valid, the mask says what is set.
        let mut params: ucp_ep_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
        params.address = address.as_ptr().cast();
        params.err_mode = UCP_ERR_HANDLING_MODE_NONE;
        // Shared memory has no other mode; elsewhere a lost peer without a handler would end the process.
        if context.way != Way::Shm {
            params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER;
            params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
            params.err_handler =
                ucp_err_handler_t { cb: Some(peer_lost), arg: (&raw const *lost) as *mut libc::c_void };
        }
        let mut ep = null_mut();
        // SAFETY: the address lives through the call; a place for the endpoint.
        unsafe { context.ucx.check((context.ucx.ucp_ep_create)(worker.raw, &params, &mut ep))? };
        Ok(Reader { worker, ep, lost })
    }

    fn ucx(&self) -> &'static Ucx {
        self.worker.context.ucx
    }

    /// Whether the peer is gone, as far as is known: looks first.
    pub fn lost(&self) -> bool {
        self.worker.progress();
        self.lost.load(Ordering::Acquire)
    }

    pub fn key(&self, packed: &[u8]) -> Result<RemoteKey, String> {
        let mut key = null_mut();
        // SAFETY: bytes that live through the call, a place for the key.
        unsafe {
            self.ucx().check((self.ucx().ucp_ep_rkey_unpack)(self.ep, packed.as_ptr().cast(), &mut key))?
        };
        Ok(RemoteKey(key))
    }

    /// # Safety
    /// The key is of this reader, not used after, and nothing with it is under way.
    pub unsafe fn forget(&self, key: RemoteKey) {
        // SAFETY: the caller's promise.
        unsafe { (self.ucx().ucp_rkey_destroy)(key.0) };
    }

    /// Begins to read `bytes` of the peer's memory.
    ///
    /// # Safety
    /// `into` is writable for `bytes`, by nobody else, until the operation has ended or this reader is dropped.
    pub unsafe fn get(&self, into: *mut u8, bytes: usize, address: u64, key: RemoteKey) -> Posted {
        // SAFETY: zeros are valid, the mask says what is set.
        let mut param: ucp_request_param_t = unsafe { std::mem::zeroed() };
        param.op_attr_mask = UCP_OP_ATTR_FIELD_MEMORY_TYPE;
        param.memory_type = UCS_MEMORY_TYPE_HOST;
        // SAFETY: the caller's promise.
        Posted::of(unsafe { (self.ucx().ucp_get_nbx)(self.ep, into.cast(), bytes, address, key.0, &param) })
    }

    /// Waits for the end of what was begun. `None`: it is still under way when `over` says so or at `until`.
    pub fn finish(
        &self,
        posted: Posted,
        until: Instant,
        over: impl Fn() -> bool,
    ) -> Option<Result<(), String>> {
        let request = match posted {
            Posted::Done => return Some(Ok(())),
            Posted::Failed(status) => return Some(Err(self.ucx().words(status))),
            Posted::Pending(request) => request,
        };
        let mut idle = 0;
        loop {
            // SAFETY: a request of this worker that is freed once, after its end.
            let status = unsafe { (self.ucx().ucp_request_check_status)(request) };
            if status != UCS_INPROGRESS {
                // SAFETY: as above.
                unsafe { (self.ucx().ucp_request_free)(request) };
                return Some(self.ucx().check(status));
            }
            if self.worker.progress() {
                idle = 0;
                continue;
            }
            if over() || Instant::now() >= until {
                return None;
            }
            idle += 1;
            if idle > IDLE_ROUNDS {
                self.worker.wait(EVENT_WAIT);
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // SAFETY: zeros are valid, the mask says what is set.
        let mut param: ucp_request_param_t = unsafe { std::mem::zeroed() };
        if self.worker.context.way != Way::Shm {
            // What is under way is given up; without a handler for lost peers there is no such thing.
            param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
            param.flags = UCP_EP_CLOSE_FLAG_FORCE;
        }
        // SAFETY: the endpoint is not used after; the worker ends next, and with it whatever is left.
        let posted = Posted::of(unsafe { (self.ucx().ucp_ep_close_nbx)(self.ep, &param) });
        if self.finish(posted, Instant::now() + CLOSE_WAIT, || false).is_none() {
            tracing::debug!("a UCX endpoint did not close in order");
        }
    }
}
