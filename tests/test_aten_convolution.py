"""PyTorch's convolution in place of lkconv's kernels: what the CUDA ops return where no kernel takes a call.

The same C++ on CPU tensors, compiled here, against lkconv's own kernels: values, strides and dtypes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import lkconv  # noqa: F401  (registers the ops)
from processes import ROOT, exclusive, run

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SOURCE = Path(__file__).parent / "aten_convolution" / "ops.cpp"
LIBRARY = ROOT / "build" / "aten_convolution" / f"ops-torch{torch.__version__}.so"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the ops with")
GEOMETRY = {
    "same": ((1, 1), (1, 2), (1, 1)),
    "strided": ((2, 3), (1, 0), (1, 1)),
    "dilated": ((1, 2), (4, 2), (3, 2)),
}


@pytest.fixture(scope="module")
def ops():
    """The compiled ops; the library is kept between runs."""
    inputs = [SOURCE, Path(__file__), *(ROOT / "csrc").glob("*.h")]
    with exclusive("aten_convolution"):
        if not LIBRARY.exists() or LIBRARY.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
            LIBRARY.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
            include = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
            link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
            command = [str(COMPILER), *flags, *include, str(SOURCE), *link, "-o", str(LIBRARY)]
            done = run(command, timeout=480)
            assert done.returncode == 0, done.stderr[-4000:]
    torch.ops.load_library(LIBRARY)
    return torch.ops.lkconv_aten


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("multiplier", (1, 2))
@pytest.mark.parametrize("name", GEOMETRY)
def test_same_as_the_kernels(ops, name, multiplier, dtype, memory_format) -> None:
    geometry = GEOMETRY[name]
    torch.manual_seed(0)

    def tensor(*size):
        return torch.randn(size, dtype=torch.float64).to(dtype)

    x = tensor(2, 4, 12, 14).contiguous(memory_format=memory_format)
    w, bias = tensor(4 * multiplier, 1, 3, 5), tensor(4 * multiplier)
    y = torch.ops.lkconv.depthwise_conv2d(x, w, bias, *geometry)
    g = tensor(*y.shape).contiguous(memory_format=memory_format)
    size, kernel_size = list(x.shape), list(w.shape[2:])
    pairs = (
        (ops.forward(x, w, bias, *geometry), y),
        (ops.forward(x, w, None, *geometry), torch.ops.lkconv.depthwise_conv2d(x, w, None, *geometry)),
        (
            ops.backward_input(g, w, size, *geometry),
            torch.ops.lkconv.depthwise_conv2d_backward_input(g, w, size, *geometry),
        ),
        (
            ops.backward_weight(g, x, kernel_size, *geometry),
            torch.ops.lkconv.depthwise_conv2d_backward_weight(g, x, kernel_size, *geometry),
        ),
    )
    rounding = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    for found, expected in pairs:
        assert found.dtype == dtype and found.stride() == expected.stride()
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error <= rounding
