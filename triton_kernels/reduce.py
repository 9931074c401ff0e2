"""Second pass of the split weight gradient: add the partial sums in their fixed order and cast once."""

import triton
import triton.language as tl


@triton.jit
def sum_splits(partial, numel, splits, INT64: tl.constexpr, BLOCK: tl.constexpr):
    """(elements, which of them are there, their sums) of this program's block of (splits, numel)."""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    line = partial + i
    total = tl.load(line, mask=ok, other=0)
    for _ in range(1, splits):
        line += numel
        total += tl.load(line, mask=ok, other=0)
    return i, ok, total


@triton.jit
def reduce_splits_kernel(partial, out, numel, splits, INT64: tl.constexpr, BLOCK: tl.constexpr):
    i, ok, total = sum_splits(partial, numel, splits, INT64, BLOCK)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=ok)
