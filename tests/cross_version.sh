#!/usr/bin/env bash
# One wheel for every torch: builds an sdist and a wheel with one interpreter's torch and tests the wheel under
# that of each other interpreter. Each needs torch; the first also what pyproject.toml requires to build.
#
#   tests/cross_version.sh old-venv/bin/python new-venv/bin/python ...
#
# Environment:
#   TESTS   files of tests/ that run under every interpreter that has pytest, besides opcheck on each op
#           (default: what every user meets; "" for none)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
builder=$1
tests=${TESTS-test_functional.py test_modules.py test_convert.py test_ops.py test_cpu_non_finite.py}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/source"
(cd "$root" && "$builder" -c "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])" \
  "$work" >"$work/log" 2>&1) || { cat "$work/log"; exit 1; }
tar -xzf "$work"/lkconv-*.tar.gz -C "$work/source" --strip-components=1
"$builder" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" "$work/source"
wheel=$(ls "$work"/lkconv-*.whl)
echo "built $(basename "$wheel") from the sdist with torch $("$builder" -c 'import torch; print(torch.__version__)')"

# The tests without the sources beside them: these would be imported instead of what was installed.
mkdir "$work/checks"
cp -r "$work/source/tests" "$work/source/pyproject.toml" "$work/checks"
cat >"$work/smoke.py" <<'EOF'
import os

import torch
import lkconv
import lkconv._C

assert lkconv.__file__.startswith(os.environ["PYTHONPATH"]), lkconv.__file__
x, w, b = torch.randn(2, 6, 28, 28), torch.randn(6, 1, 13, 13), torch.randn(6)
geometry = [1, 1], [6, 6], [1, 1]
y = torch.ops.lkconv.depthwise_conv2d(x, w, b, *geometry)
torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, b, padding=6, groups=6), rtol=1e-4, atol=1e-4)
checks = (
    (torch.ops.lkconv.depthwise_conv2d, (x, w, b, *geometry)),
    (torch.ops.lkconv.depthwise_conv2d_backward_input, (y, w, list(x.shape), *geometry)),
    (torch.ops.lkconv.depthwise_conv2d_backward_weight, (y, x, [13, 13], *geometry)),
)
# Shape functions and autograd are registered in Python; a tree that has only the compiled part has only schemas.
python_part = hasattr(lkconv, "depthwise_conv2d")
utils = {} if python_part else {"test_utils": "test_schema"}
for op, arguments in checks:
    torch.library.opcheck(op.default, arguments, **utils)
print(f"torch {torch.__version__}: smoke and opcheck ({'all' if python_part else 'schema only'}) passed,",
      f"{lkconv._C.active_isa()}, from {lkconv.__file__.split('/lkconv/')[0]}")
EOF
status=0
for python in "$@"; do
  rm -rf "$work/installed"
  "$python" -m pip install --quiet --no-deps --target "$work/installed" "$wheel"
  (cd "$work" && PYTHONPATH="$work/installed" "$python" smoke.py)
  if [ -n "$tests" ] && "$python" -c 'import pytest' 2>/dev/null; then
    # shellcheck disable=SC2046,SC2086 # lists of words
    (cd "$work/checks" && PYTHONPATH="$work/installed" "$python" -m pytest -q -p no:cacheprovider \
      -m "not slow and not gpu" $(printf 'tests/%s ' $tests)) || status=1
  fi
done
exit $status
