"""TLS contexts: what a listener presents to clients, and what it asks of backends.

`ServerTls` is a listener's side: its certificates, which of them a client gets by the name it asks for (SNI),
which clients must show a certificate of their own, and session tickets. `client_context` is the side towards
a backend. Everything arrives as bytes, because the process that serves may not read key files: keys and
certificates go to OpenSSL through an anonymous file in memory.

Words: a *virtual host* here is one certificate with the names it covers, or a pair for the same names with
different key types (ECDSA and RSA), OpenSSL takes what the client can do; the *default* is the first.

This module does no I/O and knows no sockets, no configuration models, no clock. What the data path must know:

- Contexts are for plain `ssl`: `context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False,
  suppress_ragged_eofs=False)` or `context.wrap_bio`. Measured on CPython 3.11 and OpenSSL 3.0, an idle TLS
  1.3 connection costs 14.6 KiB as SSLSocket and 17.3 KiB as SSLObject with its two MemoryBIO (socket included
  in both), so SSLSocket is the better shape. Python already sets SSL_MODE_RELEASE_BUFFERS: idle connections
  hold no record buffers.
- With `suppress_ragged_eofs=False` an end without close_notify is an `SSLEOFError`, an orderly one reads as
  `b""` (or `SSLZeroReturnError`). Some builds of Python hide the difference by OP_IGNORE_UNEXPECTED_EOF,
  which is off here: truncation must never look like completion.
- Renegotiation and compression are off, TLS 1.2 is the least.
- Client certificates that fail end the handshake with `SSLCertVerificationError`; under `optional`, no
  certificate is fine and a bad one is not.

Full handshakes, server CPU: RSA 2048 about 410-470 us, ECDSA P-256 190-260; resumed 60 (TLS 1.2) or 215-240
(TLS 1.3, which does a new key exchange each time). So ECDSA halves the cost of a handshake flood, and tickets
are worth most to TLS 1.2 and RSA.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
import sys
from _ssl import _test_decode_cert  # type: ignore[attr-defined]  # typeshed leaves it out
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast

from expressgateway.memory_file import as_file
from expressgateway.net.stapling import StaplingUnavailable, staple
from expressgateway.net.tickets import TicketKey, install_ticket_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ClientAuth = Literal["none", "optional", "required"]
Connection = ssl.SSLSocket | ssl.SSLObject

MAX_CHAIN: Final = 6
"""Certificates in one chain, the leaf included. A longer one is a mistake, and each handshake would carry it.
"""

DEFAULT_CIPHERS: Final = "ECDHE+AES128+AESGCM:ECDHE+AESGCM:ECDHE+CHACHA20"
"""TLS 1.2: forward secrecy and AEAD only, as HTTP/2 asks (RFC 9113 9.2.2); no finite-field DH, whose cost to
the server a client can choose. TLS 1.3 suites are OpenSSL's own.
"""

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TlsConfigError(ValueError):
    """Certificates, keys or settings that cannot work. The text is a sentence: which one, why, what to do."""


class CertificatePair(NamedTuple):
    """A chain, leaf first, with the leaf's private key, both PEM. `label` names it in errors (a path,
    usually).
    """

    cert_pem: bytes
    key_pem: bytes
    label: str = ""
    ocsp: bytes = b""
    """An OCSP response (DER) to be stapled; empty: none."""


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a leaf certificate says, for choosing, for metrics and for warnings."""

    names: tuple[str, ...]
    """DNS and IP names, lower-case; from the subject alternative name, else the common name."""
    not_before: int
    """Unix seconds."""
    not_after: int
    """Unix seconds."""
    is_ecdsa: bool
    label: str


class TlsSocket(ssl.SSLSocket):
    """What a server context's `wrap_socket` makes: an SSLSocket that remembers its server name."""

    sni: str | None = None
    accepted_by: ssl.SSLContext | None = None
    """The context before the server name switched to another. OpenSSL goes on using it until the connection
    ends, and CPython would free it: a reload in the middle of a handshake would crash."""


class TlsObject(ssl.SSLObject):
    """What a server context's `wrap_bio` makes; as `TlsSocket`."""

    sni: str | None = None
    accepted_by: ssl.SSLContext | None = None


def sni_of(connection: Connection) -> str | None:
    """The name the client asked for, lower-case, without a trailing dot; None without SNI or before the
    handshake.

    It is the peer's word: ASCII, at most 255 characters, but any of them (also control characters).
    """
    return connection.sni if isinstance(connection, (TlsSocket, TlsObject)) else None


def client_subject(connection: Connection) -> str | None:
    """The verified client certificate's subject as RFC 4514 text ("CN=alice,O=Example"), or None without one.

    ASCII without control characters (others are escaped), so it may go into a header or a log as it is. The
    same on a resumed session: the ticket carries the certificate. Issuer, names and serial:
    `connection.getpeercert()`. Raises ValueError before the handshake is done.
    """
    certificate = connection.getpeercert()
    if not certificate:
        return None
    # typeshed has one type for all values of this dict; the subject is RDNs of (name, value) pairs.
    subject = cast("tuple[tuple[tuple[str, str], ...], ...]", certificate.get("subject", ()))
    rdns = (
        "+".join(f"{_RDN_SHORT.get(key, key)}={_rfc4514(value)}" for key, value in rdn) for rdn in subject
    )
    return ",".join(reversed(list(rdns)))


_RDN_SHORT: Final = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "stateOrProvinceName": "ST",
    "localityName": "L",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}


def _rfc4514(value: str) -> str:
    """RFC 4514 2.4: specials with a backslash; what is not printable ASCII as hex pairs of its UTF-8."""
    escaped = re.sub(r'^[ #]|[,+"\\<>;=]| $', lambda m: "\\" + m[0], value)
    return re.sub(r"[^ -~]", lambda m: "".join(f"\\{byte:02X}" for byte in m[0].encode()), escaped)


def count_bad_sni(on_bad_sni: Callable[[], None]) -> None:
    """Call once per process: a server name that is not ASCII then costs a call, not a traceback on stderr.

    `_ssl` decodes the name before it asks us, ends the handshake with an alert when it cannot (the data path
    sees SSLError CALLBACK_FAILED), and hands the exception to `sys.unraisablehook`, where anybody on the
    network could make it print. Everything else goes to the hook that was there.
    """
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is UnicodeDecodeError and isinstance(unraisable.object, bytes):
            on_bad_sni()
        else:
            before(unraisable)

    sys.unraisablehook = hook


# --- the listener's side ---


class _VirtualHosts:
    """Which certificate goes with which name. Holds no default context, or that context would hold itself."""

    __slots__ = ("alternatives", "exact", "names", "wildcard")

    def __init__(self, names: Sequence[frozenset[str]]) -> None:
        self.names = names
        # Two certificates for one name: the earlier one has it.
        self.exact: dict[str, int] = {}
        self.wildcard: dict[str, int] = {}
        self.alternatives: list[ssl.SSLContext] = []  # of virtual host 1, 2, ...; the default is not in it
        for at, covered in enumerate(names):
            for name in covered:
                if name.startswith("*."):
                    self.wildcard.setdefault(name[1:], at)
                else:
                    self.exact.setdefault(name, at)

    def find(self, name: str) -> int | None:
        """Exact names first, then wildcards, which stand for exactly one label (RFC 6125 6.4.3)."""
        at = self.exact.get(name)
        if at is None and self.wildcard:
            at = self.wildcard.get(_parent(name))
        return at

    def covers(self, at: int, name: str) -> bool:
        names = self.names[at]
        return name in names or f"*{_parent(name)}" in names

    def on_server_name(self, connection: Connection, name: str | None, context: ssl.SSLContext) -> None:
        # No name, or one we do not have: the default. HTTP decides what that means, see is_misdirected.
        if name is None or not isinstance(connection, (TlsSocket, TlsObject)):
            return
        connection.sni = name = name.lower().removesuffix(".")
        at = self.find(name)
        if at:
            connection.accepted_by = context
            connection.context = self.alternatives[at - 1]


def _parent(name: str) -> str:
    """ ".b.c" of "a.b.c"; nothing for a name of one label or with an empty first one."""
    label, dot, rest = name.partition(".")
    return dot + rest if label else ""


class ServerTls:
    """The TLS of one listener: immutable but for its ticket keys. A reload builds a new one and drops this.

    certificates: the first is the default. Two for the same names must differ in key type.
    client_auth, client_ca_pem: whether clients show a certificate, and who may have signed it.
    min_version: "1.2" or "1.3"; tls13_only: "1.3" whatever min_version says.
    ciphers: TLS 1.2 suites in OpenSSL's notation; None is DEFAULT_CIPHERS.
    alpn: protocol names in order of preference; a client that offers none of them goes on without ALPN.

    Raises TlsConfigError.
    """

    __slots__ = ("_hosts", "_scope", "certificates", "context", "is_tickets_rotating", "unstapled")

    def __init__(
        self,
        certificates: Sequence[CertificatePair],
        *,
        client_auth: ClientAuth = "none",
        client_ca_pem: bytes | None = None,
        min_version: str = "1.2",
        tls13_only: bool = False,
        ciphers: str | None = None,
        alpn: Sequence[str] = (),
    ) -> None:
        if not certificates:
            raise TlsConfigError("a TLS listener needs at least one certificate with its key")
        if client_auth not in ("none", "optional", "required"):
            raise TlsConfigError(f"client_auth must be none, optional or required, not {client_auth!r}")
        if (client_auth == "none") != (client_ca_pem is None):
            raise TlsConfigError(
                "client_auth needs a client CA to check certificates against"
                if client_ca_pem is None
                else "a client CA does nothing while client_auth is none: set client_auth, or remove the CA"
            )
        pairs = [
            pair if pair.label else pair._replace(label=f"certificate {at}")
            for at, pair in enumerate(certificates, 1)
        ]
        self.certificates: tuple[CertificateFacts, ...] = tuple(_facts(pair) for pair in pairs)
        self.unstapled = ""
        """Why OCSP responses that were given are not stapled; empty: they are."""
        version = ssl.TLSVersion.TLSv1_3 if tls13_only else _version(min_version)

        def make(host: Sequence[CertificatePair]) -> ssl.SSLContext:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.sslsocket_class = TlsSocket
            context.sslobject_class = TlsObject
            _set_common(context, version, ciphers, alpn)
            context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
            for pair in host:
                if len(host) > 1:
                    # Alone first: beside an RSA certificate OpenSSL would take its key for the ECDSA one's.
                    _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), pair)
                _load_pair(context, pair)
                if pair.ocsp:
                    try:
                        staple(context, _leaf_der(pair), pair.ocsp)
                    except StaplingUnavailable as error:
                        self.unstapled = str(error)
            if client_ca_pem is not None:
                _load_ca(context, client_ca_pem, "the client CA")
                context.verify_mode = ssl.CERT_REQUIRED if client_auth == "required" else ssl.CERT_OPTIONAL
            return context

        groups = _group(pairs, self.certificates)
        self._hosts = _VirtualHosts([names for names, _ in groups])
        contexts = [make(host) for _, host in groups]
        self.context: Final = contexts[0]
        self._hosts.alternatives = contexts[1:]
        # A bound method of the table, which does not know the default context: dropping the context frees it
        # at once.
        self.context.sni_callback = self._hosts.on_server_name
        self.is_tickets_rotating = False
        """Whether tickets survive a rotation: False until keys are installed, or where OpenSSL keeps only
        one.
        """
        # What a resumed session takes over unchecked. Version, suites and names OpenSSL checks again by
        # itself.
        policy = hashlib.sha256(client_ca_pem or b"").digest()
        self._scope = client_auth.encode() + b" " + policy

    def install_tickets(self, keys: Sequence[TicketKey]) -> None:
        """Seal tickets with the first of `keys`, open them with any; again after each rotation.

        One schedule may serve several listeners: a ticket resumes only where the client-certificate policy is
        the same. Raises TicketsUnavailable: the context then goes on with OpenSSL's own key, good in this
        process.
        """
        self.is_tickets_rotating = install_ticket_keys(self.context, keys, self._scope)

    def names_for(self, sni: str | None) -> frozenset[str]:
        """The names of the virtual host that a client asking for `sni` is given."""
        at = None if sni is None else self._hosts.find(sni.lower().removesuffix("."))
        return self._hosts.names[at or 0]

    def is_misdirected(self, sni: str | None, host: str) -> bool:
        """Whether a request for `host` does not belong on a connection opened for `sni`: answer 421 (RFC 9110
        15.5.20).

        True when `host` is a name of another virtual host of this listener and not of the one that `sni` was
        given. So False when one certificate covers both, when no certificate names `host` (routing will say
        what becomes of it), and without SNI, which names no virtual host. An unknown `sni` was given the
        default.

        `host` is an authority without userinfo: case, a trailing dot, a port and brackets make no difference.
        """
        if sni is None or len(self._hosts.names) == 1 or sni == host:
            return False
        name = host_name(host)
        owner = self._hosts.find(name)
        if owner is None:
            return False
        given = self._hosts.find(sni.lower().removesuffix(".")) or 0
        return owner != given and not self._hosts.covers(given, name)


def host_name(host: str) -> str:
    """The name in an authority as certificates have it: no port, brackets or trailing dot; lower-case; IPv6
    short.
    """
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    if ":" in host:
        try:
            return ipaddress.ip_address(host).compressed
        except ValueError:
            return host.lower()
    return host.lower().removesuffix(".")


def _group(
    pairs: Sequence[CertificatePair], facts: Sequence[CertificateFacts]
) -> list[tuple[frozenset[str], list[CertificatePair]]]:
    """Virtual hosts in the order of their first certificate."""
    groups: dict[frozenset[str], list[int]] = {}
    for at, fact in enumerate(facts):
        same = groups.setdefault(frozenset(fact.names), [])
        for other in same:
            if facts[other].is_ecdsa == fact.is_ecdsa:
                raise TlsConfigError(
                    f"{fact.label} and {facts[other].label} are for the same names with the same type "
                    "of key: remove one of them"
                )
        same.append(at)
    return [(names, [pairs[at] for at in members]) for names, members in groups.items()]


# --- the backend's side ---


def client_context(
    *,
    verify_peer: bool = True,
    ca_pem: bytes | None = None,
    certificate: CertificatePair | None = None,
    min_version: str = "1.2",
    ciphers: str | None = None,
    alpn: Sequence[str] = (),
) -> ssl.SSLContext:
    """A context towards backends. Without `ca_pem` the system's roots are trusted; raises TlsConfigError.

    Give `wrap_socket` / `wrap_bio` the `server_hostname` from `backend_server_name`: it is sent as SNI
    (unless it is an IP address, RFC 6066 3) and, when `verify_peer`, must be in the backend's certificate.
    With `verify_peer` false it is SNI only and any certificate is taken. Share one context among backends
    with equal settings: with system roots each costs 0.8 MiB and 40 ms.

    Session reuse: `wrap_socket(..., session=s)` with `s = connection.session` read once response bytes have
    arrived (TLS 1.3 tickets come after the handshake), for the same context and the same `server_hostname`
    only: a resumed session is not verified again. Measured, client CPU: full 390-435 us, resumed 97 (TLS 1.2)
    or 205 (TLS 1.3), but reading `.session` copies it for 140-150 us. So it pays when one session is kept per
    backend and used many times, and not when it is read again after each handshake; pooled connections make
    both rare.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _set_common(context, _version(min_version), ciphers, alpn)
    if not verify_peer:
        if ca_pem is not None:
            raise TlsConfigError(
                "a CA for the backend does nothing while its certificate is not verified: remove one of them"
            )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_pem is not None:
        _load_ca(context, ca_pem, "the backend's CA")
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        _facts(certificate)
        _load_pair(context, certificate)
    return context


def backend_server_name(address_host: str, verify_hostname: str | None = None) -> str:
    """The `server_hostname` for a backend: `verify_hostname` if set, else the host of its address."""
    return host_name(verify_hostname or address_host)


# --- shared ---


def _version(text: str) -> ssl.TLSVersion:
    version = _VERSIONS.get(text)
    if version is None:
        raise TlsConfigError(f"min_version must be 1.2 or 1.3, not {text!r}")
    return version


def _set_common(
    context: ssl.SSLContext, version: ssl.TLSVersion, ciphers: str | None, alpn: Sequence[str]
) -> None:
    context.minimum_version = version
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if ciphers is not None:
        if version is ssl.TLSVersion.TLSv1_3:
            raise TlsConfigError(
                "ciphers choose among TLS 1.2 suites, and only TLS 1.3 is allowed: remove one of the settings"
            )
        _check_ciphers(ciphers)
    context.set_ciphers(ciphers or DEFAULT_CIPHERS)
    if alpn:
        try:
            context.set_alpn_protocols(list(alpn))
        except (ssl.SSLError, UnicodeError, OverflowError) as error:
            raise TlsConfigError(f"alpn names must be 1 to 255 ASCII characters each: {alpn!r}") from error


def _check_ciphers(ciphers: str) -> None:
    """OpenSSL ignores what it does not know beside what it knows; we refuse it."""
    scratch = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for word in re.split(r"[:, ]+", ciphers.strip()):
        try:
            scratch.set_ciphers(word.lstrip("!-+") if not word.startswith("@") else f"{word}:ALL")
        except ssl.SSLError as error:
            raise TlsConfigError(
                f"ciphers: {word!r} is no TLS 1.2 cipher that OpenSSL has (`openssl ciphers -v` lists them; "
                "TLS 1.3 suites need not be named)"
            ) from error
    try:
        scratch.set_ciphers(ciphers)
    except ssl.SSLError as error:
        raise TlsConfigError(f"ciphers: {ciphers!r} leaves no cipher to use") from error
    for cipher in scratch.get_ciphers():
        if cipher["auth"] == "auth-null" or not cipher["strength_bits"]:
            raise TlsConfigError(
                f"ciphers: {cipher['name']} does not authenticate or does not encrypt: add '!aNULL:!eNULL'"
            )


def _facts(pair: CertificatePair) -> CertificateFacts:
    label = pair.label or "the certificate"
    blocks = re.findall(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pair.cert_pem, re.DOTALL)
    if not blocks:
        raise TlsConfigError(f"{label} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")
    if len(blocks) > MAX_CHAIN:
        raise TlsConfigError(
            f"{label} holds a chain of {len(blocks)} certificates, at most {MAX_CHAIN} are sent: "
            "keep the server's own and its intermediates"
        )
    try:
        der = ssl.PEM_cert_to_DER_cert(blocks[0].decode("ascii"))
        # Reads a certificate as getpeercert() does. Private, and there since Python 2.6; the public ways are
        # another 80 ms and 11 MB per worker (cryptography) or a handshake with ourselves.
        with as_file(blocks[0] + b"\n") as path:
            decoded = _test_decode_cert(path)
        names = [
            host_name(value) if kind == "DNS" else ipaddress.ip_address(value.strip()).compressed
            for kind, value in decoded.get("subjectAltName", ())
            if kind in ("DNS", "IP Address")
        ] or [host_name(value) for rdn in decoded["subject"] for key, value in rdn if key == "commonName"]
    except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
        raise TlsConfigError(f"{label} cannot be read as a certificate: {error}") from error
    return CertificateFacts(
        names=tuple(dict.fromkeys(names)),
        not_before=ssl.cert_time_to_seconds(decoded["notBefore"]),
        not_after=ssl.cert_time_to_seconds(decoded["notAfter"]),
        is_ecdsa=_EC_PUBLIC_KEY in der,
        label=label,
    )


def _leaf_der(pair: CertificatePair) -> bytes:
    """Of a pair whose facts were read."""
    leaf, end, _ = pair.cert_pem.partition(b"-----END CERTIFICATE-----")
    begin = leaf.rindex(b"-----BEGIN CERTIFICATE-----")
    return ssl.PEM_cert_to_DER_cert((leaf[begin:] + end).decode("ascii"))


_EC_PUBLIC_KEY: Final = bytes.fromhex("06072a8648ce3d0201")
"""id-ecPublicKey (RFC 5480 2.1.1), as it stands in a certificate with such a key."""

_OTHER_KEY: Final = "its key belongs to another certificate: use the key it was requested with"
_WHAT_TO_DO: Final = {
    "KEY_VALUES_MISMATCH": _OTHER_KEY,
    "KEY_TYPE_MISMATCH": _OTHER_KEY,
    "NO_CERTIFICATE_ASSIGNED": _OTHER_KEY,  # the key's type is not the certificate's
    "EE_KEY_TOO_SMALL": "its key is too short for OpenSSL's security level: get one with RSA 2048 or P-256",
    "CA_KEY_TOO_SMALL": "a key in its chain is too short for OpenSSL's security level: replace that one",
    "CA_MD_TOO_WEAK": "a signature in its chain uses a broken digest (MD5 or SHA-1): replace that one",
}


class _PassphraseAskedError(Exception):
    pass


def _refuse_passphrase() -> str:
    raise _PassphraseAskedError


def _load_pair(context: ssl.SSLContext, pair: CertificatePair) -> None:
    label = pair.label or "the certificate"
    if b"PRIVATE KEY-----" not in pair.key_pem:
        raise TlsConfigError(f"the key for {label} is not in PEM form (-----BEGIN PRIVATE KEY-----)")
    try:
        with as_file(pair.cert_pem) as cert_path, as_file(pair.key_pem) as key_path:
            # Without a callback OpenSSL would ask for the passphrase on the terminal.
            context.load_cert_chain(cert_path, key_path, _refuse_passphrase)
    except _PassphraseAskedError:
        raise TlsConfigError(
            f"the key for {label} is encrypted: store it decrypted (openssl pkey), readable by its owner only"
        ) from None
    except ssl.SSLError as error:
        # OpenSSL gives no reason where its PEM reader fails, only the library.
        reason = (
            error.reason or "it or its key is damaged, or the key is of an unknown kind: export both again"
        )
        raise TlsConfigError(f"{label} cannot be used: {_WHAT_TO_DO.get(reason, reason)}") from error
    except OSError as error:
        raise TlsConfigError(f"{label} cannot be passed to OpenSSL through /proc/self/fd: {error}") from error


def _load_ca(context: ssl.SSLContext, ca_pem: bytes, what: str) -> None:
    try:
        # Bundles carry comments in any language between the certificates.
        context.load_verify_locations(cadata=ca_pem.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsConfigError(
            f"{what} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----), or is damaged: {error}"
        ) from error
