"""``bench/gpu_check.sh`` without a GPU: programs that only note their calls stand in for the real ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from processes import ROOT, run

SCRIPT = ROOT / "bench" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("bash", "timeout", "tar")) or sys.platform != "linux",
    reason="needs bash, GNU timeout and tar",
)
VARIABLES = ("PYTHONUNBUFFERED", "PYTORCH_NO_CUDA_MEMORY_CACHING", "TORCH_CUDA_ARCH_LIST", "LKCONV_CUDA")
STAND_IN = f"""#!{sys.executable} -S
import json, os, sys, time
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([words, {{name: os.environ.get(name) for name in {VARIABLES}}}]) + "\\n")
line = " ".join(words)
if "--help" in words:
    print(os.environ["OPTIONS"])
elif "get_device_capability" in line:
    print(os.environ.get("ARCHITECTURE", "9.0a"))
elif "--json" in words:
    open(words[words.index("--json") + 1], "w").write("{{}}")
elif "table" in words:
    print("| a table |")
if os.environ.get("SLOW") in words:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit("interrupted")
sys.exit(os.environ.get("WRONG") in words)
"""


class Call:
    """One finished run of the script: what it printed, what it called, what it left."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.out, self.work, notes = folder / "out", folder / "work", folder / "notes"
        tools = folder / "bin"
        for name in ("python3", "compute-sanitizer"):
            (tools / name).parent.mkdir(parents=True, exist_ok=True)
            (tools / name).write_text(STAND_IN)
            (tools / name).chmod(0o755)
        settings = {
            "PATH": f"{tools}:{os.environ['PATH']}", "NOTES": str(notes), "OUT": str(self.out),
            "WORK": str(self.work), "OPTIONS": "--kernel-name arg --device", "PYTHON": "python3",
            "RESULTS": str(folder / "results"), **environment,
        }  # fmt: skip
        done = run(["bash", str(SCRIPT), *arguments], env=settings)
        self.status, self.printed, self.errors = done.returncode, done.stdout, done.stderr
        lines = notes.read_text().splitlines() if notes.exists() else []
        self.calls = [json.loads(line) for line in lines]

    def named(self, *words: str) -> list[tuple[list[str], dict]]:
        return [(w, env) for w, env in self.calls if all(word in w for word in words)]

    def order(self) -> list[str]:
        """The names of the logs that steps wrote, in the order of the steps."""
        return re.findall(r"^([\w-]+): (?:done|FAILED|not run)", self.printed, re.MULTILINE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Call(tmp_path_factory.mktemp("whole"), BUDGET="3000")


ORDER = [
    "build", "info", "test", "memcheck", "racecheck", "table", "table-tf32", "layers", "layers-tf32",
    "layers-float64", "triton", "reparam", "group_mix",
]  # fmt: skip


def test_every_step_runs_correctness_first(whole):
    assert whole.status == 0, whole.printed + whole.errors
    assert whole.order() == ORDER
    assert "all steps done" in whole.printed


def test_the_module_is_built_for_the_present_gpu(whole):
    ((_, environment),) = whole.named("setup.py", "build_ext")
    assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0a" and environment["LKCONV_CUDA"] == "1"
    assert all(environment["PYTHONUNBUFFERED"] == "1" for _, environment in whole.calls)


def test_all_files_with_gpu_tests_are_run(whole, request):
    """Those known here, and those of every test that this run of pytest collected."""
    ((words, _),) = [call for call in whole.named("pytest", "gpu") if "-n" in call[0]]
    ran = {word for word in words if word.startswith("tests/")}
    collected = {Path(i.path).name for i in request.session.items if i.get_closest_marker("gpu")}
    known = ("cuda_gpu", "cuda_group_mix_gpu", "triton_gpu", "triton_group_mix", "triton_normalised_branches")
    known += ("backends", "reparam_merge_depthwise_kernels")
    assert {f"tests/test_{name}.py" for name in known} | {f"tests/{name}" for name in collected} <= ran


def test_sanitizers_look_at_our_kernels_alone(whole):
    for tool in ("memcheck", "racecheck"):
        ((words, environment),) = whole.named("compute-sanitizer", tool)
        assert words[words.index("--kernel-name") + 1] == "kns=lkconv"
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert words[words.index("--error-exitcode") + 1] != "0"
    others = [env for words, env in whole.calls if words[0] != "compute-sanitizer"]
    assert not any(env["PYTORCH_NO_CUDA_MEMORY_CACHING"] for env in others)


def test_sanitized_cases_exist_and_reach_what_they_should(whole):
    ((words, _), *_) = whole.named("compute-sanitizer", "memcheck")
    expression = words[words.index("-k") + 1]
    files = [word for word in words if word.startswith("tests/")]
    done = run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-k", expression, *files]
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    cases = {name.partition("[")[2] for name in names if "::test_case[" in name}
    sizes = re.search(r"test_case and \((.*?)\)", expression)[1].split(" or ")
    assert len(cases) == len(sizes) * 3 * 4  # passes; dtypes with algorithms
    for part in (
        "-s2x1",
        "-s3x2-d6x4",
        "-d3x3",
        "-m2",
        "-m3",
        "-nhwc",
        "-slice",
        "backward_weight-bf16-toeplitz",
    ):
        assert any(part in case for case in cases), part
    assert any("test_aggregate" in name for name in names) and any(
        "test_attention_core" in name for name in names
    )


def test_older_sanitizers_spell_the_filter_differently(tmp_path):
    call = Call(tmp_path, "sanitize", OPTIONS="--kernel-regex arg")
    ((words, _),) = call.named("compute-sanitizer", "racecheck")
    assert words[words.index("--kernel-regex") + 1] == "kns=lkconv"
    assert call.order() == ["info", "memcheck", "racecheck"]


def test_measurements_share_the_budget(whole):
    budgets = {}
    for words, _ in whole.named("bench", "depthwise_conv2d"):
        budgets[Path(words[words.index("--json") + 1]).stem] = int(words[words.index("--budget") + 1])
    assert list(budgets) == [name for name in ORDER if name.startswith(("table", "layers", "triton"))]
    assert all(seconds > 100 for seconds in budgets.values()) and budgets["table"] > budgets["table-tf32"]
    ((words, _),) = whole.named("--backend")
    assert words[words.index("--backend") + 1 :][:2] == ["cuda", "triton"]
    assert len(whole.named("--tf32")) == 2


def test_limits_add_up_to_the_budget(whole):
    """Nothing took any time here, so each step was given its share of nearly everything."""
    limits = [int(n) for n in re.findall(r"done in \d+ s of (\d+)$", whole.printed, re.MULTILINE)]
    assert len(limits) == len(ORDER) and limits[-1] >= 2900
    weight_of_build = 40 / 115
    assert limits[0] == pytest.approx(weight_of_build * 2975, rel=0.01)


def test_everything_is_in_the_archive(whole):
    files = sorted(path.name for path in whole.out.iterdir())
    important = ["group_mix.json", "layers.json", "reparam.json", "table.json", "triton.json"]
    assert files == sorted(["gpu_check.tar.gz", "summary.md", *important])
    with tarfile.open(whole.out / "gpu_check.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {f"{name}.log" for name in ORDER} <= names
    measured = [name for name in ORDER if name.startswith(("table", "layers", "triton"))]
    assert {"reparam.json", "group_mix.json"} <= names
    assert {f"{name}.{kind}" for name in measured for kind in ("json", "md")} | {"all.md"} <= names
    summary = (whole.out / "summary.md").read_text()
    assert "- racecheck: done" in summary and summary.rstrip().endswith("| a table |")


def test_results_gather_where_they_are_kept_for_comparisons(whole, tmp_path):
    kept = {path.name for path in (whole.out.parent / "results").iterdir()}
    measured = [name for name in ORDER if name.startswith(("table", "layers", "triton", "reparam", "group"))]
    assert kept == {f"gpu-{name}.json" for name in measured}
    call = Call(tmp_path, "triton", RESULTS="")
    assert call.status == 0 and not (tmp_path / "results").exists()
    assert "`gpu-*`" in (ROOT / "bench" / "results" / "README.md").read_text()


def test_suites_of_classifiers_and_dense_prediction_are_measured(whole):
    ((words, _),) = [c for c in whole.named("--suite", "slak") if "--tf32" not in c[0]]
    suites = words[words.index("--suite") + 1 : words.index("--dtype")]
    assert suites == ["replknet", "unireplknet", "convnext", "slak", "inceptionnext", "dense_prediction"]


def test_blocks_are_measured_where_their_benchmarks_can(whole, tmp_path):
    for name in ("reparam", "group_mix"):
        ((words, _),) = whole.named("bench", name, "--json")
        assert words[words.index("--device") + 1] == "cuda"
    call = Call(tmp_path, "blocks", OPTIONS="--threads")
    assert call.status == 0 and not call.named("--json")
    assert "group_mix: not run (python -m bench group_mix has no --device)" in call.printed


def test_a_failed_step_is_named_and_stops_nothing(tmp_path):
    call = Call(tmp_path, "sanitize", "table", WRONG="memcheck")
    assert call.status == 1
    assert call.order() == ["info", "memcheck", "racecheck", "table", "table-tf32"]
    assert "failed: memcheck (exit 1)" in call.printed and "failed: racecheck" not in call.printed
    assert "failed: memcheck (exit 1)" in (tmp_path / "out" / "summary.md").read_text()


def test_a_step_that_takes_too_long_is_interrupted(tmp_path):
    call = Call(tmp_path, "--budget", "15", "test", "table", SLOW="pytest", RESERVE="1")
    assert call.status == 1 and "failed: test (out of time)" in call.printed
    assert "interrupted" in (tmp_path / "work" / "test.log").read_text()
    assert call.order() == ["info", "test", "table", "table-tf32"]


def test_nothing_starts_without_time(tmp_path):
    call = Call(tmp_path, "--budget", "12", "test")
    assert call.status == 1 and "failed: test (no time left)" in call.printed
    assert not call.named("pytest") and (tmp_path / "out" / "gpu_check.tar.gz").exists()


def test_calls_add_to_what_is_there(tmp_path):
    Call(tmp_path, "table")
    with tarfile.open(Call(tmp_path, "sanitize").out / "gpu_check.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"table.json", "memcheck.log"} <= names


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["tests"], {}, "there is no step 'tests'"),
        (["--budget", "soon"], {}, "the budget must be a whole number of seconds, got 'soon'"),
        (["--budget"], {}, "got ''"),
        ([], {"ARCHITECTURE": ""}, "sees no CUDA GPU"),
    ],
)
def test_wrong_calls_are_refused(arguments, environment, message, tmp_path):
    call = Call(tmp_path, *arguments, **environment)
    assert call.status == 2 and message in call.errors
    assert not call.named("setup.py") and not call.out.joinpath("gpu_check.tar.gz").exists()
