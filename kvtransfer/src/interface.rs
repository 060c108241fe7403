//! The network interfaces of this machine: what a node advertises when it listens on all of them, and what `baton doctor`
//! looks at. Their speed and kind where the system tells (Linux).

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};

/// One address of an interface that is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// As the system calls it.
    pub name: String,
    /// One of its addresses.
    pub ip: IpAddr,
    /// Bytes of a packet; 0: unknown.
    pub mtu: u32,
    /// Megabits per second; 0: unknown.
    pub mbps: u32,
    /// Wi-Fi.
    pub wireless: bool,
}

impl Interface {
    /// Whether other machines may reach it: not loopback, not link-local.
    pub fn reachable(&self) -> bool {
        match self.ip {
            IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
        }
    }
}

/// All addresses of all interfaces that are up.
pub fn interfaces() -> Vec<Interface> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `first` is a place for the list, which is freed below.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: a node of the list, which lives until it is freed.
        let node = unsafe { &*next };
        next = node.ifa_next;
        if node.ifa_addr.is_null() || node.ifa_flags & libc::IFF_UP as libc::c_uint == 0 {
            continue;
        }
        // SAFETY: not null, and of the family that it names.
        let ip = unsafe { ip(node.ifa_addr) };
        // SAFETY: a name that ends with a zero, of the list.
        let name = unsafe { CStr::from_ptr(node.ifa_name) }.to_string_lossy().into_owned();
        if let Some(ip) = ip {
            found.push(described(name, ip));
        }
    }
    // SAFETY: the list of above, once.
    unsafe { libc::freeifaddrs(first) };
    found
}

/// # Safety
/// `addr` points to a socket address of the size of its family.
unsafe fn ip(addr: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: as the caller says.
    unsafe {
        match i32::from((*addr).sa_family) {
            libc::AF_INET => {
                let addr = addr.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(u32::from_be(addr.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                let addr = addr.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(addr.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

fn described(name: String, ip: IpAddr) -> Interface {
    let class = format!("/sys/class/net/{name}");
    let number = |file: &str| {
        let text = std::fs::read_to_string(format!("{class}/{file}")).ok()?;
        text.trim().parse::<u32>().ok()
    };
    let wireless = std::path::Path::new(&class).join("wireless").exists();
    let (mtu, mbps) = (number("mtu").unwrap_or(0), number("speed").unwrap_or(0));
    Interface { name, ip, mtu, mbps, wireless }
}

/// The interface by which this machine reaches `address` (`host:port`); a name is looked up. Sends nothing.
pub fn toward(address: &str, interfaces: &[Interface]) -> Option<Interface> {
    route(address.to_socket_addrs().ok()?.next()?, interfaces)
}

/// The interface by which this machine reaches `peer`: loopback, where the address is its own. Sends nothing.
pub fn route(peer: SocketAddr, interfaces: &[Interface]) -> Option<Interface> {
    let loopback = || interfaces.iter().find(|interface| interface.ip.is_loopback()).cloned();
    if interfaces.iter().any(|interface| interface.ip == peer.ip())
        && let Some(loopback) = loopback()
    {
        return Some(loopback);
    }
    let any: SocketAddr = match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(peer).ok()?;
    let local = socket.local_addr().ok()?.ip();
    interfaces.iter().find(|interface| interface.ip == local).cloned()
}

/// The port that an interface sends by: itself, or the one below it where it is a VLAN, a macvlan or a bridge with a single port.
pub fn port(name: &str) -> String {
    let mut name = name.to_owned();
    // Layers on one another: a VLAN of a bridge of a port.
    for _ in 0..4 {
        let below = std::fs::read_dir(format!("/sys/class/net/{name}")).into_iter().flatten().flatten();
        let lower = |entry: std::fs::DirEntry| {
            entry.file_name().to_str().and_then(|file| file.strip_prefix("lower_")).map(str::to_owned)
        };
        let mut below = below.filter_map(lower);
        match (below.next(), below.next()) {
            (Some(one), None) => name = one,
            // Several ports that act as one do so below us.
            _ => break,
        }
    }
    name
}

/// What is wrong with a link on `interface`, in words; a rate that fits a slow port counts where the port tells nothing.
pub fn faults(interface: Option<&Interface>, bytes_per_s: Option<f64>) -> Vec<String> {
    let Some(interface) = interface.filter(|interface| !interface.ip.is_loopback()) else {
        return Vec::new();
    };
    let name = &interface.name;
    let mut faults = Vec::new();
    if interface.wireless {
        faults.push(format!("{name} is Wi-Fi: use a cable"));
    }
    let gigabit = |mbps: u32| (1..=1000).contains(&mbps);
    if gigabit(interface.mbps) {
        faults.push(format!("{name} runs at {} Mb/s: KV wants 10 Gb/s", interface.mbps));
    } else if interface.mbps == 0 && bytes_per_s.is_some_and(|rate| (90e6..125e6).contains(&rate)) {
        faults.push(format!("{name} carries what a 1 Gb/s port does: KV wants 10 Gb/s"));
    }
    if interface.mtu == 1500 && !gigabit(interface.mbps) && !interface.wireless {
        faults.push(format!("{name} has MTU 1500: 9000 on both ends and the switch costs less CPU"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_and_is_the_way_to_itself() {
        let all = interfaces();
        let loopback = all.iter().find(|interface| interface.ip == Ipv4Addr::LOCALHOST).expect("127.0.0.1");
        assert!(!loopback.reachable());
        assert_eq!(toward("127.0.0.1:9", &all).as_ref(), Some(loopback));
        for own in all.iter().filter(|interface| interface.reachable()) {
            let via = route(SocketAddr::new(own.ip, 9), &all).expect("a way to an address of its own");
            assert!(via.ip.is_loopback(), "{own:?} by {via:?}");
        }
        assert_eq!(port("no such interface"), "no such interface");
        assert_eq!(faults(Some(loopback), Some(1e8)), Vec::<String>::new());
    }

    #[test]
    fn what_is_wrong_with_a_port_is_named() {
        let port = Interface {
            name: "eth0".into(),
            ip: Ipv4Addr::new(10, 0, 0, 1).into(),
            mtu: 9000,
            mbps: 10_000,
            wireless: false,
        };
        assert_eq!(faults(Some(&port), None), Vec::<String>::new());
        let words = |port: Interface, rate| faults(Some(&port), rate).join("; ");
        assert!(words(Interface { wireless: true, ..port.clone() }, None).contains("Wi-Fi"));
        assert!(words(Interface { mbps: 1000, mtu: 1500, ..port.clone() }, None).contains("1000 Mb/s"));
        assert!(words(Interface { mtu: 1500, ..port.clone() }, None).contains("MTU 1500"));
        assert!(words(Interface { mbps: 0, ..port }, Some(1.17e8)).contains("1 Gb/s port"));
    }
}
