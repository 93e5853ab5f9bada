"""What the TLS tests need around them: certificates made on the spot, small servers, openssl s_client."""

from __future__ import annotations

import contextlib
import datetime
import functools
import ipaddress
import os
import queue
import shutil
import socket
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from expressgateway.net import tls
from expressgateway.net.tls import CertificatePair, client_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


# --- certificates -------------------------------------------------------------------------------------------


class Issued(NamedTuple):
    certificate: x509.Certificate
    key: PrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self, passphrase: bytes | None = None) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption(),
        )

    @property
    def pair(self) -> CertificatePair:
        return CertificatePair(self.pem, self.key_pem())


def issue(
    common_name: str,
    *names: str,
    issuer: Issued | None = None,
    key: PrivateKey | None = None,
    organisation: str | None = None,
) -> Issued:
    """A certificate for `names`, from `issuer`; without one, a CA that signed itself."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organisation is not None:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    subject = x509.Name(attributes)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if names:
        general = [x509.IPAddress(address) if (address := _ip(n)) else x509.DNSName(n) for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    return Issued(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


@functools.cache
def ca() -> Issued:
    return issue("Test CA")


@functools.cache
def site(*names: str) -> Issued:
    return issue(names[0], *names, issuer=ca())


@functools.cache
def rsa_site(*names: str) -> Issued:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return issue(names[0], *names, issuer=ca(), key=key)


@functools.cache
def alice() -> Issued:
    return issue("alice, admin", issuer=ca(), organisation="Ex=ample")


# --- peers --------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What the server saw of one connection."""

    sni: str | None = None
    subject: str | None = None
    error: str | None = None


@contextlib.contextmanager
def serving(context: ssl.SSLContext, *, reads: bool = False) -> Iterator[tuple[int, queue.Queue[Seen]]]:
    """A server on a free port: one connection after the other gets an answer and an orderly close.

    reads: until a blank line or the client's end, before the answer; else the answer comes at once.
    """
    seen: queue.Queue[Seen] = queue.Queue()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: ssl.SSLSocket) -> None:
        connection.do_handshake()
        seen.put(Seen(tls.sni_of(connection), tls.client_subject(connection)))
        got = b""
        while reads and b"\r\n\r\n" not in got and (chunk := connection.recv(4096)):
            got += chunk
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes")
        connection.unwrap()

    def run() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            raw.settimeout(20)
            connection = context.wrap_socket(
                raw, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
            try:
                serve(connection)
            except OSError as error:
                seen.put(Seen(error=str(error)))
            finally:
                connection.close()

    thread = threading.Thread(target=run, name="tls server")
    thread.start()
    try:
        yield listener.getsockname()[1], seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(25)


def s_client(port: int, *args: str, stdin: bytes = b"") -> str:
    """Everything `openssl s_client` printed. Without stdin it stays until the server closes."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *args]
    if not stdin:
        command.append("-ign_eof")
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
    )
    return done.stdout.decode(errors="replace")


def handshake(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    name: str | None = "a.test",
    session: ssl.SSLSession | None = None,
    between: Callable[[], None] = lambda: None,
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends in memory, after the handshake and a byte each way. `between` runs after each server step."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    far = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
    near = server.wrap_bio(to_server, to_client, server_side=True)
    del server  # as after a reload: only the connection is left
    todo = [far, near]
    while todo:
        end = todo.pop(0)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            todo.append(end)
        if end is near:
            between()
    for one, other in ((near, far), (far, near)):
        one.write(b"x")
        assert other.read(10) == b"x"
    return near, far


def trusting(**options: object) -> ssl.SSLContext:
    return client_context(ca_pem=ca().pem, **options)  # type: ignore[arg-type]  # keyword by keyword in the tests


def memory_files(issued: Issued) -> tuple[str, str]:
    paths = []
    for content in (issued.pem, issued.key_pem()):
        descriptor = os.memfd_create("test")
        os.write(descriptor, content)
        paths.append(f"/proc/self/fd/{descriptor}")
    return paths[0], paths[1]
