"""Descriptors on their way from one process to another, beside a control channel.

A *parcel* is one descriptor with a label that says what it is, such as ``listener 3``. Parcels go through a
Unix socket pair of their own (SCM_RIGHTS), because the streams of an event loop carry bytes only. Who sends
puts them in first and then says so on the channel; so they are there when they are looked for.
"""

import socket
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

_PER_MESSAGE: Final = 64  # descriptors; the kernel's limit is 253
_MESSAGE_BYTES: Final = 64 * 64

LISTENER: Final = "listener"
"""Followed by the listener's number: a listening socket."""
LASTING: Final = "lasting"
"""As `LISTENER`: one that is never to be shut down, because others have it, too."""
INSTEAD: Final = "instead"
"""Followed by a datagram listener's number: what to send through, in place of a socket that goes."""
WRITER: Final = "writer"
"""Followed by a seat: the way to the queue of the worker in it."""

Parcel = tuple[str, int]
"""Label and descriptor."""


class ParcelError(OSError):
    """The other end does not take what it is sent, or is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends. Messages keep their bounds, so that no two labels run together."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


def send(sock: socket.socket, parcels: Iterable[Parcel]) -> None:
    """Pass them on; the descriptors stay the caller's. Never blocks. Raises `ParcelError`."""
    waiting = iter(parcels)
    while batch := list(islice(waiting, _PER_MESSAGE)):
        labels = "\n".join(label for label, _ in batch).encode()
        if len(labels) > _MESSAGE_BYTES:
            raise ValueError("the labels of parcels are too long")
        try:
            socket.send_fds(sock, [labels], [fd for _, fd in batch])
        except OSError as error:
            raise ParcelError(error.errno, f"takes no descriptors: {error.strerror}") from None


def receive(sock: socket.socket) -> Iterator[Parcel]:
    """All that have come. The descriptors are the caller's."""
    while True:
        try:
            labels, fds, _, _ = socket.recv_fds(sock, _MESSAGE_BYTES, _PER_MESSAGE)
        except (BlockingIOError, ConnectionError):
            return
        if not labels:
            return
        yield from zip(labels.decode().split("\n"), fds, strict=True)
