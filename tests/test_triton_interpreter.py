"""The Triton kernels in Triton's interpreter: every pass, layout and algorithm, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_checks import CHECKS
from triton_support import PASSES, ROOT, interpreter_cases

HERE = Path(__file__).parent
VALUES = [f"{name}-{case.name}" for case in interpreter_cases() for name in PASSES]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, str | None]:
    """Runs the selected tests of this file in one interpreting process."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    results = tmp_path_factory.mktemp("interpreter") / "results.json"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "triton_interpreted.py"), str(results), *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    reports = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found = {report["name"]: report["failure"] for report in reports}
    lost = (
        f"the interpreting process ended ({process.returncode}) before this test:\n{process.stderr[-3000:]}"
    )
    return {name: found.get(name, lost) for name in names}


@pytest.mark.parametrize("name", VALUES)
def test_values(name, outcomes):
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, outcomes):
    assert outcomes[name] is None, outcomes[name]
