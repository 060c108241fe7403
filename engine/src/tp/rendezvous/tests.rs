//! Who meets and who does not: order, agreement, proof, certificates; and sums over the links that come of it.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use backend::{DType, KvSpec, RankLink};
use kvtransfer::transport::tls::{self, CertificateDer, Peers, Tls};
use kvtransfer::{OnTurned, Turned};

use super::*;
use crate::handle::Command;
use crate::tp::Sealing;
use crate::tp::certificates::{Authority, nameless, tls};

fn member(rank: usize) -> Member {
    Member {
        version: "1".into(),
        identity: "graph".into(),
        target: Target {
            rank,
            addresses: vec![format!("rank{rank}:1")],
            spec: KvSpec::gqa(2, 4, rank..rank + 1, 8, DType::F32),
        },
        blocks: 100 - rank as u32,
        block_tokens: 16,
        native: None,
    }
}

fn never() -> bool {
    false
}

fn by(secret: &[u8]) -> Trust {
    Trust::in_clear(secret.to_vec())
}

/// Lets a leader of `world` and the given members meet.
fn meet(world: usize, members: Vec<(Member, &'static [u8])>) -> Vec<Result<Group, String>> {
    let members = members.into_iter().map(|(member, secret)| (member, by(secret))).collect();
    meet_by(by(b"s"), world, members)
}

/// As [`meet`], by whatever each knows the others.
fn meet_by(leader: Trust, world: usize, members: Vec<(Member, Trust)>) -> Vec<Result<Group, String>> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        let followers: Vec<_> = members
            .into_iter()
            .map(|(member, trust)| {
                let address = address.clone();
                scope.spawn(move || join(&address, &trust, &member, &never).map_err(|e| e.to_string()))
            })
            .collect();
        let failed = || followers.iter().any(|f| f.is_finished());
        let mut groups =
            vec![lead(&listener, &leader, world, 7, &member(0), &failed).map_err(|e| e.to_string())];
        groups.extend(followers.into_iter().map(|f| f.join().unwrap()));
        groups
    })
}

/// All links TLS, and what was turned away.
fn sealed(tls: Tls) -> (Trust, Arc<Mutex<Vec<String>>>) {
    let told = Arc::<Mutex<Vec<String>>>::default();
    let tell = told.clone();
    let turned = OnTurned::new(move |turned| {
        tell.lock().unwrap().push(match turned {
            Turned::Because(reason) => reason.to_owned(),
            Turned::Handshake(error) => error.to_string(),
        });
    });
    (Trust { tls: Some(tls), sealing: Sealing::Always, turned, ..by(b"s") }, told)
}

/// Protects: between machines nothing of a group travels in clear, and large sums come through in both directions at once.
#[test]
fn ranks_meet_over_tls_and_sum() {
    // More than sockets hold, so that sending has to wait for receiving.
    const BYTES: usize = 16 << 20;
    let ours = Authority::new();
    let trust = || sealed(tls(&ours, &ours)).0;
    let groups = meet_by(trust(), 3, vec![(member(1), trust()), (member(2), trust())]);
    let sum = |mut group: Group| {
        let rank = group.rank;
        let collective = group.collective().unwrap();
        let Links::Sockets(links) = &collective.links else { panic!("no sockets") };
        assert!(links.iter().flatten().all(|link| link.is_sealed()));
        let mut peers = backend::Peers::new(collective, "test").unwrap();
        for bytes in [1, BYTES, 0, 3] {
            let mut theirs = vec![vec![0; bytes]; 3];
            let mut places: Vec<&mut [u8]> = theirs.iter_mut().map(Vec::as_mut_slice).collect();
            peers.exchange(&vec![rank as u8 + 1; bytes], &mut places).unwrap();
            for other in (0..3).filter(|other| *other != rank) {
                assert!(theirs[other].iter().all(|byte| *byte == other as u8 + 1));
            }
        }
        // A group that is dropped closes its links under those who still sum.
        (group, peers)
    };
    let ranks: Vec<_> =
        groups.into_iter().map(Result::unwrap).map(|group| std::thread::spawn(move || sum(group))).collect();
    let ended: Vec<_> = ranks.into_iter().map(std::thread::JoinHandle::join).collect();
    assert!(ended.iter().all(Result::is_ok));
}

/// Protects: whoever lacks a certificate of the cluster takes no part in a group, whatever else it knows, and is counted.
#[test]
fn strangers_take_no_part() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let turned = |stranger: Trust| {
        let (leader, told) = sealed(tls(&ours, &ours));
        let mut groups = meet_by(leader, 2, vec![(member(1), stranger)]);
        let stranger = groups.remove(1).err().expect("takes no part");
        assert_eq!(groups.remove(0).err().unwrap(), "stopped", "the leader goes on waiting");
        let told = told.lock().unwrap().clone();
        (stranger, told)
    };
    let (heard, counted) = turned(by(b"s"));
    assert!(heard.contains("closed") || heard.contains("reset"), "{heard}");
    assert_eq!(counted, ["in clear"]);
    let (_, counted) = turned(sealed(nameless(&ours)).0);
    assert_eq!(counted, ["peer sent no certificates"]);
    // It trusts the leader, which does not trust it.
    let (_, counted) = turned(sealed(tls(&theirs, &ours)).0);
    assert!(counted.len() == 1 && counted[0].contains("invalid peer certificate"), "{counted:?}");
    // It does not trust the leader.
    let (heard, _) = turned(sealed(tls(&ours, &theirs)).0);
    assert!(heard.contains("invalid peer certificate"), "{heard}");
    // The right certificate without the secret.
    let (heard, counted) = turned(Trust { secret: b"t".to_vec(), ..sealed(tls(&ours, &ours)).0 });
    assert!(heard.contains("does not hold the cluster's token"), "{heard}");
    assert_eq!(counted, ["secret not proved"]);
}

/// Everybody's certificates, from the moment that they are revoked.
#[derive(Default)]
struct Revoked(std::sync::atomic::AtomicU64);

impl Peers for Revoked {
    fn version(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn stands(&self, _: &[CertificateDer<'_>]) -> bool {
        self.version() == 0
    }
}

/// Protects: a rank whose join token is revoked is out of a group that runs, and of every later one, though it does not know.
#[test]
fn a_revoked_rank_is_cut_off() {
    let ours = Authority::new();
    let revoked = Arc::<Revoked>::default();
    let (leader, told) = sealed(Tls { peers: Some(revoked.clone()), ..tls(&ours, &ours) });
    let rank = sealed(tls(&ours, &ours)).0;
    let groups = meet_by(leader.clone(), 2, vec![(member(1), rank.clone())]);
    let mut groups: Vec<Group> = groups.into_iter().map(Result::unwrap).collect();
    let mut links: Vec<_> = groups
        .iter_mut()
        .map(|group| match group.collective().unwrap().links {
            Links::Sockets(links) => links.into_iter().flatten().next().unwrap(),
            _ => panic!("no sockets"),
        })
        .collect();
    let runs: Vec<_> = groups
        .iter_mut()
        .map(|group| {
            let (engine, commands) = crate::engine();
            group.run(&commands).unwrap();
            (engine, commands)
        })
        .collect();
    let mut byte = [0];
    links[1].write_all(&[7]).unwrap();
    links[0].read_exact(&mut byte).unwrap();
    links[1].write_all(&[8]).unwrap();
    revoked.0.store(1, Ordering::Release);
    // What is computed: nothing goes out, and nothing that has come is read.
    assert!(links[0].write(&[7]).is_err_and(|error| tls::Revoked::is(&error)));
    assert!(links[0].read(&mut byte).is_err_and(|error| tls::Revoked::is(&error)));
    // What is planned: the leader's link is lost with the next heartbeat.
    let Ok(Command::Frame { frame: Err(lost), .. }) = runs[0].1.receiver.recv_timeout(Duration::from_secs(5))
    else {
        panic!("the leader keeps its link")
    };
    assert!(lost.to_string().ends_with("its join token was revoked"), "{lost}");
    drop(groups);
    // It does not come back.
    let groups = meet_by(leader, 2, vec![(member(1), rank)]);
    assert!(groups[1].is_err());
    assert_eq!(*told.lock().unwrap(), ["join token revoked"]);
}

/// Protects: ranks of one machine pay nothing for certificates unless they are told to.
#[test]
fn loopback_is_in_clear_by_itself() {
    let ours = Authority::new();
    let trust = || Trust { sealing: Sealing::Network, ..sealed(tls(&ours, &ours)).0 };
    for group in meet_by(trust(), 2, vec![(member(1), trust())]) {
        let Links::Sockets(links) = group.unwrap().collective().unwrap().links else { panic!("no sockets") };
        assert!(links.iter().flatten().all(|link| !link.is_sealed()));
    }
}

/// What TLS costs a collective: two ranks exchange payloads by turns in clear and over TLS, on loopback. Run by hand:
/// `cargo test --release -p engine --lib -- --ignored --nocapture collective_cost`
#[test]
#[ignore = "a measurement"]
fn collective_cost() {
    const TURNS: usize = 15;
    let ours = Authority::new();
    let mut kept = Vec::new();
    let mut pair = |trust: &dyn Fn() -> Trust| -> Vec<backend::Peers> {
        let groups = meet_by(trust(), 2, vec![(member(1), trust())]);
        let mut groups: Vec<Group> = groups.into_iter().map(Result::unwrap).collect();
        let peers = groups.iter_mut().map(|group| backend::Peers::new(group.collective().unwrap(), "test"));
        let peers = peers.map(Result::unwrap).collect();
        kept.extend(groups);
        peers
    };
    let mut ends = [pair(&|| by(b"s")), pair(&|| sealed(tls(&ours, &ours)).0)];
    // A decode step's sum of 4,096 numbers in bf16 and in f32, and a chunk's of 512 rows.
    for (bytes, rounds) in [(8 << 10, 400), (16 << 10, 400), (8 << 20, 4)] {
        let mut times = [const { Vec::new() }; 2];
        for _ in 0..TURNS {
            for (ends, times) in ends.iter_mut().zip(&mut times) {
                let begun = Instant::now();
                std::thread::scope(|scope| {
                    for peers in ends.iter_mut() {
                        scope.spawn(move || exchange(peers, bytes, rounds));
                    }
                });
                times.push(begun.elapsed().as_secs_f64() / f64::from(rounds) * 1e6);
            }
        }
        let ratios: Vec<f64> = times[0].iter().zip(&times[1]).map(|(clear, tls)| tls / clear).collect();
        let [clear, tls, ratio] = [&times[0], &times[1], &ratios].map(|values| {
            let mut values = values.clone();
            values.sort_by(f64::total_cmp);
            values[TURNS / 2]
        });
        println!(
            "{bytes} B: in clear {clear:.1} us, over TLS {tls:.1} us; of neighbouring turns {ratio:.2} times"
        );
    }
}

fn exchange(peers: &mut backend::Peers, bytes: usize, rounds: u32) {
    let (mine, mut theirs) = (vec![1; bytes], vec![vec![0; bytes]; 2]);
    for _ in 0..rounds {
        let mut places: Vec<&mut [u8]> = theirs.iter_mut().map(Vec::as_mut_slice).collect();
        peers.exchange(&mine, &mut places).unwrap();
    }
}

#[test]
fn ranks_meet_whatever_their_order_and_know_each_other() {
    let groups = meet(4, vec![(member(3), b"s"), (member(1), b"s"), (member(2), b"s")]);
    for (group, rank) in groups.into_iter().zip([0, 3, 1, 2]) {
        let mut group = group.unwrap();
        assert_eq!((group.rank, group.epoch, group.blocks, group.world()), (rank, 7, 97, 4));
        let all: Vec<Target> = (0..4).map(|rank| member(rank).target).collect();
        assert_eq!(group.targets, all);
        let backend::Links::Sockets(sockets) = group.collective().unwrap().links else {
            panic!("no sockets")
        };
        let present: Vec<bool> = sockets.iter().map(Option::is_some).collect();
        assert_eq!(present, (0..4).map(|other| other != rank).collect::<Vec<_>>());
    }
}

#[test]
fn every_pair_of_sockets_joins_the_right_ranks() {
    let mut groups: Vec<Group> =
        meet(3, vec![(member(1), b"s"), (member(2), b"s")]).into_iter().map(Result::unwrap).collect();
    let mut sockets: Vec<Vec<Option<Box<dyn RankLink>>>> = groups
        .iter_mut()
        .map(|group| match group.collective().unwrap().links {
            backend::Links::Sockets(sockets) => sockets,
            _ => panic!("no sockets"),
        })
        .collect();
    for (from, all) in sockets.iter_mut().enumerate() {
        for (to, socket) in all.iter_mut().enumerate().filter(|(to, _)| *to != from) {
            socket.as_mut().unwrap().write_all(&[from as u8, to as u8]).unwrap();
        }
    }
    for (to, all) in sockets.iter_mut().enumerate() {
        for (from, socket) in all.iter_mut().enumerate().filter(|(from, _)| *from != to) {
            let mut got = [0; 2];
            socket.as_mut().unwrap().read_exact(&mut got).unwrap();
            assert_eq!(got, [from as u8, to as u8]);
        }
    }
}

#[test]
fn a_rank_that_differs_is_refused_with_both_values() {
    let refused = |change: fn(&mut Member)| {
        let mut other = member(1);
        change(&mut other);
        meet(2, vec![(other, b"s")]).remove(1).err().unwrap()
    };
    assert_eq!(
        refused(|m| m.version = "2".into()),
        "refused by the leader: version: the leader has 1, rank 1 has 2"
    );
    assert_eq!(
        refused(|m| m.identity = "other".into()),
        "refused by the leader: model identity: the leader has graph, rank 1 has other"
    );
    assert_eq!(
        refused(|m| m.block_tokens = 32),
        "refused by the leader: tokens per kv block: the leader has 16, rank 1 has 32"
    );
    assert_eq!(
        refused(|m| m.target.rank = 2),
        "refused by the leader: rank 2 does not follow in a group of 2"
    );
}

/// Protects: the leader's operator reads why a rank did not join.
#[test]
fn a_rank_that_does_not_prove_itself_is_said_to() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let rank = std::thread::spawn(move || {
        let stream = TcpStream::connect(address).unwrap();
        prove(stream, &by(b"t"), &|| false).map(|_| ()).map_err(|error| error.to_string())
    });
    let asked = ask_proof(listener.accept().unwrap().0, &by(b"s")).map(|_| ());
    assert_eq!(
        asked.unwrap_err().to_string(),
        "tensor-parallel link: left instead of proving itself: it may hold another token than this leader"
    );
    assert!(rank.join().unwrap().is_err());
}

#[test]
fn a_wrong_secret_is_found_out_by_both_ends() {
    let mut groups = meet(2, vec![(member(1), b"t")]);
    let proof = "tensor-parallel link: the other end does not hold the cluster's token";
    assert_eq!(groups.remove(1).err().unwrap(), proof);
    assert_eq!(
        groups.remove(0).err().unwrap(),
        "stopped",
        "the leader goes on waiting until it is told to stop"
    );
}
