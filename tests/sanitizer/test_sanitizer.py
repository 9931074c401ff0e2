"""The CPU kernels without torch, under AddressSanitizer and UndefinedBehaviorSanitizer: see fuzz.cpp."""

import concurrent.futures
import os
import shutil
from pathlib import Path

import pytest

from processes import ROOT, exclusive, run

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "sanitizer"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "c++"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,vptr",  # AddressSanitizer sees what these would; half of the compile time
    "-fno-sanitize-recover=all",
    "-ffp-contract=fast",
    "-Wno-psabi",
    f"-I{CSRC}",
]
ENVIRONMENT = {
    # No detect_stack_use_after_return: before GCC 13.3 its frames are misaligned for 64-byte vectors.
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:allocator_may_return_null=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
PROCESSES = 2
CONVOLUTIONS = 1500  # per process
MERGES = 2000
BRANCHES = 300
SEGMENTS = 600

pytestmark = pytest.mark.slow


def sources() -> list[Path]:
    """Everything of the CPU backend but its binding to torch."""
    return sorted(p for p in (CSRC / "cpu").glob("*.cpp") if not p.name.endswith("_ops.cpp"))


def compile_object(source: Path) -> Path:
    target = OUTPUT / f"{source.stem}.o"
    inputs = [source, Path(__file__), *HERE.glob("*.h"), *CSRC.glob("*.h"), *(CSRC / "cpu").glob("*.h")]
    if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
        return target
    # fuzz.cpp has a scratch allocator of its own; the library's one is compiled under another name.
    rename = ["-Dthread_scratch_bytes=library_scratch_bytes"] if source.name == "machine.cpp" else []
    done = run([COMPILER, *FLAGS, *rename, "-c", str(source), "-o", str(target)], timeout=480)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@pytest.fixture(scope="module")
def fuzz() -> str:
    """The compiled program; objects are kept between runs."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    probe = OUTPUT / "probe.cpp"
    probe.write_text("int main() {}\n")
    if run([COMPILER, *FLAGS, str(probe), "-o", str(OUTPUT / "probe")]).returncode != 0:
        pytest.skip(f"{COMPILER} has no address and undefined-behaviour sanitizers")
    with exclusive("sanitizer"), concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        slowest_first = sorted([*sources(), *HERE.glob("*.cpp")], key=lambda p: "kernels" not in p.name)
        objects = list(pool.map(compile_object, slowest_first))
        program = OUTPUT / "fuzz"
        if not program.exists() or program.stat().st_mtime < max(o.stat().st_mtime for o in objects):
            done = run([COMPILER, *FLAGS, *map(str, objects), "-o", str(program), "-pthread"])
            assert done.returncode == 0, done.stderr[-4000:]
    return str(program)


def execute(program: str, *arguments: object, **switches: str) -> str:
    done = run([program, *map(str, arguments)], env={**ENVIRONMENT, **switches})
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_the_sanitizers_see_the_kernels(fuzz):
    """The kernels' own object code reports to the sanitizers: an unsanitized build would prove nothing."""
    symbols = run(["nm", "-C", str(OUTPUT / "kernels_baseline.o")]).stdout
    assert "__asan_report_load" in symbols and "__ubsan_handle" in symbols


def test_random_convolutions(fuzz):
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        firsts = [1 + i * CONVOLUTIONS for i in range(PROCESSES)]
        printed = list(pool.map(lambda first: execute(fuzz, first, CONVOLUTIONS), firsts))
    assert all(f"{CONVOLUTIONS} convolutions, 0 failures" in text for text in printed)


def test_random_convolutions_without_fft(fuzz):
    assert "0 failures" in execute(fuzz, 900001, CONVOLUTIONS // 3, LKCONV_FFT="0")


@pytest.mark.parametrize("algorithm", ["direct", "planar"])
def test_random_convolutions_by(fuzz, algorithm):
    """Small images too, where the planner would choose another."""
    assert "0 failures" in execute(fuzz, 800001, CONVOLUTIONS // 2, LKCONV_ALGORITHM=algorithm)


def test_random_merges(fuzz):
    assert f"{MERGES} merges, 0 failures" in execute(fuzz, "merge", 1, MERGES)


def test_random_scaled_sums(fuzz):
    assert f"{MERGES} sums, 0 failures" in execute(fuzz, "sum", 1, MERGES)


def test_random_sums_of_branches(fuzz):
    assert f"{BRANCHES} sums of branches, 0 failures" in execute(fuzz, "branches", 1, BRANCHES)


def test_random_segments(fuzz):
    assert f"{SEGMENTS} outputs of segments, 0 failures" in execute(fuzz, "segments", 1, SEGMENTS)


def test_tensors_wider_than_31_bits(fuzz):
    execute(fuzz, "far")
