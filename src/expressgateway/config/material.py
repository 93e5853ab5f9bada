"""The files a configuration names: read once, checked, and kept as bytes.

The supervisor reads them while it may (as root) and hands them to workers that may not. Introduces
`Material`. Nothing here writes, and no message or `repr` shows what a key file holds.
"""

import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from expressgateway.config.diagnose import Problem
from expressgateway.config.pools import Backend
from expressgateway.config.schema import Config
from expressgateway.config.values import Loc, quoted, shown

MAX_CHAIN: Final = 6
"""Certificates in a chain, the server's own included."""

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""The largest file read: several times the CA bundle of a distribution."""

_GROUP_OR_OTHERS: Final = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH


@dataclass(frozen=True, slots=True, repr=False)
class Material:
    """The bytes of every file the configuration names."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By absolute path, as it stands in the model."""

    def __repr__(self) -> str:
        return f"Material({len(self.files)} files)"


@dataclass(frozen=True, slots=True)
class _Pair:
    chain: Path
    key: Path
    chain_loc: Loc
    key_loc: Loc
    listener: int | None = None
    """The listener among whose certificates clients' SNI chooses."""


def _pairs(config: Config) -> Iterator[_Pair]:
    for index, listener in enumerate(config.listeners):
        if (quic := listener.quic) is not None:
            where: Loc = ("listeners", index, "quic")
            yield _Pair(quic.cert_path, quic.key_path, (*where, "cert_path"), (*where, "key_path"))
        if listener.tls is None:
            continue
        at: Loc = ("listeners", index, "tls")
        tls = listener.tls
        yield _Pair(tls.cert_path, tls.key_path, (*at, "cert_path"), (*at, "key_path"), index)
        for number, pair in enumerate(tls.certificates):
            inner: Loc = (*at, "certificates", number)
            yield _Pair(pair.cert_path, pair.key_path, (*inner, "cert_path"), (*inner, "key_path"), index)
    for at, backend in _backends(config):
        if backend.tls_cert_path is not None and backend.tls_key_path is not None:
            yield _Pair(
                backend.tls_cert_path, backend.tls_key_path, (*at, "tls_cert_path"), (*at, "tls_key_path")
            )


def _bundles(config: Config) -> Iterator[tuple[Path, Loc]]:
    for index, listener in enumerate(config.listeners):
        if listener.tls is not None and listener.tls.client_ca_path is not None:
            yield listener.tls.client_ca_path, ("listeners", index, "tls", "client_ca_path")
        raw_proxy = listener.quic.raw_proxy if listener.quic is not None else None
        if raw_proxy is not None and raw_proxy.backend_ca_path is not None:
            yield raw_proxy.backend_ca_path, ("listeners", index, "quic", "raw_proxy", "backend_ca_path")
    for at, backend in _backends(config):
        if backend.tls_ca_path is not None:
            yield backend.tls_ca_path, (*at, "tls_ca_path")


def _backends(config: Config) -> Iterator[tuple[Loc, Backend]]:
    for index, listener in enumerate(config.listeners):
        for number, backend in enumerate(listener.backends):
            yield ("listeners", index, "backends", number), backend
    for index, pool in enumerate(config.pools):
        for number, backend in enumerate(pool.backends):
            yield ("pools", index, "backends", number), backend


def gather(config: Config, *, insecure_key_permissions: bool = False) -> tuple[Material, list[Problem]]:
    """Reads and checks every file; problems are placed at the keys that name the files."""
    reader = _Reader(insecure_key_permissions)
    for pair in _pairs(config):
        reader.check_pair(pair)
    for path, loc in _bundles(config):
        reader.check_bundle(path, loc)
    for at, backend in _backends(config):
        if backend.speaks_tls and not backend.tls_verify_peer:
            reader.warn(
                (*at, "tls_verify_peer"),
                f"the certificate of {shown(backend.id)} is not checked: anyone on the way can pose as it",
                "name its CA with tls_ca_path instead",
            )
    return Material(reader.files), reader.problems


class _Reader:
    """Reads files once each and collects what is wrong with them."""

    def __init__(self, insecure_key_permissions: bool) -> None:
        self.files: dict[str, bytes] = {}
        self.problems: list[Problem] = []
        self._insecure_key_permissions = insecure_key_permissions
        self._leaves: dict[tuple[int, frozenset[str], bool], Path] = {}
        """Listeners' certificates by what two of them must not share: their names with the type of key."""

    def error(self, loc: Loc, message: str, hint: str = "") -> None:
        self.problems.append(Problem(loc, message, hint))

    def warn(self, loc: Loc, message: str, hint: str = "") -> None:
        self.problems.append(Problem(loc, message, hint, severity="warning"))

    def read(self, path: Path, loc: Loc) -> bytes | None:
        if (known := self.files.get(str(path))) is not None:
            return known
        try:
            if not path.is_file() and path.exists():
                # a FIFO or a device would block or never end
                self.error(loc, f"{quoted(path)} is not a regular file")
                return None
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            self.error(loc, f"the file {quoted(path)} does not exist", _relative_hint(path))
            return None
        except PermissionError:
            self.error(loc, f"the file {quoted(path)} cannot be read: permission denied")
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self.error(loc, f"the file {quoted(path)} cannot be read: {reason}")
            return None
        if len(data) > MAX_FILE_BYTES:
            self.error(loc, f"the file {quoted(path)} is larger than {MAX_FILE_BYTES >> 20} MiB")
            return None
        self.files[str(path)] = data
        return data

    def check_pair(self, pair: _Pair) -> None:
        chain = self._chain(pair)
        key = self._key(pair)
        if chain is None or key is None:
            return
        holders = [number for number, cert in enumerate(chain) if _public(cert.public_key) == key]
        if 0 not in holders:
            hint = "use the key the certificate was requested with"
            if holders:
                hint = f"it belongs to certificate {holders[0] + 1} of the file: put the server's own first"
            self.error(
                pair.key_loc,
                f"the key {quoted(pair.key)} does not belong to the certificate {quoted(pair.chain)}",
                hint,
            )
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair.chain, pair.key, password=b"")
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error.strerror or "unknown reason"
            self.error(
                pair.chain_loc,
                f"OpenSSL refuses the certificate {quoted(pair.chain)} with its key: {reason}",
                "today a key needs at least 2048 bits (RSA) or 256 bits (EC), and a SHA-256 signature",
            )
            return
        self._check_choice(pair, chain[0])

    def _check_choice(self, pair: _Pair, leaf: x509.Certificate) -> None:
        """Whether SNI can choose between this certificate and the listener's earlier ones."""
        if pair.listener is None or (names := _names(leaf)) is None:
            return
        is_ecdsa = isinstance(leaf.public_key(), EllipticCurvePublicKey)
        what = (pair.listener, names, is_ecdsa)
        if (earlier := self._leaves.get(what)) is None:
            self._leaves[what] = pair.chain
            return
        kind = "an ECDSA key" if is_ecdsa else "a key that is not ECDSA"
        self.error(
            pair.chain_loc,
            f"the certificate {quoted(pair.chain)} is for the same names as {quoted(earlier)}, and both have "
            f"{kind}",
            "remove one of them: the same names can have one with an ECDSA key and one with an RSA key",
        )

    def _chain(self, pair: _Pair) -> list[x509.Certificate] | None:
        data = self.read(pair.chain, pair.chain_loc)
        if data is None:
            return None
        chain = _certificates(data)
        if not chain:
            hint = "cert_path and key_path look swapped" if b"PRIVATE KEY-----" in data else _PEM_HINT
            self.error(pair.chain_loc, f"the file {quoted(pair.chain)} holds no PEM certificate", hint)
            return None
        if len(chain) > MAX_CHAIN:
            self.error(
                pair.chain_loc,
                f"expected a chain of at most {MAX_CHAIN} certificates, found {len(chain)}",
                "keep the server's certificate and the intermediates that lead to its root",
            )
            return None
        now = datetime.now(UTC)
        if chain[0].not_valid_after_utc < now:
            ended = chain[0].not_valid_after_utc.date().isoformat()
            self.warn(
                pair.chain_loc,
                f"the certificate {quoted(pair.chain)} expired on {ended}",
                "renew it: clients refuse it",
            )
        elif chain[0].not_valid_before_utc > now:
            begins = chain[0].not_valid_before_utc.date().isoformat()
            self.warn(pair.chain_loc, f"the certificate {quoted(pair.chain)} is not valid before {begins}")
        return chain

    def _key(self, pair: _Pair) -> bytes | None:
        """The public half of the key, for comparison."""
        data = self.read(pair.key, pair.key_loc)
        if data is None:
            return None
        self._check_permissions(pair)
        name = quoted(pair.key)
        try:
            key = load_pem_private_key(data, password=None)
        except TypeError:
            self.error(
                pair.key_loc,
                f"the key {name} is encrypted, and nobody is there to type its passphrase",
                f"store it decrypted with mode 0600: openssl pkey -in {pair.key} -out NEW",
            )
            return None
        except (ValueError, UnsupportedAlgorithm):
            hint = "cert_path and key_path look swapped" if b"BEGIN CERTIFICATE-----" in data else _PEM_HINT
            self.error(pair.key_loc, f"the file {name} holds no PEM private key that can be used", hint)
            return None
        return _public(key.public_key)

    def _check_permissions(self, pair: _Pair) -> None:
        try:
            mode = stat.S_IMODE(pair.key.stat().st_mode)
        except OSError:
            return
        if mode & _GROUP_OR_OTHERS:
            complain = self.warn if self._insecure_key_permissions else self.error
            complain(
                pair.key_loc,
                f"the key {quoted(pair.key)} can be read by group or others (mode {mode:04o})",
                f"chmod 600 {pair.key}",
            )

    def check_bundle(self, path: Path, loc: Loc) -> None:
        data = self.read(path, loc)
        if data is not None and not _certificates(data):
            self.error(loc, f"the file {quoted(path)} holds no PEM certificate", _PEM_HINT)


_PEM_HINT: Final = "PEM is the text form that begins with -----BEGIN"


def _certificates(data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        return []


def _names(leaf: x509.Certificate) -> frozenset[str] | None:
    """The names a certificate is for: its alternative names, else its common names. None: unreadable."""
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [
            *found.get_values_for_type(x509.DNSName),
            *(address.compressed for address in found.get_values_for_type(x509.IPAddress)),
        ]
    except x509.ExtensionNotFound:
        names = []
    except (ValueError, x509.DuplicateExtension):
        return None
    if not names:
        common = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        names = [str(name.value) for name in common]
    return frozenset(map(_plain_name, names))


def _plain_name(name: str) -> str:
    try:
        return ip_address(name).compressed
    except ValueError:
        return name.lower().removesuffix(".")


def _public(public_key: Callable[[], PublicKeyTypes]) -> bytes | None:
    """The encoded public key; None for kinds that TLS cannot use."""
    try:
        return public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm):
        return None


def _relative_hint(path: Path) -> str:
    parent = path.parent
    return "" if parent.is_dir() else f"there is no directory {quoted(parent)}"
