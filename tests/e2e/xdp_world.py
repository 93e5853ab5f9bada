"""A small internet of network namespaces for the XDP data plane: nothing outside of it is touched.

    far ----- front [gateway] lan ----- switch ----- near, a, b

``near`` is a client on the backends' link, ``far`` one on a link of its own: for it the gateway has two arms.
``a`` and ``b`` are backends. ``switch`` is a bridge. The names carry a random suffix, and go with the world.

veth is a wire that trusts its ends: packets carry no checksum and may be 64 KiB long until they leave the
machine. A program that looks at them needs them as they would be on a wire: so every end computes its
checksums and cuts its segments. And what a program sends back by XDP_TX is taken only by a peer that has a
program as well; one that passes everything will do.
"""

import contextlib
import ctypes
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import pytest

from expressgateway.l4.xdp.libbpf import DRIVER_MODE, Link, Program
from tests.e2e.fake_systemd import is_over
from tests.e2e.harness import PATIENCE_S, Gateway, eventually
from tests.namespaces import PATH, Namespace, NamespaceError

BPF_FS: Final = Path("/sys/fs/bpf")
CLIENT_ROUTE: Final = "198.18.0.0/15"
"""Where forged senders are: at ``near``, which throws away what comes for them."""

_CAP_NET_ADMIN: Final = 12
_CAP_SYS_ADMIN: Final = 21


def why_not() -> str:
    """Why no such world can be made here; empty where it can."""
    if shutil.which("ip", path=PATH) is None:
        return "needs ip (iproute2)"
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    if not effective >> _CAP_NET_ADMIN & effective >> _CAP_SYS_ADMIN & 1:
        return "needs CAP_NET_ADMIN and CAP_SYS_ADMIN: network namespaces and BPF are root's"
    if not _has_bpf_fs():
        return "needs a BPF file system at /sys/fs/bpf"
    try:
        with Namespace("probe") as namespace:
            namespace.ip("link add x0 type veth peer name x1")
    except NamespaceError as error:
        return f"this kernel makes no network namespaces or veth pairs: {error}"
    return ""


def _has_bpf_fs() -> bool:
    """Mounted, or mounted now."""

    def is_mounted() -> bool:
        return any(
            line.split()[1:3] == [str(BPF_FS), "bpf"]
            for line in Path("/proc/mounts").read_text().splitlines()
        )

    if not is_mounted() and BPF_FS.is_dir():
        subprocess.run(["mount", "-t", "bpf", "bpf", str(BPF_FS)], capture_output=True, check=False)
    return is_mounted()


NUMBERS: Final = {"gateway": 1, "near": 10, "a": 21, "b": 22}
"""The last part of the address of everybody on the LAN."""

NAT_VIP: Final = 100
DSR_VIP: Final = 101
ENCAPSULATED_VIP: Final = 102
"""Last parts of VIPs. The backends have the latter two on their loopback devices, and tell nobody."""


def lan(who: str | int, version: int = 4) -> str:
    """Somebody's address on the LAN."""
    number = who if isinstance(who, int) else NUMBERS[who]
    return f"10.77.0.{number}" if version == 4 else f"fd77::{number}"


def front(who: str | int, version: int = 4) -> str:
    """An address on the link between the gateway and ``far``."""
    number = {"gateway": 1, "far": 10}[who] if isinstance(who, str) else who
    return f"10.78.0.{number}" if version == 4 else f"fd78::{number}"


def authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@contextlib.contextmanager
def passing(namespace: Namespace, device: str) -> Iterator[None]:
    """A program on a device that passes every frame."""
    xdp, length = 6, 2
    instructions = bytes.fromhex("b700000002000000 9500000000000000")  # r0 = XDP_PASS; exit
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    library.bpf_prog_load.argtypes = [
        ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
    ]  # fmt: skip
    fd = library.bpf_prog_load(xdp, b"passing", b"GPL", instructions, length, None)
    assert fd >= 0, os.strerror(-fd)
    loaded = Program(fd)
    with namespace.entered():
        link = Link.create(loaded, socket.if_nametoindex(device), DRIVER_MODE)
    loaded.close()
    try:
        yield
    finally:
        link.close()


class World:
    """The namespaces and what connects them."""

    def __init__(self) -> None:
        self.gateway = Namespace("gateway")
        self.switch = Namespace("switch")
        self.near = Namespace("near")
        self.far = Namespace("far")
        self.a = Namespace("a")
        self.b = Namespace("b")
        self._stack = contextlib.ExitStack()

    def __getitem__(self, role: str) -> Namespace:
        """A backend, by its name."""
        return {"a": self.a, "b": self.b}[role]

    def __enter__(self) -> Self:
        with self._stack as stack:
            for namespace in (self.gateway, self.switch, self.near, self.far, self.a, self.b):
                stack.enter_context(namespace)
                namespace.sysctl(ipv6__conf__all__accept_dad=0, ipv6__conf__default__accept_dad=0)
                namespace.sysctl(ipv4__conf__all__rp_filter=0, ipv4__conf__default__rp_filter=0)
            self._lay_wires(stack)
            self._give_addresses()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _lay_wires(self, stack: contextlib.ExitStack) -> None:
        self.switch.ip(
            "link add bridge type bridge mcast_snooping 0 forward_delay 0",
            "link set bridge up",
            *(
                f"link add to-{end.role} type veth peer name lan netns {end.name}"
                for end in (self.gateway, self.near, self.a, self.b)
            ),
            *(f"link set to-{role} master bridge up" for role in NUMBERS),
        )
        self.gateway.ip(f"link add front type veth peer name front netns {self.far.name}")
        for namespace in (self.gateway, self.near, self.a, self.b):
            namespace.ip("link set lan up")
            namespace.wire_like("lan", gro=False)
            self.switch.wire_like(f"to-{namespace.role}", gro=False)
        for namespace in (self.gateway, self.far):
            namespace.ip("link set front up")
            namespace.wire_like("front", gro=False)
        for namespace, device in ((self.switch, "to-gateway"), (self.far, "front")):
            stack.enter_context(passing(namespace, device))

    def _give_addresses(self) -> None:
        for namespace in (self.gateway, self.near, self.a, self.b):
            namespace.ip(
                f"addr add {lan(namespace.role)}/24 dev lan",
                f"addr add {lan(namespace.role, 6)}/64 dev lan nodad",
            )
        for namespace in (self.gateway, self.far):
            namespace.ip(
                f"addr add {front(namespace.role)}/24 dev front",
                f"addr add {front(namespace.role, 6)}/64 dev front nodad",
            )
        self.gateway.ip(
            *(f"addr add {lan(vip)}/32 dev lan" for vip in (NAT_VIP, DSR_VIP, ENCAPSULATED_VIP)),
            f"addr add {front(NAT_VIP)}/32 dev front",
            # Not to be the source of what it sends by itself: the backends have these addresses as well.
            *(
                f"addr add {address}/128 dev {device} nodad preferred_lft 0"
                for device, address in (
                    *(("lan", lan(vip, 6)) for vip in (NAT_VIP, DSR_VIP, ENCAPSULATED_VIP)),
                    ("front", front(NAT_VIP, 6)),
                )
            ),
            f"route add {CLIENT_ROUTE} via {lan('near')}",
        )
        self.forwarding(True)
        for backend in (self.a, self.b):
            # They hold the VIPs, and do not answer who asks the link for them.
            backend.sysctl(ipv4__conf__all__arp_ignore=1, ipv4__conf__all__arp_announce=2)
            backend.ip(
                *(f"addr add {lan(vip)}/32 dev lo" for vip in (DSR_VIP, ENCAPSULATED_VIP)),
                *(
                    f"addr add {lan(vip, 6)}/128 dev lo nodad preferred_lft 0"
                    for vip in (DSR_VIP, ENCAPSULATED_VIP)
                ),
                f"route add {CLIENT_ROUTE} via {lan('gateway')}",
            )

    def dropped(self) -> int:
        """Frames that found the queue of a wire full, so far."""
        count = 0
        for namespace in (self.gateway, self.switch, self.near, self.far, self.a, self.b):
            for device in json.loads(namespace.show("-j -s link")):
                count += device["stats64"]["tx"]["dropped"]
        return count

    def forwarding(self, on: bool) -> None:
        """Of the gateway; without it the kernel tells a program of no next hop."""
        self.gateway.sysctl(ipv4__conf__all__forwarding=int(on), ipv6__conf__all__forwarding=int(on))


class _Successor:
    """A process that is not our child, as far as a gateway's has to be known."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return 0 if is_over(self.pid) else None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        eventually(lambda: is_over(self.pid), "the process has ended", patience_s)
        return 0


class XdpGateway(Gateway):
    """A gateway in the world's namespace, with a place of its own below /sys/fs/bpf."""

    def __init__(
        self,
        world: World,
        directory: Path,
        config: str,
        *,
        interfaces: tuple[str, ...] = ("lan", "front"),
        mode: str = "native",
        pins: Path | None = None,
        workers: int = 1,
        runtime: str = "",
    ) -> None:
        self.world = world
        self.pins = pins or BPF_FS / f"eg-{secrets.token_hex(4)}"
        xdp = f"xdp_enabled = true\nxdp_pin_path = '{self.pins}'\n"
        if interfaces:
            xdp += f"xdp_interface = [{', '.join(map(repr, interfaces))}]\nxdp_mode = '{mode}'\n"
        super().__init__(directory, config, workers=workers, runtime=xdp + runtime)
        self._head += "max_label_cardinality = 100_000\n"
        self.write(config)

    def __enter__(self) -> Self:
        with self.world.gateway.entered():
            return super().__enter__()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            super().__exit__(kind)
        finally:
            unpin(self.pins)

    def ask(self, path: str) -> tuple[int, str]:
        with self.world.gateway.entered():
            return super().ask(path)

    def command(self, *arguments: str, check: bool = True) -> str:
        """``expressgateway ARGUMENTS`` beside it; gives what it prints."""
        with self.world.gateway.entered():
            done = subprocess.run(
                [self.interpreter, "-m", "expressgateway", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        output = done.stdout + done.stderr
        assert not check or done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{output}"
        return output

    def kill(self) -> None:
        """The supervisor is gone at once, and says nothing to anybody; so are its workers."""
        workers = self.worker_pids()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: all(is_over(pid) for pid in workers), "its workers are gone")

    def restart(self) -> None:
        """After `kill`: another process, with the same configuration and the same pins."""
        with self.world.gateway.entered():
            super().__enter__()

    def upgrade(self) -> None:
        """Another process takes over from the one that runs, by SIGUSR2; until that one has ended."""
        self.process.send_signal(signal.SIGUSR2)
        assert self.process.wait(PATIENCE_S) == 0, self.log()
        self.process = _Successor(self.status()["pid"])  # type: ignore[assignment]
        eventually(lambda: self.status()["state"] == "serving", "its successor serves")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/api/v1/status")[1])
        return found

    def is_attached(self, device: str) -> bool:
        return "xdp" in self.world.gateway.show(f"link show {device}")


def unpin(path: Path) -> None:
    """Nothing of it stays: programs leave their devices with the last reference to their links."""
    shutil.rmtree(path, ignore_errors=True)


_refusal: list[str] = []


def need_xdp() -> pytest.MarkDecorator:
    """Skip, and say why, where the kernel or the privileges do not allow any of this."""
    if not _refusal:
        _refusal.append(why_not())
    return pytest.mark.skipif(bool(_refusal[0]), reason=_refusal[0] or "can be made")


def is_v6(address: str) -> bool:
    return ipaddress.ip_address(address).version == 6
