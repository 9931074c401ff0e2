"""Checks of ``lkconv_triton::normalised_branches*`` on a device: the CPU in the interpreter, or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

import lkconv
from lkconv import backends, reparam
from lkconv.reparam import normalised_branches
from normalised_branches_cases import (
    LAYOUTS,
    SUMS,
    TRAINING_TOLERANCE,
    Sum,
    check_gradients,
    check_large_mean_of,
    check_outputs_and_sum,
    check_with_opcheck,
    everything,
    same,
    same_size,
    take_strided_operands,
    training_step,
)
from triton_support import kernels

# The interpreter takes long for every program: as SUMS, with fewer channels and pixels.
SMALL = {
    "one": SUMS["one"],
    "dilated": ((2, 2, 12, 9), [(5, 2, 1), (3, 2, 2), (3, 3, 3)], False, 1),
    "identity": ((1, 2, 7, 7), [((3, 1), (1, 0), 1), (1, 0, 1)], True, 0),
    "all": ((3, 2, 6, 14), [(7, 3, 1), ((1, 5), (0, 2), 1)], True, 2),
    "smaller": ((2, 2, 9, 11), [((3, 5), 0, (2, 1)), (5, 0, 1)], False, 0),
    "larger": ((2, 2, 4, 3), [(3, 2, 1), (5, 3, 1)], False, 1),
    "tiles": ((1, 2, 23, 29), [(3, 1, 1), (3, 4, 4)], True, 1),
    "wide kernel": ((1, 2, 4, 4), [(9, 4, 1), (3, 1, 1)], False, 0),
    "thin": ((3, 1, 1, 9), [((1, 4), (0, 3), 2)], True, 0),
}
CHANNELS = ((1, 35, 4, 3), [(3, 1, 1), (2, 1, 2)], False, 1)  # past a block of channels


def make(case: str | tuple, dtype: torch.dtype, layout: str, device: str) -> Sum:
    """A sum for the Triton ops, whose fake kernels are registered."""
    kernels()
    normalised_branches.register_hooks("lkconv_triton")
    return Sum(case, dtype, LAYOUTS[layout], namespace="lkconv_triton", device=device)


def check_values(case: str | tuple, dtype: torch.dtype, layout: str, device: str) -> None:
    s = make(case, dtype, layout, device)
    check_outputs_and_sum(s)
    check_gradients(s)


def check_repetition(device: str) -> None:
    for layout in LAYOUTS:
        s = make(SMALL["tiles"], torch.float32, layout, device)
        assert same(everything(s), everything(s))


def check_64_bit_offsets(device: str) -> None:
    """The kernels' 64-bit variants give the same bits as their 32-bit ones."""
    operators = kernels("normalised_branches")
    narrow = operators.needs_int64
    for layout in LAYOUTS:
        s = make(SMALL["larger"], torch.float32, layout, device)
        expected = everything(s)
        operators.needs_int64 = lambda *extents: True
        try:
            got = everything(s)
        finally:
            operators.needs_int64 = narrow
        assert same(got, expected)


def check_every_number_of_splits(device: str) -> None:
    """Shares of the pixels that do not divide them, and some that get none."""
    operators = kernels("normalised_branches")
    chosen = operators.weight_splits
    for splits in (1, 2, 3, 7):
        operators.weight_splits = lambda *_, s=splits: s
        try:
            check_gradients(make(SMALL["identity"], torch.float32, "nhwc", device))
        finally:
            operators.weight_splits = chosen


def check_large_mean(device: str) -> None:
    kernels()
    for layout in LAYOUTS.values():
        check_large_mean_of("lkconv_triton", layout, device)


def check_strided_operands(device: str) -> None:
    s = make(SMALL["all"], torch.float32, "nchw", device)
    wanted = everything(s)
    take_strided_operands(s)
    assert same(everything(s), wanted)


def check_expanded_gradient(device: str) -> None:
    """A gradient of .sum() has stride 0 everywhere."""
    s = make(SMALL["larger"], torch.float32, "nhwc", device)
    s.grad = torch.full((), 0.5, device=device).expand(s.grad.shape)
    check_gradients(s)


def check_non_finite(device: str) -> None:
    """A non-finite pixel reaches every output and gradient whose window holds it, no other image's or
    channel's output, and the statistics of its channel alone."""
    s = make(((2, 2, 9, 8), [(3, 1, 1)], True, 0), torch.float32, "nchw", device)
    s.input[1, 0, 4, 4] = float("nan")
    saved, means, variances = s.outputs()
    hit = torch.zeros(s.size, dtype=torch.bool, device=device)
    hit[1, 0, 3:6, 3:6] = True
    assert torch.equal(saved[0].isnan(), hit)
    for statistic in (means, variances):
        assert statistic[:, 0].isnan().all() and statistic[:, 1].isfinite().all()
    ones = torch.ones_like(means)
    grads = torch.ops.lkconv_triton.normalised_branches_backward(
        s.grad, s.input, saved, s.weights, [], s.padding, s.dilation, True, ones, ones, ones
    )
    reached = torch.zeros_like(hit)
    reached[1, 0, 2:7, 2:7] = True
    assert torch.equal(grads[0].isnan(), reached)
    assert grads[1][0][0].isnan().all() and grads[1][0][1].isfinite().all()


def check_empty_batch(device: str) -> None:
    s = make(((0, 3, 6, 5), [(3, 1, 1)], True, 1), torch.float32, "nchw", device)
    saved, means, _, out, total, dots, grad_input, grad_weight, grad_given = everything(s)
    assert saved.shape == (1, 0, 3, 6, 5) and means.shape == (3, 3) and means.isnan().all()
    assert out.shape == grad_input.shape == grad_given.shape == (0, 3, 6, 5)
    assert not total.any() and not dots.any() and not grad_weight.any()


def check_fake_kernels(device: str) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        for name, dtype, layout in (
            ("all", torch.float32, "nhwc"),
            ("smaller", torch.float64, "nchw"),
            ("thin", torch.float32, "nhwc"),
        ):
            check_with_opcheck(make(SMALL[name], dtype, layout, device))
    finally:
        torch.use_deterministic_algorithms(deterministic)


def check_arrangement(device: str) -> None:
    """Up to 49 taps in place; without a kernel in place, or where no Triton is wanted, nothing."""
    x = torch.empty(2, 8, 20, 20, device=device)
    geometry = partial(same_size, 8)
    with lkconv.use_backend("triton"):
        found = normalised_branches.arrange(x, [geometry((51, 5)), None, geometry(7), geometry(3)], 8)
        assert found is not None and found.namespace == "lkconv_triton"
        assert (found.kernels, found.identity, found.apart) == ((2, 3), (1,), (0,))
        assert found.values_per_channel == 2 * 20 * 20
        assert normalised_branches.arrange(x, [geometry(9), None], 8) is None
        assert normalised_branches.arrange(x.long(), [geometry(3)], 8) is None
    with lkconv.use_backend("torch"):
        assert normalised_branches.arrange(x, [geometry(3)], 8) is None


def check_training(block: Callable[[], nn.Module], layout: str, dtype: torch.dtype, device: str) -> None:
    """A block's training step through the fused ops against its branches run one after the other: values,
    gradients and running statistics."""
    torch.manual_seed(2)
    module = block().to(device, dtype).train()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    x = torch.randn(2, 2, 5, 7, dtype=dtype).to(device).contiguous(memory_format=LAYOUTS[layout])
    with lkconv.use_backend("triton"):
        got, ran = training_step(module, x, "fused")
    with lkconv.use_backend("torch"):
        wanted, ran_alone = training_step(module, x, "branches")
    stages = {f"lkconv_triton::normalised_branches{stage}" for stage in ("", "_sum", "_dots", "_backward")}
    assert stages <= ran.keys() and not stages & ran_alone.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        off, size = (float(t.cpu().double().norm()) for t in (got[name] - value, value))
        # A 1 x 1 kernel's gradient vanishes, as its norm undoes its scale: there the rounding of 1 counts.
        assert off <= TRAINING_TOLERANCE[dtype] * max(size, 1), name


def check_cuda_leaves_sums_to_triton(device: str) -> None:
    """Where the convolutions are CUDA's own, which has no kernels for sums, Triton takes them."""
    assert backends._cuda_lacks("depthwise_conv2d") is None
    assert "normalised" in str(backends._cuda_lacks("normalised_branches"))


BLOCKS = {
    "replknet": partial(reparam.ReparamLargeKernelConv, 2, 2, 9, 1, 2, 5),  # 9 x 9 apart, 5 x 5 in place
    "unireplknet": partial(reparam.DilatedReparamBlock, 2, 7),
    "repvgg": partial(reparam.RepVGGBlock, 2, 2, 3, padding=1, groups=2),  # with an identity
}
CHECKS: dict[str, Callable[[str], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name not in ("check_values", "check_training")
    and check.__module__ == __name__
}  # fmt: skip


def value_checks(
    sums: dict, dtypes: Iterable[torch.dtype], device: str, layouts: Iterable[str] = LAYOUTS
) -> dict[str, Callable[[], None]]:
    return {
        f"branches-{name}-{layout}-{dtype}": partial(check_values, case, dtype, layout, device)
        for name, case in sums.items()
        for layout in layouts
        for dtype in dtypes
    }


def training_checks(
    dtypes: Iterable[torch.dtype], device: str, layout: str, blocks: Iterable[str] = BLOCKS
) -> dict[str, Callable[[], None]]:
    return {
        f"branches-training-{name}-{layout}-{dtype}": partial(
            check_training, BLOCKS[name], layout, dtype, device
        )
        for name in blocks
        for dtype in dtypes
    }


FEW = {name: SMALL[name] for name in ("one", "all")}
# In groups that each have an interpreting process, so that workers share them.
INTERPRETED_GROUPS = {
    "nchw": value_checks(SMALL, (torch.float32,), "cpu", ["nchw"]),
    "nhwc": value_checks({**SMALL, "channels": CHANNELS}, (torch.float32,), "cpu", ["nhwc"]),
    "dtypes": value_checks(FEW, (torch.float16, torch.float64), "cpu"),
    "training": {
        **training_checks((torch.float64,), "cpu", "nchw", ["unireplknet", "repvgg"]),
        **training_checks((torch.float64,), "cpu", "nhwc", ["replknet", "repvgg"]),
    },
    "checks": {f"branches-{name}": partial(check, "cpu") for name, check in CHECKS.items()},
}
INTERPRETED_CHECKS = {name: check for group in INTERPRETED_GROUPS.values() for name, check in group.items()}
