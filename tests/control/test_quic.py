"""What the supervisor does for QUIC: steers, lets workers share, and clears up after the dead."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from expressgateway.control import parcels
from expressgateway.control.channel import Channel
from expressgateway.control.seats import Seats
from expressgateway.control.worker_process import Launch
from expressgateway.net.quic.cids import make_cid
from tests.config.material import write_certs
from tests.control.gateway import PATIENCE_S, Gateway
from tests.net.quic.test_cids import long_packet, short_packet
from tests.ports import free_port

pytestmark = pytest.mark.slow

LISTENER = """
[[listeners]]
name = "quic"
address = "127.0.0.1:{port}"
protocol = "quic"
backends = [{{ address = "127.0.0.1:1" }}]
quic = {{ cert_path = "certs/server.pem", key_path = "certs/server.key", retry_secret_path = "retry.secret" }}
"""
PASSTHROUGH = """
[passthrough]
bind_addr = "127.0.0.1:{port}"
backends = ["127.0.0.1:1"]
"""


def gateway(directory: Path, workers: int, more: str = LISTENER) -> tuple[Gateway, int]:
    write_certs(directory)
    port = free_port()
    return Gateway(directory, workers=workers, more=more.format(port=port)), port


class TestSharing:
    @pytest.mark.parametrize("more", [LISTENER, PASSTHROUGH])
    def test_every_worker_has_its_part(self, tmp_path: Path, more: str) -> None:
        running, _ = gateway(tmp_path, 3, more)
        with running:
            everyone = [running.connect_to(index) for index in range(3)]
            assert [one.ask("shared") for one in everyone] == [f"{seat} of [0, 1, 2]" for seat in range(3)]
            cids = [os.urandom(12).hex() for _ in everyone]
            assert [one.ask(f"add {cid}") for one, cid in zip(everyone, cids, strict=True)] == ["True"] * 3
            for one in everyone:
                assert [one.ask(f"owner {cid}") for cid in cids] == ["0", "1", "2"]
            for giver, one in enumerate(everyone):
                for taker, other in enumerate(everyone):
                    given = one.ask(f"give {taker} {giver}->{taker}")
                    assert given == str(giver != taker)
                    if giver != taker:
                        assert other.ask("handed") == f"{giver}->{taker}"
            for one in everyone:
                one.close()


class TestRealWorker:
    def test_takes_what_the_supervisor_gives(self) -> None:
        """The fake one reads its command line by itself; this is what the real one does with the same."""

        async def test() -> None:
            seats = Seats()
            mine, others = seats.take(), seats.take()
            ours, theirs = socket.socketpair()
            sender, receiver = parcels.pair()
            stacks = os.memfd_create("stacks")
            process = Launch(seats).popen(0, mine, theirs.fileno(), receiver.fileno(), stacks)
            os.close(stacks)
            theirs.close()
            receiver.close()
            channel = await Channel.open(ours)
            way = seats.writer(others)
            parcels.send(sender, [way])
            channel.send({"type": "sockets"})
            channel.send({"type": "seats", "id": 6, "live": [mine, others], "moving": False})
            async with asyncio.timeout(PATIENCE_S):
                channel.send({"type": "ping", "id": 7})
                assert await channel.receive() == {"type": "seated", "id": 6}
                assert await channel.receive() == {"type": "pong", "id": 7}
                held = sockets_of(process.pid)
                assert inode(seats.reader(mine)) in held
                assert inode(way[1]) in held
                assert inode(seats.reader(others)) not in held
                channel.send({"type": "drain", "sockets": "close"})
                while (message := await channel.receive()) is not None and message["type"] != "drained":
                    pass
            channel.abort()
            assert process.wait(PATIENCE_S) == 0
            sender.close()
            seats.close()

        asyncio.run(test())


class TestDeath:
    def test_the_dead_own_nothing_and_their_replacements_are_handed_what_came(self, tmp_path: Path) -> None:
        running, _ = gateway(tmp_path, 2)
        with running:
            first, second = running.connect_to(0), running.connect_to(1)
            lost, kept = os.urandom(12).hex(), os.urandom(12).hex()
            first.ask(f"add {lost}")
            second.ask(f"add {kept}")
            assert second.ask(f"owner {lost}") == "0"
            # Stopped, so that it takes nothing: what it is given is there for whoever comes next.
            os.kill(first.pid, signal.SIGSTOP)
            assert second.ask("give 0 late") == "True"
            os.kill(first.pid, signal.SIGKILL)
            running.wait_log("serves again")
            first.close()
            first = running.connect_to(0)
            assert second.ask(f"owner {lost}") == first.ask(f"owner {lost}") == "None"
            assert second.ask(f"owner {kept}") == first.ask(f"owner {kept}") == "1"
            assert first.ask("handed") == "late"
            assert second.ask("give 0 again") == "True"
            assert first.ask("handed") == "again"
            assert first.ask("give 1 back") == "True"
            assert second.ask("handed") == "back"
            first.close()
            second.close()


class TestSteering:
    def test_packets_reach_the_worker_that_they_name(self, tmp_path: Path) -> None:
        running, port = gateway(tmp_path, 3)
        with running:
            for index in range(3):
                with running.connect_to(index) as worker:
                    for make in (short_packet, long_packet) * 8:
                        packet = make(make_cid(index))
                        send(packet, port)
                        assert worker.ask("datagram") == packet.hex()

    def test_also_the_replacement_of_a_dead_one(self, tmp_path: Path) -> None:
        running, port = gateway(tmp_path, 3)
        with running:
            with running.connect_to(1) as worker:
                os.kill(worker.pid, signal.SIGKILL)
            # Its member stays in its place: what comes now waits there.
            packets = [short_packet(make_cid(1)) for _ in range(8)]
            for packet in packets:
                send(packet, port)
            running.wait_log("serves again")
            with running.connect_to(1) as worker:
                assert [worker.ask("datagram") for _ in packets] == [packet.hex() for packet in packets]
                assert worker.pid == running.status()["workers"][1]["pid"]
            with running.connect_to(2) as worker:
                send(packets[0].replace(packets[0][1:13], make_cid(2)), port)
                assert worker.ask("datagram")


def inode(fd: int) -> str:
    return f"socket:[{os.fstat(fd).st_ino}]"


def sockets_of(pid: int) -> set[str]:
    return {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}


def send(packet: bytes, port: int) -> None:
    """From a new address each time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE_S)
        client.sendto(packet, ("127.0.0.1", port))
