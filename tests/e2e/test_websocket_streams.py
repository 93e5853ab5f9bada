"""WebSocket where one side, or both, speaks HTTP/2 (RFC 8441) or HTTP/3 (RFC 9220): all but its limits."""

import os
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol
from websockets.utils import accept_key

from tests.e2e.harness import Backend, BackendConnection, Gateway, House, eventually, need, server
from tests.e2e.test_attacks_websocket import TEXT, frame
from tests.e2e.websocket_h2_peers import Asgi
from tests.e2e.websocket_sessions import OFFER, Refused, Session
from tests.e2e.websocket_site import CODES, Cell, Ends, Site, accepts, ends, resets, site
from tests.ports import free_port

__all__ = ["ends", "site"]

BIG = 3_000_000
STREAMED: list[Cell] = [(front, back) for front in ("h2", "h3") for back in ("h1", "h2", "h3")]
CELLS: list[Cell] = [*STREAMED, ("h2c", "h1"), ("h1", "h2"), ("h1", "h3")]
cells = pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])
streamed = pytest.mark.parametrize("cell", STREAMED, ids=["-".join(cell) for cell in STREAMED])
fronts = pytest.mark.parametrize("front", ["h2", "h3"])
clear_fronts = pytest.mark.parametrize("front", ["h2c", "h3"])
"""In clear text where there is such a thing."""


# -- sessions ----------------------------------------------------------------------------------------------


@cells
def test_messages_of_all_kinds(site: Site, cell: Cell) -> None:
    blob = os.urandom(BIG)
    with site.session(cell) as client:
        for message in ("grüße", b"\x00\xff", "", b"", "x" * 70_000, blob):
            client.send(message)
            assert client.recv(20) == message


@cells
def test_the_handshake_is_between_client_and_backend(site: Site, cell: Cell) -> None:
    front, back = cell
    more = (
        ("origin", "https://app.example"),
        ("cookie", "session=1; a=b"),
        ("authorization", "Bearer x"),
    )
    with site.session(cell, "/echo?q=1", *more, ("sec-websocket-protocol", "chat.v1, other")) as client:
        if front != "h1":
            assert client.subprotocol == "chat.v1"
            names = [name for name, _ in client.pairs]
            assert not {"sec-websocket-accept", "connection", "upgrade", "sec-websocket-key"} & set(names)
            assert client.status == 200
            if back != "h1":
                assert client.headers["set-cookie"] == "c=d"
    asked = site.asked(back)
    for name, value in more:
        assert asked[name] == value
    assert asked["sec-websocket-version"] == "13"
    assert asked["sec-websocket-protocol"] == "chat.v1, other"
    assert asked["x-forwarded-proto"] == ("https" if front in ("h2", "h3") else "http")
    if back != "h1":
        assert (asked[":method"], asked[":protocol"], asked[":path"]) == ("CONNECT", "websocket", "/echo?q=1")
        assert not {"sec-websocket-key", "connection", "upgrade"} & set(asked)
    else:
        assert site.saw[-1].path == "/echo?q=1"
        assert accept_key(asked["sec-websocket-key"])


@pytest.mark.parametrize("back", ["h2", "h3"])
def test_the_client_of_websockets_is_content(site: Site, back: str) -> None:
    """It checks the accept value, which is ours to compute: the backend was sent no key."""
    url = f"ws://localhost:{site.port['h2c', back]}/echo"
    with connect(
        url, proxy=None, origin=Origin("https://app.example"), subprotocols=[Subprotocol("chat.v1")]
    ) as client:
        assert client.subprotocol == "chat.v1"
        assert client.response is not None
        assert client.response.headers["X-Backend"] == back
        assert client.ping().wait(30)


@fronts
def test_compression_is_between_client_and_backend(site: Site, front: str) -> None:
    with site.link(front, "h1") as link:
        session = link.connect("/echo", ("sec-websocket-extensions", OFFER))
        text = "compress me " * 10_000
        session.send(text)
        assert session.recv() == text
        assert len(session.raw) < 2_000


@streamed
def test_many_sessions_on_one_connection(site: Site, cell: Cell) -> None:
    labels = {"listener": "-".join(cell)}
    before = site.gateway.metric("websocket_sessions_total", **labels)
    with site.link(*cell) as link:
        sessions = [link.connect() for _ in range(20)]
        eventually(lambda: site.gateway.metric("websocket_sessions_open", **labels) == 20, "they are counted")
        assert site.gateway.metric("websocket_sessions_total", **labels) == before + 20
        for number, session in enumerate(sessions):
            session.send(str(number))
        sessions[7].cancel()
        for number, session in enumerate(sessions):
            if number != 7:
                assert session.recv() == str(number)
    eventually(lambda: site.gateway.metric("websocket_sessions_open") == 0, "all have ended")


def test_hypercorn_as_a_backend(ends: Ends, tmp_path: Path) -> None:
    """Without closing handshakes: over HTTP/2 it leaves them unanswered, whoever asks."""
    scopes: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            return
        scopes.append(scope)
        await receive()
        if scope["path"] == "/forbidden":
            await send({"type": "websocket.close"})
            return
        await send({"type": "websocket.accept", "subprotocol": "chat.v1"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": event.get("text"), "bytes": event.get("bytes")})

    port = free_port()
    with Asgi(app) as asgi, Gateway(tmp_path, ends.listener("h2c", port, asgi.address, "h2")):
        with ends.link("h2c", port) as link:
            session = link.connect(
                "/echo", ("sec-websocket-protocol", "chat.v1"), ("sec-websocket-extensions", OFFER)
            )
            assert session.subprotocol == "chat.v1"
            for message in ("grüße", os.urandom(1_000_000), ""):
                session.send(message)
                assert session.recv() == message
            with pytest.raises(Refused) as refused:
                link.connect("/forbidden", ("sec-websocket-protocol", "chat.v1"))
            assert refused.value.status == 403
            session.cancel()
        with connect(
            f"ws://localhost:{port}/echo",
            proxy=None,
            subprotocols=[Subprotocol("chat.v1")],
            close_timeout=0.1,
        ) as it:
            it.send("hello")
            assert it.recv(5) == "hello"
    assert {scope["http_version"] for scope in scopes} == {"2"}


@need("haproxy")
def test_many_short_messages_through_haproxy(site: Site, tmp_path: Path) -> None:
    """It makes an extended CONNECT of the upgrade, and gives each short DATA frame back at once."""
    hop = free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
        f"listen ws\n bind 127.0.0.1:{hop}\n server gw 127.0.0.1:{site.port['h2c', 'h1']} proto h2\n"
    )
    with (
        server("haproxy", "-db", "-q", "-f", str(config), port=hop),
        connect(f"ws://localhost:{hop}/echo", proxy=None, compression=None) as client,
    ):
        for number in range(1500):
            client.send(str(number))
            assert client.recv(20) == str(number)
        client.close(4002, "bye")
    eventually(lambda: site.has_closed("h1", 4002, "bye"), "the backend got the code")
    assert site.gateway.metric("security_events_total", kind="window_update_flood") == 0


# -- refusals ----------------------------------------------------------------------------------------------


@streamed
def test_a_backend_that_refuses_is_quoted(site: Site, cell: Cell) -> None:
    with site.link(*cell) as link:
        with pytest.raises(Refused) as refused:
            link.connect("/forbidden")
        assert (refused.value.status, refused.value.body) == (403, b"not you\n")
        session = link.connect()  # the connection is as good as before
        session.send("x")
        assert session.recv() == "x"


@pytest.mark.parametrize("back", ["h2", "h3"])
def test_a_backend_that_refuses_a_client_of_http_1(site: Site, back: str) -> None:
    with pytest.raises(InvalidStatus) as caught, site.session(("h1", back), "/forbidden"):
        pass
    assert caught.value.response.status_code == 403
    assert caught.value.response.body == b"not you\n"


@fronts
def test_a_page_is_no_tunnel(site: Site, front: str) -> None:
    """A success that opens no tunnel would say on a stream that it is open."""
    with site.link(front, "h1") as link, pytest.raises(Refused) as refused:
        link.connect("/plain")
    assert refused.value.status == 502
    assert "http_upgrade_failed" in refused.value.headers["proxy-status"]


@pytest.mark.parametrize(
    ("front", "accept"),
    [
        ("h2c", b""),
        ("h2c", b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"),
        ("h3", b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"),
    ],
)
def test_an_accept_value_that_is_wrong(ends: Ends, house: House, front: str, accept: bytes) -> None:
    port = house.port

    def serve_it(connection: BackendConnection) -> None:
        connection.request()
        connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            + accept
            + b"\r\n"
            + frame(TEXT, b"for nobody", mask=False)
        )
        connection.backend.requests.append((connection.rest(), b""))

    with (
        Backend(serve_it) as backend,
        house.gateway(ends.listener(front, port, backend.address)) as gateway,
        ends.link(front, port) as link,
    ):
        with pytest.raises(Refused) as refused:
            link.connect()
        assert refused.value.status == 502
        assert "Sec-WebSocket-Accept" in refused.value.headers["proxy-status"]
        assert b"for nobody" not in refused.value.body
        eventually(lambda: backend.requests, "the backend was left")
        assert gateway.metric("http_gateway_errors_total", reason="backend_upgrade") == 1
        assert gateway.metric("websocket_sessions_total") == 0


@pytest.mark.parametrize("back", ["h2", "h3"])
def test_a_backend_that_does_not_offer_it(ends: Ends, tmp_path: Path, back: str) -> None:
    """502 with the cause - and the connection goes on serving whoever asks for something else."""
    ports = {front: free_port() for front in ("h2c", "h3")}

    def refusal(front: str) -> tuple[int, str]:
        if front == "h1":
            with (
                pytest.raises(InvalidStatus) as caught,
                connect(f"ws://localhost:{ports['h2c']}/", proxy=None),
            ):
                pass
            response = caught.value.response
            return response.status_code, response.headers["proxy-status"]
        with ends.link(front, ports[front]) as link, pytest.raises(Refused) as refused:
            link.connect()
        return refused.value.status, refused.value.headers["proxy-status"]

    with ends.sockets(back, offers=False) as backend:
        config = "".join(ends.listener(front, port, backend.address, back) for front, port in ports.items())
        with Gateway(tmp_path, config) as gateway:
            for front in ("h1", *ports):
                for _ in range(2):  # on a connection that is new, and on one that is known
                    status, cause = refusal(front)
                    assert status == 502
                    assert "does not offer extended CONNECT" in cause
            assert gateway.metric("http_gateway_errors_total", reason="backend_upgrade") == 6
            assert backend.streams == [], "it was asked all the same"


BLOCKS = ["", "[listeners.websocket]\n", "[listeners.websocket]\nenabled = false\n"]


def test_not_offered_it_is_refused(ends: Ends, tmp_path: Path) -> None:
    """As malformed (RFC 9113 8.5, RFC 9114 4.1.2); the connection goes on."""
    ports = {(front, block): free_port() for front in ("h2c", "h3") for block in BLOCKS}
    with Backend() as backend:
        config = "".join(
            ends.listener(front, port, backend.address, block=block).replace(
                f"'{front}-h1'", f"'{front}-{number}'"
            )
            for number, ((front, block), port) in enumerate(ports.items())
        )
        with Gateway(tmp_path, config):
            for (front, _), port in ports.items():
                with ends.link(front, port) as link:
                    assert not link.offers_connect
                    for _ in range(2):
                        session = link.ask()
                        session.until(lambda session=session: session.reset is not None)  # type: ignore[misc]
                        assert session.reset == CODES[front].malformed
                        assert not session.status
            assert backend.connections == 0


@fronts
def test_what_else_is_refused(site: Site, front: str) -> None:
    with site.link(front, "h1") as link:
        assert link.offers_connect
        tunnel = link.ask("/", protocol="connect-udp")
        tunnel.until(lambda: tunnel.has_ended)
        assert tunnel.status == 405


# -- ends --------------------------------------------------------------------------------------------------


@cells
def test_the_client_closes(site: Site, cell: Cell) -> None:
    reason = f"bye from {'-'.join(cell)}"
    with site.session(cell) as client:
        client.send("x")
        client.recv(5)
        client.close(4002, reason)
        assert (client.close_code, client.close_reason) == (4002, reason)
        eventually(lambda: site.has_closed(cell[1], 4002, reason), "the backend got the code")


@cells
def test_the_backend_closes(site: Site, cell: Cell) -> None:
    with site.session(cell, "/closes") as client:
        client.send("x")
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(5)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "had enough")
        if isinstance(client, Session):
            client.until(lambda: client.has_ended)
            assert client.reset in (None, 0)


@cells
def test_an_orderly_end_is_one(site: Site, cell: Cell) -> None:
    with site.session(cell) as client:
        client.close()
        with pytest.raises(ConnectionClosedOK):
            client.recv(5)
    eventually(lambda: site.gateway.metric("websocket_sessions_open") == 0, "it is over")


@fronts
def test_a_backend_of_http_1_that_vanishes(site: Site, front: str) -> None:
    """Its FIN is the stream's end, and no Close frame is made up."""
    with site.link(front, "h1") as link:
        session = link.connect("/breaks")
        session.send("x")
        session.until(lambda: session.has_ended)
        assert bytes(session.raw) == b""
        assert session.reset is None


@pytest.mark.parametrize("back", ["h2", "h3"])
@pytest.mark.parametrize("front", ["h1", "h2", "h3"])
def test_a_backend_that_resets_the_stream(site: Site, front: str, back: str) -> None:
    with site.session((front, back), "/resets") as client:
        client.send("x")
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(5)
        assert caught.value.rcvd is None
        if isinstance(client, Session):
            assert client.reset == CODES[front].calm, "its own code, as this version has it"


@clear_fronts
def test_a_backend_that_resets_the_connection(ends: Ends, house: House, front: str) -> None:
    """RFC 8441 5, RFC 9220 3: a TCP reset is a stream that is cancelled."""
    port = house.port
    with (
        Backend(accepts(resets)) as backend,
        house.gateway(ends.listener(front, port, backend.address)),
        ends.link(front, port) as link,
    ):
        session = link.connect()
        session.send("x")
        session.until(lambda: session.reset is not None)
        assert session.reset == CODES[front].cancelled


@streamed
def test_a_client_that_resets_its_stream(site: Site, cell: Cell) -> None:
    _, back = cell
    before = len(site.closed)
    with site.link(*cell) as link:
        session = link.connect()
        other = link.connect()
        session.send("x")
        assert session.recv() == "x"
        session.cancel()
        if back == "h1":
            eventually(lambda: 1006 in [code for code, _ in site.closed[before:]], "the server saw it")
        else:
            stream = site.sockets[back].streams[-2]
            eventually(lambda: stream.reset == CODES[back].cancelled, "the backend's stream is reset")
        other.send("still here")
        assert other.recv() == "still here"


@clear_fronts
@pytest.mark.parametrize("back", ["h1", "h2", "h3"])
def test_the_ends_of_both_sides_are_passed_on_at_once(
    ends: Ends, tmp_path: Path, front: str, back: str
) -> None:
    """Each by itself, the other direction goes on."""
    port = free_port()
    late = frame(TEXT, b"late")
    if back == "h1":
        received: list[bytes] = []

        def says_and_listens(connection: BackendConnection) -> None:
            connection.send(frame(TEXT, b"that is all", mask=False))
            connection.sock.shutdown(1)
            received.append(connection.rest())

        with (
            Backend(accepts(says_and_listens)) as backend,
            Gateway(tmp_path, ends.listener(front, port, backend.address)) as gateway,
            ends.link(front, port) as link,
        ):
            session = link.open()
            session.until(lambda: session.has_ended)
            assert bytes(session.raw) == frame(TEXT, b"that is all", mask=False)
            session.send_raw(late, end=True)
            eventually(lambda: received == [late], "it went on, and has ended")
            eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "the session is over")
            assert session.reset is None
    else:
        with (
            ends.sockets(back) as sockets,
            Gateway(tmp_path, ends.listener(front, port, sockets.address, back)) as gateway,
            ends.link(front, port) as link,
        ):
            session = link.open("/says")
            session.until(lambda: session.has_ended)
            session.send_raw(late, end=True)
            (stream,) = sockets.streams
            eventually(lambda: (stream.received, stream.has_ended) == (len(late), True), "it went on")
            eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "the session is over")


@clear_fronts
def test_an_end_that_comes_before_the_answer(ends: Ends, house: House, front: str) -> None:
    port = house.port
    received: list[bytes] = []
    with (
        Backend(accepts(lambda connection: received.append(connection.rest()))) as backend,
        house.gateway(ends.listener(front, port, backend.address)),
        ends.link(front, port) as link,
    ):
        session = link.ask()
        early = frame(TEXT, b"early")
        session.send_raw(early, end=True)
        session.until(lambda: session.has_ended)
        assert session.status == 200
        assert received == [early]
