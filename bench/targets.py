"""The speed this project promises: geometric means over the layers of real models, by device."""

from __future__ import annotations

WORST = 0.95  # no layer below this ratio to its best peer
FFT_FLOOR = 2.0  # the gradients in float32 at k >= 13 against unfused torch.fft, on the CPU

COPY_SHARE = 0.75  # of copy bandwidth: what a GPU's forward pass at k <= 11 may reach instead of its ratio
LATENCY = 0.2e-3  # seconds of the bfloat16 forward pass at (64, 384, 32, 32), k = 31, on an H200
TRITON = 1.5  # times the CUDA kernels' time that Triton's may take at k >= 13
# Forward pass at (64, 384, R, R), k = 31, in float32 on a GPU: map size R -> ratio to the best peer.
PUBLISHED_TABLE = {16: 20.0, 32: 15.0, 64: 15.0}

_SMALL_ON_GPUS = (1.3, 1.5, 5.0)  # in any precision
# (device, precision, size class) -> ratio for forward, backward_input, backward_weight. Forward: to the best
# peer. Backward on the CPU: to the best layout of F.conv2d, with FFT_FLOOR beside it.
_TABLE = {
    ("cpu", "float32", "k>=13"): (2.0, 3.0, 40.0),
    ("cpu", "float32", "k<=11"): (1.1, 1.5, 8.0),
    ("cpu", "bfloat16", "k>=13"): (5.0, 8.0, 100.0),
    ("cpu", "bfloat16", "k<=11"): (1.2, 2.0, 15.0),
    ("cuda", "float32", "k>=13"): (5.0, 5.0, 10.0),
    ("cuda", "bfloat16", "k>=13"): (10.0, 10.0, 20.0),
    ("cuda", "float16", "k>=13"): (10.0, 10.0, 20.0),
    **{
        ("cuda", precision, "k<=11"): _SMALL_ON_GPUS
        for precision in ("bfloat16", "float16", "float32", "tf32", "float64")
    },
}
_COLUMN = {"forward": 0, "backward_input": 1, "backward_weight": 2}


def target(device: str, precision: str, size_class: str, pass_name: str) -> float | None:
    """The promised geometric mean, or None where nothing is promised (half and double on CPUs)."""
    row = _TABLE.get((device, precision, size_class))
    return row[_COLUMN[pass_name]] if row else None


def promised(device: str) -> list[tuple[str, str, str]]:
    """Every (precision, size class, pass) of a device that has a target."""
    rows = [(precision, size_class) for where, precision, size_class in _TABLE if where == device]
    return [(*row, pass_name) for row in rows for pass_name in _COLUMN]


def copy_share(device: str, size_class: str, pass_name: str) -> float | None:
    """The share of copy bandwidth that counts as well as the target ratio, or None."""
    return COPY_SHARE if device == "cuda" and size_class == "k<=11" and pass_name == "forward" else None


def target_is_against_conv2d(device: str, pass_name: str) -> bool:
    """Whether the promise is a ratio to the best layout of F.conv2d rather than to the best peer of all."""
    return device == "cpu" and pass_name != "forward"


def fft_floor(device: str, precision: str, size_class: str, pass_name: str) -> float | None:
    large_gradient = size_class == "k>=13" and pass_name != "forward"
    return FFT_FLOOR if device == "cpu" and precision == "float32" and large_gradient else None
