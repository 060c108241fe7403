//! Types and numbers of `ucp/api/ucp.h`, of which only what [`crate::Ucx`] needs. Later releases append fields: a mask in the
//! first one says which are set.
#![allow(non_camel_case_types)]

use libc::{c_char, c_int, c_uint, c_void};

/// A status: 0, 1 (in progress), or below 0.
pub type ucs_status_t = i32;
/// Null, a status below 0, or a request.
pub type ucs_status_ptr_t = *mut c_void;
/// Process-wide state.
pub type ucp_context_h = *mut c_void;
/// One thread's progress.
pub type ucp_worker_h = *mut c_void;
/// A peer.
pub type ucp_ep_h = *mut c_void;
/// Registered memory.
pub type ucp_mem_h = *mut c_void;
/// A peer's registered memory.
pub type ucp_rkey_h = *mut c_void;
/// Opaque.
pub type ucp_config_t = c_void;
/// Opaque bytes.
pub type ucp_address_t = c_void;
/// A log handler, of which no argument is looked at.
pub type ucs_log_func_t = unsafe extern "C" fn() -> i32;

/// All is well.
pub const UCS_OK: ucs_status_t = 0;
/// Not yet.
pub const UCS_INPROGRESS: ucs_status_t = 1;
/// [`crate::Ucx::ucp_worker_arm`]: there is something to do.
pub const UCS_ERR_BUSY: ucs_status_t = -15;

/// Release that these declarations are of.
pub const UCP_API_MAJOR: u32 = 1;
/// As above.
pub const UCP_API_MINOR: u32 = 11;

/// `features` is set.
pub const UCP_PARAM_FIELD_FEATURES: u64 = 1;
/// `mt_workers_shared` is set.
pub const UCP_PARAM_FIELD_MT_WORKERS_SHARED: u64 = 1 << 5;
/// Reading and writing of a peer's memory.
pub const UCP_FEATURE_RMA: u64 = 1 << 1;
/// Waiting for events.
pub const UCP_FEATURE_WAKEUP: u64 = 1 << 4;

/// `memory_types` is asked for.
pub const UCP_ATTR_FIELD_MEMORY_TYPES: u64 = 1 << 2;

/// `thread_mode` is set.
pub const UCP_WORKER_PARAM_FIELD_THREAD_MODE: u64 = 1;
/// One thread at a time.
pub const UCS_THREAD_MODE_SERIALIZED: c_uint = 1;

/// `address` is set.
pub const UCP_EP_PARAM_FIELD_REMOTE_ADDRESS: u64 = 1;
/// `err_mode` is set.
pub const UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE: u64 = 1 << 1;
/// `err_handler` is set.
pub const UCP_EP_PARAM_FIELD_ERR_HANDLER: u64 = 1 << 2;
/// Nobody is told of a lost peer: the only mode of shared memory.
pub const UCP_ERR_HANDLING_MODE_NONE: c_uint = 0;
/// A lost peer ends what is under way.
pub const UCP_ERR_HANDLING_MODE_PEER: c_uint = 1;

/// `address` is set.
pub const UCP_MEM_MAP_PARAM_FIELD_ADDRESS: u64 = 1;
/// `length` is set.
pub const UCP_MEM_MAP_PARAM_FIELD_LENGTH: u64 = 1 << 1;
/// `prot` is set.
pub const UCP_MEM_MAP_PARAM_FIELD_PROT: u64 = 1 << 3;
/// `memory_type` is set.
pub const UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE: u64 = 1 << 4;
/// The owner reads.
pub const UCP_MEM_MAP_PROT_LOCAL_READ: c_uint = 1;
/// The owner writes.
pub const UCP_MEM_MAP_PROT_LOCAL_WRITE: c_uint = 1 << 1;
/// Peers read; without the next bit they cannot write.
pub const UCP_MEM_MAP_PROT_REMOTE_READ: c_uint = 1 << 8;
/// Memory of the processor.
pub const UCS_MEMORY_TYPE_HOST: c_uint = 0;
/// Memory of an NVIDIA GPU.
pub const UCS_MEMORY_TYPE_CUDA: c_uint = 1;

/// `flags` is set.
pub const UCP_OP_ATTR_FIELD_FLAGS: u32 = 1 << 4;
/// `memory_type` is set.
pub const UCP_OP_ATTR_FIELD_MEMORY_TYPE: u32 = 1 << 6;
/// Do not wait for what is under way.
pub const UCP_EP_CLOSE_FLAG_FORCE: u32 = 1;

/// Of a context.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_params_t {
    /// Which fields are set.
    pub field_mask: u64,
    /// What will be used.
    pub features: u64,
    /// Not used.
    pub request_size: usize,
    /// Not used.
    pub request_init: *const c_void,
    /// Not used.
    pub request_cleanup: *const c_void,
    /// Not used.
    pub tag_sender_mask: u64,
    /// Workers of several threads share the context.
    pub mt_workers_shared: c_int,
    /// Not used.
    pub estimated_num_eps: usize,
    /// Not used.
    pub estimated_num_ppn: usize,
    /// Not used.
    pub name: *const c_char,
    /// Not used; later releases.
    pub later: [u64; 4],
}

/// What a context says of itself.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_context_attr_t {
    /// Which fields are asked for.
    pub field_mask: u64,
    /// Not used.
    pub request_size: usize,
    /// Not used.
    pub thread_mode: c_uint,
    /// A bit for each type of memory that it knows.
    pub memory_types: u64,
    /// Not used.
    pub name: [c_char; 32],
    /// Not used; later releases.
    pub later: [u64; 4],
}

/// Of a worker.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_worker_params_t {
    /// Which fields are set.
    pub field_mask: u64,
    /// How many threads use it.
    pub thread_mode: c_uint,
    /// Not used.
    pub cpu_mask: [u64; 16],
    /// Not used.
    pub events: c_uint,
    /// Not used.
    pub user_data: *mut c_void,
    /// Not used.
    pub event_fd: c_int,
    /// Not used.
    pub flags: u64,
    /// Not used.
    pub name: *const c_char,
    /// Not used.
    pub am_alignment: usize,
    /// Not used.
    pub client_id: u64,
    /// Not used; later releases.
    pub later: [u64; 4],
}

/// Called when a peer is lost.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_err_handler_t {
    /// The function.
    pub cb: Option<unsafe extern "C" fn(arg: *mut c_void, ep: ucp_ep_h, status: ucs_status_t)>,
    /// Its first argument.
    pub arg: *mut c_void,
}

/// An address of the system.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucs_sock_addr_t {
    /// Not used.
    pub addr: *const c_void,
    /// Not used.
    pub addrlen: u32,
}

/// Of an endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_ep_params_t {
    /// Which fields are set.
    pub field_mask: u64,
    /// The peer's worker.
    pub address: *const ucp_address_t,
    /// What happens when the peer is lost.
    pub err_mode: c_uint,
    /// Who hears of it.
    pub err_handler: ucp_err_handler_t,
    /// Not used.
    pub user_data: *mut c_void,
    /// Not used.
    pub flags: c_uint,
    /// Not used.
    pub sockaddr: ucs_sock_addr_t,
    /// Not used.
    pub conn_request: *mut c_void,
    /// Not used.
    pub name: *const c_char,
    /// Not used.
    pub local_sockaddr: ucs_sock_addr_t,
    /// Not used; later releases.
    pub later: [u64; 4],
}

/// Of memory that is registered.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_mem_map_params_t {
    /// Which fields are set.
    pub field_mask: u64,
    /// Where it begins.
    pub address: *mut c_void,
    /// Bytes.
    pub length: usize,
    /// Not used.
    pub flags: c_uint,
    /// Who may do what.
    pub prot: c_uint,
    /// Whose memory it is.
    pub memory_type: c_uint,
    /// Not used; later releases.
    pub later: [u64; 4],
}

/// Of an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucp_request_param_t {
    /// Which fields are set.
    pub op_attr_mask: u32,
    /// Of the operation.
    pub flags: u32,
    /// Not used.
    pub request: *mut c_void,
    /// Not used.
    pub cb: *const c_void,
    /// Not used.
    pub datatype: u64,
    /// Not used.
    pub user_data: *mut c_void,
    /// Not used.
    pub reply_buffer: *mut c_void,
    /// Whose memory the own end is.
    pub memory_type: c_uint,
    /// Not used.
    pub recv_info: *mut c_void,
    /// Not used.
    pub memh: ucp_mem_h,
    /// Not used; later releases.
    pub later: [u64; 4],
}
