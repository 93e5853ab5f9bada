"""Which listener has which sockets: the same, renamed, moved, new, gone, given - and taken back whole."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expressgateway.config.schema import Config
from expressgateway.control.failures import StartError
from expressgateway.control.notify import KEPT
from expressgateway.control.parcels import INSTEAD
from expressgateway.control.socket_book import (
    Given,
    Prepared,
    SocketBook,
    Where,
    close_all,
    from_systemd,
    where_of,
)
from expressgateway.control.sockets import Bound
from tests.net.loopback import descriptors
from tests.ports import free_port

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")


def config(*listeners: tuple[str, int, str]) -> Config:
    """Name, port and protocol of each."""
    return Config.model_validate(
        {
            "listeners": [
                {
                    "name": name,
                    "address": f"127.0.0.1:{port}",
                    "protocol": protocol,
                    "backends": [{"address": "127.0.0.1:9"}],
                }
                for name, port, protocol in listeners
            ]
        }
    )


@contextmanager
def running(
    *listeners: tuple[str, int, str], slots: int = 2, loose: dict[Where, Given] | None = None
) -> Iterator[SocketBook]:
    """A book with these in force; afterwards nothing is left open."""
    before = descriptors()
    if loose is not None:
        before -= sum(len(given.members) for given in loose.values())
    book = SocketBook(loose)
    try:
        close_all(book.adopt(book.prepare(config(*listeners), slots), slots))
        yield book
    finally:
        book.close()
    assert descriptors() == before, "a descriptor is left open"


def change(book: SocketBook, *listeners: tuple[str, int, str], slots: int = 2) -> Prepared:
    """To these; gives how they were prepared."""
    prepared = book.prepare(config(*listeners), slots)
    close_all(book.adopt(prepared, slots))
    return prepared


def inodes(bound: Bound) -> list[int]:
    return [inode(member) for member in bound.members]


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def state(book: SocketBook) -> object:
    return [
        (one.number, one.name, one.kind, one.is_spread, one.lasting, inodes(one)) for one in book.bounds
    ], book.slots


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def bound_socket(
    kind: socket.SocketKind = socket.SOCK_STREAM, port: int = 0, *, reuses: bool
) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuses))
    sock.bind(("127.0.0.1", port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def loose(*socks: socket.socket, lasting: int | None = None) -> dict[Where, Given]:
    """As a socket unit gives them, unless fewer are said to be lasting."""
    found: dict[Where, Given] = {}
    for sock in socks:
        given = found.setdefault(where_of(sock), Given())
        given.members.append(sock)
        given.lasting = len(given.members) if lasting is None else lasting
    return found


class TestChanges:
    def test_the_same_is_not_touched(self) -> None:
        port = free_port()
        with running(("web", port, "h1")) as book:
            before, bounds = state(book), book.bounds
            prepared = change(book, ("web", port, "h1"))
            assert book.bounds == bounds
            assert state(book) == before
            assert not prepared.handed
            assert not prepared.fresh

    @pytest.mark.parametrize("after", [("site", "h1"), ("web", "tcp")])
    def test_another_on_the_same_sockets(self, after: tuple[str, str]) -> None:
        port, (name, kind) = free_port(), after
        with running(("web", port, "h1")) as book:
            (old,) = book.bounds
            sockets = inodes(old)
            prepared = book.prepare(config((name, port, kind)), 2)
            assert prepared.handed == (old.number,)
            assert accepts(port)
            assert book.adopt(prepared, 2) == [old]
            old.close()
            (new,) = book.bounds
            assert (new.name, new.kind, new.number) == (name, kind, old.number + 1)
            assert inodes(new) == sockets
            assert accepts(port)

    def test_moved(self) -> None:
        was, now = free_port(), free_port()
        with running(("web", was, "h1")) as book:
            prepared = book.prepare(config(("web", now, "h1")), 2)
            assert accepts(was), "until the new one is in force"
            assert accepts(now)
            close_all(book.adopt(prepared, 2))
            assert not accepts(was)
            assert prepared.handed == ()

    def test_new_and_gone(self) -> None:
        one, two, three = free_port(), free_port(), free_port()
        with running(("one", one, "tcp"), ("two", two, "tcp")) as book:
            _, kept = book.bounds
            change(book, ("two", two, "tcp"), ("three", three, "udp"))
            assert [bound.number for bound in book.bounds] == [1, 2]
            assert book.bounds[0] is kept
            assert not accepts(one)

    def test_numbers_are_never_given_twice(self) -> None:
        port = free_port()
        with running(("a", port, "tcp")) as book:
            numbers = [book.bounds[0].number]
            for name in "bab":
                change(book, (name, port, "tcp"))
                numbers.append(book.bounds[0].number)
            assert numbers == [0, 1, 2, 3]

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_more_workers(self, protocol: str) -> None:
        port = free_port()
        with running(("web", port, protocol)) as book:
            first = inodes(book.bounds[0])
            change(book, ("web", port, protocol), slots=4)
            assert inodes(book.bounds[0])[:2] == first
            assert len(set(inodes(book.bounds[0]))) == 4
            assert book.slots == 4

    def test_fewer_workers(self) -> None:
        """The last members stay until their workers have gone."""
        port = free_port()
        with running(("web", port, "tcp"), slots=3) as book:
            sockets = inodes(book.bounds[0])
            change(book, ("web", port, "tcp"), slots=1)
            assert inodes(book.bounds[0]) == sockets
            book.keep_from(1)
            assert book.bounds[0].is_spread
            book.give_up(1)
            assert inodes(book.bounds[0]) == sockets[:1]
            change(book, ("web", port, "tcp"), slots=2)
            assert len(book.bounds[0].members) == 2

    def test_fewer_workers_read_no_datagrams(self) -> None:
        tcp, udp = ("web", free_port(), "tcp"), ("dns", free_port(), "udp")
        with running(tcp, udp, slots=3) as book:
            web, dns = book.bounds
            first = dns.members[0]
            change(book, tcp, udp, slots=1)
            assert [name.rpartition("/")[2] for name in book.keepsakes()] == ["0", "0"]
            assert book.leave_groups(1) == [(f"{INSTEAD} {dns.number}", first.fileno())]
            assert (len(web.members), dns.members) == (3, [first])

    def test_more_again_while_they_are_given_up(self) -> None:
        """Nothing is taken from under a configuration that is on its way."""
        tcp, udp = ("web", free_port(), "tcp"), ("dns", free_port(), "udp")
        with running(tcp, udp, slots=3) as book:
            change(book, tcp, udp, slots=1)
            prepared = book.prepare(config(tcp, udp), 2)
            assert book.leave_groups(1) == []
            assert not book.give_up(1)
            assert [len(bound.members) for bound in prepared.bounds] == [3, 3]
            book.abandon(prepared)
            assert [len(bound.members) for bound in book.bounds] == [1, 1]
            change(book, tcp, udp, slots=2)
            assert [len(bound.members) for bound in book.bounds] == [2, 2]

    def test_who_comes_after_one_that_was_spread_is_spread_too(self) -> None:
        """Else the program would keep connections from workers that are added later."""
        port = free_port()
        with running(("web", port, "h1"), slots=2) as book:
            change(book, ("web", port, "h1"), slots=1)
            book.keep_from(1)
            book.give_up(1)
            change(book, ("site", port, "h1"), slots=1)
            change(book, ("site", port, "h1"), slots=2)
            clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(40)]
            for member in book.bounds[0].members:
                member.accept()[0].close()  # raises if none came there
            for client in clients:
                client.close()


class TestTakingBack:
    def test_a_bind_that_fails_in_the_middle(self) -> None:
        ports = [free_port() for _ in range(4)]
        with (
            running(("a", ports[0], "h1"), ("b", ports[1], "udp")) as book,
            socket.create_server(("127.0.0.1", ports[3])),
        ):
            before, open_ = state(book), descriptors()
            with pytest.raises(StartError, match="'taken' cannot be bound"):
                book.prepare(
                    config(
                        ("renamed", ports[0], "h1"),
                        ("b", ports[1], "udp"),
                        ("new", ports[2], "tcp"),
                        ("taken", ports[3], "tcp"),
                    ),
                    4,
                )
            assert state(book) == before
            assert descriptors() == open_
            assert accepts(ports[0])
            assert not accepts(ports[2])

    def test_a_given_one_is_there_for_the_next_attempt(self) -> None:
        given, taken = bound_socket(reuses=True), free_port()
        book = SocketBook(loose(given))
        with socket.create_server(("127.0.0.1", taken)):
            open_ = descriptors()
            with pytest.raises(StartError):
                book.prepare(config(("web", port_of(given), "tcp"), ("taken", taken, "tcp")), 3)
            assert descriptors() == open_
        prepared = book.prepare(config(("web", port_of(given), "tcp")), 3)
        assert prepared.bounds[0].members[0] is given
        book.adopt(prepared, 3)
        book.close()

    def test_abandoned(self) -> None:
        one, two = free_port(), free_port()
        with running(("a", one, "h1")) as book:
            before, open_ = state(book), descriptors()
            book.abandon(book.prepare(config(("b", one, "h1"), ("c", two, "tcp")), 3))
            assert state(book) == before
            assert descriptors() == open_
            assert accepts(one)
            assert not accepts(two)
            book.abandon(book.prepare(config(("a", one, "h1")), 4))
            assert state(book) == before


class TestGiven:
    @pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
    def test_by_address(self, kind: socket.SocketKind) -> None:
        protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
        given, other = bound_socket(kind, reuses=True), free_port()
        port = port_of(given)
        with running(("other", other, protocol), ("web", port, protocol), loose=loose(given)) as book:
            bound = book.bounds[1]
            assert bound.members[0] is given
            assert given.gettimeout() == 0
            assert len(set(inodes(bound))) == 2, "another member stands beside it"
            assert bound.lasting == 1
            assert bound.wanted == bound.address
            assert [name.split("/")[1] for name in book.keepsakes()] == ["other", "other", "web"]

    def test_one_that_does_not_listen_yet(self) -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        port = port_of(sock)
        with running(("web", port, "tcp"), slots=1, loose=loose(sock)):
            assert accepts(port)

    def test_those_that_nobody_wants_are_closed(self, caplog: pytest.LogCaptureFixture) -> None:
        given = bound_socket(reuses=True)
        port = port_of(given)
        with running(("web", free_port(), "tcp"), loose=loose(given)):
            assert given.fileno() == -1
            assert f"no listener has them: 127.0.0.1:{port}" in caplog.text

    def test_tcp_without_reuse_is_one_queue_for_all(self) -> None:
        given = bound_socket(reuses=False)
        port = port_of(given)
        with running(("web", port, "tcp"), slots=3, loose=loose(given)) as book:
            (bound,) = book.bounds
            assert bound.is_shared
            assert len(set(inodes(bound))) == 1
            assert (len(bound.members), bound.lasting) == (3, 3)
            assert book.keepsakes() == {}
            change(book, ("web", port, "tcp"), slots=1)
            book.keep_from(1)
            assert not bound.is_spread, "there is nothing to choose from"
            book.give_up(1)
            assert (len(bound.members), bound.lasting) == (1, 1)
            assert accepts(port)
            change(book, ("web", port, "tcp"), slots=2)
            assert (len(bound.members), bound.lasting) == (2, 2)

    def test_datagrams_without_reuse_and_two_workers(self) -> None:
        given = bound_socket(socket.SOCK_DGRAM, reuses=False)
        book = SocketBook(loose(given))
        with pytest.raises(
            StartError, match=r"'dns' was given 1 socket for 2 workers.*ReusePort=yes.*workers = 1"
        ):
            book.prepare(config(("dns", port_of(given), "udp")), 2)
        book.adopt(book.prepare(config(("dns", port_of(given), "udp")), 1), 1)
        book.close()

    def test_more_datagram_sockets_than_workers(self) -> None:
        first = bound_socket(socket.SOCK_DGRAM, reuses=True)
        second = bound_socket(socket.SOCK_DGRAM, port_of(first), reuses=True)
        listener = ("dns", port_of(first), "udp")
        with running(listener, slots=2, loose=loose(first, second)) as book:
            before = state(book)
            with pytest.raises(StartError, match=r"was given 2 sockets for 1 workers.*runtime.workers = 2"):
                book.prepare(config(listener), 1)
            assert state(book) == before

    @as_root
    @pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
    def test_one_of_another_user(self, kind: socket.SocketKind) -> None:
        """The kernel lets no member of ours stand beside it (EADDRINUSE)."""
        os.seteuid(65534)
        try:
            given = bound_socket(kind, reuses=True)
        finally:
            os.seteuid(0)
        port = port_of(given)
        if kind == socket.SOCK_STREAM:
            with running(("web", port, "tcp"), slots=3, loose=loose(given)) as book:
                assert book.bounds[0].is_shared
                assert len(book.bounds[0].members) == 3
        else:
            book = SocketBook(loose(given))
            with pytest.raises(StartError, match="no more can stand beside"):
                book.prepare(config(("dns", port, "udp")), 2)
            book.close()


class TestLeft:
    """What the process before left with systemd: as many as there were workers, and ours to give up."""

    def test_fewer_workers_than_before(self, caplog: pytest.LogCaptureFixture) -> None:
        first = bound_socket(reuses=True)
        second = bound_socket(port=port_of(first), reuses=True)
        with running(("web", port_of(first), "tcp"), slots=1, loose=loose(first, second, lasting=0)) as book:
            assert book.bounds[0].members == [first]
            assert second.fileno() == -1
            assert "1 sockets of before are closed" in caplog.text

    def test_more_workers_than_before(self) -> None:
        first = bound_socket(reuses=True)
        with running(("web", port_of(first), "tcp"), slots=3, loose=loose(first, lasting=0)) as book:
            assert len(set(inodes(book.bounds[0]))) == 3
            names = [f"{KEPT}web/0/{index}" for index in range(3)]
            assert list(book.keepsakes()) == names


class TestFromSystemd:
    FIRST = 500

    def read(self, *named: tuple[str, int], pid: int = 7) -> dict[Where, Given]:
        """As if copies of these descriptors had been passed."""
        for index, (_, fd) in enumerate(named):
            os.dup2(fd, self.FIRST + index)
        names = ":".join(name for name, _ in named)
        environ = {"LISTEN_FDS": str(len(named)), "LISTEN_FDNAMES": names, "LISTEN_PID": "7"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("expressgateway.control.notify.FIRST_FD", self.FIRST)
            return from_systemd(environ, pid)

    def test_units_and_what_was_left(self, caplog: pytest.LogCaptureFixture) -> None:
        before = descriptors()
        one = bound_socket(reuses=True)
        two = bound_socket(port=port_of(one), reuses=True)
        udp = bound_socket(socket.SOCK_DGRAM, reuses=True)
        with one, two, udp, socket.socket(socket.AF_UNIX) as unix, Path("/dev/null").open() as file:
            found = self.read(
                (f"{KEPT}web/0/1", two.fileno()),
                (f"{KEPT}web/0/0", one.fileno()),
                ("expressgateway.socket", udp.fileno()),
                (f"{KEPT}udp/1/0", udp.fileno()),
                ("x", unix.fileno()),
                ("y", file.fileno()),
            )
            os.close(self.FIRST + 5)  # what is no socket is not ours to close
            assert "is no socket" in caplog.text
            assert "is no IP socket" in caplog.text
            assert set(found) == {where_of(one), where_of(udp)}
            web, dns = found[where_of(one)], found[where_of(udp)]
            assert [inode(member) for member in web.members] == [inode(one), inode(two)], "in their order"
            assert web.lasting == 0
            assert ([inode(member) for member in dns.members], dns.lasting) == ([inode(udp)], 1)
            assert not any(member.get_inheritable() for member in (*web.members, *dns.members))
            for member in (*web.members, *dns.members):
                member.close()
        assert descriptors() == before

    def test_another_process_was_meant(self) -> None:
        assert from_systemd({"LISTEN_FDS": "1", "LISTEN_PID": "6"}, 7) == {}

    def test_one_that_is_not_there(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("expressgateway.control.notify.FIRST_FD", self.FIRST)
            assert from_systemd({"LISTEN_FDS": "1", "LISTEN_PID": "7"}, 7) == {}
        assert "is no socket" in caplog.text
