//! RDMA over Thunderbolt between Macs, for MLX's `jaccl` (macOS 26.2 and later): which device of this machine leads to which
//! other rank. Ranks tell each other their ports; two ports belong together when each names the other's domain.
//!
//! Compiled everywhere, run nowhere yet: there was no such machine.

/// A Thunderbolt port with a device for RDMA.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    /// Its domain.
    domain: String,
    /// The domain at the other end of the cable.
    other: String,
    /// For example `rdma_en3`.
    device: String,
}

/// This machine's ports for the other ranks: `domain>other>device`, separated by commas; empty where there is no RDMA.
pub(crate) fn describe() -> String {
    if !cfg!(target_os = "macos") {
        return String::new();
    }
    let said = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let all = || {
        let devices = said("ibv_devices", &[])?;
        let ports = said("networksetup", &["-listallhardwareports"])?;
        let buses = said("system_profiler", &["SPThunderboltDataType", "-json"])?;
        Some(ports_of(&buses, &ports, &devices))
    };
    let ports = all().unwrap_or_default();
    let text = |port: &Port| format!("{}>{}>{}", port.domain, port.other, port.device);
    ports.iter().map(text).collect::<Vec<_>>().join(",")
}

/// `jaccl`'s device file, `[rank][other rank]`, when every rank has a cable to every other.
pub(crate) fn devices(ranks: &[(&str, &str)]) -> Option<String> {
    let ports: Vec<Vec<Port>> =
        ranks.iter().map(|(_, about)| about.split(',').filter_map(parse).collect()).collect();
    let cell = |from: usize, to: usize| -> Option<String> {
        if from == to {
            return Some("null".to_owned());
        }
        let leads = |port: &&Port| ports[to].iter().any(|p| p.domain == port.other && p.other == port.domain);
        ports[from].iter().find(leads).map(|port| format!("\"{}\"", port.device))
    };
    let row = |from: usize| -> Option<String> {
        let cells = (0..ranks.len()).map(|to| cell(from, to)).collect::<Option<Vec<_>>>()?;
        Some(format!("[{}]", cells.join(",")))
    };
    let rows = (0..ranks.len()).map(row).collect::<Option<Vec<_>>>()?;
    Some(format!("[{}]", rows.join(",")))
}

fn parse(text: &str) -> Option<Port> {
    let mut parts = text.split('>').map(str::to_owned);
    let port = Port { domain: parts.next()?, other: parts.next()?, device: parts.next()? };
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (parts.next().is_none() && port.device.chars().all(is_name)).then_some(port)
}

/// From what macOS says: `system_profiler SPThunderboltDataType -json`, `networksetup -listallhardwareports` and
/// `ibv_devices`. Ports without cable, interface or device are left out.
fn ports_of(buses: &str, hardware: &str, devices: &str) -> Vec<Port> {
    let Ok(buses) = serde_json::from_str::<serde_json::Value>(buses) else { return Vec::new() };
    let interface = |tag: &str| {
        let mut lines = hardware.lines();
        lines.find(|line| *line == format!("Hardware Port: Thunderbolt {tag}"))?;
        lines.next()?.strip_prefix("Device: ").map(str::to_owned)
    };
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let port = |bus: &serde_json::Value| {
        let device = format!("rdma_{}", interface(bus["receptacle_1_tag"]["receptacle_id_key"].as_str()?)?);
        devices.split_whitespace().find(|known| *known == device)?;
        let other = text(&bus["_items"][0]["domain_uuid_key"])?;
        Some(Port { domain: text(&bus["domain_uuid_key"])?, other, device })
    };
    buses["SPThunderboltDataType"].as_array().into_iter().flatten().filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSES: &str = r#"{"SPThunderboltDataType": [
        {"domain_uuid_key": "A1", "receptacle_1_tag": {"receptacle_id_key": "1"}, "_items": [{"domain_uuid_key": "B2"}]},
        {"domain_uuid_key": "A2", "receptacle_1_tag": {"receptacle_id_key": "2"}},
        {"domain_uuid_key": "A3", "receptacle_1_tag": {"receptacle_id_key": "3"}, "_items": [{"domain_uuid_key": "C1"}]}
    ]}"#;
    const HARDWARE: &str =
        "\nHardware Port: Thunderbolt 1\nDevice: en2\n\nHardware Port: Thunderbolt 2\nDevice: en3\n";

    #[test]
    fn ports_need_a_cable_an_interface_and_a_device() {
        let ports = ports_of(BUSES, HARDWARE, "    device \t node GUID\n    rdma_en2 \t 0\n");
        let port = Port { domain: "A1".into(), other: "B2".into(), device: "rdma_en2".into() };
        assert_eq!(ports, [port]);
        assert!(ports_of(BUSES, HARDWARE, "").is_empty());
        assert!(ports_of("not JSON", HARDWARE, "rdma_en2").is_empty());
    }

    #[test]
    fn every_pair_needs_a_cable() {
        let ranks = [("10.0.0.1:1", "A1>B2>rdma_en2,A3>C1>rdma_en4"), ("10.0.0.2:1", "B2>A1>rdma_en5")];
        assert_eq!(devices(&ranks).as_deref(), Some(r#"[[null,"rdma_en2"],["rdma_en5",null]]"#));
        assert_eq!(devices(&[ranks[0], ranks[1], ("10.0.0.3:1", "C1>A3>rdma_en2")]), None);
        assert_eq!(devices(&[("10.0.0.1:1", ""), ("10.0.0.2:1", "")]), None);
    }
}
