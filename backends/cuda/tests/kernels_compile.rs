//! Every kernel compiles for every GPU family, without a GPU. Where NVRTC is not installed this says so and tests nothing;
//! `.ci/run cuda` installs it and refuses to go without.

use backend_cuda::compile::{FILES, TARGETS, compile};

#[test]
fn for_every_family() {
    let (first, source) = FILES[0];
    match compile(first, source, TARGETS[0]) {
        Err(reason) if reason.contains("not found") && std::env::var_os("BATON_NEEDS_NVRTC").is_none() => {
            println!("not tested: {reason}");
            return;
        }
        Err(reason) => panic!("{reason}"),
        Ok(_) => {}
    }
    for target in TARGETS {
        for (name, source) in FILES {
            let code = compile(name, source, target).unwrap_or_else(|reason| panic!("{reason}"));
            println!("{name} for {target}: {} bytes", code.len());
        }
    }
    // A family that this NVRTC does not know yet.
    let said = compile(first, source, "sm_999f").unwrap_err();
    assert!(said.starts_with("libnvrtc ") && said.ends_with(" does not know sm_999f"), "{said}");
}
