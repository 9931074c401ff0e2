"""Every promise about GPUs, met or missed by the rows of a run, with its figures."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from bench import report, targets
from bench.implementations import is_ours
from bench.problem import LAYOUTS

_TABLE_SHAPE = {"batch": 64, "channels": 384, "kernel_size": (31, 31), "stride": (1, 1), "multiplier": 1}


@dataclass(frozen=True)
class Verdict:
    """``met`` is None where no row tells."""

    what: str
    wanted: str
    found: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def evaluate(rows: list[dict], copy_gbps: float | None) -> list[Verdict]:
    """All promises about GPUs. ``copy_gbps`` is the copy bandwidth measured in the same run."""
    rows = [row for row in rows if row["device"] == "cuda"]
    return [*_means(rows, copy_gbps), *_published_table(rows), _latency(rows), *_triton(rows)]


def _means(rows: list[dict], copy_gbps: float | None) -> list[Verdict]:
    """The geometric means over the layers of real models; the published table has promises of its own."""
    layers = [row for row in rows if not row["layer"].startswith("table ")]
    summaries = [s for s in report.summarise(layers, copy_gbps) if s["implementation"] == "lkconv"]
    found = []
    for precision, size_class, pass_name in targets.promised("cuda"):
        group = precision, size_class, pass_name
        wanted = f"{targets.target('cuda', *group):g}x"
        if share := targets.copy_share("cuda", size_class, pass_name):
            wanted += f" or {share:.0%} of copy bandwidth"
        wanted += f"; no layer below {targets.WORST:g}x"
        what = f"{precision} {pass_name}, {size_class}"
        members = [s for s in summaries if (s["precision"], s["size_class"], s["pass"]) == group]
        found += [Verdict(f"{what}, {s['layout']}", wanted, _mean_found(s), s["met"]) for s in members]
        if not members:
            found.append(Verdict(what, wanted, "", None))
    return found


def _mean_found(summary: dict) -> str:
    text = f"{summary['geomean']:.2f}x over {summary['layers']} layers"
    if targets.copy_share("cuda", summary["size_class"], summary["pass"]) and summary["copy_share"]:
        text += f", {summary['copy_share']:.0%} of copy bandwidth"
    return f"{text}; worst {summary['worst']:.2f}x: {summary['worst_layer']}"


def _shape_row(rows: list[dict], size: int, precision: str, layout: str) -> dict | None:
    """lkconv's timed forward row at (64, 384, size, size), k = 31."""
    wanted = {**_TABLE_SHAPE, "height": size, "width": size, "pass": "forward", "implementation": "lkconv"}
    for row in rows:
        have = {**row, "kernel_size": tuple(row["kernel_size"]), "stride": tuple(row["stride"])}
        same = all(have[name] == value for name, value in wanted.items())
        if same and report.precision_of(row) == precision and row["layout"] == layout and row["time"]:
            return row
    return None


def _published_table(rows: list[dict]) -> list[Verdict]:
    found = []
    for size, ratio in targets.PUBLISHED_TABLE.items():
        what, wanted = f"published table, float32 forward, k = 31, R = {size}", f"{ratio:g}x"
        by_layout = {layout: _shape_row(rows, size, "float32", layout) for layout in LAYOUTS}
        ratios = {layout: row["ratio"] for layout, row in by_layout.items() if row and row["ratio"]}
        text = ", ".join(f"{value:.2f}x {layout}" for layout, value in ratios.items())
        found.append(Verdict(what, wanted, text, max(ratios.values()) >= ratio if ratios else None))
    return found


def _latency(rows: list[dict]) -> Verdict:
    what, wanted = "bfloat16 forward, (64, 384, 32, 32), k = 31", f"{targets.LATENCY * 1e3:g} ms or less"
    by_layout = {layout: _shape_row(rows, 32, "bfloat16", layout) for layout in LAYOUTS}
    times = {layout: row["time"]["median"] for layout, row in by_layout.items() if row}
    text = ", ".join(f"{seconds * 1e3:.3f} ms {layout}" for layout, seconds in times.items())
    return Verdict(what, wanted, text, min(times.values()) <= targets.LATENCY if times else None)


def _triton(rows: list[dict]) -> list[Verdict]:
    """Time of Triton's kernels over that of the CUDA kernels in the same cell, by precision and pass."""
    pairs: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if is_ours(row["implementation"]) and row["size_class"] == "k>=13" and row["time"]:
            cell = row.get("run"), row["layer"], row["batch"], row["layout"]
            pairs[(report.precision_of(row), row["pass"], *cell)][row["backend"]] = row["time"]["median"]
    groups: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for (precision, pass_name, _, layer, *_), times in pairs.items():
        if {"cuda", "triton"} <= times.keys():
            groups[precision, pass_name].append((times["triton"] / times["cuda"], layer))
    wanted = f"at most {targets.TRITON:g} times the CUDA kernels' time"
    if not groups:
        return [Verdict("Triton, k>=13", wanted, "", None)]
    return [_triton_verdict(group, ratios, wanted) for group, ratios in groups.items()]


def _triton_verdict(group: tuple[str, str], ratios: list[tuple[float, str]], wanted: str) -> Verdict:
    mean, (worst, layer) = report.geomean(ratio for ratio, _ in ratios), max(ratios)
    found = f"{mean:.2f} times over {len(ratios)} rows; worst {worst:.2f}: {layer}"
    return Verdict(f"Triton, {' '.join(group)}, k>=13", wanted, found, mean <= targets.TRITON)


def format_verdicts(verdicts: list[Verdict], copy_gbps: float | None) -> str:
    """A line each: met, missed, or not measured."""
    copied = "not measured" if copy_gbps is None else f"{copy_gbps:,.0f} GB/s"
    lines = [f"targets on a GPU (copy bandwidth {copied})"]
    for v in sorted(verdicts, key=lambda v: v.met is None):
        lines.append(
            f"  {v.word:<12}  {v.what}: wanted {v.wanted}" + (f"; found {v.found}" if v.found else "")
        )
    return "\n".join(lines)


def markdown(verdicts: list[Verdict]) -> str:
    lines = ["| target | wanted | found | |", "|---|---|---|---|"]
    lines += [f"| {v.what} | {v.wanted} | {v.found} | {v.word} |" for v in verdicts]
    return "\n".join(lines)
