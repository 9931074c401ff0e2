"""Predictions from machine code: parsing, counting and the documented tables. Needs no GPU.

Recorded disassembly is in ``tests/sass``; what needs the built CUDA module or NVIDIA's disassembler skips.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.predict import cuda, geometry, kernel_loops, machine, sass, tables
from bench.predict.geometry import Geometry

SNIPPETS = Path(__file__).parent / "sass"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
HERO = Geometry(64, 384, 32, 32, (31, 31), (1, 1), (15, 15))


def snippet(name: str) -> tuple[sass.Instruction, ...]:
    (code,) = sass.parse((SNIPPETS / f"{name}.sass").read_text()).values()
    return code


def straight(*opcodes: str) -> tuple[sass.Instruction, ...]:
    return tuple(sass.Instruction(16 * i, *opcode.partition(" ")[::2]) for i, opcode in enumerate(opcodes))


# ---- disassembly ----


def test_toeplitz_loop() -> None:
    loop = sass.products(sass.loops(snippet("toeplitz_forward")))
    assert (loop.start, loop.end, len(loop.body)) == (0xB5D0, 0xBA00, 68)
    assert (loop.count("HMMA"), loop.count("LDSM"), loop.count("LDS")) == (16, 4, 5)
    assert loop.macs == 16 * 2048
    kinds = sass.kinds(loop.body)
    assert kinds["matrix"] == 16 and kinds["imad"] == 15 and kinds["branch"] == 7
    assert sum(kinds.values()) == 68


def test_nested_loops() -> None:
    code = snippet("triton_conv_direct")
    outer, inner = sass.loops(code)
    assert (outer.depth, inner.depth) == (1, 2) and inner.innermost and not outer.innermost
    assert sass.products([outer, inner]) is inner and sass.enclosing([outer, inner], inner) is outer
    assert inner.macs == 4 * 32 and inner.count("LDG") == 5
    alone = sass.exclusive(outer, [outer, inner])
    assert len(alone) == len(outer.body) - len(inner.body) == 15
    assert not any(i.name == "FFMA" for i in alone)


def test_padding_is_no_loop() -> None:
    code = straight("EXIT", "BRA 0x10", "NOP")
    assert sass.loops(code) == []


def test_missing_loops_are_errors() -> None:
    with pytest.raises(LookupError, match="no loop of multiply-adds"):
        sass.products(sass.loops(straight("FFMA R0, R1, R2, R3", "EXIT")))
    moves_only = straight("MOV R0, R1", "BRA 0x0")
    with pytest.raises(LookupError, match="no loop of multiply-adds"):
        sass.products(sass.loops(moves_only))
    with pytest.raises(LookupError, match="copies of 16 bytes"):
        kernel_loops.copies(sass.loops(snippet("toeplitz_forward")), 16)
    with pytest.raises(ValueError, match="no instructions"):
        sass.parse("cuobjdump info: no code")


@pytest.mark.parametrize(
    ("opcode", "kind", "lane_bytes", "macs"),
    [
        ("HMMA.16816.F32.BF16", "matrix", 4, 2048),
        ("HMMA.1688.F32.TF32", "matrix", 4, 1024),
        ("HGMMA.64x32x16.F32.BF16", "matrix", 4, 8192),
        ("FFMA", "fma", 4, 32),
        ("LDS.128", "LDS", 16, 0),
        ("LDSM.16.M88.4", "LDSM", 16, 0),
        ("LDSM.16.MT88.2", "LDSM", 8, 0),
        ("LDGSTS.E.BYPASS.128.ZFILL", "LDGSTS", 16, 0),
        ("STG.E.U16", "STG", 4, 0),
        ("IMAD.WIDE.U32", "imad", 4, 0),
        ("VIADDMNMX", "integer", 4, 0),
        ("UIADD3", "uniform", 4, 0),
        ("MUFU.RCP", "special", 4, 0),
        ("BSSY", "branch", 4, 0),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier", 4, 0),
    ],
)
def test_classes(opcode: str, kind: str, lane_bytes: int, macs: int) -> None:
    i = sass.Instruction(0, opcode, "")
    assert (i.kind, i.bytes_per_lane, i.macs) == (kind, lane_bytes, macs)


def names(path: list[sass.Instruction]) -> list[str]:
    return [i.name for i in path]


def test_the_longest_path_takes_one_of_two_branches() -> None:
    # if: IADD3 MOV; else: STG
    code = straight("ISETP", "BRA P0, 0x50", "IADD3", "MOV", "BRA 0x60", "STG", "EXIT", "NOP")
    assert names(sass.longest_path(code, [], lambda i: False)) == [
        "ISETP", "BRA", "IADD3", "MOV", "BRA", "EXIT"
    ]  # fmt: skip
    assert names(sass.longest_path(code, [], lambda i: i.name == "MOV")) == ["ISETP", "BRA", "STG", "EXIT"]
    with pytest.raises(LookupError, match="every path"):
        sass.longest_path(code, [], lambda i: i.name in ("MOV", "STG"))


def test_the_longest_path_leaves_loops_out() -> None:
    code = straight("MOV", "FFMA", "BRA P0, 0x10", "EXIT")
    (loop,) = sass.loops(code)
    assert names(sass.longest_path(code, [loop], lambda i: False)) == ["MOV", "EXIT"]
    assert len(sass.longest_path(code, [], lambda i: False)) == 4


def test_predicates_are_read() -> None:
    text = "Function : f\n /*0000*/ @!P0 EXIT ;\n /*0010*/ BRA 0x30 ;\n /*0020*/ UBRA P1 ;"
    (code,) = sass.parse(text).values()
    assert [i.conditional for i in code] == [True, False, False]
    assert [i.falls_through for i in code[:2]] == [True, False] and code[1].target == 0x30


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (
            "_ZN6lkconv4cuda14direct_forwardINS0_6BFloatELin1EEEvNS0_19DirectForwardParamsE",
            "bfloat16, strided",
        ),
        ("_ZN6lkconv4cuda14direct_forwardIfLi0EEEvNS0_19DirectForwardParamsE", "float32, any"),
        ("_ZN6lkconv4cuda13direct_weightIdLb1EEEvNS0_18DirectWeightParamsE", "float64, unit"),
        ("_ZN6lkconv4cuda16toeplitz_forwardIfLi4ELi2EEEvNS0_21ToeplitzForwardParamsE", "tf32, 4x2"),
        ("_ZN6lkconv4cuda15toeplitz_weightINS0_4HalfELi7ELi2EEEvNS0_20ToeplitzWeightParamsE", "float16, 7"),
        ("_ZN6lkconv4cuda4packItEEvNS0_10PackParamsE", "16"),
        ("_ZN6lkconv4cuda14reduce_momentsIfEEvNS0_19ReduceMomentsParamsE", ""),
    ],
)
def test_names(mangled: str, name: str) -> None:
    found = sass.kernel_name(mangled)
    assert found.partition("<")[2].rstrip(">") == name


# ---- machine ----


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # 64 warps
        (124, 256, 90 << 10, 2),  # 65536 / (8 warps x 32 x 128)
        (72, 256, 0, 3),
        (80, 256, 100 << 10, 2),
        (126, 512, 0, 1),
        (255, 1024, 0, 0),
        (16, 32, 0, 32),
        (24, 64, 56 << 10, 4),  # 4 x 57 KB of 228
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert machine.blocks_per_sm(registers, threads, shared) == blocks


def test_seconds_of_units() -> None:
    work = machine.Work()
    work.add(straight("FFMA", "IMAD", "IADD3", "LDS.128", "MUFU.RCP"), machine.SMS * 1000)
    work.add(straight("HMMA.16816.F32.BF16"), machine.SMS * 1000, matrix_share=0.5)
    seconds = machine.pipe_seconds(work, machine.SMS, machine.MEMORY * 1e-6)
    cycles = {unit: value * machine.CLOCK / 1000 for unit, value in seconds.items()}
    expected = {"issue": 1.5, "fma": 0.75, "integer": 0.5, "special": 2.0, "shared": 4.0}
    expected["matrix"] = 0.5 / machine.MMA_SYNC
    assert {unit: cycles[unit] for unit in expected} == pytest.approx(expected)
    assert seconds["memory"] == pytest.approx(1e-6)


def test_the_last_wave_counts_whole() -> None:
    assert machine.imbalance(machine.SMS) == 1
    assert machine.imbalance(machine.SMS + 1) == pytest.approx(2 * machine.SMS / (machine.SMS + 1))
    assert machine.imbalance(1) == machine.SMS


def test_wgmma_reads_shared_memory() -> None:
    both, one = straight(
        "HGMMA.64x32x16.F32.BF16 R72, gdesc[UR4], R72", "HGMMA.64x32x16 R72, R4, gdesc[UR4], R72"
    )
    assert machine.shared_operand_bytes(both) == (64 + 32) * 16 * 2 / 4
    assert machine.shared_operand_bytes(one) == 32 * 16 * 2 / 4
    assert machine.matrix_cycles(both) == 64 * 32 * 16 / 4 / 2048


# ---- geometry ----


@pytest.mark.parametrize(
    "g",
    [
        Geometry(1, 1, 9, 11, (3, 3), (1, 1), (1, 1)),
        Geometry(2, 3, 7, 7, (13, 13), (1, 1), (6, 6)),
        Geometry(1, 2, 15, 17, (5, 4), (3, 2), (2, 0), (2, 3)),
    ],
    ids=str,
)
def test_taps_inside_the_image(g: Geometry) -> None:
    (h, w), (kh, kw) = g.out, g.kernel
    inside = 0
    for y in range(h):
        for x in range(w):
            for u in range(kh):
                for v in range(kw):
                    row = y * g.stride[0] - g.padding[0] + u * g.dilation[0]
                    col = x * g.stride[1] - g.padding[1] + v * g.dilation[1]
                    inside += 0 <= row < g.height and 0 <= col < g.width
    assert g.inside_taps() == inside
    for y in range(h):
        rows = [y * g.stride[0] - g.padding[0] + u * g.dilation[0] for u in range(kh)]
        assert geometry.kernel_rows(g, y, y + 1) == sum(0 <= r < g.height for r in rows)


def test_backward_input_is_a_forward() -> None:
    (back,) = HERO.phases()
    assert back == replace(HERO, outputs=HERO.out)
    g = Geometry(1, 2, 20, 22, (5, 3), (1, 1), (0, 2), (1, 2))
    (back,) = g.phases()
    assert (back.height, back.width) == g.out and back.out == (20, 22) and back.apart == 1
    assert back.inside_taps() == g.inside_taps()


@pytest.mark.parametrize(
    "g",
    [
        Geometry(1, 1, 56, 56, (3, 3), (2, 2), (1, 1)),
        Geometry(1, 1, 9, 14, (7, 4), (2, 3), (3, 0)),
        Geometry(1, 1, 20, 22, (5, 6), (4, 2), (1, 2), (3, 3)),
        Geometry(1, 1, 1, 8, (3, 3), (2, 2), (1, 1)),  # one row of inputs, one phase along it
    ],
    ids=str,
)
def test_backward_input_with_a_stride_is_a_forward_for_each_phase(g: Geometry) -> None:
    """Phase (r, s) has inputs r, r + stride, ...; their taps are counted from a convolution's definition."""
    (h, w), (kh, kw), (sh, sw) = g.out, g.kernel, g.stride
    taps: Counter[tuple[int, int]] = Counter()
    for y, u in itertools.product(range(h), range(kh)):
        for x, v in itertools.product(range(w), range(kw)):
            row, col = y * sh - g.padding[0] + u * g.dilation[0], x * sw - g.padding[1] + v * g.dilation[1]
            if 0 <= row < g.height and 0 <= col < g.width:
                taps[row % sh, col % sw] += 1
    found = g.phases()
    order = list(itertools.product(range(min(sh, g.height)), range(min(sw, g.width))))
    assert [p.inside_taps() for p in found] == [taps[phase] for phase in order]
    assert sum(p.elements()[1] for p in found) == g.elements()[0]
    assert {(p.height, p.width, p.stride, p.apart) for p in found} == {(h, w, (1, 1), sw)}


def test_phases_without_taps_are_refused() -> None:
    with pytest.raises(ValueError, match="no tap reaches"):
        Geometry(1, 1, 8, 8, (1, 1), (2, 2), (0, 0)).phases()


def test_outputs_that_are_apart_move_whole_sectors() -> None:
    whole = Geometry(1, 4, 28, 28, (1, 1), (1, 1), (0, 0))
    x, y, weights = whole.elements()
    for apart, moved in ((1, 1), (2, 2), (16, 16), (20, 16)):
        assert cuda.tensor_bytes(replace(whole, apart=apart), "float16") == 2 * (x + moved * y + weights)
    assert cuda.tensor_bytes(replace(whole, apart=20), "float32") == 4 * (x + 8 * y + weights)


def test_a_warp_runs_as_long_as_its_longest_thread() -> None:
    g = Geometry(1, 1, 32, 32, (31, 31), (1, 1), (15, 15))
    # 4 strips a row, 8 rows a warp; row y meets min(31, 16 + y, 47 - y) kernel rows.
    longest = [max(min(31, 16 + y, 47 - y) for y in range(8 * w, 8 * w + 8)) for w in range(4)]
    assert geometry.warp_rows(g, 0, 32, 4, 32, 1, 4) == sum(longest)


def test_copies_are_as_wide_as_rows_allow() -> None:
    assert [geometry.vector_bytes(w, "bfloat16") for w in (56, 28, 14, 7)] == [16, 8, 4, 2]
    assert [geometry.vector_bytes(w, "tf32") for w in (56, 14, 7)] == [16, 8, 4]


def test_floor() -> None:
    small, large = Geometry(32, 96, 56, 56, (3, 3), (1, 1), (1, 1)), HERO
    assert tables.floor_seconds(small, "bfloat16") == cuda.tensor_bytes(small, "bfloat16") / machine.MEMORY
    assert (
        tables.floor_seconds(large, "float32") == 2 * 64 * 384 * large.inside_taps() / machine.PEAK["float32"]
    )


def test_write_between_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_between(path, "new")
    assert path.read_text() == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        tables.write_between(path, "new")


# ---- the built module ----


def built_module():
    if torch.version.cuda is None or importlib.util.find_spec("lkconv._C_cuda") is None:
        pytest.skip("the CUDA module lkconv._C_cuda was not built")
    return tables.built_module()


def test_a_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lkconv._C_cuda", None)  # as if it were not installed
    with pytest.raises(RuntimeError, match="build it with LKCONV_CUDA=1"):
        tables.load_module()


@pytest.mark.parametrize("pass_name", tables.PASSES)
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "tf32"))
def test_products_are_counted_as_the_planner_counts_them(pass_name: str, dtype: str) -> None:
    """Two derivations of one number: the planner's cost model and this one walk the same tiles."""
    built_module()
    seen = 0
    # Forward and backward_weight take no Toeplitz kernel at a stride along the row, stride phases do.
    strides = ((1, 1), (2, 2)) if pass_name == "backward_input" else ((1, 1), (2, 1))
    for size in ((64, 384, 32, 32), (32, 128, 56, 56), (32, 512, 14, 14), (32, 64, 7, 7), (1, 384, 30, 50)):
        for kernel in ((3, 3), (7, 7), (13, 13), (31, 31), (51, 5), (5, 51)):
            padding = (kernel[0] // 2, kernel[1] // 2)
            for stride in strides:
                g = Geometry(*size, kernel, stride, padding)
                plan = tables.planned(g, pass_name, dtype)
                if any(problem["algorithm"] != "toeplitz" for problem in plan["problems"]):
                    continue
                depth, seen = geometry.DEPTH[dtype], seen + 1
                expected = plan["flops"] / (2 * 16 * 8 * depth)
                assert geometry.matrix_products(g, pass_name, dtype, plan) == expected, g
    assert seen >= 20


@pytest.fixture(scope="module")
def machine_code():
    module = built_module()
    if tables.ARCH not in module.architectures():
        pytest.skip(f"the CUDA module holds {module.architectures()}, not {tables.ARCH}")
    try:
        return tables.load_module()
    except FileNotFoundError as error:  # no disassembler
        pytest.skip(str(error))


def test_every_convolution_kernel_is_read(machine_code) -> None:
    code, registers = machine_code
    families = ("direct_", "toeplitz_", "reduce_splits", "pack")
    expected = {name for name in built_module().kernels() if name.startswith(families)}
    assert set(code) == set(registers) == expected


def test_nothing_is_predicted_below_its_floor(machine_code) -> None:
    rows = tables.cuda_predictions(*machine_code, (*tables.DTYPES, "float16"))
    assert {p for r in rows for p in r.passes} == set(tables.PASSES)
    strided = [r for r in rows if r.passes == ("backward_input",) and len(r.launches) == 4]
    assert {r.dtype for r in strided} == {*tables.DTYPES, "float16"}
    for row in rows:
        assert all(math.isfinite(v) and v >= 0 for s in row.seconds for v in s.values())
        assert row.time >= row.floor, f"{row.layer}, {row.dtype}, {row.passes}"
        assert row.per_sm >= 1, row


@pytest.mark.parametrize("dtype", (*tables.DTYPES, "float16"))
@pytest.mark.parametrize("pass_name", tables.PASSES)
def test_launches_are_those_of_the_launcher(pass_name: str, dtype: str, machine_code) -> None:
    """The planner records what the launcher runs: here for every layer, strides among them."""
    code, _ = machine_code
    for layer in tables.chosen_layers():
        g = tables.geometry(layer)
        plan = tables.planned(g, pass_name, dtype)
        expected = [(x["name"], x["blocks"], x["threads"], x["shared_bytes"]) for x in plan["launches"]]
        found = cuda.launches(code, g, pass_name, dtype, plan)
        assert [(x.kernel.split("<")[0], x.blocks, x.threads, x.shared) for x in found] == expected, layer


def test_narrow_kernels_jump_over_the_loop_of_four_taps(machine_code) -> None:
    code, _ = machine_code
    found = sass.loops(code["direct_forward<float32, any>"])
    rows = [kernel_loops.narrow_row(found, sass.products(found), taps * geometry.STRIP) for taps in (1, 2)]
    assert [sum(i.name == "FFMA" for i in row) for row in rows] == [8, 16]
    assert len(rows[1]) - len(rows[0]) == 8 and len(rows[0]) < 50
    with pytest.raises(LookupError, match="no jump"):
        kernel_loops.narrow_row(found, found[0], 8)


def test_channels_last_packs_or_is_refused(machine_code) -> None:
    code, _ = machine_code
    g = Geometry(32, 96, 56, 57, (13, 13), (1, 1), (6, 6))
    plan = tables.planned(g, "forward", "bfloat16", channels_last=True)
    found = cuda.launches(code, g, "forward", "bfloat16", plan)
    assert [x.kernel.split("<")[0] for x in found] == ["pack", "pack", "toeplitz_forward"]
    assert found[0].work.kinds["LDG"] >= math.prod((32, 96, 56, 57)) / 32
    assert geometry.vector_bytes(57, "bfloat16", packed=True) == 16
    small = Geometry(32, 96, 56, 56, (3, 3), (1, 1), (1, 1))
    plan = tables.planned(small, "forward", "float32", channels_last=True)
    assert plan["algorithm"] == "direct"
    with pytest.raises(ValueError, match="channels_last"):
        cuda.launches(code, small, "forward", "float32", plan)


def test_moves_of_every_kernel(machine_code) -> None:
    """Every kernel in the tables has each kind of code once; one that loses it fails in `sass.find`."""
    code, _ = machine_code
    for name in filter(tables.counted, code):
        if not name.startswith(("direct_", "toeplitz_")):
            continue
        m = kernel_loops.moves(code, name)
        half = "bfloat16" in name
        assert len(m.copied) == (4 if half else 3), name
        # Wide copies are what makes small kernels fast: neither divisions nor loads by elements.
        assert m.copied[0] is not None and 1 < m.copied[0] < 6, name
        assert m.tile is not None and 50 < m.tile < 2000, name
        assert (m.band is not None) == ("toeplitz_forward" in name), name


@pytest.mark.parametrize("images", (1, 5, 16))
@pytest.mark.parametrize(("rows", "most"), ((1, 1), (7, 7), (5, 9), (60, 62)))
def test_walks_reach_every_row(images: int, rows: int, most: int) -> None:
    for lanes, threads in ((4, 256), (7, 224), (64, 64)):
        for gapless in (False, True) if rows == most else (False,):
            walk = geometry.column_walk(images, rows, most, lanes, threads, gapless)
            assert walk.warps * 32 == threads
            assert walk.outer * walk.inner * (threads // lanes) >= images * rows


@pytest.fixture(scope="module")
def page(machine_code, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the command writes of the CUDA kernels."""
    from bench.__main__ import main

    path = tmp_path_factory.mktemp("page") / "page.md"
    path.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    assert main(["predict", "--no-triton", "--write", str(path)]) == 0
    return path.read_text().split(tables.BEGIN)[1].split(tables.END)[0].strip()


def test_command_writes_the_page(page: str) -> None:
    assert "Predicted times of the CUDA kernels" in page and "Triton" not in page
    assert "kernels in float16" in page and "`toeplitz_forward<float16, 4x4>`" in page


def test_documented_predictions_are_those_of_the_module(page: str) -> None:
    version, _ = documented()
    if version != built_module().toolkit():
        pytest.skip(f"the document was read from CUDA {version}, the module is of {built_module().toolkit()}")
    text = DOCUMENT.read_text().split(tables.BEGIN)[1].split("#### Hot loops of the Triton kernels")[0]
    assert text.strip() == page, "run python -m bench predict --write docs/performance.md"


def documented() -> tuple[str, dict[str, tuple[int, int]]]:
    """The CUDA version that the document names, and kernel -> registers, instructions of its loop."""
    text = DOCUMENT.read_text().split(tables.BEGIN)[1].split(tables.END)[0]
    version = re.search(r"built by CUDA (\d+\.\d+)", text)
    assert version, "the document names no CUDA version"
    table = text.split("#### Hot loops of the CUDA kernels")[1].split("####")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \|", table, re.MULTILINE)
    return version[1], {name: (int(registers), int(n)) for name, registers, n in rows}


def test_documented_resources_are_those_of_the_module(machine_code) -> None:
    code, registers = machine_code
    version, rows = documented()
    if version != built_module().toolkit():
        pytest.skip(f"the document was read from CUDA {version}, the module is of {built_module().toolkit()}")
    assert len(rows) >= 30
    found = {name: (registers[name], len(tables.hot_loop(code[name]).body)) for name in rows}
    assert rows == found, "kernels changed: run python -m bench predict --write docs/performance.md"


# ---- Triton ----


def test_triton_work_runs_rows_around_columns() -> None:
    triton = pytest.importorskip("bench.predict.triton")
    code = snippet("triton_conv_direct")
    outer, inner = sass.loops(code)
    work = triton.work_of(code, macs=31 * inner.macs, kernel_width=31)
    assert work.instructions == pytest.approx(31 * len(inner.body) + len(outer.body) - len(inner.body))
    once = triton.outside_loops(code)
    assert {i.address for i in once}.isdisjoint(i.address for i in outer.body)
    assert once[-1].name == "EXIT"


@pytest.mark.parametrize("pass_name", tables.PASSES)
def test_triton_predictions(pass_name: str, machine_code) -> None:
    pytest.importorskip("triton")
    from bench.predict import triton

    layer = tables.chosen_layers()[6]
    g = tables.geometry(layer)
    row = tables.predict(layer, g, "bfloat16", pass_name, triton.launches(g, pass_name, "bfloat16"))
    assert row.time >= row.floor and row.per_sm >= 1
    assert row.launches[0].kernel.endswith("toeplitz")
