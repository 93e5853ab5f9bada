"""Handshakes between protocols: keys and accept values made, checked and dropped; all else passes.

``memory`` stands for HTTP/2: a handshake without a key, an agreement without an accept value.
"""

import base64

import h11
import pytest
from websockets.frames import Opcode
from websockets.utils import accept_key

from expressgateway.proxy.errors import Reason
from expressgateway.proxy.handshake import Handshake
from expressgateway.wire.errors import NotOfferedError
from expressgateway.wire.head import WEBSOCKET, Field, RequestHead, ResponseHead, SharedFields
from tests.proxy.ends import ClientEnd
from tests.proxy.memory import MemoryWork
from tests.proxy.test_tunnel import frame
from tests.proxy.world import CELLS, World

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3 has the pair
KEYED = (b"Sec-WebSocket-Key", KEY)
VERSION = (b"Sec-WebSocket-Version", b"13")
OTHERS = (
    (b"Cookie", b"a=b"),
    (b"Origin", b"https://app.example"),
    (b"Authorization", b"Bearer x"),
    (b"Sec-WebSocket-Protocol", b"chat.v1, other"),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits"),
)
ANSWERED = (
    (b"Sec-WebSocket-Protocol", b"chat.v1"),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate"),
    (b"Set-Cookie", b"c=d"),
)

Cell = tuple[str, str]
cells = pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])


def asked(cell: Cell, *fields: Field) -> tuple[World, ClientEnd]:
    world = World(*cell)
    client = world.client()
    client.request(path=b"/ws?x=1", headers=(*fields, *OTHERS), upgrade=True)
    return world, client


def values(headers: list[Field], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


@cells
class TestTranslation:
    def test_keys(self, cell: Cell) -> None:
        """Untouched from HTTP/1.1 to HTTP/1.1; made for a client without one; dropped where none is sent."""
        world, _ = asked(cell, KEYED, VERSION)
        keys = values(world.work.headers, b"sec-websocket-key")
        if cell == ("h1", "h1"):
            assert keys == [KEY]
        elif cell[1] == "h1":
            (key,) = keys
            assert key != KEY, "a key that came over HTTP/2 means nothing (RFC 8441 5)"
            assert len(base64.b64decode(key, validate=True)) == 16
        else:
            assert keys == []
        assert world.work.method == b"GET"
        assert world.work.path == b"/ws?x=1"

    def test_accept_values(self, cell: Cell) -> None:
        world, client = asked(cell, KEYED, VERSION)
        assert client.interim == []
        world.work.accept()
        assert client.interim == [101]
        accepts = values(client.headers, b"sec-websocket-accept")
        assert accepts == ([ACCEPT] if cell[0] == "h1" else [])
        assert (world.counters.websockets, world.counters.websockets_open) == (1, 1)

    def test_all_else_passes(self, cell: Cell) -> None:
        world, client = asked(cell, KEYED, VERSION)
        for name, value in (*OTHERS, VERSION):
            assert values(world.work.headers, name.lower()) == [value], name
        accept = accept_key((world.work.header(b"sec-websocket-key") or b"").decode()).encode()
        own = ((b"Sec-WebSocket-Accept", accept),) if cell[1] == "h1" else ()
        world.work.accept(*((name.lower(), value) for name, value in (*own, *ANSWERED)))
        assert client.interim == [101]
        for name, value in ANSWERED:
            assert values(client.headers, name.lower()) == [value], name

    def test_every_key_is_another(self, cell: Cell) -> None:
        if cell != ("memory", "h1"):
            pytest.skip("it makes none")
        world = World(*cell)
        for _ in range(20):
            world.client().request(headers=OTHERS, upgrade=True)
        assert len({work.header(b"sec-websocket-key") for work in world.works}) == 20

    @pytest.mark.parametrize("early", [b"", b"early"])
    def test_an_end_that_comes_early_is_passed_on(self, cell: Cell, early: bytes) -> None:
        if cell[0] == "h1":
            pytest.skip("there it is a client that gave up")
        world, client = asked(cell)
        sent = frame(Opcode.TEXT, early, mask=True) if early else b""
        client.data(sent, True)
        assert not world.work.raw
        world.work.accept()
        assert world.work.raw == sent
        assert world.work.is_tunnel_ended
        world.work.half_close()
        world.check_quiet(1)


class TestVersions:
    def test_added_where_a_client_left_it_out(self) -> None:
        world, _ = asked(("memory", "h1"))
        assert values(world.work.headers, b"sec-websocket-version") == [b"13"]

    @pytest.mark.parametrize("cell", CELLS)
    def test_another_one_is_the_backends_to_refuse(self, cell: Cell) -> None:
        world, client = asked(cell, KEYED, (b"Sec-WebSocket-Version", b"8"))
        assert values(world.work.headers, b"sec-websocket-version") == [b"8"]
        world.work.reply(426, headers=[(b"Sec-WebSocket-Version", b"13")], end=True)
        assert client.status == 426
        assert values(client.headers, b"sec-websocket-version") == [b"13"]
        world.check_quiet(1)


class TestBadAgreements:
    @pytest.mark.parametrize(
        "fields",
        [
            ((b"X", b"y"),),
            ((b"Sec-WebSocket-Accept", b""),),
            ((b"Sec-WebSocket-Accept", ACCEPT),),
            ((b"Sec-WebSocket-Accept", b"x"), (b"Sec-WebSocket-Accept", b"x")),
        ],
        ids=["missing", "empty", "anothers", "two"],
    )
    def test_an_accept_value_that_is_wrong(self, fields: tuple[Field, ...]) -> None:
        world, client = asked(("memory", "h1"))
        world.work.accept(*fields)
        assert client.interim == [], "success was shown"
        assert client.status == 502
        assert b"http_upgrade_failed" in (client.header(b"proxy-status") or b"")
        assert b"Sec-WebSocket-Accept" in (client.header(b"proxy-status") or b"")
        assert world.work.is_cut
        assert world.counters.errors == {Reason.BACKEND_UPGRADE.value: 1}
        assert world.counters.websockets == 0
        world.check_quiet(1)

    def test_the_right_one_twice(self) -> None:
        world, client = asked(("memory", "h1"))
        key = (world.work.header(b"sec-websocket-key") or b"").decode()
        world.work.accept(*[(b"Sec-WebSocket-Accept", accept_key(key).encode())] * 2)
        assert (client.interim, client.status) == ([], 502)

    def test_between_two_ends_with_keys_it_is_the_clients_to_judge(self) -> None:
        world, client = asked(("h1", "h1"), KEYED)
        world.work.accept((b"Sec-WebSocket-Accept", b"x"))
        assert client.interim == [101]
        assert values(client.headers, b"sec-websocket-accept") == [b"x"]

    def test_an_accept_value_from_a_backend_that_was_sent_no_key(self) -> None:
        for front in ("h1", "memory"):
            world, client = asked((front, "memory"), KEYED)
            world.work.accept((b"sec-websocket-accept", b"nonsense"))
            assert client.interim == [101]
            assert values(client.headers, b"sec-websocket-accept") == ([ACCEPT] if front == "h1" else [])


class TestBadKeys:
    @pytest.mark.parametrize(
        "fields",
        [
            (VERSION,),
            ((b"Sec-WebSocket-Key", b"short"),),
            ((b"Sec-WebSocket-Key", b"x" * 24),),
            (KEYED, KEYED),
        ],
        ids=["missing", "short", "no base64", "two"],
    )
    def test_nobody_else_would_see_it(self, fields: tuple[Field, ...]) -> None:
        world = World("h1", "memory")
        client = world.h1_client()
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        client.is_upgrading = True
        client.h11.send(h11.Request(method=b"GET", target=b"/", headers=[(b"Host", b"a")]))
        client.send(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + lines + b"\r\n"
        )
        assert client.status == 400
        assert world.works == []
        assert world.counters.errors == {Reason.MALFORMED.value: 1}
        world.check_quiet(1)


class TestRefusals:
    @pytest.mark.parametrize("status", [200, 204, 299])
    def test_a_success_that_opens_no_tunnel_is_none(self, status: int) -> None:
        """Over HTTP/2 any 2xx would say that the tunnel is open."""
        world, client = asked(("memory", "h1"))
        world.work.reply(status, length=None if status == 204 else 2)
        if status != 204:
            world.work.data(b"no", True)
        assert client.status == 502
        assert b"status %d" % status in (client.header(b"proxy-status") or b"")
        assert world.counters.errors == {Reason.BACKEND_UPGRADE.value: 1}
        assert world.counters.websockets == 0
        world.check_quiet(1)

    @pytest.mark.parametrize("cell", [("h1", "h1"), ("h1", "memory")])
    def test_over_http_1_it_misleads_nobody(self, cell: Cell) -> None:
        world, client = asked(cell, KEYED)
        world.work.reply(200, length=2)
        world.work.data(b"no", True)
        assert (client.status, client.body) == (200, b"no")
        world.check_quiet(1)

    @pytest.mark.parametrize("front", ["h1", "memory"])
    def test_a_backend_without_extended_connect(self, front: str) -> None:
        world, client = asked((front, "memory"), KEYED)
        work = world.work
        assert isinstance(work, MemoryWork)
        waiter, work.waiter = work.waiter, None
        assert waiter is not None
        waiter.on_response_abort(NotOfferedError("the backend does not offer it"))
        world.settle()
        assert client.status == 502
        assert b'details="the backend does not offer it"' in (client.header(b"proxy-status") or b"")
        assert world.counters.errors == {Reason.BACKEND_UPGRADE.value: 1}
        world.check_quiet(1)

    def test_it_is_no_failure_of_the_backend(self) -> None:
        """Else whoever asks for a WebSocket could have a backend ejected that serves everyone else."""
        world, client = asked(("memory", "h1"))
        world.work.reply(200, end=True)
        assert client.status == 502
        (backend,) = world.pool.backends
        assert (backend.streak, backend.bad) == (0, 0)


class TestTheEndOfABackend:
    def test_gone_after_it_has_said_all(self) -> None:
        """Its reset behind the end of its side ends the session; nothing that it said is lost."""
        world, client = asked(("memory", "memory"))
        world.work.accept()
        world.work.data(frame(Opcode.TEXT, b"bye", mask=False))
        world.exchanges[0].on_response_data(b"", True)
        world.exchanges[0].on_response_abort(NotOfferedError("reset"))
        world.settle()
        assert client.raw.endswith(b"bye")
        assert not client.is_cut
        assert world.counters.errors == {}
        assert world.counters.websockets_open == 0
        world.check_quiet(1)


class TestHandshake:
    """The object by itself: what it is given stays as it was."""

    def test_the_request_is_not_changed(self) -> None:
        """It may be sent once more, to a backend of another protocol, and its fields are shared."""
        head = RequestHead(b"GET", b"https", b"a", b"/", ((b"x-request-id", b"1"),), WEBSOCKET, version=b"2")
        fields = ((b"sec-websocket-key", KEY), (b"origin", b"o"))
        head.shared = SharedFields(fields)
        sent = [Handshake(head, version).take_request() for version in (b"1.1", b"2", b"1.1")]
        assert head.shared.fields == fields
        assert head.headers == ((b"x-request-id", b"1"),)
        assert [each is not None and each.shared.fields for each in sent] == [((b"origin", b"o"),)] * 3
        assert sent[1] is not None
        assert sent[1].headers == head.headers

    def test_nothing_is_made_between_two_hops_of_http_1(self) -> None:
        head = RequestHead(b"GET", b"https", b"a", b"/", (), WEBSOCKET)
        handshake = Handshake(head, b"1.1")
        assert handshake.take_request() is head
        answer = ResponseHead(101, ((b"sec-websocket-accept", b"x"),))
        before = answer.headers
        assert handshake.take_answer(answer) == ""
        assert answer.headers is before
        assert handshake.fields == ()
