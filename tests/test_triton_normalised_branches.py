"""Sums of normalised branches in Triton: values in the interpreter, and on a GPU with bfloat16."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a process of its own", allow_module_level=True)

from normalised_branches_cases import SUMS
from triton_normalised_branches_checks import CHECKS, INTERPRETED_CHECKS, training_checks, value_checks
from triton_support import run_interpreted

ON_DEVICE = {
    **value_checks(SUMS, (torch.float64, torch.float32, torch.float16, torch.bfloat16), "cuda"),
    **training_checks((torch.float64, torch.float32, torch.float16, torch.bfloat16), "cuda"),
}
DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, str | None]:
    """Runs the selected interpreter tests of this file in one interpreting process."""
    items = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in items if item.originalname == "test_interpreted"]
    return run_interpreted(names, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("name", INTERPRETED_CHECKS)
def test_interpreted(name, outcomes):
    assert outcomes[name] is None, outcomes[name]


@pytest.fixture
def exact_products(monkeypatch):
    """float32 convolutions of branches apart in float32."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")


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
