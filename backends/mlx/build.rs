//! On Linux: executables find the libmlx.so that `linux/setup.sh` installed. That script's cargo configuration tells its
//! folder as metadata of mlx-sys; this package's tests get it as run path, and packages that depend on this one are told
//! as `DEP_BACKEND_MLX_LIBRARIES`. Elsewhere, and without the feature, nothing happens.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(libraries) = std::env::var("DEP_MLX_LIBRARIES") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{libraries}");
        println!("cargo::metadata=libraries={libraries}");
    }
}
