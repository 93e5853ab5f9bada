"""OCSP stapling: the certificate's own authority says in the handshake that it was not revoked (RFC 6066 8).

Python's `ssl` cannot do it, so OpenSSL is asked to call us when a client wants the response, as it is for
session tickets; the same proofs hold (see `tickets`), and one more: the certificate that OpenSSL has in the
context must be, byte for byte, the one that was just loaded into it. Whatever does not fit raises
`StaplingUnavailable`, and handshakes go on without.

What is given is what we were given: whether it is good, and still is, is decided elsewhere. This module knows
no clock and reads no file.
"""

from __future__ import annotations

import ctypes
import ssl
from typing import TYPE_CHECKING, Final

from expressgateway.net.tickets import LibSsl, TicketsUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_VERSION: Final = (3, 6)
"""OpenSSL from here on keeps responses in another way, which nobody has tried with this code."""

# Commands of SSL_CTX_callback_ctrl and SSL_ctrl, from openssl/ssl.h; part of the ABI.
_SET_STATUS_CALLBACK: Final = 63
_SET_STATUS_RESPONSE: Final = 71

# SSL_CTX_set_tlsext_status_cb(3): what a server's callback answers.
_STAPLED, _NOT_STAPLED = 0, 3

_StatusCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)  # SSL *, argument


class StaplingUnavailable(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """This Python and its OpenSSL do not let us staple. The text is the reason, as a sentence."""


class _Functions:
    """Those of OpenSSL that are needed here. `open` is the only way to them."""

    _opened: _Functions | None = None

    def __init__(self) -> None:
        try:
            self.contexts = LibSsl.open()
        except TicketsUnavailable as error:
            raise StaplingUnavailable(str(error)) from error
        if ssl.OPENSSL_VERSION_INFO[:2] >= _MAX_VERSION:
            raise StaplingUnavailable(f"stapling was not tried with {ssl.OPENSSL_VERSION}")
        lib = ctypes.PyDLL(LibSsl.path())
        pointer, number = ctypes.c_void_p, ctypes.c_int
        try:
            lib.SSL_CTX_callback_ctrl.restype = ctypes.c_long
            lib.SSL_CTX_callback_ctrl.argtypes = [pointer, number, _StatusCallback]
            lib.SSL_CTX_get0_certificate.restype = pointer
            lib.SSL_CTX_get0_certificate.argtypes = [pointer]
            lib.SSL_get_certificate.restype = pointer
            lib.SSL_get_certificate.argtypes = [pointer]
            lib.SSL_ctrl.restype = ctypes.c_long
            lib.SSL_ctrl.argtypes = [pointer, number, ctypes.c_long, pointer]
            lib.i2d_X509.argtypes = [pointer, pointer]
            lib.CRYPTO_malloc.restype = pointer
            lib.CRYPTO_malloc.argtypes = [ctypes.c_size_t, ctypes.c_char_p, number]
            lib.CRYPTO_free.restype = None
            lib.CRYPTO_free.argtypes = [pointer, ctypes.c_char_p, number]
        except AttributeError as error:
            raise StaplingUnavailable(f"this OpenSSL cannot be called from outside: {error}") from error
        self.set_callback = lib.SSL_CTX_callback_ctrl
        self.loaded = lib.SSL_CTX_get0_certificate
        self.chosen = lib.SSL_get_certificate
        self.ctrl = lib.SSL_ctrl
        self.encode = lib.i2d_X509
        self.malloc = lib.CRYPTO_malloc
        self.free = lib.CRYPTO_free

    @classmethod
    def open(cls) -> _Functions:
        if cls._opened is None:
            cls._opened = cls()
        return cls._opened

    def is_certificate(self, address: int | None, der: bytes) -> bool:
        """Whether the X509 at the address is that certificate."""
        if not address or self.encode(address, None) != len(der):
            return False
        buffer = ctypes.create_string_buffer(len(der))
        end = ctypes.c_void_p(ctypes.addressof(buffer))
        return self.encode(address, ctypes.byref(end)) == len(der) and buffer.raw == der


class _Staples:
    """The responses of one context, with the callback that OpenSSL holds a bare pointer to.

    Owned by the context, in its `__dict__`, as a ring of ticket keys is: a connection holds the context that
    it uses, so no handshake outlives the callback.
    """

    __slots__ = ("callback", "responses")

    def __init__(self, functions: _Functions) -> None:
        self.responses: dict[int, bytes] = {}
        """By the address of the certificate's X509, which the context keeps alive as long as itself."""
        self.callback = _StatusCallback(_make_callback(functions, self.responses))


def _make_callback(functions: _Functions, responses: dict[int, bytes]) -> Callable[[int, int], int]:
    """A closure over a dict, not a method: no cycle with what owns it."""
    chosen, malloc, free, ctrl = functions.chosen, functions.malloc, functions.free, functions.ctrl

    def on_status_wanted(ssl_p: int, _: int) -> int:
        try:
            response = responses.get(chosen(ssl_p))
            if not response:
                return _NOT_STAPLED
            copy = malloc(len(response), b"", 0)  # OpenSSL frees it with the connection
            if not copy:
                return _NOT_STAPLED
            ctypes.memmove(copy, response, len(response))
            if ctrl(ssl_p, _SET_STATUS_RESPONSE, len(response), copy) != 1:
                free(copy, b"", 0)
                return _NOT_STAPLED
        except BaseException:  # noqa: BLE001 - called from C: nowhere to raise to
            return _NOT_STAPLED
        return _STAPLED

    return on_status_wanted


_STAPLES: Final = "_ocsp_staples"


def staple(context: ssl.SSLContext, certificate_der: bytes, response: bytes) -> None:
    """Staple `response` (DER) where `context` shows the certificate that was loaded into it last, which is
    `certificate_der`. To be called right after loading it, before the context is used.

    Raises `StaplingUnavailable`; the context is then as it was.
    """
    functions = _Functions.open()
    pointer = functions.contexts.pointer_of(context)
    if not functions.contexts.agrees(pointer, context):
        raise StaplingUnavailable("the OpenSSL context of an SSLContext does not read as Python describes it")
    loaded = functions.loaded(pointer)
    if not functions.is_certificate(loaded, certificate_der):
        raise StaplingUnavailable("the certificate in the OpenSSL context is not the one that was loaded")
    known = vars(context).get(_STAPLES)
    if known is None:
        # Owned first, handed to OpenSSL second: never a moment with a callback that nobody keeps.
        known = vars(context)[_STAPLES] = _Staples(functions)
        if functions.set_callback(pointer, _SET_STATUS_CALLBACK, known.callback) != 1:
            del vars(context)[_STAPLES]
            raise StaplingUnavailable("OpenSSL refused the callback")
    known.responses[loaded] = response
