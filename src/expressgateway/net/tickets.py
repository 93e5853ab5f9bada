"""TLS session tickets that every worker can open, with keys that are rotated while connections go on.

A client that comes back with a *ticket* skips the certificate and half of the handshake. OpenSSL seals
tickets with a random key of the process, so with several workers a client resumes only when it happens to
meet the same one again. Here the supervisor makes the keys and every worker installs the same ones.

Words: a *ticket key* seals and opens tickets; a *schedule* says which keys exist at a given time, the newest
seals and all of them open; *overlap* is how long a key still opens after it stopped sealing; a *scope* is
what else must be equal for a ticket to be good (the client-certificate policy, see `install_ticket_keys`).

Python's `ssl` cannot set ticket keys, so the OpenSSL that `_ssl` itself uses is called through `ctypes`. A
wrong guess about where `_ssl` keeps its `SSL_CTX` pointer would be a crash, so the guess is proved on a
context made for the purpose before any other one is touched (`LibSsl.open`), and each context is compared
with what Python says about it. Whatever does not fit raises `TicketsUnavailable`: the caller says so once and
goes on with tickets of one worker.

This module knows nothing of sockets, of clocks (`now` is an argument), or of how keys travel to the workers.
"""

from __future__ import annotations

import _ssl
import ctypes
import hmac
import json
import math
import os
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_KEYS: Final = 64
"""Bound of a schedule's list. `TicketKeySchedule` refuses settings that would need more."""

_NAME_BYTES: Final = 16
_SECRET_BYTES: Final = (
    80  # name 16, cipher key 32, MAC key 32: the size other servers use for a ticket key file
)


class TicketsUnavailable(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """This Python and its OpenSSL do not let us set ticket keys. The text is the reason, as a sentence."""


# --- the keys and their times -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TicketKey:
    """One key. `secret` is 80 random bytes, which never seal anything themselves: see `_sealing_key`."""

    secret: bytes = field(repr=False)
    born: float
    """When it began to seal, in the schedule's clock, seconds."""
    superseded: float | None = None
    """When a newer key took over; None for the one that seals."""

    @property
    def latest(self) -> float:
        return self.born if self.superseded is None else self.superseded

    def clamped(self, now: float) -> TicketKey:
        return TicketKey(
            self.secret, min(self.born, now), None if self.superseded is None else min(self.superseded, now)
        )


class TicketKeySchedule:
    """Which ticket keys exist at a time: pure logic, the supervisor's.

    A key seals for `rotation_interval_s`, then opens for another `overlap_s`, so a ticket stays good for at
    least `overlap_s` whenever it was given. Times are seconds of any one clock; to survive a change of
    process it must be a clock both processes share (`time.monotonic` is, on one machine, until it restarts).
    A clock that steps back makes a key seal, or open, for at most one more interval, or overlap; it takes
    none away.

    Raises ValueError for settings out of range, with a sentence.
    """

    __slots__ = ("_keys", "_random", "overlap_s", "rotation_interval_s")

    def __init__(
        self,
        rotation_interval_s: float,
        overlap_s: float,
        *,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if not (math.isfinite(rotation_interval_s) and rotation_interval_s > 0):
            raise ValueError("the ticket rotation interval must be more than 0 seconds")
        if not (math.isfinite(overlap_s) and overlap_s >= 0):
            raise ValueError("the ticket rotation overlap must be 0 seconds or more")
        if overlap_s > (MAX_KEYS - 2) * rotation_interval_s:
            raise ValueError(
                f"the ticket rotation overlap may be at most {MAX_KEYS - 2} rotation intervals long: "
                "each rotation within it is one more key to keep"
            )
        self.rotation_interval_s = rotation_interval_s
        self.overlap_s = overlap_s
        self._random = random
        self._keys: tuple[TicketKey, ...] = ()

    def keys_at(self, now: float) -> tuple[TicketKey, ...]:
        """Rotate and retire as `now` asks; the keys, newest first. The same object while nothing changes."""
        # A clock that stepped back: counting from now on bounds how long a key can go on.
        keys = tuple(key if key.latest <= now else key.clamped(now) for key in self._keys)
        if not keys or now >= keys[0].born + self.rotation_interval_s:
            older = (TicketKey(keys[0].secret, keys[0].born, now), *keys[1:]) if keys else ()
            keys = (TicketKey(self._random(_SECRET_BYTES), now), *older)
        live = [k for k in keys if k.superseded is None or now < k.superseded + self.overlap_s][:MAX_KEYS]
        if len(live) != len(self._keys) or any(a is not b for a, b in zip(live, self._keys, strict=True)):
            self._keys = tuple(live)
        return self._keys

    def next_change_at(self) -> float:
        """When `keys_at` will next answer differently; -inf before its first call."""
        if not self._keys:
            return -math.inf
        retirements = (k.superseded + self.overlap_s for k in self._keys if k.superseded is not None)
        return min(self._keys[0].born + self.rotation_interval_s, *retirements, math.inf)

    def dump(self) -> bytes:
        """The keys with their times, as JSON. They are secrets: only for a channel that nobody else reads."""
        return json.dumps([[k.secret.hex(), k.born, k.superseded] for k in self._keys]).encode()

    def restore(self, dumped: bytes) -> None:
        """Take over the keys of `dump`, of this process or the one before; the intervals stay this schedule's
        own.

        Raises ValueError if `dumped` is not such a dump; the schedule is then unchanged.
        """
        try:
            rows = json.loads(dumped)
            keys = tuple(
                TicketKey(bytes.fromhex(secret), float(born), None if end is None else float(end))
                for secret, born, end in rows
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"this is not a dump of ticket keys: {error}") from error
        if any(len(k.secret) != _SECRET_BYTES for k in keys) or any(
            (k.superseded is None) != (at == 0) for at, k in enumerate(keys)
        ):
            raise ValueError("this is not a dump of ticket keys: a key has the wrong length or order")
        self._keys = keys[:MAX_KEYS]


def pack_keys(keys: Sequence[TicketKey]) -> bytes:
    """The secrets alone, newest first: what a worker needs."""
    return b"".join(key.secret for key in keys)


def unpack_keys(packed: bytes) -> tuple[TicketKey, ...]:
    """What `pack_keys` packed, without times. Raises ValueError if its length cannot be right."""
    count, rest = divmod(len(packed), _SECRET_BYTES)
    if rest or not 1 <= count <= MAX_KEYS:
        raise ValueError(
            f"packed ticket keys are 1 to {MAX_KEYS} times {_SECRET_BYTES} bytes, not {len(packed)}"
        )
    secrets = (packed[at : at + _SECRET_BYTES] for at in range(0, len(packed), _SECRET_BYTES))
    return tuple(TicketKey(secret, 0.0, None if at == 0 else 0.0) for at, secret in enumerate(secrets))


# --- OpenSSL ------------------------------------------------------------------------------------------------


class _Param(ctypes.Structure):
    """OSSL_PARAM of openssl/core.h."""

    _fields_ = (
        ("key", ctypes.c_char_p),
        ("data_type", ctypes.c_uint),
        ("data", ctypes.c_char_p),
        ("data_size", ctypes.c_size_t),
        ("return_size", ctypes.c_size_t),
    )


_UTF8_STRING: Final = 4  # OSSL_PARAM_UTF8_STRING
_HMAC_WITH_SHA256: Final = (_Param * 2)(_Param(b"digest", _UTF8_STRING, b"SHA256", 6, 0), _Param())

_TicketCallback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # SSL *
    ctypes.c_void_p,  # key_name[16]
    ctypes.c_void_p,  # iv[EVP_MAX_IV_LENGTH]
    ctypes.c_void_p,  # EVP_CIPHER_CTX *
    ctypes.c_void_p,  # EVP_MAC_CTX *
    ctypes.c_int,  # 1 seals, 0 opens
)

# SSL_CTX_set_tlsext_ticket_key_evp_cb(3): what the callback answers.
_NOT_OURS, _DONE, _OPENED_RENEW = 0, 1, 2

# Commands of SSL_CTX_ctrl, from openssl/ssl.h; part of the ABI.
_SET_SESSION_CACHE_MODE: Final = 44
_SET_TICKET_KEYS: Final = 59
_GET_MIN_VERSION: Final = 130


class _SealingKey:
    """One key as OpenSSL takes it. Built at installation, so that the callback makes no decisions."""

    __slots__ = ("cipher_key", "mac_key", "name")

    def __init__(self, secret: bytes, scope: bytes) -> None:
        # The installed key is derived, so a ticket sealed under another scope names a key that does not exist
        # here.
        halves = [hmac.digest(secret, b"tls ticket key %d " % half + scope, "sha512") for half in (1, 2)]
        material = b"".join(halves)
        self.name = material[:_NAME_BYTES]
        self.cipher_key = material[_NAME_BYTES:48]
        self.mac_key = material[48:80]


class _KeyRing:
    """The installed keys of one context, with the callback that OpenSSL holds a bare pointer to.

    The context owns its ring (in its `__dict__`) and the ring knows nothing of the context, so both go
    together and without the garbage collector. A connection holds its context, so no handshake outlives the
    callback; one that is switched to another context must go on holding the first (`TlsSocket.accepted_by`).
    """

    __slots__ = ("_keys", "callback")

    def __init__(self, lib: LibSsl) -> None:
        self._keys: list[dict[bytes, _SealingKey]] = [{}]
        self.callback = _TicketCallback(_make_callback(lib, self._keys))

    def replace(self, keys: Sequence[_SealingKey]) -> None:
        # One assignment: a handshake sees the old keys or the new ones. The dict keeps the order, newest
        # first.
        self._keys[0] = {key.name: key for key in keys}


def _make_callback(
    lib: LibSsl, holder: list[dict[bytes, _SealingKey]]
) -> Callable[[int, int, int, int, int, int], int]:
    """The ticket callback over what `holder` holds. A closure over a list, not a method: no cycle with the
    ring.
    """
    init_cipher = {1: lib.EVP_EncryptInit_ex, 0: lib.EVP_DecryptInit_ex}
    init_mac, aes, ssl_version = lib.EVP_MAC_init, lib.aes_256_cbc, lib.SSL_version

    def ticket_key(ssl_p: int, name_p: int, iv_p: int, cipher_p: int, mac_p: int, seals: int) -> int:
        try:
            keys = holder[0]
            newest = next(iter(keys.values()))
            if seals:
                key = newest
                ctypes.memmove(name_p, key.name, _NAME_BYTES)
                ctypes.memmove(iv_p, os.urandom(16), 16)
            else:
                found = keys.get(ctypes.string_at(name_p, _NAME_BYTES))
                if found is None:
                    return _NOT_OURS
                key = found
            if init_cipher[seals](cipher_p, aes, None, key.cipher_key, iv_p) != 1:
                return _NOT_OURS
            if init_mac(mac_p, key.mac_key, len(key.mac_key), _HMAC_WITH_SHA256) != 1:
                return _NOT_OURS
            if seals or (key is newest and ssl_version(ssl_p) != ssl.TLSVersion.TLSv1_3):
                return _DONE
            # RFC 8446 C.4: clients use a TLS 1.3 ticket once, so each resumption must give the next one.
            return _OPENED_RENEW
        except BaseException:  # noqa: BLE001 - called from C: nowhere to raise to, a full handshake to fall to
            return _NOT_OURS

    return ticket_key


class LibSsl:
    """The functions of the OpenSSL that `_ssl` is linked to. `open` is the only way to one."""

    _opened: LibSsl | None = None

    def __init__(self) -> None:
        # dlopen of `_ssl` itself: symbols are then looked up in it and in the libraries it was linked to, in
        # that order, so neither a second OpenSSL in the process nor a static build can be confused with it.
        # PyDLL: these calls take well under a microsecond, less than giving the GIL away and back.
        try:
            lib = ctypes.PyDLL(self.path())
            pointer, number = ctypes.c_void_p, ctypes.c_int
            lib.OpenSSL_version_num.restype = ctypes.c_ulong
            lib.SSL_CTX_get_options.restype = ctypes.c_uint64
            lib.SSL_CTX_get_options.argtypes = [pointer]
            lib.SSL_CTX_get_verify_mode.argtypes = [pointer]
            lib.SSL_CTX_ctrl.restype = ctypes.c_long
            lib.SSL_CTX_ctrl.argtypes = [pointer, number, ctypes.c_long, pointer]
        except (OSError, AttributeError) as error:
            raise TicketsUnavailable(
                f"the OpenSSL of this Python cannot be called from outside: {error}"
            ) from error
        self.version_num = lib.OpenSSL_version_num
        self.get_options = lib.SSL_CTX_get_options
        self.get_verify_mode = lib.SSL_CTX_get_verify_mode
        self.ctrl = lib.SSL_CTX_ctrl
        self.aes_256_cbc: int | None = None
        try:
            lib.SSL_CTX_set_tlsext_ticket_key_evp_cb.argtypes = [pointer, _TicketCallback]
            lib.SSL_version.argtypes = [pointer]
            lib.EVP_CIPHER_fetch.restype = pointer
            lib.EVP_CIPHER_fetch.argtypes = [pointer, ctypes.c_char_p, ctypes.c_char_p]
            lib.EVP_EncryptInit_ex.argtypes = [pointer, pointer, pointer, ctypes.c_char_p, pointer]
            lib.EVP_DecryptInit_ex.argtypes = [pointer, pointer, pointer, ctypes.c_char_p, pointer]
            lib.EVP_MAC_init.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer]
        except AttributeError:  # before OpenSSL 3
            return
        self.set_ticket_callback = lib.SSL_CTX_set_tlsext_ticket_key_evp_cb
        # Named as in C, so that a search for the call finds it.
        self.EVP_EncryptInit_ex = lib.EVP_EncryptInit_ex
        self.EVP_DecryptInit_ex = lib.EVP_DecryptInit_ex
        self.EVP_MAC_init = lib.EVP_MAC_init
        self.SSL_version = lib.SSL_version
        # Fetched once: a fetch per ticket would cost more than the rest. Never freed: it lives as long as we
        # do.
        self.aes_256_cbc = lib.EVP_CIPHER_fetch(None, b"AES-256-CBC", None)

    @staticmethod
    def path() -> str | None:
        """What to load; the program itself where `_ssl` is built in."""
        path: str | None = getattr(_ssl, "__file__", None)
        return path

    @classmethod
    def open(cls) -> LibSsl:
        """The one instance, proved to read contexts right. Raises TicketsUnavailable."""
        if cls._opened is None:
            lib = cls()
            if lib.version_num() != ssl.OPENSSL_VERSION_NUMBER:
                raise TicketsUnavailable("the OpenSSL found is not the one that Python's ssl module reports")
            lib._prove_layout()
            cls._opened = lib
        return cls._opened

    def pointer_of(self, context: ssl.SSLContext) -> int:
        """The context's SSL_CTX: the first field after the object's header, in every CPython with `_ssl`."""
        offset = object.__basicsize__
        # ssl.SSLContext is a Python class; its base is the C structure that holds the pointer.
        structure = ssl.SSLContext.__base__ or object
        if structure.__basicsize__ < offset + ctypes.sizeof(ctypes.c_void_p):
            raise TicketsUnavailable("SSLContext objects of this Python are laid out in an unknown way")
        pointer = ctypes.c_void_p.from_address(id(context) + offset).value
        if not pointer:
            raise TicketsUnavailable(
                "SSLContext objects of this Python hold no OpenSSL context where it is expected"
            )
        return pointer

    def agrees(self, pointer: int, context: ssl.SSLContext) -> bool:
        """Whether what is at `pointer` says of itself what Python says of `context`."""
        # OpenSSL: SSL_VERIFY_NONE 0, SSL_VERIFY_PEER 1, SSL_VERIFY_FAIL_IF_NO_PEER_CERT 2.
        verify = {ssl.CERT_NONE: 0, ssl.CERT_OPTIONAL: 1, ssl.CERT_REQUIRED: 3}[context.verify_mode]
        options: int = self.get_options(pointer)
        return (
            options == int(context.options) & 0xFFFFFFFFFFFFFFFF and self.get_verify_mode(pointer) == verify
        )

    def _prove_layout(self) -> None:
        probe = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pointer = self.pointer_of(probe)
        # Before the first look at what it points to: OpenSSL would crash on an address that is not ours.
        if pointer % 8 or not is_writable_memory(pointer):
            raise TicketsUnavailable("what should be the OpenSSL context of an SSLContext is not a pointer")
        for option, verify_mode, version in (
            (ssl.OP_NO_TICKET, ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_3),
            (ssl.OP_NO_COMPRESSION, ssl.CERT_OPTIONAL, ssl.TLSVersion.TLSv1_2),
            (ssl.OP_NO_RENEGOTIATION, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_3),
        ):
            # Values change through Python and are read through OpenSSL, so agreement is no coincidence.
            probe.options ^= option
            probe.verify_mode = verify_mode
            probe.minimum_version = version
            if not self.agrees(pointer, probe) or self.ctrl(pointer, _GET_MIN_VERSION, 0, None) != version:
                raise TicketsUnavailable(
                    "the OpenSSL context of an SSLContext does not read as Python describes it"
                )


def is_writable_memory(address: int) -> bool:
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            for line in maps:
                span, permissions = line.split(maxsplit=2)[:2]
                first, _, end = span.partition("-")
                if int(first, 16) <= address < int(end, 16):
                    return permissions.startswith("rw")
    except (OSError, ValueError) as error:
        raise TicketsUnavailable(f"the memory map of this process cannot be read: {error}") from error
    return False


_RING: Final = "_ticket_key_ring"


def install_ticket_keys(context: ssl.SSLContext, keys: Sequence[TicketKey], scope: bytes = b"") -> bool:
    """Seal with the first of `keys`, open with all of them, from the next handshake on. May be called at any
    time.

    `context` is the one connections are accepted with: OpenSSL looks for ticket keys there, also when the
    server-name callback switched to another one. `scope` must differ wherever a resumed session would grant
    what a full handshake would not: the client certificate is not checked again on resumption, so a ticket
    from a listener (or from a configuration) that asks for none must not open one that does. Equal keys and
    scope on any worker are the same keys.

    The first call also turns off the context's own session cache, which holds 20,480 sessions of clients
    without tickets (TLS 1.2 only) and helps a client only when it meets the same worker.

    True if all keys are in use; False if this OpenSSL (before 3.0) takes only the first, so that a rotation
    makes older tickets useless at once. Raises TicketsUnavailable, and ValueError without keys.
    """
    if not keys:
        raise ValueError("at least one ticket key is needed")
    lib = LibSsl.open()
    pointer = lib.pointer_of(context)
    if not lib.agrees(pointer, context):
        raise TicketsUnavailable("the OpenSSL context of an SSLContext does not read as Python describes it")
    sealing = [_SealingKey(key.secret, scope) for key in keys[:MAX_KEYS]]
    if lib.aes_256_cbc is None:
        return _install_single_key(lib, pointer, sealing[0])
    ring = vars(context).get(_RING)
    if ring is None:
        ring = _KeyRing(lib)
        ring.replace(sealing)
        # Owned first, handed to OpenSSL second: never a moment with a callback that nobody keeps.
        vars(context)[_RING] = ring
        if lib.set_ticket_callback(pointer, ring.callback) != 1:
            del vars(context)[_RING]
            raise TicketsUnavailable("OpenSSL refused the ticket callback")
        lib.ctrl(pointer, _SET_SESSION_CACHE_MODE, 0, None)
    else:
        ring.replace(sealing)
    return True


def _install_single_key(lib: LibSsl, pointer: int, key: _SealingKey) -> bool:
    material = key.name + key.mac_key + key.cipher_key
    if lib.ctrl(pointer, _SET_TICKET_KEYS, len(material), material) != 1:
        raise TicketsUnavailable("OpenSSL refused the ticket key")
    lib.ctrl(pointer, _SET_SESSION_CACHE_MODE, 0, None)
    return False
