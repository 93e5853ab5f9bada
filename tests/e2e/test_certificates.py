"""Certificates renewed under a running gateway, by SIGUSR1 and by their files, over TCP and QUIC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from aioquic.quic.connection import QuicConnection
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from expressgateway.demo.certificate import make_certificate
from tests.config.material import ocsp_response
from tests.e2e.harness import Backend, Client, Gateway, Steady, eventually, listener, need, program
from tests.ports import free_port
from tests.quic_peers import QuicPeer, configuration_of, quic_client, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aioquic.tls import SessionTicket

    from tests.e2e.harness import BackendConnection

_GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_WORKERS = 2
_TIMES = 10
"""Connections after which both workers have been met: but once in 500."""


def _published(directory: Path, stem: str, *names: str, days: float = 60) -> bytes:
    """Put another pair in the place of what is there, one file after the other: the certificate (DER)."""
    pem = make_certificate(*names, days=days)
    for suffix, data in (("key", pem.key), ("crt", pem.certificate)):
        new = directory / f"{stem}.new"
        new.write_bytes(data)
        new.chmod(0o600)
        os.replace(new, directory / f"{stem}.{suffix}")
    return ssl.PEM_cert_to_DER_cert(pem.certificate.decode())


def _listener(name: str, protocol: str, port: int, backend: str, directory: Path, more: str = "") -> str:
    pair = f"cert_path = '{directory / name}.crt'\nkey_path = '{directory / name}.key'\n"
    secret = f"retry_secret_path = '{directory / 'retry'}'\n" if protocol == "quic" else ""
    table = "quic" if protocol == "quic" else "tls"
    return listener(port, backend, f"[listeners.{table}]\n{pair}{secret}{more}", name=name, protocol=protocol)


@contextlib.contextmanager
def renewal(gateway: Gateway, number: int = 1, *, is_told: bool = True) -> Iterator[None]:
    """Wait for so many certificates that are published within to be renewed, by signal or by their files.

    Counted from before they are published: those who watch the files may be faster than a signal.
    """
    goal = gateway.metric("certificate_reload_total", result="renewed") + number
    yield
    if is_told:
        gateway.process.send_signal(signal.SIGUSR1)
    gateway.wait_metric("certificate_reload_total", goal, result="renewed")


@dataclass
class World:
    """A gateway with the listeners ``web`` (h1s), ``raw`` (tls) and ``h3`` (quic), each with its own pair."""

    directory: Path
    gateway: Gateway
    ports: dict[str, int]
    shown: dict[str, bytes] = field(default_factory=dict)
    """The certificate that each should show."""

    def publish(self, *names: str) -> None:
        for name in names:
            self.shown[name] = _published(self.directory, name)

    @contextlib.contextmanager
    def renewal(self, number: int, *, is_told: bool = True) -> Iterator[None]:
        """What is published within is in use afterwards: so many certificates."""
        with renewal(self.gateway, number, is_told=is_told):
            yield

    def check(self) -> None:
        """Every worker shows the certificate that it should."""
        for _ in range(_TIMES):
            for name in ("web", "raw"):
                assert presented(self.ports[name]) == self.shown[name], name
        asyncio.run(self._check_quic())

    def is_shown(self) -> bool:
        """Whether `check` would find it so."""
        try:
            self.check()
        except AssertionError:
            return False
        return True

    async def _check_quic(self) -> None:
        for _ in range(_TIMES):
            async with quic_client(self.ports["h3"], ["h3"]) as peer:
                assert quic_presented(peer) == self.shown["h3"]


def _careless() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def presented(port: int, context: ssl.SSLContext | None = None) -> bytes:
    """The certificate that a listener shows (DER)."""
    with Client(port, tls=context or _careless()) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        shown = client.sock.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def quic_presented(peer: QuicPeer) -> bytes:
    assert peer.closed is None, peer.closed
    certificate = peer.quic.tls._peer_certificate
    assert certificate is not None
    return certificate.public_bytes(Encoding.DER)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("certificates")
    ports = {name: free_port() for name in ("web", "raw", "h3")}
    shown = {name: _published(directory, name) for name in ports}

    with Backend() as backend:
        config = "".join(
            _listener(name, protocol, ports[name], backend.address, directory)
            for name, protocol in (("web", "h1s"), ("raw", "tls"), ("h3", "quic"))
        )
        runtime = "max_keepalive_requests = 0\nhandshake_timeout_ms = 20000\n"
        with Gateway(directory, config, workers=_WORKERS, runtime=runtime) as gateway:
            yield World(directory, gateway, ports, shown)


# -- by signal -----------------------------------------------------------------------------------------------


def test_sigusr1_renews_every_listener_and_disturbs_nobody(world: World) -> None:
    world.check()
    with (
        Steady(world.ports["web"], tls=_careless()),
        Steady(world.ports["raw"], tls=_careless()),
    ):
        old = dict(world.shown)
        version = world.gateway.metric("config_version")
        reloads = world.gateway.metric("config_reload_total")

        def renewed() -> None:
            with world.renewal(3):
                world.publish("web", "raw", "h3")

        async def with_quic() -> None:
            async with quic_client(world.ports["h3"], ["h3"]) as before:
                await asyncio.to_thread(renewed)
                await asyncio.to_thread(world.check)
                await before.ping()
                assert quic_presented(before) == old["h3"]

        asyncio.run(with_quic())
        assert world.gateway.metric("config_version") > version
        assert world.gateway.metric("config_reload_total") == reloads, "it was no reload"
    assert "certificates renewed in" in world.gateway.log()


def test_a_bad_pair_keeps_the_old_one_and_the_others_are_renewed(world: World) -> None:
    good = (world.directory / "raw.key").read_bytes()
    failed = world.gateway.metric("certificate_reload_total", result="failed")
    with world.renewal(2):
        (world.directory / "raw.key").write_bytes(make_certificate().key)
        world.publish("web", "h3")
    world.check()
    world.gateway.wait_metric("certificate_reload_total", failed + 1, result="failed")
    assert world.gateway.metric("certificate_reload_failing") == 1
    lines = [json.loads(line) for line in world.gateway.log().splitlines()]
    (told,) = [line for line in lines if line["level"] == "error"]
    assert "raw.crt" in told["message"]
    assert "(listener raw) is not renewed, the old one stays" in told["message"]
    assert "PRIVATE" not in world.gateway.log()
    (world.directory / "raw.key").write_bytes(good)
    eventually(lambda: world.gateway.metric("certificate_reload_failing") == 0, "it is seen to be good again")


def test_handshakes_under_way_go_on(world: World) -> None:
    """The server has answered with the old certificate; then it is renewed; then the client finishes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = _careless().wrap_bio(incoming, outgoing, server_hostname="localhost")
    quic = QuicConnection(configuration=configuration_of(["h3"], is_client=True, verify_mode=ssl.CERT_NONE))
    with (
        Client(world.ports["web"]) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        old = dict(world.shown)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        client.send(outgoing.read())
        flight = client.sock.recv(65536)
        udp.connect(("127.0.0.1", world.ports["h3"]))
        udp.settimeout(60)
        quic.connect(udp.getpeername(), now=0.0)
        for data, _ in quic.datagrams_to_send(now=0.0):
            udp.send(data)
        answer = udp.recv(65536)

        with world.renewal(2):
            world.publish("web", "h3")

        incoming.write(flight)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(client.sock.recv(65536))
        client.send(outgoing.read())
        tls.write(_GET)
        client.send(outgoing.read())
        incoming.write(client.sock.recv(65536))
        assert tls.getpeercert(binary_form=True) == old["web"]

        clock = 0.1
        while not quic._handshake_confirmed:
            quic.receive_datagram(answer, udp.getpeername(), now=clock)
            for data, _ in quic.datagrams_to_send(now=clock):
                udp.send(data)
            clock += 0.01
            if not quic._handshake_confirmed:
                answer = udp.recv(65536)
        certificate = quic.tls._peer_certificate
        assert certificate is not None
        assert certificate.public_bytes(Encoding.DER) == old["h3"]
    world.check()


def test_signals_of_every_kind_at_once(world: World) -> None:
    """None is lost, and nothing is refused that should not be."""
    with Steady(world.ports["web"], tls=_careless()):
        for number in range(30):
            if number % 10 == 0:
                world.publish("web", "raw", "h3")
            world.gateway.process.send_signal(signal.SIGUSR1 if number % 3 else signal.SIGHUP)
        eventually(world.is_shown, "the last ones are shown")
        eventually(lambda: world.gateway.metric("certificate_reload_failing") == 0, "all are good")
        with world.renewal(3):
            world.publish("web", "raw", "h3")
        world.check()
    assert world.gateway.metric("config_last_reload_successful") == 1


# -- by their files ------------------------------------------------------------------------------------------


def test_changed_files_are_seen(world: World) -> None:
    old = dict(world.shown)
    with world.renewal(3, is_told=False):
        world.publish("web", "raw", "h3")
    world.check()
    assert old != world.shown


def test_half_a_pair_is_waited_for(world: World) -> None:
    pem = make_certificate()
    (world.directory / "web.crt").write_bytes(pem.certificate)
    failed = world.gateway.metric("certificate_reload_total", result="failed")
    world.gateway.wait_metric("certificate_reload_failing", 1)  # told of, as it stays
    assert presented(world.ports["web"]) == world.shown["web"]
    with world.renewal(1, is_told=False):
        (world.directory / "web.key").write_bytes(pem.key)
    world.shown["web"] = ssl.PEM_cert_to_DER_cert(pem.certificate.decode())
    world.check()
    assert world.gateway.metric("certificate_reload_total", result="failed") == failed + 1


def test_expiry_is_a_metric_and_a_warning(world: World) -> None:
    with world.renewal(1):
        world.shown["raw"] = _published(world.directory, "raw", "raw.example", days=5)
    end = x509.load_der_x509_certificate(world.shown["raw"]).not_valid_after_utc.timestamp()
    labels = {"listener": "raw", "subject": "CN=raw.example"}
    assert world.gateway.metric("certificate_expiry_timestamp_seconds", **labels) == end
    # Five days are its whole life: it is fine. One that was to live longer is not.
    assert "raw.crt" not in "".join(re.findall(r".*ends in.*", world.gateway.log()))


# -- sessions ------------------------------------------------------------------------------------------------


def s_client(port: int, *options: str, stdin: bytes = _GET) -> str:
    done = subprocess.run(
        [program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", "-ign_eof", *options],
        input=stdin.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        capture_output=True,
        timeout=60,
        check=False,
    )
    return (done.stdout + done.stderr).decode(errors="replace")


@need("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_resumes_after_a_renewal(world: World, tmp_path: Path, version: str) -> None:
    session = str(tmp_path / "session.pem")
    assert "New, TLS" in s_client(world.ports["web"], version, "-sess_out", session)
    with world.renewal(1):
        world.publish("web")
    for _ in range(_TIMES):
        assert "Reused, TLS" in s_client(world.ports["web"], version, "-sess_in", session)
    world.check()


def test_quic_resumes_after_a_renewal(world: World) -> None:
    """On the worker that gave the ticket: QUIC's are a worker's own. Each is good once."""

    async def test() -> None:
        tickets: list[SessionTicket] = []

        async def ask(ticket: SessionTicket | None) -> bool:
            """One connection that has another ticket at its end: whether it was resumed."""
            given = len(tickets)
            configuration = configuration_of(
                ["h3"], is_client=True, verify_mode=ssl.CERT_NONE, session_ticket=ticket
            )
            peer = QuicPeer(
                QuicConnection(configuration=configuration, session_ticket_handler=tickets.append)
            )
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: peer, local_addr=("127.0.0.1", 0)
            )
            peer.connect(("127.0.0.1", world.ports["h3"]))
            await until(lambda: len(tickets) > given)
            peer.close()
            transport.abort()
            return peer.quic.tls.session_resumed

        for _ in range(12):
            assert not await ask(None)

        def renewed() -> None:
            with world.renewal(1):
                world.publish("h3")

        await asyncio.to_thread(renewed)
        # Each meets its worker with a probability of one half.
        assert True in [await ask(ticket) for ticket in list(tickets)]

    asyncio.run(test())


@need("openssl")
def test_openssl_resumes_within_the_overlap_and_not_after(tmp_path: Path) -> None:
    """Two workers, and keys that change every second."""
    port = free_port()
    _published(tmp_path, "web")

    def config(interval_s: int, overlap_s: int) -> str:
        times = (
            f"ticket_rotation_interval_seconds = {interval_s}\n"
            f"ticket_rotation_overlap_seconds = {overlap_s}\n"
        )
        return _listener("web", "h1s", port, "127.0.0.1:9", tmp_path, times)

    def is_resumed(version: str) -> bool:
        output = s_client(port, version, "-sess_in", str(tmp_path / version))
        assert "New, TLS" in output or "Reused, TLS" in output, output
        return "Reused, TLS" in output

    versions = ("-tls1_2", "-tls1_3")
    with Gateway(tmp_path, config(3600, 3600), workers=_WORKERS) as gateway:

        def wait_changes(number: int) -> None:
            begin = gateway.metric("ticket_key_rotations_total", listener="web")
            gateway.wait_metric("ticket_key_rotations_total", begin + number * _WORKERS, listener="web")

        for version in versions:
            assert "New, TLS" in s_client(port, version, "-sess_out", str(tmp_path / version))
        assert gateway.reload(config(1, 60))
        wait_changes(2)  # its key seals no more
        for version in versions:
            assert [is_resumed(version) for _ in range(4)] == [True] * 4
        assert gateway.reload(config(1, 1))
        wait_changes(2)  # and opens no more
        for version in versions:
            assert [is_resumed(version) for _ in range(4)] == [False] * 4


# -- the rest of it ------------------------------------------------------------------------------------------


@dataclass
class Other:
    """A gateway with the listeners ``stapling`` and ``asking`` (for clients' certificates), and ``on``, which
    shows a certificate to its backend."""

    directory: Path
    gateway: Gateway
    ports: dict[str, int]
    seen: list[bytes]
    """The certificates that the backend was shown."""
    context: ssl.SSLContext
    """The backend's."""

    def staple(self) -> None:
        pem = (self.directory / "stapling.crt").read_bytes()
        key = load_pem_private_key((self.directory / "stapling.key").read_bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey)
        (self.directory / "stapling.ocsp").write_bytes(ocsp_response(pem, key))

    def status(self) -> int:
        with Client(self.ports["on"]) as client:
            client.send(_GET)
            return client.response()[0]

    def is_let_in(self) -> bool:
        context = _careless()
        context.load_cert_chain(self.directory / "alice.crt", self.directory / "alice.key")
        with contextlib.suppress(OSError), Client(self.ports["asking"], tls=context) as client:
            client.send(_GET)
            return client.sock.recv(100).startswith(b"HTTP/1.1 ")
        return False


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Other]:
    directory = tmp_path_factory.mktemp("others")
    ports = {name: free_port() for name in ("stapling", "asking", "on")}
    for name in ("stapling", "asking", "alice", "server", "client"):
        _published(directory, name)
    (directory / "clients.pem").write_bytes(make_certificate("nobody").certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(directory / "client.crt")
    seen: list[bytes] = []

    def answer(connection: BackendConnection) -> None:
        assert isinstance(connection.sock, ssl.SSLSocket)
        seen.append(connection.sock.getpeercert(binary_form=True) or b"")
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    with Backend(answer, tls=context) as backend:
        staple = f"ocsp_path = '{directory / 'stapling.ocsp'}'\n"
        asking = f"client_auth = 'required'\nclient_ca_path = '{directory / 'clients.pem'}'\n"
        config = (
            _listener("stapling", "h1s", ports["stapling"], "127.0.0.1:9", directory, staple)
            + _listener("asking", "h1s", ports["asking"], "127.0.0.1:9", directory, asking)
            + f"[[listeners]]\nname = 'on'\naddress = '127.0.0.1:{ports['on']}'\nprotocol = 'h1'\n"
            f"[[listeners.backends]]\naddress = '{backend.address}'\ntls = true\n"
            f"tls_verify_hostname = 'localhost'\ntls_ca_path = '{directory / 'server.crt'}'\n"
            f"tls_cert_path = '{directory / 'client.crt'}'\ntls_key_path = '{directory / 'client.key'}'\n"
        )
        world = Other(directory, Gateway(directory, config, workers=_WORKERS), ports, seen, context)
        world.staple()
        with world.gateway:
            yield world


@need("openssl")
def test_an_ocsp_response_is_stapled_and_renewed(other: Other) -> None:
    port = other.ports["stapling"]

    def stapled() -> bool:
        output = s_client(port, "-status")
        assert "CONNECTED" in output
        return "Cert Status: good" in output

    def gauge() -> float:
        return other.gateway.metric("certificate_ocsp_stapled", listener="stapling")

    assert [stapled() for _ in range(4)] == [True] * 4
    assert gauge() == 1
    with renewal(other.gateway):
        _published(other.directory, "stapling")
    assert [stapled() for _ in range(4)] == [False] * 4, "it is the old certificate's"
    assert gauge() == 0
    other.staple()
    eventually(lambda: gauge() == 1, "the new one's is seen")
    assert [stapled() for _ in range(4)] == [True] * 4
    (other.directory / "stapling.ocsp").unlink()
    eventually(lambda: gauge() == 0, "there is none any more")
    assert [stapled() for _ in range(4)] == [False] * 4


def test_what_backends_are_shown_and_who_vouches_for_them(other: Other) -> None:
    old = ssl.PEM_cert_to_DER_cert((other.directory / "client.crt").read_text())
    assert (other.status(), other.seen[-1]) == (200, old)
    with renewal(other.gateway):
        new = _published(other.directory, "client")
    other.context.load_verify_locations(other.directory / "client.crt")
    assert (other.status(), other.seen[-1]) == (200, new)
    with renewal(other.gateway):
        _published(other.directory, "server")
    other.context.load_cert_chain(other.directory / "server.crt", other.directory / "server.key")
    assert other.status() == 200


def test_who_vouches_for_clients(other: Other) -> None:
    assert not other.is_let_in()
    with renewal(other.gateway):
        (other.directory / "clients.pem").write_bytes((other.directory / "alice.crt").read_bytes())
    assert other.is_let_in()
