"""What the arguments of Group-Mix attention must satisfy; messages name argument, expectation and value."""

from collections.abc import Sequence

from torch import SymInt, Tensor

NUM_HEADS = 8
KERNELS = (3, 5, 7, 3)  # depthwise windows of segments 1 to 4
MOST_SEGMENT = 496  # the widest d of the kernels, whose tiles hold all channels of a segment


def check_dim(dim: int, num_heads: int, name: str = "dim") -> None:
    """dim channels in five segments; eight heads over four of them."""
    if num_heads != NUM_HEADS:
        raise ValueError(
            f"num_heads must be {NUM_HEADS} (each segment is two heads and the position encoding splits "
            f"them 2 + 3 + 3), got {num_heads}"
        )
    if dim <= 0 or dim % 5:
        raise ValueError(f"{name} must be a positive multiple of 5 (five segments), got {dim}")
    if dim // 5 * 4 % NUM_HEADS:
        raise ValueError(
            f"4/5 of {name} must be divisible by {NUM_HEADS} heads, got {name}={dim} (4/5: {dim // 5 * 4})"
        )


def check_tokens(tokens: Tensor, size: tuple[int, int], name: str) -> None:
    """tokens (B, N, channels) of an H x W grid."""
    if tokens.dim() != 3:
        raise ValueError(f"{name} must be (B, N, channels), got shape {tuple(tokens.shape)}")
    if not tokens.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {tokens.dtype}")
    if len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size!r}")
    if not all(isinstance(n, int | SymInt) for n in size):
        raise TypeError(f"size must be two integers, got {size!r}")
    if size[0] < 1 or size[1] < 1:  # their product alone would let two negative ones pass
        raise ValueError(f"size must be two positive numbers, got {tuple(size)}")
    if size[0] * size[1] != tokens.shape[1]:
        raise ValueError(
            f"size must have height * width = {tokens.shape[1]}, the tokens of {name}, got {tuple(size)}"
        )


def check_list(name: str, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """tensors have the given shapes; trailing ones (a 1 x 1 kernel) are optional."""
    if len(tensors) != len(shapes):
        raise ValueError(f"{name} must have {len(shapes)} tensors, got {len(tensors)}")
    for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tuple(t.shape) not in (shape, (*shape, 1, 1)):
            raise ValueError(f"{name}[{i}] must have shape {shape}, got {tuple(t.shape)}")


def check_aggregate(
    qkv: Tensor,
    size: tuple[int, int],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    norms: dict[str, Sequence[Tensor]],
    layer_norm: dict[str, Tensor],
    num_heads: int,
) -> int:
    """Raises what is wrong with the arguments of ``group_mix_aggregate``; returns d."""
    check_tokens(qkv, size, "qkv")
    if qkv.shape[2] % 3:
        raise ValueError(f"qkv must have 3 * C channels, got {qkv.shape[2]}")
    check_dim(qkv.shape[2] // 3, num_heads, "C")
    d = qkv.shape[2] // 15
    check_list(
        "depthwise_weights", depthwise, [(d if i < 3 else 3 * d, 1, k, k) for i, k in enumerate(KERNELS)]
    )
    check_list("pointwise_weights", pointwise, [(d, d)] * 3 + [(d, 3 * d)])
    for name, tensors in norms.items():
        check_list(name, tensors, [(d,)] * 4)
    for name, tensor in layer_norm.items():
        if tuple(tensor.shape) != (d,):
            raise ValueError(f"{name} must have shape {(d,)}, got {tuple(tensor.shape)}")
    return d
