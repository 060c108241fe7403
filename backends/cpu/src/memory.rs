//! Raw memory for weights, cache, activations and scratch: aligned to cache lines, in huge pages where large, touched
//! only when written.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use backend::BackendError;

/// Alignment of everything: a cache line, and the widest vector.
const LINE_BYTES: usize = 64;
/// From here on memory is mapped by itself, in huge pages: fewer address translations while weights stream. The heap hands out
/// pages that it has had before, which are small and stay so.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// An owned, aligned block of bytes. Shared between threads as raw memory: every access is through pointers, whose
/// users say why they do not meet.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    offset: usize,
    bytes: usize,
    home: Home,
}

/// Whose the memory is.
#[derive(Debug)]
enum Home {
    Heap(Layout),
    /// The system's: so many bytes were mapped.
    #[cfg(target_os = "linux")]
    System(usize),
}

// SAFETY: Memory is plain bytes owned by this value; it has no interior state that depends on a thread.
unsafe impl Send for Memory {}
// SAFETY: a shared Memory only gives out raw pointers; the accesses through them are argued where they happen.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` of zeros, committed by the system as they are first written.
    pub(crate) fn zeroed(bytes: usize) -> Result<Self, BackendError> {
        Self::allocate(bytes, true)
    }

    /// `bytes` that the caller writes before reading.
    pub(crate) fn unwritten(bytes: usize) -> Result<Self, BackendError> {
        Self::allocate(bytes, false)
    }

    fn allocate(bytes: usize, zero: bool) -> Result<Self, BackendError> {
        let refused = || BackendError::OutOfMemory { wanted_bytes: bytes as u64, free_bytes: 0 };
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE_BYTES {
            return Self::map(bytes).ok_or_else(refused);
        }
        let padded = bytes.max(1).checked_add(LINE_BYTES).ok_or_else(refused)?;
        // Small alignment keeps the allocator on its lazily zeroed path; the start is moved up to a cache line.
        let layout = Layout::from_size_align(padded, 16).map_err(|_| refused())?;
        // SAFETY: the layout has a size above zero.
        let start = unsafe { if zero { alloc_zeroed(layout) } else { alloc(layout) } };
        let start = NonNull::new(start).ok_or_else(refused)?;
        let offset = start.as_ptr().align_offset(LINE_BYTES);
        Ok(Memory { start, offset, bytes, home: Home::Heap(layout) })
    }

    /// Zeros of the system, in huge pages as far as they are whole.
    #[cfg(target_os = "linux")]
    fn map(bytes: usize) -> Option<Self> {
        let mapped = bytes.checked_add(HUGE_PAGE_BYTES)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping anywhere.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = NonNull::new(start.cast::<u8>())?;
        let offset = start.as_ptr().align_offset(HUGE_PAGE_BYTES);
        let memory = Memory { start, offset, bytes, home: Home::System(mapped) };
        let whole = bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        // SAFETY: `whole` bytes of the mapping, from a page's start on. The call is advice: refusal is fine.
        unsafe { libc::madvise(memory.at(0).cast(), whole, libc::MADV_HUGEPAGE) };
        Some(memory)
    }

    /// Usable bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address `offset` bytes from the start; `offset` may be the end.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes, "offset {offset} in {} bytes", self.bytes);
        // SAFETY: offset <= bytes, and self.offset + bytes <= the allocated size.
        unsafe { self.start.as_ptr().add(self.offset + offset) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.home {
            // SAFETY: start was allocated with this layout and is freed once.
            Home::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            // SAFETY: so many bytes were mapped at start, and are unmapped once.
            #[cfg(target_os = "linux")]
            Home::System(mapped) => unsafe {
                libc::munmap(self.start.as_ptr().cast(), mapped);
            },
        }
    }
}

/// A part of a block of memory, shared with the owners of its other parts. The default is nowhere: no byte of it is used.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place(Option<(Arc<Memory>, usize)>);

impl Place {
    /// Places of the given sizes in one block.
    pub(crate) fn cut(sizes: &[usize]) -> Result<Vec<Place>, BackendError> {
        let mut end = 0;
        let starts: Vec<usize> = sizes
            .iter()
            .map(|bytes| {
                let start = end;
                end += bytes.next_multiple_of(LINE_BYTES);
                start
            })
            .collect();
        let memory = Arc::new(Memory::unwritten(end)?);
        Ok(starts.into_iter().map(|start| Place(Some((memory.clone(), start)))).collect())
    }

    /// The address `offset` bytes from the start.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        match &self.0 {
            Some((memory, start)) => memory.at(start + offset),
            None => std::ptr::dangling_mut(),
        }
    }
}

/// Buffers of past activations, for reuse: a running model allocates nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arena(Arc<Mutex<Vec<Memory>>>);

/// Buffers kept for reuse: some ten of a step, in each of a few sizes. Beyond, the one that was not used for the longest time
/// is given back to the system.
const ARENA_BUFFERS_MAX: usize = 64;

impl Arena {
    /// A buffer of at least `len` floats. Contents are whatever was there.
    pub(crate) fn floats(&self, len: usize) -> Floats {
        let mut free = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let bytes = len * size_of::<f32>();
        // The smallest that fits, but none so large that it would be missed elsewhere.
        let fits = |memory: &Memory| memory.bytes() >= bytes && memory.bytes() / 4 <= bytes.max(4096);
        let best = (0..free.len()).filter(|at| fits(&free[*at])).min_by_key(|at| free[*at].bytes());
        let memory = match best {
            Some(at) => free.remove(at),
            None => Memory::zeroed(bytes.next_multiple_of(LINE_BYTES))
                .unwrap_or_else(|error| panic!("activation: {error}")),
        };
        Floats { memory: Some(memory), len, home: self.clone() }
    }
}

/// `len` floats of an arena, returned to it when dropped.
#[derive(Debug)]
pub(crate) struct Floats {
    memory: Option<Memory>,
    len: usize,
    home: Arena,
}

impl Floats {
    fn address(&self) -> *mut f32 {
        // `memory` is only taken by drop.
        self.memory.as_ref().map_or(std::ptr::dangling_mut(), |memory| memory.at(0).cast())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *const f32 {
        self.address()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.address()
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        // SAFETY: `len` floats lie in `memory`, initialised (zeroed when allocated) and borrowed with self.
        unsafe { std::slice::from_raw_parts(self.address(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as in as_slice; &mut self makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len) }
    }

    /// The bytes of the floats, as they travel between ranks (little endian).
    pub(crate) fn as_bytes(&self) -> &[u8] {
        // SAFETY: as in as_slice; any byte of a float is a valid u8.
        unsafe { std::slice::from_raw_parts(self.address().cast(), self.len * size_of::<f32>()) }
    }

    /// The bytes of the floats, to be received into.
    pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in as_mut_slice; any bytes are valid floats.
        unsafe { std::slice::from_raw_parts_mut(self.address().cast(), self.len * size_of::<f32>()) }
    }
}

impl Drop for Floats {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let mut free = self.home.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // In the order of their return.
            if free.len() >= ARENA_BUFFERS_MAX {
                free.remove(0);
            }
            free.push(memory);
        }
    }
}
