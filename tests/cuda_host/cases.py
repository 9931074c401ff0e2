"""The convolutions that the CUDA kernels are tested on, on the host emulator and on a GPU alike."""

from __future__ import annotations

import dataclasses

Pair = tuple[int, int]
DTYPES = ("f64", "f32", "tf32", "f16", "bf16")
PASSES = ("forward", "backward_input", "backward_weight")
ORDERS = ("forward", "reverse", "random")


@dataclasses.dataclass(frozen=True)
class Case:
    """One depthwise convolution of an input of `size` (N, C, H, W)."""

    size: tuple[int, int, int, int]
    kernel: Pair
    padding: Pair = (0, 0)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    multiplier: int = 1
    layout: str = "nchw"

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def __str__(self) -> str:
        text = "x".join(map(str, self.size)) + "-k" + "x".join(map(str, self.kernel))
        text += "-p" + "x".join(map(str, self.padding))
        if self.stride != (1, 1):
            text += "-s" + "x".join(map(str, self.stride))
        if self.dilation != (1, 1):
            text += "-d" + "x".join(map(str, self.dilation))
        text += f"-m{self.multiplier}" if self.multiplier > 1 else ""
        return text + (f"-{self.layout}" if self.layout != "nchw" else "")

    def words(self, **more: object) -> str:
        """The driver's line for this case."""
        pairs = {
            "size": self.size,
            "kernel": self.kernel,
            "padding": self.padding,
            "stride": self.stride,
            "dilation": self.dilation,
            "multiplier": self.multiplier,
            "layout": self.layout,
            **more,
        }
        return " ".join(
            f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in pairs.items()
        )


def same(size: tuple[int, int, int, int], kernel: Pair, **more) -> Case:
    """Stride 1 and the padding that keeps an odd kernel's image size."""
    dilation = more.get("dilation", (1, 1))
    padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    return Case(size, kernel, padding, **more)


CASES = (
    # kernel sizes of real models, images that are no multiple of any tile
    same((2, 3, 9, 11), (3, 3)),
    same((1, 5, 13, 19), (5, 5)),
    same((3, 2, 14, 14), (7, 7)),
    same((2, 3, 7, 7), (13, 13)),
    same((1, 2, 28, 28), (29, 29)),
    same((2, 1, 32, 32), (31, 31)),
    same((1, 1, 33, 57), (31, 31)),
    same((17, 1, 14, 14), (27, 27)),  # enough images for M tiles that run over images
    same((20, 1, 7, 9), (5, 5)),
    # strips, even and tiny kernels, kernels larger than the image
    same((1, 2, 20, 24), (51, 5)),
    same((1, 2, 24, 20), (5, 51)),
    same((1, 2, 12, 40), (1, 11)),
    same((1, 2, 40, 12), (11, 1)),
    Case((2, 2, 10, 13), (4, 6), (2, 3)),
    Case((1, 2, 5, 6), (9, 17), (8, 16)),
    Case((2, 3, 1, 37), (1, 13), (0, 12)),
    Case((2, 3, 37, 1), (13, 1), (6, 0)),
    Case((1, 1, 1, 1), (1, 1)),
    Case((1, 2, 12, 70), (3, 67), (1, 33)),
    # stride, dilation, padding that reaches past the kernel, channel multiplier
    Case((2, 2, 15, 17), (3, 3), (1, 1), stride=(2, 2)),
    Case((1, 2, 17, 30), (7, 7), (3, 3), stride=(2, 1)),
    Case((1, 2, 16, 19), (5, 4), (2, 2), stride=(3, 2), dilation=(2, 3)),
    same((1, 2, 20, 26), (7, 7), dilation=(3, 3)),
    same((1, 2, 20, 26), (5, 5), dilation=(1, 2)),
    Case((2, 2, 9, 12), (5, 7), (6, 9)),
    Case((1, 3, 12, 13), (7, 7), (3, 3), multiplier=2),
    Case((2, 2, 11, 16), (5, 9), (2, 4), stride=(2, 2), multiplier=3),
    # layouts
    same((2, 20, 9, 11), (7, 7), layout="nhwc"),
    same((1, 9, 14, 16), (13, 13), layout="nhwc"),
    Case((2, 6, 12, 12), (3, 3), (1, 1), stride=(2, 2), layout="nhwc"),
    same((2, 3, 13, 15), (9, 9), layout="slice"),
    same((2, 3, 10, 24), (7, 13), layout="expand"),
)
