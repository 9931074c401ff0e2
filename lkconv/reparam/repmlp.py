"""RepMLP (https://arxiv.org/abs/2112.11081): convolutions folded into a fully-connected layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkconv.reparam.algebra import Branch, fold_dtype, merge_kernels, module_affine
from lkconv.reparam.block import ReparamBlock, batch_norm, config_of, conv_bn, require
from lkconv.reparam.geometry import Geometry


def toeplitz_matrix(kernel: Tensor, height: int, width: int) -> Tensor:
    """The fully-connected layer over a height x width map that equals a zero-padded depthwise convolution.

    W[s, p, q] = F_s[q - p + k // 2] where that lies in the window, else 0; p indexes outputs, q inputs.

    Args:
        kernel: (S, 1, k, k), k odd.

    Returns:
        (S h w, h w, 1, 1), the weight of a 1x1 convolution in S groups. Differentiable: the gradient of F
        sums the diagonals of that of W.
    """
    size = height * width
    pixels = torch.eye(size, device=kernel.device, dtype=kernel.dtype).reshape(size, 1, height, width)
    responses = F.conv2d(pixels, kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2))  # (q, S, h, w)
    return responses.reshape(size, -1, size).permute(1, 2, 0).reshape(-1, size, 1, 1)


class GlobalPerceptron(nn.Module):
    """``sigmoid(fc2(relu(fc1(mean(x)))))``: one gate per channel, (N, C, 1, 1)."""

    def __init__(self, input_channels: int, internal_neurons: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(input_channels, internal_neurons, 1)
        self.fc2 = nn.Conv2d(internal_neurons, input_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(input.mean((2, 3), keepdim=True)))))


class RepMLPBlock(ReparamBlock):
    """A fully-connected layer over h x w patches plus convolutions on them, merged into the layer ``fc3``.

    Training form: ``fc3`` (no bias), ``fc3_bn``, ``repconv{k}.{conv,bn}``; merged form: ``fc3`` with bias.
    Both have the global perceptron ``gp``.

    Args:
        in_channels, out_channels: equal; a multiple of num_sharesets.
        h, w: the patch; maps must be multiples of it. reparam_conv_k: kernel sizes (odd) of the convolutions.
        globalperceptron_reduce: reduction of the gate. num_sharesets: S, sets of weights; channels are dealt
            to them.
        deploy: build the merged form.

    Shapes: (N, in_channels, H, W) to the same.

    Raises:
        ValueError: if the channel counts differ or are no multiple of num_sharesets, for an even kernel, and
            on a call for an input that the patches do not cover exactly.
    """

    merged_name = "fc3"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        h: int,
        w: int,
        reparam_conv_k: Sequence[int] | None = None,
        globalperceptron_reduce: int = 4,
        num_sharesets: int = 1,
        deploy: bool = False,
    ) -> None:
        require(
            in_channels == out_channels, f"in_channels {in_channels} must equal out_channels {out_channels}"
        )
        require(
            in_channels % num_sharesets == 0,
            f"channels {in_channels} must be a multiple of num_sharesets {num_sharesets}",
        )
        features = h * w * num_sharesets
        super().__init__(features, features, Geometry.make(1, groups=num_sharesets))
        names = (
            "in_channels",
            "out_channels",
            "h",
            "w",
            "reparam_conv_k",
            "globalperceptron_reduce",
            "num_sharesets",
        )
        self._config = config_of(locals(), *names)
        self.C, self.O, self.S, self.h, self.w = in_channels, out_channels, num_sharesets, h, w
        self.deploy = deploy
        self.reparam_conv_k = tuple(reparam_conv_k) if reparam_conv_k else ()
        require(
            all(k % 2 for k in self.reparam_conv_k), f"reparam_conv_k must be odd, got {self.reparam_conv_k}"
        )
        self.gp = GlobalPerceptron(in_channels, in_channels // globalperceptron_reduce)
        self.fc3 = nn.Conv2d(features, features, 1, bias=deploy, groups=num_sharesets)
        self.fc3_bn = nn.Identity() if deploy else batch_norm(num_sharesets)
        if deploy:
            return
        for k in self.reparam_conv_k:
            geometry = Geometry.make(k, 1, k // 2, 1, num_sharesets)
            self.add_module(f"repconv{k}", conv_bn(num_sharesets, num_sharesets, geometry))

    @property
    def is_merged(self) -> bool:
        return isinstance(self.fc3_bn, nn.Identity)

    def _training_children(self) -> list[str]:
        return ["fc3", "fc3_bn", *(f"repconv{k}" for k in self.reparam_conv_k)]

    def _fold(self) -> tuple[Tensor, Tensor]:
        scale, shift = module_affine(self.fc3_bn)
        pixels = self.h * self.w
        weight = self.fc3.weight.to(scale.dtype) * scale.repeat_interleave(pixels).reshape(-1, 1, 1, 1)
        bias = shift
        if self.reparam_conv_k:
            largest = max(self.reparam_conv_k)
            target = Geometry.make(largest, 1, largest // 2, 1, self.S)
            branches = []
            for k in self.reparam_conv_k:
                pair = getattr(self, f"repconv{k}")
                branches.append(
                    Branch(pair.conv.weight, Geometry.of(pair.conv), *module_affine(pair.bn), f"repconv{k}")
                )
            kernel, conv_bias = merge_kernels(branches, target, fold_dtype(weight))
            with torch.autocast(kernel.device.type, enabled=False):
                weight = weight + toeplitz_matrix(kernel, self.h, self.w)
            bias = bias + conv_bias
        return weight, bias.repeat_interleave(pixels)

    def get_equivalent_fc3(self) -> tuple[Tensor, Tensor]:
        """Alias of :meth:`get_equivalent_kernel_bias` (the name in RepMLP)."""
        return self.get_equivalent_kernel_bias()

    def local_inject(self) -> None:
        """Alias of :meth:`reparameterize` (the name in RepMLP)."""
        self.reparameterize()

    def _merge(self) -> None:
        super()._merge()
        self.fc3_bn = nn.Identity().train(self.training)

    def _local(self, patches: Tensor) -> Tensor:
        """The layer and, in the training form, the convolutions on patches (B, S, h, w)."""
        flat = self.fc3(patches.reshape(-1, self.S * self.h * self.w, 1, 1))
        out = self.fc3_bn(flat.reshape(patches.shape))
        if not self.is_merged:
            for k in self.reparam_conv_k:
                out = out + getattr(self, f"repconv{k}")(patches)
        return out

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; H and W are multiples of h and w."""
        n, c, height, width = input.shape
        if c != self.C or height % self.h or width % self.w:
            raise ValueError(
                f"RepMLPBlock: input must be (N, {self.C}, multiple of {self.h}, multiple of {self.w}), got "
                f"{tuple(input.shape)}"
            )
        rows, columns = height // self.h, width // self.w
        patches = input.reshape(n, c, rows, self.h, columns, self.w).permute(0, 2, 4, 1, 3, 5)
        out = self._local(patches.reshape(-1, self.S, self.h, self.w))
        out = out.reshape(n, rows, columns, c, self.h, self.w).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(input.shape) * self.gp(input)
