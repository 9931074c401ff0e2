"""The choice of a backend, what ``explain`` and ``build_info`` say about it, and the fallback order."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import lkconv
import processes
from lkconv import backends, kernel_resources

X, W = torch.randn(2, 4, 20, 18), torch.randn(8, 1, 7, 5)
NAMES = ("cpu", "cuda", "triton", "torch")


def ops_run(function):
    with profile() as recorded:
        function()
    return {e.name for e in recorded.events()}


def call():
    return lkconv.depthwise_conv2d(X, W, padding=(3, 2))


def test_cpu_is_automatic():
    assert lkconv.explain(X, W).backend == "cpu"
    assert "lkconv::depthwise_conv2d" in ops_run(call)


def test_use_backend_changes_what_runs_and_nests():
    with lkconv.use_backend("torch"):
        assert "aten::conv2d" in ops_run(call) and "lkconv::depthwise_conv2d" not in ops_run(call)
        with lkconv.use_backend("cpu"):
            assert lkconv.explain(X, W).backend == "cpu"
        assert lkconv.explain(X, W).backend == "torch"
        torch.testing.assert_close(call(), F.conv2d(X, W, None, 1, (3, 2), 1, 4))
    assert lkconv.explain(X, W).backend == "cpu"


def test_use_backend_ends_with_an_exception_and_serves_as_a_decorator():
    with pytest.raises(KeyError), lkconv.use_backend("torch"):
        raise KeyError
    assert lkconv.explain(X, W).backend == "cpu"
    assert lkconv.use_backend("torch")(lambda: lkconv.explain(X, W).backend)() == "torch"


def test_use_backend_is_of_one_thread():
    seen = []
    with lkconv.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(lkconv.explain(X, W).backend))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("name", ["gpu", "", None, 1])
def test_unknown_backend(name):
    with (
        pytest.raises(ValueError, match="backend must be one of cpu, cuda, triton, torch; got"),
        lkconv.use_backend(name),
    ):
        pass


def test_a_request_that_cannot_be_met_falls_back_and_says_so(caplog):
    backends._choices.clear()
    with lkconv.use_backend("cuda"), caplog.at_level("WARNING", "lkconv"):
        report = lkconv.explain(X, W)
        torch.testing.assert_close(call(), F.conv2d(X, W, None, 1, (3, 2), 1, 4))
    assert report.backend == "cpu"
    assert dict(report.alternatives)["cuda"] == "asked for, but takes CUDA tensors, not cpu"
    assert [r.getMessage() for r in caplog.records] == [
        "backend cuda declines cpu tensors of torch.float32: takes CUDA tensors, not cpu"
    ]


def run_python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env={**os.environ, **env}
    )
    return done.returncode, done.stdout, done.stderr


def test_environment_variable():
    code = "import torch, lkconv; x = torch.zeros(1, 1, 5, 5); print(lkconv.explain(x, x).backend)"
    assert run_python(code, LKCONV_BACKEND="torch")[:2] == (0, "torch\n")
    rc, _, error = run_python(code, LKCONV_BACKEND="tpu")
    assert (
        rc == 1 and "ValueError: LKCONV_BACKEND must be one of cpu, cuda, triton, torch; got 'tpu'" in error
    )


# --- the order, as a function of device and dtype ---------------------------------------------------------


def choose(device, dtype=torch.float32, request=None):
    return backends._decide(request, torch.device(device), dtype)


def test_other_devices_and_dtypes_go_to_torch():
    for device in ("meta", "mps"):
        assert choose(device).name == "torch"
    choice = choose("cpu", torch.complex64)
    assert choice.name == "torch" and choice.ops is None
    assert dict(choice.declined)["cpu"] == "takes float64, float32, float16 and bfloat16, not complex64"


def test_every_other_backend_has_a_reason():
    for device in ("cpu", "cuda", "meta"):
        choice = choose(device)
        assert sorted([choice.name, *(n for n, _ in choice.declined)]) == sorted(NAMES)
        assert all(reason for _, reason in choice.declined)


def test_cuda_without_its_module_declines_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "_cuda_module", (None, "it was left out"))
    assert dict(choose("cuda").declined)["cuda"] == "it was left out"


class CudaModule:
    """Stands for lkconv._C_cuda."""

    @staticmethod
    def architectures():
        return ["sm_80", "sm_90a", "compute_90a"]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of a compute capability, as far as questions about it go."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def test_cuda_comes_before_triton(monkeypatch, gpu):
    gpu(9, 0)
    monkeypatch.setattr(backends, "_cuda_module", (CudaModule, ""))
    choice = choose("cuda")
    assert choice.name == "cuda" and choice.ops.forward is torch.ops.lkconv.depthwise_conv2d.default


def test_cuda_declines_a_gpu_that_no_compiled_image_runs_on(monkeypatch, gpu):
    monkeypatch.setattr(backends, "_cuda_module", (CudaModule, ""))
    gpu(12, 0)
    choice = choose("cuda:0")
    assert choice.name == "triton"
    assert dict(choice.declined)["cuda"] == (
        "compiled for sm_80, sm_90a, compute_90a, this GPU is sm_120: "
        "build lkconv with TORCH_CUDA_ARCH_LIST=12.0"
    )
    gpu(7, 5)
    choice = choose("cuda:0")
    assert choice.name == "torch" and "this GPU is sm_75" in dict(choice.declined)["cuda"]
    assert "older than 8.0" in dict(choice.declined)["triton"]


def test_a_gpu_that_is_not_there_is_not_asked(monkeypatch, gpu):
    """Fake tensors may be of any device: they are traced for another machine."""
    monkeypatch.setattr(backends, "_cuda_module", (CudaModule, ""))
    gpu(7, 5)
    assert choose("cuda:3").name == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("cuda:0").name == "cuda"


def test_without_the_cuda_module_triton_computes_cuda_tensors(monkeypatch, gpu):
    pytest.importorskip("triton")
    gpu(9, 0)
    monkeypatch.setattr(backends, "_cuda_module", (None, "it was left out"))
    backends._choices.clear()
    assert backends.choose(torch.device("cuda:0"), torch.float32).name == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or FakeTensorMode would use the GPU
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.empty(X.shape, device="meta"))
        w = mode.from_tensor(torch.empty(W.shape, device="meta"))
        x.fake_device = w.fake_device = torch.device("cuda:0")
        with RecordedOps() as ops:
            y = lkconv.depthwise_conv2d(x, w, padding=(3, 2))
    assert ops.names == ["lkconv_triton::depthwise_conv2d"]
    assert y.device.type == "cuda" and tuple(y.shape) == (2, 8, 20, 18)


class RecordedOps(TorchDispatchMode):
    """The lkconv ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace.startswith("lkconv"):
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def test_a_backend_that_gave_up_declines_unless_it_is_asked_for(monkeypatch, gpu):
    gpu(9, 0)
    monkeypatch.setattr(backends, "_cuda_module", (None, "it was left out"))
    device = torch.device("cuda:0")
    assert backends.choose(device, torch.float32).name == "triton"
    backends.give_up("triton", device, torch.float32, "depthwise_conv2d", "it broke")
    choice = backends.choose(device, torch.float32)
    assert choice.name == "torch" and dict(choice.declined)["triton"] == "it broke"
    assert backends.choose(device, torch.float16).name == "triton"
    assert backends.choose(device, torch.float32, "group_mix").name == "triton"
    with lkconv.use_backend("triton"):
        assert backends.choose(device, torch.float32).name == "triton"
    backends._gave_up.clear()


def test_retried_functions_meet_the_next_backend():
    seen = []

    @backends.retried
    def call(value):
        seen.append(value)
        if len(seen) == 1:
            raise backends.GaveUp("the first backend failed")
        return value

    assert call(5) == 5 and seen == [5, 5]
    seen[:] = []

    @backends.retried
    def broken():
        seen.append(0)
        raise ValueError("of another kind")

    with pytest.raises(ValueError, match="of another kind"):
        broken()
    assert seen == [0], "only a backend that gave up is a reason to try again"


def test_broken_triton_module_declines(monkeypatch):
    monkeypatch.setitem(sys.modules, "lkconv.triton_kernels", None)  # what a failed import looks like
    assert "lkconv.triton_kernels failed to load" in dict(choose("cuda").declined)["triton"]


def test_triton_says_whether_it_is_available(monkeypatch):
    class Module:
        @staticmethod
        def is_available(device):
            return False, f"no Triton for {device.type}"

    monkeypatch.setitem(sys.modules, "lkconv.triton_kernels", Module)
    assert dict(choose("xpu").declined)["triton"] == "no Triton for xpu"


def test_triton_interpreter_takes_cpu_tensors_but_not_bfloat16(monkeypatch):
    class Module:
        @staticmethod
        def is_available(device):
            return True, ""

    declines = {b.name: b.declines for b in backends.BACKENDS}["triton"]
    monkeypatch.setitem(sys.modules, "lkconv.triton_kernels", Module)
    cpu = torch.device("cpu")
    assert "TRITON_INTERPRET=1" in declines(cpu, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert declines(cpu, torch.float32) is None
    assert declines(cpu, torch.bfloat16) == "Triton's interpreter does not do bfloat16"


def test_namespace_matches_the_choice():
    assert backends.namespace(torch.device("cpu"), torch.float32) == "lkconv"
    assert backends.namespace(torch.device("meta"), torch.float32) is None


# --- explain and build_info -------------------------------------------------------------------------------


def test_explain_fields():
    report = lkconv.explain(X, W, padding=(3, 2))
    assert report.algorithm in ("direct", "planar", "fft", "toeplitz")
    assert report.isa == lkconv._C.active_isa()
    assert len(report.tile) == 2 and report.flops > 0 and report.scratch_bytes >= 0
    assert set(report.passes) == {"forward", "backward_input", "backward_weight"}
    names = [name for name, _ in report.alternatives]
    assert {"cuda", "triton", "torch"} <= set(names) and any(n.startswith("cpu:") for n in names)
    assert all(reason for _, reason in report.alternatives)


def test_explain_report():
    text = str(lkconv.explain(X, W, padding=(3, 2)))
    lines = text.splitlines()
    assert "input (2, 4, 20, 18) float32 on cpu" in lines[0]
    assert lines[1] == "backend: cpu"
    report = lkconv.explain(X, W, padding=(3, 2))
    for name, reason in report.alternatives:
        assert f"  not {name}: {reason}" in lines
    for name in report.passes:
        assert any(line.startswith(f"{name}: ") for line in lines)


def test_explain_says_how_tensors_are_read():
    def read(size, kernel, layout=torch.contiguous_format, **options):
        x = torch.zeros(size).to(memory_format=layout)
        weight = torch.zeros(size[1], 1, *kernel)
        plan = lkconv.explain(x, weight, padding=tuple(k // 2 for k in kernel), **options).passes["forward"]
        return plan, str(plan)

    strip, line = read((8, 64, 20, 28), (27, 1), torch.channels_last)
    assert strip.exchanged and strip.tile[0] == 20 and "rows and columns exchanged" in line
    plane, line = read((8, 768, 7, 7), (7, 7))
    assert (plane.copied == "planes") == ("planes copied" in line)
    sweep, line = read((8, 8, 56, 56), (3, 3))
    assert sweep.swept == ("row after row" in line)
    flat, line = read((8, 96, 14, 14), (3, 3))
    assert flat.flat == ("outputs counted through" in line)
    row, line = read((8, 128, 28, 28), (1, 55))
    assert row.strip == ("a band of taps" in line)
    if lkconv._C.active_isa() == "avx512":
        assert plane.copied and sweep.swept and flat.flat and row.strip


@pytest.mark.parametrize(
    "switch, algorithm",
    [({}, "fft"), ({"LKCONV_FFT": "0"}, "not fft"), ({"LKCONV_ALGORITHM": "direct"}, "direct")],
)
def test_explain_names_the_switch_that_turned_the_fft_off(switch, algorithm):
    code = """
import torch, lkconv
report = lkconv.explain(torch.zeros(1, 8, 64, 64), torch.zeros(8, 1, 31, 31), padding=15)
print(report.algorithm, dict(report.alternatives).get("cpu:fft"), sep="|")
"""
    done = processes.run([sys.executable, "-c", code], env=switch)
    assert done.returncode == 0, done.stderr
    chosen, reason = done.stdout.strip().split("|")
    assert chosen == algorithm or (algorithm == "not fft" and chosen != "fft")
    if switch:
        assert reason == "=".join(*switch.items())


def test_an_unknown_algorithm_is_an_error():
    code = "import torch, lkconv; lkconv.depthwise_conv2d(torch.zeros(1, 8, 6, 6), torch.zeros(8, 1, 3, 3))"
    done = processes.run([sys.executable, "-c", code], env={"LKCONV_ALGORITHM": "quick"})
    assert done.returncode == 1 and "direct, planar, fft, toeplitz or aten; got 'quick'" in done.stderr


def test_explain_of_torch_unbatched_same_and_autocast():
    with lkconv.use_backend("torch"):
        report = lkconv.explain(X[0], W, padding="same")
    assert report.backend == "torch" and "convolution" in report.algorithm
    assert report.flops == 2 * 20 * 18 * 8 * 35
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in str(lkconv.explain(X, W))
    assert "(1, 4, 21, 18)" in str(lkconv.explain(X[0], torch.zeros(4, 1, 4, 5), padding="same"))


def test_explain_of_opaque_tensors():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    report = lkconv.explain(X.to_mkldnn(), W)
    assert report.backend == "torch" and "strided" in dict(report.alternatives)["cpu"]


def test_build_info():
    info = lkconv.build_info()
    assert info.version == lkconv.__version__ and torch.__version__ in info.torch
    assert "baseline" in info.isas_compiled
    text = str(info)
    for isa in info.isas_compiled:
        assert isa in text
    assert info.isa_active in text and info.compiler in text and "GPU architectures" in text
    assert info.cuda_module or info.cuda_reason in text
    assert bool(info.kernels) != bool(info.kernels_reason) and info.kernels_reason in text
    if info.kernels:
        assert {k.architecture for k in info.kernels} == {
            a for a in info.gpu_architectures if a.startswith("sm_")
        }


def test_command_line_prints_build_info():
    done = subprocess.run([sys.executable, "-m", "lkconv"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    info = lkconv.build_info()
    table = kernel_resources.table(info.kernels) if info.kernels else ""
    assert done.stdout.strip() == f"{info}\n{table}".strip()


@pytest.mark.gpu
def test_gpu_has_a_backend_and_agrees():
    x, w = X.cuda(), W.cuda()
    assert lkconv.explain(x, w).backend in ("cuda", "triton")
    torch.testing.assert_close(
        lkconv.depthwise_conv2d(x, w).cpu(), F.conv2d(X, W, groups=4), rtol=1e-4, atol=1e-4
    )
