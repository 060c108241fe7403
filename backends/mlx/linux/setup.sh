#!/usr/bin/env bash
# Prepares MLX for Linux (its CPU library), so that the Apple decode path is compiled and tested there too. Once; then
#   MLX_DISABLE_COMPILE=1 cargo test -p backend-mlx --features mlx
# Debian: apt-get install cmake g++ libclang-dev libopenblas0-pthread python3-pip   (OpenBLAS is optional: 80x faster f32)
#
# mlx-sys' own build fetches sources and links Apple's frameworks. Instead: libmlx.so and its headers come from the PyPI
# wheel `mlx-cpu`, mlx-c is built from the source inside the mlx-sys crate, and a cargo build-script override for
# `links = "mlx"` points at both. Everything lands in target/mlx-linux; .cargo/config.toml includes the override if it is
# there. JOBS=n: compile jobs (default: all cores).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
workspace=$(cd "$here/../../.." && pwd)
out=$workspace/target/mlx-linux
mkdir -p "$out"
jobs=${JOBS:-$(nproc)}
host=$(rustc -vV | sed -n 's/^host: //p')

# 1. The source of mlx-sys that cargo resolved, and the MLX that its mlx-c is made for.
cd "$workspace"
mlx_c=$(cargo metadata --locked --format-version 1 --filter-platform "$host" --features backend-mlx/mlx |
  python3 -c 'import json, os, sys
print(*(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "mlx-sys"))')/src/mlx-c
version=$(sed -n 's/.*GIT_TAG v\([0-9.]*\)).*/\1/p' "$mlx_c/CMakeLists.txt" | head -1)
[ -n "$version" ] || { echo "no MLX version in $mlx_c/CMakeLists.txt" >&2; exit 1; }
wheel=$out/wheel-$version
mlx=$wheel/mlx

# 2. The wheel: libmlx.so, headers, cmake configuration. It works with any Python.
if [ ! -e "$mlx/lib/libmlx.so" ]; then
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --target "$wheel" "mlx-cpu==$version"
fi
# It brings the reference BLAS. libmlx.so finds that by file name, so OpenBLAS can stand in for it.
openblas=$(find /usr/lib -path '*/openblas-pthread/libblas.so.3' 2> /dev/null | head -1)
if [ -n "$openblas" ]; then
  for reference in "$wheel"/mlx_cpu.libs/libblas-*.so.*; do ln -sf "$openblas" "$reference"; done
fi

# 3. libmlxc.a against that libmlx.so, and the one function of Apple's kernel that mlx-rs calls.
cmake --fresh -S "$mlx_c" -B "$out/build-mlxc" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DMLX_C_USE_SYSTEM_MLX=ON -DMLX_C_BUILD_EXAMPLES=OFF -DCMAKE_PREFIX_PATH="$mlx" \
  "-DCMAKE_CXX_FLAGS=-isystem $mlx/include -include $here/mlxc_linux_compat.h" > "$out/cmake.log"
cmake --build "$out/build-mlxc" -j"$jobs" >> "$out/cmake.log"
mkdir -p "$out/lib" "$out/gen"
cp "$out/build-mlxc/libmlxc.a" "$out/lib/"
cc -O2 -fPIC -c "$here/mach_compat.c" -o "$out/mach_compat.o"
ar rcs "$out/lib/libmlxmachcompat.a" "$out/mach_compat.o"

# 4. bindings.rs, as mlx-sys' build script would make it.
if [ -z "${LIBCLANG_PATH:-}" ] && ! ldconfig -p | grep -q 'libclang[-.]' &&
  ! compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' > /dev/null; then
  python3 -m pip install --quiet --disable-pip-version-check --target "$out/libclang" libclang
  export LIBCLANG_PATH="$out/libclang/clang/native"
  export BINDGEN_EXTRA_CLANG_ARGS="-isystem $(cc -print-file-name=include) ${BINDGEN_EXTRA_CLANG_ARGS:-}"
fi
cargo run --quiet --locked --manifest-path "$here/gen-bindings/Cargo.toml" --target-dir "$out/gen-bindings" -- \
  "$mlx_c" "$here/bindgen_compat.h" "$out/gen/bindings.rs"

# 5. The build-script override. `libraries` reaches backends/mlx/build.rs as DEP_MLX_LIBRARIES.
cat > "$out/cargo-config.toml" << CONFIG
# Written by backends/mlx/linux/setup.sh.
[target.$host.mlx]
rustc-link-search = ["native=$out/lib", "native=$mlx/lib"]
rustc-link-lib = ["static=mlxc", "static=mlxmachcompat", "dylib=mlx", "dylib=stdc++"]
rustc-env = { OUT_DIR = "$out/gen" }
libraries = "$mlx/lib"
version = "$version"
CONFIG
echo "MLX $version is ready: $out/cargo-config.toml"
