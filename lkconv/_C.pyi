from collections.abc import Sequence
from typing import Any

def detected_isa() -> str: ...
def active_isa() -> str: ...
def processor_vendor() -> str: ...
def whole_512_bits(vendor: str, signature: int, amx: bool) -> bool: ...
def compiled_isas() -> list[str]: ...
def compiler() -> str: ...
def switches() -> dict[str, Any]: ...
def plan(
    pass_name: str,
    size: Sequence[int],
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: str,
    isa: str,
    threads: int,
    fft: bool = True,
    aten: bool = ...,
    only: str = ...,
    channels_last: bool = ...,
    dense: bool = ...,
) -> list[dict[str, Any]]: ...
def cheaper_in_place(
    size: tuple[int, ...],
    kernel_size: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: str,
    channels_last: bool,
    isa: str,
    threads: int,
) -> bool: ...
