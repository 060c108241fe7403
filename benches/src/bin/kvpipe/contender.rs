//! Who is compared: each a pair of processes that sleep (stopped) while others run, or iperf3, started anew for every turn.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ends::{Go, Said, Spec, certificates};
use crate::link::{Link, Side};

/// Where and what.
pub struct Field<'a> {
    pub link: &'a Link,
    pub total_bytes: usize,
    pub streams: usize,
    pub frame_bytes: usize,
    pub python: Option<PathBuf>,
    pub mooncake: Option<PathBuf>,
    pub made: Option<(f64, u32)>,
    pub fresh: bool,
    /// The second port falls silent so long after a transfer has begun.
    pub silent: Option<Duration>,
}

/// One transfer. `rate`: GB/s, where there are no bytes of ours to count; `cpu_s` is of one GB then.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub seconds: f64,
    pub cpu_s: f64,
    pub rate: f64,
    pub way: String,
    pub exposed_s: f64,
    pub estimated_s: f64,
}

/// One of those that are compared.
pub struct Contender {
    pub name: String,
    kind: Kind,
}

enum Kind {
    Iperf {
        hosts: Vec<(Vec<String>, Vec<String>)>,
    },
    Own {
        receiver: Process,
        sender: Process,
        addresses: Vec<Vec<String>>,
        seed: u8,
        total_bytes: usize,
        made: Option<(f64, u32)>,
        fresh: bool,
        silent: Option<Duration>,
    },
    Peer {
        target: Process,
        initiator: Process,
        total_bytes: usize,
    },
}

impl Contender {
    /// All that are here, or those of `only`.
    pub fn all(field: &Field<'_>, only: &[String]) -> Result<Vec<Contender>> {
        let wanted = |name: &str| only.is_empty() || only.iter().any(|one| one == name);
        let loopback = matches!(field.link, Link::Loopback);
        let own = Spec {
            crc: true,
            streams: field.streams,
            frame_bytes: field.frame_bytes,
            ranks: 1,
            probe: field.link.near_hosts().len() > 1,
            ..Spec::default()
        };
        let ucx = kvtransfer::transport::ucx::available();
        let mut all = Vec::new();
        if field.made.is_some() {
            // The wait for a computation says nothing of those that have none.
            return Ok(vec![Contender::own(field, "baton tcp", &own)?]);
        }
        if wanted("iperf3") {
            match Contender::iperf(field) {
                Ok(iperf) => all.push(iperf),
                Err(error) => eprintln!("kvpipe: no iperf3 here: {error:#}"),
            }
        }
        let tls = || Ok::<_, anyhow::Error>(Spec { tls: Some(certificates()?), ..own.clone() });
        let mut variants = vec![
            ("baton tcp", own.clone()),
            ("baton tcp without sums", Spec { crc: false, ..own.clone() }),
            ("baton tls", tls()?),
            ("baton tcp to 2 ranks", Spec { ranks: 2, ..own.clone() }),
            ("baton tcp to 4 ranks", Spec { ranks: 4, ..own.clone() }),
        ];
        match (&ucx, loopback) {
            (Ok(_), true) => variants.extend([
                ("baton shm", Spec { shm: true, ..own.clone() }),
                ("baton shm without sums", Spec { shm: true, crc: false, ..own.clone() }),
            ]),
            (Err(words), true) => eprintln!("kvpipe: no shared memory: {words}"),
            _ => {}
        }
        for (name, spec) in variants {
            if wanted(name) {
                all.push(Contender::own(field, name, &spec).with_context(|| name.to_owned())?);
            }
        }
        if let Some(python) = &field.python {
            let mut peers = vec![("nixl tcp", "nixl_peer.py", "tcp")];
            if loopback {
                peers.push(("nixl shm", "nixl_peer.py", "posix,cma,self,tcp"));
            }
            if field.mooncake.is_some() {
                peers.push(("mooncake tcp", "mooncake_peer.py", "tcp"));
            }
            for (name, script, transports) in peers {
                if wanted(name) {
                    all.push(
                        Contender::peer(field, name, python, script, transports)
                            .with_context(|| name.to_owned())?,
                    );
                }
            }
        }
        ensure!(!all.is_empty(), "nobody to compare");
        Ok(all)
    }

    fn iperf(field: &Field<'_>) -> Result<Contender> {
        let found = Command::new("iperf3").arg("--version").stdout(Stdio::null()).status()?;
        ensure!(found.success(), "{found}");
        let line = |side, arguments: &[&str]| {
            let (program, mut all) = field.link.start(side, "iperf3".as_ref());
            all.insert(0, program);
            all.extend(arguments.iter().map(Into::into));
            all.into_iter().map(|word| word.to_string_lossy().into_owned()).collect()
        };
        let hosts = field.link.near_hosts().iter().map(|host| {
            let server = line(Side::Near, &["-s", "-1", "-B", host]);
            (server, line(Side::Far, &["-c", host, "-t", "2", "-O", "1", "-J"]))
        });
        Ok(Contender { name: "iperf3".into(), kind: Kind::Iperf { hosts: hosts.collect() } })
    }

    fn own(field: &Field<'_>, name: &str, spec: &Spec) -> Result<Contender> {
        let executable = std::env::current_exe().context("own executable")?;
        let hosts = field.link.near_hosts();
        let any = if hosts.len() > 1 { "0.0.0.0" } else { hosts[0] };
        let bound = Spec { bind: Some(format!("{any}:0").parse()?), ..spec.clone() };
        let start = |side, command: &str, spec: &Spec| {
            let (program, mut arguments) = field.link.start(side, &executable);
            arguments.extend([command.into(), "--spec".into(), serde_json::to_string(spec)?.into()]);
            Process::start(Command::new(program).args(arguments))
        };
        let mut receiver = start(Side::Near, "receive", &bound)?;
        let ports: Vec<u16> = receiver.hear()?;
        let reached = |port: &u16| hosts.iter().map(|host| format!("{host}:{port}")).collect();
        let addresses = ports.iter().map(reached).collect();
        let sender = start(Side::Far, "send", spec)?;
        let (receiver, sender) = (receiver.asleep(), sender.asleep());
        let kind = Kind::Own {
            receiver,
            sender,
            addresses,
            seed: 0,
            total_bytes: field.total_bytes,
            made: field.made,
            fresh: field.fresh,
            silent: field.silent,
        };
        Ok(Contender { name: name.into(), kind })
    }

    fn peer(
        field: &Field<'_>,
        name: &str,
        python: &Path,
        script: &str,
        transports: &str,
    ) -> Result<Contender> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(script);
        let start = |side, arguments: &[String]| {
            let (program, leading) = field.link.start(side, python);
            let mut command = Command::new(program);
            command.args(leading).arg(&script).args(arguments).env("UCX_TLS", transports);
            // A UCX that was pointed out to us is not the one that a peer brings along.
            command.env_remove("LD_LIBRARY_PATH");
            if let Some(directory) = &field.mooncake {
                command.env("PYTHONPATH", directory);
            }
            Process::start(&mut command)
        };
        let bytes = field.total_bytes.to_string();
        let (near, far) = (field.link.host(Side::Near).to_owned(), field.link.host(Side::Far).to_owned());
        let mut target = start(Side::Near, &["target".into(), near, bytes.clone()])?;
        let address: String = target.hear()?;
        let mut initiator = start(Side::Far, &["initiator".into(), far, address, bytes])?;
        initiator.hear::<String>()?;
        let (target, initiator) = (target.asleep(), initiator.asleep());
        let kind = Kind::Peer { target, initiator, total_bytes: field.total_bytes };
        Ok(Contender { name: name.into(), kind })
    }

    /// One transfer, with what came looked at.
    pub fn go(&mut self, block_bytes: usize, link: &Link) -> Result<Sample> {
        match &mut self.kind {
            Kind::Iperf { hosts } => iperf(hosts),
            Kind::Own { receiver, sender, addresses, seed, total_bytes, made, fresh, silent } => {
                *seed = seed.wrapping_add(1).max(1);
                let go = Go {
                    seed: *seed,
                    total_bytes: *total_bytes,
                    block_bytes,
                    addresses: addresses.clone(),
                    made: *made,
                    fresh: *fresh,
                    aloud: silent.is_some(),
                };
                receiver.wake();
                sender.wake();
                receiver.tell(&go)?;
                ensure!(receiver.hear::<String>()? == "ready", "the receiver is not ready");
                sender.tell(&go)?;
                if let Some(after) = silent {
                    ensure!(sender.hear::<String>()? == "begun", "the sender has not begun");
                    std::thread::sleep(*after);
                    link.silence(1, true)?;
                }
                let (sent, landed): (Said, Said) = (sender.hear()?, receiver.hear()?);
                receiver.sleep();
                sender.sleep();
                if silent.is_some() {
                    link.silence(1, false)?;
                }
                ensure!(landed.right, "wrong bytes landed");
                let cpu_s = sent.cpu_s + landed.cpu_s;
                let Said { seconds, way, exposed_s, estimated_s, .. } = sent;
                Ok(Sample { seconds, cpu_s, rate: 0.0, way, exposed_s, estimated_s })
            }
            Kind::Peer { target, initiator, total_bytes } => {
                target.wake();
                initiator.wake();
                initiator.tell(&serde_json::json!({ "total": total_bytes, "block": block_bytes }))?;
                let said: Said = initiator.hear()?;
                target.sleep();
                initiator.sleep();
                ensure!(said.right, "wrong bytes landed");
                Ok(Sample { seconds: said.seconds, cpu_s: said.cpu_s, way: said.way, ..Sample::default() })
            }
        }
    }
}

fn iperf(hosts: &[(Vec<String>, Vec<String>)]) -> Result<Sample> {
    let start = |line: &[String], output| {
        Command::new(&line[0]).args(&line[1..]).stdout(output).stderr(Stdio::null()).spawn().context("iperf3")
    };
    let mut servers = Vec::new();
    for (server, _) in hosts {
        servers.push(start(server, Stdio::null())?);
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut clients = Vec::new();
    for (_, client) in hosts {
        clients.push(start(client, Stdio::piped())?);
    }
    let (mut rate, mut cpus) = (0.0, 0.0);
    for client in clients {
        let output = client.wait_with_output()?;
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).context("iperf3's answer")?;
        let end = &said["end"];
        rate += end["sum_received"]["bits_per_second"].as_f64().context("no rate of iperf3")? / 8e9;
        let cpu = &end["cpu_utilization_percent"];
        cpus += ["host_total", "remote_total"].iter().filter_map(|of| cpu[of].as_f64()).sum::<f64>() / 100.0;
    }
    for mut server in servers {
        server.wait()?;
    }
    Ok(Sample { seconds: 1.0, rate, cpu_s: cpus / rate.max(1e-9), ..Sample::default() })
}

/// A child that speaks lines of JSON; killed when dropped.
struct Process {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Process {
    fn start(command: &mut Command) -> Result<Process> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start")?;
        let lines = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Process { child, lines })
    }

    fn tell(&mut self, what: &impl Serialize) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no input")?;
        Ok(writeln!(input, "{}", serde_json::to_string(what)?)?)
    }

    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("a process ended: {:?}", self.child.wait());
        }
        serde_json::from_str(&line).with_context(|| line.clone())
    }

    fn signal(&self, number: i32) {
        // SAFETY: a child that was not waited for: its number is its own.
        unsafe { libc::kill(self.child.id() as i32, number) };
    }

    fn sleep(&self) {
        self.signal(libc::SIGSTOP);
    }

    fn asleep(self) -> Self {
        self.sleep();
        self
    }

    fn wake(&self) {
        self.signal(libc::SIGCONT);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}
