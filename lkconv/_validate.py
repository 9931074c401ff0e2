"""Checks of user arguments: every error names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from lkconv.ops import AUTOCAST_DEVICES, autocast_dtype

Pair = tuple[int, int]
NO_EXTRA = (0, 0)
MOST_PADDING = 2**60  # kLargestReach of csrc/op_arguments.h: sums of a few such numbers fit 64 bits

# What F.conv2d takes on some device; lkconv leaves the last two lines of it to F.conv2d.
CONVOLVED = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.complex64, torch.complex128, torch.complex32),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
)


def pair(name: str, value: Any, least: int) -> Pair:
    """``value``, an int or a sequence of one or two, as a pair of ints not below ``least``."""
    if type(value) is int:
        if value >= least:
            return value, value
    elif type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value
    return _unusual_pair(name, value, least)


def _unusual_pair(name: str, value: Any, least: int) -> Pair:
    expected = f"{name} must be an int or a pair of ints, each at least {least}; got {value!r}"
    values = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    if len(values) not in (1, 2):
        raise ValueError(expected)
    numbers = [_integer(v, expected) for v in values]
    if any(v < least for v in numbers):
        raise ValueError(expected)
    return numbers[0], numbers[-1]


def _integer(value: Any, expected: str) -> int:
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a symbolic int stays symbolic
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(f"{expected} (a bool)")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{expected} ({type(value).__name__})") from None


def padding_pair(padding: Any, kernel_size: Any, stride: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Padding as a pair, and the rows and columns that "same" adds at the bottom and right alone.

    "same" pads ``dilation * (kernel - 1)`` in total; where that is odd the extra row or column is the
    last one, as in ``torch.nn.functional.conv2d``.
    """
    if not isinstance(padding, str):
        return pair("padding", padding, 0), NO_EXTRA
    if padding == "valid":
        return (0, 0), NO_EXTRA
    if padding != "same":
        raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid'; got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1; got stride {stride}")
    total = (dilation[0] * (kernel_size[0] - 1), dilation[1] * (kernel_size[1] - 1))
    return (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)


def check_types(input: Any, weight: Any, bias: Any) -> None:
    """Tensors of the right rank, on one device, of one dtype (after autocast)."""
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W); got shape {tuple(input.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be (C*m, 1, kh, kw); got shape {tuple(weight.shape)}")
    check_convolved(input)
    check_operand("weight", weight, input)
    check_operand("bias", bias, input)


def check_convolved(input: Tensor) -> None:
    """A dtype that can be convolved."""
    if input.dtype not in CONVOLVED:
        raise TypeError(
            f"input must be float64, float32, float16 or bfloat16 (or a complex or integer dtype that "
            f"F.conv2d takes); got {input.dtype}"
        )


def check_operand(name: str, value: Tensor | None, input: Tensor) -> None:
    """``input``'s device and, after autocast, dtype."""
    if value is None:
        return
    if value.device != input.device:
        raise ValueError(f"{name} must be on input's device {input.device}; got {value.device}")
    if value.dtype is not input.dtype and computed_dtype(value) is not computed_dtype(input):
        raise TypeError(f"{name} must have input's dtype {input.dtype}; got {value.dtype}")


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that ``tensor`` enters the op with: its own, or autocast's."""
    dtype = tensor.dtype
    if (
        tensor.device.type in AUTOCAST_DEVICES.values()
        and tensor.is_floating_point()
        and dtype != torch.float64
    ):
        return autocast_dtype(tensor) or dtype
    return dtype


def is_strided(input: Tensor, weight: Tensor) -> bool:
    """Whether both are ordinary strided tensors; sparse and oneDNN's opaque ones go to ``F.conv2d``."""
    return input.layout is torch.strided and weight.layout is torch.strided


def check_sizes(
    size: Any,
    weight_size: Any,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    extra: Pair = NO_EXTRA,
) -> None:
    """Channels that fit together and an output that is not empty."""
    channels, height, width = size[-3], size[-2], size[-1]
    out_channels, one, kernel_h, kernel_w = weight_size
    if channels == 0:
        raise ValueError(f"input must have at least one channel; got shape {tuple(size)}")
    if (height == 0 or width == 0) and (len(size) == 3 or size[0] != 0):
        raise ValueError(f"input must have positive height and width; got shape {tuple(size)}")
    if kernel_h == 0 or kernel_w == 0:
        raise ValueError(f"weight must have a positive kernel size; got shape {tuple(weight_size)}")
    if one != 1 or out_channels == 0 or out_channels % channels != 0:
        raise ValueError(
            f"weight must be (C*m, 1, kh, kw) with C = {channels}, the channels of input, and m >= 1; "
            f"got shape {tuple(weight_size)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_channels):
        raise ValueError(
            f"bias must have shape ({out_channels},), weight's channels; got {tuple(bias.shape)}"
        )
    if any(type(p) is int and p > MOST_PADDING for p in padding):
        raise ValueError(f"padding must be at most 2**60; got {padding}")
    reach_h = height + 2 * padding[0] + extra[0] - dilation[0] * (kernel_h - 1)
    reach_w = width + 2 * padding[1] + extra[1] - dilation[1] * (kernel_w - 1)
    if reach_h < 1 or reach_w < 1:
        raise ValueError(
            f"weight's kernel {(kernel_h, kernel_w)} with dilation {dilation} must fit in the padded input; "
            f"got input {(height, width)} and padding {padding}, which leave no output"
        )
