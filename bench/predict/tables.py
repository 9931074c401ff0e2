"""``python -m bench predict``: the tables of ``docs/performance.md``."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from bench.shapes import Layer, layers

from . import cuda, group_mix, kernel_loops, machine, sass, triton
from .geometry import Geometry
from .kernel_loops import Code

ARCH = "sm_90a"
BEGIN = "<!-- predictions: begin; python -m bench predict --write docs/performance.md -->"
END = "<!-- predictions: end -->"
PASSES = ("forward", "backward_input", "backward_weight")
LAYERS = (
    "table R32 C384 32x32 k31x31",
    "table R32 C384 32x32 k13x13",
    "table R32 C384 32x32 k7x7",
    "table R32 C384 32x32 k3x3",
    "RepLKNet-31B C128 56x56 k31x31",
    "RepLKNet-31B C512 14x14 k27x27",
    "RepLKNet-31B C1024 7x7 k13x13",
    "UniRepLKNet-S C192 28x28 k13x13",
    "SLaK-T C124 56x56 k51x5",
    "ConvNeXt-T C96 56x56 k7x7",
    "UniRepLKNet-S C96 56x56 k3x3",
    "RepLKNet-31B C256 56x56 k3x3 s2",
)
DTYPES = ("bfloat16", "tf32", "float32")  # of the tables with every unit
TRITON_LAYERS = (0, 1, 2, 3, 4, 5, 6)  # of LAYERS
CHANNELS_LAST = 7  # also in this layout


@dataclass(frozen=True)
class Prediction:
    """One pass of one layer: launches in order, and seconds of each unit in each."""

    layer: str
    dtype: str
    passes: tuple[str, ...]
    launches: tuple[cuda.Launch, ...]
    registers: tuple[int, ...]  # of a thread in each
    seconds: tuple[dict[str, float], ...]
    pixels: int  # of the pass's output, for backward_weight of grad_output
    floor: float

    @property
    def time(self) -> float:
        return sum(max(s.values()) for s in self.seconds)

    @property
    def main(self) -> int:
        """The launch that takes longest."""
        return max(range(len(self.launches)), key=lambda i: max(self.seconds[i].values()))

    @property
    def per_sm(self) -> int:
        """Blocks that an SM holds of that launch."""
        main = self.launches[self.main]
        return machine.blocks_per_sm(self.registers[self.main], main.threads, main.shared)

    @property
    def bound(self) -> str:
        """That launch's busiest unit."""
        seconds = self.seconds[self.main]
        return max(seconds, key=lambda unit: seconds[unit])


def floor_seconds(g: Geometry, dtype: str) -> float:
    """No kernel is faster: every tensor moved once, or every tap inside the image at the unit's peak."""
    flops = 2 * g.batch * g.channels * g.inside_taps()
    return max(cuda.tensor_bytes(g, dtype) / machine.MEMORY, flops / machine.PEAK[dtype])


def geometry(layer: Layer) -> Geometry:
    size = (layer.batch, layer.channels, layer.height, layer.width)
    return Geometry(*size, layer.kernel_size, layer.stride, layer.padding, layer.dilation)


def chosen_layers() -> list[Layer]:
    by_name = {layer.name: layer for suite in ("all", "paper_table") for layer in layers(suite)}
    found = [by_name[name] for name in LAYERS]
    return [*found, replace(found[0], batch=1)]


def built_module() -> ModuleType:
    """The CUDA module; ``RuntimeError`` that says how to get it where there is none."""
    try:
        return import_module("lkconv._C_cuda")
    except ImportError as error:
        raise RuntimeError(
            f"predictions read the machine code of lkconv._C_cuda ({error}); build it with LKCONV_CUDA=1, "
            "nvcc and a CUDA build of torch; no GPU is needed"
        ) from error


def load_module() -> tuple[Code, dict[str, int]]:
    """Machine code and registers of the convolution kernels in the built CUDA module."""
    module = built_module()
    code: Code = {}
    registers: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cubin in sass.extract(Path(str(module.__file__)), ARCH, Path(folder)):
            counts = {sass.kernel_name(name): n for name, n in sass.register_counts(cubin).items()}
            counts.pop("", None)
            if counts:
                registers |= counts
                code |= {
                    sass.kernel_name(n): c for n, c in sass.disassemble(cubin).items() if sass.kernel_name(n)
                }
    return code, registers


def predict(
    layer: Layer, g: Geometry, dtype: str, pass_name: str, found: list[tuple[cuda.Launch, int]]
) -> Prediction:
    seconds = tuple(machine.pipe_seconds(x.work, x.blocks, x.memory_bytes) for x, _ in found)
    pixels = g.elements()[pass_name != "backward_input"]
    label = f"{layer.name}, N={layer.batch}"
    launches, registers = zip(*found, strict=True)
    floor = floor_seconds(g, dtype)
    return Prediction(label, dtype, (pass_name,), launches, registers, seconds, pixels, floor)


def planned(g: Geometry, pass_name: str, dtype: str, channels_last: bool = False) -> dict:
    """The CUDA planner's choice on an H200, marked with the layout."""
    size, geometry = (g.batch, g.channels, g.height, g.width), (g.kernel, g.stride, g.padding, g.dilation)
    name, tf32 = ("float32", True) if dtype == "tf32" else (dtype, False)
    choice = built_module().plan(
        pass_name, size, g.channels, *geometry, name, tf32=tf32, channels_last=channels_last
    )[0]
    mark = {"channels_last": channels_last}
    return choice | mark | {"problems": [problem | mark for problem in choice["problems"]]}


def cuda_predictions(
    code: Code, registers: dict[str, int], dtypes: tuple[str, ...] = DTYPES
) -> list[Prediction]:
    cases = [(layer, dtype, False) for layer in chosen_layers() for dtype in dtypes]
    cases.append((chosen_layers()[CHANNELS_LAST], dtypes[0], True))
    rows = []
    for layer, dtype, channels_last in cases:
        g = geometry(layer)
        for pass_name in PASSES:
            plan = planned(g, pass_name, dtype, channels_last)
            if dtype == "tf32" and all(p["algorithm"] == "direct" for p in plan["problems"]):
                continue  # the float32 row
            found = cuda.launches(code, g, pass_name, dtype, plan)
            named = replace(layer, name=f"{layer.name}, channels_last") if channels_last else layer
            rows.append(predict(named, g, dtype, pass_name, [(x, registers[x.kernel]) for x in found]))
    return merged(rows)


def triton_predictions() -> list[Prediction]:
    rows = []
    for layer in (chosen_layers()[i] for i in TRITON_LAYERS):
        g = geometry(layer)
        for dtype in ("bfloat16", "tf32", "float32"):
            for pass_name in PASSES:
                rows.append(predict(layer, g, dtype, pass_name, triton.launches(g, pass_name, dtype)))
    return merged(rows)


def merged(rows: Iterable[Prediction]) -> list[Prediction]:
    """Rows that differ in the pass alone become one: backward_input with stride 1 is a forward."""
    found: list[Prediction] = []
    for row in rows:
        if found and replace(found[-1], passes=()) == replace(row, passes=()):
            found[-1] = replace(found[-1], passes=found[-1].passes + row.passes)
        else:
            found.append(row)
    return found


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def counts(r: Prediction) -> list[str]:
    """Cells of a row: the launch that takes longest, and instructions and bytes of all."""
    main = r.launches[r.main]
    instructions = 32 * sum(x.work.instructions for x in r.launches) / r.pixels
    moved = sum(x.memory_bytes for x in r.launches) / r.pixels
    return [
        f"{main.shared / 1024:.0f}",
        f"{r.per_sm} x {main.threads // 32}",
        number(instructions),
        f"{100 * main.work.in_products / main.work.instructions:.0f}%",
        number(moved),
    ]


def times(r: Prediction) -> list[str]:
    return [f"**{number(1e6 * r.time)}** {r.bound}", number(1e6 * r.floor), number(r.time / r.floor)]


def prediction_table(rows: list[Prediction]) -> str:
    units = ("issue", "fma", "integer", "special", "matrix", "shared", "memory")
    lines = [
        "| layer | dtype | pass | kernel | shared KiB | blocks x warps per SM | instructions | in products "
        "| bytes | " + " | ".join(units) + " | predicted | floor | times floor |",
        "|---" * (12 + len(units)) + "|",
    ]
    for r in rows:
        us = [number(1e6 * sum(s[unit] for s in r.seconds)) for unit in units]
        cells = [r.layer, r.dtype, ", ".join(r.passes), f"`{r.launches[r.main].kernel}`"]
        lines.append("| " + " | ".join([*cells, *counts(r), *us, *times(r)]) + " |")
    return "\n".join(lines)


def float16_table(rows: list[Prediction], in_bfloat16: list[Prediction]) -> str:
    """Without the units' columns: they are nearly those of bfloat16, whose time stands beside."""
    lines = [
        "| layer | pass | kernel | registers | shared KiB | blocks x warps per SM | instructions "
        "| in products | bytes | predicted | floor | times floor | in bfloat16 |",
        "|---" * 13 + "|",
    ]
    others = {(other.layer, name): other for other in in_bfloat16 for name in other.passes}
    for r in rows:
        cells = [r.layer, ", ".join(r.passes), f"`{r.launches[r.main].kernel}`", str(r.registers[r.main])]
        other = number(1e6 * others[r.layer, r.passes[0]].time)
        lines.append("| " + " | ".join([*cells, *counts(r), *times(r), other]) + " |")
    return "\n".join(lines)


def hot_loop(code: tuple[sass.Instruction, ...]) -> sass.Loop:
    """The loop a kernel is about: products, or where there are none, the longest that loads from memory. A
    kernel that loads in no loop is one pass."""
    found = sass.loops(code)
    if any(x.macs for x in found):
        return sass.products(found)
    loads = [x for x in found if x.innermost and x.count("LDG") > 0]
    if not loads:
        return sass.Loop(tuple(sass.longest_path(code, [], lambda i: i.name == "CALL")), 1, True)
    return max(loads, key=lambda x: len(x.body))


def resource_table(code: Code, registers: dict[str, int]) -> str:
    lines = [
        "| kernel | registers | instructions | FFMA, FADD | HMMA | LDS, LDSM (cycles) | LDG | STS, STG "
        "| integer, IMAD | special | branches | products' share |",
        "|---" * 12 + "|",
    ]
    for name in sorted(registers):
        if not counted(name):
            continue
        body = hot_loop(code[name]).body
        n, k = len(body), sass.kinds(body)
        cycles = sum(i.bytes_per_lane // 4 for i in body if i.name in ("LDS", "LDSM"))
        products = k["matrix"] or sum(i.name == "FFMA" for i in body)
        lines.append(
            f"| `{name}` | {registers[name]} | {n} | {k['fma']} | {k['matrix']} "
            f"| {k['LDS'] + k['LDSM']} ({cycles}) | {k['LDG']} | {k['STS'] + k['STG']} "
            f"| {k['integer'] + k['uniform'] + k['imad']} | {k['special']} "
            f"| {k['branch'] + k['barrier']} | {100 * products / n:.0f}% |"
        )
    return "\n".join(lines)


def counted(name: str) -> bool:
    """In the tables of loops: float16 shares bfloat16's code but for the conversions; float64 is for gradient
    checks."""
    return "float64" not in name and not re.search(r"\bfloat16", name)


def moves_table(code: Code) -> str:
    """What copies, band, indices and stores cost."""
    lines = [
        "| kernel | element copied by 16, 8, 4 bytes, alone | band element | kernel row | tile | block |",
        "|---" * 6 + "|",
    ]

    def cell(value: float | None) -> str:
        return "" if value is None else number(value)

    for name in sorted(code):
        if not counted(name) or not name.startswith(("direct_", "toeplitz_")):
            continue
        m = kernel_loops.moves(code, name)
        copied = ", ".join(map(cell, m.copied))
        cells = [copied, cell(m.band), *(str(n or "") for n in (m.row, m.tile, m.block))]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def triton_resources() -> str:
    """The loops of the first layer's kernels."""
    lines = [
        "| kernel | dtype | registers | shared KiB | instructions | FFMA | HMMA, HGMMA | LDS, LDSM (cycles) "
        "| LDG, LDGSTS | integer, IMAD | products' share |",
        "|---" * 11 + "|",
    ]
    layer = chosen_layers()[0]
    for dtype in ("bfloat16", "tf32", "float32"):
        for pass_name in ("forward", "backward_weight"):
            for launch in triton.recorded(geometry(layer), pass_name, dtype):
                code, registers, shared = triton.compiled(launch)
                name = launch.kernel.__name__.removesuffix("_kernel")
                if name == "reduce_splits":
                    continue
                body = sass.products(sass.loops(code)).body
                n, k = len(body), sass.kinds(body)
                cycles = sum(i.bytes_per_lane // 4 for i in body if i.name in ("LDS", "LDSM"))
                ffma = sum(i.name == "FFMA" for i in body)
                lines.append(
                    f"| `{name}` | {dtype} | {registers} | {shared / 1024:.0f} | {n} | {ffma} "
                    f"| {k['matrix']} | {k['LDS'] + k['LDSM']} ({cycles}) | {k['LDG'] + k['LDGSTS']} "
                    f"| {k['integer'] + k['uniform'] + k['imad']} | {100 * (ffma + k['matrix']) / n:.0f}% |"
                )
    return "\n".join(lines)


def document(with_triton: bool) -> str:
    code, registers = load_module()
    rows, in_float16 = (cuda_predictions(code, registers, dtypes) for dtypes in (DTYPES, ("float16",)))
    in_bfloat16 = [r for r in rows if r.dtype == "bfloat16"]
    parts = [
        f"Code read: {ARCH} of `lkconv._C_cuda`, built by CUDA {built_module().toolkit()}.",
        "#### Hot loops of the CUDA kernels, one iteration",
        resource_table(code, registers),
        "#### Instructions of the CUDA kernels beside their products",
        moves_table(code),
        "#### Predicted times of the CUDA kernels, microseconds",
        prediction_table(rows),
        "#### Predicted times of the CUDA kernels in float16, microseconds",
        float16_table(in_float16, in_bfloat16),
    ]
    if with_triton:
        import triton as compiler

        parts += [
            f"#### Hot loops of the Triton kernels, {LAYERS[0]}, sm_90, Triton {compiler.__version__}",
            triton_resources(),
            "#### Predicted times of the Triton kernels, microseconds",
            prediction_table(triton_predictions()),
        ]
    return "\n\n".join(parts)


def write_between(path: Path, text: str) -> None:
    """Replaces what stands between the two marks in ``path``."""
    content = path.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path} must hold each of {BEGIN!r} and {END!r} once")
    head, rest = content.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-triton", action="store_true", help="the CUDA kernels alone")
    parser.add_argument("--group-mix", action="store_true", help="Group-Mix aggregation instead, as a table")
    parser.add_argument(
        "--write", metavar="FILE.md", help="replace what stands between the marks in this file"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.group_mix:
        print(group_mix.table())
        return 0
    text = document(not arguments.no_triton)
    if arguments.write:
        write_between(Path(arguments.write), text)
    else:
        print(text)
    return 0
