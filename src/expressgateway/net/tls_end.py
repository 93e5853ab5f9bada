"""Ending one direction of TLS: a single ``SSL_shutdown``, which Python's ``ssl`` does not offer.

``SSLSocket.unwrap`` sends close_notify and then *reads*, for the peer's; what the peer was just sending is
then lost, and OpenSSL fails the connection. Half-closing needs the first half only (RFC 8446 6.1). So, as for
ticket keys (``tickets``), OpenSSL is called through ctypes, after the layout of Python's objects was proved.
"""

import ctypes
import ssl
from enum import Enum
from typing import Any, Final

from expressgateway.net.tickets import LibSsl, TicketsUnavailable, is_writable_memory

_ERROR_WANT_WRITE: Final = 3  # SSL_ERROR_WANT_WRITE
# PyObject_HEAD, the Python socket, then SSL *: in every CPython from 3.7 to 3.14.
_SSL_OFFSET: Final = object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)


class Ended(Enum):
    DONE = "close_notify is sent"
    WANTS_WRITABLE = "the socket takes nothing now"
    FAILED = "the connection is lost"
    UNAVAILABLE = "this Python's objects are not as expected"


class _Shutdown:
    """The two functions, and the way from an ``_ssl._SSLSocket`` to what it wraps."""

    def __init__(self) -> None:
        """Raises ``TicketsUnavailable`` where OpenSSL cannot be called, or the layout is another."""
        self._contexts = LibSsl.open()
        pointer = ctypes.c_void_p
        lib = ctypes.PyDLL(LibSsl.path())
        try:
            lib.SSL_get_SSL_CTX.restype = pointer
            lib.SSL_get_SSL_CTX.argtypes = [pointer]
            lib.SSL_shutdown.argtypes = [pointer]
            lib.SSL_get_error.argtypes = [pointer, ctypes.c_int]
            lib.ERR_clear_error.restype = None
        except AttributeError as error:
            raise TicketsUnavailable(f"this OpenSSL cannot be called from outside: {error}") from error
        self._context_of = lib.SSL_get_SSL_CTX
        self._shutdown = lib.SSL_shutdown
        self._error_of = lib.SSL_get_error
        self._clear = lib.ERR_clear_error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        probe = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
        address = _pointer_in(probe)
        if address % 8 or not is_writable_memory(address):
            raise TicketsUnavailable("what should be the OpenSSL object of a connection is not a pointer")
        if self._context_of(address) != self._contexts.pointer_of(context):
            raise TicketsUnavailable("the OpenSSL object of a connection is not where it is expected")

    def end(self, connection: ssl.SSLSocket) -> Ended:
        address = _pointer_in(connection)
        self._clear()
        result = self._shutdown(address)
        if result >= 0:
            return Ended.DONE
        error = self._error_of(address, result)
        self._clear()  # or Python's next call would take it for its own
        return Ended.WANTS_WRITABLE if error == _ERROR_WANT_WRITE else Ended.FAILED


def _pointer_in(connection: ssl.SSLSocket | ssl.SSLObject) -> int:
    inner: Any = getattr(connection, "_sslobj", None)
    if inner is None:
        return 0
    return ctypes.c_void_p.from_address(id(inner) + _SSL_OFFSET).value or 0


_shutdown: _Shutdown | None = None
_is_unavailable = False


def send_close_notify(connection: ssl.SSLSocket) -> Ended:
    """Send close_notify and read nothing. Never raises. ``UNAVAILABLE``: nothing was done."""
    global _shutdown, _is_unavailable  # noqa: PLW0603 - found out once per process
    if _shutdown is None:
        if _is_unavailable:
            return Ended.UNAVAILABLE
        try:
            _shutdown = _Shutdown()
        except (TicketsUnavailable, OSError):
            _is_unavailable = True
            return Ended.UNAVAILABLE
    if not _pointer_in(connection):
        return Ended.FAILED
    return _shutdown.end(connection)
