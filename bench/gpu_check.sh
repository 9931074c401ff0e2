#!/usr/bin/env bash
# Everything a machine with a GPU can say about lkconv, within a given time: builds the modules for the present GPU,
# runs all GPU tests, looks for bad accesses and races with compute-sanitizer, and measures the published table, the
# layers of real models, Triton's kernels beside the CUDA ones, and blocks of merged kernels and Group-Mix attention. A
# failed step does not stop the next.
#
#   bench/gpu_check.sh [--budget SECONDS] [step ...]
#
# Steps, in the order in which they run: build test sanitize table bench triton blocks. Default: all of them. Where a single
# call may not last long enough, name a few steps in each; results gather in WORK.
#
# The budget is split over the chosen steps by the weights below; what a step leaves unused goes to those after it.
#
# Environment:
#   BUDGET      seconds for the whole call, unless --budget says so (default: 560)
#   RESERVE     seconds of them for the last tables and the archive (default: 25)
#   OUT         receives gpu_check.tar.gz with everything, and beside it the summary and the most important JSON files
#               (default: build/gpu_check)
#   WORK        logs, JSON, tables and plots (default: build/gpu_check/work)
#   PYTHON      interpreter whose torch sees the GPU (default: python3)
#   SANITIZER   compute-sanitizer (default: the one on PATH)
#   JOBS        pytest processes, where pytest-xdist is installed (default: half the cores, at most 8)
#   RESULTS     also receives every JSON file, named gpu-<name>.json as bench/results/README.md says (default: nothing;
#               bench/results to keep them for comparisons)
#   SUITES      suites of the bench step (default: replknet unireplknet convnext slak inceptionnext dense_prediction)
#   BENCH_ARGS  more arguments for every measurement, for example --quick
set -u
cd "$(dirname "$0")/.." || exit 2

BUDGET=${BUDGET:-560}
if [ "${1:-}" = --budget ]; then
  BUDGET=${2:-}
  shift 2 || shift
fi
OUT=${OUT:-build/gpu_check}
WORK=${WORK:-build/gpu_check/work}
PYTHON=${PYTHON:-python3}
SANITIZER=${SANITIZER:-compute-sanitizer}
SUITES=${SUITES:-replknet unireplknet convnext slak inceptionnext dense_prediction}
RESULTS=${RESULTS:-}
BENCH_ARGS=${BENCH_ARGS:-}
RESERVE=${RESERVE:-25}
SHORTEST=5 # seconds below which a step is not worth starting

cores=$(nproc)
JOBS=${JOBS:-$((cores < 4 ? 1 : cores > 16 ? 8 : cores / 2))}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / JOBS > 0 ? cores / JOBS : 1))}

# What a step consists of, and the shares of the time: a build that fails costs everything, so it may take long.
declare -A PARTS=(
  [build]="build"
  [test]="test"
  [sanitize]="memcheck racecheck"
  [table]="table table-tf32"
  [bench]="layers layers-tf32 layers-float64"
  [triton]="triton"
  [blocks]="reparam group_mix"
)
declare -A WEIGHT=(
  [build]=40 [info]=2 [test]=20 [memcheck]=6 [racecheck]=6 [table]=10 [table-tf32]=4
  [layers]=8 [layers-tf32]=3 [layers-float64]=2 [triton]=8
  [reparam]=3 [group_mix]=3
)
IMPORTANT="table layers triton reparam group_mix" # whose JSON files lie beside the archive

usage() {
  echo "gpu_check: $1; usage: bench/gpu_check.sh [--budget SECONDS] [build|test|sanitize|table|bench|triton|blocks ...]" >&2
  exit 2
}

[[ "$BUDGET" =~ ^[0-9]+$ ]] || usage "the budget must be a whole number of seconds, got '$BUDGET'"
for name in "$@"; do
  [[ -v "PARTS[$name]" ]] || usage "there is no step '$name'"
done
parts=()
for name in build test sanitize table bench triton blocks; do
  if [ $# -eq 0 ] || [[ " $* " == *" $name "* ]]; then
    # shellcheck disable=SC2206 # a list of words
    parts+=(${PARTS[$name]})
  fi
  if [ "$name" = build ]; then parts+=(info); fi
done

mkdir -p "$OUT" "$WORK" ${RESULTS:+"$RESULTS"}
failed=()

# Everything so far, so that a call that is ended from outside loses no more than its last step.
pack() {
  local name
  tar -czf "$OUT/.partial" -C "$WORK" . && mv "$OUT/.partial" "$OUT/gpu_check.tar.gz"
  cp "$WORK/summary.md" "$OUT/" 2>/dev/null
  for name in $IMPORTANT; do cp "$WORK/$name.json" "$OUT/" 2>/dev/null; done
  if [ -n "$RESULTS" ]; then
    for name in "$WORK"/*.json; do [ -s "$name" ] && cp "$name" "$RESULTS/gpu-${name##*/}"; done
  fi
  return 0
}

note() {
  echo "$1"
  echo "- $1" >>"$WORK/summary.md"
}

# limited SECONDS NAME COMMAND...: runs the command, its output in NAME.log. The first signal is an interrupt, on which
# pytest still says what failed and a measurement has written its rows.
limited() {
  local seconds=$1 name=$2 start=$SECONDS status
  shift 2
  # A shell that was started in the background ignores interrupts, and would have its children ignore them too.
  timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@" >"$WORK/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    note "$name: done in $((SECONDS - start)) s of $seconds"
  else
    local why="exit $status"
    [[ $status == 124 || $status == 137 ]] && why="out of time" # ended by the first signal, or by the second
    failed+=("$name ($why)")
    note "$name: FAILED ($why) after $((SECONDS - start)) s of $seconds"
  fi
  tail -n "${SHOW:-6}" "$WORK/$name.log"
  return $status
}

part_build() {
  export LKCONV_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
  limited "$1" build "$PYTHON" setup.py build_ext --inplace
}

part_info() {
  SHOW=4 limited "$1" info "$PYTHON" -c '
import torch, lkconv, lkconv._C_cuda as cuda
for k in cuda.resources():
    print(k["name"], k["registers"], "registers", k["spilled_bytes"], "bytes spilled")
print(torch.__version__, torch.cuda.get_device_name(), cuda.machine(), cuda.architectures(), cuda.toolkit())
print(lkconv.build_info())
'
}

# Files that hold GPU tests: importing the others would need packages that are of no use here.
part_test() {
  local files spread=()
  mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
  "$PYTHON" -c 'import xdist' 2>/dev/null && spread=(-n "$JOBS")
  SHOW=25 limited "$1" test "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --tb=short -rfE \
    "${spread[@]}" "${files[@]}"
}

# A case of every kernel family with what selects other code: M over images, a strip, strides, dilation, a channel
# multiplier, channels_last, a slice. Small, since the tools slow kernels down a hundredfold.
few_tests() {
  local sizes='2x3x9x11-k3x3 or 17x1x14x14-k27x27 or 1x2x20x24-k51x5 or 1x17x16x19-k7x7-p3x3-s2x1'
  sizes="$sizes or 1x3x30x18-k4x3-p3x5-s3x2-d6x4 or 1x5x20x22-k7x7-p9x9-d3x3 or 2x3x9x10-k3x3-p1x1-m2"
  sizes="$sizes or 2x2x11x16-k5x9-p2x4-s2x2-m3 or 2x20x9x11-k7x7-p3x3-nhwc- or 2x3x13x15-k9x9"
  local kinds='-f32-auto or tf32-toeplitz or bf16-direct or bf16-toeplitz'
  echo "(test_case and ($sizes) and ($kinds))" \
    "or ((test_aggregate or test_attention_core) and d16-2x9x11 and (float32 or bfloat16))"
}

# Without torch's caching allocator every tensor has bounds of its own. Only lkconv's kernels are looked at: the
# filter takes part of a kernel's mangled name, and is spelled differently in older releases.
sanitize() {
  local seconds=$1 tool=$2 filter=--kernel-name
  "$SANITIZER" --help 2>/dev/null | grep -q -e "$filter\b" || filter=--kernel-regex
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$seconds" "$tool" \
    "$SANITIZER" --tool "$tool" "$filter" kns=lkconv --report-api-errors no --error-exitcode 9 \
    "$PYTHON" -m pytest -q -x -m gpu -p no:cacheprovider -p no:xdist --tb=short -k "$(few_tests)" \
    tests/test_cuda_gpu.py tests/test_cuda_group_mix_gpu.py
}
part_memcheck() { sanitize "$1" memcheck; }
part_racecheck() { sanitize "$1" racecheck; }

# measure SECONDS NAME ARGUMENTS...: one benchmark with JSON, plot and Markdown.
measure() {
  local seconds=$1 name=$2 margin status
  shift 2
  margin=$((seconds > 60 ? 15 : seconds / 4)) # for importing torch and drawing
  # shellcheck disable=SC2086 # BENCH_ARGS is a list
  SHOW=60 limited "$seconds" "$name" "$PYTHON" -m bench depthwise_conv2d --device cuda --pass all --compact \
    --budget $((seconds - margin)) --json "$WORK/$name.json" --plot "$WORK/$name.png" "$@" $BENCH_ARGS
  status=$?
  [ -s "$WORK/$name.json" ] && timeout 60 "$PYTHON" -m bench table "$WORK/$name.json" >"$WORK/$name.md"
  return $status
}

# shellcheck disable=SC2086 # SUITES is a list
{
  part_table() { measure "$1" table --suite paper_table --dtype bfloat16 float32 float16; }
  part_table-tf32() { measure "$1" table-tf32 --suite paper_table --dtype float32 --tf32; }
  part_layers() { measure "$1" layers --suite $SUITES --dtype bfloat16 float32 float16; }
  part_layers-tf32() { measure "$1" layers-tf32 --suite $SUITES --dtype float32 --tf32; }
  part_layers-float64() { measure "$1" layers-float64 --suite convnext --dtype float64; }
  part_triton() { measure "$1" triton --suite paper_table --dtype bfloat16 float32 --backend cuda triton; }
}

# blocks SECONDS COMMAND: a benchmark of whole blocks, which has no budget of its own. Older ones know no --device.
blocks() {
  if ! "$PYTHON" -m bench "$2" --help 2>/dev/null | grep -q -e '--device'; then
    note "$2: not run (python -m bench $2 has no --device)"
    return 0
  fi
  SHOW=60 limited "$1" "$2" "$PYTHON" -m bench "$2" --device cuda --json "$WORK/$2.json"
}
part_reparam() { blocks "$1" reparam; }
part_group_mix() { blocks "$1" group_mix; }

finish() {
  local files=() name
  # The tables are of layers; blocks have rows of another kind.
  for name in "$WORK"/{table,layers,triton}*.json; do [ -s "$name" ] && files+=("$name"); done
  if [ ${#files[@]} -gt 0 ] && [ "${measured:-0}" -gt 0 ]; then
    timeout 60 "$PYTHON" -m bench table "${files[@]}" >"$WORK/all.md" &&
      { echo && cat "$WORK/all.md"; } >>"$WORK/summary.md"
  fi
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    printf '\nfailed: %s\n' "${failed[@]}" >>"$WORK/summary.md"
  else
    echo "all steps done"
  fi
  pack
  echo "results in $OUT"
}

arch=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))
' 2>"$WORK/gpu.log")
if [ -z "$arch" ]; then
  echo "gpu_check: torch of $PYTHON sees no CUDA GPU:" >&2
  tail -n 3 "$WORK/gpu.log" >&2
  exit 2
fi
printf '# GPU check of %s\n\n' "$(date -u +%F)" >"$WORK/summary.md"

measured=0
while [ ${#parts[@]} -gt 0 ]; do
  name=${parts[0]} weights=0
  for other in "${parts[@]}"; do weights=$((weights + WEIGHT[$other])); done
  parts=("${parts[@]:1}")
  left=$((BUDGET - RESERVE - SECONDS))
  seconds=$((left * WEIGHT[$name] / weights))
  # Importing torch takes some seconds however small the share.
  [ "$name" = info ] && [ "$seconds" -lt 30 ] && seconds=$((left < 30 ? left : 30))
  if [ "$seconds" -lt "$SHORTEST" ]; then
    failed+=("$name (no time left)")
    note "$name: not run (no time left)"
    continue
  fi
  "part_$name" "$seconds"
  [[ " table layers triton " == *" ${name%%-*} "* ]] && measured=$((measured + 1))
  pack
done
finish
[ ${#failed[@]} -eq 0 ]
