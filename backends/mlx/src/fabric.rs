//! MLX's own distributed layer: the sums and joins of a tensor-parallel group as operations of the graph, over `ring` (TCP) or
//! `jaccl` (RDMA over Thunderbolt 5). Activations travel in clear, so only private addresses are taken.
//!
//! MLX reads where its ranks are from files that the environment names, once per process: [`prepare`] names them before the
//! process has threads, [`Fabric::join`] writes them when the ranks have met. A process is a rank of one group only; after a
//! loss it is started anew.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, OsString};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use backend::{BackendError, Links};
use mlx_rs::{Array, Stream, ops};

use crate::calls::{listening, raw, said};
use crate::graph::{Failure, Recorded, first, int};
use crate::rdma;

/// Where MLX looks for the addresses of `ring`.
const HOST_FILE: &str = "MLX_HOSTFILE";
/// Where MLX looks for the devices of `jaccl`.
const DEVICE_FILE: &str = "MLX_IBV_DEVICES";
/// Where the ranks of `jaccl` meet.
const COORDINATOR: &str = "MLX_JACCL_COORDINATOR";
const RANK: &str = "MLX_RANK";

/// Names the files that MLX reads, in this process's environment. `leader`: `host:port` where the group meets; `jaccl` meets
/// at the port above it.
///
/// # Safety
/// The process has one thread: the environment is written.
pub unsafe fn prepare(rank: usize, leader: &str) {
    let since = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
    let mark = format!("{}-{since}", std::process::id());
    for (variable, value) in environment(rank, leader, &std::env::temp_dir(), &mark) {
        // SAFETY: the caller's promise.
        unsafe { std::env::set_var(variable, value) };
    }
}

/// What MLX reads of the environment. `mark`: in the names of its files in `dir`, this process's own.
fn environment(rank: usize, leader: &str, dir: &Path, mark: &str) -> [(&'static str, OsString); 4] {
    let file = |what| dir.join(format!("baton-{what}-{mark}.json")).into_os_string();
    let coordinator = leader
        .rsplit_once(':')
        .and_then(|(host, port)| Some(format!("{host}:{}", port.parse::<u16>().ok()?.checked_add(1)?)));
    [
        (RANK, rank.to_string().into()),
        (HOST_FILE, file("hosts")),
        (DEVICE_FILE, file("devices")),
        (COORDINATOR, coordinator.unwrap_or_default().into()),
    ]
}

/// What this machine tells the others about its links besides its address.
pub fn describe() -> String {
    rdma::describe()
}

/// The specification of a group for [`Links::Native`]: per rank its address (`ip:port`) and what [`describe`] said.
pub fn specification<'a>(ranks: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    ranks.into_iter().map(|(address, about)| format!("{address}\t{about}\n")).collect()
}

/// The group of this process.
#[derive(Debug)]
pub(crate) struct Fabric {
    /// Never freed: the last owner's destructor, which runs when the process exits, tells the ring's threads to end without
    /// their lock, so that one about to sleep is not woken, and waits for it for ever.
    group: mlx_sys::mlx_distributed_group,
    stream: Stream,
    rank: usize,
    world: usize,
    /// Widths of all ranks where this one has so many columns.
    widths: RefCell<HashMap<i32, Vec<i32>>>,
}

/// The specification that this process has joined.
static JOINED: Mutex<Option<String>> = Mutex::new(None);

impl Fabric {
    /// Connects with the other ranks. Waits for them: whoever calls watches over it.
    pub(crate) fn join(rank: usize, world: usize, links: &Links) -> Result<Self, BackendError> {
        let Links::Native(spec) = links else {
            return Err(unavailable("a group over sockets that are not MLX's own".to_owned()));
        };
        let way = Way::choose(spec, world, is_available(c"jaccl")).map_err(unavailable)?;
        let mut joined = JOINED.lock().unwrap_or_else(PoisonError::into_inner);
        if joined.as_ref().is_some_and(|joined| joined != spec) {
            return Err(unavailable("this process was a rank of another group already".to_owned()));
        }
        let file = HandedOver::write(way.variable, std::env::var_os(way.variable), &way.content)?;
        let group = init(way.name).map_err(|failure| lost(rank, world, failure.0))?;
        drop(file);
        // SAFETY: a live handle.
        let got = unsafe {
            (mlx_sys::mlx_distributed_group_rank(group), mlx_sys::mlx_distributed_group_size(group))
        };
        if got != (int(rank), int(world)) {
            return Err(unavailable(format!("MLX says rank and size {got:?}, not {rank} of {world}")));
        }
        *joined = Some(spec.clone());
        Ok(Fabric { group, stream: Stream::cpu(), rank, world, widths: RefCell::default() })
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// The sum of all ranks' `x`.
    pub(crate) fn sum(&self, x: &Array) -> Recorded {
        raw(|result| {
            // SAFETY: live handles; the result is a fresh array.
            unsafe { mlx_sys::mlx_distributed_all_sum(result, x.as_ptr(), self.group, self.stream.as_ptr()) }
        })
    }

    /// All ranks' `x`, equal in shape, one after the other along axis 0.
    fn gather(&self, x: &Array) -> Recorded {
        raw(|result| {
            // SAFETY: as above.
            unsafe {
                mlx_sys::mlx_distributed_all_gather(result, x.as_ptr(), self.group, self.stream.as_ptr())
            }
        })
    }

    /// All ranks' columns `[rows, width of each]` side by side. The first use of a width waits for the others' widths.
    pub(crate) fn side_by_side(&self, x: &Array) -> Recorded {
        let width = x.dim(-1);
        let known = self.widths.borrow().get(&width).cloned();
        let widths = match known {
            Some(widths) => widths,
            None => {
                let all = self.gather(&Array::from_slice(&[width], &[1]))?;
                all.eval()?;
                let all = all.try_as_slice::<i32>().map_err(|error| Failure(error.to_string()))?.to_vec();
                self.widths.borrow_mut().insert(width, all.clone());
                all
            }
        };
        let most = widths.iter().copied().max().unwrap_or(width);
        // Axis 0 is what is joined: columns become rows, as many for every rank.
        let turned = x.swap_axes(0, 1)?;
        let padded = match most - width {
            0 => turned.contiguous()?,
            more => ops::pad(&turned, &[(0, more), (0, 0)][..], None, None)?.contiguous()?,
        };
        let all = self.gather(&padded)?;
        let parts = widths.iter().enumerate().map(|(rank, width)| {
            let start = rank * most as usize;
            first(&all, start..start + *width as usize)
        });
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        Ok(ops::concatenate(&parts, 0)?.swap_axes(0, 1)?)
    }

    /// A failure of a step of this group: most likely the group's.
    pub(crate) fn lost(&self, reason: String) -> BackendError {
        lost(self.rank, self.world, reason)
    }
}

/// What joins the ranks, and the file that tells MLX about them.
#[derive(Debug, PartialEq, Eq)]
struct Way {
    /// MLX's.
    name: &'static CStr,
    /// Names the file.
    variable: &'static str,
    content: String,
}

impl Way {
    /// `jaccl` where MLX has it and every rank has a cable to every other, else `ring`. Errors when the specification is of
    /// another number of ranks, or when a rank's address is not of a network of one's own.
    fn choose(specification: &str, world: usize, has_jaccl: bool) -> Result<Self, String> {
        let ranks: Vec<(&str, &str)> =
            specification.lines().map(|line| line.split_once('\t').unwrap_or((line, ""))).collect();
        if ranks.len() != world {
            return Err(format!("{} addresses for {world} ranks", ranks.len()));
        }
        for (address, _) in &ranks {
            allowed(address)?;
        }
        Ok(match rdma::devices(&ranks).filter(|_| has_jaccl) {
            Some(content) => Way { name: c"jaccl", variable: DEVICE_FILE, content },
            None => Way { name: c"ring", variable: HOST_FILE, content: hosts(&ranks) },
        })
    }
}

/// MLX does not say which rank is gone; in a ring it is a neighbour.
fn lost(rank: usize, world: usize, reason: String) -> BackendError {
    BackendError::Group { rank: (rank + 1) % world.max(1), reason }
}

fn unavailable(reason: String) -> BackendError {
    BackendError::Unavailable { backend: "mlx", reason }
}

/// A file that MLX reads once; gone when dropped.
struct HandedOver(PathBuf);

impl HandedOver {
    /// `path`: what the environment's `variable` says.
    fn write(variable: &str, path: Option<OsString>, content: &str) -> Result<Self, BackendError> {
        let failed = |reason: std::io::Error| unavailable(format!("{variable}: {reason}"));
        let path = path
            .map(PathBuf::from)
            .ok_or_else(|| unavailable(format!("{variable} is not set: nobody prepared this process")))?;
        // Ours alone: what lies there already is not followed.
        remove(&path);
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        let handed = HandedOver(path);
        file.write_all(content.as_bytes()).map_err(failed)?;
        Ok(handed)
    }
}

impl Drop for HandedOver {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(path: &Path) {
    // Not there: nothing to remove.
    let _ = std::fs::remove_file(path);
}

/// `ring`'s host file: one connection per pair of neighbours.
fn hosts(ranks: &[(&str, &str)]) -> String {
    let hosts: Vec<String> = ranks.iter().map(|(address, _)| format!("[\"{address}\"]")).collect();
    format!("[{}]", hosts.join(","))
}

/// Whether a rank may listen there: MLX's connections have neither proof nor encryption.
fn allowed(address: &str) -> Result<(), String> {
    let parsed: SocketAddr = address.parse().map_err(|_| format!("address {address:?} of a rank"))?;
    let IpAddr::V4(ip) = parsed.ip() else {
        return Err(format!("{address}: MLX's ring speaks IPv4 only"));
    };
    // 100.64.0.0/10: overlay networks.
    let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
    if ip.is_loopback() || ip.is_private() || ip.is_link_local() || shared {
        return Ok(());
    }
    Err(format!(
        "{address} is not a private address: activations would travel in clear over a public network"
    ))
}

fn is_available(name: &CStr) -> bool {
    // SAFETY: a string that lives during the call.
    unsafe { mlx_sys::mlx_distributed_is_available(name.as_ptr()) }
}

fn init(name: &CStr) -> Result<mlx_sys::mlx_distributed_group, Failure> {
    listening();
    let name = CString::from(name);
    // SAFETY: a fresh handle, returned or freed; a string that lives during the call.
    unsafe {
        let mut group = mlx_sys::mlx_distributed_group_new();
        match mlx_sys::mlx_distributed_init(&mut group, true, name.as_ptr()) {
            0 => Ok(group),
            status => {
                mlx_sys::mlx_distributed_group_free(group);
                Err(said(status))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only networks of one's own carry activations.
    #[test]
    fn public_addresses_are_refused() {
        for address in ["127.0.0.1:1", "10.1.2.3:1", "192.168.0.9:1", "169.254.7.1:1", "100.100.0.1:1"] {
            assert_eq!(allowed(address), Ok(()), "{address}");
        }
        for address in ["8.8.8.8:1", "0.0.0.0:1", "[::1]:1", "100.128.0.1:1", "mac1:1"] {
            assert!(allowed(address).is_err(), "{address}");
        }
    }

    /// The file of `ring` has addresses only, that of `jaccl` devices; what MLX lacks or cables do not join is not chosen.
    #[test]
    fn jaccl_is_chosen_where_it_can_be() {
        let cabled = [("10.0.0.1:5", "A1>B2>rdma_en2"), ("10.0.0.2:6", "B2>A1>rdma_en5")];
        let specification = specification(cabled);
        assert_eq!(specification, "10.0.0.1:5\tA1>B2>rdma_en2\n10.0.0.2:6\tB2>A1>rdma_en5\n");
        let ring = Way {
            name: c"ring",
            variable: "MLX_HOSTFILE",
            content: r#"[["10.0.0.1:5"],["10.0.0.2:6"]]"#.into(),
        };
        let jaccl = Way {
            name: c"jaccl",
            variable: "MLX_IBV_DEVICES",
            content: r#"[[null,"rdma_en2"],["rdma_en5",null]]"#.into(),
        };
        assert_eq!(Way::choose(&specification, 2, true), Ok(jaccl));
        assert_eq!(Way::choose(&specification, 2, false).as_ref(), Ok(&ring));
        assert_eq!(Way::choose("10.0.0.1:5\t\n10.0.0.2:6\t\n", 2, true), Ok(ring));
        assert_eq!(Way::choose(&specification, 3, true).unwrap_err(), "2 addresses for 3 ranks");
    }

    /// Before anything is connected, or a file written.
    #[test]
    fn a_group_with_a_public_rank_is_not_joined() {
        let links = Links::Native("10.0.0.1:5\t\n8.8.8.8:6\t\n".into());
        let error = Fabric::join(0, 2, &links).map(drop).unwrap_err().to_string();
        assert!(error.contains("8.8.8.8:6 is not a private address"), "{error}");
    }

    #[test]
    fn the_environment_is_of_this_process() {
        let made = environment(1, "mac1.local:8020", Path::new("/tmp"), "7-9");
        let made: Vec<String> =
            made.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
        let wanted = [
            "MLX_RANK=1",
            "MLX_HOSTFILE=/tmp/baton-hosts-7-9.json",
            "MLX_IBV_DEVICES=/tmp/baton-devices-7-9.json",
            "MLX_JACCL_COORDINATOR=mac1.local:8021",
        ];
        assert_eq!(made, wanted);
    }

    /// A file of ours alone, that does not outlive its use, whatever lay there before.
    #[test]
    fn files_are_private_and_gone_after_use() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("baton-handed-{}.json", std::process::id()));
        let elsewhere = path.with_extension("victim");
        std::fs::write(&elsewhere, "untouched").unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        let file = HandedOver::write(HOST_FILE, Some(path.clone().into_os_string()), "[]").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[]");
        assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "untouched");
        let mode = std::fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(file);
        assert!(std::fs::symlink_metadata(&path).is_err());
        std::fs::remove_file(&elsewhere).unwrap();
        let error = HandedOver::write(HOST_FILE, None, "[]").map(drop).unwrap_err().to_string();
        assert!(error.contains("MLX_HOSTFILE is not set"), "{error}");
    }
}
