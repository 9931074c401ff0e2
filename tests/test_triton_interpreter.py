"""The Triton kernels in Triton's interpreter: every pass, layout and algorithm, without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from triton_checks import CHECKS
from triton_support import PASSES, interpreter_cases, run_interpreted

VALUES = [f"{name}-{case.name}" for case in interpreter_cases() for name in PASSES]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, str | None]:
    """Runs the selected tests of this file in one interpreting process."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    return run_interpreted(names, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("name", VALUES)
def test_values(name, outcomes):
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, outcomes):
    assert outcomes[name] is None, outcomes[name]
