//! The matrix of measured links, for `baton status --links` and `baton doctor`.

use proto::v1::{LinkReport, StatusReply};

use crate::status::{aligned, amount};

/// Clocks further apart than this make the logs of two machines hard to read together.
const SKEW_MS_MAX: i64 = 500;

/// One row per sender and address, then what is wrong.
pub fn table_of(reply: &StatusReply) -> String {
    let mut rows =
        vec![["FROM", "TO", "RTT", "PROBED", "PUSHED", "SENT", "VIA", "BY", "STATE"].map(str::to_owned)];
    for (from, link) in links(reply) {
        let rate = |rate: f32| if rate > 0.0 { format!("{rate:.2} GB/s") } else { "-".to_owned() };
        let rtt = if link.rtt_us > 0 { format!("{} us", link.rtt_us) } else { "-".to_owned() };
        let state = match (link.error.as_str(), link.striped) {
            ("", true) => "striped",
            ("", false) if link.rtt_us > 0 || link.bytes > 0 => "ok",
            ("", false) => "not probed yet",
            (error, _) => error,
        };
        rows.push([
            from.to_owned(),
            link.peer.clone(),
            rtt,
            rate(link.probed_gbytes_per_s),
            rate(link.gbytes_per_s),
            amount(link.bytes),
            if link.via.is_empty() { "-".into() } else { link.via.clone() },
            if link.bytes > 0 { link.way.clone() } else { "-".into() },
            state.to_owned(),
        ]);
    }
    if rows.len() == 1 {
        return "no links yet: prefill nodes probe decode groups within a minute of joining\n".into();
    }
    let mut text = aligned(&rows);
    let faults = faults_of(reply);
    if !faults.is_empty() {
        text.push('\n');
        faults.iter().for_each(|fault| text.push_str(&format!("! {fault}\n")));
    }
    text
}

/// What is wrong with the links, in words, each once.
pub fn faults_of(reply: &StatusReply) -> Vec<String> {
    let mut faults: Vec<String> = Vec::new();
    for (from, link) in links(reply) {
        let mut found: Vec<String> = link.faults.iter().map(|fault| format!("{from}: {fault}")).collect();
        if !link.error.is_empty() {
            let hint = hint(&link.error);
            found.push(format!("{from} cannot reach {}: {}{hint}", link.peer, link.error));
        }
        if link.skew_ms.abs() > SKEW_MS_MAX {
            found.push(format!("the clock at {} is {} ms off from {from}'s", link.peer, link.skew_ms));
        }
        for fault in found {
            if !faults.contains(&fault) {
                faults.push(fault);
            }
        }
    }
    faults
}

fn links(reply: &StatusReply) -> impl Iterator<Item = (&str, &LinkReport)> {
    reply.members.iter().flat_map(|member| {
        let from = member.join.as_ref().map_or("", |join| join.name.as_str());
        member.report.iter().flat_map(move |report| report.links.iter().map(move |link| (from, link)))
    })
}

/// What usually is behind a failed connection.
fn hint(error: &str) -> &'static str {
    if error.contains("timed out") {
        " (a firewall that drops packets, or no way there)"
    } else if error.contains("refused") {
        " (nobody listens there, or a firewall refuses)"
    } else if error.contains("No route") {
        " (another network; on macOS also the Local Network permission)"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::{JoinRequest, MemberStatus, NodeReport};

    /// Protects: a person sees each way between two nodes, how fast it is and what to do about it.
    #[test]
    fn the_matrix_names_what_is_wrong() {
        let good = LinkReport {
            peer: "10.0.0.2:8011".into(),
            rtt_us: 120,
            probed_gbytes_per_s: 1.17,
            via: "eth1 mtu 9000 10000 Mb/s".into(),
            ..Default::default()
        };
        let wifi = LinkReport {
            peer: "192.168.1.2:8011".into(),
            error: "connection timed out".into(),
            faults: vec!["wlan0 is Wi-Fi: use a cable".into()],
            skew_ms: -2000,
            ..Default::default()
        };
        let join = JoinRequest { name: "gpu".into(), ..Default::default() };
        let report = NodeReport { links: vec![good, wifi], ..Default::default() };
        let member = MemberStatus { join: Some(join), report: Some(report), ..Default::default() };
        let reply = StatusReply { members: vec![member], ..Default::default() };
        assert_eq!(
            table_of(&reply),
            "FROM  TO                RTT     PROBED     PUSHED  SENT  VIA                       BY  STATE\n\
             gpu   10.0.0.2:8011     120 us  1.17 GB/s  -       0 kB  eth1 mtu 9000 10000 Mb/s  -   ok\n\
             gpu   192.168.1.2:8011  -       -          -       0 kB  -                         -   connection timed out\n\
             \n\
             ! gpu: wlan0 is Wi-Fi: use a cable\n\
             ! gpu cannot reach 192.168.1.2:8011: connection timed out (a firewall that drops packets, or no way there)\n\
             ! the clock at 192.168.1.2:8011 is -2000 ms off from gpu's\n"
        );
        assert!(table_of(&StatusReply::default()).contains("no links yet"));
    }
}
