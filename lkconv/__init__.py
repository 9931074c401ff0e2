"""Fast large-kernel depthwise convolution for PyTorch, on CPUs and GPUs."""

import torch  # noqa: F401  (loads the libraries that the compiled module links to)

from lkconv import reference, reparam
from lkconv._explain import explain
from lkconv._version import __version__
from lkconv.attention import (
    GroupMixAggregator,
    GroupMixAttention,
    GroupMixBlock,
    group_mix_aggregate,
    segmented_depthwise_conv2d,
)
from lkconv.backends import use_backend
from lkconv.build_info import build_info
from lkconv.convert import convert
from lkconv.functional import depthwise_conv2d
from lkconv.modules import DepthwiseConv2d

__all__ = [
    "DepthwiseConv2d",
    "GroupMixAggregator",
    "GroupMixAttention",
    "GroupMixBlock",
    "__version__",
    "build_info",
    "convert",
    "depthwise_conv2d",
    "explain",
    "group_mix_aggregate",
    "reference",
    "reparam",
    "segmented_depthwise_conv2d",
    "use_backend",
]
