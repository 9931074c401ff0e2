#!/usr/bin/env bash
# Everything a machine with a GPU can say about lkconv, in one call: builds the CUDA module for the present GPU, runs
# the GPU tests, looks for bad accesses and races with compute-sanitizer, and measures the layers of real models and
# the published table. Each step has a time limit; a failed step does not stop the next; failures are listed last.
#
#   bench/gpu_check.sh [step ...]     steps: build test sanitize bench table; default: all, in this order
#
# Environment:
#   OUT               folder of logs, JSON and plots (default: bench/results)
#   PYTHON            interpreter whose torch sees the GPU (default: python3)
#   SUITES            suites of the bench step (default: replknet unireplknet convnext slak)
#   STEP_SECONDS      limit of one measurement (default: 150)
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
SUITES=${SUITES:-replknet unireplknet convnext slak}
STEP_SECONDS=${STEP_SECONDS:-150}
STEPS=${*:-build test sanitize bench table}
mkdir -p "$OUT"
failed=()

# step NAME SECONDS COMMAND...: runs the command, keeps its output in $OUT/NAME.log, shows the end of it.
step() {
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    echo "== $name: done in $((SECONDS - start)) s"
  else
    failed+=("$name (exit $status)")
    echo "== $name: FAILED with exit $status after $((SECONDS - start)) s"
  fi
  tail -n "${SHOW:-4}" "$OUT/$name.log"
}

wants() { [[ " $STEPS " == *" $1 "* ]]; }

if wants build; then
  arch=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + ("a" if a == 9 else ""))')
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} LKCONV_CUDA=1
  step build 420 "$PYTHON" setup.py build_ext --inplace
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
SHOW=8 step info 60 "$PYTHON" -c '
import torch, lkconv._C, lkconv._C_cuda as cuda
print(torch.__version__, torch.cuda.get_device_name(), cuda.machine(), cuda.architectures(), cuda.toolkit())
for k in cuda.resources():
    print(k["name"], k["registers"], "registers", k["spilled_bytes"], "bytes spilled")
'

if wants test; then
  SHOW=15 step test 420 "$PYTHON" -m pytest -q -m gpu tests/test_cuda_gpu.py tests/test_cuda_group_mix_gpu.py -p no:cacheprovider
  SHOW=15 step test-triton-group-mix 420 "$PYTHON" -m pytest -q -m gpu tests/test_triton_group_mix.py -p no:cacheprovider
fi

if wants sanitize; then
  # A case of every kernel family: small, since the tools slow kernels a hundredfold.
  few='test_case and auto and (2x3x9x11 or 17x1x14x14 or 1x2x20x24 or 2x20x9x11) and (f32 or bf16)'
  few="($few) or ((test_aggregate or test_attention_core) and d16-2x9x11 and (float32 or bfloat16))"
  for tool in memcheck racecheck; do
    step "$tool" 240 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -x -m gpu tests/test_cuda_gpu.py tests/test_cuda_group_mix_gpu.py -p no:cacheprovider -k "$few"
  done
fi

# measure NAME ARGUMENTS...: one benchmark, with JSON and plot.
measure() {
  local name=$1
  shift
  SHOW=40 step "$name" "$STEP_SECONDS" "$PYTHON" -m bench depthwise_conv2d --device cuda --compact \
    --json "$OUT/$name.json" --plot "$OUT/$name.png" "$@"
}

measure_all() {
  local name=$1
  shift
  measure "$name-bfloat16" --dtype bfloat16 "$@"
  measure "$name-float32" --dtype float32 "$@"
  measure "$name-tf32" --dtype float32 --tf32 "$@"
  measure "$name-float16" --dtype float16 "$@"
}

# shellcheck disable=SC2086 # SUITES is a list
if wants bench; then measure_all layers --suite $SUITES --pass all; fi
if wants table; then measure_all table --suite paper_table --pass all; fi

echo
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all steps done; results in $OUT"
