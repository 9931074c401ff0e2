"""The host emulator notices what goes wrong on a GPU: without that, its green tests would prove nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cuda_host import build
from cuda_host.cases import ORDERS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler to build the emulator with")

RIGHT = f"{64 * 63 // 2}"
# Misuse -> what the emulator says, in every order of threads.
ERRORS = {
    "barrier of one warp": "threads diverged",
    "barrier after an early exit": "threads diverged",
    "barrier in a loop of other lengths": "threads diverged",
    "copy never committed": "an asynchronous copy was never waited for",
    "copy to an odd address": "cp.async: misaligned destination",
    "shuffle of half a warp": "threads diverged",
    "lanes at different instructions": "lanes of one warp are at",
    "shuffle against barrier": "threads diverged",
}
# Misuse -> the value read is that of a copy which has not landed, in every order of threads.
UNLANDED = ("copy read before its wait", "copy waited for in a later group")
# Misuse -> some order of threads gives another result.
RACES = ("no barrier", "copy read without a barrier")


@pytest.fixture(scope="module")
def driver() -> Path:
    return build.build_driver(name="faults_driver")


def answer(driver: Path, name: str, order: str) -> str:
    done = subprocess.run([str(driver), name, order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ("none", "none, copied"))
def test_right_kernels_pass(driver: Path, name: str, order: str) -> None:
    assert answer(driver, name, order) == RIGHT


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ERRORS)
def test_misuse_ends_the_launch(driver: Path, name: str, order: str) -> None:
    assert answer(driver, name, order).startswith(f"error: {ERRORS[name]}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", UNLANDED)
def test_a_copy_lands_at_its_wait_and_not_before(driver: Path, name: str, order: str) -> None:
    assert answer(driver, name, order).lstrip("-") == "nan"


@pytest.mark.parametrize("name", RACES)
def test_a_missing_barrier_shows_in_some_order(driver: Path, name: str) -> None:
    assert {answer(driver, name, order) for order in ORDERS} != {RIGHT}
