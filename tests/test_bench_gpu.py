"""What the benchmark does for GPUs, tested without one: schedule, precisions, backends, promises."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")

import lkconv
from bench import __main__ as cli
from bench import (
    depthwise_conv2d,
    gate,
    implementations,
    machine,
    measure,
    problem,
    report,
    roofline,
    targets,
    verdicts,
)
from bench.schedule import RESERVE, Schedule
from bench.shapes import Layer, layers
from float32_precision import tf32_allowed

TINY = Layer("tiny", "-", 4, 6, 7, (3, 3), padding=(1, 1))
QUICK = depthwise_conv2d.Settings(batch=1, quick=True)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(measure, "QUICK", measure.Budget(seconds=0.001, turns=1, least=1, most=2))
    monkeypatch.setattr(depthwise_conv2d, "ATTEMPTS", {True: 1})


# --- what a run does --------------------------------------------------------------------------------------


def test_a_failing_explanation_costs_no_row(monkeypatch):
    def broken(*arguments):
        raise KeyError("scratch_bytes")

    monkeypatch.setattr(lkconv, "explain", broken)
    rows = depthwise_conv2d.measure_cell(TINY, "float32", "forward", QUICK)
    ours = [row for row in rows if row["implementation"] == "lkconv"]
    assert len(ours) == 2 and all(row["correct"] and row["time"] for row in ours)
    assert {row["algorithm"] for row in ours} == {"unknown (KeyError: 'scratch_bytes')"}


def run_of_two_layers(*more):
    arguments = "depthwise_conv2d --suite inceptionnext --filter 3x3 --quick --batch 1 --pass forward"
    return cli.main([*arguments.split(), *more])


def test_rows_are_saved_one_cell_after_the_other(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    measured, seen = depthwise_conv2d.measure_cell, []

    def interrupted(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(arguments)
        return measured(*arguments)

    monkeypatch.setattr(depthwise_conv2d, "measure_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_of_two_layers("--json", str(path))
    content = report.load(path)
    assert {row["layer"] for row in content["rows"]} == {seen[0][0].name}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    report.save(path, [], {}, None)
    before = path.read_text()
    with pytest.raises(TypeError):
        report.save(path, [], {"not": object()}, None)
    assert path.read_text() == before


def test_a_budget_leaves_out_and_says_what(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert run_of_two_layers("--budget", "0.5", "--json", str(path)) == 0
    content = report.load(path)
    left = content["not_run"]
    assert content["rows"] == [] and len(left) == len(layers("inceptionnext")) // 3
    assert {entry["reason"] for entry in left} == {"no time left"}
    printed = capsys.readouterr().out
    assert f"not run: {len(left)} of {len(left)} cells" in printed
    assert all(entry["layer"] in printed for entry in left)
    assert cli.main(["table", str(path)]) == 1
    with pytest.raises(SystemExit):
        run_of_two_layers("--budget", "0")


def test_lack_of_memory_on_a_gpu_ends_a_cell_and_not_the_run(monkeypatch):
    def failing(layer, *rest):
        if layer.name == "tiny":
            raise torch.OutOfMemoryError("CUDA out of memory.\nand a trace")
        return [{"layer": layer.name}]

    monkeypatch.setattr(depthwise_conv2d, "measure_cell", failing)
    monkeypatch.setattr(machine, "machine", lambda device: {})
    on_gpu = replace(QUICK, device="cuda")
    both = (TINY, replace(TINY, name="other"))
    planned = depthwise_conv2d.schedule(both, on_gpu)
    rows = [row["layer"] for cell in depthwise_conv2d.run(planned, on_gpu) for row in cell]
    assert rows == ["other"] and planned.failures == 1
    assert planned.left_out == [((TINY, "float32", "forward"), "OutOfMemoryError: CUDA out of memory.")]
    with pytest.raises(torch.OutOfMemoryError):
        list(depthwise_conv2d.run(depthwise_conv2d.schedule(both, QUICK), QUICK))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A run on "cuda" whose tensors are on the CPU and whose calls all take a millisecond."""

    def problems(layer, batch, dtype, pass_name, device, seed=0):
        assert device == "cuda"
        return problem.make_problems(layer, batch, dtype, pass_name, "cpu", seed=seed)

    def time_cuda(runs, size, cache, budget):
        return {index: measure.Times([1e-3, 1e-3]) for index in runs}

    facts = {**machine.machine("cpu"), "device": "cuda", "gpu": "a GPU", "arch": "sm_90"}
    ceilings = {"copy_gbps": 1e-3, "cached_copy_gbps": None, "matmul_gflops": {"float32": 1e3}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "machine", lambda device: facts)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": torch.__version__})
    monkeypatch.setattr(machine, "l2_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(roofline, "ceilings", lambda device, dtypes: ceilings)
    monkeypatch.setattr(depthwise_conv2d, "make_problems", problems)
    monkeypatch.setattr(measure, "time_cuda", time_cuda)
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    with tf32_allowed(True):
        yield
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_whole_run_on_a_gpu(precision, pretended_gpu, tmp_path, capsys):
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    more = ["--device", "cuda", "--json", str(path), "--plot", str(picture), "--budget", "600"]
    assert run_of_two_layers(*more, *(["--tf32"] if precision == "tf32" else [])) == 0
    content = report.load(path)
    assert {row["precision"] for row in content["rows"]} == {precision}
    assert {row["dtype"] for row in content["rows"]} == {"float32"} and not content["not_run"]
    assert content["ceilings"]["copy_gbps"] and picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    found = (
        f"{precision} forward, k<=11, contiguous: wanted 1.3x or 75% of copy bandwidth; no layer below 0.95x"
    )
    assert f"  met           {found}; found 1.00x over 4 layers" in printed
    assert "not measured  published table, float32 forward, k = 31, R = 16: wanted 20x\n" in printed
    assert cli.main(["table", str(path)]) == 0
    assert f"| {precision} forward, k<=11, channels_last | " in capsys.readouterr().out


def test_random_values_are_drawn_on_the_device(monkeypatch):
    asked = []

    class Generator:
        def __init__(self, device):
            asked.append(device)

        def manual_seed(self, seed):
            return self

    def randn(size, generator, device):
        asked.append(device)
        return torch.zeros(size)

    monkeypatch.setattr(problem.torch, "Generator", Generator)
    monkeypatch.setattr(problem.torch, "randn", randn)
    problem.make_problems(TINY, 2, "bfloat16", "forward", "cuda")
    assert asked == ["cuda"] * 6


def test_a_slow_candidate_is_called_once_to_warm_up(monkeypatch):
    turns = []

    def turn(sets, calls, flush):
        turns.append(calls)
        return [sets[0]] * calls

    monkeypatch.setattr(measure, "_turn_cuda", turn)
    monkeypatch.setattr(measure, "_flusher", lambda *arguments: None)
    budget = measure.Budget(seconds=0.2, turns=4, least=2, most=200)
    measure.time_cuda({"slow": [2.0]}, 1, 1, budget)
    assert turns == [1, 1, 1]
    turns.clear()
    measure.time_cuda({"fast": [0.01]}, 1, 1, budget)
    assert turns == [1, 2, 5, 5, 5, 5]


# --- schedule ---------------------------------------------------------------------------------------------


def cells_of(suite, dtypes, passes=("forward",)):
    return [(layer, dtype, name) for layer in layers(suite) for dtype in dtypes for name in passes]


def test_without_a_deadline_cells_keep_their_order():
    cells = cells_of("paper_table", ("float32", "bfloat16"))
    assert list(Schedule(cells, lambda cell: 1.0)) == cells


def test_with_one_the_most_important_come_first():
    cells = cells_of("paper_table", ("float64", "float32", "float16", "bfloat16"))
    planned = list(Schedule(cells, lambda cell: 1.0, deadline=1e9))
    assert sorted(planned, key=str) == sorted(cells, key=str)
    first = [(layer.height, layer.kernel_size[0], dtype) for layer, dtype, _ in planned[:6]]
    assert first == [(r, 31, dtype) for r in (16, 32, 64) for dtype in ("bfloat16", "float32")]
    taps = [layer.taps for layer, _, _ in planned]
    assert taps == sorted(taps, reverse=True)


def test_nothing_starts_that_would_outlast_the_deadline():
    """Cells of 10 s a unit of work: after the first, each is expected to last as long as the one before."""
    now = [0.0]
    sizes = {k: replace(TINY, name=f"k{k}", kernel_size=(k, k)) for k in (3, 5, 7)}
    work = {"k7": 1.0, "k5": 3.0, "k3": 1.0}
    cells = [(layer, "float32", "forward") for layer in sizes.values()]
    planned = Schedule(cells, lambda cell: work[cell[0].name], 35.0 + RESERVE, lambda: now[0])
    ran = []
    for cell in planned:
        ran.append(cell[0].name)
        now[0] += 10 * work[cell[0].name]
    assert ran == ["k7", "k3"] and now[0] <= 35.0
    assert planned.left_out == [((sizes[5], "float32", "forward"), "no time left")]
    assert len(planned) == 3


# --- precisions and backends ------------------------------------------------------------------------------


def test_tf32_is_a_precision_of_its_own():
    on_gpu = replace(QUICK, device="cuda", tf32=True)
    assert on_gpu.precision("float32") == "tf32" and on_gpu.precision("bfloat16") == "bfloat16"
    assert replace(on_gpu, tf32=False).precision("float32") == "float32"
    assert replace(on_gpu, device="cpu").precision("float32") == "float32"


def test_gpu_flags_follow_the_settings():
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    try:
        with tf32_allowed(True):
            depthwise_conv2d.set_up_gpu(QUICK)
            assert torch.backends.cudnn.conv.fp32_precision != "tf32" and torch.backends.cudnn.benchmark
            depthwise_conv2d.set_up_gpu(replace(QUICK, tf32=True))
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before


def test_backends_have_rows_of_their_own_and_are_no_peers():
    settings = replace(QUICK, backends=("cpu", "torch"))
    for pass_name in problem.PASSES:
        rows = depthwise_conv2d.measure_cell(TINY, "float32", pass_name, settings)
        found = {(row["implementation"], row["backend"]) for row in rows if row["backend"]}
        assert found == {("lkconv", "cpu"), ("lkconv:torch", "torch")}
        assert all(row["correct"] and row["ratio"] for row in rows)
        assert all(row["best_peer"].startswith(("conv2d", "torch.fft")) for row in rows)
    summaries = report.summarise(rows)
    assert {s["implementation"] for s in summaries} == {"lkconv", "lkconv:torch"}
    assert "[lkconv:torch]" in report.format_summary(rows)
    assert "lk:torch.c " in report.format_cell_compact(rows)


def test_an_impossible_backend_is_refused_with_its_reason():
    with pytest.raises(SystemExit, match=r"--backend cuda with float32 on cpu: .*takes CUDA tensors"):
        run_of_two_layers("--backend", "cuda")


# --- promises ---------------------------------------------------------------------------------------------


def test_targets_of_gpus():
    assert targets.target("cuda", "bfloat16", "k>=13", "backward_weight") == 20
    assert targets.target("cuda", "float32", "k>=13", "forward") == 5
    assert targets.target("cuda", "tf32", "k>=13", "forward") is None
    for precision in ("bfloat16", "float16", "float32", "tf32", "float64"):
        assert targets.target("cuda", precision, "k<=11", "forward") == 1.3
        assert targets.target("cuda", precision, "k<=11", "backward_input") == 1.5
        assert targets.target("cuda", precision, "k<=11", "backward_weight") == 5
    assert targets.copy_share("cuda", "k<=11", "forward") == 0.75
    assert targets.copy_share("cuda", "k<=11", "backward_input") is None
    assert targets.copy_share("cpu", "k<=11", "forward") is None


def gpu_row(layer, precision="bfloat16", pass_name="forward", ratio=2.0, seconds=1e-3, **more):
    return {
        "layer": layer.name, "channels": layer.channels, "height": layer.height, "width": layer.width,
        "kernel_size": list(layer.kernel_size), "stride": list(layer.stride), "padding": list(layer.padding),
        "dilation": list(layer.dilation), "multiplier": layer.multiplier, "parent_channels": 0, "offset": 0,
        "batch": layer.batch, "size_class": layer.size_class, "pass": pass_name, "precision": precision,
        "dtype": "float32" if precision == "tf32" else precision, "layout": "contiguous", "device": "cuda",
        "implementation": "lkconv", "backend": "cuda", "algorithm": "cuda:direct", "correct": True,
        "reason": "", "error": 0.0, "ratio": ratio, "ratio_conv2d": ratio, "ratio_fft": None,
        "best_peer": "conv2d contiguous", "gbps": 1000.0, "gflops": 1.0, "foreign_cores": None,
        "time": {"median": seconds, "min": seconds, "max": seconds, "repeats": 3},
        "machine": {
            "gpu": "a GPU", "arch": "sm_90", "cpu": "a CPU", "threads": 2, "isa": "avx2", "torch_isa": "AVX2",
        },
        "versions": {"torch": "2"}, **more,
    }  # fmt: skip


LARGE, SMALL = (next(r for r in layers("replknet") if (r.taps >= 169) == large) for large in (True, False))
TABLE = {r.height: r for r in layers("paper_table") if r.kernel_size == (31, 31)}


def verdict(rows, what, copy_gbps=4000.0):
    (found,) = [v for v in verdicts.evaluate(rows, copy_gbps) if v.what == what]
    return found


def test_means_are_judged_by_precision():
    rows = [gpu_row(LARGE, "float32", ratio=6.0), gpu_row(LARGE, "tf32", ratio=1.0)]
    assert verdict(rows, "float32 forward, k>=13, contiguous").met is True
    assert verdict(rows, "float32 forward, k>=13, contiguous").found.startswith("6.00x over 1 layers")
    assert verdict([gpu_row(LARGE, "float32", ratio=4.9)], "float32 forward, k>=13, contiguous").met is False
    assert verdict(rows, "bfloat16 forward, k>=13").met is None
    slow = [gpu_row(LARGE, ratio=200.0), gpu_row(replace(LARGE, name="a slow one"), ratio=0.9)]
    missed = verdict(slow, "bfloat16 forward, k>=13, contiguous")
    assert missed.met is False and "worst 0.90x: a slow one" in missed.found


def test_copy_bandwidth_counts_for_small_kernels_forward():
    what = "bfloat16 forward, k<=11, contiguous"
    rows = [gpu_row(SMALL, ratio=1.1, gbps=3100.0)]
    assert verdict(rows, what).met is True and "78% of copy bandwidth" in verdict(rows, what).found
    assert verdict(rows, what, copy_gbps=5000.0).met is False
    assert verdict(rows, what, copy_gbps=None).met is False
    back = [gpu_row(SMALL, pass_name="backward_input", ratio=1.1, gbps=3100.0)]
    assert verdict(back, "bfloat16 backward_input, k<=11, contiguous").met is False


def test_the_published_table_and_the_latency_have_promises_of_their_own():
    ratios = {16: 21.0, 32: 14.0}
    rows = [gpu_row(TABLE[r], "float32", ratio=ratio) for r, ratio in ratios.items()]
    rows += [gpu_row(TABLE[16], "tf32", ratio=99.0), gpu_row(TABLE[64], "tf32", ratio=99.0)]
    rows += [gpu_row(TABLE[32], "bfloat16", seconds=0.19e-3)]
    name = "published table, float32 forward, k = 31, R = {}"
    assert [verdict(rows, name.format(r)).met for r in (16, 32, 64)] == [True, False, None]
    assert verdict(rows, name.format(16)).found == "21.00x contiguous"
    latency = "bfloat16 forward, (64, 384, 32, 32), k = 31"
    assert verdict(rows, latency).met is True and verdict(rows, latency).found == "0.190 ms contiguous"
    rows[-1]["time"]["median"] = 0.21e-3
    assert verdict(rows, latency).met is False
    assert verdict(rows, "bfloat16 forward, k>=13").met is None  # means are over the layers of real models


def test_triton_is_held_against_the_cuda_rows_of_the_same_cell():
    def pair(seconds, **more):
        triton = gpu_row(LARGE, seconds=seconds, implementation="lkconv:triton", backend="triton", **more)
        return [gpu_row(LARGE, seconds=1e-3, **more), triton]

    what = "Triton, bfloat16 forward, k>=13"
    assert verdict(pair(1.4e-3), what).met is True
    assert (
        verdict(pair(1.6e-3), what).met is False
        and "1.60 times over 1 rows" in verdict(pair(1.6e-3), what).found
    )
    assert verdict(pair(1.4e-3, run=0) + pair(1.8e-3, run=1), what).met is False
    assert verdict([gpu_row(LARGE)], "Triton, k>=13").met is None
    alone = gpu_row(LARGE, implementation="lkconv:triton", backend="triton", ratio=0.1)
    assert verdict([alone], "bfloat16 forward, k>=13").met is None


def test_rows_of_a_cpu_are_not_judged():
    assert all(v.met is None for v in verdicts.evaluate([gpu_row(LARGE, device="cpu")], 10.0))


def test_verdicts_are_printed_and_tabled(tmp_path, capsys):
    ceilings = {"copy_gbps": 4000.0, "cached_copy_gbps": None, "matmul_gflops": {"bfloat16": 1e5}}
    left = {"layer": "table x", "batch": 64, "dtype": "float32", "precision": "tf32", "pass": "forward"}
    files = []
    for i, rows in enumerate(([gpu_row(LARGE, ratio=12.0)], [gpu_row(LARGE, "tf32", ratio=3.0)])):
        files.append(str(tmp_path / f"{i}.json"))
        report.save(files[-1], rows, {}, ceilings, [{**left, "reason": "no time left"}] if i else [])
    assert cli.main(["table", *files]) == 0
    printed = capsys.readouterr().out
    assert (
        "| bfloat16 forward, k>=13, contiguous | 10x; no layer below 0.95x | 12.00x over 1 layers;" in printed
    )
    assert "| tf32 | forward | k>=13 | contiguous | 1 | 3.00 |" in printed
    assert "not run: 1 of 2 cells" in printed and "tf32 forward (no time left): table x" in printed
    text = verdicts.format_verdicts(verdicts.evaluate([gpu_row(LARGE, ratio=12.0)], 4000.0), 4000.0)
    assert text.startswith("targets on a GPU (copy bandwidth 4,000 GB/s)\n  met ")
    assert "  not measured  float64 forward, k<=11" in text


def test_earlier_files_have_no_precision_and_still_compare(tmp_path):
    rows = [gpu_row(LARGE), gpu_row(LARGE, "tf32")]
    old = [{k: v for k, v in row.items() if k != "precision"} for row in rows[:1]]
    compared = report.compare(rows, old)
    assert [entry["row"]["precision"] for entry in compared] == ["bfloat16"]
    json.dumps(report.summarise(old), allow_nan=False)


def test_gate_tolerances_are_those_of_the_precision():
    tiny = problem.make_problems(TINY, 1, "float32", "forward", "cpu")["contiguous"]
    assert gate.tolerance(tiny, tf32=True) > 100 * gate.tolerance(tiny)
    assert implementations.is_ours("lkconv:triton") and not implementations.is_ours("conv2d+compile")
