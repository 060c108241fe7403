//! Whether a model fits before any of it is read: what a rank will hold, and what the machine has. Called by a node before
//! it loads, and by `up` for all its processes together.

use std::fmt;
use std::fs;
use std::path::Path;

/// Bytes of a KV cache of which nobody says how large it is to be, on a device that does not say what it has free.
pub const KV_BYTES: u64 = 1 << 30;
/// Of a device's free memory, this much at the least is left to the steps: what they compute with, decoded weights, keys and
/// values made from latents, graphs. A tenth where that is more.
const STEPS_BYTES: u64 = 2 << 30;

/// Bytes for the KV cache of a device that has so much free beside the weights, where nobody says how many.
pub fn kv_bytes(free: Option<u64>) -> u64 {
    let Some(free) = free else { return KV_BYTES };
    // Small devices share.
    free - STEPS_BYTES.max(free / 10).min(free / 2)
}

/// Bytes for the caches of a model and of its draft model, with room for as many tokens each, where a token takes `bytes` of either
/// (0: there is no draft model). `asked`: of the model's.
pub fn kv_bytes_of_both(asked: Option<u64>, free: Option<u64>, bytes: [usize; 2]) -> [u64; 2] {
    let [own, draft] = bytes.map(|bytes| bytes as u64);
    let shared = |all: u64| (u128::from(all) * u128::from(own) / u128::from(own + draft)) as u64;
    let kv = match (asked, free) {
        (Some(asked), _) => asked,
        (None, Some(_)) => shared(kv_bytes(free)),
        (None, None) => KV_BYTES,
    };
    [kv, (u128::from(kv) * u128::from(draft) / u128::from(own)) as u64]
}

/// What is to be held in memory: weights as they are stored, and the KV cache. What activations take comes on top.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of KV cache.
    pub kv: u64,
}

impl Need {
    /// Both together.
    pub fn bytes(self) -> u64 {
        self.weights.saturating_add(self.kv)
    }

    /// What this and `other` hold together.
    pub fn with(self, other: Need) -> Need {
        Need { weights: self.weights.saturating_add(other.weights), kv: self.kv.saturating_add(other.kv) }
    }

    /// The arithmetic, where it does not come out: `None` when this fits into `available` bytes.
    pub fn beyond(self, available: u64) -> Option<TooMuch> {
        (self.bytes() > available).then_some(TooMuch { need: self, available, of: "machine" })
    }

    /// The same of a device with memory of its own.
    pub fn beyond_device(self, free: u64) -> Option<TooMuch> {
        self.beyond(free).map(|much| TooMuch { of: "device", ..much })
    }
}

/// More than there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMuch {
    need: Need,
    available: u64,
    of: &'static str,
}

impl fmt::Display for TooMuch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TooMuch { need, available, of } = *self;
        write!(
            f,
            "{} of weights and {} of KV cache are {}, this {of} has {} available",
            gib(need.weights),
            gib(need.kv),
            gib(need.bytes()),
            gib(available)
        )
    }
}

impl std::error::Error for TooMuch {}

/// `12.3 GiB`, in the unit in which settings and machines name memory.
pub(crate) fn gib(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 30) {
        gib if gib < 0.95 => format!("{:.1} MiB", gib * 1024.0),
        gib => format!("{gib:.1} GiB"),
    }
}

/// Bytes that processes of this machine, or of this container, can still take; `None` where the system does not tell.
pub fn available() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text));
    // A container's own limit, in the layout of cgroup v2.
    let read = |name: &str| fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok();
    let container = read("memory.max").zip(read("memory.current")).zip(read("memory.stat"));
    let container = container.and_then(|((max, current), stat)| cgroup(&max, &current, &stat));
    machine.into_iter().chain(container).min()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What is left of a container's limit; files that are merely cached do not count as taken. `None` without a limit.
fn cgroup(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    let cached: u64 = cached.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_show_their_arithmetic() {
        let need = Need { weights: 65 << 30, kv: 512 << 20 };
        assert_eq!(need.beyond(66 << 30), None);
        assert_eq!(need.beyond(need.bytes()), None);
        assert_eq!(
            need.beyond(64 << 30).map(|much| much.to_string()).as_deref(),
            Some(
                "65.0 GiB of weights and 512.0 MiB of KV cache are 65.5 GiB, this machine has 64.0 GiB available"
            )
        );
        let much = need.beyond_device(64 << 30).map(|much| much.to_string()).unwrap_or_default();
        assert!(much.ends_with("are 65.5 GiB, this device has 64.0 GiB available"), "{much}");
        assert_eq!(need.with(need), Need { weights: 130 << 30, kv: 1 << 30 });
        assert_eq!(Need { weights: u64::MAX, kv: 1 }.bytes(), u64::MAX);
    }

    /// Steps keep 2 GiB, a tenth of a large device, half of a small one.
    #[test]
    fn what_is_free_is_for_the_cache_but_for_a_margin() {
        for (free, want) in [(0, 0), (1 << 30, 1 << 29), (10 << 30, 8 << 30), (100 << 30, 90 << 30)] {
            assert_eq!(kv_bytes(Some(free)), want, "{free} free");
        }
        assert_eq!(kv_bytes(None), KV_BYTES);
    }

    /// Protects: a draft model's cache holds as many tokens, and where the device says what is free, both fit.
    #[test]
    fn two_caches_of_as_many_tokens() {
        assert_eq!(kv_bytes_of_both(Some(900), Some(1), [30, 10]), [900, 300]);
        assert_eq!(kv_bytes_of_both(None, Some(10 << 30), [30, 10]), [6 << 30, 2 << 30]);
        assert_eq!(kv_bytes_of_both(None, None, [20, 10]), [KV_BYTES, KV_BYTES / 2]);
        assert_eq!(kv_bytes_of_both(None, Some(10 << 30), [30, 0]), [8 << 30, 0]);
    }

    #[test]
    fn what_the_system_says() {
        assert_eq!(meminfo("MemTotal:       100 kB\nMemAvailable:    25 kB\n"), Some(25 << 10));
        assert_eq!(meminfo("MemTotal: 100 kB\n"), None);
        assert_eq!(cgroup("1000\n", "700\n", "anon 500\ninactive_file 150\n"), Some(450));
        assert_eq!(cgroup("1000", "1200", ""), Some(0));
        assert_eq!(cgroup("max\n", "700\n", ""), None);
    }
}
