"""TLS at the door: versions, names, client certificates, resumption over all workers, and its abuse."""

import contextlib
import datetime
import select
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from expressgateway.demo.certificate import CertificateFiles, make_certificate, write_certificate
from tests.e2e.harness import (
    Backend,
    Client,
    Gateway,
    House,
    Steady,
    certificate,
    descriptors,
    eventually,
    listener,
    need,
    program,
)
from tests.ports import free_port

_GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_RUNTIME = """max_keepalive_requests = 0
handshake_timeout_ms = 500
[runtime.watchdog]
sweep_interval_ms = 100
"""


def _tls(files: CertificateFiles, more: str = "") -> str:
    return f"[listeners.tls]\ncert_path = '{files.certificate}'\nkey_path = '{files.key}'\n{more}\n"


def _trusting(*files: CertificateFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for each in files:
        context.load_verify_locations(each.certificate)
    return context


def _s_client(port: int, *options: str, stdin: bytes = b"") -> str:
    """What ``openssl s_client`` prints; its exit code says little."""
    done = subprocess.run(
        [program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *options],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return (done.stdout + done.stderr).decode(errors="replace")


@dataclass
class World:
    port: int
    gateway: Gateway
    files: CertificateFiles
    context: ssl.SSLContext


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One worker with a good client on it all the while."""
    directory = tmp_path_factory.mktemp("tls")
    files = certificate(directory)
    context = _trusting(files)
    port = free_port()
    with (
        Backend() as backend,
        Gateway(directory, listener(port, backend, _tls(files), protocol="h1s"), runtime=_RUNTIME) as gateway,
        Steady(port, tls=context),
    ):
        yield World(port, gateway, files, context)


# -- versions and what is spoken -----------------------------------------------------------------------------


@need("openssl")
@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_old_versions_are_refused(world: World, version: str) -> None:
    before = world.gateway.metric("tls_handshakes_total", listener="web", result="failed")
    output = _s_client(world.port, version, "-cipher", "ALL:@SECLEVEL=0")
    assert "alert protocol version" in output, output
    assert "New, (NONE)" in output
    failed = world.gateway.metric("tls_handshakes_total", listener="web", result="failed")
    assert failed == before + 1


@need("openssl")
@pytest.mark.parametrize(
    ("offer", "chosen"), [("http/1.1", "http/1.1"), ("http/1.1,h2", "h2"), ("h2", "h2"), ("spdy/3", None)]
)
@pytest.mark.parametrize(("option", "name"), [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")])
def test_versions_that_are_spoken(
    world: World, option: str, name: str, offer: str, chosen: str | None
) -> None:
    output = _s_client(world.port, option, "-CAfile", str(world.files.certificate), "-alpn", offer)
    assert f"New, {name}" in output
    assert "Verify return code: 0 (ok)" in output
    assert (f"ALPN protocol: {chosen}" if chosen else "No ALPN negotiated") in output


@need("openssl")
@pytest.mark.parametrize(
    "ciphers", ["AES128-SHA", "ECDHE-ECDSA-AES128-SHA", "DHE-RSA-AES128-GCM-SHA256", "aNULL"]
)
def test_weak_ciphers_are_refused(world: World, ciphers: str) -> None:
    output = _s_client(world.port, "-tls1_2", "-cipher", f"{ciphers}:@SECLEVEL=0")
    assert "New, (NONE)" in output, output


@need("openssl")
def test_no_renegotiation(world: World) -> None:
    """``R`` makes s_client ask for one. It is told no (OpenSSL 3 says so without being asked to, too)."""
    output = _s_client(world.port, "-tls1_2", stdin=b"R\n")
    assert "RENEGOTIATING" in output, output
    assert "no renegotiation" in output, output


@need("openssl")
def test_tls_1_3_only(tmp_path: Path, house: House) -> None:
    port = house.port
    files = certificate(tmp_path)
    config = listener(port, "127.0.0.1:9", _tls(files), protocol="h1s")
    with house.gateway(config, runtime="[runtime.tls]\ntls13_only = true\n"):
        assert "alert protocol version" in _s_client(port, "-tls1_2")
        assert "New, TLSv1.3" in _s_client(port, "-tls1_3")


# -- slow and broken handshakes ------------------------------------------------------------------------------


def _client_hello(context: ssl.SSLContext) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("part", ["nothing", "one byte", "half a hello", "a whole hello"])
def test_a_handshake_that_stops_is_closed(world: World, part: str) -> None:
    hello = _client_hello(world.context)
    sent = {"nothing": 0, "one byte": 1, "half a hello": len(hello) // 2, "a whole hello": len(hello)}[part]
    before = world.gateway.metric("security_events_total", listener="web", kind="slow_handshake")
    with Client(world.port) as client:
        began = time.monotonic()
        client.send(hello[:sent])
        client.rest()
        assert 0.3 < time.monotonic() - began < 4.5  # five seconds are the default
    after = world.gateway.metric("security_events_total", listener="web", kind="slow_handshake")
    assert after == before + 1


def test_a_handshake_that_trickles_is_closed(world: World) -> None:
    """The time is for the whole handshake, whatever moves."""
    hello = _client_hello(world.context)
    with Client(world.port) as client:
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            for byte in hello:
                if select.select([client.sock], [], [], 0.02)[0]:
                    break
                client.send(bytes((byte,)))
            client.rest()
        assert time.monotonic() - began < 0.02 * len(hello)


def test_a_flood_of_handshakes_leaves_nothing(world: World) -> None:
    """150 that stop, 150 of garbage, 150 that go away: the good client is served, nothing stays open."""
    (worker,) = world.gateway.worker_pids()
    eventually(lambda: world.gateway.metric("connections_inflight", listener="web") == 1, "only the good one")
    base = descriptors(worker)
    hello = _client_hello(world.context)
    clients = []
    for number in range(450):
        client = Client(world.port)
        client.send((hello[:60], b"\x16\x03\x01\x02\x00" + b"garbage" * 100, hello)[number % 3])
        if number % 3 == 2:
            client.sock.close()
        else:
            clients.append(client)
    for client in clients:
        client.rest()
        client.sock.close()
    eventually(lambda: world.gateway.metric("connections_inflight", listener="web") == 1, "only the good one")
    eventually(lambda: descriptors(worker) <= base + 2, "descriptors are back")
    assert world.gateway.metric("tls_handshakes_total", listener="web", result="failed") >= 150
    assert world.gateway.metric("tls_handshakes_total", listener="web", result="timeout") >= 150


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\xff\xff" + b"x" * 100,
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\x00",
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x80\x2e\x01\x00\x02",
    ],
    ids=["HTTP", "zeros", "a record too long", "a hello too long", "an alert", "SSL 2"],
)
def test_what_is_no_tls_is_closed(world: World, opening: bytes) -> None:
    with Client(world.port) as client:
        client.send(opening)
        with contextlib.suppress(OSError):  # it may be reset already
            client.sock.shutdown(socket.SHUT_WR)
        answer = client.rest()
        assert b"HTTP" not in answer
        assert len(answer) < 20, "an alert at most"


def test_a_server_name_that_is_no_name(world: World) -> None:
    hello = _client_hello(world.context)
    assert b"localhost" in hello
    for name in (b"\xff" * 9, b"\x00" * 9, b"loca\nhost"):
        with Client(world.port) as client:
            client.send(hello.replace(b"localhost", name))
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
            client.rest()


def test_tls_that_breaks_in_the_middle_of_a_request(world: World) -> None:
    """A record that was tampered with ends the connection; nothing is answered."""
    with Client(world.port, tls=world.context) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        socket.socket.sendall(client.sock, b"\x17\x03\x03\x00\x20" + b"tampered" * 4)
        assert client.rest() == b""


def test_an_end_without_close_notify_is_no_end_of_a_request(tmp_path: Path, house: House) -> None:
    """Somebody else could have cut it: the backend must not see the body's end."""
    port = house.port
    files = certificate(tmp_path)
    received = bytearray()

    def serve(connection: Client) -> None:
        while data := connection.sock.recv(65536):
            received.extend(data)

    with (
        Backend(serve) as backend,
        house.gateway(listener(port, backend, _tls(files), protocol="h1s")) as gateway,
    ):
        with Client(port, tls=_trusting(files)) as client:
            client.send(
                b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
            )
            eventually(lambda: received.endswith(b"hello\r\n"), "the body is on its way")
            assert isinstance(client.sock, ssl.SSLSocket)
            socket.socket.shutdown(client.sock, socket.SHUT_WR)
            eventually(lambda: gateway.metric("backend_inflight") == 0, "it was given up")
        assert received.endswith(b"hello\r\n")


# -- names ---------------------------------------------------------------------------------------------------


Hosts = tuple[int, Gateway, dict[str, CertificateFiles]]


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Hosts]:
    """Three certificates: a.example (the default), b.example with *.b.example, c.example."""
    directory = tmp_path_factory.mktemp("names")
    names = {"a": ("a.example",), "b": ("b.example", "*.b.example"), "c": ("c.example",)}
    files = {
        key: write_certificate(directory, make_certificate(*value, local=False), key)
        for key, value in names.items()
    }
    others = ", ".join(
        f"{{ cert_path = '{files[key].certificate}', key_path = '{files[key].key}' }}" for key in "bc"
    )
    port = free_port()
    with (
        Backend() as backend,
        Gateway(
            directory,
            listener(port, backend, _tls(files["a"], f"certificates = [{others}]"), protocol="h1s"),
            runtime=_RUNTIME,
        ) as gateway,
    ):
        yield port, gateway, files


@pytest.mark.parametrize(
    ("sni", "shown"),
    [
        ("a.example", "a"),
        ("b.example", "b"),
        ("B.EXAMPLE", "b"),
        ("x.b.example", "b"),
        ("x.y.b.example", "a"),
        ("c.example", "c"),
        ("unknown.example", "a"),
        ("", "a"),
    ],
)
def test_the_name_picks_the_certificate(hosts: Hosts, sni: str, shown: str) -> None:
    port, _, files = hosts
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    with context.wrap_socket(sock, server_hostname=sni or None) as tls:
        presented = tls.getpeercert(binary_form=True)
    assert presented == ssl.PEM_cert_to_DER_cert(files[shown].certificate.read_text())


@pytest.mark.parametrize(
    ("sni", "host", "status"),
    [
        ("a.example", b"a.example", 200),
        ("a.example", b"A.Example:8443", 200),
        ("a.example", b"b.example", 421),
        ("a.example", b"B.EXAMPLE:8443", 421),
        ("a.example", b"x.b.example", 421),
        ("b.example", b"x.b.example", 200),
        ("b.example", b"a.example", 421),
        ("b.example", b"c.example", 421),
        ("b.example", b"nobody.example", 200),
        ("unknown.example", b"b.example", 421),
        ("unknown.example", b"a.example", 200),
    ],
)
def test_a_host_of_another_certificate_is_421(hosts: Hosts, sni: str, host: bytes, status: int) -> None:
    port, gateway, _ = hosts
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    before = gateway.metric("security_events_total", kind="sni_fronting")
    with Client(port, tls=context, sni=sni) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert client.response()[0] == status
        client.send(b"GET / HTTP/1.1\r\nHost: " + sni.encode() + b"\r\n\r\n")
        assert client.response()[0] == 200, "the connection is good for its own name"
    assert gateway.metric("security_events_total", kind="sni_fronting") == before + (status == 421)


# -- client certificates -------------------------------------------------------------------------------------


class Authority:
    """Signs client certificates."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(self._sign(self._name, self._key, is_ca=True))

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_ca: bool, days: int = 1
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, *, days: int = 1) -> CertificateFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        files = CertificateFiles(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        files.certificate.write_bytes(self._sign(subject, key, is_ca=False, days=days))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


def _is_let_in(port: int, server: CertificateFiles, shown: CertificateFiles | None) -> bool:
    context = _trusting(server)
    if shown is not None:
        context.load_cert_chain(shown.certificate, shown.key)
    try:
        with Client(port, tls=context) as client:
            client.send(_GET)
            return client.until(b"\r\n").startswith(b"HTTP/1.1 200")
    except (OSError, AssertionError):
        return False  # TLS 1.3 clients learn of it after their own handshake is over


POLICIES = {
    "none": {"nothing": True, "good": True, "expired": True, "stranger": True},
    "optional": {"nothing": True, "good": True, "expired": False, "stranger": False},
    "required": {"nothing": False, "good": True, "expired": False, "stranger": False},
}


def test_client_certificates(tmp_path: Path) -> None:
    files = certificate(tmp_path)
    authority, other = Authority(tmp_path, "authority"), Authority(tmp_path, "other")
    shown = {
        "nothing": None,
        "good": authority.issue("alice"),
        "expired": authority.issue("bob", days=-1),
        "stranger": other.issue("mallory"),
    }
    ports = {policy: free_port() for policy in POLICIES}
    config = ""
    with Backend() as backend:
        for policy, port in ports.items():
            more = f"client_auth = '{policy}'\n"
            if policy != "none":
                more += f"client_ca_path = '{authority.path}'\n"
            config += listener(port, backend, _tls(files, more), name=policy, protocol="h1s")
        with Gateway(tmp_path, config) as gateway:
            for policy, let_in in POLICIES.items():
                backend.requests.clear()
                for name, expected in let_in.items():
                    assert _is_let_in(ports[policy], files, shown[name]) is expected, (policy, name)
                refused = sum(not expected for expected in let_in.values())
                assert gateway.metric("tls_handshakes_total", listener=policy, result="failed") == refused
                assert len(backend.requests) == sum(let_in.values()), policy


# -- session tickets -----------------------------------------------------------------------------------------


def _resume(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[bool, ssl.SSLSession]:
    """One connection with an exchange: whether it resumed, and the ticket it left with."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as sock,
        context.wrap_socket(sock, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(_GET)
        assert tls.recv(65536).startswith(b"HTTP/1.1 200")  # TLS 1.3 tickets have come with it
        assert tls.session is not None
        return bool(tls.session_reused), tls.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tickets_are_good_on_every_worker_and_after_a_rotation(
    tmp_path: Path, house: House, version: ssl.TLSVersion
) -> None:
    """Were keys the workers' own, about half of these would be full handshakes."""
    port = house.port
    files = certificate(tmp_path)
    context = _trusting(files)
    context.minimum_version = context.maximum_version = version

    def every(seconds: int) -> str:
        return _tls(
            files,
            f"ticket_rotation_interval_seconds = {seconds}\nticket_rotation_overlap_seconds = 30\n",
        )

    with (
        Backend() as backend,
        house.gateway(listener(port, backend, every(3600), protocol="h1s"), workers=2) as gateway,
    ):
        is_resumed, first = _resume(port, context, None)
        assert not is_resumed
        session = first
        for _ in range(16):
            is_resumed, session = _resume(port, context, session)
            assert is_resumed
        # Not before: for a moment a worker may seal with a key that the other has not got yet.
        assert gateway.reload(listener(port, backend, every(1), protocol="h1s"))
        gateway.wait_metric("ticket_key_rotations_total", 4, listener="web")  # each worker, at least once
        for _ in range(8):
            is_resumed, _ = _resume(port, context, first)
            assert is_resumed, "a ticket of a key that no longer seals"
        name = version.name.replace("_", ".")
        assert gateway.metric("tls_handshakes_total", resumed="no", result="ok", version=name) == 1
        assert gateway.metric("tls_handshakes_total", resumed="yes", result="ok", version=name) == 24


def test_a_ticket_is_forgotten_after_the_overlap(tmp_path: Path, house: House) -> None:
    port = house.port
    files = certificate(tmp_path)
    context = _trusting(files)
    rotating = "ticket_rotation_interval_seconds = 1\nticket_rotation_overlap_seconds = 1\n"
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, _tls(files, rotating), protocol="h1s")) as gateway,
    ):
        _, session = _resume(port, context, None)
        gateway.wait_metric("ticket_key_rotations_total", 3, listener="web")
        is_resumed, _ = _resume(port, context, session)
        assert not is_resumed


@need("openssl")
def test_openssl_resumes_too(tmp_path: Path, world: World) -> None:
    session = tmp_path / "session.pem"
    first = _s_client(world.port, "-tls1_2", "-sess_out", str(session))
    assert "New, TLSv1.2" in first
    assert "Reused, TLSv1.2" in _s_client(world.port, "-tls1_2", "-sess_in", str(session))


def test_a_ticket_is_not_good_for_another_client_policy(tmp_path: Path) -> None:
    """A ticket from a listener that asks for nothing does not open one that requires a certificate."""
    open_port, closed_port = free_port(), free_port()
    files = certificate(tmp_path)
    authority = Authority(tmp_path, "authority")
    context = _trusting(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    required = f"client_auth = 'required'\nclient_ca_path = '{authority.path}'\n"
    with Backend() as backend:
        config = listener(open_port, backend, _tls(files), name="open", protocol="h1s")
        config += listener(closed_port, backend, _tls(files, required), name="closed", protocol="h1s")
        with Gateway(tmp_path, config):
            _, session = _resume(open_port, context, None)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                _resume(closed_port, context, session)


def test_the_ticket_test_sees_both_workers(tmp_path: Path) -> None:
    """What the test above rests on: connections do reach both workers."""
    port = free_port()
    with Backend() as backend, Gateway(tmp_path, listener(port, backend), workers=2) as gateway:
        first, second = gateway.worker_pids()
        before = descriptors(first), descriptors(second)
        clients = [Client(port) for _ in range(24)]
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 24, "all are in")
        assert descriptors(first) > before[0]
        assert descriptors(second) > before[1]
        for client in clients:
            client.sock.close()
