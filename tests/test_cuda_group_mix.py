"""The CUDA Group-Mix kernels, run on the CPU by the host emulator, against lkconv.reference in float64.

Every case runs with a block's threads in three orders under AddressSanitizer and UndefinedBehaviorSanitizer;
the results must be right, and the same to the last bit.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from cuda_host import build
from cuda_host.cases import ORDERS
from cuda_host.group_mix_cases import (
    Case,
    aggregate_exact,
    aggregate_inputs,
    attention_exact,
    attention_inputs,
    error_limit,
    relative,
)
from test_cuda_host import run

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler to build the emulator with")

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SCALE, EPS = 0.37, 1e-4
# d = 8 to 64 of the published models and 10, which is no multiple of 4; odd, thin and single-token maps; maps
# of several tiles.
CASES = (
    Case(8, 2, 5, 3), Case(8, 1, 9, 21), Case(10, 1, 7, 9), Case(16, 2, 9, 11), Case(24, 1, 14, 5),
    Case(40, 1, 7, 7), Case(64, 1, 6, 9), Case(16, 2, 1, 1), Case(8, 1, 1, 37),
)  # fmt: skip
OPS = ("evaluate", "train", "attention")


def to_bytes(tensors: dict[str, list[Tensor]]) -> bytes:
    return b"".join(
        t.contiguous().view(torch.uint8).numpy().tobytes() for group in tensors.values() for t in group
    )


def outputs_of(op: str, case: Case, dtype: torch.dtype) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of what the driver writes."""
    d, b, n = case.segment, case.batch, case.tokens
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if op == "attention":
        taps = d // 2 * (2 * 9 + 3 * 25 + 3 * 49)
        return [
            ("out", (b, n, 5 * d), dtype), ("grad_mixed", (3, b, n, 4 * d), dtype),
            ("grad_weight", (taps,), wide), ("grad_bias", (4 * d,), wide),
        ]  # fmt: skip
    return [
        ("mixed", (3, b, n, 4 * d), dtype), ("local", (b, n, d), dtype), ("mean", (4, d), wide),
        ("var", (4, d), wide), ("grad_norm_bias", (4 * d,), torch.float64),
        ("grad_norm_weight", (4 * d,), torch.float64), ("grad_qkv", (b, n, 15 * d), dtype),
        ("grad_depthwise", (110 * d,), wide), ("grad_pointwise", (6 * d * d,), wide),
        ("grad_layer_norm", (2 * d,), wide),
    ]  # fmt: skip


def from_bytes(data: bytes, op: str, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    found, at = {}, 0
    for name, shape, kind in outputs_of(op, case, dtype):
        count = torch.Size(shape).numel()
        size = count * kind.itemsize
        found[name] = torch.empty(shape, dtype=kind)
        if size:
            found[name] = torch.frombuffer(bytearray(data[at : at + size]), dtype=kind).view(shape)
        at += size
    assert at == len(data)
    return found


def inputs_of(op: str, case: Case, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, list[Tensor]]:
    make = attention_inputs if op == "attention" else aggregate_inputs
    return make(case, dtype, parameters)


def exact_of(op: str, case: Case, inputs: dict[str, list[Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    if op == "attention":
        return attention_exact(case, inputs, dtype, SCALE)
    return aggregate_exact(case, inputs, op == "train", dtype, EPS)


def parameter_dtype(case: Case, dtype: str) -> str:
    """Parameters are the tensors' own type in half the cases, float32 in the others."""
    return dtype if CASES.index(case) % 2 else "f32"


@pytest.fixture(scope="session")
def driver() -> Path:
    return build.build_driver(name="group_mix_driver")


def emulate(
    driver: Path, folder: Path, op: str, case: Case, dtype: str, parameters: str, more: str = ""
) -> list[bytes]:
    """The outputs of one call in every order of threads."""
    (folder / "input").write_bytes(to_bytes(inputs_of(op, case, DTYPES[dtype], DTYPES[parameters])))
    size = f"{case.batch},{case.height},{case.width},{case.segment}"
    line = f"op={op} dtype={dtype} parameters={parameters} size={size} scale={SCALE} eps={EPS} {more}"
    lines = [f"{line} order={o} input={folder}/input output={folder}/{o}" for o in ORDERS]
    for order, result in zip(ORDERS, run(driver, lines), strict=True):
        assert result["ok"], f"threads in {order} order: {result['error']}"
    return [(folder / o).read_bytes() for o in ORDERS]


def wrong(op: str, case: Case, dtype: str, parameters: str, found: dict[str, Tensor]) -> str:
    """Which result is wrong and by how much, or ""."""
    inputs = inputs_of(op, case, DTYPES[dtype], DTYPES[parameters])
    exact = exact_of(op, case, inputs, torch.float64)
    eager = exact if dtype == "f64" else exact_of(op, case, inputs, DTYPES[dtype])
    for name, expected in exact.items():
        limit = error_limit(name, case, DTYPES[dtype], relative(eager[name], expected))
        error = relative(found[name], expected)
        # One token makes gradients through batch statistics vanish: compare with the rounding of 1.
        vanishing = (
            float((found[name].double() - expected).norm()) < 1e-3 * torch.finfo(DTYPES[dtype]).eps ** 0.5
        )
        if error > limit and not (case.tokens == 1 and vanishing):
            return f"{name}: relative error {error:.2e} above {limit:.2e}"
    return ""


def jobs() -> Iterator[tuple[str, Case, str]]:
    """float32 meets every case; the other dtypes share its code and meet some."""
    for i, case in enumerate(CASES):
        for k, dtype in enumerate(DTYPES):
            if dtype == "f32" or (i + k) % 4 == 0:
                yield from ((op, case, dtype) for op in OPS)


@pytest.mark.parametrize(("op", "case", "dtype"), jobs(), ids=str)
def test_case(driver: Path, tmp_path: Path, op: str, case: Case, dtype: str) -> None:
    parameters = parameter_dtype(case, dtype)
    answers = emulate(driver, tmp_path, op, case, dtype, parameters)
    assert not wrong(op, case, dtype, parameters, from_bytes(answers[0], op, case, DTYPES[dtype]))
    assert len(set(answers)) == 1, "the result depends on the order of threads"


@pytest.mark.parametrize(
    ("op", "case", "dtype", "shared"),
    [
        ("train", Case(96, 1, 5, 9), "f32", 101376),  # the widest published segment on 99 KB a block
        ("train", Case(96, 1, 9, 5), "f64", 101376),
        ("attention", Case(96, 1, 9, 5), "f64", 101376),
        ("train", Case(136, 1, 3, 4), "f64", 101376),  # moments that do not fit are taken from U in memory
        ("train", Case(64, 1, 5, 9), "f64", 65536),
        ("attention", Case(144, 1, 3, 4), "f32", 49152),  # heads cut into pieces
    ],
    ids=str,
)
def test_small_shared_memory(
    driver: Path, tmp_path: Path, op: str, case: Case, dtype: str, shared: int
) -> None:
    """Tiles shrink, results stay right."""
    answers = emulate(driver, tmp_path, op, case, dtype, "f32", f"shared={shared}")
    assert not wrong(op, case, dtype, "f32", from_bytes(answers[0], op, case, DTYPES[dtype]))
    assert len(set(answers)) == 1


@pytest.mark.parametrize("sms", (1, 40))
@pytest.mark.parametrize("op", OPS)
def test_large_tiles_and_many_shares(driver: Path, tmp_path: Path, op: str, sms: int) -> None:
    """On one SM tiles are as large as they get, on many there are many sums to add."""
    case = Case(8, 2, 24, 24)
    answers = emulate(driver, tmp_path, op, case, "f32", "f32", f"sms={sms}")
    assert not wrong(op, case, "f32", "f32", from_bytes(answers[0], op, case, torch.float32))
    assert len(set(answers)) == 1


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(driver: Path, tmp_path: Path, op: str) -> None:
    """No tokens: gradients of the parameters are zero."""
    case = Case(8, 0, 5, 3)
    for answer in emulate(driver, tmp_path, op, case, "f32", "f32"):
        found = from_bytes(answer, op, case, torch.float32)
        for name in found:
            if name.startswith("grad_"):
                assert not found[name].any(), name


@pytest.mark.parametrize("op", ("evaluate", "attention"))
def test_a_non_finite_input_is_not_lost(driver: Path, tmp_path: Path, op: str) -> None:
    """Every output whose window or softmax holds it is non-finite, and the other image's are not."""
    case = Case(16, 2, 9, 11)
    d, token = case.segment, 4 * case.width + 5
    inputs = inputs_of(op, case, torch.float32, torch.float32)
    first = "mixed" if op == "attention" else "qkv"
    if op == "attention":
        inputs[first][0][1, 1, token, 3] = float("nan")  # a key of head 0
    else:
        inputs[first][0][1, token, [0, 3 * d + 2, 4 * d + 1]] = float("inf")  # q: segments 0, 3 and 4
    (tmp_path / "input").write_bytes(to_bytes(inputs))
    size = f"{case.batch},{case.height},{case.width},{d}"
    line = f"op={op} dtype=f32 size={size} input={tmp_path}/input output={tmp_path}/output"
    assert run(driver, [line])[0]["ok"]
    found = from_bytes((tmp_path / "output").read_bytes(), op, case, torch.float32)
    if op == "attention":
        assert not found["out"][1, :, : d // 2].isfinite().any()
        assert found["out"][0].isfinite().all() and found["out"][1, :, d // 2 :].isfinite().all()
        return
    image = found["mixed"][0, 1].unflatten(0, (case.height, case.width))
    assert not image[4, 5, 0].isfinite()
    assert not image[1:8, 2:9, 3 * d :].isfinite().any()
    assert not found["local"][1].unflatten(0, (case.height, case.width))[3:6, 4:7].isfinite().any()
    assert found["mixed"][1:].isfinite().all() and found["mixed"][:, 0].isfinite().all()
    assert found["local"][0].isfinite().all()


# A kernel with one thing broken, and an op that must notice: file, text, replacement, op.
MUTANTS = {
    "aggregate: the next window overwrites one in use": (
        "group_mix_aggregate.cuh",
        "sync_block();  // the previous window is read no more, nor is the matrix",
        "",
        "evaluate",
    ),
    "aggregate: no barrier before LayerNorm": (
        "group_mix_aggregate.cuh",
        "if (!local) continue;\n    sync_block();",
        "if (!local) continue;",
        "evaluate",
    ),
    "aggregate: no barrier between merges of moments": (
        "group_mix_aggregate.cuh",
        "apart /= 2) {\n    sync_block();",
        "apart /= 2) {",
        "train",
    ),
    "aggregate: moments count pixels outside the image": (
        "group_mix_aggregate.cuh",
        "count += rows.token[a] >= 0 ? A(1) : A(0);",
        "count += A(1);",
        "train",
    ),
    "product: no barrier behind staging": (
        "group_mix_common.cuh",
        "weight(k0 + k, o) : A(0);\n    }\n    sync_block();",
        "weight(k0 + k, o) : A(0);\n    }",
        "evaluate",
    ),
    "product: the next stage overwrites one in use": (
        "group_mix_common.cuh",
        "make_divisor(terms);\n    sync_block();",
        "make_divisor(terms);",
        "evaluate",
    ),
    "depthwise backward: kernel not flipped": (
        "group_mix_backward.cuh",
        "depthwise_strip<K, true>",
        "depthwise_strip<K, false>",
        "train",
    ),
    "depthwise backward: no barrier behind staging": (
        "group_mix_backward.cuh",
        "sync_block();\n    depthwise_outputs",
        "depthwise_outputs",
        "attention",
    ),
    "depthwise backward: no barrier between workers' sums": (
        "group_mix_backward.cuh",
        "= total;\n  }\n  sync_block();",
        "= total;\n  }",
        "attention",
    ),
    "normalisation: the slope's mean is forgotten": (
        "group_mix_pack.cuh",
        "per_sigma * mean - p.sums[c]",
        "-p.sums[c]",
        "train",
    ),
    "token product: no barrier behind staging": (
        "group_mix_attention.cuh",
        "return value; });\n    sync_block();",
        "return value; });",
        "attention",
    ),
    "token product: no barrier between halvings": (
        "group_mix_attention.cuh",
        "= sum[i];\n    }\n    sync_block();",
        "= sum[i];\n    }",
        "attention",
    ),
    "attention: no barrier behind staging": (
        "group_mix_attention.cuh",
        "stage_heads<T>(query, context, p, tile, h, i0);\n    sync_block();",
        "stage_heads<T>(query, context, p, tile, h, i0);",
        "attention",
    ),
    "attention backward: the next matrix overwrites one in use": (
        "group_mix_attention.cuh",
        "Value value) {\n  sync_block();",
        "Value value) {",
        "attention",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernels_are_caught(name: str, tmp_path: Path) -> None:
    file, text, replacement, op = MUTANTS[name]
    shutil.copytree(build.ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, "the mutated text must occur once"
    path.write_text(source.replace(text, replacement))
    mutant = build.build_driver(tmp_path, sanitize=False, name="group_mix_driver")
    case = Case(40, 1, 9, 9)
    answers = emulate(mutant, tmp_path, op, case, "f32", "f32", "sms=1")
    found = [wrong(op, case, "f32", "f32", from_bytes(a, op, case, torch.float32)) for a in answers]
    assert any(found) or len(set(answers)) > 1
