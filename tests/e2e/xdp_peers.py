"""Who talks through the XDP data plane: backends that say who they are, clients, and a forger of packets.

A backend speaks TCP in lines - ``who``, ``take N``, ``give N``, ``reset``, a request of HTTP, anything else
comes back - and answers each datagram with its name, the address it saw, and the datagram.
"""

import contextlib
import fcntl
import hashlib
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, Self

from tests.e2e.harness import PATIENCE_S, eventually
from tests.e2e.xdp_world import is_v6
from tests.namespaces import Namespace

_CHUNK_BYTES: Final = 1 << 16
_BUFFER_BYTES: Final = 1 << 23
"""Of sockets that must not lose a datagram while Python is busy elsewhere."""

_SO_RCVBUFFORCE: Final = 33
_IP_PKTINFO: Final = 8
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000


def pattern(size: int) -> bytes:
    """Bytes that repeat nowhere near, the same for both ends."""
    return random.Random(size).randbytes(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if is_v6(address) else socket.AF_INET


class Backend:
    """TCP and UDP on one port of some of a namespace's addresses."""

    def __init__(self, namespace: Namespace, port: int, *addresses: str) -> None:
        self.namespace = namespace
        self.name = namespace.role
        self.port = port
        self.addresses = addresses
        self.connections = 0
        self.datagrams = 0
        self.datagram_bytes = 0
        """Of their contents."""
        self.peers: Counter[str] = Counter()
        """Who has sent datagrams: by address, no port."""
        self.told = 0
        """ICMP errors about answers."""
        self._listening: dict[socket.socket, threading.Thread] = {}
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        for address in self.addresses:
            with self.namespace.entered():
                tcp = socket.create_server((address, self.port), family=_family(address), backlog=1024)
            self._listen(tcp, self._accept)
        self.open_udp()

    def open_udp(self) -> None:
        for address in self.addresses:
            with self.namespace.entered():
                udp = socket.socket(_family(address), socket.SOCK_DGRAM)
            udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            udp.bind((address, self.port))
            self._listen(udp, self._answer)

    def _listen(self, sock: socket.socket, run: Callable[[socket.socket], None]) -> None:
        thread = threading.Thread(target=run, args=(sock,), daemon=True)
        thread.start()
        self._listening[sock] = thread

    def close_udp(self) -> None:
        """Nobody listens there: who sends a datagram is told so by ICMP."""
        self._close(socket.SOCK_DGRAM)

    def stop(self) -> None:
        """As a process that is killed: connections are reset, ports closed."""
        self._close(socket.SOCK_STREAM, socket.SOCK_DGRAM)
        for sock in list(self._open):
            _reset(sock)
        eventually(lambda: not self._open, "its connections are gone")

    def _close(self, *kinds: int) -> None:
        for sock, thread in list(self._listening.items()):
            if sock.type in kinds:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                thread.join(PATIENCE_S)
                sock.close()
                del self._listening[sock]

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, peer = listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock, peer), daemon=True).start()

    def _serve(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.add(sock)
        with contextlib.suppress(OSError, ValueError), sock, sock.makefile("rb") as lines:
            for line in lines:
                command, *rest = line.split()
                if command == b"GET":
                    while lines.readline().strip():
                        pass
                    sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + self.name.encode())
                elif command == b"who":
                    sock.sendall(f"{self.name} {peer[0]} {peer[1]}\n".encode())
                elif command == b"take":
                    sock.sendall(digest(lines.read(int(rest[0]))).encode() + b"\n")
                elif command == b"give":
                    sock.sendall(pattern(int(rest[0])))
                elif command == b"reset":
                    _reset(sock)
                else:
                    sock.sendall(line)
        sock.close()
        self._open.discard(sock)

    def _answer(self, sock: socket.socket) -> None:
        while True:
            try:
                data, peer = sock.recvfrom(_CHUNK_BYTES)
                if not data and peer is None:
                    return
                self.datagrams += 1
                self.datagram_bytes += len(data)
                self.peers[peer[0]] += 1
                sock.sendto(f"{self.name} {peer[0]} {peer[1]} ".encode() + data, peer)
            except ConnectionError:
                self.told += 1
            except OSError:
                return


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A close alone would wait for the thread that reads.
        sock.shutdown(socket.SHUT_RD)
        sock.close()


def connected(
    namespace: Namespace,
    address: str,
    port: int,
    source: tuple[str, int] | None = None,
    patience_s: float = PATIENCE_S,
) -> socket.socket:
    with namespace.entered():
        return socket.create_connection((address, port), patience_s, source)


class Flow:
    """A client's TCP connection."""

    def __init__(
        self, namespace: Namespace, address: str, port: int, *, source: tuple[str, int] | None = None
    ) -> None:
        """``source``: the local address and port, 0 is any."""
        self.sock = connected(namespace, address, port, source)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.sock.close()

    def reset(self) -> None:
        self._lines.close()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def have_reset(self) -> None:
        """By the backend."""
        self.sock.sendall(b"reset\n")
        with contextlib.suppress(ConnectionError):
            self._lines.readline()

    def ask(self, line: str) -> str:
        self.sock.sendall(line.encode() + b"\n")
        answer = self._lines.readline()
        if not answer.endswith(b"\n"):
            raise ConnectionError(f"the connection ended; got {answer!r}")
        return answer.decode().removesuffix("\n")

    def who(self) -> str:
        return self.ask("who").split()[0]

    def seen_as(self) -> str:
        """The address that the backend sees."""
        return self.ask("who").split()[1]

    def upload(self, size: int) -> None:
        """Bytes to the backend, which must be the same there."""
        data = pattern(size)
        self.sock.sendall(f"take {size}\n".encode() + data)
        assert self._lines.readline().decode().strip() == digest(data)

    def download(self, size: int) -> None:
        self.sock.sendall(f"give {size}\n".encode())
        assert digest(self._lines.read(size)) == digest(pattern(size))

    def is_reset(self) -> bool:
        """Nobody knows it any more."""
        try:
            self.ask("who")
        except ConnectionError:
            return True
        return False

    def segments(self) -> tuple[int, int]:
        """TCP segments sent and received so far: tcpi_segs_out, tcpi_segs_in."""
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return struct.unpack_from("II", info, 136)


class Datagrams:
    """A client's UDP flow."""

    def __init__(self, namespace: Namespace, address: str, port: int, *, source_port: int = 0) -> None:
        with namespace.entered():
            self.sock = socket.socket(_family(address), socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self.sock.bind(("", source_port))
        self.sock.connect((address, port))
        self.sock.settimeout(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, data: bytes = b"who") -> tuple[str, str]:
        """The backend's name, and the address that it saw. The datagram comes back as it was."""
        self.sock.send(data)
        name, address, _, came = self.sock.recv(_CHUNK_BYTES).split(b" ", 3)
        assert came == data
        return name.decode(), address.decode()

    def who(self) -> str:
        return self.ask()[0]


class Stream:
    """A UDP flow that never stops: numbered datagrams, each answered by its backend. For the length of the
    ``with`` block; then every one must have come back, but for what the wires themselves dropped."""

    def __init__(
        self,
        namespace: Namespace,
        address: str,
        port: int,
        dropped: Callable[[], int],
        *,
        pause_s: float = 0.0005,
    ) -> None:
        """``dropped``: how many frames found the queue of a wire full. That queue is the machine's, or short:
        where others work at the same time it happens."""
        self._dropped = dropped
        self._dropped_before = dropped()
        self._flow = Datagrams(namespace, address, port)
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self.sent = 0
        self.told = 0
        self.came: set[int] = set()
        self.names: Counter[str] = Counter()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._send, self._receive)]

    def __enter__(self) -> Self:
        self._flow.who()
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._threads[0].join(PATIENCE_S)
        try:
            if kind is None:
                eventually(lambda: not self.lost(), "every datagram has come back", 1)
        except AssertionError:
            lost = self.lost()
            if len(lost) <= self._dropped() - self._dropped_before:
                return
            told = f", {self.told} ICMP errors" if self.told else ""
            raise AssertionError(f"{len(lost)} of {self.sent} datagrams lost: {lost[:20]}{told}") from None
        finally:
            self._is_over.set()
            self._threads[1].join(PATIENCE_S)
            self._flow.sock.close()

    def lost(self) -> list[int]:
        """Those that have not come back so far."""
        return sorted(set(range(self.sent)) - self.came)

    def goes_on(self, count: int = 20) -> None:
        """Wait for answers to datagrams that have not been sent yet."""
        here = self.sent
        eventually(lambda: sum(number >= here for number in list(self.came)) >= count, "the stream goes on")

    def _send(self) -> None:
        while not self._stop.wait(self._pause_s):
            try:
                self._flow.sock.send(b"%d" % self.sent)
            except ConnectionError:  # about an earlier one; this one is not sent
                self.told += 1
                continue
            self.sent += 1

    def _receive(self) -> None:
        self._flow.sock.settimeout(0.1)
        while not self._is_over.is_set():
            try:
                name, _, _, number = self._flow.sock.recv(_CHUNK_BYTES).split(b" ", 3)
            except TimeoutError:
                continue
            except ConnectionError:
                self.told += 1
                continue
            except OSError:
                return
            self.came.add(int(number))
            self.names[name.decode()] += 1


class Conversation:
    """A question and its answer on a TCP connection all the time, for the length of the ``with`` block."""

    def __init__(self, flow: Flow, *, slowest_s: float = 2.0) -> None:
        self.flow = flow
        self.answers = 0
        self.slowest_s = 0.0
        self._limit_s = slowest_s
        self._failure = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self.flow.close()
        if kind is None:
            assert not self._failure, self._failure
            assert self.slowest_s < self._limit_s, f"an answer took {self.slowest_s} s"

    def goes_on(self, count: int = 20) -> None:
        wanted = self.answers + count
        eventually(lambda: self.answers >= wanted or self._failure, "the conversation goes on")
        assert not self._failure, self._failure

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.002):
                asked = time.monotonic()
                assert self.flow.ask(f"number {self.answers}") == f"number {self.answers}"
                self.answers += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - asked)
        except (OSError, AssertionError) as error:
            self._failure = f"after {self.answers} answers: {error!r}"


class Crowd:
    """As many UDP backends as ``network`` has addresses, all of them in one namespace and one socket. Each
    answers with its address in the place of a name."""

    def __init__(self, namespace: Namespace, network: str, port: int) -> None:
        self._namespace = namespace
        namespace.ip(f"route add local {network} dev lo")
        with namespace.entered():
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._sock.bind(("", port))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a socket of UDP's is never connected; who reads is woken up
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self._sock.close()

    def _run(self) -> None:
        while True:
            try:
                data, ancillary, _, peer = self._sock.recvmsg(_CHUNK_BYTES, 64)
                if not ancillary:
                    return
                asked = socket.inet_ntoa(ancillary[0][2][8:12])
                source = struct.pack("I4s4x", 0, socket.inet_aton(asked))
                answer = f"{asked} {peer[0]} {peer[1]} ".encode() + data
                self._sock.sendmsg([answer], [(socket.IPPROTO_IP, _IP_PKTINFO, source)], 0, peer)
            except ConnectionError:
                continue
            except OSError:
                return


class Newcomers:
    """UDP flows that begin all the time, one after the other, with a question each; for the length of the
    ``with`` block. Then every one must have been answered, but for what the wires themselves dropped."""

    def __init__(
        self,
        namespace: Namespace,
        address: str,
        port: int,
        dropped: Callable[[], int],
        *,
        first_source_port: int,
    ) -> None:
        self._namespace, self._address, self._port = namespace, address, port
        self._dropped = dropped
        self._dropped_before = dropped()
        self._next = first_source_port
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()
        self._unanswered = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.goes_on()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        if kind is None and self._unanswered > self._dropped() - self._dropped_before:
            raise AssertionError(f"{self._unanswered} of {self.answers.total()} had no answer")

    def goes_on(self, count: int = 20) -> None:
        wanted = self.answers.total() + count
        eventually(lambda: self.answers.total() >= wanted, "new flows are served")

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            with Datagrams(self._namespace, self._address, self._port, source_port=self._next) as flow:
                flow.sock.settimeout(3)
                try:
                    self.answers[flow.who()] += 1
                except OSError:
                    self._unanswered += 1
            self._next += 1


@contextlib.contextmanager
def decapsulating(namespace: Namespace) -> Iterator[None]:
    """IP in IP, both versions, taken out of its outer header and given to the namespace's own stack: what a
    device of kind ipip or ip6tnl does where the kernel has those."""
    with namespace.entered():
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"decap", _IFF_TUN | _IFF_NO_PI))
        outer4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IPIP)
        outer6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_IPV6)
    namespace.sysctl(ipv4__conf__decap__rp_filter=0)
    namespace.ip("link set decap up mtu 1500")
    stop = threading.Event()

    def run(sock: socket.socket, outer_bytes: int) -> None:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        sock.settimeout(0.1)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                os.write(tun, sock.recv(_CHUNK_BYTES)[outer_bytes:])

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in ((outer4, 20), (outer6, 0))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        for sock in (outer4, outer6):
            sock.close()
        os.close(tun)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ipv4(source: str, destination: str, protocol: int, carried: bytes) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(carried), 0, 0, 64, protocol, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + carried


def forged_syn(source: str, source_port: int, destination: str, port: int) -> bytes:
    """An IPv4 packet."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    tcp = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    sum_ = checksum(addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
    return _ipv4(source, destination, socket.IPPROTO_TCP, tcp[:16] + struct.pack("!H", sum_) + tcp[18:])


def forged_datagram(source: str, source_port: int, destination: str, port: int, data: bytes) -> bytes:
    """An IPv4 packet; without a checksum of UDP's."""
    udp = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    return _ipv4(source, destination, socket.IPPROTO_UDP, udp)


class Forger:
    """Sends frames of any kind from a device of ``namespace``."""

    def __init__(self, namespace: Namespace, to_mac: bytes, *, device: str = "lan") -> None:
        with namespace.entered():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._sock.bind((device, 0))
        self._head = to_mac + namespace.mac(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, packet: bytes, *, ethertype: int = 0x0800, vlan: int | None = None) -> None:
        tag = b"" if vlan is None else struct.pack("!HH", 0x8100, vlan)
        self._sock.send(self._head + tag + struct.pack("!H", ethertype) + packet)

    def flood(self, destination: str, port: int, count: int, *, first: int = 0) -> None:
        """SYNs from as many senders, none of whom is there."""
        for number in range(first, first + count):
            source = f"198.{18 + (number >> 16 & 1)}.{number >> 8 & 255}.{number & 255}"
            self.send(forged_syn(source, 1024 + number % 60000, destination, port))
