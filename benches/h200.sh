#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one call within 10 minutes, from executables built elsewhere; one table at the end.
#   cargo build --release -p benches --bin device       (where there is a compiler)
#   benches/h200.sh DIR-OF-EXECUTABLES [PEAK-TFLOPS]    (where there is a GPU; 989: dense bf16 of an H200)
#   benches/h200.sh DIR-OF-EXECUTABLES --dry-run        (anywhere: the same on the CPU with a tiny model)
# LOGS=DIR keeps what every stage said. A stage that fails or lacks something is a row of the table, and the next one begins.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${1:-target/release}
peak=${2:-989}
backend=cuda config=benches/configs/llama-3-8b.json prompt=8192 shapes=60 small=
if [ "$peak" = --dry-run ]; then
  backend=cpu config=benches/configs/tiny.json prompt=256 shapes=6 small=--small peak=1
fi
BUDGET=575 # seconds for all stages: who calls this with a limit of 10 minutes still gets the table
# A debug executable takes most of it for the references on the CPU: only --dry-run with one.
[ -x "$bin/device" ] || { echo "no executable $bin/device" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=${LOGS:-$work/logs}
mkdir -p "$logs"
table=$logs/table
: > "$table"
stages=0
export RUST_BACKTRACE=0 # the last line of a failure is its reason
say() { printf '\n=== %4d s  %s\n' "$SECONDS" "$*"; }
row() { printf '| %s | %s | %s |\n' "$1" "$2" "${3:-}" | tee -a "$table"; }

# stage NAME SECONDS COMMAND...: rows that the command prints go to the table; so does its failure.
stage() {
  local name=$1 most=$2 left=$((BUDGET - SECONDS)) log status
  shift 2
  stages=$((stages + 1))
  log=$logs/$(printf '%02d' "$stages")-${name//[^a-zA-Z0-9]/-}.log
  say "$name"
  if [ "$left" -lt 15 ]; then row "$name" "not run" "no time left"; return 1; fi
  [ "$most" -gt "$left" ] && most=$left
  # What does not end when told to is killed.
  timeout -k 5 "$most" "$@" > "$log" 2>&1
  status=$?
  grep '^| ' "$log" >> "$table"
  if [ "$status" -ne 0 ]; then
    tail -n 25 "$log"
    case $status in
      124 | 137) row "$name" "FAILED" "not done within $most s" ;;
      *) row "$name" "FAILED" "status $status: $(grep -v '^ \|^$\|^note:\|stack backtrace' "$log" | tail -n 1 | tr '|\n' '/ ' | cut -c 1-200)" ;;
    esac
  else
    tail -n 12 "$log"
  fi
  return "$status"
}

# NVRTC and cuBLASLt lie where the toolkit or PyTorch's packages put them.
if [ "$backend" = cuda ]; then
  dirs=$(timeout 30 python3 - 2> /dev/null << 'PY'
import glob, site, sys
roots = {p for p in sys.path + site.getsitepackages() + [site.getusersitepackages()] if p}
print(":".join(sorted({d for r in roots for d in glob.glob(r + "/nvidia/cu13/lib") + glob.glob(r + "/nvidia/*/lib")})))
PY
  )
  for dir in /usr/local/cuda/lib64 /usr/local/cuda-13*/lib64 /usr/local/cuda/targets/*/lib; do
    [ -d "$dir" ] && dirs=${dirs:+$dirs:}$dir
  done
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$dirs
  timeout 30 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  echo "libraries: ${dirs:-of the system}"
fi
device=("$bin/device" --backend "$backend" --cache "$work/kernels")

# The most that stages may take adds up to the budget less 75 s, the last's, so that a slow one takes nothing from the figures.
# The first one also compiles the kernels.
stage "attention against float64" 75 "${device[@]}" --attention "$shapes"

beside=()
if timeout 60 python3 -c "import torch" 2> /dev/null; then
  stage "PyTorch on this card" 110 python3 benches/h200_torch.py "$config" "$work/torch.json" "$prompt"
  [ -e "$work/torch.json" ] && beside=(--beside "$work/torch.json")
else
  row "PyTorch on this card" "not run" "python3 has no torch here"
fi

stage "attention alone" 30 "${device[@]}" --attention-speed --prompt "$prompt" "${beside[@]}"
stage "attention alone, mma.sync" 20 "${device[@]}" --attention-speed --mma --prompt "$prompt" "${beside[@]}"
stage "Llama-3-8B shape, random weights" 150 "${device[@]}" --config "$config" --prompt "$prompt" --peak-tflops "$peak" "${beside[@]}"
stage "products alone" 45 "${device[@]}" --products $small
stage "attention against float64, mma.sync" 25 "${device[@]}" --attention "$((shapes / 4))" --mma
stage "golden cases" 45 "${device[@]}" --golden tests/golden
# Last of what is wanted: it may take what the others have left.
stage "conformance suite" 200 "${device[@]}" --conformance

if [ "$backend" = cpu ]; then
  row "compute-sanitizer" "not run" "no GPU here"
elif command -v compute-sanitizer > /dev/null; then
  # Every kernel, with shapes that are small enough for it; with the time that is left.
  for tool in memcheck racecheck synccheck; do
    stage "compute-sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "${device[@]}" --attention 6 \
      && row "compute-sanitizer $tool" "ok" "attention of 6 shapes in 2 types"
  done
  stage "compute-sanitizer memcheck, conformance" 200 compute-sanitizer --error-exitcode 1 "${device[@]}" --conformance \
    && row "compute-sanitizer memcheck, conformance" "ok"
else
  row "compute-sanitizer" "not run" "not installed here"
fi

say "done"
printf '\n| what | result | |\n|---|---|---|\n'
cat "$table"
! grep -q FAILED "$table"
