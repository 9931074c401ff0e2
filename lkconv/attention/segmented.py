"""Depthwise convolutions of different windows on slices of the channels (Inception-style splits)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import depthwise_conv2d


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


def segmented_depthwise_conv2d(
    input: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    splits: Sequence[int] | None = None,
) -> Tensor:
    """Convolves slices of the channels with windows of their own, "same" padding, stride 1.

    The token mixer of InceptionNeXt (arXiv 2303.16900) is ``weights=[None, w3x3, w1x11, w11x1]``. The
    slices are read in place: no segment of the input is copied. The outputs of the segments are, once, when
    they are put side by side; what an identity passes on has to be written anyway.

    Args:
        input: (N, C, H, W), of a dtype that :func:`lkconv.depthwise_conv2d` takes.
        weights: one (c_i, 1, kh, kw) with odd kh and kw per segment, or None for an identity.
        biases: one (c_i,) or None per segment; None for no biases. Both in input's dtype.
        splits: channels of the segments; taken from the weights when at most one of them is None.

    Returns:
        (N, C, H, W), the segments in order, in input's dtype.

    Raises:
        TypeError: a weight's or bias's dtype is not input's.
        ValueError: ``input`` is not 4-D, ``biases`` or ``splits`` has not one entry per weight, ``splits`` is
            missing with several identities, a weight, bias or split does not fit its segment, or a window is
            even.
    """
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    given = [None] * len(weights) if biases is None else list(biases)
    if len(given) != len(weights):
        raise ValueError(f"biases must have one entry per weight, {len(weights)}, got {len(given)}")
    splits = _segment_channels(input, weights, splits)
    for i, (w, b, n) in enumerate(zip(weights, given, splits, strict=True)):
        if w is None:
            if b is not None:
                raise ValueError(f"biases[{i}] must be None where weights[{i}] is None")
            continue
        if w.dim() != 4 or w.shape[0] != n or w.shape[1] != 1:
            raise ValueError(f"weights[{i}] must be ({n}, 1, kh, kw), got {tuple(w.shape)}")
        if w.shape[2] % 2 == 0 or w.shape[3] % 2 == 0:
            raise ValueError(f"weights[{i}] must have an odd window, got {tuple(w.shape[2:])}")
        if b is not None and tuple(b.shape) != (n,):
            raise ValueError(f"biases[{i}] must have shape {(n,)}, got {tuple(b.shape)}")
    out = [
        x if w is None else depthwise_conv2d(x, w, b, padding=(w.shape[2] // 2, w.shape[3] // 2))
        for x, w, b in zip(input.split(splits, dim=1), weights, given, strict=True)
    ]
    return torch.cat(out, dim=1)
