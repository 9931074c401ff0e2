"""Same inputs, same machine, same thread count: the same bits; any number of callers at once."""

import concurrent.futures

import pytest
import torch

import accuracy
import cases
from cases import Case, same
from processes import run_python

CASES = [
    same((4, 19, 16, 15), (7, 7)),
    same((2, 20, 56, 56), (31, 31)),
    Case((3, 9, 30, 31), (5, 5), padding=(2, 2), stride=(2, 2), multiplier=2),
    same((16, 3, 40, 40), (5, 5)),  # fewer channel groups than threads: backward_weight splits the batch
]
all_passes = pytest.mark.parametrize("pass_name", accuracy.PASSES)
all_cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def threads():
    """Sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


@all_passes
@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_repeated_runs_agree_in_every_bit(case, pass_name, dtype, count, threads):
    threads(count)
    t = cases.make_tensors(case, dtype)
    first = bits(accuracy.op_result(pass_name, case, t))
    for i in range(4):
        shifted = cases.make_tensors(case, dtype, "misaligned" if i % 2 else "contiguous")
        assert torch.equal(bits(accuracy.op_result(pass_name, case, shifted)), first)


@all_cases
@pytest.mark.parametrize("pass_name", ["forward", "backward_input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_changes_no_bit(case, pass_name, dtype, threads):
    t = cases.make_tensors(case, dtype)
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(bits(accuracy.op_result(pass_name, case, t)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@all_cases
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_thread_count_keeps_the_weight_gradient_accurate(case, count, threads):
    threads(count)
    accuracy.check("backward_weight", case, cases.make_tensors(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_image_does_not_depend_on_its_batch(dtype):
    for case in CASES:
        t = cases.make_tensors(case, dtype)
        whole = accuracy.op_result("forward", case, t)
        alone = torch.ops.lkconv.depthwise_conv2d(t.input[1:2], t.weight, t.bias, *case.geometry)
        torch.testing.assert_close(whole[1:2], alone)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_callers(count, threads):
    threads(count)
    jobs = [(p, c, cases.make_tensors(c, torch.float32)) for p in accuracy.PASSES for c in CASES] * 4
    alone = [accuracy.op_result(*job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(max_workers=6) as pool:
        together = list(pool.map(lambda job: accuracy.op_result(*job), jobs))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_first_calls_of_many_threads():
    """Tables that are made on first use (FFT plans, switches) are made once, by whoever comes first."""
    run_python("""
        import concurrent.futures, torch, lkconv._C
        x, w = torch.randn(1, 16, 40, 40), torch.randn(16, 1, 27, 27)
        def work(size):
            a = x[..., :size, :size]
            return torch.ops.lkconv.depthwise_conv2d(a, w, None, [1, 1], [13, 13], [1, 1])
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, [24 + i % 8 for i in range(64)]))
        for i, r in enumerate(results):
            assert torch.equal(r, results[i % 8])
    """)


FORK = """
    import multiprocessing, os, torch, lkconv._C
    torch.set_num_threads(2)
    x, w = torch.randn(2, 40, 32, 32), torch.randn(40, 1, 31, 31)
    args = [1, 1], [15, 15], [1, 1]
    expected = torch.ops.lkconv.depthwise_conv2d(x, w, None, *args)
    torch.ops.lkconv.depthwise_conv2d_backward_weight(expected, x, [31, 31], *args)

    def child():
        torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's threads do not survive a fork
        result = torch.ops.lkconv.depthwise_conv2d(x, w, None, *args)
        os._exit(0 if torch.equal(result, expected) else 1)
"""


def test_fork_after_use():
    run_python(
        FORK
        + """
    pid = os.fork()
    if pid == 0:
        child()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert torch.equal(torch.ops.lkconv.depthwise_conv2d(x, w, None, *args), expected)
    """
    )


def test_multiprocessing_fork_context():
    run_python(
        FORK
        + """
    workers = [multiprocessing.get_context("fork").Process(target=child) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    """
    )
