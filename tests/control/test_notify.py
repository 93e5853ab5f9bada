"""What systemd is told: on real Unix datagram sockets, by path and by abstract name."""

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from expressgateway.control.notify import FDSTORE, KEPT, MAX_WAITING, Notifier, keeps_sockets, passed
from tests.net.loopback import descriptors

PATIENCE_S = 30.0
QUEUE = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
"""So many datagrams wait for who does not read."""


class Systemd:
    """The other end. Descriptors that come are closed by `received`, but for their inodes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.sock.settimeout(PATIENCE_S)

    def receive(self) -> list[str]:
        return self.receive_fds()[0]

    def receive_fds(self) -> tuple[list[str], list[int]]:
        """The next message's lines, and the inodes of what came with it."""
        data, fds, _, _ = socket.recv_fds(self.sock, 4096, 16)
        inodes = [os.fstat(fd).st_ino for fd in fds]
        for fd in fds:
            os.close(fd)
        return data.decode().split("\n"), inodes

    def is_silent(self) -> bool:
        self.sock.setblocking(False)
        try:
            self.sock.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(PATIENCE_S)
        return False


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@{uuid.uuid4()}"
    other = Systemd(address)
    with other.sock:
        yield other


def notifier(systemd: Systemd, **environ: str) -> Notifier:
    return Notifier.of({"NOTIFY_SOCKET": systemd.address, **environ}, os.getpid())


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


class TestMessages:
    def test_a_life(self, systemd: Systemd) -> None:
        teller = notifier(systemd)
        with contextlib.closing(teller):
            teller.ready("serving with 2 workers")
            assert systemd.receive() == ["READY=1", "STATUS=serving with 2 workers"]
            teller.reloading()
            reloading, since = systemd.receive()
            assert reloading == "RELOADING=1"
            assert since.startswith("MONOTONIC_USEC=")
            assert since.partition("=")[2].isdecimal()
            teller.stopping()
            assert systemd.receive()[0] == "STOPPING=1"
            teller.status("3 open")
            assert systemd.receive() == ["STATUS=3 open"]

    def test_another_process_speaks_from_now_on(self, systemd: Systemd) -> None:
        teller = notifier(systemd)
        with contextlib.closing(teller):
            teller.follow(4711)
            assert systemd.receive() == ["MAINPID=4711"]
            teller.status("draining")
            teller.ready("serving")
            assert systemd.is_silent()

    def test_signs_of_life(self, systemd: Systemd) -> None:
        async def test() -> None:
            teller = notifier(systemd, WATCHDOG_USEC="20000")
            assert teller.watchdog_s == 0.02
            watching = asyncio.get_running_loop().create_task(teller.watch())
            for _ in range(3):
                assert await asyncio.to_thread(systemd.receive) == ["WATCHDOG=1"]
            watching.cancel()
            teller.close()

        asyncio.run(test())

    @pytest.mark.parametrize(
        "environ", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}]
    )
    def test_nobody_looks(self, environ: dict[str, str]) -> None:
        teller = Notifier.of(environ, os.getpid())
        assert teller.watchdog_s == 0
        asyncio.run(teller.watch())  # and it comes back


class TestNobody:
    def everything(self, teller: Notifier) -> None:
        with listening() as sock:
            teller.reloading()
            teller.ready("serving")
            teller.keep({f"{KEPT}web/0/0": sock})
            teller.keep({})
            teller.status("so")
            teller.stopping()
            teller.follow(1)
        teller.close()
        teller.close()

    def test_nobody_asked(self) -> None:
        before = descriptors()
        self.everything(Notifier.of({FDSTORE: "1"}, os.getpid()))
        assert descriptors() == before

    @pytest.mark.parametrize("address", ["/nowhere/at/all", "@nobody-has-this-name", "relative", "/" * 300])
    def test_nobody_is_there(self, address: str, caplog: pytest.LogCaptureFixture) -> None:
        before = descriptors()
        self.everything(Notifier.of({FDSTORE: "1", "NOTIFY_SOCKET": address}, os.getpid()))
        assert descriptors() == before
        assert [record.levelno for record in caplog.records] == [logging.WARNING], "it is said once"

    def test_one_that_has_gone_and_come_back(
        self, systemd: Systemd, caplog: pytest.LogCaptureFixture
    ) -> None:
        teller = notifier(systemd)
        with contextlib.closing(teller):
            teller.ready("one")
            systemd.receive()
            systemd.sock.close()
            teller.ready("two")
            teller.ready("three")
            assert len(caplog.records) == 1
            with contextlib.suppress(OSError):
                Path(systemd.address).unlink()
            again = Systemd(systemd.address)
            with again.sock:
                teller.ready("four")
                assert again.receive() == ["READY=1", "STATUS=four"]

    def test_one_that_does_not_read_gets_it_later(self, systemd: Systemd) -> None:
        """Nothing waits, nothing is lost, and all of it stays in order."""

        async def test() -> None:
            teller = notifier(systemd, **{FDSTORE: "1"})
            with listening() as sock:
                wanted = inode(sock)
                for number in range(QUEUE * 3):
                    teller.tell(f"X={number}")
                teller.keep({f"{KEPT}web/0/0": sock})
            teller.ready("at last")
            teller.status("is left out: there will be a newer one")
            for number in range(QUEUE * 3):
                assert await asyncio.to_thread(systemd.receive) == [f"X={number}"]
            assert await asyncio.to_thread(systemd.receive_fds) == (
                ["FDSTORE=1", f"FDNAME={KEPT}web/0/0"],
                [wanted],
            )
            assert (await asyncio.to_thread(systemd.receive))[0] == "READY=1"
            assert systemd.is_silent()
            teller.close()

        before = descriptors()
        asyncio.run(test())
        assert descriptors() == before

    def test_one_that_never_reads_costs_no_more_than_so_much(self, systemd: Systemd) -> None:
        before = descriptors()
        teller = notifier(systemd, **{FDSTORE: "1"})
        with listening() as sock:
            for number in range(MAX_WAITING + 2000):
                teller.tell(f"X={number}")
            teller.keep({f"{KEPT}web/0/0": sock})
        assert len(teller._waiting) == MAX_WAITING
        teller.close()
        assert descriptors() == before


class TestKeeping:
    def test_only_if_it_is_wanted(self, systemd: Systemd) -> None:
        assert not keeps_sockets({FDSTORE: "1"})
        assert not keeps_sockets({"NOTIFY_SOCKET": systemd.address})
        teller = notifier(systemd)
        with contextlib.closing(teller), listening() as sock:
            assert not teller.keeps_sockets
            teller.keep({f"{KEPT}web/0/0": sock})
            assert teller.kept == {}
            assert systemd.is_silent()

    def test_what_is_new_and_what_is_gone(self, systemd: Systemd) -> None:
        teller = notifier(systemd, **{FDSTORE: "1"})
        one, two = f"{KEPT}web/0/0", f"{KEPT}web/1/0"
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with contextlib.closing(teller), listening() as first, udp:
            teller.keep({one: first})
            assert systemd.receive_fds() == (["FDSTORE=1", f"FDNAME={one}"], [inode(first)])
            teller.keep({one: first})
            assert systemd.is_silent(), "it has that one"
            with first.dup() as renamed:
                teller.keep({two: renamed, "kept/dns/2/0": udp})
            assert systemd.receive() == ["FDSTOREREMOVE=1", f"FDNAME={one}"], "before it comes again"
            assert systemd.receive_fds() == (["FDSTORE=1", f"FDNAME={two}"], [inode(first)])
            assert systemd.receive_fds() == (["FDSTORE=1", "FDNAME=kept/dns/2/0", "FDPOLL=0"], [inode(udp)])
            teller.keep({"kept/dns/2/0": udp})
            assert systemd.receive() == ["FDSTOREREMOVE=1", f"FDNAME={two}"]
            assert teller.kept == {"kept/dns/2/0": inode(udp)}
            assert systemd.is_silent()

    def test_another_socket_under_the_same_name(self, systemd: Systemd) -> None:
        teller = notifier(systemd, **{FDSTORE: "1"})
        with contextlib.closing(teller), listening() as first, listening() as second:
            teller.keep({"kept/web/0/0": first})
            teller.keep({"kept/web/0/0": second})
            assert systemd.receive()[0] == "FDSTORE=1"
            assert systemd.receive()[0] == "FDSTOREREMOVE=1"
            assert systemd.receive_fds()[1] == [inode(second)]

    def test_who_takes_over_goes_on_from_there(self, systemd: Systemd) -> None:
        with listening() as first, listening() as second:
            after = notifier(systemd, **{FDSTORE: "1"})
            after.remember({"kept/web/0/0": inode(first), "kept/gone/1/0": inode(second)})
            with contextlib.closing(after):
                after.keep({"kept/web/0/0": first})
                assert systemd.receive() == ["FDSTOREREMOVE=1", "FDNAME=kept/gone/1/0"]
                assert systemd.is_silent()

    def test_what_was_kept_and_is_not_wanted_any_more(self, systemd: Systemd) -> None:
        teller = notifier(systemd)
        with contextlib.closing(teller), listening() as sock:
            teller.remember({"kept/web/0/0": inode(sock)})
            teller.keep({"kept/web/0/0": sock})
            assert systemd.receive() == ["FDSTOREREMOVE=1", "FDNAME=kept/web/0/0"]


class TestPassed:
    @pytest.mark.parametrize(
        ("environ", "found"),
        [
            ({}, []),
            ({"LISTEN_FDS": "2"}, []),
            ({"LISTEN_FDS": "2", "LISTEN_PID": "6"}, []),
            ({"LISTEN_FDS": "x", "LISTEN_PID": "7"}, []),
            ({"LISTEN_FDS": "-1", "LISTEN_PID": "7"}, []),
            ({"LISTEN_FDS": "2", "LISTEN_PID": "7"}, [(3, ""), (4, "unknown")]),
            ({"LISTEN_FDS": "2", "LISTEN_PID": "7", "LISTEN_FDNAMES": "a:b"}, [(3, "a"), (4, "b")]),
        ],
    )
    def test_descriptors_and_names(self, environ: dict[str, str], found: list[tuple[int, str]]) -> None:
        assert passed(environ, 7) == found
