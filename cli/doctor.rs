//! `baton doctor`: what is wrong with this machine's network ports, the router, and the links between nodes. Ends with a
//! failure when something is.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use kvtransfer::interface::{Interface, faults, interfaces};
use proto::v1::StatusReply;

use crate::config::{Flags, StatusSettings};
use crate::status::aligned;
use crate::{links, print, status};

/// Which cluster.
#[derive(clap::Args)]
pub struct Args {
    /// The cluster of `baton up` on this port, when no token is given [default: 8000]
    #[arg(long, value_name = "PORT", default_value = "8000", hide_default_value = true)]
    up: u16,
    #[command(flatten)]
    flags: Flags<StatusSettings>,
}

/// Prints what there is and what is wrong with it.
pub async fn run(mut args: Args) -> Result<ExitCode> {
    let ports = interfaces();
    print(&format!("this machine\n{}", table_of(&ports)));
    let reply = status::ask(args.up, &mut args.flags).await.map_err(|error| format!("{error:#}"));
    if let Ok(reply) = &reply {
        print(&format!("\nlinks between nodes\n{}", links::table_of(reply)));
    }
    let wrong = wrong(&ports, &reply);
    if wrong.is_empty() {
        print("\nnothing wrong found\n");
        return Ok(ExitCode::SUCCESS);
    }
    print("\nto look at\n");
    wrong.iter().for_each(|line| print(&format!("  {line}\n")));
    Ok(ExitCode::FAILURE)
}

/// All that is wrong, each once.
fn wrong(ports: &[Interface], reply: &Result<StatusReply, String>) -> Vec<String> {
    let mut wrong = wrong_here(ports);
    match reply {
        Ok(reply) => {
            wrong.extend(links::faults_of(reply));
            let silent = reply.members.iter().filter(|member| member.report.is_none());
            let name = |join: &proto::v1::JoinRequest| join.name.clone();
            wrong.extend(silent.map(|member| {
                format!("{} does not report", member.join.as_ref().map(name).unwrap_or_default())
            }));
        }
        Err(error) => wrong.push(format!("no cluster to ask: {error}")),
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

fn table_of(ports: &[Interface]) -> String {
    let mut rows = vec![["  PORT", "ADDRESS", "MTU", "SPEED", "KIND"].map(str::to_owned)];
    rows.extend(ports.iter().filter(|port| port.reachable()).map(|port| {
        let known = |number: u32, unit: &str| if number > 0 { format!("{number}{unit}") } else { "-".into() };
        let kind = if port.wireless { "Wi-Fi" } else { "wired" };
        [
            format!("  {}", port.name),
            port.ip.to_string(),
            known(port.mtu, ""),
            known(port.mbps, " Mb/s"),
            kind.into(),
        ]
    }));
    if rows.len() == 1 { "  no network port is up\n".into() } else { aligned(&rows) }
}

/// Faults of this machine's ports. A slow port is no fault beside a fast one, which is the one that will be used.
fn wrong_here(ports: &[Interface]) -> Vec<String> {
    let mut by_port: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for port in ports.iter().filter(|port| port.reachable()) {
        by_port.insert(&port.name, faults(Some(port), None));
    }
    match by_port.values().any(Vec::is_empty) {
        true => Vec::new(),
        false => by_port.into_values().flatten().map(|fault| format!("this machine: {fault}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, mbps: u32, wireless: bool) -> Interface {
        Interface { name: name.into(), ip: [10, 0, 0, 1].into(), mtu: 9000, mbps, wireless }
    }

    /// Protects: each thing that people stumble over is named from what a cluster with it has reported: Wi-Fi, MTU 1500, a 1 Gb/s port
    /// (said or only measured), a firewall, clocks, the Local Network permission of a Mac, a node that is silent.
    #[test]
    fn every_fault_of_a_recorded_cluster_is_named_once() {
        let mac = "macOS blocks it: allow baton in System Settings, Privacy & Security, Local Network";
        let link = |peer: &str, faults: &[&str], error: &str, skew_ms| proto::v1::LinkReport {
            peer: peer.into(),
            faults: faults.iter().map(|fault| (*fault).to_owned()).collect(),
            error: error.into(),
            skew_ms,
            ..Default::default()
        };
        let port = |mtu, mbps, wireless| Interface { mtu, ..port("en0", mbps, wireless) };
        let of = |port: &Interface, rate: Option<f64>| faults(Some(port), rate).swap_remove(0);
        let found = [
            of(&port(1500, 0, true), None),
            of(&port(1500, 10_000, false), None),
            of(&port(9000, 1000, false), None),
            of(&port(9000, 0, false), Some(1.17e8)),
        ];
        let words: Vec<&str> = found.iter().map(String::as_str).collect();
        let member = |name: &str, links: Option<Vec<proto::v1::LinkReport>>| proto::v1::MemberStatus {
            join: Some(proto::v1::JoinRequest { name: name.into(), ..Default::default() }),
            report: links.map(|links| proto::v1::NodeReport { links, ..Default::default() }),
            ..Default::default()
        };
        let links = vec![
            link("a:1", &words, "", 0),
            link("b:1", &words, "connection timed out", 0),
            link("c:1", &[], "Connection refused (os error 61)", 0),
            link("d:1", &[mac], "No route to host (os error 65)", 0),
            link("e:1", &[], "", 7_200_000),
        ];
        let reply = StatusReply {
            members: vec![member("gpu", Some(links)), member("mac2", None)],
            ..Default::default()
        };
        let mut wanted = vec![
            "gpu cannot reach b:1: connection timed out (a firewall that drops packets, or no way there)".to_owned(),
            "gpu cannot reach c:1: Connection refused (os error 61) (nobody listens there, or a firewall refuses)".into(),
            "gpu cannot reach d:1: No route to host (os error 65) (another network; on macOS also the Local Network permission)"
                .into(),
            "gpu: en0 carries what a 1 Gb/s port does: KV wants 10 Gb/s".into(),
            "gpu: en0 has MTU 1500: 9000 on both ends and the switch costs less CPU".into(),
            "gpu: en0 is Wi-Fi: use a cable".into(),
            "gpu: en0 runs at 1000 Mb/s: KV wants 10 Gb/s".into(),
            format!("gpu: {mac}"),
            "mac2 does not report".into(),
            "the clock at e:1 is 7200000 ms off from gpu's".into(),
        ];
        wanted.sort();
        assert_eq!(wrong(&[port(9000, 10_000, false)], &Ok(reply)), wanted);
        assert_eq!(wrong(&[], &Err("refused".into())), ["no cluster to ask: refused"]);
    }

    #[test]
    fn a_fast_port_excuses_the_others() {
        assert_eq!(wrong_here(&[port("wlan0", 0, true), port("eth1", 10_000, false)]), Vec::<String>::new());
        assert_eq!(wrong_here(&[port("wlan0", 0, true)]), ["this machine: wlan0 is Wi-Fi: use a cable"]);
        assert_eq!(table_of(&[]), "  no network port is up\n");
    }
}
