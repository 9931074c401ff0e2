"""The benchmarks themselves: shapes, the gate, the rows, the comparison and the pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm")

from bench import __main__ as cli
from bench import (
    depthwise_conv2d,
    gate,
    implementations,
    measure,
    memory,
    overhead,
    report,
    roofline,
    scaling,
    targets,
)
from bench.contention import Contention
from bench.problem import LAYOUTS, PASSES, make_problems
from bench.shapes import SUITES, Layer, layers

TINY = Layer("tiny", "-", 6, 9, 11, (5, 5), padding=(2, 2))
ODD = (
    TINY,
    replace(TINY, name="strided", stride=(2, 1), padding=(1, 2)),
    replace(TINY, name="dilated rectangle", kernel_size=(3, 4), dilation=(2, 3), padding=(4, 1)),
    replace(TINY, name="kernel over the map", kernel_size=(21, 1), padding=(10, 0)),
    replace(TINY, name="multiplier", multiplier=3, padding=(0, 0)),
    replace(TINY, name="padding over the kernel", kernel_size=(2, 3), padding=(4, 5)),
    replace(TINY, name="slice", parent_channels=10, offset=3),
)
QUICK = depthwise_conv2d.Settings(batch=2, quick=True)


# --- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_every_layer_is_well_formed(suite):
    rows = layers(suite)
    assert rows
    assert len({row.geometry for row in rows}) == len(rows)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        same = tuple(d * (k - 1) // 2 for k, d in zip(row.kernel_size, row.dilation, strict=True))
        assert row.padding == same
        halved = tuple(-(-n // s) for n, s in zip((row.height, row.width), row.stride, strict=True))
        assert row.out_size == halved
        assert row.offset + row.channels <= (row.parent_channels or row.channels)
        assert 1 <= row.cpu_batch() <= 8
        assert row.flops(2) == 2 * row.flops(1) > 0


def test_suites_hold_the_published_layers():
    def found(suite):
        return {(r.channels, r.height, r.kernel_size) for r in layers(suite)}

    assert {(128, 56, (31, 31)), (1536, 12, (13, 13)), (384, 80, (27, 27)), (256, 56, (3, 3))} <= found(
        "replknet"
    )
    assert {(124, 56, (51, 5)), (249, 28, (5, 49)), (998, 7, (5, 5))} <= found("slak")
    assert {(80, 56, (3, 3)), (1024, 14, (13, 13))} <= found("unireplknet")
    assert {(64, 56, (111, 1)), (512, 7, (1, 13))} <= found("parcnetv2")
    assert len(layers("paper_table")) == 30
    assert all(row.batch == 64 and row.channels == 384 for row in layers("paper_table"))
    assert {r.geometry for r in layers("all")} == {
        r.geometry for suite in SUITES if suite not in ("all", "paper_table") for r in layers(suite)
    }


def test_size_class_counts_taps():
    assert replace(TINY, kernel_size=(51, 5)).size_class == "k>=13"
    assert replace(TINY, kernel_size=(1, 111)).size_class == "k<=11"
    assert replace(TINY, kernel_size=(13, 13)).size_class == "k>=13"


def test_unknown_suite_names_the_known_ones():
    with pytest.raises(ValueError, match=r"suite must be one of replknet.*got 'resnet'"):
        layers("resnet")


# --- the gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("layer", ODD, ids=lambda layer: layer.name)
def test_reference_is_conv2d_in_float64(layer, pass_name):
    problem = make_problems(layer, 3, "float64", pass_name, "cpu")["contiguous"]
    exact = implementations.CONV2D.prepare(problem)()
    assert gate.check(gate.reference(problem), exact, 1e-14).ok


def test_reference_in_pieces_is_the_whole(monkeypatch):
    for pass_name in PASSES:
        problem = make_problems(TINY, 3, "float64", pass_name, "cpu")["contiguous"]
        whole = gate.reference(problem)
        monkeypatch.setattr(gate, "_MAX_ELEMENTS", 3 * 14 * 14 * 4)  # four of the six channels at a time
        assert gate.check(gate.reference(problem), whole, 1e-14).ok
        monkeypatch.undo()


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ODD, ids=lambda layer: layer.name)
def test_gate_passes_every_right_implementation(layer, dtype, pass_name):
    problems = make_problems(layer, 2, dtype, pass_name, "cpu")
    expected = gate.reference(problems["contiguous"])
    with torch.no_grad():
        for candidate in implementations.implementations():
            for layout in candidate.layouts:
                if candidate.declines(problems[layout]):
                    continue
                verdict = gate.check(
                    candidate.prepare(problems[layout])(), expected, gate.tolerance(problems[layout])
                )
                assert verdict.ok, f"{candidate.name} {layout}: {verdict.reason}"


def test_channels_last_problems_have_channels_last_weights():
    problem = make_problems(TINY, 2, "float32", "forward", "cpu")["channels_last"]
    expected = torch.nn.Conv2d(6, 6, 5, groups=6).to(memory_format=torch.channels_last).weight
    assert problem.weight.stride() == expected.stride()
    assert problem.input.is_contiguous(memory_format=torch.channels_last)


def _damaged(damage):
    """An implementation that is right but for ``damage``."""

    def prepare(problem):
        run = implementations.prepare_conv2d(problem)
        return lambda: damage(run().clone())

    return implementations.Implementation("damaged", prepare, layouts=("contiguous",))


def _one_element(value):
    def damage(result):
        result.view(-1)[result.numel() // 2] = value
        return result

    return damage


DAMAGES = {
    "one element lost": _one_element(0.0),
    "one element not a number": _one_element(float("nan")),
    "one element infinite": _one_element(float("inf")),
    "shifted by one": lambda result: result.roll(1, dims=-1),
    "slightly scaled": lambda result: result * 1.0005,
    "all zero": torch.zeros_like,
    "another shape": lambda result: result[..., :-1],
}


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_wrong_result_is_never_timed(damage, pass_name):
    wrong = _damaged(damage)
    rows = depthwise_conv2d.measure_cell(TINY, "float32", pass_name, QUICK, [wrong, implementations.CONV2D])
    row = next(row for row in rows if row["implementation"] == "damaged")
    assert not row["correct"] and row["reason"]
    assert row["time"] is None and row["gflops"] is None and row["ratio"] is None
    json.dumps(row, allow_nan=False)
    assert all(other["best_peer"].startswith("conv2d") for other in rows if other is not row)
    line = next(line for line in report.format_cell(rows).splitlines() if "damaged" in line)
    assert "WRONG, not timed" in line and "ms (" not in line


def test_one_lost_element_among_many_is_noticed():
    expected = torch.randn(4, 64, 200, 200, dtype=torch.float64)
    result = expected.float()
    assert gate.check(result, expected, 1e-5).ok
    result[2, 5, 100, 3] = float(expected[2, 5, 100, 3]) + 0.01
    assert not gate.check(result, expected, 1e-5).ok


def test_an_implementation_that_raises_is_a_wrong_row():
    def prepare(problem):
        raise RuntimeError("no such kernel\nand a trace")

    broken = implementations.Implementation("broken", prepare)
    rows = depthwise_conv2d.measure_cell(TINY, "float32", "forward", QUICK, [broken])
    assert [row["reason"] for row in rows] == ["RuntimeError: no such kernel"] * 2
    assert all(row["time"] is None and row["error"] is None for row in rows)


def test_tolerance_grows_with_the_sum_and_with_tf32():
    problem = make_problems(TINY, 2, "float32", "forward", "cpu")["contiguous"]
    assert gate.tolerance(problem) == pytest.approx(1e-7 + 1e-6 * 25**0.5)
    assert gate.tolerance(problem, tf32=True) > 1e-3 / 2


# --- measuring --------------------------------------------------------------------------------------------


def test_every_candidate_is_timed_in_turns():
    calls = []
    budget = measure.Budget(seconds=0.0, turns=3, least=2, most=50)
    times = measure.time_cpu({name: lambda name=name: calls.append(name) for name in "ab"}, budget)
    assert calls == ["a", "b", "a", "b"]
    for name in "ab":
        summary = times[name].summary()
        assert summary["repeats"] == 2
        assert 0 <= summary["min"] <= summary["median"] <= summary["max"]


def test_the_first_call_of_a_turn_counts_only_when_slow(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call(durations):
        remaining = list(durations)

        def run():
            clock[0] += remaining.pop(0)

        return run

    assert measure._turn_cpu(call([0.2, 0.1, 0.1]), 1.0, 2) == pytest.approx([0.1, 0.1])
    assert measure._turn_cpu(call([3.0]), 1.0, 5) == pytest.approx([3.0])


def test_rotated_inputs_exceed_the_cache():
    assert measure.input_sets(400 << 20, 50 << 20) == 1
    assert measure.input_sets(40 << 20, 50 << 20) == 4
    assert measure.input_sets(1, 50 << 20) == 8


class _FakeGpu:
    """Enough of torch.cuda to run the GPU timer on a CPU: events read a clock that calls advance."""

    def __init__(self, monkeypatch):
        gpu = self
        self.clock, self.calls, self.flushes = 0.0, [], 0

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.clock

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(measure, "_flusher", lambda *arguments: self._flush)

    def _flush(self):
        self.flushes += 1
        self.clock += 1000.0  # must not be counted

    def call(self, name, index, milliseconds):
        def run():
            self.calls.append((name, index))
            self.clock += milliseconds

        return run


def test_gpu_timer_rotates_inputs_and_leaves_the_flush_out(monkeypatch):
    gpu = _FakeGpu(monkeypatch)
    runs = {
        "fast": [gpu.call("fast", i, 0.5) for i in range(3)],
        "slow": [gpu.call("slow", i, 80.0) for i in range(3)],
    }
    times = measure.time_cuda(runs, 1, 1, measure.Budget(seconds=0.1, turns=5, most=100))
    assert times["fast"].summary()["median"] == pytest.approx(0.5e-3)
    assert times["slow"].summary()["max"] == pytest.approx(80e-3)
    assert times["fast"].summary()["repeats"] > 3 * times["slow"].summary()["repeats"]
    fast = [index for name, index in gpu.calls if name == "fast"]
    assert set(fast) == {0, 1, 2} and fast[3:6] == [0, 1, 2]
    assert gpu.flushes == len(gpu.calls)


def test_contention_measures_others_not_itself():
    with Contention() as contention:
        torch.randn(400, 400) @ torch.randn(400, 400)
    assert contention.cores is None or contention.cores >= 0


# --- rows, files, comparison ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One short run of the command line: its JSON, its picture and what it was asked."""
    folder = tmp_path_factory.mktemp("bench")
    path, picture = folder / "run.json", folder / "run.png"
    patch = pytest.MonkeyPatch()
    patch.setattr(measure, "QUICK", measure.Budget(seconds=0.01, turns=2, most=10))
    patch.setattr(depthwise_conv2d, "ATTEMPTS", {True: 1})
    patch.setattr(roofline, "_MATRIX", {"cpu": 128})
    patch.setattr(roofline, "_COPY_BYTES", {"cpu": 1 << 20})
    patch.setattr(roofline, "_best_seconds", lambda run, device: (run(), 1e-3)[1])
    arguments = (
        "depthwise_conv2d --suite inceptionnext --filter 7x7 --quick --batch 2 --dtype float32 bfloat16"
    )
    status = cli.main([*arguments.split(), "--json", str(path), "--plot", str(picture)])
    patch.undo()
    return status, path, picture


def test_json_rows_can_be_read_alone(written):
    status, path, _ = written
    assert status == 0
    content = report.load(path)
    rows = content["rows"]
    # three layers, two dtypes, three passes; lkconv and conv2d in two layouts, torch.fft in float32 alone
    assert len(rows) == 3 * 3 * (5 + 4)
    for row in rows:
        assert {"cpu", "isa", "threads"} <= row["machine"].keys()
        assert {"torch", "lkconv", "commit"} <= row["versions"].keys()
        assert row["batch"] == 2 and row["parent_channels"] == 768 and row["channels"] == 96
        assert row["layout"] in LAYOUTS and row["pass"] in PASSES and row["correct"]
        time = row["time"]
        assert 0 < time["min"] <= time["median"] <= time["max"] and time["repeats"] >= 2
        assert row["gflops"] == pytest.approx(row["flops"] / time["median"] * 1e-9)
        assert row["gbps"] == pytest.approx(row["bytes"] / time["median"] * 1e-9)
        assert 0 <= row["error"] <= row["tolerance"]
        assert bool(row["algorithm"]) == (row["implementation"] == "lkconv")
        peers = [r for r in rows if r["implementation"] != "lkconv" and _cell(r) == _cell(row)]
        best = min(r["time"]["median"] for r in peers)
        assert row["ratio"] == pytest.approx(best / time["median"])


def test_tables_show_the_summary_and_the_asked_layers(written, capsys):
    _, path, _ = written
    name = "InceptionNeXt-T C96 7x7 k1x11"
    assert cli.main(["table", str(path), "--layers", name]) == 0
    printed = capsys.readouterr().out
    rows = report.load(path)["rows"]
    for s in report.summarise(rows):
        start = f"| {s['dtype']} | {s['pass']} | {s['size_class']} | {s['layout']} | 3 |"
        assert f"{start} {s['geomean']:.2f} |" in printed
    ours, best = (
        max(
            r["gflops"]
            for r in rows
            if _cell(r) == (name, "float32", "forward") and (r["implementation"] == "lkconv") == mine
        )
        for mine in (True, False)
    )
    assert f"| float32 | {name}, N=2 | {ours:.0f} / {best:.0f} |" in printed


def _cell(row):
    return row["layer"], row["dtype"], row["pass"]


def test_plot_is_a_picture(written):
    _, _, picture = written
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_base_comparison(written):
    rows = report.load(written[1])["rows"]
    base = json.loads(json.dumps(rows))
    for row in base:
        row["time"]["median"] *= 2
    compared = report.compare(rows, base)
    assert len(compared) == sum(row["implementation"] == "lkconv" for row in rows)
    assert all(
        entry["ratio"] == pytest.approx(2) and entry["adjusted"] == pytest.approx(1) for entry in compared
    )
    assert "2.00x, adjusted 1.00x" in report.format_comparison(rows, base)
    other = [{**row, "batch": 5} for row in base]
    assert report.format_comparison(rows, other) == "base: no row in common"


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0, "rows": []}')
    with pytest.raises(ValueError, match="expected a benchmark file of schema 1, got schema 0"):
        report.load(path)


def _fake_rows(ratios, dtype="float32", pass_name="forward", device="cpu"):
    rows = []
    for i, ratio in enumerate(ratios):
        row = {
            "layer": f"layer {i}",
            "batch": 1,
            "dtype": dtype,
            "pass": pass_name,
            "device": device,
            "correct": True,
        }
        row |= {"size_class": "k>=13", "layout": "contiguous", "implementation": "lkconv", "algorithm": "fft"}
        row |= {
            "ratio": ratio,
            "ratio_conv2d": 10 * ratio,
            "ratio_fft": ratio,
            "best_peer": "torch.fft contiguous",
        }
        rows.append(row)
    return rows


def test_summary_shows_geomean_worst_and_target():
    (summary,) = report.summarise(_fake_rows([8.0, 0.5]))
    assert summary["geomean"] == pytest.approx(2.0)
    assert summary["worst"] == 0.5 and summary["worst_layer"] == "layer 1, N=1"
    assert summary["target"] == 2.0
    assert summary["met"] is False  # the mean is reached; a layer below 0.95x is not
    text = report.format_summary(_fake_rows([8.0, 0.5]))
    assert "losing rows (below 0.95x): 1 of 2" in text and "layer 1" in text
    assert report.summarise(_fake_rows([8.0, 1.0]))[0]["met"] is True


def test_gradients_are_held_to_conv2d_and_to_fft():
    fake = lambda ratios: report.summarise(_fake_rows(ratios, pass_name="backward_weight"))[0]  # noqa: E731
    assert fake([5.0])["target_of"] == "geomean_conv2d"
    assert fake([5.0])["met"] is True  # 50x conv2d, 5x fft
    assert fake([1.5])["met"] is False  # 15x conv2d
    slow_fft = _fake_rows([5.0], pass_name="backward_weight")
    slow_fft[0]["ratio_fft"] = 1.9
    assert report.summarise(slow_fft)[0]["met"] is False


def test_targets_of_the_specification():
    assert targets.target("cpu", "bfloat16", "k>=13", "backward_weight") == 100
    assert targets.target("cuda", "float16", "k>=13", "forward") == 10
    assert targets.target("cpu", "float64", "k>=13", "forward") is None
    assert targets.fft_floor("cpu", "float32", "k>=13", "backward_input") == 2
    assert targets.fft_floor("cpu", "float32", "k>=13", "forward") is None


def test_no_gpu_is_said_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA GPU"):
        cli.main(["depthwise_conv2d", "--device", "cuda"])


# --- the smaller commands ---------------------------------------------------------------------------------


def test_overhead_measures_both_sides(monkeypatch):
    monkeypatch.setattr(overhead, "CALLS", 5)
    monkeypatch.setattr(overhead, "TURNS", 2)
    for behind in (0, 0.5):
        rows = overhead.measure("cpu", behind)
        assert len(rows) == 5
        assert all(row["conv2d"] > 0 and row["lkconv"] > 0 for row in rows)


def test_memory_sees_a_training_step():
    size, map_bytes = (2, 16, 128, 128), 4 * 2 * 16 * 128 * 128
    extra = memory._in_fresh_process("lkconv", size, 7, "cpu")
    assert 2 * map_bytes < 1.1 * extra < 20 * map_bytes  # output and gradient at least


def test_scaling_finds_exponents():
    assert scaling.slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert scaling.slope([1, 2, 4], [1, 4, 16]) == pytest.approx(2)


def test_fft_peer_is_circular_at_the_shortest_length():
    assert [gate.fast_length(n) for n in (1, 7, 11, 47, 71)] == [2, 8, 12, 48, 72]
    strided = make_problems(ODD[1], 1, "float32", "forward", "cpu")["contiguous"]
    assert "stride 1" in implementations.fft_declines(strided)


# --- the demonstration ------------------------------------------------------------------------------------


def test_demo_pictures_and_table(tmp_path):
    for module in ("timm", "skimage", "matplotlib"):
        pytest.importorskip(module)
    from bench import demo, demo_pictures

    photo, bank = demo.photograph(60, 90), demo.gabor_bank()
    assert photo.shape == (1, 3, 60, 90) and 0 <= float(photo.min()) < float(photo.max()) <= 1.01
    assert bank.shape == (32, 1, 31, 31)
    assert bank.sum(dim=(1, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(bank.flatten(1).norm(dim=1), torch.ones(32))
    maps = F.conv2d(photo.mean(1, keepdim=True), bank, padding=15)[0]
    shown = {"before": maps, "after": maps + 1e-7}
    demo_pictures.feature_maps(photo[0], bank[:, 0], shown, demo.WAVELENGTHS, tmp_path / "maps.png")
    row = demo.Comparison("a layer", {"contiguous": 0.2, "channels_last": 0.1}, {"contiguous": 0.05}, 1e-7)
    assert row.ratio == pytest.approx(2)
    demo_pictures.speedups([row], "a machine", tmp_path / "speed.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert "2.00x" in demo.format_table([row])
