"""``python -m bench reparam``: which rows there are, that they agree, and what is written."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from bench import reparam
from bench.__main__ import main

FAMILIES = (
    "RepLKNet", "UniRepLKNet", "MobileOne", "RepMixer", "SLaK", "RepViT", "RepCPE", "RefConv", "RepVGG",
    "ACNet", "DBB", "OREPA", "RepMLP",
)  # fmt: skip


def rows_of(name, mode, size=8):
    make, (channels, _) = next(
        (make, where) for label, make, where in reparam.BLOCKS if label.startswith(name)
    )
    side = 14 if name == "RepMLP" else size
    x = torch.randn(1, channels, side, side)
    return reparam.measure(reparam.without_kinks(make()), x, mode, "float32", repeats=1)


def test_every_family_has_a_row():
    names = [name.split(" ")[0] for name, _, _ in reparam.BLOCKS]
    assert set(names) == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "training", "inference"),
    [
        (
            "RepLKNet",
            {"branches", "fused", "recompute", "default"},
            {"branches", "folding", "merged", "plain"},
        ),
        (
            "RepMixer",
            {"branches", "fused", "recompute", "default"},
            {"branches", "folding", "merged", "plain"},
        ),
        ("SLaK", {"branches", "fused", "recompute", "default"}, {"branches", "folding", "merged"}),
        ("RepViT", {"default"}, {"branches", "folding", "merged", "plain"}),
        ("RepMLP", {"default"}, {"branches", "folding", "merged"}),
        ("RefConv", {"default"}, {"branches", "folding", "merged", "plain"}),
        ("DBB", {"default"}, {"branches", "folding", "merged", "plain"}),
    ],
)
def test_implementations(name, training, inference):
    for mode, ours in (("forward in training", training), ("inference", inference)):
        rows = rows_of(name, mode)
        assert {row["implementation"] for row in rows} == {*reparam.PEERS, *ours}
        assert all("milliseconds" in row and row["peak_bytes"] >= 0 for row in rows)


def test_peak_of_a_call():
    """In a process of its own: what this one has freed, and where, depends on the tests before."""
    code = """if True:
        import torch
        from bench import allocator, memory

        allocator.keep_freed_memory()
        for held in (0, 5 << 20, 3 << 20):
            keep, freed = torch.ones(1 << 18), torch.ones(held)
            del freed
            print(memory.peak_of_a_call(lambda: torch.ones(1 << 22), "cpu"))
            del keep
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) / (4 << 22) for line in done.stdout.split()]
    assert len(peaks) == 3 and all(0.9 <= peak <= 1.3 for peak in peaks), peaks


def test_written_file(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["reparam", "--filter", "RepCPE", "--batch", "1", "--repeats", "1", "--json", str(file)]
    assert main(arguments) == 0
    content, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert content["machine"]["threads"] >= 1 and content["versions"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in printed and "peak" in printed
    assert {row["mode"] for row in content["rows"]} == set(reparam.MODES)
    assert all(row["shape"] == [1, 512, 7, 7] for row in content["rows"])


def test_blocks_have_no_kinks():
    for _, make, _ in reparam.BLOCKS:
        block = reparam.without_kinks(make())
        assert not any(isinstance(m, nn.ReLU) for m in block.children())
