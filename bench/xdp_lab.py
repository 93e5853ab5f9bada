"""Where the data plane is measured: a source of frames, a gateway and the wire between them.

    source [generate, finish] ---- wire ---- gateway

The source makes frames in the kernel (BPF_PROG_TEST_RUN with live frames), and counts and drops what comes
back. Clients and backends are beyond it: nobody is there, only their addresses. Making, forwarding and
counting all run on the core of the thread that asks for frames; a second network is not touched.
"""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import psutil
from tests.namespaces import Namespace

from bench.measure import process_cpu_s, tree
from expressgateway.l4.xdp.abi import TestRunOptions, XdpContext, checked, library
from expressgateway.l4.xdp.libbpf import DRIVER_MODE, Link, Object, Program

_SOURCE: Final = Path(__file__).with_name("xdp_programs.bpf.c")
_LIVE_FRAMES: Final = 2
"""BPF_F_TEST_XDP_LIVE_FRAMES: what the program says is done."""
_HEAD_BYTES: Final = 80
_FIRST_PORT: Final = 1024
_UDP_SEGMENT: Final = 103
_SEGMENTS: Final = 32
BATCH: Final = 64
"""Frames that are made at once; the queue of a veth device takes 256."""

GATEWAY: Final = 1
SOURCE: Final = 10
VIP: Final = 100
BACKEND: Final = 21
"""Last parts of addresses. Backends hold the VIPs of `dsr`; here nobody holds anything."""


def address(number: int, version: int = 4) -> str:
    return f"10.79.0.{number}" if version == 4 else f"fd79::{number}"


def compiled(directory: Path) -> Path:
    """The bench's own programs. Raises CalledProcessError, or FileNotFoundError without clang."""
    target = directory / "xdp_programs.bpf.o"
    include = f"/usr/include/{os.uname().machine}-linux-gnu"
    subprocess.run(
        ["clang", "-O2", "-g", "-target", "bpf", f"-I{include}", "-c", str(_SOURCE), "-o", str(target)],
        check=True,
    )
    return target


@dataclass(frozen=True)
class Frame:
    """What the source sends: to the gateway's MAC, from many ports."""

    version: int
    protocol: int
    destination: int
    port: int
    size: int
    """Of the IP packet."""
    tcp_flags: int = 0x10
    flows: int = 1000

    def head(self, to_mac: bytes, from_mac: bytes) -> tuple[bytes, int]:
        """Ethernet, IP and transport headers, and where the source port is. UDP is without a checksum; that
        of TCP is wrong, and nobody looks."""
        inside = self.size - (20 if self.version == 4 else 40)
        if self.protocol == socket.IPPROTO_UDP:
            transport = struct.pack("!HHHH", 0, self.port, inside, 0)
        else:
            transport = struct.pack("!HHIIBBHHH", 0, self.port, 1, 1, 5 << 4, self.tcp_flags, 65535, 0, 0)
        family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        ends = b"".join(
            socket.inet_pton(family, address(number, self.version)) for number in (SOURCE, self.destination)
        )
        if self.version == 4:
            start = struct.pack("!BBHHHBBH", 0x45, 0, self.size, 0, 0x4000, 64, self.protocol, 0)
            network = start[:10] + struct.pack("!H", _checksum(start + ends)) + ends
        else:
            network = struct.pack("!IHBB", 6 << 28, inside, self.protocol, 64) + ends
        head = to_mac + from_mac + (b"\x08\x00" if self.version == 4 else b"\x86\xdd") + network
        return (head + transport).ljust(_HEAD_BYTES, b"\0")[:_HEAD_BYTES], len(head)


def _checksum(header: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


@dataclass(frozen=True)
class Sample:
    """One run."""

    sent: int
    came: int
    """Back, to the end that counts."""
    cpu_s: float
    """Of the thread that makes them, of the gateway's processes, and of the core's softirq thread."""

    @property
    def ns_each(self) -> float:
        return self.cpu_s / max(self.came, 1) * 1e9


class Lab:
    """The two namespaces, the programs, and the source."""

    def __init__(self, directory: Path, core: int) -> None:
        self.gateway = Namespace("lab-gateway")
        self.source = Namespace("lab-source")
        self._core = core
        self._directory = directory
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            for namespace in (self.gateway, self.source):
                stack.enter_context(namespace)
                namespace.sysctl(ipv6__conf__default__accept_dad=0)
            self.gateway.ip(f"link add wire type veth peer name wire netns {self.source.name}")
            for namespace, number in ((self.gateway, GATEWAY), (self.source, SOURCE)):
                namespace.ip(
                    f"addr add {address(number)}/24 dev wire",
                    f"addr add {address(number, 6)}/64 dev wire nodad",
                    "link set wire up",
                )
                # Without NAPI a veth device takes no frames from a program.
                namespace.wire_like("wire", gro=True)
            self._give_neighbours()
            with Object.open(compiled(self._directory)) as file:
                file.load()
            self._maps, self.programs = file.maps, file.programs
            with self.source.entered():
                index = socket.if_nametoindex("wire")
                self._end = Link.create(self.programs["finish"], index, DRIVER_MODE)
            self._context = XdpContext(data_end=0, ingress_ifindex=index)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._stack.close()

    def _give_neighbours(self) -> None:
        for here, there, numbers in (
            (self.gateway, self.source, (SOURCE, BACKEND)),
            (self.source, self.gateway, (GATEWAY, VIP)),
        ):
            mac = ":".join(f"{byte:02x}" for byte in there.mac("wire"))
            here.ip(
                *(
                    f"neigh replace {address(number, version)} lladdr {mac} dev wire nud permanent"
                    for number in numbers
                    for version in (4, 6)
                )
            )
        self.gateway.ip(
            f"addr add {address(VIP)}/32 dev wire",
            f"addr add {address(VIP, 6)}/128 dev wire nodad preferred_lft 0",
        )
        for version in ("ipv4", "ipv6"):
            self.gateway.sysctl(**{f"{version}__conf__all__forwarding": 1})
        self.gateway.sysctl(ipv4__conf__all__send_redirects=0, ipv4__conf__wire__send_redirects=0)
        self.gateway.sysctl(ipv4__conf__all__rp_filter=0, ipv4__conf__wire__rp_filter=0)

    @contextlib.contextmanager
    def attached(self, program: Program) -> Iterator[None]:
        """A program at the gateway's end."""
        with self.gateway.entered():
            link = Link.create(program, socket.if_nametoindex("wire"), DRIVER_MODE)
        try:
            yield
        finally:
            link.detach()
            link.close()

    def prepare(self, frame: Frame) -> None:
        """The source will make frames like this one."""
        head, port_at = frame.head(self.gateway.mac("wire"), self.source.mac("wire"))
        value = head + struct.pack("IHH", frame.flows, _FIRST_PORT, port_at)
        self._maps["templates"].set(bytes(4), value)
        self._data = head.ljust(14 + frame.size, b"\0")
        self._context.data_end = len(self._data)

    def counted(self) -> tuple[int, int]:
        """Frames made, and frames that came back."""
        counts = self._maps["frames"]
        made, came = (
            sum(int.from_bytes(each, "little") for each in counts.get_percpu(struct.pack("I", at)))
            for at in (0, 1)
        )
        return made, came

    def send(self, count: int) -> None:
        """Frames, on this thread's core, in the source's namespace: the kernel looks for its device there."""
        options = TestRunOptions(
            sz=ctypes.sizeof(TestRunOptions),
            data_in=self._data,
            data_size_in=len(self._data),
            ctx_in=ctypes.addressof(self._context),
            ctx_size_in=ctypes.sizeof(self._context),
            repeat=count,
            flags=_LIVE_FRAMES,
            batch_size=min(BATCH, count),
        )
        with self.source.entered():
            result = library().bpf_prog_test_run_opts(self.programs["generate"].fd, ctypes.byref(options))
        checked(result, "make frames")

    def run(self, count: int, *, gateway: int | None = None, at_once: int | None = None) -> Sample:
        """``gateway``: the process whose work counts too. ``at_once``: wait for so many before the next."""
        if at_once is None:
            return self.measured(lambda: self.send(count), gateway)
        return self.measured(lambda: self._send_paced(count, at_once), gateway)

    def measured(self, work: Callable[[], None], gateway: int | None = None) -> Sample:
        pids = [*(tree(gateway) if gateway else []), softirq_pid(self._core)]
        made, came = self.counted()
        before = time.thread_time(), [process_cpu_s(pid) for pid in pids]
        work()
        spent = time.thread_time() - before[0]
        spent += sum(process_cpu_s(pid) - was for pid, was in zip(pids, before[1], strict=True))
        now_made, now_came = self.counted()
        return Sample(now_made - made, now_came - came, spent)

    def _send_paced(self, count: int, at_once: int) -> None:
        """A user-space relay loses what its socket's buffer does not hold. Its core is this one: it works
        while we sleep."""
        _, came = self.counted()
        for sent in range(at_once, count + 1, at_once):
            self.send(at_once)
            ends = time.monotonic() + 0.1
            while self.counted()[1] - came < sent and time.monotonic() < ends:
                time.sleep(0.0002)

    @contextlib.contextmanager
    def sockets(self, port: int, count: int, bytes_each: int) -> Iterator[Callable[[int], None]]:
        """Another source: UDP sockets. What is given sends so many datagrams, from each socket in turn. The
        kernel cuts them from buffers of ``_SEGMENTS`` (UDP_SEGMENT): the least that a real sender costs."""
        made = []
        for _ in range(count):
            with self.source.entered():
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect((address(VIP), port))
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, bytes_each)
            made.append(sock)
        data = bytes(_SEGMENTS * bytes_each)

        def send(datagrams: int) -> None:
            for number in range(datagrams // _SEGMENTS):
                made[number % count].send(data)

        try:
            yield send
        finally:
            for sock in made:
                sock.close()

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """What comes back goes to the source's stack for once: there are clients and backends."""
        self.source.ip(
            f"addr add {address(BACKEND)}/32 dev wire", f"addr add {address(BACKEND, 6)}/128 dev wire nodad"
        )
        self._end.update(self.programs["pass"])
        try:
            yield
        finally:
            self._end.update(self.programs["finish"])
            self.source.ip(
                f"addr del {address(BACKEND)}/32 dev wire", f"addr del {address(BACKEND, 6)}/128 dev wire"
            )


def softirq_pid(core: int) -> int:
    """The kernel's thread that does what interrupts leave to be done on a core."""
    for process in psutil.process_iter(("name",)):
        if process.info["name"] == f"ksoftirqd/{core}":
            return process.pid
    raise LookupError(f"ksoftirqd/{core} is not seen: measure outside of a container")
