#!/usr/bin/env bash
# Generation on MLX beside mlx_lm, from nothing, with one command: a Python with mlx-lm, random checkpoints of one shape, a
# release build with the feature mlx, then a table for bf16 and one for 4 bits, measured by turns. On Linux: MLX's CPU library.
#   benches/mlx.sh                     about four minutes on two cores, once it is built
#   benches/mlx.sh --rounds 5 ...      further flags of `baton bench decode`
#   BATON=target/debug/baton ...       another executable than the release build's
set -euo pipefail
cd "$(dirname "$0")/.."

out=target/mlx-bench
python=$out/venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$(uname)" = Linux ]; then
  [ -e target/mlx-linux/cargo-config.toml ] || backends/mlx/linux/setup.sh
  mlx=("mlx[cpu]==0.32.2") # the version that the backend is built against
  export OPENBLAS_NUM_THREADS=1 # its threads yield to each other longer than they compute
else
  mlx=("mlx==0.32.2")
fi
if ! [ -x "$python" ]; then
  python3 -m venv "$out/venv"
  "$python" -m pip install --quiet "${mlx[@]}" "mlx-lm==0.32.2"
fi
if [ "$(uname)" = Linux ]; then # the BLAS that the backend has, see backends/mlx/linux/setup.sh
  for blas in "$out"/venv/lib/python3*/site-packages/mlx_cpu.libs/libblas-*.so.*; do
    [ -e "$blas" ] && ln -sf "$(realpath target/mlx-linux/wheel-*/mlx_cpu.libs/"$(basename "$blas")")" "$blas"
  done
fi
[ -e "$out/4bit/config.json" ] || "$python" benches/peers/mlx_checkpoint.py "$out"
baton=${BATON:-target/release/baton}
[ -n "${BATON:-}" ] || cargo build --release --locked --features mlx -p baton
# The CPU library sums 4-bit products in the type of the activations: only in f32 both do the same work there.
[ "$(uname)" = Linux ] && wide=f32 || wide=bf16
flags=("$@")
for short in --context=32 --steps=32 --rounds=3; do # unless they are given
  [[ " $* " == *" ${short%=*}"[\ =]* ]] || flags+=("$short")
done
for run in "bf16 bf16" "4bit $wide"; do
  read -r model dtype <<< "$run"
  echo "== $model"
  "$baton" bench decode --backend mlx --model "$out/$model" --dtype "$dtype" --mlx-lm "$python" "${flags[@]}"
done
