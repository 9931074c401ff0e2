"""The convolutions that every backend is tested on, in one list, and the tensors they run on.

A :class:`Case` names sizes alone. :func:`make_tensors` fills them with reproducible random values, and
:func:`place` stores a tensor in one of the memory layouts of :data:`LAYOUTS`, surrounded by NaN so that a
kernel that reads outside its tensor cannot go unnoticed.
"""

import dataclasses
import zlib

import torch

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One depthwise convolution: input (N, C, H, W), weight (C * multiplier, 1, kh, kw)."""

    size: tuple[int, int, int, int]
    kernel: Pair
    padding: Pair = (0, 0)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    multiplier: int = 1
    bias: bool = True

    @property
    def channels(self) -> int:
        return self.size[1]

    @property
    def out_channels(self) -> int:
        return self.channels * self.multiplier

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.out_channels, 1, *self.kernel)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        h, w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return (self.size[0], self.out_channels, h, w)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """stride, padding, dilation: the last arguments of every op."""
        return list(self.stride), list(self.padding), list(self.dilation)

    def __str__(self) -> str:
        text = "x".join(map(str, self.size)) + "-k" + "x".join(map(str, self.kernel))
        for letter, value, usual in (
            ("p", self.padding, (0, 0)),
            ("s", self.stride, (1, 1)),
            ("d", self.dilation, (1, 1)),
        ):
            if value != usual:
                text += f"-{letter}{value[0]}x{value[1]}"
        return (
            text + (f"-m{self.multiplier}" if self.multiplier > 1 else "") + ("" if self.bias else "-nobias")
        )


def same(size: tuple[int, int, int, int], kernel: Pair, **more) -> Case:
    """Stride 1 and the padding that keeps an odd kernel's image size."""
    dilation = more.get("dilation", (1, 1))
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Case(size, kernel, padding, **more)


# Every kernel family, every kind of geometry, channel counts on both sides of every vector width; small
# enough for an emulator.
CORE = [
    same((2, 3, 9, 11), (3, 3)),
    same((1, 17, 14, 14), (5, 5)),
    same((2, 16, 10, 12), (7, 7), bias=False),
    same((1, 33, 8, 9), (7, 7)),
    same((3, 1, 13, 7), (3, 5)),
    same((2, 5, 20, 20), (13, 13)),
    same((1, 4, 28, 28), (27, 27)),
    same((1, 18, 33, 31), (31, 31), bias=False),
    # Strips and rectangles.
    same((2, 6, 18, 15), (1, 11)),
    same((2, 6, 18, 15), (11, 1)),
    same((1, 9, 24, 24), (21, 5)),
    same((1, 9, 24, 24), (5, 21)),
    # Even kernels, one-sided by nature.
    Case((2, 5, 12, 13), (2, 2)),
    Case((1, 7, 12, 13), (4, 6), padding=(2, 3)),
    Case((1, 3, 40, 30), (16, 20), padding=(8, 10), bias=False),
    # The kernel is larger than the image; the padding is larger than the kernel.
    same((2, 4, 7, 7), (13, 13)),
    same((1, 5, 6, 9), (31, 31)),
    same((1, 3, 12, 5), (1, 51)),
    Case((1, 5, 5, 6), (3, 3), padding=(7, 9)),
    Case((1, 2, 9, 8), (9, 8)),
    # Thin and tiny images.
    same((2, 19, 1, 40), (1, 7)),
    same((2, 19, 40, 1), (7, 1)),
    same((1, 3, 1, 1), (5, 5)),
    same((4, 8, 1, 17), (3, 3)),
    Case((1, 1, 1, 1), (1, 1)),
    same((2, 35, 6, 6), (1, 1)),
    # Stride and dilation, equal and not, sharing factors and not.
    Case((2, 5, 15, 17), (3, 3), padding=(1, 1), stride=(2, 2)),
    Case((1, 17, 16, 19), (7, 7), padding=(3, 3), stride=(2, 1)),
    Case((2, 5, 15, 41), (3, 6), padding=(1, 2), stride=(1, 2)),
    Case((2, 3, 33, 35), (5, 4), padding=(2, 5), stride=(2, 2), bias=False),
    Case((1, 4, 9, 70), (7, 1), padding=(4, 0), stride=(2, 2)),
    Case((1, 3, 20, 23), (5, 4), padding=(2, 0), stride=(3, 2)),
    Case((1, 6, 21, 22), (2, 2), stride=(3, 3), bias=False),
    same((1, 5, 20, 22), (7, 7), dilation=(3, 3)),
    same((2, 4, 25, 25), (3, 3), dilation=(7, 7)),
    same((1, 7, 19, 14), (5, 3), dilation=(1, 4)),
    same((1, 2, 36, 40), (11, 9), dilation=(2, 3), bias=False),
    Case((1, 5, 24, 27), (5, 5), padding=(4, 6), stride=(2, 3), dilation=(2, 2)),
    Case((1, 3, 30, 18), (4, 3), padding=(3, 5), stride=(3, 2), dilation=(6, 4)),
    # Channel multipliers.
    same((2, 3, 9, 10), (3, 3), multiplier=2),
    same((1, 11, 12, 12), (7, 7), multiplier=3),
    Case((2, 4, 14, 15), (7, 7), padding=(3, 3), stride=(2, 2), multiplier=2),
    same((1, 5, 24, 20), (23, 23), multiplier=3, bias=False),
    # Nothing to do.
    same((0, 5, 8, 8), (3, 3)),
    same((0, 4, 20, 20), (27, 27)),
]

# Tiles in both axes, many images and real layers: for machines that run at full speed.
LARGE = [
    Case((1, 2, 200, 150), (31, 31), padding=(15, 15)),
    Case((1, 3, 300, 40), (25, 25), padding=(3, 20), bias=False),
    Case((1, 2, 40, 400), (9, 63), padding=(4, 31)),
    same((1, 5, 150, 170), (3, 3)),
    same((1, 3, 160, 300), (5, 5), dilation=(2, 2)),
    Case((1, 3, 260, 280), (5, 7), padding=(2, 3), stride=(2, 2)),
    Case((2, 17, 70, 90), (9, 9), padding=(4, 4), dilation=(1, 1), multiplier=2),
    same((8, 24, 14, 14), (13, 13)),
    same((2, 64, 28, 28), (7, 7)),
    same((1, 34, 56, 56), (31, 31)),
    same((2, 12, 49, 49), (5, 51)),
]


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, case: Case) -> torch.Tensor:
    """The convolution as PyTorch computes it, in the arguments' dtype."""
    return torch.nn.functional.conv2d(
        x, weight, bias, case.stride, case.padding, case.dilation, groups=case.channels
    )


def seed_of(case: Case) -> int:
    return zlib.crc32(str(case).encode())


@dataclasses.dataclass(frozen=True)
class Tensors:
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    grad_output: torch.Tensor


def make_tensors(case: Case, dtype: torch.dtype, layout: str = "contiguous", sample: int = 0) -> Tensors:
    """Random tensors of the case; input and grad_output are stored in `layout`. `sample` draws others."""
    random = torch.Generator().manual_seed(seed_of(case) + sample)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    bias = normal(case.out_channels) if case.bias else None
    return Tensors(
        place(normal(*case.size), layout),
        normal(*case.weight_size),
        bias,
        place(normal(*case.output_size), layout),
    )


def _inside(t: torch.Tensor, before: list[int], after: list[int]) -> torch.Tensor:
    """`t` as a slice of a tensor of NaN that is wider on each axis, in t's own memory format."""
    size = [b + n + a for b, n, a in zip(before, t.shape, after, strict=True)]
    wide = t.new_full(size, float("nan"))
    if not t.is_contiguous():
        wide = wide.contiguous(memory_format=torch.channels_last)
    view = wide
    for axis, (b, n) in enumerate(zip(before, t.shape, strict=True)):
        view = view.narrow(axis, b, n)
    return view.copy_(t)


def _every_other(t: torch.Tensor, step: list[int]) -> torch.Tensor:
    wide = t.new_full([n * s for n, s in zip(t.shape, step, strict=True)], float("nan"))
    return wide[tuple(slice(None, None, s) for s in step)].copy_(t)


def _stored_as(t: torch.Tensor, order: list[int]) -> torch.Tensor:
    """`t` with its axes stored in `order`, slowest first."""
    inverse = sorted(range(4), key=order.__getitem__)
    return t.permute(order).contiguous().permute(inverse)


def _offset(t: torch.Tensor) -> torch.Tensor:
    """Starts one element into its storage, so no vector load is aligned."""
    return t.new_full((t.numel() + 1,), float("nan"))[1:].copy_(t.flatten()).view(t.shape)


def _expanded(t: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The first element of each named axis, repeated by a stride of zero."""
    if 0 in t.shape:
        return t
    small = t
    for axis in axes:
        small = small.narrow(axis, 0, 1)
    return small.clone().expand(t.shape)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return _stored_as(t, [0, 2, 3, 1])  # where sizes of 1 leave a choice, .contiguous() would change nothing


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "channel_slice": lambda t: _inside(t, [0, 2, 0, 0], [0, 3, 0, 0]),
    "channel_slice_channels_last": lambda t: _inside(_channels_last(t), [0, 1, 0, 0], [0, 4, 0, 0]),
    "spatial_slice": lambda t: _inside(t, [0, 0, 1, 2], [0, 0, 2, 1]),
    "spatial_slice_channels_last": lambda t: _inside(_channels_last(t), [1, 0, 2, 1], [0, 0, 1, 2]),
    "strided": lambda t: _every_other(t, [1, 1, 2, 3]),
    "strided_channels": lambda t: _every_other(t, [2, 3, 1, 1]),
    "transposed": lambda t: _stored_as(t, [0, 1, 3, 2]),
    "permuted": lambda t: _stored_as(t, [2, 1, 0, 3]),
    "batch_innermost": lambda t: _stored_as(t, [3, 2, 1, 0]),
    "misaligned": _offset,
    "expanded_batch_and_channels": lambda t: _expanded(t, (0, 1)),
    "expanded_image": lambda t: _expanded(t, (2, 3)),
    "expanded_everywhere": lambda t: _expanded(t, (0, 1, 2, 3)),
}


def place(t: torch.Tensor, layout: str) -> torch.Tensor:
    """`t` stored in one of :data:`LAYOUTS`. An expanded layout repeats some of t's values instead."""
    return LAYOUTS[layout](t)
