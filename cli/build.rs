//! Lists the files of the bundled model, so that the executable carries them (see `cli/bundled.rs`), and tells it where
//! libmlx lies on Linux (feature `mlx`, see `backends/mlx/build.rs`).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    if let Ok(libraries) = env::var("DEP_BACKEND_MLX_LIBRARIES") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{libraries}");
    }
    let weights = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap_or_default()).join("models/demo/weights");
    println!("cargo::rerun-if-changed={}", weights.display());
    let mut files: Vec<PathBuf> = match fs::read_dir(&weights) {
        Ok(entries) => entries.map(|e| Ok(e?.path())).collect::<io::Result<_>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    files.retain(|path| path.is_file() && !name(path).starts_with('.'));
    files.sort();

    let mut list = String::from("&[\n");
    for path in &files {
        println!("cargo::rerun-if-changed={}", path.display());
        writeln!(list, "    ({:?}, include_bytes!({:?})),", name(path), path).map_err(io::Error::other)?;
    }
    list.push(']');
    fs::write(Path::new(&env::var("OUT_DIR").unwrap_or_default()).join("bundled.rs"), list)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
