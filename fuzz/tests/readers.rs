//! Every reader survives some thousand hostile files, and some of them still are good ones: else nothing behind the first
//! check was tried.

use fuzz::{Budget, Report, TARGETS, Target, run};

#[test]
fn no_file_makes_a_reader_panic_or_take_memory() {
    for target in TARGETS {
        let Report { files, accepted, .. } = run(target, 1, Budget::Files(4000));
        assert_eq!(files, 4000);
        assert!(accepted > 5, "{}: only {accepted} were taken", target.name);
    }
}

#[test]
fn good_files_are_taken() {
    for target in TARGETS {
        for (number, seed) in (target.seeds)().iter().enumerate() {
            assert!((target.read)(seed, seed.len() as u64), "{} {number}", target.name);
        }
    }
}

/// The counting sees what a reader takes: without it the test above would pass whatever happens.
#[test]
#[should_panic(expected = "greedy: file 1 of")]
fn memory_is_counted() {
    let greedy = |bytes: &[u8], _: u64| vec![0u8; bytes.len() * 1000 + (1 << 20)].len() > 1;
    let safetensors = Target::named("safetensors").expect("a target");
    run(&safetensors.with("greedy", greedy), 1, Budget::Files(1));
}
