//! `cargo run --release -p fuzz -- TARGET|all SECONDS [SEED]`: tries hostile files for so long; a failure names the number
//! from which the same file comes again.

use std::process::ExitCode;
use std::time::Duration;

use fuzz::{Budget, TARGETS, Target, run};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &str| text.parse::<u64>().ok();
    let (targets, seconds, seed) = match &args[..] {
        [name, seconds] => (targets(name), number(seconds), Some(0)),
        [name, seconds, seed] => (targets(name), number(seconds), number(seed)),
        _ => (Vec::new(), None, None),
    };
    let (false, Some(seconds), Some(seed)) = (targets.is_empty(), seconds, seed) else {
        let known: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("fuzz TARGET|all SECONDS [SEED], the targets: {}", known.join(", "));
        return ExitCode::from(2);
    };
    for target in targets {
        let report = run(target, seed, Budget::Time(Duration::from_secs(seconds)));
        println!(
            "{}: {} files, {} of them taken, at most {} bytes held",
            target.name, report.files, report.accepted, report.bytes_peak
        );
    }
    ExitCode::SUCCESS
}

fn targets(name: &str) -> Vec<&'static Target> {
    TARGETS.iter().filter(|target| name == "all" || target.name == name).collect()
}
