//! `baton doctor`: what is wrong with this machine's network ports, the router, and the links between nodes. Ends with a
//! failure when something is.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use kvtransfer::interface::{Interface, faults, interfaces};

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
    let mut wrong = wrong_here(&ports);
    match status::ask(args.up, &mut args.flags).await {
        Ok(reply) => {
            print(&format!("\nlinks between nodes\n{}", links::table_of(&reply)));
            wrong.extend(links::faults_of(&reply));
            let silent = reply.members.iter().filter(|member| member.report.is_none());
            let name = |join: &proto::v1::JoinRequest| join.name.clone();
            wrong.extend(silent.map(|member| {
                format!("{} does not report", member.join.as_ref().map(name).unwrap_or_default())
            }));
        }
        Err(error) => wrong.push(format!("no cluster to ask: {error:#}")),
    }
    wrong.sort();
    wrong.dedup();
    if wrong.is_empty() {
        print("\nnothing wrong found\n");
        return Ok(ExitCode::SUCCESS);
    }
    print("\nto look at\n");
    wrong.iter().for_each(|line| print(&format!("  {line}\n")));
    Ok(ExitCode::FAILURE)
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

    #[test]
    fn a_fast_port_excuses_the_others() {
        assert_eq!(wrong_here(&[port("wlan0", 0, true), port("eth1", 10_000, false)]), Vec::<String>::new());
        assert_eq!(wrong_here(&[port("wlan0", 0, true)]), ["this machine: wlan0 is Wi-Fi: use a cable"]);
        assert_eq!(table_of(&[]), "  no network port is up\n");
    }
}
