//! Which paths to one receiver are used together, and what a slower one leaves to the others. Pure; [`super::path::Paths`] asks
//! when a push is opened, the lanes of [`super::pair::Pair`] ask before every frame.

/// Paths of one push to one receiver at most.
const PATHS_MAX: usize = 4;

/// A path that carries less than this part of what the best one does is left alone: its last frame would come after all others.
const SLOW: f64 = 0.25;

/// A lane on a path that carries less than this part of what the best one does looks ahead, see [`leaves`].
const SLOWER: f64 = 0.7;

/// One path that may be used.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Candidate {
    /// The port of this machine that leads there; `None`: not known.
    pub port: Option<String>,
    /// What it carries, as measured, or as the port's speed says; `None`: not known.
    pub bytes_per_s: Option<f64>,
    /// It was measured to add to what the better ones carry.
    pub adds: bool,
}

/// Those of `paths`, the best first, that are used together: the best, and every other one that leaves by a port of its own or was
/// measured to add up, unless it is slow. Two addresses behind one port are one path until measurement says otherwise.
pub(super) fn together(paths: &[Candidate]) -> Vec<usize> {
    let Some(best) = paths.first() else { return Vec::new() };
    let mut chosen = vec![0];
    for (index, path) in paths.iter().enumerate().skip(1) {
        let own = |port: &String| chosen.iter().all(|one| paths[*one].port.as_ref() != Some(port));
        // Where the best one's port is not known, nobody can say that this one is another.
        let apart = best.port.is_some() && path.port.as_ref().is_some_and(own);
        let slow = match (path.bytes_per_s, best.bytes_per_s) {
            (Some(own), Some(best)) => own < best * SLOW,
            _ => false,
        };
        if (apart || path.adds) && !slow && chosen.len() < PATHS_MAX {
            chosen.push(index);
        }
    }
    chosen
}

/// A lane's path and what is on its way there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Load {
    /// Sent and not reported as landed.
    pub unlanded_bytes: u64,
    /// What its path carries.
    pub bytes_per_s: f64,
}

/// Whether a lane leaves what is queued to the others: its path is slower, and what it has under way already takes longer than all of
/// them together need for everything that is left. `all`: the lanes that are connected, itself included. One that has nothing under
/// way never does.
pub(super) fn leaves(own: Load, all: &[Load], queued_bytes: u64) -> bool {
    let best = all.iter().map(|load| load.bytes_per_s).fold(0.0, f64::max);
    if own.bytes_per_s >= best * SLOWER {
        return false;
    }
    let rate: f64 = all.iter().map(|load| load.bytes_per_s).sum();
    let left: u64 = all.iter().map(|load| load.unlanded_bytes).sum::<u64>() + queued_bytes;
    own.unlanded_bytes as f64 / own.bytes_per_s > left as f64 / rate
}

/// What moving a lane to another path costs beside the bytes: a connection, a handshake, and the receiver letting go of the old one.
const MOVE_S: f64 = 10e-3;

/// Whether a lane takes what it has under way to another path instead of waiting for its own, at the end of a push, when nothing is
/// queued: its path is slower, and what is on its way there comes later than it would over `best`, behind all that is on its way
/// there. `on_way_bytes`: of the lane's unlanded bytes, those that the other end does not have.
pub(super) fn moves(own: Load, on_way_bytes: u64, best: Load) -> bool {
    if own.bytes_per_s >= best.bytes_per_s * SLOWER {
        return false;
    }
    let stays = on_way_bytes.min(own.unlanded_bytes) as f64 / own.bytes_per_s;
    let goes = (own.unlanded_bytes + best.unlanded_bytes) as f64 / best.bytes_per_s + MOVE_S;
    stays > goes * 1.25
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: &str) -> Candidate {
        Candidate { port: Some(port.into()), ..Candidate::default() }
    }

    fn rated(port: &str, bytes_per_s: f64) -> Candidate {
        Candidate { bytes_per_s: Some(bytes_per_s), ..at(port) }
    }

    /// Protects: the first push uses every port; nothing has been measured yet.
    #[test]
    fn paths_by_different_ports_are_used_together_at_once() {
        assert_eq!(together(&[at("eth0"), at("eth1")]), [0, 1]);
        assert_eq!(together(&[at("eth0")]), [0]);
        assert_eq!(together(&[]), [0usize; 0]);
        let many: Vec<_> = (0..9).map(|port| at(&format!("eth{port}"))).collect();
        assert_eq!(together(&many).len(), PATHS_MAX);
    }

    #[test]
    fn two_addresses_behind_one_port_are_one_path() {
        assert_eq!(together(&[at("eth0"), at("eth0"), at("eth1"), at("eth1")]), [0, 2]);
        assert_eq!(together(&[Candidate::default(), Candidate::default(), at("eth0")]), [0]);
        assert_eq!(together(&[at("eth0"), Candidate::default()]), [0]);
        // A faster port here than each of two there.
        assert_eq!(together(&[at("eth0"), Candidate { adds: true, ..at("eth0") }]), [0, 1]);
    }

    #[test]
    fn a_slow_path_is_left_alone() {
        assert_eq!(together(&[rated("eth0", 1.2e9), rated("eth1", 0.12e9)]), [0]);
        assert_eq!(together(&[rated("eth0", 1.2e9), rated("eth1", 0.4e9)]), [0, 1]);
        let adds = Candidate { adds: true, ..rated("eth1", 0.12e9) };
        assert_eq!(together(&[rated("eth0", 1.2e9), adds]), [0]);
        assert_eq!(together(&[rated("eth0", 1.2e9), at("eth1")]), [0, 1]);
    }

    /// 8 MiB take 67 ms at 0.125 GB/s, and 6.7 ms at 1.25 GB/s.
    #[test]
    fn the_end_of_a_slow_lane_is_taken_to_another_path() {
        let load = |unlanded_mib: u64, bytes_per_s| Load { unlanded_bytes: unlanded_mib << 20, bytes_per_s };
        let (fast, slow) = (load(4, 1.25e9), load(8, 0.125e9));
        assert!(moves(slow, 8 << 20, fast));
        assert!(!moves(slow, 2 << 20, fast), "most of it is there already");
        assert!(!moves(fast, 4 << 20, slow));
        assert!(!moves(load(8, 1e9), 8 << 20, fast), "alike");
        assert!(!moves(load(1, 0.125e9), 1 << 20, fast), "not worth a connection");
    }

    /// 1.25 GB/s and 0.31 GB/s: 4 MiB take 13.4 ms on the slower one.
    #[test]
    fn a_slower_lane_leaves_the_end_to_the_others() {
        let load = |unlanded_mib: u64, bytes_per_s| Load { unlanded_bytes: unlanded_mib << 20, bytes_per_s };
        let (fast, slow) = (load(4, 1.25e9), load(4, 0.3125e9));
        assert!(!leaves(slow, &[fast, slow], 64 << 20)); // 48 ms are left
        assert!(leaves(slow, &[fast, slow], 8 << 20)); // 10.7 ms
        assert!(!leaves(fast, &[fast, slow], 0));
        assert!(!leaves(load(0, 0.3125e9), &[fast, load(0, 0.3125e9)], 0));
        // The fast one is gone.
        assert!(!leaves(slow, &[slow], 1 << 20));
        // Alike: whoever is free takes the next frame.
        assert!(!leaves(load(4, 1.2e9), &[load(0, 1.25e9), load(4, 1.2e9)], 0));
    }
}
