"""TLS on a stream's own descriptor.

OpenSSL reads and writes the socket itself: one call a read, no memory buffers in between, and with read-ahead
off it never holds bytes that the reactor cannot see, so readiness and pausing work as for a plain stream.
"""

import socket
import ssl
from typing import Final

from expressgateway.net.reactor import IN, OUT, Reactor
from expressgateway.net.stream import LINGER_S, READ_BYTES, Stream, StreamOwner
from expressgateway.net.tls_end import Ended, send_close_notify

_RECORD_BYTES: Final = 16384  # RFC 8446 5.1: the most plaintext in one record
_RECORDS: Final = 8  # read at once while each is full
_TCP_CLOSE: Final = 7  # tcpi_state after RST; FIN leaves it at CLOSE_WAIT
_COALESCE_BYTES: Final = 65_536  # buffers are joined until there is so much


def is_ragged_eof(error: OSError) -> bool:
    """Whether an error of ``ssl`` is FIN without close_notify. Python before 3.11.4 has no class for it."""
    return (
        isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"
    )


class TlsStream(Stream):
    """``on_open`` is called after the handshake. A stream that ends without close_notify fails."""

    __slots__ = (
        "_context",
        "_is_end_due",
        "_is_shaking_hands",
        "_server_hostname",
        "_session",
        "is_certificate_refused",
        "is_ragged_eof_allowed",
        "tls",
    )

    is_tls = True

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        owner: StreamOwner,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """With ``server_hostname`` or on ``connect`` this is the client side, else the server side."""
        super().__init__(reactor, sock, owner)
        self._context = context
        self._server_hostname = server_hostname
        self._session = session
        self._is_shaking_hands = False
        self._is_end_due = False  # close_notify waits: for room, or for what is unread
        self.tls: ssl.SSLSocket | None = None
        self.is_certificate_refused = False
        self.is_ragged_eof_allowed = False
        """Layer 4 has no framing of its own to lose: FIN without close_notify is then a plain end."""

    def _opened(self) -> None:
        is_client = self._server_hostname is not None
        try:
            self.sock.getpeername()  # a peer that is gone already: ``wrap_socket`` would lose the socket
            tls = self._context.wrap_socket(
                self.sock,
                server_side=not is_client,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
                server_hostname=self._server_hostname,
                session=self._session,
            )
        except (OSError, ValueError) as error:
            self.fail(f"TLS could not begin: {error}")
            return
        self.tls = tls
        self.sock = tls
        self._is_shaking_hands = True
        self._shake_hands()

    def _shake_hands(self) -> None:
        tls = self.tls
        if tls is None:
            return
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._wait_for(IN)
        except ssl.SSLWantWriteError:
            self._wait_for(IN | OUT)
        except ssl.SSLCertVerificationError as error:
            self.is_certificate_refused = True
            self.fail(f"TLS certificate not accepted: {error.verify_message}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            self.fail(f"TLS handshake failed: {reason}")
        else:
            self._is_shaking_hands = False
            self._watch()
            self.owner.on_open()

    def _wait_for(self, events: int) -> None:
        if self._events != events:
            self._events = events
            self.reactor.modify(self.fd, events)

    @property
    def is_shaking_hands(self) -> bool:
        return self._is_connecting or self._is_shaking_hands

    def on_ready(self, events: int) -> None:
        if self._is_shaking_hands and not self._is_closing:
            self._shake_hands()
        else:
            if self._is_end_due and events & OUT:
                self._shutdown()
                if self.is_closed:
                    return
            super().on_ready(events)

    def _read(self) -> None:
        tls = self.tls
        if tls is None:
            return
        chunks: list[bytes] = []
        failure = ""
        is_end = False
        try:
            while True:
                data = tls.read(_RECORD_BYTES)
                if not data:
                    is_end = True
                    break
                chunks.append(data)
                if len(data) < _RECORD_BYTES or len(chunks) == _RECORDS:
                    break
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLZeroReturnError:
            is_end = True
        except OSError as error:
            if is_ragged_eof(error):
                is_end = self.is_ragged_eof_allowed and not self._was_reset()
                failure = "" if is_end else "the peer closed the connection without ending TLS"
            else:
                failure = getattr(error, "reason", None) or error.strerror or str(error)
        if chunks:
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self.bytes_in += len(data)
            self.owner.on_bytes(data)
            if self.is_closed:
                return
        if is_end:
            self._eof()
        elif failure:
            self.fail(failure)
        if self._is_end_due and not self.is_closed:
            self._shutdown()

    def _was_reset(self) -> bool:
        """Whether an end was RST. Before Python 3.12.3 its ssl reports one as it does FIN."""
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE

    def _send(self, data: bytes | memoryview) -> int:
        tls = self.tls
        if tls is None:
            return 0
        size = len(data)
        sent = 0
        try:
            sent = tls.send(data)
            if sent < size:  # OpenSSL takes a record at a time
                view = memoryview(data)
                while sent < size:
                    sent += tls.send(view[sent:])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        self.bytes_out += sent
        return sent

    def _send_many(self) -> int:
        # Full records of small buffers, and of frames with their heads, which would be records of their own.
        # What was joined stays joined in the backlog, because a write that OpenSSL could not finish must be
        # repeated with the same bytes.
        backlog = self._backlog
        total = 0
        count = 0
        for buffer in backlog:
            total += len(buffer)
            count += 1
            if total >= _COALESCE_BYTES:
                break
        if count > 1:
            joined = memoryview(b"".join(backlog.popleft() for _ in range(count)))
            backlog.appendleft(joined)
        return self._send(backlog[0])

    def _last_words(self) -> bytes:
        return self.tls.read(_RECORD_BYTES) if self.tls is not None else b""

    def delivery_mark(self) -> int:
        return self.acked()

    def _shutdown(self) -> None:
        """Send close_notify; the other direction stays open (RFC 8446 6.1)."""
        tls = self.tls
        self._is_end_due = False
        self.want_writable(False)
        if tls is not None and not self._is_shaking_hands:
            ended = self._end_tls(tls)
            if ended is None:
                self._is_end_due = True
                return
            if ended is Ended.WANTS_WRITABLE:
                self._is_end_due = True
                if self._is_closing and not self.linger_until:
                    self.linger_until = self.reactor.now + LINGER_S
                self.want_writable(True)
                return
            if ended is Ended.FAILED and not self._is_closing and not self._is_eof:
                self.fail("TLS could not be half-closed")
                return
        if self._is_closing:
            try:
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
            except OSError:
                pass
            if self._is_eof or not self.linger_until:
                self._release()

    def _end_tls(self, tls: ssl.SSLSocket) -> Ended | None:
        """``None``: not before what is unread was read."""
        ended = send_close_notify(tls)
        if ended is not Ended.UNAVAILABLE:
            return ended
        # ``unwrap`` reads as well, and what it reads is lost: the end waits for what is seen to be unread.
        if not self._is_closing and self._has_unread():
            return None
        try:
            tls.unwrap()
        except ssl.SSLWantReadError:
            return Ended.DONE  # ours is sent, the peer's has not come
        except ssl.SSLWantWriteError:
            return Ended.WANTS_WRITABLE
        except (OSError, ValueError):
            return Ended.FAILED
        return Ended.DONE

    def _has_unread(self) -> bool:
        if self._is_eof:
            return False
        try:
            return bool(socket.socket.recv(self.sock, 1, socket.MSG_PEEK))
        except OSError:
            return False

    def _recv_raw(self) -> bytes:
        return socket.socket.recv(self.sock, READ_BYTES)  # the ciphertext: nobody wants to know
