//! Compiles the .proto files in Rust alone: no protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["common.proto", "router.proto", "prefill.proto", "decode.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    tonic_prost_build::configure().compile_fds(protox::compile(files, ["."])?)?;
    Ok(())
}
