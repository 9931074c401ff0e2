"""Statistics shared between processes: two with a part of the batch get what one with all of it gets."""

import datetime
import multiprocessing
import queue as queues
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lkconv
from group_mix_cases import aggregate_arguments, attention

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


def _worker(rank, port, queue):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    for name, run, share, twice in cases():
        images = slice(0, share) if rank == 0 else slice(share, IMAGES)
        result = torch.utils._pytree.tree_map(
            lambda t: t.detach().numpy(), step(run, images, dist.group.WORLD, twice)
        )
        queue.put((rank, name, result))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    """What both processes got, by (rank, case)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(r, port, queue)) for r in range(2)]
    for w in workers:
        w.start()
    found = {}
    wanted = 2 * len(list(cases()))
    try:
        while len(found) < wanted and (any(w.is_alive() for w in workers) or not queue.empty()):
            try:
                rank, name, result = queue.get(timeout=1)
            except queues.Empty:
                continue
            found[rank, name] = torch.utils._pytree.tree_map(torch.from_numpy, result)
    finally:
        for w in workers:
            w.join(30)
    return found


@pytest.mark.parametrize("name,run,share,twice", cases(), ids=[c[0] for c in cases()])
def test_two_processes_equal_one(name, run, share, twice, results):
    assert (0, name) in results and (1, name) in results, "a process failed or waited for the other in vain"
    grad, grads, buffers = step(run, slice(0, IMAGES), twice=twice)
    (grad0, grads0, buffers0), (grad1, grads1, buffers1) = results[0, name], results[1, name]
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
