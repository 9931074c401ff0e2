"""Group-Mix ops on a real GPU: the emulator's cases through torch, and what only a GPU has."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import lkconv
from cuda_host.group_mix_cases import (
    Case,
    aggregate_exact,
    aggregate_inputs,
    attention_exact,
    attention_inputs,
    error_limit,
    flat,
    heads_of,
    relative,
)
from group_mix_cases import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

ops = torch.ops.lkconv
SCALE, EPS = 0.37, 1e-4
# d = 8 to 96 of the published models, odd and thin maps, many tiles and shares.
CASES = (
    Case(8, 2, 5, 3), Case(16, 2, 9, 11), Case(24, 3, 14, 5), Case(40, 2, 28, 28), Case(64, 4, 14, 14),
    Case(96, 2, 7, 7), Case(10, 1, 7, 9), Case(16, 8, 56, 56), Case(8, 1, 1, 37), Case(16, 2, 1, 1),
)  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(found: dict, exact: dict, eager: dict, dtype: torch.dtype, case: Case) -> None:
    for name, expected in exact.items():
        limit = error_limit(name, case, dtype, relative(eager[name], expected))
        error = (found[name].cpu().double() - expected).norm()
        vanishing = case.tokens == 1 and error < 1e-3 * torch.finfo(dtype).eps ** 0.5
        assert vanishing or relative(found[name].cpu(), expected) <= limit, name


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_aggregate(case: Case, dtype: torch.dtype, training: bool) -> None:
    inputs = aggregate_inputs(case, dtype, dtype)
    exact = aggregate_exact(case, inputs, training, torch.float64, EPS)
    eager = exact if dtype == torch.float64 else aggregate_exact(case, inputs, training, dtype, EPS)
    results = []
    for _ in range(2):
        t = {k: [v.cuda() for v in values] for k, values in inputs.items()}
        order = ["qkv", "depthwise", "pointwise", "layer_norm", "norm_weight", "norm_bias"]
        leaves = [v.requires_grad_() for name in order for v in t[name]]
        q, k, v, local = lkconv.group_mix_aggregate(
            t["qkv"][0], (case.height, case.width), t["depthwise"], t["pointwise"], t["norm_weight"],
            t["norm_bias"], t["norm_mean"], t["norm_var"], *t["layer_norm"], training=training,
            momentum=1.0, eps=EPS, layer_norm_eps=EPS,
        )  # fmt: skip
        mixed = torch.stack([x.transpose(1, 2).flatten(2) for x in (q, k, v)])
        grad_local = t["grad_out"][0][..., 4 * case.segment :]
        grads = list(torch.autograd.grad([mixed, local], leaves, [t["grad_mixed"][0], grad_local]))
        found = {
            "mixed": mixed, "local": local, "grad_norm_bias": flat(grads[15:19]),
            "grad_norm_weight": flat(grads[11:15]), "grad_qkv": grads[0],
            "grad_depthwise": flat(grads[1:5]), "grad_pointwise": flat(grads[5:9]),
            "grad_layer_norm": flat(grads[9:11]),
        }  # fmt: skip
        if training:
            count = 3 * case.batch * case.tokens
            found["mean"] = torch.stack(t["norm_mean"])
            found["var"] = torch.stack(t["norm_var"]) * (count - 1) / count
        results.append(found)
    check(results[0], exact, eager, dtype, case)
    assert all(torch.equal(results[0][n], results[1][n]) for n in exact), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_core(case: Case, dtype: torch.dtype) -> None:
    inputs = attention_inputs(case, dtype, dtype)
    exact = attention_exact(case, inputs, torch.float64, SCALE)
    eager = exact if dtype == torch.float64 else attention_exact(case, inputs, dtype, SCALE)
    results = []
    for _ in range(2):
        t = {k: [v.cuda() for v in values] for k, values in inputs.items()}
        leaves = [v.requires_grad_() for name in ("mixed", "weight", "bias") for v in t[name]]
        out, _, _ = ops.group_mix_attention(
            t["mixed"][0], t["local"][0], case.height, case.width, t["weight"], t["bias"], SCALE
        )
        grads = list(torch.autograd.grad(out, leaves, t["grad_out"][0]))
        results.append({
            "out": out, "grad_mixed": grads[0], "grad_weight": flat(grads[1:4]), "grad_bias": flat(grads[4:]),
        })  # fmt: skip
    check(results[0], exact, eager, dtype, case)
    assert all(torch.equal(results[0][n], results[1][n]) for n in exact), "two runs differ"


@pytest.mark.parametrize("training", (False, True))
def test_module_reaches_the_kernels(training: bool) -> None:
    """GroupMixAttention on a GPU equals itself on the CPU, and runs no fallback."""
    module = attention(80, torch.float32, training)
    other = copy.deepcopy(module).cuda()
    x = torch.randn(2, 14 * 14, 80)
    expected = module(x, (14, 14))
    with torch.profiler.profile() as profile:
        out = other(x.cuda(), (14, 14))
    assert relative(out.cpu(), expected) < 1e-5
    names = {event.name for event in profile.events()}
    assert "lkconv::group_mix_attention" in names
    assert ("lkconv::group_mix_mix" if training else "lkconv::group_mix_aggregate") in names
    assert not any("aten::batch_norm" in name or "aten::conv2d" in name for name in names)


def test_runs_on_the_current_stream() -> None:
    module = attention(80, torch.bfloat16).cuda()
    x = torch.randn(4, 28 * 28, 80, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = module(x, (28, 28))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            result = module(x.clone(), (28, 28))
            assert not stream.query(), "the call waited for the device"
            stream.synchronize()
    assert torch.equal(result, expected)


def test_cuda_graph() -> None:
    case = Case(16, 2, 14, 14)
    t = {
        k: [v.cuda() for v in values]
        for k, values in attention_inputs(case, torch.float32, torch.float32).items()
    }
    arguments = t["mixed"][0], t["local"][0], case.height, case.width, t["weight"], t["bias"], SCALE

    def both() -> tuple[torch.Tensor, ...]:
        out, log_sum, context = ops.group_mix_attention(*arguments)
        return out, *ops.group_mix_attention_backward(
            t["grad_out"][0], arguments[0], log_sum, context, *arguments[2:]
        )

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    t["mixed"][0].copy_(torch.randn_like(t["mixed"][0]))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


def test_tensors_on_different_devices_are_refused() -> None:
    case = Case(16, 1, 5, 5)
    t = attention_inputs(case, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="device"):
        ops.group_mix_attention(t["mixed"][0].cuda(), t["local"][0], 5, 5, t["weight"], t["bias"], SCALE)


def test_head_layout() -> None:
    """q, k, v come as views of one token-major tensor."""
    module = attention(40, torch.float32).aggregator.cuda()
    q, k, v, _ = module(torch.randn(2, 15, 120, device="cuda"), (5, 3))
    mixed = torch.stack([x.transpose(1, 2).flatten(2) for x in (q, k, v)])
    for a, b in zip(heads_of(mixed), (q, k, v), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
