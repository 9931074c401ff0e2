"""bench.group_mix: the gate, the counts and the rows of one small stage."""

import json

import pytest
import torch

from bench import group_mix, inductor_counts, measure
from bench.__main__ import main


@pytest.mark.parametrize("part", group_mix.PARTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_stage(part, training):
    torch.manual_seed(0)
    budget = measure.Budget(seconds=0.01, turns=1)
    rows = group_mix.measure_stage("M", 4, 40, 7, 2, part, torch.float32, training, False, budget)
    ours, eager = rows
    assert (ours.implementation, eager.implementation) == ("lkconv", "eager")
    assert ours.median and eager.median and ours.ratio == 1.0
    assert ours.error < 1e-4 and eager.error < 1e-4
    assert ours.kernels < eager.kernels and ours.megabytes < eager.megabytes
    assert "40" in group_mix.show(ours)


def test_a_wrong_result_is_not_timed(monkeypatch):
    outputs = group_mix._outputs

    def wrong(part, fused, plain):
        functions = outputs(part, fused, plain)
        return {**functions, "lkconv": lambda x, size: tuple(1.01 * t for t in functions["lkconv"](x, size))}

    monkeypatch.setattr(group_mix, "_outputs", wrong)
    budget = measure.Budget(seconds=0.01, turns=1)
    ours, eager = group_mix.measure_stage("M", 4, 40, 7, 2, "attention", torch.float32, False, False, budget)
    assert ours.median is None and "WRONG" in group_mix.show(ours)
    assert eager.median is not None


def test_one_kernel_in_evaluation():
    """The aggregation is one operator; the chain of PyTorch operators is about twenty."""
    fused, plain = group_mix._modules(40, torch.float32, False)
    counts = []
    for function in group_mix._outputs("aggregation", fused, plain).values():
        x = torch.randn(2, 49, 120)
        with torch.no_grad(), group_mix.Traffic() as traffic:
            function(x, (7, 7))
        counts.append(traffic.kernels)
    assert counts[0] == 1 and 15 <= counts[1] <= 30


def test_compiled_rows_count_kernels_and_bytes():
    """Two pointwise operators become one kernel that reads and writes once; a product is a call."""
    weight = torch.randn(64, 64)
    function = inductor_counts.compiled(lambda x: ((x + 1).relu() @ weight,))
    x = torch.randn(64, 64)
    with inductor_counts.counting() as found:
        function(x)
    assert (found.kernels, found.bytes) == (2, 5 * 64 * 64 * 4)
    with inductor_counts.counting() as again:
        function(x)
    assert (again.kernels, again.bytes) == (0, 0)


def test_the_command_writes_rows(tmp_path):
    path = tmp_path / "rows.json"
    options = ["--model", "M", "--stage", "4", "--part", "aggregation", "--mode", "forward", "--batch", "1"]
    assert main(["group_mix", *options, "--quick", "--device", "cpu", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["machine"]["device"] == "cpu" and "torch" in content["versions"]
    assert [r["implementation"] for r in content["rows"]] == ["lkconv", "eager"]


def test_a_disturbed_measurement_is_repeated_and_marked(monkeypatch):
    class Busy(group_mix.Contention):
        loads = iter([0.9, 0.4, 0.6])

        def __exit__(self, *unused):
            self.cores = next(Busy.loads)

    monkeypatch.setattr(group_mix, "Contention", Busy)
    budget = measure.Budget(seconds=0.01, turns=1)
    rows = group_mix.measure_stage("M", 4, 40, 7, 1, "aggregation", torch.float32, False, False, budget)
    assert rows[0].foreign_cores == 0.4 and "others used 0.4 cores" in group_mix.show(rows[0])
