//! The link between prefill node and decode group: loopback, two network namespaces joined by a shaped veth pair, or,
//! where namespaces are not to be had, the sender's own token bucket.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Addresses of the two ends, port by port.
const FAR: [&str; 2] = ["10.213.7.1", "10.213.8.1"];
const NEAR: [&str; 2] = ["10.213.7.2", "10.213.8.2"];

/// Jumbo frames, as on any 10GbE link that is set up for bulk.
const MTU: u32 = 9000;

/// Longest wait for a new link to be up.
const UP_MAX: Duration = Duration::from_secs(5);

/// Bits per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let unit = match unit {
            "gbit" => 1_000_000_000,
            "mbit" => 1_000_000,
            _ => return Err(format!("{text:?} is no rate: say for instance 10gbit or 500mbit")),
        };
        match number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
            Some(bits) if bits > 0 => Ok(Rate(bits)),
            _ => Err(format!("{text:?} is no rate")),
        }
    }
}

/// Whose side of the link a process is on.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// The prefill node's.
    Far,
    /// The decode group's and the router's.
    Near,
}

/// A link; taken down when dropped.
#[derive(Debug)]
pub enum Link {
    /// Both sides on 127.0.0.1, as fast as it goes.
    Loopback,
    /// Both sides on 127.0.0.1, the sender paces itself.
    Paced(Rate),
    /// Two network namespaces, named, and the rate of each port between them.
    Shaped { rates: Vec<Rate>, far: String, near: String },
}

impl Link {
    /// Makes the link, of ports of these rates. Falls back to pacing, and says why, where the system allows no namespaces.
    pub fn make(rates: &[Rate]) -> Result<Link> {
        let Some(rate) = rates.first().copied() else { return Ok(Link::Loopback) };
        let id = std::process::id();
        let rates = rates[..rates.len().min(FAR.len())].to_vec();
        let shaped = Link::Shaped { rates, far: format!("baton-far-{id}"), near: format!("baton-near-{id}") };
        match shaped.up() {
            Ok(()) => Ok(shaped),
            Err(error) => {
                eprintln!("no network namespaces here ({error:#}): the sender paces itself instead");
                Ok(Link::Paced(rate))
            }
        }
    }

    fn up(&self) -> Result<()> {
        let Link::Shaped { rates, far, near } = self else { return Ok(()) };
        ip(&["netns", "add", far])?;
        ip(&["netns", "add", near])?;
        let mtu = MTU.to_string();
        for (port, rate) in rates.iter().enumerate() {
            let (there, here) = (format!("bfar{port}"), format!("bnear{port}"));
            ip(&[
                "link", "add", &there, "netns", far, "mtu", &mtu, "type", "veth", "peer", "name", &here,
                "netns", near,
            ])?;
            for (space, device, address) in [(far, &there, FAR[port]), (near, &here, NEAR[port])] {
                ip(&["-n", space, "addr", "add", &format!("{address}/24"), "dev", device])?;
                ip(&["-n", space, "link", "set", "lo", "up"])?;
                ip(&["-n", space, "link", "set", device, "mtu", &mtu, "up", "txqueuelen", "10000"])?;
                let bits = format!("{}bit", rate.0);
                let shape = ["-n", space, "qdisc", "replace", "dev", device, "root", "tbf", "rate", &bits];
                command("tc", &[&shape[..], &["burst", "4mb", "limit", "16mb"]].concat())?;
            }
        }
        self.wait_up()
    }

    /// Until every device is said to be running, which takes a moment: UCX takes no other.
    fn wait_up(&self) -> Result<()> {
        let Link::Shaped { rates, far, near } = self else { return Ok(()) };
        let until = Instant::now() + UP_MAX;
        let devices = (0..rates.len()).flat_map(|port| [(far, "bfar", port), (near, "bnear", port)]);
        for (space, kind, port) in devices {
            let device = format!("{kind}{port}");
            while !command("ip", &["-n", space, "-o", "link", "show", "dev", &device])?.contains("state UP") {
                ensure!(Instant::now() < until, "{device} does not come up");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Nothing that is sent to the near side by this port arrives any more, and nobody is told; or it does again.
    #[allow(dead_code)] // one of the benches that use this file breaks links
    pub fn silence(&self, port: usize, silent: bool) -> Result<()> {
        let Link::Shaped { near, .. } = self else { return Ok(()) };
        let (what, address) = (if silent { "del" } else { "add" }, format!("{}/24", NEAR[port]));
        ip(&["-n", near, "addr", what, &address, "dev", &format!("bnear{port}")])
    }

    /// For people.
    pub fn describe(&self) -> String {
        match self {
            Link::Loopback => "loopback, not shaped".into(),
            Link::Paced(rate) => format!("loopback, the sender paced to {} Gbit/s", gigabits(*rate)),
            Link::Shaped { rates, .. } => {
                let veth =
                    if rates.len() > 1 { format!("{} veth pairs", rates.len()) } else { "veth".into() };
                let each: Vec<String> = rates.iter().map(|rate| gigabits(*rate).to_string()).collect();
                let each = each.join(" and ");
                format!("two network namespaces, {veth} shaped to {each} Gbit/s, MTU {MTU}")
            }
        }
    }

    /// Bytes per second that the link can carry at most; `None`: not known.
    pub fn bytes_per_s(&self) -> Option<f64> {
        match self {
            Link::Loopback => None,
            Link::Paced(Rate(bits)) => Some(*bits as f64 / 8.0),
            Link::Shaped { rates, .. } => Some(rates.iter().map(|Rate(bits)| *bits as f64 / 8.0).sum()),
        }
    }

    /// What the sender is told.
    pub fn pace(&self) -> Option<u64> {
        match self {
            Link::Paced(Rate(bits)) => Some(bits / 8),
            Link::Loopback | Link::Shaped { .. } => None,
        }
    }

    /// Address that a process on `side` binds.
    pub fn host(&self, side: Side) -> &'static str {
        match (self, side) {
            (Link::Shaped { .. }, Side::Far) => FAR[0],
            (Link::Shaped { .. }, Side::Near) => NEAR[0],
            (Link::Loopback | Link::Paced(_), _) => "127.0.0.1",
        }
    }

    /// Every address of the near side.
    #[allow(dead_code)] // one of the benches that use this file has more than one port
    pub fn near_hosts(&self) -> &'static [&'static str] {
        match self {
            Link::Shaped { rates, .. } => &NEAR[..rates.len()],
            Link::Loopback | Link::Paced(_) => &["127.0.0.1"],
        }
    }

    /// Program and leading arguments that start `executable` on `side`.
    pub fn start(&self, side: Side, executable: &Path) -> (OsString, Vec<OsString>) {
        let executable = executable.as_os_str().to_owned();
        let space = match (self, side) {
            (Link::Shaped { far, .. }, Side::Far) => far,
            (Link::Shaped { near, .. }, Side::Near) => near,
            (Link::Loopback | Link::Paced(_), _) => return (executable, Vec::new()),
        };
        ("ip".into(), vec!["netns".into(), "exec".into(), space.into(), executable])
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Link::Shaped { far, near, .. } = self {
            for space in [far, near] {
                // Best effort: what was never made cannot be removed.
                let _ =
                    Command::new("ip").args(["netns", "del", space.as_str()]).stderr(Stdio::null()).status();
            }
        }
    }
}

fn gigabits(Rate(bits): Rate) -> f64 {
    bits as f64 / 1e9
}

fn ip(arguments: &[&str]) -> Result<()> {
    command("ip", arguments).map(drop)
}

/// Runs it; what it says.
fn command(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
