"""Sums of normalised branches in Triton: values in the interpreter, and on a GPU with bfloat16."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a process of its own", allow_module_level=True)

from normalised_branches_cases import SUMS, TOLERANCE
from triton_normalised_branches_checks import CHECKS, INTERPRETED_GROUPS, training_checks, value_checks
from triton_support import run_interpreted

ON_DEVICE = {
    **value_checks(SUMS, TOLERANCE, "cuda"),
    **training_checks(TOLERANCE, "cuda", "nchw"),
    **training_checks(TOLERANCE, "cuda", "nhwc"),
}
DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.mark.parametrize("group", INTERPRETED_GROUPS)
def test_interpreted(group, tmp_path):
    found = run_interpreted(list(INTERPRETED_GROUPS[group]), tmp_path)
    failures = [f"{name}:\n{failure}" for name, failure in found.items() if failure is not None]
    assert not failures, "\n".join(failures)


@pytest.mark.gpu
@DEVICE
@pytest.mark.parametrize("name", ON_DEVICE)
def test_on_a_device(name, exact_products):
    ON_DEVICE[name]()


@pytest.mark.gpu
@DEVICE
@pytest.mark.parametrize("name", CHECKS)
def test_check_on_a_device(name, exact_products):
    CHECKS[name]("cuda")
