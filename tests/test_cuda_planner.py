"""The CUDA planner: sizes and machine in, algorithm and tile out. Needs the CUDA module, but no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if torch.version.cuda is None or importlib.util.find_spec("lkconv._C_cuda") is None:
    pytest.skip("the CUDA module lkconv._C_cuda was not built", allow_module_level=True)

import lkconv._C_cuda as cuda

PASSES = ("forward", "backward_input", "backward_weight")
Machine = tuple[int, int, int]  # SMs, shared memory per block and per SM
Size = tuple[int, int, int, int]
H100 = (132, 232448, 233472)
MACHINES = (H100, (108, 166912, 167936), (84, 101376, 102400))  # A100, and 99 KB a block


def plans(
    pass_name: str, size: tuple[int, ...], k: int, dtype: str, machine=MACHINES[0], **more
) -> list[dict]:
    kernel, padding = (k, k), (k // 2, k // 2)
    stride, dilation = more.pop("stride", (1, 1)), more.pop("dilation", (1, 1))
    sms, block, sm = machine
    return cuda.plan(
        pass_name, size, size[1], kernel, stride, padding, dilation, dtype,
        sms=sms, shared_per_block=block, shared_per_sm=sm, **more,
    )  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("k", (3, 7, 13, 31, 61))
@pytest.mark.parametrize("dtype", ("float64", "float32", "float16", "bfloat16"))
def test_every_plan_fits_its_machine(
    dtype: str, k: int, pass_name: str, machine: tuple[int, int, int]
) -> None:
    for size in ((1, 3, 224, 224), (64, 384, 32, 32), (8, 1024, 7, 7), (2, 5, 64, 3)):
        for channels_last in (False, True):
            chosen = plans(pass_name, size, k, dtype, machine, channels_last=channels_last, tf32=True)[0]
            assert chosen["possible"]
            assert chosen["shared_bytes"] <= machine[1]
            assert 32 <= chosen["threads"] <= 512 and chosen["threads"] % 32 == 0
            assert 0 < chosen["blocks"] < 2**31


@pytest.mark.parametrize("pass_name", PASSES)
def test_large_kernels_take_the_matrix_units(pass_name: str) -> None:
    for dtype, tf32 in (("bfloat16", False), ("float16", False), ("float32", True)):
        for k in (13, 31):
            assert plans(pass_name, (64, 384, 32, 32), k, dtype, tf32=tf32)[0]["algorithm"] == "toeplitz"


def test_small_kernels_do_not() -> None:
    assert plans("forward", (64, 384, 32, 32), 3, "bfloat16")[0]["algorithm"] == "direct"


@pytest.mark.parametrize(
    ("dtype", "tf32", "stride", "reason"),
    [
        ("float64", True, (1, 1), "float64"),
        ("float32", False, (1, 1), "tf32"),
        ("bfloat16", False, (1, 2), "stride along the row"),
    ],
)
def test_declines_say_why(dtype: str, tf32: bool, stride: tuple[int, int], reason: str) -> None:
    chosen, other = plans("forward", (8, 8, 32, 32), 13, dtype, tf32=tf32, stride=stride)
    assert chosen["algorithm"] == "direct" and chosen["reason"] == ""
    assert not other["possible"] and reason in other["reason"]


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LKCONV_TOEPLITZ", "0")
    chosen, other = plans("forward", (64, 384, 32, 32), 31, "bfloat16")
    assert chosen["algorithm"] == "direct"
    assert other["reason"] == "LKCONV_TOEPLITZ=0"


def test_rows_outside_the_image_are_not_multiplied() -> None:
    """Enough images: M runs over them, and less is issued than the nominal count of a 31x31 kernel."""
    size = (64, 384, 32, 32)
    chosen = plans("forward", size, 31, "bfloat16")[0]
    assert chosen["image_major"]
    assert chosen["flops"] < 2 * 64 * 384 * 32 * 32 * 31 * 31
    assert not plans("forward", (1, 384, 32, 32), 31, "bfloat16")[0]["image_major"]


def test_one_image_still_fills_the_machine() -> None:
    for pass_name in PASSES:
        assert plans(pass_name, (1, 384, 32, 32), 31, "bfloat16")[0]["blocks"] >= 132


def test_channels_last_packs_for_the_matrix_units_only() -> None:
    size = (64, 384, 32, 32)
    assert plans("forward", size, 31, "bfloat16", channels_last=True)[0]["packs"] == 2
    assert plans("forward", size, 3, "bfloat16", channels_last=True)[0]["packs"] == 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown pass"):
        plans("sideways", (1, 1, 8, 8), 3, "float32")
    with pytest.raises(ValueError, match="unknown dtype"):
        plans("forward", (1, 1, 8, 8), 3, "int8")


def test_introspection() -> None:
    assert all(a.startswith("sm_") for a in cuda.architectures())
    assert len(cuda.kernels()) == len(set(cuda.kernels())) == 50
