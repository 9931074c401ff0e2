"""Depthwise convolutions of different windows on slices of the channels (Inception-style splits)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference_group_mix
from .._validate import check_convolved, check_operand, computed_dtype
from ..functional import PLAIN, in_plain_eager_mode
from .segmented_registration import NAME, ONES, Segments, eager, same_padding


def _segment_channels(
    input: Tensor, weights: Sequence[Tensor | None], splits: Sequence[int] | None
) -> list[int]:
    channels = input.shape[1]
    if splits is None:
        if sum(w is None for w in weights) > 1:
            raise ValueError("splits must be given when weights has more than one identity segment (None)")
        rest = channels - sum(w.shape[0] for w in weights if w is not None)
        splits = [rest if w is None else w.shape[0] for w in weights]
    splits = list(splits)
    if len(splits) != len(weights):
        raise ValueError(f"splits must have one entry per weight, {len(weights)}, got {len(splits)}")
    if sum(splits) != channels or any(n < 0 for n in splits):
        raise ValueError(f"splits must be non-negative and sum to input's {channels} channels, got {splits}")
    return splits


def _check_shapes(index: int, weight: Tensor | None, bias: Tensor | None, channels: int) -> None:
    """Raises what does not fit a segment of ``channels`` channels."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"biases[{index}] must be None where weights[{index}] is None")
        return
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(f"weights[{index}] must be ({channels}, 1, kh, kw), got {tuple(weight.shape)}")
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weights[{index}] must have an odd window, got {tuple(weight.shape[2:])}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"biases[{index}] must have shape {(channels,)}, got {tuple(bias.shape)}")


def _checked(
    input: Tensor, weights: Segments, biases: Segments | None, splits: Sequence[int] | None
) -> tuple[list[Tensor | None], list[int]]:
    """One bias or None and the channels of every segment."""
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    given: list[Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    if len(given) != len(weights):
        raise ValueError(f"biases must have one entry per weight, {len(weights)}, got {len(given)}")
    channels = _segment_channels(input, weights, splits)
    for i, (w, b, n) in enumerate(zip(weights, given, channels, strict=True)):
        _check_shapes(i, w, b, n)
        if w is not None:
            check_convolved(input)
        check_operand(f"weights[{i}]", w, input)
        check_operand(f"biases[{i}]", b, input)
    if (input.shape[2] == 0 or input.shape[3] == 0) and any(w is not None for w in weights):
        raise ValueError(f"input must have positive height and width, got shape {tuple(input.shape)}")
    return given, channels


def segmented_depthwise_conv2d(
    input: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    splits: Sequence[int] | None = None,
) -> Tensor:
    """Convolves slices of the channels with windows of their own, "same" padding, stride 1.

    The token mixer of InceptionNeXt (arXiv 2303.16900) is ``weights=[None, w3x3, w1x11, w11x1]``. One op,
    which reads slices of the input and writes slices of the output in place: no result of a convolution is
    copied. The input's gradient is the same op, and weights' gradients read slices in place.
    Under autocast the whole input enters in autocast's dtype, what identities pass on as well.

    Args:
        input: (N, C, H, W), of a dtype that :func:`lkconv.depthwise_conv2d` takes.
        weights: one (c_i, 1, kh, kw) with odd kh and kw per segment, or None for an identity.
        biases: one (c_i,) or None per segment; None for no biases. Both in input's dtype.
        splits: channels of the segments, zero among them; taken from the weights when at most one of them is
            None.

    Returns:
        (N, C, H, W), the segments in order, in input's dtype (or autocast's) and memory format.

    Raises:
        TypeError: a weight's or bias's dtype is not input's.
        ValueError: ``input`` is not 4-D, ``biases`` or ``splits`` has not one entry per weight, ``splits`` is
            missing with several identities, a weight, bias or split does not fit its segment, a window is
            even, or devices differ.
    """
    given, splits = _checked(input, weights, biases, splits)
    dtype = computed_dtype(input)
    namespace = _namespace(input, dtype, weights, splits)
    if namespace is None or input.layout is not torch.strided:
        return reference_group_mix.segmented_depthwise_conv2d(input.to(dtype), weights, given, splits)
    weights = list(weights)
    plain = all(t is None or type(t) in PLAIN for t in (input, *weights, *given))
    if plain and not torch.compiler.is_compiling() and in_plain_eager_mode():
        return eager(namespace, input, weights, given, splits)
    return getattr(torch.ops, namespace).segmented_depthwise_conv2d.default(input, weights, given, splits)


def _namespace(input: Tensor, dtype: torch.dtype, weights: Segments, splits: Sequence[int]) -> str | None:
    """The op namespace of the backend that takes every segment, None for plain PyTorch."""
    if torch.compiler.is_compiling():
        return backends.namespace(input.device, dtype, NAME)
    choice = backends.choose(input.device, dtype, NAME)
    for weight, channels in zip(weights, splits, strict=True):
        if choice.name != "cuda" or weight is None or channels == 0:
            continue
        size = (input.shape[0], channels, *input.shape[2:])
        problem = (size, channels, tuple(weight.shape[2:]), ONES, same_padding(weight), ONES)
        channels_last = input.stride(1) == 1 and channels > 1
        choice = backends.choose_for(choice, input.device, dtype, problem, channels_last, NAME)
    return None if choice.ops is None else choice.ops.forward.namespace
