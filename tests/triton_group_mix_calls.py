"""Calls of every Group-Mix operator, also on tensors without data: for compiling and tracing."""

from __future__ import annotations

import torch


def arguments(dim, batch, size, dtype, device="meta"):
    """Tensors by name for all ops of one training step, without data."""
    d, n = dim // 5, size[0] * size[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    return {
        "qkv": empty(batch, n, 15 * d), "premix": empty(3, batch, n, 3 * d), "prelocal": empty(batch, n, d),
        "mixed": empty(3, batch, n, 4 * d), "out": empty(batch, n, 5 * d), "stats": empty(4, d, dtype=wide),
        "log_sum": empty(batch, 4 * d, dtype=wide), "context": empty(batch, 8, d // 2, d // 2, dtype=wide),
        "depthwise": [empty(d, 1, k, k) for k in (3, 5, 7)] + [empty(3 * d, 1, 3, 3)],
        "pointwise": [empty(d, d, 1, 1) for _ in range(3)] + [empty(d, 3 * d, 1, 1)],
        "norm": [empty(d) for _ in range(4)], "layer_norm": empty(d), "sums": empty(2, 4, d,
        dtype=torch.float64),
        "position": [empty(h * d // 2, 1, k, k) for h, k in ((2, 3), (3, 5), (3, 7))],
        "bias": [empty(h * d // 2) for h in (2, 3, 3)],
    }  # fmt: skip


def run_all(ops, a, size):
    """Every op once, as a training step and an evaluation would call it; returns all outputs."""
    d = a["layer_norm"].shape[0]
    norm, ln, mixing = (
        (a["norm"], a["norm"]),
        (a["layer_norm"], a["layer_norm"]),
        (a["depthwise"], a["pointwise"]),
    )
    stats, batch_norm = (a["stats"], a["stats"]), (*(a["norm"], a["norm"]), a["stats"], a["stats"])
    return [
        ops.group_mix_aggregate(a["qkv"], *size, *mixing, *norm, *norm, *ln, 1e-5, 1e-5),
        ops.group_mix_mix(a["qkv"], *size, *mixing, *ln, 1e-5),
        ops.group_mix_normalize(a["qkv"], a["premix"], *batch_norm, 1e-5),
        ops.group_mix_backward_reduce([a["mixed"]], a["qkv"], a["premix"], *batch_norm, 1e-5),
        ops.group_mix_backward(
            list(a["mixed"]), a["out"][..., 4 * d :], a["qkv"], a["premix"], a["prelocal"], *size, *mixing,
            *norm, *stats,
            *ln, 1e-5, 1e-5, a["sums"], 9.0,
        ),
        ops.group_mix_attention(a["mixed"], a["prelocal"], *size, a["position"], a["bias"], 0.4),
        ops.group_mix_attention_backward(
            a["out"], a["mixed"], a["log_sum"], a["context"], *size, a["position"], a["bias"], 0.4
        ),
    ]  # fmt: skip


class Recorded:
    """Stands in for an op namespace: runs the ops and keeps each one's arguments."""

    def __init__(self, ops):
        self.ops, self.arguments = ops, {}

    def __getattr__(self, name):
        def call(*args):
            self.arguments[name] = args
            return getattr(self.ops, name)(*args)

        return call
