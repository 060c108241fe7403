//! Writes mlx-sys' bindings: `gen-bindings <mlx-c source> <compat header> <bindings.rs>`. Called by `../setup.sh`, because
//! the build script of mlx-sys, which does the same, cannot run on Linux. One forced include is added to its bindgen call.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [root, compat, out] = arguments.as_slice() else {
        return Err("usage: gen-bindings <mlx-c source> <compat header> <bindings.rs>".into());
    };
    let mut headers: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(PathBuf::from(root).join("mlx/c"))? {
        headers.push(entry?.path());
    }
    headers.retain(|path| path.extension().is_some_and(|extension| extension == "h"));
    headers.sort();
    let builder = bindgen::Builder::default()
        .rust_target("1.73.0".parse()?)
        .clang_arg(format!("-I{root}"))
        .clang_args(["-include", compat])
        .blocklist_function("malloc")
        .blocklist_function("realloc");
    let builder = headers.iter().fold(builder, |builder, header| builder.header(header.to_string_lossy()));
    Ok(builder.generate()?.write_to_file(out)?)
}
