"""The disk cache of tuning choices: one winner per problem, whatever happens to the files."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from triton_support import kernels

pytest.importorskip("triton")
tuning = kernels("tuning")
planner = kernels("planner")

PLANS = [
    planner.Plan("toeplitz", {"BLOCK_M": m, "BLOCK_T": 32, "BLOCK_K": 32}, cycles=1000.0 + m)
    for m in (64, 128, 256, 512)
]
keys = kernels("keys")
KEY = keys.problem_key("conv", [1, 2, 3], "some device")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, poisoned_memory):
    torch.use_deterministic_algorithms(False)  # which poisoned_memory needs, and which forbids tuning
    monkeypatch.setenv("LKCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LKCONV_TRITON_AUTOTUNE", raising=False)
    yield tmp_path / "triton"
    tuning._rejected.clear()


def times(fastest):
    return lambda plan: 1.0 if plan.blocks["BLOCK_M"] == fastest else 2.0


def too_large():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


def refuse(plan):
    raise AssertionError("nothing should be timed")


def test_fastest_wins_and_is_remembered():
    assert tuning.choose(KEY, PLANS, times(256)) == (PLANS[2], True)
    assert tuning.choose(KEY, PLANS, refuse) == (PLANS[2], True)


def test_choices_are_per_problem():
    other = keys.problem_key("conv", [1, 2, 4], "some device")
    tuning.choose(KEY, PLANS, times(256))
    assert tuning.choose(other, PLANS, times(64))[0] == PLANS[0]
    assert tuning.choose(KEY, PLANS, refuse)[0] == PLANS[2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"key": "another"}',
        json.dumps({"key": KEY, "plan": {"algorithm": "gone"}}),
        "\x00\xff",
    ],
)
def test_damaged_files_are_replaced(content):
    tuning.choose(KEY, PLANS, times(256))
    tuning.path_of(KEY).write_text(content, encoding="latin-1")
    assert tuning.choose(KEY, PLANS, times(128))[0] == PLANS[1]
    assert tuning.choose(KEY, PLANS, refuse)[0] == PLANS[1]


def test_first_writer_wins():
    assert tuning.store(KEY, PLANS[1], PLANS) == PLANS[1]
    assert tuning.store(KEY, PLANS[3], PLANS) == PLANS[1]
    assert tuning.load(KEY, PLANS) == PLANS[1]


def store_one(number):
    return tuning.store(KEY, PLANS[number % len(PLANS)], PLANS).blocks["BLOCK_M"]


def test_concurrent_writers_agree(cache):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        kept = pool.map(store_one, range(64), chunksize=1)
    assert len(set(kept)) == 1
    assert [path.suffix for path in cache.iterdir()] == [".json"], "temporary files are left behind"


def test_nothing_is_timed_while_tracing_and_nothing_is_settled():
    assert tuning.choose(KEY, PLANS, None) == (PLANS[0], False)
    tuning.choose(KEY, PLANS, times(256))
    assert tuning.choose(KEY, PLANS, None) == (PLANS[2], True), "a stored choice serves traced code too"


def test_switched_off(monkeypatch, cache):
    monkeypatch.setenv("LKCONV_TRITON_AUTOTUNE", "0")
    assert tuning.choose(KEY, PLANS, refuse) == (PLANS[0], True)
    assert not cache.exists()


def test_deterministic_torch_ignores_choices():
    tuning.choose(KEY, PLANS, times(256))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert tuning.choose(KEY, PLANS, refuse) == (PLANS[0], True)
    finally:
        torch.use_deterministic_algorithms(before)


def test_no_folder_no_tuning(monkeypatch, tmp_path):
    """A choice that cannot be kept could differ tomorrow, and the results with it."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("LKCONV_CACHE_DIR", str(blocked))
    assert tuning.choose(KEY, PLANS, refuse) == (PLANS[0], True)
    assert tuning.store(KEY, PLANS[1], PLANS) is None


def test_kernels_too_large_for_the_device_lose():
    def time(plan):
        if plan.blocks["BLOCK_M"] != 128:
            raise too_large()
        return 5.0

    assert tuning.choose(KEY, PLANS, time)[0] == PLANS[1]
    assert len(tuning._rejected[KEY]) == 3
    assert tuning.choose(KEY, PLANS, refuse)[0] == PLANS[1]


def test_a_rejected_choice_of_another_process_is_replaced():
    """A file may name a plan that this machine's compiler no longer takes."""
    tuning.choose(KEY, PLANS, times(256))
    assert tuning.reject(KEY, PLANS[2], too_large())
    assert tuning.choose(KEY, PLANS, times(128))[0] == PLANS[1]
    tuning._rejected.clear()
    assert tuning.choose(KEY, PLANS, refuse)[0] == PLANS[1], "the file was replaced"


def test_where_nothing_may_be_timed_the_first_plan_that_compiles_runs(monkeypatch):
    monkeypatch.setenv("LKCONV_TRITON_AUTOTUNE", "0")
    tuning.reject(KEY, PLANS[0], too_large())
    tuning.reject(KEY, PLANS[1], too_large())
    assert tuning.choose(KEY, PLANS, refuse) == (PLANS[2], True)


def test_without_any_plan_the_error_says_why_of_each():
    def time(plan):
        raise too_large()

    with pytest.raises(kernels("faults").CannotCompile) as info:
        tuning.choose(KEY, PLANS, time)
    assert str(info.value).count("out of resource: shared memory, Required: 300000") == len(PLANS)


def test_unrelated_errors_while_timing_are_not_swallowed():
    def time(plan):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        tuning.choose(KEY, PLANS, time)
    assert not tuning._rejected


def test_memory_too_short_for_timing_leaves_the_choice_open():
    def time(plan):
        raise torch.OutOfMemoryError("the timer's own buffer")

    assert tuning.choose(KEY, PLANS, time) == (PLANS[0], False)
    assert tuning.choose(KEY, PLANS, times(256)) == (PLANS[2], True)


def test_only_the_shortlist_is_timed():
    far = planner.Plan("direct", {"BLOCK_P": 64, "BLOCK_C": 1}, cycles=1e9)
    timed = []
    tuning.choose(KEY, [*PLANS, far], lambda plan: timed.append(plan) or 1.0)
    assert far not in timed and timed == PLANS


def test_splits_follow_the_size_not_the_file():
    """Sizes that share a choice may split differently."""
    small = planner.Plan("direct", {"BLOCK_U": 16}, splits=2)
    large = planner.Plan("direct", {"BLOCK_U": 16}, splits=9)
    other = planner.Plan("direct", {"BLOCK_U": 32}, splits=9)
    tuning.store(KEY, small, [small])
    assert tuning.load(KEY, [other, large]) == large
