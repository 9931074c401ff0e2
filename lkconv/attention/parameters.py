"""The parameters of the aggregation, which the functions behind ``group_mix_aggregate`` take together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AggregateParameters(NamedTuple):
    """Four depthwise and four pointwise weights, of segments 1 to 4; the BatchNorms' four weights and biases,
    of segments 0 to 3; LayerNorm's weight and bias. Shapes: :func:`lkconv.group_mix_aggregate`."""

    depthwise: list[Tensor]
    pointwise: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    layer_norm_weight: Tensor
    layer_norm_bias: Tensor

    @staticmethod
    def of(flat: Sequence[Tensor]) -> AggregateParameters:
        """From the 18 tensors of :meth:`flat`."""
        depthwise, pointwise, norm_weights, norm_biases = (list(flat[i : i + 4]) for i in range(0, 16, 4))
        return AggregateParameters(depthwise, pointwise, norm_weights, norm_biases, flat[16], flat[17])

    def flat(self) -> list[Tensor]:
        """All 18 in the order of the fields."""
        return [
            *self.depthwise, *self.pointwise, *self.norm_weights, *self.norm_biases,
            self.layer_norm_weight, self.layer_norm_bias,
        ]  # fmt: skip
