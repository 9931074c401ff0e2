"""Which GPUs the compiled CUDA module can run on: a pure function of its images and a compute capability.

An image is machine code (``sm_NN``) or PTX (``compute_NN``), which the driver compiles for newer GPUs. The
rules are those of the CUDA C++ Programming Guide, sections "Binary Compatibility", "PTX Compatibility" and
"Feature Set Compiler Targets".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Capability = tuple[int, int]
OLDEST: Capability = (8, 0)  # mma.sync on bfloat16 and cp.async
# Systems on a chip: machine code runs on the very one it was compiled for, and is of no use to other GPUs.
JETSON: frozenset[Capability] = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)})


def runs(image: str, capability: Capability) -> bool:
    """Whether a GPU of this compute capability can run an image such as ``sm_90a`` or ``compute_120``."""
    kind, major, minor, feature = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", image).groups()  # type: ignore[union-attr]
    compiled = int(major), int(minor)
    if feature == "a" or (kind == "sm" and (compiled in JETSON or capability in JETSON)):
        return capability == compiled
    if kind == "sm" or feature == "f":
        return capability[0] == compiled[0] and capability[1] >= compiled[1]
    return capability >= compiled


def reason_against(images: Sequence[str], capability: Capability) -> str | None:
    """Why no image runs on a GPU of this capability; None if one does."""
    if capability >= OLDEST and any(runs(image, capability) for image in images):
        return None
    major, minor = capability
    oldest = f"the kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    rebuild = f"build lkconv with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    advice = oldest if capability < OLDEST else rebuild
    return f"compiled for {', '.join(images)}, this GPU is sm_{major}{minor}: {advice}"
