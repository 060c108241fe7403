//! Cores of this machine, and threads that stay on one: the pool's, where that is asked, and those that measure beside it.

/// Cores that this process may use.
#[cfg(target_os = "linux")]
pub fn usable() -> Vec<usize> {
    // SAFETY: zeros are an empty set, which the call fills; on failure it stays empty.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of_val(&set), &mut set);
        set
    };
    // SAFETY: every number is below the size of the set.
    (0..libc::CPU_SETSIZE as usize).filter(|core| unsafe { libc::CPU_ISSET(*core, &set) }).collect()
}

/// None that are known.
#[cfg(not(target_os = "linux"))]
pub fn usable() -> Vec<usize> {
    Vec::new()
}

/// Keeps this thread on `core`; where the system refuses, it goes where it likes.
pub fn stay(core: usize) {
    stay_on(&[core]);
}

/// Keeps this thread, and those that it starts, on `cores`.
#[cfg(target_os = "linux")]
pub fn stay_on(cores: &[usize]) {
    // SAFETY: zeros are an empty set, which takes no number beyond its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().for_each(|core| libc::CPU_SET(*core, &mut set));
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// It goes where it likes.
#[cfg(not(target_os = "linux"))]
pub fn stay_on(_cores: &[usize]) {}
