"""What the CPU planner answers, for its tests."""

import lkconv._C

ISAS = lkconv._C.compiled_isas()
PASSES = ("forward", "backward_input", "backward_weight")


def candidates(
    pass_name="forward",
    size=(8, 96, 56, 56),
    kernel=(7, 7),
    stride=(1, 1),
    padding=None,
    dilation=(1, 1),
    multiplier=1,
    dtype="float32",
    isa=ISAS[-1],
    threads=2,
    fft=True,
    aten=True,
    only="",
    channels_last=False,
    dense=True,
    bf16_pairs=False,
) -> list[dict]:
    if padding is None:
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    geometry = (size, size[1] * multiplier, kernel, stride, padding, dilation)
    machine = (dtype, isa, threads)
    return lkconv._C.plan(pass_name, *geometry, *machine, fft, aten, only, channels_last, dense, bf16_pairs)


def of(algorithm: str, plans: list[dict]) -> dict:
    return next(p for p in plans if p["algorithm"] == algorithm)
