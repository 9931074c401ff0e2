"""Where the taps of one convolution fall inside the kernel of another: integer arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

Pair = tuple[int, int]
_AXES = ("height", "width")


def to_pair(name: str, value: Any) -> Pair:
    """An int or a sequence of two ints as a tuple; anything else is a TypeError or ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | tuple | list):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class Geometry:
    """Everything about a 2-D convolution but its values; pairs are (height, width), in pixels.

    A negative padding crops the input instead, as ACNet does when its padding is below half its kernel. The
    constructor takes pairs as they are; :meth:`make` checks.
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"

    @staticmethod
    def make(
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> Geometry:
        """A Geometry from ints or pairs, as the arguments of ``nn.Conv2d`` are written.

        Raises:
            TypeError: if one that should be is neither an int nor a pair.
            ValueError: for a sequence of another length, or if kernel size, stride, dilation or groups is
                below 1.
        """
        geometry = Geometry(
            to_pair("kernel_size", kernel_size),
            to_pair("stride", stride),
            to_pair("padding", padding),
            to_pair("dilation", dilation),
            groups,
            padding_mode,
        )
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(geometry, name)) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(geometry, name)}")
        if groups < 1:
            raise ValueError(f"groups must be positive, got {groups}")
        return geometry

    @staticmethod
    def of(conv: nn.Conv2d) -> Geometry:
        """The geometry of a layer.

        Raises:
            ValueError: for ``padding="same"`` where it is asymmetric, as for an even kernel.
        """
        padding: Any = conv.padding
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if any(t % 2 for t in total):
                raise ValueError(
                    f"padding='same' of an even kernel {conv.kernel_size} is asymmetric and cannot be merged"
                )
            padding = (total[0] // 2, total[1] // 2)
        return Geometry.make(
            conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups, conv.padding_mode
        )

    def excess(self) -> Pair:
        """2 p - d (k - 1) per axis: how much wider than its input a stride-1 output is."""
        h, w = (
            2 * p - d * (k - 1) for p, d, k in zip(self.padding, self.dilation, self.kernel_size, strict=True)
        )
        return h, w


class Placement(NamedTuple):
    """Tap (u, v) of a branch lies at (offset[0] + u step[0], offset[1] + v step[1]) of the target kernel."""

    offset: Pair
    step: Pair


def _place_axis(branch: Geometry, target: Geometry, axis: int, label: str) -> tuple[int, int]:
    """Offset and step along one axis, or a ValueError that names the violated condition."""
    name = _AXES[axis]
    size, branch_size = target.kernel_size[axis], branch.kernel_size[axis]
    grid, dilation = target.dilation[axis], branch.dilation[axis]
    shift = target.padding[axis] - branch.padding[axis]
    step = dilation // grid if branch_size > 1 else 1
    if shift % grid or (branch_size > 1 and dilation % grid):
        raise ValueError(
            f"{label}: taps at {shift} + {dilation} u along {name} are not multiples of the target dilation "
            f"{grid}"
        )
    offset = shift // grid
    if offset < 0:
        raise ValueError(
            f"{label}: padding {branch.padding[axis]} along {name} exceeds the target padding "
            f"{target.padding[axis]}, so its first tap falls outside the {size}-tap target kernel"
        )
    last = offset + step * (branch_size - 1)
    if last > size - 1:
        raise ValueError(
            f"{label}: kernel {branch_size}, dilation {dilation} and padding {branch.padding[axis]} along "
            f"{name} put its last tap at {last}, outside the {size}-tap target kernel"
        )
    return offset, step


def place_geometry(
    branch: Geometry, target: Geometry, label: str = "branch", input_size: Pair | None = None
) -> Placement:
    """Where a branch's taps lie in the target kernel.

    A branch tap u reads the input at ``u r - p_b``, the target's tap t at ``t R - p``; equating both gives
    t = (u r + p - p_b) / R along each axis.

    Args:
        branch, target: the two geometries; stride and groups must agree, padding modes must be zeros.
        label: how error messages call the branch.
        input_size: (H, W), where known. Two strided convolutions may agree in output size for some inputs
            only; without it they must agree for all.

    Raises:
        ValueError: naming the branch and the violated condition.
    """
    for who, geometry in ((label, branch), ("target", target)):
        if geometry.padding_mode != "zeros":
            raise ValueError(f"{who}: padding_mode must be 'zeros' to merge, got {geometry.padding_mode!r}")
    if branch.stride != target.stride:
        raise ValueError(f"{label}: stride {branch.stride} differs from the target stride {target.stride}")
    if branch.groups != target.groups:
        raise ValueError(f"{label}: groups {branch.groups} differs from the target groups {target.groups}")
    axes = [_place_axis(branch, target, axis, label) for axis in (0, 1)]
    for axis, (ours, theirs) in enumerate(zip(branch.excess(), target.excess(), strict=True)):
        if ours == theirs:
            continue
        stride = target.stride[axis]
        if (
            input_size is not None
            and (input_size[axis] + ours - 1) // stride == (input_size[axis] + theirs - 1) // stride
        ):
            continue
        where = "" if input_size is None else f" for an input of {input_size[axis]}"
        raise ValueError(
            f"{label}: its output {_AXES[axis]} differs from the target's{where}: "
            f"2 padding - dilation (kernel - 1) is {ours} against {theirs}"
        )
    return Placement((axes[0][0], axes[1][0]), (axes[0][1], axes[1][1]))
