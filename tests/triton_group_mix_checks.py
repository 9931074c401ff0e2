"""Checks of the Triton Group-Mix operators, the same on a GPU and in the interpreter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

import lkconv
from group_mix_cases import aggregate_arguments, attention, relative, unfused
from lkconv import backends, reference
from triton_support import kernels

KERNELS = {  # what one training step or one evaluation with gradients runs
    "pack_taps_kernel", "aggregate_kernel", "reduce_kernel", "pointwise_kernel", "spread_kernel",
    "weight_kernel",
    "taps_kernel", "context_kernel", "merge_context_kernel", "attend_kernel", "grad_context_kernel",
    "attend_backward_kernel", "position_taps_kernel", "reduce_splits_kernel",
}  # fmt: skip


@dataclass(frozen=True)
class GroupMixCase:
    """``tiles``: "small" cuts the tokens into more tiles and sums than the planner would, "large" fewer."""

    dim: int
    batch: int
    height: int
    width: int
    dtype: str = "float32"
    training: bool = False
    tiles: str = ""

    @property
    def name(self) -> str:
        mode = "train" if self.training else "eval"
        tiles = f"-{self.tiles}" if self.tiles else ""
        return f"C{self.dim}-{self.batch}x{self.height}x{self.width}-{self.dtype}-{mode}{tiles}"


# d = 8, 10, 16 and 24; odd and thin maps; several images; one token. A forward pass of d = 48 is a check
# below.
INTERPRETED = (
    GroupMixCase(40, 1, 3, 7, training=True, tiles="small"),
    GroupMixCase(80, 1, 5, 3),
    GroupMixCase(50, 1, 2, 2, "float64", training=True),
    GroupMixCase(120, 1, 3, 3, "float16", training=True),
    GroupMixCase(40, 2, 1, 1),
)
# The maps of the models' stages: the last one with its own channels, the others with few, and in tiles that
# are large enough for the interpreter, whose time goes with their number.
STAGES = (
    GroupMixCase(320, 1, 7, 7, training=True),
    GroupMixCase(40, 1, 14, 14, training=True, tiles="large"),
    GroupMixCase(40, 1, 28, 28, tiles="large"),
)
ON_DEVICE = (
    *INTERPRETED,
    *(
        GroupMixCase(dim, batch, height, width, dtype, training)
        for dim, batch, height, width in ((80, 3, 56, 53), (200, 2, 28, 29), (320, 2, 14, 14), (480, 2, 7, 7))
        for dtype in ("float32", "float16", "bfloat16")
        for training in (False, True)
    ),
    GroupMixCase(320, 1, 9, 11, "float64", True),
)


TILES = {
    "small": {"pixels": 16, "sum_pixels": 16, "window_pixels": 8},
    "large": {"pixels": 512, "sum_pixels": 512, "window_pixels": 512},
}


@contextmanager
def tiles_of(kind: str) -> Iterator[None]:
    group_mix = kernels("group_mix")
    blocks, splits = group_mix.blocks_for, group_mix.splits_for
    if kind:
        group_mix.blocks_for = lambda *a: replace(blocks(*a), **TILES[kind])
        group_mix.splits_for = lambda programs, tiles, machine: min(2, tiles)
    try:
        yield
    finally:
        group_mix.blocks_for, group_mix.splits_for = blocks, splits


@contextmanager
def launched() -> Iterator[set[str]]:
    """The names of the kernels that run."""
    group_mix = kernels("group_mix")
    before, names = group_mix.wrap_triton, set()

    def wrap(kernel):
        names.add(kernel.__name__)
        return before(kernel)

    group_mix.wrap_triton = wrap
    try:
        yield names
    finally:
        group_mix.wrap_triton = before


def gradients(module: torch.nn.Module, x: torch.Tensor, size, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, the input's gradient and the parameters' gradients in the order of the parameters."""
    leaf = x.clone().requires_grad_()
    out = module(leaf, size)
    out.backward(grad)
    found = {"out": out.detach(), "x": leaf.grad}
    return found | {name: p.grad for name, p in module.named_parameters()}


def names_of_unfused(module: torch.nn.Module) -> dict[str, str]:
    """Parameter names of the independent composition -> those of GroupMixAttention."""
    names = {
        "aggregation.local.0": "aggregator.agg0.conv.conv1",
        "aggregation.local.1": "aggregator.agg0.conv.pointwise_conv",
    }
    names["aggregation.local_norm"] = "aggregator.agg0.norm"
    for i in range(4):
        names[f"aggregation.norms.{i}"] = f"aggregator.norm{i}"
        names[f"aggregation.mixers.{i}.0"] = f"aggregator.agg{i}.conv1"
        names[f"aggregation.mixers.{i}.1"] = f"aggregator.agg{i}.pointwise_conv"
        names[f"position.{i}"] = f"crpe.conv_list.{i}"
    found = {}
    for name, _ in module.named_parameters():
        stem, leaf = name.rsplit(".", 1)
        found[name] = f"{names.get(stem, stem)}.{leaf}"
    return found


def check_case(case: GroupMixCase, device: str) -> None:
    """Output, running statistics and all gradients, against float64 and PyTorch in the same dtype."""
    torch.manual_seed(0)
    dtype, size = getattr(torch, case.dtype), (case.height, case.width)
    module = attention(case.dim, dtype, case.training)
    exact, eager = unfused(module), unfused(module, dtype)
    x = torch.randn(case.batch, case.height * case.width, case.dim).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    expected = gradients(exact, x.double(), size, grad.double())
    peer = gradients(eager, x, size, grad)
    module.to(device)
    with lkconv.use_backend("triton"), tiles_of(case.tiles), launched() as names:
        assert module.aggregator.namespace(x.to(device).repeat(1, 1, 3)) == "lkconv_triton"
        got = gradients(module, x.to(device), size, grad.to(device))
    assert names == KERNELS | ({"normalize_kernel"} if case.training else set())
    compare(dtype, expected, peer, got, names_of_unfused(exact))
    if case.training:
        for ours, theirs in zip(module.aggregator.norms(), exact.aggregation.norms, strict=True):
            limit = max(4 * torch.finfo(dtype).eps, 1e-14)
            assert relative(ours.running_mean.cpu(), theirs.running_mean) <= limit
            assert relative(ours.running_var.cpu(), theirs.running_var) <= limit


def compare(dtype, expected, peer, got, names) -> None:
    """Half types: at most twice PyTorch's error, parameters together; all: a fixed number of roundings."""
    eps = torch.finfo(dtype).eps
    ours, theirs = {}, {}
    for name, value in expected.items():
        mine = got[names.get(name, name)]
        assert mine.shape == value.shape and mine.dtype == dtype, name
        # One token makes gradients through the norms vanish: then compare with the rounding of 1.
        scale = max(value.norm().item(), 1e-3)
        ours[name] = (mine.cpu().double() - value).norm().item() / scale
        theirs[name] = (peer[name].double() - value).norm().item() / scale
        # Not "error > limit": a NaN must fail.
        assert ours[name] <= 16 * eps, f"{name}: error {ours[name]:.2e}, PyTorch {theirs[name]:.2e}"
    for group in (["out"], ["x"], [name for name in expected if name not in ("out", "x")]):
        error, limit = (sum(e[n] ** 2 for n in group) ** 0.5 for e in (ours, theirs))
        if dtype != torch.float64:  # float64's own error is the oracle's
            slack = len(group) ** 0.5 * eps / (4 if eps > 1e-5 else 1)
            assert error <= 2 * limit + slack, f"{group[:3]}: error {error:.2e}, PyTorch {limit:.2e}"


# ---- the function, edges ----------------------------------------------------------------------------------
def check_function(device: str) -> None:
    """group_mix_aggregate of a slice of a wider tensor, its views, and gradients of only some outputs."""
    torch.manual_seed(1)
    module = attention(40).aggregator
    wide = torch.full((2, 6, 130), float("nan"), dtype=torch.float64)
    wide[..., 5:125] = torch.randn(2, 6, 120, dtype=torch.float64)
    results = []
    for function, where in ((reference.group_mix_aggregate, "cpu"), (lkconv.group_mix_aggregate, device)):
        mine = copy.deepcopy(module).to(where)
        qkv = wide.to(where)[..., 5:125].requires_grad_()
        with lkconv.use_backend("triton"), launched() as names:
            q, k, v, local = function(qkv, (2, 3), **aggregate_arguments(mine))
            (q.sum() + 2 * (local**2).sum()).backward()  # a sum's gradient has stride 0; k and v have none
        results.append([t.cpu() for t in (q, k, v, local, qkv.grad, mine.agg3.conv1.weight.grad)])
    assert "aggregate_kernel" in names
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and relative(b, a) < 1e-12


def check_running_statistics_may_be_absent(device: str) -> None:
    torch.manual_seed(2)
    arguments = aggregate_arguments(attention(40, torch.float32).to(device).aggregator)
    arguments |= {"running_means": None, "running_vars": None}
    qkv = torch.randn(1, 6, 120, device=device)
    with lkconv.use_backend("triton"):
        ours = lkconv.group_mix_aggregate(qkv, (3, 2), **arguments, training=True)
    theirs = reference.group_mix_aggregate(qkv, (3, 2), **arguments, training=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check_empty_batch(device: str) -> None:
    kernels()
    backends.choose(torch.device(device), torch.float32, "group_mix")
    ops = torch.ops.lkconv_triton
    module = attention(40, torch.float32).to(device)
    a = aggregate_arguments(module.aggregator)
    lists = [a[n] for n in ("depthwise_weights", "pointwise_weights", "norm_weights", "norm_biases")]
    norm = (a["layer_norm_weight"], a["layer_norm_bias"])
    qkv = torch.empty(0, 6, 120, device=device)
    mixed, local = ops.group_mix_aggregate(
        qkv, 2, 3, *lists, a["running_means"], a["running_vars"], *norm, 1e-5, 1e-5
    )
    assert mixed.shape == (3, 0, 6, 32) and local.shape == (0, 6, 8)
    out, _, _ = ops.group_mix_attention(mixed, local, 2, 3, *module.crpe.parameter_lists(), 0.4)
    assert out.shape == (0, 6, 40)
    premix, _, _, mean, var = ops.group_mix_mix(qkv, 2, 3, *lists[:2], *norm, 1e-5)
    assert premix.shape == (3, 0, 6, 24) and mean.isnan().all() and var.isnan().all()


def core_inputs(device: str, keys: torch.Tensor):
    torch.manual_seed(3)
    batch, tokens, channels = keys.shape
    mixed = torch.randn(3, batch, tokens, channels)
    mixed[1] = keys
    weights, biases = attention(40, torch.float32).to(device).crpe.parameter_lists()
    return mixed.to(device), torch.randn(batch, tokens, channels // 4, device=device), weights, biases


def check_large_keys(device: str) -> None:
    """The running maximum keeps exp in range, whatever the order of the keys and the split they are in."""
    kernels()
    backends.choose(torch.device(device), torch.float32, "group_mix")
    size = (5, 7)
    keys = 30 * torch.randn(1, 35, 32) + torch.linspace(-200, 200, 35)[:, None] * torch.linspace(-1, 1, 32)
    keys[0, :20, 4] = float("-inf")  # a whole split, and no weight at all
    mixed, local, weights, biases = core_inputs(device, keys)
    with tiles_of("small"):
        out, log_sum, context = torch.ops.lkconv_triton.group_mix_attention(
            mixed, local, *size, weights, biases, 0.4
        )
    q, k, v = mixed.double().view(3, 1, 35, 8, 4).transpose(2, 3)
    expected = reference.group_mix_attention(q, k, v, local.double(), size, weights, biases, 0.4)
    assert relative(out.cpu(), expected.cpu()) < 1e-6
    assert relative(context.cpu(), (k.softmax(2).transpose(-1, -2) @ v).cpu()) < 1e-6
    assert relative(log_sum.cpu(), mixed[1].double().logsumexp(1).cpu()) < 1e-6


def check_non_finite(device: str) -> None:
    """A non-finite input reaches every output whose window holds it, and no other image."""
    for bad in (float("nan"), float("inf")):
        torch.manual_seed(4)
        module = attention(40, torch.float32).aggregator.to(device)
        qkv = torch.randn(2, 15, 120, device=device)
        qkv[1, 7, 5] = bad  # q, segment 0
        qkv[1, 7, 8 * 3 + 2] = bad  # q, segment 3: windows of 7 cover the map of 3 x 5 from its middle
        qkv[1, 7, 40 + 8 * 4 + 3] = bad  # k, segment 4
        with lkconv.use_backend("triton"):
            q, k, v, local = module(qkv, (3, 5))
        assert not q[1, 1, 7, 1].isfinite() and not local[1, 7].isfinite().any()
        assert not q[1, 6:].isfinite().any()
        assert (
            k.isfinite().all() and v.isfinite().all() and q[0].isfinite().all() and local[0].isfinite().all()
        )


def check_parameters_of_another_dtype(device: str) -> None:
    """float16 tokens with float32 parameters, as under autocast."""
    torch.manual_seed(5)
    module = attention(40, torch.float32).to(device).aggregator
    qkv = torch.randn(1, 6, 120, device=device).half()
    exact = copy.deepcopy(module).cpu().double()(qkv.cpu().double(), (2, 3))
    eager = copy.deepcopy(module).cpu().half()(qkv.cpu(), (2, 3))
    with lkconv.use_backend("triton"):
        out = module(qkv, (2, 3))
    for ours, theirs, right in zip(out, eager, exact, strict=True):
        assert ours.dtype == torch.float16
        assert relative(ours.cpu(), right) <= 2 * relative(theirs, right) + torch.finfo(torch.float16).eps


def check_forward_of_the_first_stage(device: str) -> None:
    """56 x 56 tokens; backward they would take the interpreter a minute."""
    torch.manual_seed(7)
    module = attention(40, torch.float32)
    x = torch.randn(1, 56 * 56, 40)
    exact = unfused(module)(x.double(), (56, 56))
    module.to(device)
    tiles = "large" if device == "cpu" else ""  # a GPU takes the planner's
    with torch.no_grad(), lkconv.use_backend("triton"), tiles_of(tiles), launched() as names:
        assert relative(module(x.to(device), (56, 56)).cpu(), exact) < 1e-6
    assert "attend_kernel" in names


def check_forward_of_48_channels(device: str) -> None:
    torch.manual_seed(6)
    module = attention(240, torch.float32)
    x = torch.randn(1, 6, 240)
    exact = unfused(module)(x.double(), (2, 3))
    module.to(device)
    with lkconv.use_backend("triton"), launched() as names:
        assert relative(module(x.to(device), (2, 3)).cpu(), exact) < 1e-6
    assert "attend_kernel" in names


CHECKS = {
    "forward_of_48_channels": check_forward_of_48_channels,
    "forward_of_the_first_stage": check_forward_of_the_first_stage,
    "function": check_function,
    "no_running_statistics": check_running_statistics_may_be_absent,
    "empty_batch": check_empty_batch,
    "large_keys": check_large_keys,
    "non_finite": check_non_finite,
    "parameters_of_another_dtype": check_parameters_of_another_dtype,
}
INTERPRETED_CHECKS = {
    f"group_mix-{case.name}": partial(check_case, case, "cpu") for case in (*INTERPRETED, *STAGES)
} | {f"group_mix-{name}": partial(check, "cpu") for name, check in CHECKS.items()}
