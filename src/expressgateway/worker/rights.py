"""What a worker may not do: it gives up the rights that only the supervisor uses.

A service that is given capabilities (docs/xdp.md) hands them to every process it starts. A worker reads what
strangers send, and has no use for programs in the kernel nor for the network's configuration.
"""

import ctypes
from typing import Final

GIVEN_UP: Final = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""By capabilities(7)."""

_AMBIENT: Final = 47  # PR_CAP_AMBIENT
_LOWER: Final = 3  # PR_CAP_AMBIENT_LOWER
_VERSION_3: Final = 0x20080522
_WORDS: Final = 2


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def give_up() -> bool:
    """False: the kernel does not let us, which is no reason not to serve. For the first thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = _Header(_VERSION_3, 0)
    sets = (_Sets * _WORDS)()
    if libc.capget(ctypes.byref(header), sets):
        return False
    for number in GIVEN_UP.values():
        libc.prctl(_AMBIENT, _LOWER, number, 0, 0)
        word, bit = divmod(number, 32)
        for name in ("effective", "permitted", "inheritable"):
            setattr(sets[word], name, getattr(sets[word], name) & ~(1 << bit))
    return bool(libc.capset(ctypes.byref(header), sets) == 0)
