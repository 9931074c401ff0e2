"""DTensor sharding of the ops: every (image, channel) pair is independent, so batch and channels shard.

Imported only once ``torch.distributed.tensor`` has been.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

_done: set[Any] = set()


def register(ops: Any) -> None:
    """Register strategies for the three ops of an :class:`lkconv.ops.Ops`; a second call does nothing."""
    if ops.forward in _done:
        return
    _done.add(ops.forward)
    register_sharding(ops.forward)(_forward)
    register_sharding(ops.backward_input)(_backward_input)
    register_sharding(ops.backward_weight)(_backward_weight)
    propagator = DTensor._op_dispatcher.sharding_propagator
    for op, first_static in ((ops.forward, 3), (ops.backward_input, 2), (ops.backward_weight, 2)):
        # Lists of integers decide the output's shape, so they must be part of the propagation cache's key.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(first_static)
    # input_size is the output's size: each rank passes the one of its shard.
    propagator.op_to_shape_and_stride_idx[ops.backward_input] = 2


def _channels_divide(channels: int, mesh: Any) -> bool:
    # With a remainder, the shards of C input and C*m output channels would not hold the same groups.
    return all(channels % mesh.size(dim) == 0 for dim in range(mesh.ndim))


def _forward(input, weight, bias, stride, padding, dilation):
    rest = [None, None, None]

    def with_bias(placement):
        return [placement if bias is not None else None]

    found = [
        ([Replicate()], [Replicate(), Replicate(), *with_bias(Replicate()), *rest]),
        ([Shard(0)], [Shard(0), Replicate(), *with_bias(Replicate()), *rest]),
    ]
    if _channels_divide(input.shape[1], input.mesh):
        found.append(([Shard(1)], [Shard(1), Shard(0), *with_bias(Shard(0)), *rest]))
    return found


def _backward_input(grad_output, weight, input_size, stride, padding, dilation):
    rest = [None, None, None, None]
    found = [
        ([Replicate()], [Replicate(), Replicate(), *rest]),
        ([Shard(0)], [Shard(0), Replicate(), *rest]),
    ]
    if _channels_divide(input_size[1], grad_output.mesh):
        found.append(([Shard(1)], [Shard(1), Shard(0), *rest]))
    return found


def _backward_weight(grad_output, input, kernel_size, stride, padding, dilation):
    rest = [None, None, None, None]
    found = [
        ([Replicate()], [Replicate(), Replicate(), *rest]),
        ([Partial("sum")], [Shard(0), Shard(0), *rest]),
    ]
    if _channels_divide(input.shape[1], input.mesh):
        found.append(([Shard(0)], [Shard(1), Shard(1), *rest]))
    return found
