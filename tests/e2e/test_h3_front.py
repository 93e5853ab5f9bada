"""HTTP/3 in front of a running gateway: messages, refusals, times. The client is ``aioquic``."""

import queue
from collections.abc import Iterator

import pytest

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.h3_site import SWEEP, ask, closing, quic_listener, request
from tests.e2e.harness import PATIENCE_S, BackendConnection, eventually, run
from tests.e2e.http_world import (
    World,
    answer,
    chunked,
    field,
    fields,
    http_world,
    read_body,
    read_chunked,
)
from tests.e2e.talks import CutError, Fields, rest
from tests.e2e.talks_h3 import H3End, dial_h3
from tests.ports import free_port

H3_MESSAGE_ERROR = 0x10E
CAP_BYTES = 100_000


class Site:
    """A world with ``quic`` listeners: ``quic``, ``dead`` (nobody behind) and ``quick`` (short times)."""

    def __init__(self, world: World, files: CertificateFiles) -> None:
        self.world = world
        self.files = files
        self.gateway = world.gateway
        self.on = world.on

    def dial(self, front: str = "quic") -> H3End:
        return dial_h3(self.files, self.world.ports[front])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("h3")
    files = CertificateFiles(directory / "server.crt", directory / "server.key")
    listeners = {
        "quic": ("{backend}", f"max_request_body_bytes = {CAP_BYTES}"),
        "dead": (f"127.0.0.1:{free_port()}", ""),
        "quick": ("{backend}", "head_timeout_ms = 300\nbody_timeout_ms = 700\ntotal_timeout_ms = 5000"),
    }
    more = "".join(
        quic_listener(files, 0, backend, name=name, http=http).replace(
            "127.0.0.1:0", f"127.0.0.1:{{port_{name}}}"
        )
        for name, (backend, http) in listeners.items()
    )
    more += f"""
[[listeners]]
name = "beside"
address = "127.0.0.1:{{port_beside}}"
protocol = "h1s"
tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}
backends = [{{ address = "{{backend}}" }}]
alt_svc = {{ h3_port = {{port_quic}}, max_age = 60 }}
{SWEEP}
"""
    with http_world(directory, more=more, runtime="max_requests_per_h3_connection = 0") as world:
        yield Site(world, files)


@pytest.fixture
def client(site: Site) -> Iterator[H3End]:
    with closing(site.dial()) as client:
        yield client


class TestMessages:
    def test_status_and_fields_in_order_with_duplicates(self, site: Site, client: H3End) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(
                connection, b"x", status="418 Teapot", headers=b"X-B: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
            )

        sent = [("x-a", "1"), ("accept", "*/*"), ("x-a", "2"), ("authorization", "Basic eDp5")]
        got = ask(client, site.on(script), *sent)
        assert rest(got) == b"x"
        assert got.headers[":status"] == "418"
        ends = [each for each in got.fields if each[0] in ("x-b", "set-cookie")]
        assert ends == [("x-b", "2"), ("set-cookie", "a"), ("set-cookie", "b")]
        assert [each for each in fields(heads[0]) if each in sent] == sent

    def test_what_tells_the_version(self, site: Site, client: H3End) -> None:
        """Host is made of :authority; the metrics know the version."""
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection)

        labels = {"listener": "quic", "version": "3", "status_class": "2xx"}
        before = site.gateway.metric("http_requests_total", **labels)
        talk = client.call(request(site.on(script), authority="app.example:8443"), end=True)
        assert talk.read_head()["via"] == "1.1 expressgateway"
        assert field(heads[0], "host") == "app.example:8443"
        assert field(heads[0], "via") == "3 expressgateway"
        assert field(heads[0], "x-forwarded-proto") == "https"
        assert field(heads[0], "x-forwarded-for") == "127.0.0.1"
        eventually(
            lambda: site.gateway.metric("http_requests_total", **labels) == before + 1, "it is counted"
        )
        assert site.gateway.metric("tls_handshakes_total", listener="quic", result="ok") > 0

    def test_cookie_crumbs_become_one(self, site: Site, client: H3End) -> None:
        heads = []

        def script(connection: BackendConnection, head: bytes) -> None:
            heads.append(head)
            answer(connection)

        ask(client, site.on(script), ("cookie", "a=b"), ("x-a", "1"), ("cookie", "c=d; e=f"), ("cookie", "g"))
        assert [value for name, value in fields(heads[0]) if name.lower() == "cookie"] == ["a=b; c=d; e=f; g"]

    def test_trailers_both_ways(self, site: Site, client: H3End) -> None:
        seen: list[tuple[bytes, Fields]] = []

        def script(connection: BackendConnection, head: bytes) -> None:
            seen.append(read_chunked(connection))
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            connection.send(b"3\r\nabc\r\n0\r\nX-Sum: 7\r\nx-more: a, b\r\n\r\n")

        talk = client.call(request(site.on(script), ("trailer", "x-req"), method="POST"), end=False)
        talk.send(b"hello")
        talk.finish([("x-req", "7")])
        talk.read_head()
        assert rest(talk) == b"abc"
        assert talk.trailers == [("x-sum", "7"), ("x-more", "a, b")]
        assert seen == [(b"hello", [("x-req", "7")])]

    def test_interim_answers_pass(self, site: Site, client: H3End) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            read_body(connection, head)
            answer(connection, b"x")

        path = site.on(script)
        talk = client.call(
            request(path, ("expect", "100-continue"), ("content-length", "2"), method="POST"), end=False
        )
        with client.changed:
            assert client.changed.wait_for(lambda: len(talk.informational) == 2, PATIENCE_S)
        talk.send(b"ab", end=True)
        assert talk.read_head()[":status"] == "200"
        statuses = [dict(each)[":status"] for each in talk.informational]
        assert statuses == ["103", "100"]
        assert ("link", "</a>") in talk.informational[0]

    def test_head_has_the_length_and_no_body(self, site: Site, client: H3End) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n")

        talk = ask(client, site.on(script), method="HEAD")
        assert (talk.headers[":status"], talk.headers["content-length"]) == ("200", "1234")
        assert rest(talk) == b""

    @pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
    def test_a_status_without_a_body(self, site: Site, client: H3End, status: str) -> None:
        path = site.on(lambda connection, _: connection.send(f"HTTP/1.1 {status}\r\n\r\n".encode()))
        talk = ask(client, path)
        assert (talk.headers[":status"], rest(talk)) == (status[:3], b"")

    def test_options_asterisk(self, site: Site, client: H3End) -> None:
        site.on(lambda connection, _: answer(connection, b"all"), "*")
        talk = client.call(request("*", method="OPTIONS"), end=True)
        talk.read_head()
        assert rest(talk) == b"all"

    def test_the_listener_beside_it_points_here(self, site: Site) -> None:
        port = site.world.ports["quic"]
        told = run(
            *("curl", "-sS", "--cacert", str(site.files.certificate), "-o", "/dev/null", "-D", "-"),
            f"https://localhost:{site.world.ports['beside']}{site.on(lambda one, _: answer(one))}",
        )
        assert f'alt-svc: h3=":{port}"; ma=60' in told.lower()


class TestRefusals:
    """Nothing of these reaches a backend, and the connection serves on."""

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            ({":authority": "a,b"}, "400"),
            ({":authority": "a b"}, "400"),
            ({":authority": "user@a"}, "400"),
            ({":authority": "a:99999"}, "400"),
            ({":authority": "[::1"}, "400"),
            ({"host": "other"}, "400"),
            ({":path": "/a%00"}, "400"),
            ({":path": "/../x"}, "400"),
            ({"x_y": "1"}, "400"),
            ({":path": "/" + "a" * 20_000}, "414"),
        ],
    )
    def test_a_request_that_is_answered(
        self, site: Site, client: H3End, change: dict[str, str], status: str
    ) -> None:
        asked = len(site.world.backend.requests)
        fields = dict(request("/x")) | change
        talk = client.call(list(fields.items()), end=True)
        assert talk.read_head()[":status"] == status
        rest(talk)
        assert len(site.world.backend.requests) == asked
        assert served(site, client)

    @pytest.mark.parametrize(
        "fields",
        [
            request("/x", ("Upper", "1")),
            request("/x", ("connection", "close")),
            request("/x", ("transfer-encoding", "chunked")),
            request("/x", ("te", "gzip")),
            request("/x", ("x", "a\r\nb: c")),
            request("/x", (":path", "/y")),
            request("/x", (":status", "200")),
            [("x", "1"), *request("/x")],
            request("/x")[1:],
            [(":method", "GET"), (":scheme", "https"), (":authority", "a")],
            request("/x y"),
        ],
        ids=str,
    )
    def test_a_request_that_is_reset(self, site: Site, client: H3End, fields: Fields) -> None:
        talk = client.call(fields, end=True)
        talk.until_lost()
        assert talk.lost_code == H3_MESSAGE_ERROR
        assert served(site, client)

    @pytest.mark.parametrize("body", [b"abc", b"abcde"])
    def test_a_length_that_the_body_contradicts(self, site: Site, client: H3End, body: bytes) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            read_body(connection, head)
            answer(connection)

        talk = client.call(request(site.on(script), ("content-length", "4"), method="POST"), end=False)
        talk.send(body, end=True)
        talk.until_lost()
        assert talk.lost_code == H3_MESSAGE_ERROR
        assert served(site, client)

    def test_a_forbidden_trailer(self, site: Site, client: H3End) -> None:
        began: queue.Queue[bytes] = queue.Queue()
        outcome: queue.Queue[str] = queue.Queue()

        def script(connection: BackendConnection, head: bytes) -> None:
            began.put(connection.until(b"abc\r\n"))
            try:
                read_chunked(connection)
            except (AssertionError, OSError):
                outcome.put("cut")
                raise
            outcome.put("complete")

        talk = client.call(request(site.on(script), method="POST"), end=False)
        talk.send(b"abc")
        began.get(timeout=PATIENCE_S)
        talk.finish([("content-length", "3")])
        assert outcome.get(timeout=PATIENCE_S) == "cut"
        assert served(site, client)

    def test_too_many_fields(self, site: Site, client: H3End) -> None:
        talk = client.call(request("/x", *((f"x-{n}", "1") for n in range(300))), end=True)
        assert talk.read_head()[":status"] == "431"
        rest(talk)
        assert served(site, client)

    @pytest.mark.parametrize("is_declared", [True, False])
    def test_a_body_over_the_cap(self, site: Site, client: H3End, is_declared: bool) -> None:
        path = site.on(lambda connection, head: answer(connection, read_body(connection, head)))
        length = [("content-length", str(CAP_BYTES + 1))] if is_declared else []
        talk = client.call(request(path, *length, method="POST"), end=False)
        if not is_declared:
            with pytest.raises(CutError):
                talk.send(bytes(10_000_000))
        assert talk.read_head()[":status"] == "413"
        assert served(site, client)


def served(site: Site, client: H3End) -> bool:
    """The connection serves on."""
    talk = ask(client, site.on(lambda connection, _: answer(connection, b"good")))
    return rest(talk) == b"good"


class TestFailures:
    def test_no_backend_there(self, site: Site) -> None:
        with closing(site.dial("dead")) as client:
            talk = ask(client, "/x")
            assert talk.headers[":status"] == "502"
            assert talk.headers["proxy-status"].startswith("expressgateway; error=connection_refused")
            assert talk.headers["content-type"].startswith("text/plain")

    def test_a_silent_backend(self, site: Site) -> None:
        go: queue.Queue[None] = queue.Queue()
        path = site.on(lambda connection, _: go.get(timeout=PATIENCE_S))
        with closing(site.dial("quick")) as client:
            talk = ask(client, path)
            assert talk.headers[":status"] == "504"
            assert "error=http_response_timeout" in talk.headers["proxy-status"]
        go.put(None)

    def test_a_backend_that_stops_in_the_body(self, site: Site) -> None:
        """Reset, so that it cannot be taken for complete."""
        go: queue.Queue[None] = queue.Queue()

        def script(connection: BackendConnection, _: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf.")
            go.get(timeout=PATIENCE_S)

        with closing(site.dial("quick")) as client:
            talk = ask(client, site.on(script))
            with pytest.raises(CutError):
                rest(talk)
            # A loaded machine may take longer than this listener allows.
            eventually(lambda: served(site, client), "the connection serves on")
        go.put(None)

    def test_a_client_that_stops_in_the_body(self, site: Site) -> None:
        ended: queue.Queue[bytes] = queue.Queue()
        path = site.on(lambda connection, _: ended.put(connection.rest()))
        with closing(site.dial("quick")) as client:
            talk = client.call(request(path, ("content-length", "10"), method="POST"), end=False)
            talk.send(b"half.")
            assert talk.read_head()[":status"] == "408"
            assert ended.get(timeout=PATIENCE_S) == b"half."
            eventually(lambda: served(site, client), "the connection serves on")

    def test_a_client_that_does_not_read(self, site: Site) -> None:
        ended: queue.Queue[None] = queue.Queue()

        def script(connection: BackendConnection, _: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
            try:
                while True:
                    connection.send(bytes(100_000))
            except OSError:
                ended.put(None)
                raise

        labels = {"listener": "quick", "kind": "slow_reader"}
        before = site.gateway.metric("security_events_total", **labels)
        with closing(site.dial("quick")) as client:
            talk = ask(client, site.on(script))
            talk.until_lost()
            ended.get(timeout=PATIENCE_S)
            # A loaded machine may take longer than this listener allows.
            eventually(lambda: served(site, client), "its siblings are served")
        assert site.gateway.metric("security_events_total", **labels) == before + 1

    def test_a_client_that_cancels(self, site: Site, client: H3End) -> None:
        began: queue.Queue[None] = queue.Queue()
        ended: queue.Queue[bytes] = queue.Queue()

        def script(connection: BackendConnection, _: bytes) -> None:
            began.put(None)
            ended.put(connection.rest())

        talk = client.call(request(site.on(script)), end=True)
        began.get(timeout=PATIENCE_S)
        talk.cut()
        assert ended.get(timeout=PATIENCE_S) == b""
        assert served(site, client)

    def test_a_client_that_closes_the_connection_in_an_upload(self, site: Site) -> None:
        began: queue.Queue[bytes] = queue.Queue()
        ended: queue.Queue[bytes] = queue.Queue()

        def script(connection: BackendConnection, _: bytes) -> None:
            began.put(connection.until(b"half\r\n"))
            ended.put(connection.rest())

        client = site.dial()
        talk = client.call(request(site.on(script), method="POST"), end=False)
        talk.send(b"half")
        began.get(timeout=PATIENCE_S)
        client.close()
        assert ended.get(timeout=PATIENCE_S) == b"", "no last chunk"

    def test_an_answer_before_the_request_is_complete(self, site: Site, client: H3End) -> None:
        def script(connection: BackendConnection, head: bytes) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(b"early"))
            read_chunked(connection)

        talk = client.call(request(site.on(script), method="POST"), end=False)
        talk.send(b"abc")
        assert talk.read_head()[":status"] == "200"
        assert rest(talk) == b"early"
