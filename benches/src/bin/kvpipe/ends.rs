//! The two ends of our own contender, each a process that does what it is told line by line: the receiver's ranks, and the sender.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use kvtransfer::transport::tls::{Tls, TlsDialer};
use kvtransfer::{Close, Expect, Limits, PushSpec, Receiver, Sender, SessionId, TargetSpec, Ticket, Ways};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Landing, TOKEN_BYTES, leases, specs};

/// What both ends are started with.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Spec {
    /// The receiver listens here.
    pub bind: Option<SocketAddr>,
    /// Payloads by UCX's shared memory.
    pub shm: bool,
    /// Payloads by UCX's own TCP.
    pub ucx_tcp: bool,
    /// Checksums of payloads.
    pub crc: bool,
    /// Authority, certificate and key, DER.
    pub tls: Option<[Vec<u8>; 3]>,
    pub streams: usize,
    pub frame_bytes: usize,
    pub ranks: usize,
    /// Probe paths and use those together that add up.
    pub probe: bool,
}

/// One transfer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Go {
    pub seed: u8,
    pub total_bytes: usize,
    pub block_bytes: usize,
    /// Of every rank, every path.
    pub addresses: Vec<Vec<String>>,
    /// The cache is made at so many tokens per second, in chunks of so many tokens, layer by layer; `None`: all is there at once.
    pub made: Option<(f64, u32)>,
    /// By a sender that has measured nothing yet.
    pub fresh: bool,
    /// Say so when it begins.
    pub aloud: bool,
}

/// What an end says after a transfer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Said {
    pub seconds: f64,
    pub cpu_s: f64,
    pub right: bool,
    pub way: String,
    /// From the last layer's making to the acknowledgement, and what that was estimated to be.
    #[serde(default)]
    pub exposed_s: f64,
    #[serde(default)]
    pub estimated_s: f64,
}

const DEADLINE: Duration = Duration::from_secs(60);

impl Spec {
    fn limits(&self) -> Limits {
        Limits {
            streams: self.streams,
            frame_bytes: self.frame_bytes,
            ways: Ways { shm: self.shm, rdma: false, tcp: self.ucx_tcp, device: false },
            probe: self.probe.then(|| Ticket::probe(b"kvpipe")),
            ..Limits::default()
        }
    }

    fn tls(&self) -> Result<Option<Tls>> {
        let Some([authority, chain, key]) = &self.tls else { return Ok(None) };
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(authority.clone()))?;
        let (roots, provider) = (Arc::new(roots), Arc::new(cluster::trust::bulk_provider()));
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let chain = vec![CertificateDer::from(chain.clone())];
        let private = || PrivateKeyDer::try_from(key.clone()).map_err(|error| anyhow!(error));
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), private()?)?;
        server.send_tls13_tickets = 0;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, private()?)?;
        Ok(Some(Tls {
            server: Arc::new(server),
            client: Arc::new(client),
            name: ServerName::try_from(NAME).context("name")?,
            peers: None,
        }))
    }
}

const NAME: &str = "kvpipe.test";

/// Authority, certificate and key for both ends.
pub fn certificates() -> Result<[Vec<u8>; 3]> {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let cert = CertificateParams::new([NAME.to_owned()])?.signed_by(&key, &authority)?;
    Ok([authority.der().to_vec(), cert.der().to_vec(), key.serialize_der()])
}

fn lines<T: for<'a> Deserialize<'a>>() -> impl Iterator<Item = Result<T>> {
    std::io::stdin().lock().lines().map(|line| Ok(serde_json::from_str(&line?)?))
}

fn say(what: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?)?;
    Ok(out.flush()?)
}

/// CPU seconds of this process so far.
fn cpu_s() -> f64 {
    // SAFETY: zeros are valid, and a place for the answer.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn session(go: &Go) -> (SessionId, Ticket) {
    (SessionId::from_bytes([go.seed; 16]), Ticket::from_bytes([go.seed; 32]))
}

/// The receiver's process: all ranks, a port each. Says its ports, then for every transfer that it is ready, and how it went.
pub fn receive(spec: &Spec) -> Result<()> {
    if !spec.crc {
        kvtransfer::crc::off();
    }
    let bind = spec.bind.context("bind")?;
    let tls = spec.tls()?;
    let bound = |_| Receiver::bind_with(bind, spec.limits(), tls.clone());
    let receivers: Vec<Receiver> = (0..spec.ranks).map(bound).collect::<Result<_, _>>()?;
    say(&receivers.iter().map(|receiver| receiver.local_addr().port()).collect::<Vec<_>>())?;
    let mut kept: Vec<(usize, usize, Vec<Cache>)> = Vec::new();
    for go in lines::<Go>() {
        let go = go?;
        let tokens = (go.total_bytes / TOKEN_BYTES) as u32;
        let caches = match kept.pop() {
            Some((total, block, caches)) if (total, block) == (go.total_bytes, go.block_bytes) => caches,
            other => {
                drop(other);
                specs(spec.ranks).iter().map(|spec| Cache::new(spec, tokens, go.block_bytes, 7)).collect()
            }
        };
        let (session, ticket) = session(&go);
        let (landed, ends) = channel();
        for (rank, mut cache) in caches.into_iter().enumerate() {
            cache.wipe();
            let expect = Expect {
                session,
                ticket: ticket.clone(),
                request: "kvpipe".into(),
                attempt: 1,
                epoch: 1,
                spec: specs(spec.ranks)[rank].clone(),
                tokens: 0..tokens,
                deadline: DEADLINE,
                peers: None,
            };
            let landed = landed.clone();
            receivers[rank]
                .expect(expect, Landing(cache), move |end| drop(landed.send((rank, end))))
                .map_err(|refused| anyhow!(refused.to_string()))?;
        }
        drop(landed);
        let before = cpu_s();
        say(&"ready")?;
        let mut back: Vec<(usize, Cache)> = Vec::new();
        let mut error = None;
        for (rank, end) in ends.iter() {
            error = error.or(end.result.err());
            back.push((rank, end.landing.0));
        }
        let cpu_s = cpu_s() - before;
        if let Some(error) = error {
            bail!("the session failed: {error}");
        }
        back.sort_by_key(|(rank, _)| *rank);
        let mut caches: Vec<Cache> = back.into_iter().map(|(_, cache)| cache).collect();
        let right = caches.iter_mut().all(|cache| cache.is(u64::from(go.seed)));
        say(&Said { cpu_s, right, ..Said::default() })?;
        kept.push((go.total_bytes, go.block_bytes, caches));
    }
    Ok(())
}

/// The sender's process. Says how long each transfer took, from the opening of the push to the acknowledgement of the last rank.
pub fn send(spec: &Spec) -> Result<()> {
    if !spec.crc {
        kvtransfer::crc::off();
    }
    let tls = spec.tls()?;
    let new = || match tls.clone() {
        Some(tls) => Sender::with_dialer(spec.limits(), Box::new(TlsDialer(tls))),
        None => Sender::new(spec.limits()),
    };
    let mut sender = new();
    let mut kept: Option<(usize, usize, Arc<Cache>)> = None;
    for go in lines::<Go>() {
        let go = go?;
        let tokens = (go.total_bytes / TOKEN_BYTES) as u32;
        let mut cache = match kept.take() {
            Some((total, block, cache)) if (total, block) == (go.total_bytes, go.block_bytes) => cache,
            other => {
                drop(other);
                Arc::new(Cache::new(&specs(1)[0], tokens, go.block_bytes, 5))
            }
        };
        Arc::get_mut(&mut cache)
            .context("leases of the last transfer are still held")?
            .fill(u64::from(go.seed));
        if go.fresh {
            sender = new();
        }
        let (session, ticket) = session(&go);
        let target = |(rank, addresses): (usize, &Vec<String>)| TargetSpec {
            rank,
            addresses: addresses.clone(),
            spec: specs(spec.ranks)[rank].clone(),
        };
        let push = PushSpec {
            session,
            ticket,
            request: "kvpipe".into(),
            attempt: 1,
            epoch: 1,
            from: specs(1),
            from_rank: 0,
            to: go.addresses.iter().enumerate().map(target).collect(),
            tokens: 0..tokens,
            deadline: DEADLINE,
            compute_bytes_per_s: go.made.map(|(rate, _)| rate * TOKEN_BYTES as f64),
            chunk_tokens: go.made.map_or(tokens, |(_, chunk)| chunk),
        };
        if go.aloud {
            say(&"begun")?;
        }
        let (pushed, end) = channel();
        let (before, begun) = (cpu_s(), Instant::now());
        let push = sender.open(push, move |result| drop(pushed.send(result)));
        let (rate, chunk) = go.made.unwrap_or((f64::INFINITY, tokens));
        for start in (0..tokens).step_by(chunk.max(1) as usize) {
            let part = start..(start + chunk).min(tokens);
            let (size, all) = (part.len() as f64, leases(&cache, part));
            let layers = all.len() as f64;
            for (layer, lease) in all.enumerate() {
                // As a device would: the layers of a chunk one after another, evenly.
                let made = (f64::from(start) + size * (layer + 1) as f64 / layers) / rate;
                std::thread::sleep(
                    (begun + Duration::from_secs_f64(made)).saturating_duration_since(Instant::now()),
                );
                push.layer(lease);
            }
        }
        let made = Instant::now();
        push.close(Close { token: 1, finish: 0 });
        let pushed = end.recv().context("no end")?.map_err(|error| anyhow!(error))?;
        let seconds = (pushed.acknowledged - begun).as_secs_f64();
        let way = sender.links().iter().map(|link| link.way.name()).next_back().unwrap_or("-").to_owned();
        let exposed_s = pushed.acknowledged.saturating_duration_since(made).as_secs_f64();
        let estimated_s = pushed.estimate.map_or(0.0, |estimate| estimate.as_secs_f64());
        say(&Said { seconds, cpu_s: cpu_s() - before, right: true, way, exposed_s, estimated_s })?;
        kept = Some((go.total_bytes, go.block_bytes, cache));
    }
    Ok(())
}
