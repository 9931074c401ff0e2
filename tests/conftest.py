"""Shared by every test: GPU tests skip with a reason, uninitialised memory is NaN, hypothesis profiles."""

import os

import hypothesis
import pytest
import torch
import torch.testing._internal.common_utils  # see plain_switches

from float32_precision import tf32_allowed
from lkconv import backends

# "ci" repeats the same examples on every run; "explore" looks for new ones: HYPOTHESIS_PROFILE=explore.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Also where OMP_NUM_THREADS does not say so (the Makefile does, for the processes that tests start): what a
# call plans depends on the threads. Tests of several threads ask for them.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords, which holds parameters too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (integers: the largest value), so an output left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def plain_switches():
    """Once imported, torch's own test helpers (torch.library.opcheck needs them) forbid assignments to the
    switches of torch.backends in the whole process. The tests here restore them themselves."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield


@pytest.fixture
def exact_products():
    """torch's float32 convolutions are in float32 on GPUs too."""
    with tf32_allowed(False):
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_backend_gives_up():
    """A backend that failed is replaced, with a warning alone: no test may pass for that reason."""
    yield
    reasons = dict(backends._gave_up)
    backends._gave_up.clear()
    backends._choices.clear()
    assert not reasons
