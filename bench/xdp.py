"""What the XDP data plane costs: ``python -m bench.xdp [--rounds 7] [--write]``. Needs root, clang and veth.

Two tables. *Packets* is how fast one core forwards small packets of flows that it knows, beside a program
that does nothing but XDP_TX and beside the kernel's own forwarding: CPU time of everything on that core,
which is making the packet, two hops over veth, and what lies between. *Bytes* is what the gateway takes for a
gigabyte, in the kernel and in user space: the CPU time of all that takes part, without the ends'. Contenders
take turns. Of packets the medians are shown, and the medians of the rounds' ratios; of bytes the least, for
the machine's other work only ever adds to it.
"""

import argparse
import contextlib
import datetime
import functools
import http.client
import os
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import report
from bench.measure import process_cpu_s, tree
from bench.xdp_lab import BACKEND, VIP, Frame, Lab, Sample, address, softirq_pid

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
FRAMES: Final = 400_000
DATAGRAMS: Final = 100_000
RELAYED: Final = 8_000
BULK_BYTES: Final = 100_000_000
TRIES: Final = 4
TIMES: Final = 3
"""How often that is sent in a round."""
SMALL: Final = 66
"""Bytes of an IP packet."""
LARGE: Final = 1400
SOCKETS: Final = 32
AT_ONCE: Final = 32
"""Datagrams that a user-space relay is given before we wait for them."""
ADMIN_PORT: Final = 9900
PORTS: Final = {"nat": 7001, "dsr": 7002, "dsr_encapsulated": 7003}
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
SYN, ACK = 0x02, 0x10
TURN, FORWARDING, ALONE = "a program that does XDP_TX", "kernel forwarding (ip_forward, no rules)", "the ends"


@dataclass
class Figures:
    """Of one contender, by round; in nanoseconds for a packet, or seconds for a gigabyte."""

    frames: list[float] = field(default_factory=list)
    sockets: list[float] = field(default_factory=list)


def config(*, xdp: bool) -> str:
    text = (
        f"[runtime]\nworkers = 1\nreadiness_settle_ms = 0\ndrain_timeout_ms = 100\ndrain_jitter_ms = 0\n"
        f"xdp_enabled = {str(xdp).lower()}\n"
        + (f"xdp_interface = 'wire'\nxdp_mode = 'native'\nxdp_pin_path = '{pins()}'\n" if xdp else "")
        + f"[observability]\nmetrics_bind = '127.0.0.1:{ADMIN_PORT}'\n"
    )
    for forwarding, port in PORTS.items():
        for version in (4, 6):
            for protocol in ("tcp", "udp"):
                host = {4: "{}", 6: "[{}]"}[version].format(address(VIP, version))
                backend = {4: "{}", 6: "[{}]"}[version].format(address(BACKEND, version))
                text += (
                    f"[[listeners]]\nname = '{forwarding}-{protocol}{version}'\nprotocol = '{protocol}'\n"
                    f"address = '{host}:{port}'\nbackends = [{{ address = '{backend}:{port}' }}]\n"
                    "load_balancing = { policy = 'maglev', table_size = 1009 }\n"
                )
                text += f"xdp = true\nxdp_forwarding = '{forwarding}'\n" if xdp else ""
    return text


def pins() -> Path:
    return Path(f"/sys/fs/bpf/eg-bench-{os.getpid()}")


@contextlib.contextmanager
def gateway(lab: Lab, directory: Path, *, xdp: bool) -> Iterator[int]:
    """Ours, in the lab's namespace; gives its process."""
    path = directory / f"gateway-{xdp}.toml"
    path.write_text(config(xdp=xdp))
    with lab.gateway.entered():
        process = subprocess.Popen(
            [sys.executable, "-m", "expressgateway", str(path)],
            env={**os.environ, "LB_LOG_LEVEL": "warning"},
        )
    try:
        ends = time.monotonic() + 20
        while not _is_ready(lab):
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit("the gateway did not start")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _is_ready(lab: Lab) -> bool:
    with lab.gateway.entered():
        connection = http.client.HTTPConnection("127.0.0.1", ADMIN_PORT, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
    return False


# -- packets


def known_flows(
    lab: Lab, protocol: int, version: int, port: int, size: int = SMALL, flows: int = 1000
) -> None:
    """The lab sends packets of flows that the program knows."""
    frame = functools.partial(Frame, version, protocol, VIP, port, size, flows=flows)
    if protocol == TCP:
        lab.prepare(frame(tcp_flags=SYN))
        lab.send(flows)
    lab.prepare(frame(tcp_flags=ACK))
    lab.send(flows)


def whole(run: Callable[[], Sample], wanted: int, what: str) -> float:
    """Nanoseconds. A run with losses does not count, for what is lost is cheap: where the core was somebody
    else's for a moment, the queue of a wire was full."""
    for _ in range(TRIES):
        sample = run()
        if sample.came >= 0.99 * wanted:
            return sample.ns_each
    raise SystemExit(f"{what}: {sample.came} of {wanted} packets came back")


def packets(ours: Lab, others: Lab, rounds: int) -> dict[str, Figures]:
    found: dict[str, Figures] = {}

    def note(name: str, source: str, ns: float) -> None:
        getattr(found.setdefault(name, Figures()), source).append(ns)

    for _ in range(rounds):
        others.prepare(Frame(4, UDP, VIP, PORTS["nat"], SMALL))
        with others.attached(others.programs["finish"]):
            note(ALONE, "frames", whole(lambda: others.run(FRAMES), FRAMES, ALONE))
        with others.attached(others.programs["turn"]):
            note(TURN, "frames", whole(lambda: others.run(FRAMES), FRAMES, TURN))
            with others.sockets(PORTS["nat"], SOCKETS, SMALL - 28) as send:
                work = functools.partial(others.measured, functools.partial(send, DATAGRAMS))
                note(TURN, "sockets", whole(work, DATAGRAMS, TURN))
        for forwarding, port in PORTS.items():
            for version in (4, 6):
                for protocol, word in ((UDP, "UDP"), (TCP, "TCP")):
                    name = f"`{forwarding}`, {word} over IPv{version}"
                    known_flows(ours, protocol, version, port)
                    note(name, "frames", whole(lambda: ours.run(FRAMES), FRAMES, name))
                    if (version, protocol) == (4, UDP):
                        with ours.sockets(port, SOCKETS, SMALL - 28) as send:
                            send(SOCKETS * SOCKETS)
                            work = functools.partial(ours.measured, functools.partial(send, DATAGRAMS))
                            note(name, "sockets", whole(work, DATAGRAMS, name))
        others.prepare(Frame(4, UDP, BACKEND, PORTS["nat"], SMALL))
        note(FORWARDING, "frames", whole(lambda: others.run(FRAMES), FRAMES, FORWARDING))
    return found


# -- bytes


@dataclass(frozen=True)
class Bytes:
    """CPU seconds of the gateway for a GB: the least of what was measured, for other work only ever adds."""

    user_space: float
    kernel: float


def datagrams(ours: Lab, others: Lab, relay: int, rounds: int) -> Bytes:
    """Of UDP."""
    port = PORTS["nat"]
    making, kernel, user = [], [], []
    for _ in range(rounds):
        others.prepare(Frame(4, UDP, VIP, port, LARGE, flows=16))
        with others.attached(others.programs["finish"]):
            making.append(whole(lambda: others.run(FRAMES), FRAMES, ALONE))
        known_flows(ours, UDP, 4, port, LARGE, flows=16)
        kernel.append(whole(lambda: ours.run(FRAMES), FRAMES, "UDP in the kernel"))
        others.prepare(Frame(4, UDP, VIP, port, LARGE, flows=16))
        others.run(1024, at_once=AT_ONCE)
        user.append(
            whole(lambda: others.run(RELAYED, gateway=relay, at_once=AT_ONCE), RELAYED, "the relay of UDP")
        )
    return Bytes((min(user) - min(making)) / LARGE, (min(kernel) - min(making)) / LARGE)


class Sink:
    """Takes what comes on TCP connections."""

    def __init__(
        self, enter: Callable[[], contextlib.AbstractContextManager[None]], host: str, port: int
    ) -> None:
        with enter():
            self._sock = socket.create_server((host, port))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        buffer = bytearray(1 << 18)
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            with sock:
                while sock.recv_into(buffer):
                    pass
                sock.sendall(b"!")

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()


def poured(lab: Lab, host: str, port: int, core: int, relay: int | None = None) -> float:
    """CPU seconds for a GB over one connection: of the ends, of the gateway and of the core's softirqs."""
    pids = [os.getpid(), softirq_pid(core), *(tree(relay) if relay else [])]
    with lab.source.entered():
        sock = socket.create_connection((host, port), 10)
    data = bytes(1 << 18)
    with sock:
        before = [process_cpu_s(pid) for pid in pids]
        for _ in range(BULK_BYTES // len(data)):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"!"
        spent = sum(process_cpu_s(pid) - was for pid, was in zip(pids, before, strict=True))
    return spent / BULK_BYTES * 1e9


def streams(ours: Lab, others: Lab, relay: int, core: int, rounds: int) -> Bytes:
    """Seconds for a GB of TCP. Segments are as long as on a wire, and who receives them has GRO. Every device
    has a program: then veth makes frames of what sockets send in all cases alike, as a card does by DMA."""
    port = PORTS["nat"]
    ends, kernel, user = [], [], []
    with contextlib.ExitStack() as stack:
        for lab in (ours, others):
            stack.enter_context(lab.receiving())
            stack.callback(Sink(lab.source.entered, address(BACKEND), port).close)
        stack.enter_context(others.attached(others.programs["pass"]))
        stack.callback(Sink(others.gateway.entered, address(VIP), port + 100).close)
        for _ in range(TIMES * rounds):
            ends.append(poured(others, address(VIP), port + 100, core))
            kernel.append(poured(ours, address(VIP), port, core))
            user.append(poured(others, address(VIP), port, core, relay))
    return Bytes(min(user) - min(ends), min(kernel) - min(ends))


# -- tables


def ratios(ones: list[float], others: list[float]) -> list[float]:
    return sorted(one / other for one, other in zip(ones, others, strict=True))


def middle(values: list[float]) -> str:
    quarter = len(values) // 4
    return f"{statistics.median(values):.2f} ({values[quarter]:.2f} to {values[-1 - quarter]:.2f})"


def packet_table(found: dict[str, Figures]) -> str:
    turn = found[TURN]
    lines = [
        "| one core, 66 bytes a packet, 1,000 flows that are known | frames: ns each | million a second "
        "| of XDP_TX | sockets: ns each | of XDP_TX |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in found.items():
        if name == ALONE:
            continue
        ns = statistics.median(figures.frames)
        row = [name, f"{ns:.0f}", f"{1e3 / ns:.2f}", middle(ratios(turn.frames, figures.frames)), "", ""]
        if figures.sockets:
            row[4:] = (
                f"{statistics.median(figures.sockets):.0f}",
                middle(ratios(turn.sockets, figures.sockets)),
            )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def byte_table(found: dict[str, Bytes]) -> str:
    lines = [
        "| CPU ms for a GB, the ends' not counted | in user space | in the kernel | user space / kernel |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {each.user_space * 1e3:.0f} | {each.kernel * 1e3:.0f} "
        f"| {each.user_space / each.kernel:.1f} |"
        for name, each in found.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.xdp", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="also write into docs/performance.md")
    options = parser.parse_args()
    machine = report.machine()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # what is started inherits it
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (20_000, max(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    )
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(Lab(directory, core))
        others = stack.enter_context(Lab(directory, core))
        stack.enter_context(gateway(ours, directory, xdp=True))
        small = packets(ours, others, options.rounds)
        relay = stack.enter_context(gateway(others, directory, xdp=False))
        large = {
            f"UDP, datagrams of {LARGE - 28} bytes": datagrams(ours, others, relay, options.rounds),
            "TCP, segments of 1448 bytes": streams(ours, others, relay, core, options.rounds),
        }
    about = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"`{shlex.join(['python', '-m', 'bench.xdp', *sys.argv[1:]])}`",
        **machine,
        "runs": f"{options.rounds} interleaved rounds; packets: medians, and the middle half of the ratios; "
        "bytes: the least",
        "in every row": f"{statistics.median(small[ALONE].frames):.0f} ns for making a frame and one hop",
    }
    page = f"{report.facts_list(about)}\n\n{packet_table(small)}\n\n{byte_table(large)}"
    print(page)
    if options.write:
        report.write_section(PAGE, "xdp", page)
        print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
