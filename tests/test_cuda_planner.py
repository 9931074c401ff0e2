"""The CUDA planner: sizes and machine in, algorithm and tile out. Needs the CUDA module, but no GPU."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

if torch.version.cuda is None or importlib.util.find_spec("lkconv._C_cuda") is None:
    pytest.skip("the CUDA module lkconv._C_cuda was not built", allow_module_level=True)

from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lkconv
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


def test_small_kernels_that_wait_for_memory_do_not() -> None:
    assert plans("forward", (64, 384, 32, 32), 3, "float32", tf32=True)[0]["algorithm"] == "direct"


def test_small_kernels_in_16_bits_take_the_algorithm_of_fewer_instructions() -> None:
    """Half the bytes to wait for: what every tile and strip costs decides."""
    for first, other in (
        plans("forward", (64, 384, 32, 32), k, dtype) for k in (3, 7, 11) for dtype in ("bfloat16", "float16")
    ):
        assert first["possible"] and first["cycles"] < 1.1 * other["cycles"]


def test_direct_blocks_take_several_images_where_there_are_many() -> None:
    many, one = (plans("forward", (n, 384, 32, 32), 3, "float32")[0] for n in (64, 1))
    assert many["tiles_per_block"] > 1 and one["tiles_per_block"] == 1
    assert many["blocks"] >= 16 * H100[0]


@pytest.mark.parametrize(("stride", "count"), (((1, 1), 1), ((2, 2), 4), ((3, 2), 6)))
def test_calls_list_the_plan_of_every_stride_phase(stride: tuple[int, int], count: int) -> None:
    chosen = plans("backward_input", (32, 256, 56, 56), 3, "bfloat16", stride=stride)[0]
    phases = chosen["problems"]
    assert len(phases) == len(chosen["launches"]) == count
    for key in ("flops", "cycles"):
        assert sum(p[key] for p in phases) == pytest.approx(chosen[key])
    for phase, launch in zip(phases, chosen["launches"], strict=True):
        assert all(phase[key] == launch[key] for key in ("blocks", "threads", "shared_bytes"))


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
    assert plans("forward", size, 3, "float32", channels_last=True)[0]["packs"] == 0


GROUP_MIX_OPS = (
    "aggregate", "mix", "normalize", "backward_reduce", "backward", "attention", "attention_backward"
)  # fmt: skip
# (B, H, W, d): stages of published models; odd, thin and single-token maps; wide segments.
TOKENS: tuple[Size, ...] = (
    (64, 56, 56, 8), (32, 56, 56, 40), (256, 28, 28, 32), (8, 14, 14, 64), (1, 7, 7, 96), (1, 1, 1, 10),
    (2, 1, 3000, 16), (2, 37, 1, 24), (1, 512, 512, 16), (3, 9, 9, 250),
)  # fmt: skip


@pytest.mark.parametrize("op", GROUP_MIX_OPS)
def test_group_mix_ops_are_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lkconv::group_mix_{op}", "CUDA")


class Calls(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", (False, True))
def test_cuda_tensors_take_the_group_mix_ops(training: bool) -> None:
    """Tensors without data on a GPU that need not exist: what would run there."""
    with FakeTensorMode(), Calls() as calls, torch.device("cuda"):
        module = lkconv.GroupMixAttention(80).train(training)
        out = module(torch.randn(2, 196, 80), (14, 14))
    assert out.device.type == "cuda" and out.shape == (2, 196, 80)
    aggregation = {"mix", "normalize"} if training else {"aggregate"}
    expected = {f"lkconv::group_mix_{name}" for name in (*aggregation, "attention")}
    assert {n for n in calls.names if n.startswith("lkconv::")} == expected
    assert not any("convolution" in n or "batch_norm" in n for n in calls.names)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("op", GROUP_MIX_OPS)
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16"))
def test_group_mix_launches_fit_their_machine(dtype: str, op: str, machine: Machine) -> None:
    sms, block, sm = machine
    for size in TOKENS:
        plan = cuda.plan_group_mix(
            f"group_mix_{op}", size, dtype, sms=sms, shared_per_block=block, shared_per_sm=sm
        )
        for launch in plan["launches"]:
            assert launch["shared_bytes"] <= block, (size, launch)
            assert launch["threads"] == 256 and 0 < launch["blocks"] < 2**31, (size, launch)


def test_group_mix_needs_few_launches_and_little_memory() -> None:
    """A block of model S, 14 x 14: launches of each op, and workspaces in units of qkv."""
    size = (32, 14, 14, 64)
    expected = {
        "aggregate": 7, "mix": 7, "normalize": 3, "backward_reduce": 4, "backward": 16, "attention": 7,
        "attention_backward": 8,
    }  # fmt: skip
    tokens = 32 * 196 * 15 * 64 * 2
    for op, count in expected.items():
        plan = cuda.plan_group_mix(f"group_mix_{op}", size, "bfloat16")
        assert len(plan["launches"]) <= count, op
        assert plan["workspace_bytes"] <= (4 if op == "backward" else 1) * tokens, op
    with pytest.raises(ValueError, match="unknown op"):
        cuda.plan_group_mix("group_mix", size, "bfloat16")


def test_group_mix_fills_the_machine() -> None:
    """One image is cut until every SM has work or tiles have 64 pixels."""
    tiled = ("aggregate", "attention_forward", "depthwise_backward")
    for d in (8, 16, 40):
        for op in ("aggregate", "attention", "backward"):
            for launch in cuda.plan_group_mix(f"group_mix_{op}", (1, 56, 56, d), "bfloat16")["launches"]:
                if launch["name"].removeprefix("group_mix_") in tiled:
                    assert launch["blocks"] >= 49, launch


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown pass"):
        plans("sideways", (1, 1, 8, 8), 3, "float32")
    with pytest.raises(ValueError, match="unknown dtype"):
        plans("forward", (1, 1, 8, 8), 3, "int8")


def test_introspection() -> None:
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", a) for a in cuda.architectures())
    assert len(cuda.kernels()) == len(set(cuda.kernels())) == 137
