"""The speed this project promises: geometric means over the layers of real models, by device."""

from __future__ import annotations

WORST = 0.95  # no layer below this ratio to its best peer
FFT_FLOOR = 2.0  # the gradients in float32 at k >= 13 against unfused torch.fft, on the CPU

# (device, dtype, size class) -> ratio for forward, backward_input, backward_weight. Forward: to the best
# peer. Backward on the CPU: to the best layout of F.conv2d, with FFT_FLOOR beside it.
_TABLE = {
    ("cpu", "float32", "k>=13"): (2.0, 3.0, 40.0),
    ("cpu", "float32", "k<=11"): (1.1, 1.5, 8.0),
    ("cpu", "bfloat16", "k>=13"): (5.0, 8.0, 100.0),
    ("cpu", "bfloat16", "k<=11"): (1.2, 2.0, 15.0),
    ("cuda", "float32", "k>=13"): (5.0, 5.0, 10.0),
    ("cuda", "bfloat16", "k>=13"): (10.0, 10.0, 20.0),
    ("cuda", "float16", "k>=13"): (10.0, 10.0, 20.0),
    ("cuda", "float32", "k<=11"): (1.3, 1.5, 5.0),
    ("cuda", "bfloat16", "k<=11"): (1.3, 1.5, 5.0),
    ("cuda", "float16", "k<=11"): (1.3, 1.5, 5.0),
    ("cuda", "float64", "k<=11"): (1.3, 1.5, 5.0),
}
_COLUMN = {"forward": 0, "backward_input": 1, "backward_weight": 2}


def target(device: str, dtype: str, size_class: str, pass_name: str) -> float | None:
    """The promised geometric mean, or None where nothing is promised (half and double on CPUs)."""
    row = _TABLE.get((device, dtype, size_class))
    return row[_COLUMN[pass_name]] if row else None


def target_is_against_conv2d(device: str, pass_name: str) -> bool:
    """Whether the promise is a ratio to the best layout of F.conv2d rather than to the best peer of all."""
    return device == "cpu" and pass_name != "forward"


def fft_floor(device: str, dtype: str, size_class: str, pass_name: str) -> float | None:
    large_gradient = size_class == "k>=13" and pass_name != "forward"
    return FFT_FLOOR if device == "cpu" and dtype == "float32" and large_gradient else None
