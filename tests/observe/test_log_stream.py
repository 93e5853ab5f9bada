"""Standard error as a pipe, a socket, a file: what is taken arrives whole, and nothing waits for the rest."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expressgateway.observe.log_stream import LineStream

Made = Callable[[int], LineStream]


@pytest.fixture
def made() -> Iterator[Made]:
    """Makes streams, and closes them."""
    with contextlib.ExitStack() as keep:

        def make(fd: int) -> LineStream:
            stream = LineStream(fd)
            keep.callback(stream.close)
            return stream

        yield make


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):  # a test may have closed it
            os.close(fd)


def say(stream: LineStream, message: str, *arguments: object) -> None:
    stream.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, message, arguments, None))


def read(fd: int) -> list[str]:
    try:
        return os.read(fd, 1 << 20).decode().splitlines()
    except BlockingIOError:
        return []


LOST = " lines of this log were lost: nobody took them"


class TestPipe:
    def test_lines_in_order(self, ends: tuple[int, int], made: Made) -> None:
        reader, writer = ends
        stream = made(writer)
        say(stream, "one")
        say(stream, "two \udcff é")
        assert read(reader) == ["one", "two \\udcff é"]
        assert os.get_blocking(writer), "it is shared: its flags are left alone"

    @pytest.mark.parametrize("is_own", [True, False])
    def test_a_reader_that_sleeps(
        self, ends: tuple[int, int], made: Made, is_own: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader, writer = ends
        if not is_own:  # where it belongs to another user it cannot be opened

            def refuse(*_: object) -> int:
                raise PermissionError

            monkeypatch.setattr(os, "open", refuse)
        stream = made(writer)
        monkeypatch.undo()
        begun = time.monotonic()
        for number in range(9):
            say(stream, "%d %s", number, "x" * 1000)
        assert time.monotonic() - begun < 1.0
        taken = read(reader)
        assert 1 <= len(taken) <= 5
        said = 9
        while "again" not in taken:
            say(stream, "again")
            said += 1
            taken += read(reader)
        lost = [int(line.split()[0]) for line in taken if line.endswith(LOST)]
        assert lost
        assert len(taken) - len(lost) + sum(lost) == said, "what did not come is counted"
        numbers = [int(line.split()[0]) for line in taken if line.endswith("x")]
        assert numbers == sorted(set(numbers))

    def test_a_reader_that_is_gone(self, ends: tuple[int, int], made: Made) -> None:
        reader, writer = ends
        stream = made(writer)
        os.close(reader)
        say(stream, "to nobody")
        made(writer)  # nor does it fail when there is none to begin with
        say(made(writer), "to nobody")

    def test_a_long_line_that_is_torn_is_ended(self, ends: tuple[int, int], made: Made) -> None:
        reader, writer = ends
        stream = made(writer)
        say(stream, "x" * 5000)
        assert read(reader) == ["x" * 4096]
        say(stream, "next")
        assert read(reader) == ["", "1" + LOST, "next"]

    def test_what_cannot_be_formatted(self, ends: tuple[int, int], made: Made) -> None:
        reader, writer = ends
        stream = made(writer)
        say(stream, "%d", "no number")
        say(stream, "next")
        assert read(reader)[1:] == ["next"]


class TestSocket:
    def test_a_reader_that_sleeps(self, made: Made) -> None:
        """As systemd's journal."""
        reader, writer = socket.socketpair()
        with reader, writer:
            writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            stream = made(writer.fileno())
            begun = time.monotonic()
            for number in range(1000):
                say(stream, "%d %s", number, "x" * 1000)
            assert time.monotonic() - begun < 5.0
            reader.setblocking(False)
            taken = read(reader.fileno())
            assert [line.split()[0] for line in taken] == [str(number) for number in range(len(taken))]
            assert 0 < len(taken) < 1000
            say(stream, "again")
            assert read(reader.fileno()) == [
                f"{1000 - len(taken)} lines of this log were lost: nobody took them",
                "again",
            ]
            reader.close()
            say(stream, "to nobody")


def test_a_file(tmp_path: Path, made: Made) -> None:
    path = tmp_path / "log"
    with path.open("w") as file:
        file.write("before\n")
        file.flush()
        stream = made(file.fileno())
        say(stream, "one %s", "x" * 10_000)
        say(stream, "two")
    assert path.read_text().splitlines() == ["before", "one " + "x" * 10_000, "two"]
    say(stream, "it is closed")


def test_a_full_disk(made: Made) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        say(made(fd), "to nobody")
    finally:
        os.close(fd)
