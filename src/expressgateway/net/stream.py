"""A byte stream over one non-blocking socket: plain here, TLS in ``tls_stream``.

Words: the *owner* is told what happens (``StreamOwner``); the *backlog* is what the kernel did not take
yet. The owner writes whole batches; past ``HIGH_BYTES`` of backlog it is told that the stream is congested,
and below ``LOW_BYTES`` that it has drained. Whoever ignores that is not bounded, so every owner maps it to
``pause`` and ``resume`` of the stream on the other side.

Closing has three forms. ``close`` sends what is left and then FIN; with ``linger`` it also reads on for a
while, because closing a socket with unread bytes makes the kernel send RST, which can destroy the answer
in the client's buffers (RFC 9112 9.6). ``write_eof`` ends one direction only. ``reset`` ends both at once,
with RST, so that nothing sent before can be taken for complete.
"""

import errno
import os
import select
import socket
import struct
from collections import deque
from typing import Final, Protocol

from expressgateway.net.reactor import IN, OUT, Reactor

READ_BYTES: Final = 65536  # one read of a stream that is not moving bulk
BULK_READ_BYTES: Final = 262144  # after a read that was full
HIGH_BYTES: Final = 65536  # of backlog: the owner is told to stop its source
LOW_BYTES: Final = 16384
LINGER_BYTES: Final = 1 << 20  # read and thrown away while lingering, at most
LINGER_S: Final = 2.0
STUCK_S: Final = 30.0  # a close whose rest nobody takes for so long is given up
_JOIN_BYTES: Final = 32768  # below this, copying buffers together is cheaper than sendmsg
_MAX_BUFFERS: Final = 512  # of one sendmsg: under IOV_MAX

_EPOLLIN: Final = select.EPOLLIN
_PARKED: Final = -1  # the descriptor is not in the reactor: see _hung_up
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST
_TCP_INFO_BYTES_ACKED: Final = 120  # offset of tcpi_bytes_acked in struct tcp_info, Linux 4.1 and later
_TCP_INFO_BYTES_RECEIVED: Final = 128  # of tcpi_bytes_received


class StreamOwner(Protocol):
    def on_open(self) -> None:
        """Connected, and the TLS handshake is done."""

    def on_bytes(self, data: bytes) -> None: ...
    def on_eof(self) -> None:
        """The peer ended its sending side. Sending is still possible."""

    def on_closed(self, error: str) -> None:
        """The stream failed (never called after ``close`` or ``reset``). ``error`` is a short sentence."""

    def on_released(self) -> None:
        """The descriptor is closed. Always the last call, exactly once."""

    def on_congested(self) -> None: ...
    def on_drained(self) -> None: ...


class Takeover(Protocol):
    """Who moves a direction's bytes instead of the stream (``l4.splice``)."""

    @property
    def pending(self) -> int:
        """Bytes taken from one socket and not yet given to the other."""

    def on_readable(self) -> bool: ...
    def on_writable(self) -> None: ...


class Stream:
    """See the module's text. The socket is non-blocking and belongs to the stream."""

    __slots__ = (
        "_backlog",
        "_events",
        "_is_closing",
        "_is_congested",
        "_is_connecting",
        "_is_ending",
        "_is_eof",
        "_is_flowing",
        "_is_paused",
        "_read_bytes",
        "_stuck_at",
        "_stuck_due",
        "_wants_writable",
        "backlog_bytes",
        "bytes_in",
        "bytes_out",
        "drain_first",
        "error_code",
        "fd",
        "is_closed",
        "linger_until",
        "owner",
        "preamble",
        "reactor",
        "sock",
        "takeover",
    )

    is_tls = False

    def __init__(self, reactor: Reactor, sock: socket.socket, owner: StreamOwner) -> None:
        # Wiring
        self.reactor = reactor
        self.sock = sock
        self.fd = sock.fileno()
        self.owner = owner
        # Connection
        self.is_closed = False
        self._is_connecting = False
        self.preamble = b""  # sent in the clear as soon as it is connected: a PROXY header
        self.error_code = 0  # errno of a connect that failed
        self._is_eof = False  # the peer's FIN was read
        self._is_ending = False  # write_eof was asked for
        self._is_closing = False  # close was asked for; lingering or sending the rest
        self.linger_until = 0.0  # seconds on the reactor's clock; 0: not lingering
        self._stuck_at = 0  # bytes a close had left at the last sweep, and by when they must have moved
        self._stuck_due = 0.0
        self._events = 0
        self._read_bytes = READ_BYTES
        self._is_paused = False
        self._is_flowing = False  # nothing but reading is called for: see _watch
        self.takeover: Takeover | None = None  # moves what arrives
        self.drain_first: Takeover | None = None  # moves what leaves, before anything of the backlog
        self._wants_writable = False
        self._backlog: deque[memoryview] = deque()  # at most HIGH_BYTES and one batch of the owner
        self.backlog_bytes = 0
        self._is_congested = False
        self.bytes_in = 0
        self.bytes_out = 0

    # -- opening ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin on a connected socket. ``on_open`` follows, at once unless there is a handshake."""
        self._events = IN
        self.reactor.add(self.fd, IN, self.on_ready)
        self._watch()
        self._opened()

    def connect(self, address: tuple[str, int] | tuple[str, int, int, int]) -> None:
        """Begin by connecting. ``on_open`` or ``on_closed`` follows, never from inside this call."""
        self._is_connecting = True
        self._events = OUT
        code = self.sock.connect_ex(address)
        if code in (0, errno.EINPROGRESS):
            self.reactor.add(self.fd, OUT, self.on_ready)
        else:
            self.error_code = code
            self.reactor.call_soon(self.fail, os.strerror(code))

    def _connected(self) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.error_code = code
            self.fail(os.strerror(code))
            return
        try:
            self.sock.getpeername()
        except OSError:
            return  # not yet: the event was meant for the descriptor's former life
        self._is_connecting = False
        if self.preamble:
            try:
                self.sock.sendall(self.preamble)  # an empty send buffer takes it whole
            except OSError as error:
                self.fail(error.strerror or str(error))
                return
        self._watch()
        self._opened()

    def _opened(self) -> None:
        self.owner.on_open()

    @property
    def is_shaking_hands(self) -> bool:
        """Not open yet: connecting, or in a TLS handshake."""
        return self._is_connecting

    # -- events ----------------------------------------------------------------------------------------

    def on_ready(self, events: int) -> None:
        """The reactor's call. Flags are hints only; see ``reactor``."""
        if events == _EPOLLIN and self._is_flowing:
            self._read()  # fast path
            return
        if self._is_connecting:
            self._connected()
            return
        if events & OUT:
            if self._backlog:
                self._send_backlog()
            elif self.drain_first is not None:
                self.drain_first.on_writable()
            if self.is_closed:
                return
        if self._is_paused or self._is_eof:
            if events & ~(IN | OUT):
                self._hung_up()
            return
        if not events & ~OUT:
            return
        if self._is_closing:
            self._discard()
            return
        if self.takeover is not None and self.takeover.on_readable():
            return
        self._read()

    def _hung_up(self) -> None:
        """Both directions have ended, or there is an error, while we do not read.

        Without an error what the peer sent before its FIN is still to be read, by whom we are paused for;
        the kernel would report the hang-up again and again, so the descriptor is parked meanwhile.
        """
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.fail(os.strerror(code))
        else:
            self._events = _PARKED
            self.reactor.remove(self.fd)

    def _read(self) -> None:
        try:
            data = self.sock.recv(self._read_bytes)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error.strerror or str(error))
            return
        size = len(data)
        if size == self._read_bytes:
            self._read_bytes = BULK_READ_BYTES
        elif not size:
            self._eof()
            return
        self.bytes_in += size
        self.owner.on_bytes(data)

    def _eof(self) -> None:
        self._is_eof = True
        self._watch()
        self.owner.on_eof()

    def fail(self, error: str) -> None:
        """The connection is lost: tell the owner, once."""
        if self.is_closed:
            return
        is_expected = self._is_closing
        self._is_closing = True
        self._is_flowing = False
        if not is_expected:
            self.owner.on_closed(error)  # may still ask ``was_delivered``
        self._release()

    def _watch(self) -> None:
        """Tell the reactor what this stream waits for now."""
        self._is_flowing = not (
            self.is_closed
            or self._is_paused
            or self._is_eof
            or self._is_closing
            or self._is_connecting
            or self.takeover is not None
        )
        if self.is_closed:
            return
        events = 0 if self._is_paused or self._is_eof else IN
        if self._backlog or self._is_connecting or self._wants_writable:
            events |= OUT
        if events != self._events:
            if self._events == _PARKED:
                if not events:
                    return
                self.reactor.add(self.fd, events, self.on_ready)
            else:
                self.reactor.modify(self.fd, events)
            self._events = events

    def take_over(self, mover: Takeover | None) -> None:
        """Let another move what arrives, or read again."""
        self.takeover = mover
        self._watch()

    def want_writable(self, wanted: bool) -> None:
        """For ``drain_first``: be told when the peer takes more."""
        if self._wants_writable != wanted:
            self._wants_writable = wanted
            self._watch()

    # -- reading ---------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop reading. Idempotent."""
        if not self._is_paused:
            self._is_paused = True
            self._read_bytes = READ_BYTES
            self._watch()

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._watch()

    # -- writing ---------------------------------------------------------------------------------------

    def write(self, buffers: list[bytes]) -> None:
        """Send these buffers, in order. The list is the stream's from here on."""
        if self.is_closed or self._is_ending:
            return
        if self._backlog:
            for buffer in buffers:
                self._backlog.append(memoryview(buffer))
                self.backlog_bytes += len(buffer)
            self._check_congestion()
            return
        if len(buffers) == 1:
            data = buffers[0]
        elif sum(map(len, buffers)) <= _JOIN_BYTES:
            data = b"".join(buffers)
        else:
            self._write_many(buffers)
            return
        try:
            sent = self._send(data)
        except OSError as error:
            self._write_failed(error)
            return
        if sent != len(data):
            self._backlog.append(memoryview(data)[sent:])
            self.backlog_bytes = len(data) - sent
            self._watch()
            self._check_congestion()

    def _write_many(self, buffers: list[bytes]) -> None:
        self._backlog.extend(memoryview(buffer) for buffer in buffers)
        self.backlog_bytes = sum(map(len, buffers))
        self._send_backlog()
        if not self.is_closed and self._backlog:
            self._watch()
            self._check_congestion()

    def _send(self, data: bytes | memoryview) -> int:
        """Send what the kernel takes; 0 if it takes nothing now."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return 0
        self.bytes_out += sent
        return sent

    def _send_backlog(self) -> None:
        backlog = self._backlog
        try:
            while backlog:
                if len(backlog) == 1:
                    sent = self._send(backlog[0])
                else:
                    sent = self._send_many()
                if not sent:
                    break
                self.backlog_bytes -= sent
                while backlog:  # empty buffers go with the last byte before them
                    size = len(backlog[0])
                    if sent < size:
                        backlog[0] = backlog[0][sent:]
                        break
                    sent -= size
                    backlog.popleft()
        except OSError as error:
            self._write_failed(error)
            return
        if self._is_congested and self.backlog_bytes <= LOW_BYTES:
            self._is_congested = False
            self.owner.on_drained()
            if self.is_closed:
                return
        if not backlog:
            self._watch()
            if self._is_ending:
                self._shutdown()

    def _send_many(self) -> int:
        buffers = list(self._backlog)[:_MAX_BUFFERS]
        try:
            sent = self.sock.sendmsg(buffers)
        except BlockingIOError:
            return 0
        self.bytes_out += sent
        return sent

    def _check_congestion(self) -> None:
        if not self._is_congested and self.backlog_bytes > HIGH_BYTES:
            self._is_congested = True
            self.owner.on_congested()

    def _write_failed(self, error: OSError) -> None:
        """The peer reset while we sent. What it had sent before is read first: it may be an answer."""
        message = error.strerror or str(error)
        self._backlog.clear()
        self.backlog_bytes = 0
        if not self._is_eof and not self._is_closing and not self._is_paused:
            try:
                data = self._last_words()
            except OSError:
                data = b""
            if data:
                self.bytes_in += len(data)
                self.owner.on_bytes(data)
        self.fail(message)

    def _last_words(self) -> bytes:
        return self.sock.recv(BULK_READ_BYTES)

    def acked(self) -> int:
        """Bytes that the peer's kernel has acknowledged so far, the SYN counted as one; -1 if unknown."""
        return self._tcp_count(_TCP_INFO_BYTES_ACKED)

    def _tcp_count(self, offset: int) -> int:
        """A counter of struct tcp_info; -1 if it cannot be had."""
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (count,) = struct.unpack_from("Q", info, offset)
        except (OSError, struct.error):
            return -1
        return int(count)

    def has_fin_come(self) -> bool:
        """Whether the peer has ended its sending side, even if a reset came before we could read that.

        The kernel counts a FIN as a byte received, as it takes one number of the sequence (RFC 9293 3.4).
        """
        return self._is_eof or self._tcp_count(_TCP_INFO_BYTES_RECEIVED) == self.bytes_in + 1

    def delivery_mark(self) -> int:
        """Where the peer's acknowledgements stand now, when all that was sent before is answered."""
        return self.bytes_out + 1

    def was_delivered(self, mark: int) -> bool:
        """Whether a program may have seen anything sent after ``mark``.

        A connection that the peer had closed before our bytes came has ended with FIN, which acknowledges all
        that was read until then, and answers the rest with RST: whatever that was, no program has seen it.
        Without a FIN nobody knows: what is acknowledged by an RST the kernel does not count, and a program
        that has read a request may well reset the connection before its kernel has acknowledged it otherwise.
        """
        acked = -1 if self.is_closed or not self.has_fin_come() else self.acked()
        return acked < 0 or acked > mark

    # -- closing ---------------------------------------------------------------------------------------

    def write_eof(self) -> None:
        """Send what is left, then end the sending side. Idempotent."""
        if self.is_closed or self._is_ending:
            return
        self._is_ending = True
        if not self._backlog:
            self._shutdown()

    def _shutdown(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        if self._is_closing and (self._is_eof or not self.linger_until):
            self._release()

    def close(self, linger: bool = False) -> None:
        """Send what is left, then FIN, then close. No call to the owner follows. Idempotent.

        ``linger``: the peer may still be sending; read and forget for at most ``LINGER_S``.
        """
        if self.is_closed or self._is_closing:
            return
        self._is_closing = True
        self._is_flowing = False
        if self._is_connecting:
            self._release()
            return
        self.bytes_in = 0  # from here on it counts what is thrown away
        if linger and not self._is_eof:
            self.linger_until = self.reactor.now + LINGER_S
        if not linger and not self._backlog and not self.is_tls:
            self._release()  # fast path: close() itself sends FIN
            return
        if self._is_ending and not self._backlog:
            self._shutdown()
        self.write_eof()
        if not self.is_closed:
            self._is_paused = False
            self._watch()

    def _discard(self) -> None:
        """Lingering, or sending the rest: what still arrives goes nowhere."""
        try:
            size = len(self._recv_raw())
        except BlockingIOError:
            return
        except OSError:
            self._release()
            return
        self.bytes_in += size
        if size and self.bytes_in <= LINGER_BYTES:
            return
        self._is_eof = True
        if self._backlog:
            self._watch()  # read no more, but what is left is still to be sent
        else:
            self._release()

    def _recv_raw(self) -> bytes:
        return self.sock.recv(READ_BYTES)

    def sweep(self, now: float) -> None:
        """End a close that lasts too long: a linger, or a rest that nobody takes."""
        if not self._is_closing:
            return
        unsent = self.backlog_bytes
        if unsent:
            if unsent != self._stuck_at:
                self._stuck_at = unsent
                self._stuck_due = now + STUCK_S
            elif now >= self._stuck_due:
                self.reset()
            if self.linger_until:
                self.linger_until = now + LINGER_S  # it begins when all is sent
        elif self.linger_until and now >= self.linger_until:
            self.reset()

    def reset(self) -> None:
        """Close at once with RST. No call to the owner follows. Idempotent."""
        if self.is_closed:
            return
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        except OSError:
            pass
        self._release()

    def _release(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self._backlog.clear()
        self.backlog_bytes = 0
        self.reactor.remove(self.fd)
        self.sock.close()
        self.owner.on_released()

    def __repr__(self) -> str:
        marks = "".join(
            letter
            for letter, is_set in (
                ("C", self._is_connecting),
                ("p", self._is_paused),
                ("e", self._is_eof),
                ("w", self._is_ending),
                ("c", self._is_closing),
                ("X", self.is_closed),
            )
            if is_set
        )
        return f"<{type(self).__name__} fd={self.fd} {marks or 'open'} backlog={self.backlog_bytes}>"
