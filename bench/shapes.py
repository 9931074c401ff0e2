"""The layers of real models: the one list of shapes that benchmarks and tests share.

Sizes are those of the published configurations at 224x224 input (stages of 56, 28, 14 and 7 rows)
unless a row says otherwise. A suite is a tuple of `Layer`; `layers` returns one by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

STAGES_224 = (56, 28, 14, 7)
LARGE_TAPS = 169  # 13 x 13: from here on a kernel counts as large


@dataclass(frozen=True)
class Layer:
    """One depthwise convolution of one model.

    ``channels`` are input channels; the weight is (channels * multiplier, 1, *kernel_size).
    ``parent_channels`` > 0 says that the input is a slice, starting at channel ``offset``, of a tensor
    that many channels wide. ``batch`` is the batch of GPU training; `cpu_batch` is what a CPU row uses.
    """

    name: str
    model: str
    channels: int
    height: int
    width: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    parent_channels: int = 0
    offset: int = 0
    batch: int = 32

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def size_class(self) -> str:
        """``k>=13`` for kernels of at least 169 taps, else ``k<=11``."""
        return "k>=13" if self.taps >= LARGE_TAPS else "k<=11"

    @property
    def out_channels(self) -> int:
        return self.channels * self.multiplier

    @property
    def out_size(self) -> tuple[int, int]:
        """(Ho, Wo)."""
        sizes = zip(
            (self.height, self.width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        )
        h, w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return h, w

    @property
    def geometry(self) -> tuple:
        """What a kernel sees of this layer: equal for layers that differ only in name, model and batch."""
        return (
            self.channels,
            self.height,
            self.width,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.multiplier,
            self.parent_channels,
            self.offset,
        )

    def flops(self, batch: int) -> int:
        """Nominal work of one pass: 2 N C Ho Wo kh kw. The three passes share it."""
        return 2 * batch * self.out_channels * self.out_size[0] * self.out_size[1] * self.taps

    def elements(self, batch: int) -> tuple[int, int, int]:
        """Elements of the input, the output and the weight."""
        return (
            batch * self.channels * self.height * self.width,
            batch * self.out_channels * self.out_size[0] * self.out_size[1],
            self.out_channels * self.taps,
        )

    def cpu_batch(self, nominal_flops: float = 2e9, largest: int = 8) -> int:
        """Batch of a CPU row: about ``nominal_flops`` a pass, half a second of a 5 GFLOP/s peer."""
        return max(1, min(largest, int(nominal_flops // self.flops(1))))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _layer(
    model: str,
    channels: int,
    size: int | tuple[int, int],
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    **fields,
) -> Layer:
    """A layer with "same" padding d (k - 1) / 2, which all models here use."""
    (height, width), kernel, stride, dilation = _pair(size), _pair(kernel), _pair(stride), _pair(dilation)
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    name = f"{model} C{channels} {height}x{width} k{kernel[0]}x{kernel[1]}"
    name += f" s{stride[0]}" if stride != (1, 1) else ""
    name += f" d{dilation[0]}" if dilation != (1, 1) else ""
    return Layer(
        name=name,
        model=model,
        channels=channels,
        height=height,
        width=width,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        **fields,
    )


def _unique(rows: Iterable[Layer]) -> tuple[Layer, ...]:
    """The rows without repeated geometries (ConvNeXt-S has the shapes of ConvNeXt-T, ...)."""
    first: dict[tuple, Layer] = {}
    for row in rows:
        first.setdefault(row.geometry, row)
    return tuple(first.values())


def _stages(model: str, channels, sizes, kernels, **fields) -> list[Layer]:
    return [_layer(model, c, s, k, **fields) for c, s, k in zip(channels, sizes, kernels, strict=True)]


def _replknet() -> list[Layer]:
    variants = (
        # model, widths, transition widths, map sizes, kernels, has the parallel 5x5
        ("RepLKNet-31B", (128, 256, 512, 1024), (256, 512, 1024), STAGES_224, (31, 29, 27, 13), True),
        ("RepLKNet-31L", (192, 384, 768, 1536), (384, 768, 1536), (96, 48, 24, 12), (31, 29, 27, 13), True),
        # The depthwise width of XL is 1.5 times the stage's (256, 512, 1024, 2048).
        ("RepLKNet-XL", (384, 768, 1536, 3072), (512, 1024, 2048), (80, 40, 20, 10), (27, 27, 27, 13), False),
    )
    rows = []
    for model, widths, transitions, sizes, kernels, has_small in variants:
        rows += _stages(model, widths, sizes, kernels)
        if has_small:
            rows += _stages(model, widths, sizes, (5, 5, 5, 5))
        rows += _stages(model, transitions, sizes[:3], (3, 3, 3), stride=2)
    return rows


def _unireplknet() -> list[Layer]:
    widths = {"T": 80, "S": 96, "B": 128, "L": 192, "XL": 256}
    rows = []
    for variant, width in widths.items():
        model = f"UniRepLKNet-{variant}"
        channels = [width * 2**i for i in range(4)]
        rows += _stages(model, channels, STAGES_224, (3, 13, 13, 13))
        rows.append(_layer(model, channels[2], 14, 3))
    # The training branches of a 13x13 dilated re-parameterised block: (kernel, dilation).
    for kernel, dilation in ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)):
        rows.append(_layer("UniRepLKNet-S branch", 384, 14, kernel, dilation=dilation))
    return rows


def _slak() -> list[Layer]:
    rows = []
    for channels, size, k in zip((124, 249, 499, 998), STAGES_224, (51, 49, 47, 13), strict=True):
        rows += [_layer("SLaK-T", channels, size, kernel) for kernel in ((k, 5), (5, k), (5, 5))]
    rows += [_layer("SLaK-T 61", 124, 56, kernel) for kernel in ((61, 5), (5, 61))]
    return rows


def _convnext() -> list[Layer]:
    widths = {"T": 96, "B": 128, "L": 192, "XL": 256}
    return [
        _layer(f"ConvNeXt-{variant}", width * 2**i, size, 7)
        for variant, width in widths.items()
        for i, size in enumerate(STAGES_224)
    ]


def _inceptionnext() -> list[Layer]:
    rows = []
    for part, size in zip((12, 24, 48, 96), STAGES_224, strict=True):
        wide = 8 * part  # an eighth of the stage's channels to each of the three branches, the rest to none
        for i, kernel in enumerate(((3, 3), (1, 11), (11, 1))):
            rows.append(
                _layer(
                    "InceptionNeXt-T", part, size, kernel, parent_channels=wide, offset=wide - (3 - i) * part
                )
            )
    return rows


def _dense_prediction() -> list[Layer]:
    wide = ((200, 320), (100, 160), (50, 80), (25, 40))  # 1280x800 at strides 4, 8, 16, 32
    crop = (128, 64, 32, 16)  # 512x512
    rows = []
    for sizes, note in ((wide, "1280x800"), (crop, "512x512")):
        rows += _stages(f"RepLKNet-31B {note}", (128, 256, 512, 1024), sizes, (31, 29, 27, 13), batch=2)
        rows += _stages(f"UniRepLKNet-S {note}", (192, 384, 768), sizes[1:], (13, 13, 13), batch=2)
        rows += _stages(f"ConvNeXt-T {note}", (96, 192, 384, 768), sizes, (7, 7, 7, 7), batch=2)
        rows += [_layer(f"SLaK-T {note}", 124, sizes[0], kernel, batch=2) for kernel in ((51, 5), (5, 51))]
    return rows


def _overlock() -> list[Layer]:
    return _stages("OverLoCK-T", (64, 128, 256, 512), STAGES_224, (17, 15, 13, 7))


def _van() -> list[Layer]:
    rows = []
    for channels, size in zip((64, 128, 320, 512), STAGES_224, strict=True):
        rows += [_layer("VAN-B2", channels, size, 5), _layer("VAN-B2", channels, size, 7, dilation=3)]
    return rows


def _moganet() -> list[Layer]:
    rows = []
    for c, size in zip((64, 128, 320, 512), STAGES_224, strict=True):
        middle, last = 3 * c // 8, c // 2
        wide = {"parent_channels": c}
        rows += [
            _layer("MogaNet-S", c, size, 5),
            _layer("MogaNet-S", middle, size, 5, dilation=2, offset=c // 8, **wide),
            _layer("MogaNet-S", last, size, 7, dilation=3, offset=c - last, **wide),
        ]
    return rows


def _parcnetv2() -> list[Layer]:
    rows = []
    for c, size, k in zip((64, 128, 320, 512), STAGES_224, (111, 55, 27, 13), strict=True):
        rows += [_layer("ParCNetV2-T", c, size, kernel) for kernel in ((k, 1), (1, k), (7, 7))]
    return rows


def _hornet() -> list[Layer]:
    # Recursive gating of order 2, 3, 4, 5: one 7x7 over the sum of the gated widths C / 2^i.
    return _stages("HorNet-T", (96, 224, 480, 992), STAGES_224, (7, 7, 7, 7))


def _smpconv() -> list[Layer]:
    return [_layer("SMPConv", 96, 56, 51)]


def _fastvit() -> list[Layer]:
    # Patch embedding at 256x256 input: two output channels to each input channel, stride 2.
    return [
        _layer("FastViT-T8", c, size, k, stride=2, multiplier=2)
        for c, size in zip((48, 96, 192), (64, 32, 16), strict=True)
        for k in (7, 3)
    ]


def _paper_table() -> list[Layer]:
    """The shapes of the published implicit-GEMM table: (64, 384, R, R), 24 layers of each."""
    return [
        replace(_layer(f"table R{size}", 384, size, k), batch=64)
        for size in (16, 32, 64)
        for k in (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
    ]


_SUITES: dict[str, Callable[[], list[Layer]]] = {
    "replknet": _replknet,
    "unireplknet": _unireplknet,
    "slak": _slak,
    "convnext": _convnext,
    "inceptionnext": _inceptionnext,
    "dense_prediction": _dense_prediction,
    "overlock": _overlock,
    "van": _van,
    "moganet": _moganet,
    "parcnetv2": _parcnetv2,
    "hornet": _hornet,
    "smpconv": _smpconv,
    "fastvit": _fastvit,
    "paper_table": _paper_table,
}
SUITES = (*_SUITES, "all")


def layers(*suites: str) -> tuple[Layer, ...]:
    """The layers of the named suites, without repeated geometries.

    ``all`` is every layer of a real model; the shapes of the published table are asked for by
    name, because no model has them.
    """
    rows: list[Layer] = []
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {suite!r}")
        names = [name for name in _SUITES if name != "paper_table"] if suite == "all" else [suite]
        for name in names:
            rows += _SUITES[name]()
    return _unique(rows)
