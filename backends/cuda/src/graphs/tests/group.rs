//! Groups that sum by NCCL replay their steps together, whatever happens to one of them; `tests/nccl.cpp` stands in for the
//! library and is as strict.

use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::*;
use crate::nccl::{Communicator, Element, Nccl, Shared, Sum, built_for_tests, name_for_tests};

/// The stand-in has one count of open groups for all tests.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    name_for_tests(built_for_tests().to_owned());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends of groups that the stand-in still has, once there has been time to give them up.
pub(super) fn open_ends() -> i32 {
    let name = std::ffi::CString::new(built_for_tests()).unwrap();
    // SAFETY: a library that was just built; nccl.cpp defines the function with this signature.
    unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW);
        let ends = libc::dlsym(handle, c"mock_open_ends".as_ptr());
        std::mem::transmute::<*mut libc::c_void, extern "C" fn(i32, i32) -> i32>(ends)(0, 20_000)
    }
}

/// What every rank of a group of so many comes to.
pub(super) fn ranks<T: Send>(world: usize, run: impl Fn(usize, Group) -> T + Sync) -> Vec<T> {
    let groups = Group::local(world).unwrap();
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = groups
            .into_iter()
            .enumerate()
            .map(|(rank, group)| scope.spawn(move || run(rank, group)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub(super) fn rank_of(group: Group, device: usize) -> Toy {
    Toy::in_group(Emulated::open(device, None).unwrap(), DType::BF16, group).unwrap()
}

/// Waits for a step: the ids it drew, on rank 0.
pub(super) fn drawn(toy: &Toy, pending: Box<dyn Pending<Act>>) -> Vec<Drawn> {
    match toy.device.ranks.as_ref().is_some_and(|ranks| ranks.rank() != 0) {
        true => {
            nothing(pending.wait());
            Vec::new()
        }
        false => ids(pending.wait()),
    }
}

/// A prompt of each of 3 sequences, then so many steps on ids in flight, each begun before the last is waited for; `before`
/// is called with the number of the next.
pub(super) fn generate(toy: &mut Toy, steps: u32, mut before: impl FnMut(&mut Toy, u32)) -> Vec<Vec<Drawn>> {
    let batch = toy.prompts(3, 60);
    let mut last = toy.draw(&batch, Rule::GREEDY);
    let mut told = Vec::new();
    for at in 0..steps {
        before(toy, at);
        let positions: Vec<u32> = batch.runs.iter().map(|run| run.len + at).collect();
        let pending = toy.draw(&next(&positions), Rule::GREEDY);
        let done = std::mem::replace(&mut last, pending);
        told.push(drawn(toy, done));
    }
    told.push(drawn(toy, last));
    told
}

/// Ten sequences generate and some end; ids are in flight, a rank exports in the middle of a step, and a prompt comes in
/// between and goes on with the others. Two ranks, bit by bit as without graphs.
#[test]
fn a_group_replays_what_it_would_have_queued() {
    let _alone = alone();
    for device in [0, 3] {
        let told = [false, true].map(|replays| {
            let all = ranks(2, |_, group| {
                let mut toy = rank_of(group, device);
                toy.device.replay_steps(replays);
                let batch = toy.prompts(10, 40);
                let mut lengths: Vec<u32> = batch.runs.iter().map(|run| run.len).collect();
                let mut last = toy.draw(&batch, Rule::GREEDY);
                let mut told = Vec::new();
                for (at, rows) in [10, 10, 10, 9, 9, 9, 9, 3, 3, 3, 3, 3, 3, 3].into_iter().enumerate() {
                    let mut batch = next(&lengths[..rows]);
                    lengths[..rows].iter_mut().for_each(|length| *length += 1);
                    if at == 11 {
                        // A prompt beside those that generate.
                        toy.kv.open(SeqId(77), 20).unwrap();
                        batch.push(SeqId(77), 0, &[5, 6, 7, 8]);
                    }
                    // Of one rank only: its cache is another's.
                    let exports = at == 9 && toy.device.ranks.as_ref().is_some_and(|ranks| ranks.rank() == 1);
                    let draws = vec![Draw::Token(Rule::GREEDY); batch.runs.len()];
                    let export = exports.then_some(SeqId(1));
                    let pending = toy.step(&batch, export, |x| Out::Draw(x, draws));
                    let done = std::mem::replace(&mut last, pending.0);
                    told.push(drawn(&toy, done));
                }
                told.push(drawn(&toy, last));
                (told, toy.device.replayed_steps())
            });
            let [(told, first), (_, second)] = &all[..] else { panic!("two ranks") };
            assert_eq!(first, second);
            assert!(if replays { *first >= 6 } else { *first == 0 }, "{first} steps were replayed");
            told.clone()
        });
        assert!(told[0] == told[1], "device {device}");
    }
    assert_eq!(open_ends(), 0);
}

/// What befalls one rank only: its memory moves, its device captures nothing, or it is told not to replay. All ranks do the same
/// at every step, and nothing else comes out.
#[test]
fn ranks_replay_together_or_not_at_all() {
    let _alone = alone();
    let run = |befalls: &(dyn Fn(&mut Toy, u32) + Sync)| {
        ranks(2, |rank, group| {
            let mut toy = rank_of(group, 0);
            if rank == 1 {
                befalls(&mut toy, u32::MAX);
            }
            let mut replayed = Vec::new();
            let told = generate(&mut toy, 9, |toy, at| {
                if rank == 1 {
                    befalls(toy, at);
                }
                replayed.push(toy.device.replayed_steps());
            });
            (told, replayed, toy.device.replayed_steps())
        })
    };
    let nothing_befalls = run(&|_, _| {});
    let replayed = nothing_befalls[0].2;
    assert!(replayed >= 5, "{replayed}");
    let moved = run(&|toy, at| {
        if at == 5 {
            assert!(toy.device.pool.give_back().unwrap());
            let taken: Vec<_> = (0..20).map(|_| toy.device.driver().alloc(4096).unwrap()).collect();
            std::mem::forget(taken);
        }
    });
    let refused = run(&|toy, _| toy.device.driver().refuse(true, false));
    let told_late = run(&|toy, at| toy.device.replay_steps(at == u32::MAX || at < 5));
    let eager = run(&|toy, _| toy.device.replay_steps(false));
    for (what, all) in
        [("moved", &moved), ("refused", &refused), ("told late", &told_late), ("eager", &eager)]
    {
        assert!(all[0].0 == nothing_befalls[0].0, "{what}");
        assert_eq!(all[0].1, all[1].1, "{what}");
        assert!(all[0].2 < replayed, "{what}: {} steps were replayed", all[0].2);
    }
    assert!(moved[0].2 > moved[0].1[5], "nothing is replayed once memory has moved");
    assert_eq!((refused[0].2, eager[0].2), (0, 0));
    assert_eq!(told_late[0].2, told_late[0].1[5]);
    assert_eq!(open_ends(), 0);
}

/// A rank that runs out of scratch memory in the middle of a step frees what it can. That waits for its device, and so for the
/// sums of the other rank, which must not wait for this one's vote.
#[test]
fn a_rank_that_runs_out_of_memory_keeps_nobody_waiting() {
    let _alone = alone();
    // Of either rank: one votes and the other counts.
    let [plenty, first, second] = [None, Some(0), Some(1)].map(|tight| {
        ranks(2, |rank, group| {
            let mut toy = rank_of(group, 0);
            let batch = toy.prompts(10, 40);
            let prompts = toy.draw(&batch, Rule::GREEDY);
            let mut told = vec![drawn(&toy, prompts)];
            let mut replayed = Vec::new();
            let mut lengths: Vec<u32> = batch.runs.iter().map(|run| run.len).collect();
            for at in 0..10 {
                let mut rows = Batch::default();
                for (seq, length) in lengths.iter_mut().enumerate().take(if at < 4 { 2 } else { 10 }) {
                    rows.push(SeqId(seq as u64), *length, &[7 + seq as u32]);
                    *length += 1;
                }
                if at == 4 && tight == Some(rank) {
                    toy.device.driver().exhaust();
                }
                let pending = toy.draw(&rows, Rule::GREEDY);
                told.push(drawn(&toy, pending));
                replayed.push(toy.device.replayed_steps());
            }
            (told, replayed)
        })
    });
    for all in [&first, &second] {
        assert!(all[0].0 == plenty[0].0);
        assert_eq!(all[0].1, all[1].1);
    }
    // Ten rows: once without, once again, and then as a graph, which comes later where memory was short.
    assert!(plenty[0].1[9] > plenty[0].1[4]);
    assert!(first[0].1[9] > first[0].1[4] && second[0].1[9] > second[0].1[4]);
    assert_eq!(open_ends(), 0);
}

/// A rank is lost while the other's device is in a replay, which hangs in a sum. It is noticed like in sums that are queued, and
/// with new links the group replays again; nothing of the old group is left.
#[test]
fn a_rank_lost_in_a_replay_is_told_and_replaced() {
    let _alone = alone();
    let whole = ranks(2, |_, group| generate(&mut rank_of(group, 0), 6, |_, _| {}));
    // With and without a step in between, which would find the group lost.
    for steps_on in [true, false] {
        assert!(replaced(steps_on)[0] == whole[0]);
        assert_eq!(open_ends(), 0);
    }
}

/// What both ranks generate after rank 1 has been lost and replaced.
fn replaced(steps_on: bool) -> Vec<Vec<Vec<Drawn>>> {
    let again = Mutex::new(Group::local(2).unwrap().into_iter().map(Some).collect::<Vec<_>>());
    let links = |rank: usize| again.lock().unwrap()[rank].take().unwrap();
    let (replaying, lost) = (Barrier::new(2), Barrier::new(2));
    ranks(2, |rank, group| {
        let mut toy = rank_of(group, 0);
        generate(&mut toy, 6, |_, _| {});
        let before = toy.device.replayed_steps();
        assert!(before >= 2, "{before}");
        let positions: Vec<u32> = (0..3).map(|seq| 5 + seq % 3 + 6).collect();
        if rank == 1 {
            toy.device.driver().kill();
        }
        let pending = toy.draw(&next(&positions), Rule::GREEDY);
        assert_eq!(toy.device.replayed_steps(), before + 1);
        replaying.wait();
        let mut toy = if rank == 1 {
            drop((pending, toy));
            lost.wait();
            rank_of(links(rank), 0)
        } else {
            let begun = Instant::now();
            match pending.wait() {
                Err(BackendError::Group { rank: 1, .. }) => {}
                Err(error) => panic!("{error} instead of a lost group"),
                Ok(_) => panic!("a step without the other rank"),
            }
            assert!(begun.elapsed() < Duration::from_secs(8), "noticed after {:?}", begun.elapsed());
            if steps_on {
                let refused = toy.draw(&next(&positions), Rule::GREEDY).wait();
                assert!(matches!(refused, Err(BackendError::Group { rank: 1, .. })));
            }
            toy.device.regroup(links(rank)).unwrap();
            let left = open_ends();
            (0..3).for_each(|seq| toy.kv.close(SeqId(seq)).unwrap());
            lost.wait();
            assert_eq!(left, 0, "the old group is not given up before there is a new one");
            toy
        };
        let before = toy.device.replayed_steps();
        let told = generate(&mut toy, 6, |_, _| {});
        assert!(toy.device.replayed_steps() >= before + 2);
        told
    })
}

/// Two ranks at the level of devices: each does with its sum what it is told, and hears what its device says.
fn judged(
    what: impl Fn(usize, &Emulated, &dyn Fn(usize) -> Sum) -> Result<(), BackendError> + Sync,
) -> Vec<Result<(), String>> {
    let id = Nccl::open(built_for_tests()).unwrap().unique_id().unwrap();
    ranks(2, |rank, _| {
        let nccl = Nccl::open(built_for_tests()).unwrap();
        let most = Duration::from_secs(60);
        let group: Communicator = nccl.join(id, (rank, 2), Box::new(|| Ok(())), most, || None).unwrap();
        let group = Shared::new(group);
        let device = Emulated::open(0, None).unwrap();
        let memory = device.alloc(256).unwrap();
        let at = device.address(&memory);
        device.upload(at, &[0; 256]).unwrap();
        let sum = |count: usize| Sum { group: group.clone(), at, count, element: Element::F32 };
        let did = what(rank, &device, &sum);
        let ended = Emulated::wait(&device.record(Lane::Compute).unwrap());
        did.and(ended).map_err(|error| error.to_string())
    })
}

/// What NCCL's documentation asks is asked by the stand-in, which names both sides.
#[test]
fn sums_that_do_not_meet_are_seen() {
    let _alone = alone();
    let captured = |device: &Emulated, sum: &Sum| device.capture(&mut || device.sum(sum));
    let ok = judged(|_, device, sum| {
        let graph = captured(device, &sum(8))?;
        device.sum(&sum(4))?;
        (0..3).try_for_each(|_| device.replay(&graph))
    });
    assert_eq!(ok, [Ok(()), Ok(())]);
    let all = |both: Vec<Result<(), String>>, want: &str| {
        assert!(both.iter().all(|said| said.as_ref().is_err_and(|said| said.contains(want))), "{both:?}");
    };
    let order = judged(|rank, device, sum| {
        device.sum(&sum(4 + rank))?;
        device.sum(&sum(5 - rank))
    });
    all(order, "rank 0 queues a sum of 4 f32, rank 1 queues a sum of 5 f32");
    let mixed = judged(|rank, device, sum| {
        let graph = captured(device, &sum(8))?;
        if rank == 0 { device.replay(&graph) } else { device.sum(&sum(8)) }
    });
    all(mixed, "rank 0 replays a sum of 8 f32, rank 1 queues a sum of 8 f32");
    let apart = judged(|rank, device, sum| {
        let [first, second] = [captured(device, &sum(8))?, captured(device, &sum(8))?];
        device.replay(&first)?;
        device.replay(&second)?;
        device.replay(if rank == 0 { &first } else { &second })
    });
    all(apart, "not captured together");
    let freed = judged(|_, device, sum| {
        let other = device.alloc(64)?;
        let graph = captured(device, &Sum { at: device.address(&other), ..sum(8) })?;
        drop(other);
        drop(graph);
        Ok(())
    });
    all(freed, "are freed before it");
    assert_eq!(open_ends(), 0);
}
