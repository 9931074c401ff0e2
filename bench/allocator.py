"""Freed memory stays in the process while something is timed, for every implementation alike.

The C library returns the top of its heap to the system when enough of it is free, and large blocks at once;
the next call then pays a page fault for every 4 KiB. Whether a call meets that depends on where unrelated
small blocks lie: the same convolution takes 120 or 700 microseconds, for minutes on end, in one process and
not in another.
"""

from __future__ import annotations

import ctypes
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Asks glibc to reuse what is freed. False where the C library is another one, which is left alone."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
