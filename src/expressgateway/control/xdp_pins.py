"""What a gateway has left in the kernel, for who would have it gone while no gateway runs."""

from pathlib import Path

from expressgateway.l4.xdp import bpffs
from expressgateway.l4.xdp.attachments import detach_pinned
from expressgateway.l4.xdp.faults import XdpError
from expressgateway.l4.xdp.libbpf import BpfError, available

__all__ = ["XdpError", "detach_left_behind"]


def detach_left_behind(pin_path: Path) -> list[str] | None:
    """Take what is pinned below `pin_path` from its interfaces, whose names are given; None: a gateway looks
    after it. Raises `XdpError`."""
    if not pin_path.is_dir():
        return []
    if (why := available()) is not None:
        raise XdpError(why)
    try:
        lock = bpffs.Lock(pin_path)
        try:
            return detach_pinned(pin_path) if lock.take() else None
        finally:
            lock.close()
    except (OSError, BpfError) as error:
        raise XdpError(f"{pin_path}: {error}; the command has to run as root") from None
