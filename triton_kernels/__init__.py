"""Depthwise convolution and Group-Mix attention in Triton: operators in the namespace ``lkconv_triton``.

The same schemas, memory formats and results as ``lkconv::depthwise_conv2d*``,
``lkconv::segmented_depthwise_conv2d`` and ``lkconv::group_mix_*``, for every GPU that Triton has a backend
for. Autograd, autocast, vmap and sharding are put on by ``lkconv.ops.register_hooks("lkconv_triton")``, the
hooks of convolutions on slices by ``lkconv.attention.segmented_registration``, those of Group-Mix by
``lkconv.attention.registration``; the fake kernels of the fold of branches and of sums of normalised branches
by the modules of those names in ``lkconv.reparam``.
"""

from __future__ import annotations

import importlib.util

import torch

import lkconv._C  # noqa: F401  (declares the schemas)

from .machine import is_available, machine_of
from .planner import Machine, Plan
from .report import plan

__all__ = [
    "MERGE_SCHEMAS",
    "NAMESPACE",
    "SCHEMAS",
    "Machine",
    "Plan",
    "is_available",
    "machine_of",
    "plan",
    "registered",
]

NAMESPACE = "lkconv_triton"
SCHEMAS = {
    "depthwise_conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation)"
        " -> Tensor"
    ),
    "depthwise_conv2d_backward_input": (
        "(Tensor grad_output, Tensor weight, SymInt[] input_size, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation) -> Tensor"
    ),
    "depthwise_conv2d_backward_weight": (
        "(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation) -> Tensor"
    ),
}
MERGE_SCHEMAS = {
    "merge_depthwise_kernels": (
        "(Tensor[] weights, Tensor[] scales, Tensor[] biases, SymInt[] kernel_size, SymInt[] offset,"
        " SymInt[] step, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "merge_depthwise_kernels_backward": (
        "(Tensor grad_weight, Tensor grad_bias, Tensor[] weights, Tensor[] scales, Tensor[] biases,"
        " SymInt[] offset, SymInt[] step) -> (Tensor[], Tensor[], Tensor[])"
    ),
}
SEGMENTED = "segmented_depthwise_conv2d"  # schema: csrc/module.cpp
GROUP_MIX = (  # schemas: csrc/cpu/group_mix_ops.cpp
    "group_mix_aggregate",
    "group_mix_mix",
    "group_mix_normalize",
    "group_mix_backward_reduce",
    "group_mix_backward",
    "group_mix_attention",
    "group_mix_attention_backward",
)
NORMALISED_BRANCHES = (  # schemas: csrc/module.cpp
    "normalised_branches",
    "normalised_branches_sum",
    "normalised_branches_dots",
    "normalised_branches_backward",
)


def _register() -> bool:
    """Registers the operators if Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return False
    from . import depthwise_conv2d as ops
    from . import group_mix, normalised_branches, plain
    from . import merge_depthwise_kernels as merge_ops
    from . import segmented_depthwise_conv2d as segmented
    from .faults import guarded
    from .launch import interpreting

    # torch.compile looks into a triton_op; it cannot look into the interpreter.
    define = torch.library.custom_op if interpreting() else torch.library.triton_op
    for name, schema in SCHEMAS.items():
        function = guarded(name, "depthwise_conv2d", getattr(ops, name), getattr(plain, name))
        define(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema)
    name = SEGMENTED
    function = guarded(name, name, getattr(segmented, name), getattr(plain, name))
    define(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=_declared(name))
    # Their kernels take tuples of tensors, which a trace would lose: opaque to torch.compile.
    for name, schema in MERGE_SCHEMAS.items():
        function = guarded(name, "merge_depthwise_kernels", getattr(merge_ops, name), getattr(plain, name))
        torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema)
    for name in NORMALISED_BRANCHES:
        function = guarded(name, "normalised_branches", getattr(normalised_branches, name), None)
        torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=_declared(name))
    for name in GROUP_MIX:
        function = guarded(name, "group_mix", getattr(group_mix, name), None)
        define(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=_declared(name))
    return True


def _declared(name: str) -> str:
    """The schema of the CPU's op."""
    schema = getattr(torch.ops.lkconv, name).default._schema
    return str(schema).removeprefix(schema.name)


registered = _register()
