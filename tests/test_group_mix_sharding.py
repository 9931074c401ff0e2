"""DTensor: the ops of Group-Mix attention on a batch that two processes share."""

import copy

import pytest
import torch

from group_mix_cases import attention
from processes import run_python
from two_processes import run_in_two_processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)
SIZE = (3, 5)


def _step(module, x, grad):
    """Output, gradients and running statistics."""
    leaf = x.detach().requires_grad_()
    y = module(leaf, SIZE)
    grads = torch.autograd.grad(y, [leaf, *module.parameters()], grad)
    return y, grads, list(module.buffers())


def _check(rank):
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, grad = (torch.randn(4, 15, 40, dtype=torch.float64) for _ in range(2))
    for training in (False, True):
        plain = attention(40, training=training)
        shared = distribute_module(copy.deepcopy(plain), mesh)
        y, grads, buffers = _step(plain, x, grad)
        for placement in (Shard(0), Replicate()):
            one = copy.deepcopy(shared)
            found, found_grads, found_buffers = _step(
                one, *(distribute_tensor(t, mesh, [placement]) for t in (x, grad))
            )
            torch.testing.assert_close(found.full_tensor(), y.detach())
            for a, b in zip((*found_grads, *found_buffers), (*grads, *buffers), strict=True):
                torch.testing.assert_close(a.full_tensor(), b)
            if not training:  # the statistics of a batch are those of all of it
                assert found.placements == (placement,)


def test_two_processes(tmp_path):
    run_in_two_processes(_check, tmp_path)


def test_ordinary_tensors_import_nothing_of_it():
    code = """
        import sys, torch, lkconv
        lkconv.GroupMixAttention(40)(torch.randn(1, 4, 40), (2, 2))
        print([m for m in sys.modules if m == "lkconv.attention.sharding"])
    """
    assert run_python(code).strip() == "[]"
