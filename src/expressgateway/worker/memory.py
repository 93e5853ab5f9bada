"""How the C library's allocator keeps memory, for a process that reads bulk into short-lived buffers.

A read of 256 KiB allocates, shrinks and frees at the top of the heap. With glibc's defaults every second one
gives the top back to the kernel and asks for it again: ``brk``, and a page fault for every 4 KiB. Keeping
some of it halves the cost of bulk (docs/decisions/0003). The price is at most ``KEPT_BYTES`` of memory.
"""

import ctypes
from typing import Final

KEPT_BYTES: Final = 32 << 20
PAD_BYTES: Final = 4 << 20
MAPPED_BYTES: Final = 4 << 20  # larger allocations are mappings of their own

# <malloc.h>
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3


def keep_the_heap() -> bool:
    """Tune the allocator; gives whether there was one to tune (glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    settings = ((_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_TOP_PAD, PAD_BYTES), (_M_MMAP_THRESHOLD, MAPPED_BYTES))
    return all(mallopt(option, value) == 1 for option, value in settings)
