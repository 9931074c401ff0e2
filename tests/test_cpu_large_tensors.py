"""Index arithmetic beyond 2^31 elements, at the price of the pages that are touched."""

import re
from pathlib import Path

import pytest
import torch

import accuracy
import cases
from cases import Case, same
from processes import run_python

BEYOND = 2**31 + 4099
MEMORY = Path("/proc/meminfo")

# Memory that nobody writes to costs nothing: two small images lie at both ends of a huge storage.
SPREAD = [
    same((2, 18, 12, 13), (3, 3)),
    same((2, 5, 24, 24), (23, 23)),
    Case((2, 5, 15, 14), (5, 5), padding=(2, 2), stride=(2, 2), multiplier=2),
]


def spread_over(storage: torch.Tensor, t: torch.Tensor, axis: int) -> torch.Tensor:
    """`t` as a view of `storage` in which the last steps along `axis` lie beyond 2^31 elements."""
    gap = -(-BEYOND // (t.shape[axis] - 1))
    stride = list(t.stride())
    stride[axis] = gap
    view = storage.as_strided(t.shape, stride)
    return view.copy_(t)


@pytest.mark.parametrize("pass_name", accuracy.PASSES)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "channels", "rows"])
@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_strides_beyond_31_bits(case, axis, pass_name):
    t = cases.make_tensors(case, torch.float16)
    storages = [torch.empty(BEYOND + 2**16, dtype=torch.float16) for _ in range(2)]
    far = cases.Tensors(
        spread_over(storages[0], t.input, axis),
        t.weight,
        t.bias,
        spread_over(storages[1], t.grad_output, axis),
    )
    assert torch.equal(accuracy.op_result(pass_name, case, far), accuracy.op_result(pass_name, case, t))


@pytest.mark.slow
def test_more_than_31_bits_of_elements():
    """Input (expanded, so free) and output (4.3 GB) both have more than 2^31 elements."""
    free = re.search(r"MemAvailable: *(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    if free is None or int(free[1]) < 8 << 20:
        pytest.skip("needs 8 GiB of free memory" + (f", found {int(free[1]) >> 20}" if free else ""))
    run_python(
        """
        import torch, lkconv._C
        torch.set_num_threads(2)
        n, c, h, w = 2049, 16, 256, 256
        assert n * c * h * w > 2**31
        image = torch.randn(1, c, h, w).bfloat16()
        weight = torch.randn(c, 1, 1, 3).bfloat16()
        geometry = [1, 1], [0, 1], [1, 1]
        one = torch.ops.lkconv.depthwise_conv2d(image, weight, None, *geometry)
        # Reads more than 2^31 elements, writes 48.
        x, g = image.expand(n, c, h, w), one.expand(n, c, h, w)
        grad = torch.ops.lkconv.depthwise_conv2d_backward_weight(g, x, [1, 3], *geometry)
        wide = one.double(), image.double()
        single = torch.ops.lkconv.depthwise_conv2d_backward_weight(*wide, [1, 3], *geometry)
        assert (grad.double() - n * single).norm() <= 2**-8 * (n * single).norm()
        many = torch.ops.lkconv.depthwise_conv2d(x, weight, None, *geometry)
        assert many.is_contiguous()
        for i in (0, 1, 1023, 1024, 2047, 2048):  # both sides of 2^30 and 2^31
            assert torch.equal(many[i], one[0]), i
        """,
        env={"OMP_NUM_THREADS": "2"},
        timeout=200,
    )
