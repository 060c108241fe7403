#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: conformance, golden cases, and the table of benches/README.md, from prebuilt executables.
#   cargo build --release -p baton -p benches --bin baton --bin device     (where there is a compiler)
#   benches/h200.sh DIR-OF-EXECUTABLES [PEAK-TFLOPS]                       (where there is a GPU)
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:-target/release}
peak=${2:-989} # dense bf16 of an H200
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
say() { printf '\n=== %4d s  %s\n' "$SECONDS" "$*"; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
say "conformance suite"
"$bin/device" --backend cuda --conformance --cache "$cache" | tail -n 1

say "golden cases"
for dir in tests/golden/*/; do
  [ -e "$dir/golden.json" ] || continue
  for dtype in f32 bf16; do
    "$bin/baton" logits --backend cuda --model "$dir" --golden "$dir/golden.json" --dtype "$dtype" --out "$cache/cuda"
    "$bin/baton" logits --backend cpu --model "$dir" --golden "$dir/golden.json" --dtype "$dtype" --out "$cache/cpu"
    python3 benches/compare_logits.py "$dir" "$dtype" "$cache/cpu" "$cache/cuda"
  done
done

if command -v compute-sanitizer > /dev/null; then
  say "compute-sanitizer"
  compute-sanitizer --error-exitcode 1 "$bin/device" --backend cuda --conformance --cache "$cache" | tail -n 3
fi

say "Llama-3-8B shape, random weights"
"$bin/device" --backend cuda --config benches/configs/llama-3-8b.json --peak-tflops "$peak" --cache "$cache"
say "done"
