"""DTensor sharding of the Group-Mix ops: images are independent of each other where statistics are given.

Imported only once ``torch.distributed.tensor`` has been.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.utils._pytree import tree_leaves

_done: set[str] = set()

# op -> placements of its outputs, and of its first tensors, that shard the batch; all others are whole. The
# statistics of a batch are those of all of it: ops that take or use them are whole, and so are their sums.
_BY_IMAGE: dict[str, tuple[list, list]] = {
    "group_mix_aggregate": ([Shard(1), Shard(0)], [Shard(0)]),
    "group_mix_attention": ([Shard(0), Shard(0), Shard(0)], [Shard(1), Shard(0)]),
    "group_mix_attention_backward": (
        [Shard(1), Partial("sum")],
        [Shard(0), Shard(1), Shard(0), Shard(0)],
    ),
}
_WHOLE = {  # op -> how many outputs
    "group_mix_mix": 5,
    "group_mix_normalize": 1,
    "group_mix_backward_reduce": 1,
    "group_mix_backward": 2,
}


def register(namespace: str) -> None:
    """Registers strategies for the ops of a namespace; a second call does nothing."""
    if namespace in _done:
        return
    _done.add(namespace)
    ops = getattr(torch.ops, namespace)
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in (*_BY_IMAGE, *_WHOLE):
        op = getattr(ops, name).default
        register_sharding(op)(_strategy(name))
        # Sizes decide the outputs' shapes; lists of parameters are looked into.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)


def _strategy(name: str) -> Any:
    def placements(*arguments: Any) -> list:
        leaves = tree_leaves(list(arguments), is_leaf=lambda a: a is None)
        tensors = [hasattr(a, "placements") for a in leaves]
        outputs, first = _BY_IMAGE.get(name, ([Replicate()] * _WHOLE.get(name, 0), []))
        whole = [Replicate() if tensor else None for tensor in tensors]
        found = [([Replicate()] * len(outputs), whole)]
        if first:
            by_image = iter(first)
            found.append((outputs, [next(by_image, Replicate()) if tensor else None for tensor in tensors]))
        return found

    return placements
