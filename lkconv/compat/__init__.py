"""Folder with the module name of the 2022 implicit-GEMM extension, for code written against it.

``export LARGE_KERNEL_CONV_IMPL=$(python -m lkconv.compat)`` for code that reads that variable; put the
folder on ``PYTHONPATH`` for code that imports ``depthwise_conv2d_implicit_gemm`` directly.
"""

from pathlib import Path


def directory() -> str:
    """The folder that holds ``depthwise_conv2d_implicit_gemm.py``."""
    return str(Path(__file__).resolve().parent)
