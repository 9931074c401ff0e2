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
    return tmp_path / "triton"


def times(fastest):
    return lambda plan: 1.0 if plan.blocks["BLOCK_M"] == fastest else 2.0


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
    from triton.runtime.errors import OutOfResources

    def time(plan):
        if plan.blocks["BLOCK_M"] != 128:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    assert tuning.choose(KEY, PLANS, time)[0] == PLANS[1]


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
