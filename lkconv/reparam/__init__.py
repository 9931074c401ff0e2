"""Structural re-parameterization: train several branches, run one convolution.

The algebra (:func:`place`, :func:`fold_batch_norm`, :func:`compose_1x1`, :func:`merge_kernels`), one op that
folds and convolves (:func:`merged_depthwise_conv2d`), the blocks of the published families under their
official names, and :func:`merge` for whole models. ``docs/reparam.md`` has the mathematics and measurements.
"""

from lkconv.reparam.acnet import ACBlock
from lkconv.reparam.algebra import (
    Branch,
    compose_1x1,
    fold_batch_norm,
    identity_kernel,
    merge_kernels,
    place,
)
from lkconv.reparam.block import BranchSumBlock, ReparamBlock
from lkconv.reparam.branches import ConvBN, run_branches
from lkconv.reparam.csla import LinearAddBlock
from lkconv.reparam.dbb import DiverseBranchBlock
from lkconv.reparam.fastvit import FastViTReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from lkconv.reparam.functional import merged_depthwise_conv2d
from lkconv.reparam.geometry import Geometry
from lkconv.reparam.merging import merge
from lkconv.reparam.mobileone import FastViTMobileOneBlock, MobileOneBlock
from lkconv.reparam.orepa import OREPA
from lkconv.reparam.planner import use_training_path
from lkconv.reparam.refconv import RefConv
from lkconv.reparam.replknet import ReparamLargeKernelConv
from lkconv.reparam.repmlp import RepMLPBlock
from lkconv.reparam.repoptimizer import RepAdamW, RepSGD, block_multiplier, gradient_multipliers
from lkconv.reparam.repvgg import RepVGGBlock, TimmRepVGGBlock
from lkconv.reparam.repvit import RepVGGDW
from lkconv.reparam.resrep import CompactorLayer, ResRepBlock, fold_compactor
from lkconv.reparam.slak import SLaKReparamLargeKernelConv
from lkconv.reparam.unireplknet import DILATED_BRANCHES, DilatedReparamBlock, fold_unireplknet_block

__all__ = [
    "DILATED_BRANCHES",
    "OREPA",
    "ACBlock",
    "Branch",
    "BranchSumBlock",
    "CompactorLayer",
    "ConvBN",
    "DilatedReparamBlock",
    "DiverseBranchBlock",
    "FastViTMobileOneBlock",
    "FastViTReparamLargeKernelConv",
    "Geometry",
    "LinearAddBlock",
    "MobileOneBlock",
    "RefConv",
    "RepAdamW",
    "RepConditionalPosEnc",
    "RepMLPBlock",
    "RepMixer",
    "RepSGD",
    "RepVGGBlock",
    "RepVGGDW",
    "ReparamBlock",
    "ReparamLargeKernelConv",
    "ResRepBlock",
    "SLaKReparamLargeKernelConv",
    "TimmRepVGGBlock",
    "block_multiplier",
    "compose_1x1",
    "fold_batch_norm",
    "fold_compactor",
    "fold_unireplknet_block",
    "gradient_multipliers",
    "identity_kernel",
    "merge",
    "merge_kernels",
    "merged_depthwise_conv2d",
    "place",
    "run_branches",
    "use_training_path",
]
