"""Group-Mix attention (GroupMixFormer, arXiv 2311.15157): fused aggregation, attention core and modules."""

from .aggregate import group_mix_aggregate
from .aggregator import GroupMixAggregator
from .modules import GroupMixAttention, GroupMixBlock
from .segmented import segmented_depthwise_conv2d

__all__ = [
    "GroupMixAggregator",
    "GroupMixAttention",
    "GroupMixBlock",
    "group_mix_aggregate",
    "segmented_depthwise_conv2d",
]
