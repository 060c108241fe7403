//! The gateways as processes of their own, so that the CPU time of each can be told.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use tokio::time::{Instant, sleep};

use super::Role;
use super::load;
use super::mock::MODEL;

/// A gateway that does not answer by then does not come.
const START_MAX: Duration = Duration::from_secs(180);

/// A gateway that has work left of streams that were given up is waited for so long.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// How often it is looked at meanwhile, and the share of a core below which it is idle.
const SETTLE_LOOK: Duration = Duration::from_millis(500);
const IDLE_CORE: f64 = 0.05;

/// A running gateway; dropping it ends it.
pub struct Gateway {
    /// For the table.
    pub name: &'static str,
    /// Where it serves.
    pub port: u16,
    child: Child,
    _config: Option<tempfile::NamedTempFile>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Gateway {
    /// This executable in another role.
    pub async fn own(name: &'static str, role: Role) -> Result<Gateway> {
        let role = role.to_possible_value().context("a hidden role")?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--role", role.get_name()])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a gateway")?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("piped")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let port = line.trim().parse().context("the gateway says no port")?;
        let gateway = Gateway { name, port, child, _config: None };
        gateway.ready().await?;
        Ok(gateway)
    }

    /// The LiteLLM proxy in front of the mock, one worker, as its documentation advises for production: no logs of requests.
    pub async fn litellm(executable: &Path, mock: u16) -> Result<Gateway> {
        let mut config = tempfile::Builder::new().suffix(".yaml").tempfile()?;
        write!(
            config,
            "model_list:\n- model_name: {MODEL}\n  litellm_params:\n    model: openai/{MODEL}\n    api_base: http://127.0.0.1:{mock}/v1\n    api_key: none\n\
             litellm_settings:\n  set_verbose: false\n  request_timeout: 600\n"
        )?;
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let child = Command::new(executable)
            .args(["--host", "127.0.0.1", "--num_workers", "1", "--port", &port.to_string(), "--config"])
            .arg(config.path())
            .envs([("LITELLM_LOG", "ERROR"), ("LITELLM_LOCAL_MODEL_COST_MAP", "True"), ("NO_DOCS", "True")])
            // As many connections to the mock as there are streams: by itself it holds back all beyond 500. (0 would not
            // lift the limit but fall back to 100.)
            .envs([("AIOHTTP_CONNECTOR_LIMIT", "16384"), ("AIOHTTP_CONNECTOR_LIMIT_PER_HOST", "16384")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", executable.display()))?;
        let gateway = Gateway { name: "litellm", port, child, _config: Some(config) };
        gateway.ready().await?;
        Ok(gateway)
    }

    async fn ready(&self) -> Result<()> {
        let begun = Instant::now();
        while let Err(error) = load::many(self.port, 1).await {
            if begun.elapsed() > START_MAX {
                bail!("{} does not serve: {error}", self.name);
            }
            sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Waits until the process has nothing left to do, so that the next run is not about this one.
    pub async fn settle(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let (before, at) = (self.cpu_s()?, Instant::now());
            sleep(SETTLE_LOOK).await;
            let busy = (self.cpu_s()? - before) / at.elapsed().as_secs_f64();
            if busy < IDLE_CORE || begun.elapsed() > SETTLE_MAX {
                return Ok(());
            }
        }
    }

    /// Seconds of CPU that the process has used.
    pub fn cpu_s(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .context("CPU times are read from /proc: this bench runs on Linux")?;
        let (_, fields) = stat.rsplit_once(')').context("a strange /proc/PID/stat")?;
        // utime and stime, in ticks of 1/100 s on every Linux.
        let ticks = |at: usize| fields.split_whitespace().nth(at).and_then(|text| text.parse::<f64>().ok());
        Ok((ticks(11).context("no utime")? + ticks(12).context("no stime")?) / 100.0)
    }
}

/// Thousands of connections on both ends.
pub fn many_files() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole rlimit of ours.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0 {
            return Ok(());
        }
    }
    bail!("cannot raise the limit of open files: {}", std::io::Error::last_os_error())
}
