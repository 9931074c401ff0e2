"""Statistics shared between processes: two with a part of the batch get what one with all of it gets."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lkconv
from group_mix_cases import aggregate_arguments, attention
from two_processes import run_in_two_processes

SIZE, IMAGES = (3, 4), 5
SHARES = {"2 and 3 images": 2, "no images and 5": 0}


def run_aggregator(module, x, group):
    return module.aggregator(module.qkv(x), SIZE)


def run_attention(module, x, group):
    return (module(x, SIZE),)


def run_function(module, x, group):
    arguments = aggregate_arguments(module.aggregator)
    return lkconv.group_mix_aggregate(module.qkv(x), SIZE, **arguments, training=True, process_group=group)


def run_plain_function(module, x, group):
    with lkconv.use_backend("torch"):
        return run_function(module, x, group)


RUNS = (run_aggregator, run_attention, run_function, run_plain_function)


def seeds(outputs, images):
    """Weights of a loss, those of the given images of the batch; the batch is the first dimension."""
    generator = torch.Generator().manual_seed(4)
    shape = [(IMAGES, *o.shape[1:]) for o in outputs]
    return [torch.randn(s, generator=generator, dtype=torch.float64)[images] for s in shape]


def step(run, images, group=None, twice=False):
    """Gradients of the input and the parameters, and the running statistics; everything as tensors."""
    torch.manual_seed(0)
    module = attention(40, training=True)
    if group is not None:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    torch.manual_seed(3)
    x = torch.randn(IMAGES, 12, 40, dtype=torch.float64)[images].clone().requires_grad_()
    outputs = run(module, x, group)
    loss = sum((o.sin() * s).sum() for o, s in zip(outputs, seeds(outputs, images), strict=True))
    if twice:
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = slope.square().sum()
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found[1:], parameters, strict=True)]
    return found[0], grads, list(module.aggregator.buffers())


def cases():
    for run in RUNS:
        for share in SHARES:
            yield f"{run.__name__}, {share}", run, SHARES[share], False
    for run in (run_aggregator, run_plain_function):
        yield f"{run.__name__} twice", run, 2, True


def _work(rank):
    """Results of every case by its name, for the images of this process."""
    found = {}
    for name, run, share, twice in cases():
        images = slice(0, share) if rank == 0 else slice(share, IMAGES)
        result = step(run, images, dist.group.WORLD, twice)
        found[name] = torch.utils._pytree.tree_map(torch.Tensor.detach, result)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes got, by rank and case."""
    return run_in_two_processes(_work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name,run,share,twice", cases(), ids=[c[0] for c in cases()])
def test_two_processes_equal_one(name, run, share, twice, results):
    grad, grads, buffers = step(run, slice(0, IMAGES), twice=twice)
    (grad0, grads0, buffers0), (grad1, grads1, buffers1) = results[0][name], results[1][name]
    assert len(grad0) == share
    torch.testing.assert_close(torch.cat([grad0, grad1]), grad, rtol=1e-8, atol=1e-10)
    for a, b, whole in zip(grads0, grads1, grads, strict=True):
        torch.testing.assert_close(a + b, whole, rtol=1e-8, atol=1e-10)
    for a, b, whole in zip(buffers0, buffers1, buffers, strict=True):
        torch.testing.assert_close(a, whole)
        torch.testing.assert_close(b, whole)


def test_a_group_of_one_process_shares_nothing():
    """Nor does any group where torch.distributed was not initialised."""
    module, x = attention(40, training=True), torch.randn(2, 12, 40, dtype=torch.float64)
    for a, b in zip(run_function(module, x, object()), run_function(module, x, None), strict=True):
        torch.testing.assert_close(a, b)
