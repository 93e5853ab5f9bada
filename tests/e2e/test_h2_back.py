"""HTTP/2 to backends on a running gateway: what clients see of limits, refusals, resets and losses."""

import threading
from collections import Counter
from pathlib import Path

import pytest
from h2.errors import ErrorCodes

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.h2_backends import (
    GET,
    H2There,
    World,
    answer_h2,
    backend_table,
    name_of,
    server_tls,
    world,
)
from tests.e2e.h2_raw import request
from tests.e2e.harness import Backend, BackendConnection, Client, House, answer_ok, certificate, eventually
from tests.ports import free_port


class TestSharing:
    def test_many_exchanges_share_one_connection(self, house: House) -> None:
        with Backend(answer_h2) as backend, world(house, backend_table(backend.address)) as at:
            for _ in range(5):
                assert at.several(100) == Counter({200: 100})
            assert at.ask()[::2] == (200, b"backend")
            assert backend.connections == 1
            at.gateway.wait_metric("pool_leases_total", 501)
            assert at.gateway.metric("pool_reuse_total") == 500
            at.is_quiet()
            assert at.gateway.metric("pool_connections", state="idle") == 1

    @pytest.mark.parametrize("limit", [1, 10])
    def test_a_burst_beyond_what_the_backend_allows(self, house: House, limit: int) -> None:
        """The library ends the connection when it is asked for one stream too many: so it never was."""

        def script(connection: BackendConnection) -> None:
            H2There(connection, max_concurrent_streams=limit).serve(name_of(connection))

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            for body in (None, bytes(100_000)):
                assert at.several(150, body=body) == Counter({200: 150})
            assert backend.connections <= 16
            at.is_quiet()
            assert at.gateway.metric("backend_retries_total") == 0

    def test_a_limit_on_connections(self, house: House) -> None:
        """The pool's queue holds what the backend's streams cannot take."""

        def script(connection: BackendConnection) -> None:
            H2There(connection, max_concurrent_streams=5).serve(name_of(connection))

        limit = "circuit_breaker = { max_connections = 1 }"
        with Backend(script) as backend, world(house, backend_table(backend.address), more=limit) as at:
            assert at.several(100) == Counter({200: 100})
            assert backend.connections == 1
            at.is_quiet()

    def test_a_limit_on_requests(self, house: House) -> None:
        most: list[int] = []

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            while True:
                there.read()
                complete = there.pending()
                most.append(len(complete))
                for each in complete:
                    there.answer(each.stream)

        limit = "circuit_breaker = { max_requests = 3 }"
        with Backend(script) as backend, world(house, backend_table(backend.address), more=limit) as at:
            assert at.several(50) == Counter({200: 50})
            assert max(most) <= 3
            at.is_quiet()

    @pytest.mark.parametrize("policy", ["least_requests", "least_connections", "round_robin"])
    def test_policies_by_load(self, house: House, policy: str) -> None:
        go = threading.Event()
        seen: dict[str, int] = {"a": 0, "b": 0}

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            while True:
                there.read()
                seen[connection.backend.name] = len(there.pending())
                if go.is_set():
                    for each in there.pending():
                        there.answer(each.stream)

        more = f'load_balancing = {{ policy = "{policy}" }}'
        with Backend(script, "a") as a, Backend(script, "b") as b:
            tables = (backend_table(a.address), backend_table(b.address))
            with world(house, *tables, more=more) as at, at.h2() as client:
                streams = [client.open(request("/x")) for _ in range(20)]
                eventually(lambda: sum(seen.values()) == 20, "all are there")
                if policy != "least_connections":  # it sees two connections, whatever is on them
                    assert seen == {"a": 10, "b": 10}
                go.set()
                streams += [client.open(request("/x")) for _ in range(8)]  # wakes both
                assert {client.response(each).status for each in streams} == {200}


class TestUnprocessed:
    """What the backend says it did not look at is sent again, whatever its method."""

    @pytest.mark.parametrize("body", [None, b"held"])
    def test_refused_stream(self, house: House, body: bytes | None) -> None:
        """The first of its connection, too."""
        refused: list[int] = []

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            for each in there.wait(1, complete=False):
                refused.append(each.stream)
                there.reset(each.stream, ErrorCodes.REFUSED_STREAM)
            there.serve(lambda request: bytes(request.body))

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            with at.h2() as client:
                answer = client.ask(request("/x", "GET" if body is None else "POST"), body)
            assert (answer.status, answer.body) == (200, body or b"")
            assert refused == [1]
            assert at.gateway.metric("backend_retries_total", reason="stale") == 1
            at.is_quiet()

    def test_goaway_in_the_middle(self, house: House) -> None:
        """Up to the last stream they finish there; those above go to another connection, POST as well."""
        served: list[tuple[int, int, bytes]] = []

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            if connection.number == 1:
                there.wait(10)
                there.say_goaway(9)
            while True:
                for each in there.pending():
                    if connection.number > 1 or each.stream <= 9:
                        served.append((connection.number, each.stream, bytes(each.body)))
                        there.answer(each.stream, bytes(each.body))
                there.read()

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            with at.h2() as client:
                streams = [client.open(request("/x", "POST"), end=False) for _ in range(10)]
                for number, stream in enumerate(streams):
                    client.send_body(stream, b"%d" % number)
                answers = [client.response(stream) for stream in streams]
            assert [(each.status, bytes(each.body)) for each in answers] == [
                (200, b"%d" % number) for number in range(10)
            ]
            assert Counter(number for number, _, _ in served) == Counter({1: 5, 2: 5})
            assert sorted(body for _, _, body in served) == [b"%d" % number for number in range(10)], (
                "once each"
            )
            at.is_quiet()

    def test_goaway_in_two_steps(self, house: House) -> None:
        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            if connection.number == 1:
                first, second = there.wait(2)
                there.say_goaway(2**31 - 1)
                there.answer(second.stream)
                there.say_goaway(3)
                there.answer(first.stream)
                assert connection.sock.recv(1)  # GOAWAY, and the end
            else:
                there.serve(name_of(connection))

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            assert at.several(2) == Counter({200: 2})
            assert at.several(3) == Counter({200: 3})
            assert backend.connections == 2
            assert at.gateway.metric("backend_retries_total") == 0
            at.is_quiet()


class TestResets:
    @pytest.mark.parametrize(
        "code", [ErrorCodes.CANCEL, ErrorCodes.INTERNAL_ERROR, ErrorCodes.ENHANCE_YOUR_CALM]
    )
    def test_the_code_reaches_the_client_and_its_siblings_go_on(self, house: House, code: ErrorCodes) -> None:
        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            first, second, third = (each.stream for each in there.wait(3))
            for each in (first, second, third):
                there.head(each)
                there.body(each, b"some", end=False)
            there.reset(second, code)
            for each in (first, third):
                there.body(each, b" more")
            there.serve(name_of(connection))

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            with at.h2() as client:
                answers = [client.response(each) for each in [client.open(request("/x")) for _ in range(3)]]
            assert [each.reset for each in answers] == [None, code, None]
            assert [bytes(each.body) for each in answers] == [b"some more", b"some", b"some more"]
            assert backend.connections == 1
            at.is_quiet()

    def test_before_its_answer_it_is_a_502(self, house: House) -> None:
        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            there.reset(there.wait(1)[0].stream, ErrorCodes.INTERNAL_ERROR)
            there.serve(name_of(connection))

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            assert at.ask()[0] == 502
            assert at.ask()[0] == 200
            at.is_quiet()

    def test_a_client_that_gives_up(self, house: House) -> None:
        """Its stream is reset at the backend, and the connection goes on."""
        gone = threading.Event()

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            stream = there.wait(1)[0].stream
            there.until(lambda: there.requests[stream].reset == ErrorCodes.CANCEL)
            gone.set()
            there.serve(name_of(connection))

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            with Client(at.port) as client:
                client.send(GET)
                eventually(lambda: at.gateway.metric("backend_inflight") == 1, "it is under way")
            assert gone.wait(30)
            assert at.ask()[0] == 200
            assert backend.connections == 1
            at.is_quiet()


class TestLost:
    def test_fifty_streams_under_way(self, house: House) -> None:
        """On a connection that had served before: what is idempotent is sent again, once; a POST is not; what
        has begun is cut, and never looks complete."""
        ready = threading.Event()

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            if connection.number > 1:
                there.serve(name_of(connection))
            there.answer(there.wait(1)[0].stream)
            streams = there.wait(51)
            there.head(streams[1].stream, 200, ("content-length", "100"))
            there.body(streams[1].stream, b"begun", end=False)
            assert ready.wait(30)

        with (
            Backend(script) as backend,
            world(house, backend_table(backend.address)) as at,
            at.h2() as client,
        ):
            client.ask(request("/x"))
            begun = client.open(request("/x"))
            gets = [client.open(request("/x")) for _ in range(40)]
            posts = [client.open(request("/x", "POST")) for _ in range(9)]
            client.until(lambda: client.answer(begun).body == b"begun")
            ready.set()
            assert client.response(begun).reset is not None
            assert [client.response(each).status for each in gets] == [200] * 40
            assert [client.response(each).status for each in posts] == [502] * 9
            assert backend.connections == 2
            at.is_quiet()

    def test_all_of_them_fail_over_to_another_backend(self, house: House) -> None:
        def dying(connection: BackendConnection) -> None:
            # Who comes when the first connection is gone already makes another one, perhaps alone.
            H2There(connection).wait(5 if connection.number == 1 else 1)

        more = "retry = { on = ['connect', 'reset', 'stale'], attempts = 3 }"
        with Backend(dying) as first, Backend(answer_h2, "up") as second:
            tables = (backend_table(first.address), backend_table(second.address))
            with world(house, *tables, more=more) as at:
                assert at.several(20) == Counter({200: 20})
                at.is_quiet()

    def test_it_never_says_settings(self, house: House) -> None:
        def mute(connection: BackendConnection) -> None:
            connection.until(b"never")

        with (
            Backend(mute) as backend,
            world(house, backend_table(backend.address), http="head_timeout_ms = 300") as at,
        ):
            status, headers, _ = at.ask()
            assert (status, headers["proxy-status"].split(";")[1].strip()) == (
                504,
                "error=http_response_timeout",
            )
            at.is_quiet()


class TestRetries:
    def test_statuses_and_slow_attempts(self, house: House) -> None:
        """The slow attempt is taken back; the connection and who else is on it stay."""
        resets: list[int | None] = []

        def slow(connection: BackendConnection) -> None:
            there = H2There(connection)
            while True:
                there.read()
                resets.extend(each.reset for each in there.requests.values() if each.reset is not None)

        def failing(connection: BackendConnection) -> None:
            there = H2There(connection)
            while True:
                for each in there.pending():
                    there.answer(each.stream, b"", 503)
                there.read()

        more = "retry = { on = ['connect', 503], attempts = 3, per_try_timeout_ms = 1000 }"
        with Backend(slow) as one, Backend(failing) as two, Backend(answer_h2, "up") as three:
            tables = [backend_table(each.address) for each in (one, two, three)]
            with world(house, *tables, more=more) as at:
                for _ in range(3):
                    assert at.ask()[::2] == (200, b"up")
                eventually(lambda: ErrorCodes.CANCEL in resets, "the slow one was told")
                at.is_quiet()

    def test_refused_goes_elsewhere(self, house: House) -> None:
        with Backend(answer_h2, "up") as backend:
            tables = (backend_table(f"127.0.0.1:{free_port()}"), backend_table(backend.address))
            with world(house, *tables) as at:
                assert at.several(10) == Counter({200: 10})
                at.is_quiet()


def old_server(connection: BackendConnection) -> None:
    """A script: whatever is said is no HTTP/1.1."""
    connection.sock.recv(65_536)
    connection.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    connection.rest()


class TestBackendsThatDoNotAgree:
    @pytest.fixture
    def files(self, tmp_path: Path) -> CertificateFiles:
        return certificate(tmp_path)

    def expect(self, at: World, error: str, cause: str) -> None:
        status, headers, _ = at.ask()
        assert (status, headers["proxy-status"].split(";")[1].strip()) == (502, f"error={error}"), headers
        assert cause in at.gateway.log() or cause in headers["proxy-status"], (headers, at.gateway.log())
        at.is_quiet()

    @pytest.mark.parametrize("alpn", [(), ("http/1.1",)], ids=["none", "http/1.1"])
    def test_alpn(self, house: House, files: CertificateFiles, alpn: tuple[str, ...]) -> None:
        with (
            Backend(answer_ok, tls=server_tls(files, *alpn)) as backend,
            world(house, backend_table(backend.address, files)) as at,
        ):
            self.expect(at, "http_protocol_error", "did not agree to speak HTTP/2")

    def test_a_certificate_of_somebody_else(
        self, tmp_path: Path, house: House, files: CertificateFiles
    ) -> None:
        other = certificate(tmp_path, stem="other")
        with (
            Backend(answer_h2, tls=server_tls(files, "h2")) as backend,
            world(house, backend_table(backend.address, other)) as at,
        ):
            self.expect(at, "tls_certificate_error", "certificate not accepted")

    def test_no_tls_there(self, house: House, files: CertificateFiles) -> None:
        with (
            Backend(old_server) as backend,
            world(house, backend_table(backend.address, files)) as at,
        ):
            self.expect(at, "tls_protocol_error", "TLS handshake failed")

    def test_http_1_there(self, house: House) -> None:
        with Backend(old_server) as backend, world(house, backend_table(backend.address)) as at:
            self.expect(at, "http_protocol_error", "HTTP/1 instead of HTTP/2")

    def test_over_tls_it_works(self, house: House, files: CertificateFiles) -> None:
        with (
            Backend(answer_h2, tls=server_tls(files, "http/1.1", "h2")) as backend,
            world(house, backend_table(backend.address, files)) as at,
        ):
            assert at.several(50) == Counter({200: 50})
            assert backend.connections == 1
            at.is_quiet()


class TestProxyHeader:
    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_a_connection_for_each_exchange_with_its_clients_address(
        self, house: House, version: str
    ) -> None:
        """The answer says who the header named, and that is who asked."""

        def script(connection: BackendConnection) -> None:
            if version == "v1":
                source = connection.until(b"\r\n").split()[2].decode()
            else:
                head = connection.exactly(16)
                source = ".".join(map(str, connection.exactly(int.from_bytes(head[14:], "big"))[:4]))
            there = H2There(connection)
            for event in there.h2.receive_data(connection.buffer):
                there._take(event)
            connection.buffer = b""
            there.flush()
            there.serve(lambda request: source.encode())

        table_ = "send_proxy = '" + version + "'"
        with (
            Backend(script) as backend,
            world(house, backend_table(backend.address, more=table_)) as at,
        ):
            clients = [at.h2(source=f"127.0.0.{number}") for number in range(2, 10)]
            opened = [(client, client.open(request("/x"))) for client in clients for _ in range(5)]
            for number, (client, stream) in enumerate(opened):
                assert client.response(stream).body == b"127.0.0.%d" % (2 + number // 5)
            for client in clients:
                client.sock.close()
            assert backend.connections == 40
            eventually(lambda: at.gateway.metric("pool_connections") == 0, "all are closed")
