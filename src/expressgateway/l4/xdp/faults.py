"""What stands in the way of the data plane, as sentences that say what to do about it."""

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from expressgateway.l4.xdp.libbpf import BpfError, attached, program_info

CAPABILITIES: Final = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_NET_ADMIN": 12}
"""Of capabilities(7), those that loading and attaching take. CAP_PERFMON is for the verifier: without it no
program may go to a header behind others whose lengths it has read (a CPU could speculate about them)."""
_SYS_ADMIN: Final = 21
_PART_OF_SYS_ADMIN: Final = ("CAP_BPF", "CAP_PERFMON")


class XdpError(Exception):
    """Packets cannot be forwarded in the kernel. `str()` is a sentence for the operator."""


def missing_capabilities() -> list[str]:
    """Those that this process lacks."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return []
    line = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    held = int(line.split()[1], 16)
    is_mighty = bool(held >> _SYS_ADMIN & 1)
    return [
        name
        for name, bit in CAPABILITIES.items()
        if not held >> bit & 1 and not (is_mighty and name in _PART_OF_SYS_ADMIN)
    ]


def check_capabilities() -> None:
    """Raises `XdpError`."""
    if missing := missing_capabilities():
        *most, last = missing
        names = f"{', '.join(most)} and {last}" if most else last
        raise XdpError(
            f"the gateway lacks {names}, and without the kernel takes no XDP program: run it as root, or "
            f"with systemd add AmbientCapabilities={' '.join(CAPABILITIES)} (docs/xdp.md); or turn "
            "runtime.xdp_enabled off"
        )


def refused(error: BpfError) -> XdpError:
    """What the kernel said to something other than attaching."""
    if error.errno == errno.EPERM:
        return XdpError(
            f"{error}; the gateway has the capabilities that this takes, so it is forbidden by the kernel "
            "(lockdown) or by what the gateway runs in (a container, a seccomp filter)"
        )
    if error.errno == errno.ENOSYS:
        return XdpError("this kernel has no BPF (CONFIG_BPF_SYSCALL): turn runtime.xdp_enabled off")
    return XdpError(str(error))


def not_attached(error: BpfError, interface: str, ifindex: int, mode: str) -> XdpError:
    """What the kernel said to attaching in `mode`."""
    if error.errno in (errno.EBUSY, errno.EEXIST) and (others := _others(ifindex)):
        return XdpError(
            f"the interface {interface} has another XDP program already: {others}; if it is not needed "
            f"detach it (`ip link set dev {interface} xdp off`; `bpftool link show` lists one that is held "
            "by a link, `expressgateway xdp detach` removes another gateway's), or name another interface"
        )
    if error.errno in (errno.EOPNOTSUPP, errno.EINVAL) and mode in ("native", "hw"):
        why = f": {error.said[-1]}" if error.said else ""
        return XdpError(
            f'the interface {interface} does not support xdp_mode = {mode!r}{why}; use "auto" or "skb", '
            "or have the driver ready for it (its MTU, its number of queues, LRO off)"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return refused(error)
    return XdpError(f"the program cannot be attached to the interface {interface}: {error}")


def _others(ifindex: int) -> str:
    try:
        found = attached(ifindex)
    except BpfError:
        return ""
    return ", ".join(f"{_named(number)} ({mode} mode)" for mode, number in found.items())


def _named(number: int) -> str:
    try:
        return f"program {number} {program_info(number).name!r}"
    except BpfError:  # to look at others' programs takes CAP_SYS_ADMIN
        return f"program {number}"


def no_interface(interface: str) -> XdpError:
    return XdpError(
        f"there is no network interface {interface}: runtime.xdp_interface names those that exist when the "
        "gateway starts (`ip link` lists them)"
    )


def no_forwarding(keys: Iterable[str]) -> XdpError:
    settings = " ".join(f"{key}=1" for key in keys)
    return XdpError(
        "the kernel tells no next hop where forwarding is off, so nothing could be forwarded: turn it on "
        f"with `sysctl -w {settings}`, and in /etc/sysctl.d/ for the next boot"
    )
