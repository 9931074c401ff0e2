"""What the Group-Mix tests share: modules with non-trivial parameters, and errors."""

import torch

from bench.models.group_mix_unfused import UnfusedAttention
from lkconv import GroupMixAttention

# C, batch, height, width: every published d (8 to 96) and one smaller, odd and thin maps, one token, and a
# map that is cut into strips.
SIZES = [
    (10, 2, 5, 3), (40, 2, 9, 11), (80, 1, 14, 14), (160, 2, 7, 7), (200, 1, 6, 5), (240, 1, 3, 20),
    (320, 1, 7, 7), (360, 1, 4, 3), (480, 1, 7, 7), (80, 2, 56, 1), (40, 2, 1, 1), (80, 1, 150, 21),
]  # fmt: skip


def attention(dim, dtype=torch.float64, training=False):
    """A GroupMixAttention whose norms and statistics differ from their initial values."""
    module = GroupMixAttention(dim, qkv_bias=True)
    for norm in module.aggregator.norms():
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    torch.nn.init.normal_(module.aggregator.agg0.norm.weight)
    torch.nn.init.normal_(module.aggregator.agg0.norm.bias)
    return module.to(dtype).train(training)


def unfused(module, dtype=torch.float64):
    """The independent composition with the same parameters."""
    return UnfusedAttention(module.dim).to(dtype).copy_from(module).to(dtype)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def aggregate_arguments(aggregator):
    """The parameters of a GroupMixAggregator as group_mix_aggregate takes them."""
    separable = [aggregator.agg1, aggregator.agg2, aggregator.agg3, aggregator.agg0.conv]
    norms = aggregator.norms()
    return {
        "depthwise_weights": [s.conv1.weight for s in separable],
        "pointwise_weights": [s.pointwise_conv.weight for s in separable],
        "norm_weights": [n.weight for n in norms],
        "norm_biases": [n.bias for n in norms],
        "running_means": [n.running_mean for n in norms],
        "running_vars": [n.running_var for n in norms],
        "layer_norm_weight": aggregator.agg0.norm.weight,
        "layer_norm_bias": aggregator.agg0.norm.bias,
    }


def fused_ops(module, *arguments):
    """The Group-Mix ops that a call runs, by name."""
    with torch.profiler.profile() as profile:
        module(*arguments)
    return {e.name.removeprefix("lkconv::") for e in profile.events() if e.name.startswith("lkconv::group")}
