"""The files a configuration names: read once, checked, and kept as bytes.

The supervisor reads them while it may (as root) and hands them to workers that may not. Introduces
`Material`; a `Pair`, which is a certificate chain with its key; and a *bundle*, the certificates of CAs that
peers are checked against. Nothing here writes, and no message or `repr` shows what a key file holds.
"""

import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from expressgateway.config import staples
from expressgateway.config.diagnose import Problem
from expressgateway.config.pools import Backend, LoadBalancing
from expressgateway.config.schema import Config
from expressgateway.config.values import Loc, quoted, shown
from expressgateway.memory_file import as_file

MAX_CHAIN: Final = 6
"""Certificates in a chain, the server's own included."""

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""The largest file read: several times the CA bundle of a distribution."""

SECRET_BYTES: Final = 32

_GROUP_OR_OTHERS: Final = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH


@dataclass(frozen=True, slots=True, repr=False)
class Material:
    """The bytes of every file the configuration names."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By absolute path, as it stands in the model."""

    def __repr__(self) -> str:
        return f"Material({len(self.files)} files)"


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate chain and its key, by the names of their files and the keys that name them."""

    chain: Path
    key: Path
    chain_loc: Loc
    key_loc: Loc
    listener: int | None = None
    """The listener among whose certificates clients' SNI chooses."""
    ocsp: Path | None = None
    ocsp_loc: Loc = ()


def pairs(config: Config) -> Iterator[Pair]:
    """Every pair the configuration names; one that is named twice comes twice."""
    for index, listener in enumerate(config.listeners):
        if (quic := listener.quic) is not None:
            where: Loc = ("listeners", index, "quic")
            yield Pair(quic.cert_path, quic.key_path, (*where, "cert_path"), (*where, "key_path"))
        if listener.tls is None:
            continue
        at: Loc = ("listeners", index, "tls")
        for number, pair in enumerate(listener.tls.every):
            inner: Loc = (*at, "certificates", number - 1) if number else at
            yield Pair(
                pair.cert_path,
                pair.key_path,
                (*inner, "cert_path"),
                (*inner, "key_path"),
                index,
                pair.ocsp_path,
                (*inner, "ocsp_path"),
            )
    for at, backend in _backends(config):
        if backend.tls_cert_path is not None and backend.tls_key_path is not None:
            yield Pair(
                backend.tls_cert_path, backend.tls_key_path, (*at, "tls_cert_path"), (*at, "tls_key_path")
            )


def bundles(config: Config) -> Iterator[tuple[Path, Loc]]:
    """Every bundle of CA certificates, with the key that names it."""
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


def secret_paths(config: Config) -> Iterator[tuple[Path, Loc]]:
    """Files of `SECRET_BYTES` that the supervisor makes if they are absent."""
    homes: list[tuple[Loc, LoadBalancing]] = [
        (("listeners", index, "load_balancing"), listener.load_balancing)
        for index, listener in enumerate(config.listeners)
    ]
    homes += [
        (("pools", index, "load_balancing"), pool.load_balancing) for index, pool in enumerate(config.pools)
    ]
    for loc, balancing in homes:
        if balancing.cookie is not None and balancing.cookie.secret_path is not None:
            yield balancing.cookie.secret_path, (*loc, "cookie", "secret_path")
    for index, listener in enumerate(config.listeners):
        if listener.quic is not None:
            yield listener.quic.retry_secret_path, ("listeners", index, "quic", "retry_secret_path")
    passthrough = config.passthrough
    if passthrough is not None and passthrough.mint_retry and passthrough.retry_secret_path is not None:
        yield passthrough.retry_secret_path, ("passthrough", "retry_secret_path")


def gather(config: Config, *, insecure_key_permissions: bool = False) -> tuple[Material, list[Problem]]:
    """Reads and checks every file; problems are placed at the keys that name the files."""
    reader = Reader(insecure_key_permissions)
    for pair in pairs(config):
        reader.check_pair(pair)
    reader.check_choices()
    for pair in pairs(config):
        reader.check_staple(pair)
    for path, loc in bundles(config):
        reader.check_bundle(path, loc)
    for path, loc in secret_paths(config):
        reader.check_secret(path, loc)
    for at, backend in _backends(config):
        if backend.speaks_tls and not backend.tls_verify_peer:
            reader.warn(
                (*at, "tls_verify_peer"),
                f"the certificate of {shown(backend.id)} is not checked: anyone on the way can pose as it",
                "name its CA with tls_ca_path instead",
            )
    return Material(reader.files), reader.problems


class Reader:
    """Reads files once each and collects what is wrong with them. What is in `files` already is not read."""

    def __init__(
        self, insecure_key_permissions: bool = False, files: Mapping[str, bytes] | None = None
    ) -> None:
        self.files: dict[str, bytes] = dict(files or {})
        self.problems: list[Problem] = []
        self._insecure_key_permissions = insecure_key_permissions
        self._leaves: list[tuple[Pair, x509.Certificate]] = []
        """Of listeners whose certificates SNI chooses from."""

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

    def check_pair(self, pair: Pair) -> None:
        """Whether it can be used, by itself."""
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
            # What was read and not what is in the files now: they may be just being replaced.
            with (
                as_file(self.files[str(pair.chain)]) as chain_path,
                as_file(self.files[str(pair.key)]) as key_path,
            ):
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain_path, key_path, password=b"")
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error.strerror or "unknown reason"
            self.error(
                pair.chain_loc,
                f"OpenSSL refuses the certificate {quoted(pair.chain)} with its key: {reason}",
                "today a key needs at least 2048 bits (RSA) or 256 bits (EC), and a SHA-256 signature",
            )
            return
        self.know(pair)

    def know(self, pair: Pair) -> None:
        """Have `check_choices` compare a pair, which can be used."""
        chain = certificates(self.files[str(pair.chain)])
        if pair.listener is not None and chain:
            self._leaves.append((pair, chain[0]))

    def check_choices(self) -> list[tuple[Pair, Pair]]:
        """Whether SNI can choose between the certificates of each listener, as far as they are known here.
        Gives those between which it cannot, each with the earlier one, in the order of their problems."""
        clashes: list[tuple[Pair, Pair]] = []
        known: dict[tuple[int | None, frozenset[str], bool], Pair] = {}
        for pair, leaf in self._leaves:
            if (names := names_of(leaf)) is None:
                continue
            is_ecdsa = isinstance(leaf.public_key(), EllipticCurvePublicKey)
            earlier = known.setdefault((pair.listener, frozenset(names), is_ecdsa), pair)
            if earlier is pair:
                continue
            clashes.append((pair, earlier))
            self.error(
                pair.chain_loc,
                f"the certificate {quoted(pair.chain)} is for the same names as {quoted(earlier.chain)}, and "
                f"both have {'an ECDSA key' if is_ecdsa else 'a key that is not ECDSA'}",
                "remove one of them: the same names can have one with an ECDSA key and one with an RSA key",
            )
        return clashes

    def check_staple(self, pair: Pair) -> None:
        """The OCSP response of a pair whose chain was read. One that cannot be used is no error: nothing is
        stapled then, and `files` has empty content under its name."""
        if pair.ocsp is None or not (chain := certificates(self.files.get(str(pair.chain), b""))):
            return
        seen = len(self.problems)
        data = self.read(pair.ocsp, pair.ocsp_loc)
        self.problems[seen:] = [replace(problem, severity="warning") for problem in self.problems[seen:]]
        if data is not None and (fault := staples.fault_of(data, chain, datetime.now(UTC))):
            self.warn(pair.ocsp_loc, f"the file {quoted(pair.ocsp)} {fault}: it is not stapled", _OCSP_HINT)
            data = None
        self.files[str(pair.ocsp)] = data or b""

    def _chain(self, pair: Pair) -> list[x509.Certificate] | None:
        data = self.read(pair.chain, pair.chain_loc)
        if data is None:
            return None
        chain = certificates(data)
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

    def _key(self, pair: Pair) -> bytes | None:
        """The public half of the key, for comparison."""
        data = self.read(pair.key, pair.key_loc)
        if data is None:
            return None
        self._check_permissions(pair.key, pair.key_loc, "key")
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

    def _check_permissions(self, path: Path, loc: Loc, what: str) -> None:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            return
        if mode & _GROUP_OR_OTHERS:
            complain = self.warn if self._insecure_key_permissions else self.error
            complain(
                loc,
                f"the {what} {quoted(path)} can be read by group or others (mode {mode:04o})",
                f"chmod 600 {path}",
            )

    def check_secret(self, path: Path, loc: Loc) -> None:
        """A secret that is there must be one; one that is not will be made when the gateway starts."""
        if not path.exists():
            return
        data = self.read(path, loc)
        if data is None:
            return
        if len(data) != SECRET_BYTES:
            self.error(
                loc,
                f"the secret {quoted(path)} has {len(data)} bytes, not {SECRET_BYTES}",
                "remove the file to have a new one made",
            )
            return
        self._check_permissions(path, loc, "secret")

    def check_bundle(self, path: Path, loc: Loc) -> None:
        data = self.read(path, loc)
        if data is not None and not certificates(data):
            self.error(loc, f"the file {quoted(path)} holds no PEM certificate", _PEM_HINT)


_OCSP_HINT: Final = "have your tooling fetch a new one from the certificate's authority"
_PEM_HINT: Final = "PEM is the text form that begins with -----BEGIN"


def certificates(data: bytes) -> list[x509.Certificate]:
    """Those in a PEM file; none if it cannot be read."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        return []


def names_of(leaf: x509.Certificate) -> tuple[str, ...] | None:
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
    return tuple(dict.fromkeys(map(_plain_name, names)))


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
