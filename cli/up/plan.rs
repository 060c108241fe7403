//! The processes of one `up`: what runs under which name with which arguments. Pure.

use std::os::fd::RawFd;
use std::path::Path;

use super::supervisor::DRAIN;
use crate::config::UpSettings;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// For people: `router`, `prefill-0`, `decode-0.1` (group 0, rank 1).
    pub name: String,
    /// Arguments, the subcommand first.
    pub arguments: Vec<String>,
    /// Stop wave: the router before the nodes.
    pub wave: u8,
    /// It joins the router under its name; the other ranks of a group stand behind their first.
    pub joins: bool,
    /// A descriptor of ours that it gets.
    pub passes: Option<RawFd>,
}

/// Ports that [`plan`] hands out.
#[derive(Clone, Debug)]
pub struct Ports {
    /// The router's for clients: a listening socket of ours, by its number. It outlives the router.
    pub clients: RawFd,
    /// The router's for nodes.
    pub cluster: u16,
    /// One per decode group, where its ranks meet.
    pub leaders: Vec<u16>,
}

/// The processes for `settings` with the models in `model` and `draft_model`, on a machine of `cores`.
pub fn plan(
    settings: &UpSettings,
    model: &Path,
    draft_model: Option<&Path>,
    served_name: &str,
    ports: &Ports,
    cores: usize,
) -> Vec<Process> {
    let common = |command: &str| {
        let mut arguments = vec![command.to_owned()];
        let model = model.display().to_string();
        add(&mut arguments, "model", model);
        add(&mut arguments, "served-name", served_name);
        add(&mut arguments, "log", &settings.log);
        add(&mut arguments, "drain", DRAIN.as_secs());
        if let Some(endpoint) = &settings.otlp_endpoint {
            add(&mut arguments, "otlp-endpoint", endpoint);
        }
        if let Some(tokens) = settings.context {
            add(&mut arguments, "context", tokens);
        }
        arguments
    };
    let mut router = common("router");
    add(&mut router, "port", settings.port);
    add(&mut router, "listen-fd", ports.clients);
    add(&mut router, "cluster-bind", local(ports.cluster));
    add(&mut router, "disaggregation", settings.disaggregation);
    let mut all = vec![Process {
        name: "router".into(),
        arguments: router,
        wave: 0,
        joins: false,
        passes: Some(ports.clients),
    }];

    // Prompts and generation overlap, so every process gets a part of the cores of its own.
    let threads = (cores / (settings.processes() - 1)).max(1);
    let node = |command: &str, name: &str| {
        let mut arguments = common(command);
        add(&mut arguments, "name", name);
        add(&mut arguments, "router", local(ports.cluster));
        add(&mut arguments, "dtype", settings.dtype.name());
        add(&mut arguments, "kv-memory", settings.kv_memory.0);
        add(&mut arguments, "max-batch", settings.max_batch);
        add(&mut arguments, "draft-max", settings.draft_max);
        add(&mut arguments, "kv-transport", settings.kv_transport);
        add(&mut arguments, "threads", threads);
        add(&mut arguments, "cpu-activations", settings.cpu_activations.name());
        arguments
    };
    // Settings are checked: there are ports for all.
    let mut pages = settings.metrics_port.map(|first| first..);
    let mut page = |arguments: &mut Vec<String>| {
        if let Some(port) = pages.as_mut().and_then(Iterator::next) {
            add(arguments, "metrics-bind", local(port));
        }
    };
    for index in 0..settings.prefill {
        let name = format!("prefill-{index}");
        let mut arguments = node("prefill", &name);
        page(&mut arguments);
        all.push(Process { arguments, name, wave: 1, joins: true, passes: None });
    }
    for (group, &leader) in ports.leaders.iter().enumerate() {
        for rank in 0..settings.tp {
            let name = format!("decode-{group}.{rank}");
            let mut arguments = node("decode", &name);
            add(&mut arguments, "tp", settings.tp);
            add(&mut arguments, "rank", rank);
            add(&mut arguments, "leader", local(leader));
            if rank == 0 {
                page(&mut arguments);
                if let Some(draft) = draft_model {
                    add(&mut arguments, "draft-model", draft.display());
                }
            }
            all.push(Process { arguments, name, wave: 1, joins: rank == 0, passes: None });
        }
    }
    all
}

fn add(arguments: &mut Vec<String>, flag: &str, value: impl ToString) {
    arguments.push(format!("--{flag}={}", value.to_string()));
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, NodeSettings, RouterSettings, load};
    use clap::{Args, Command, FromArgMatches};

    fn settings(flags: &[&str]) -> UpSettings {
        parsed::<UpSettings>("up", flags)
    }

    fn parsed<S: crate::config::Settings>(section: &str, flags: &[&str]) -> S {
        let command = Flags::<S>::augment_args(Command::new("test").no_binary_name(true));
        let matches = command.try_get_matches_from(flags).expect("flags that exist");
        let mut flags = Flags::<S>::from_arg_matches(&matches).expect("flags");
        flags.config = Some("".into());
        load(section, &flags).expect("valid settings")
    }

    fn processes(flags: &[&str], cores: usize) -> Vec<Process> {
        let settings = settings(flags);
        let leaders = (0..settings.decode as u16).map(|group| 21_000 + group).collect();
        let (model, draft) = (Path::new("/m"), settings.draft_model.as_deref());
        plan(&settings, model, draft, "demo", &Ports { clients: 9, cluster: 20_000, leaders }, cores)
    }

    /// Every process of a plan is told only what its role knows and accepts, and the ranks of a group meet at one place.
    #[test]
    fn children_accept_their_arguments() {
        let all = processes(
            &[
                "--prefill=2",
                "--decode=2",
                "--tp=2",
                "--context=512",
                "--kv-memory=64MiB",
                "--metrics-port=9000",
                "--otlp-endpoint=http://127.0.0.1:4318",
                "--draft-model=/d",
            ],
            16,
        );
        let names: Vec<_> = all.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(
            names,
            ["router", "prefill-0", "prefill-1", "decode-0.0", "decode-0.1", "decode-1.0", "decode-1.1"]
        );
        let (mut leaders, mut pages) = (Vec::new(), Vec::new());
        for process in &all {
            let flags: Vec<_> = process.arguments[1..].iter().map(String::as_str).collect();
            match process.arguments[0].as_str() {
                "router" => {
                    let router: RouterSettings = parsed("router", &flags);
                    assert_eq!(router.cluster_bind.to_string(), "127.0.0.1:20000");
                }
                role => {
                    let node: NodeSettings = parsed(role, &flags);
                    assert_eq!(
                        (node.kv_memory.bytes(), node.context, node.threads),
                        (Some(64 << 20), Some(512), Some(2))
                    );
                    assert_eq!(node.router, ["127.0.0.1:20000"]);
                    assert_eq!(node.otlp_endpoint.as_deref(), Some("http://127.0.0.1:4318"));
                    pages.extend(node.metrics_bind.map(|page| page.port()));
                    let drafts = role == "decode" && node.rank == 0;
                    assert_eq!(node.draft_model.as_deref(), drafts.then_some(Path::new("/d")));
                    leaders.extend(node.leader.map(|leader| (leader, node.rank)));
                }
            }
        }
        assert_eq!(pages, [9000, 9001, 9002, 9003]);
        let of = |port: u16, rank: usize| (local(port), rank);
        assert_eq!(leaders, [of(21_000, 0), of(21_000, 1), of(21_001, 0), of(21_001, 1)]);
    }

    /// A small machine still gives each process a thread.
    #[test]
    fn at_least_one_thread() {
        let all = processes(&["--tp=4"], 2);
        assert!(all[1..].iter().all(|p| p.arguments.contains(&"--threads=1".to_owned())));
    }
}
