"""Keep freed memory for the next batch.

glibc returns large freed blocks to the kernel at once; training allocates and frees the same tensors at every step, so half
of the time went into page faults (measured: 50% system time while distilling on two cores).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory(limit_bytes: int = 1 << 30) -> bool:
    """Let the allocator keep up to `limit_bytes` of freed memory; False where the C library has no such switch."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, limit_bytes), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(option, value) == 1 for option, value in options])
