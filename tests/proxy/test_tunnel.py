"""WebSocket sessions through the exchange: the handshake, the bytes, the limits, and every way to end."""

import pytest
from websockets.frames import Close, Frame, Opcode

from expressgateway.proxy.errors import Reason
from tests.proxy.ends import ClientEnd
from tests.proxy.h1_ends import H1Work
from tests.proxy.world import CELLS, World

Cell = tuple[str, str]
cells = pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])

KEY = ((b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="), (b"Cookie", b"a=b"), (b"Origin", b"http://o"))


def frame(opcode: Opcode, payload: bytes = b"", *, mask: bool) -> bytes:
    return Frame(opcode, payload, True).serialize(mask=mask)


def closing(data: bytes, *, masked: bool) -> Close:
    """The one Close frame that these bytes are; ``masked``: as a client would send it."""
    assert data[0] == 0x88
    assert (data[1] & 0x80 != 0) is masked
    length = data[1] & 0x7F
    payload = data[2:]
    if masked:
        payload = bytes(byte ^ data[2 + at % 4] for at, byte in enumerate(data[6:]))
    assert len(payload) == length
    return Close.parse(payload)


def opened(cell: Cell) -> tuple[World, ClientEnd]:
    world = World(*cell)
    client = world.client()
    client.request(path=b"/ws", headers=KEY, upgrade=True)
    world.work.accept()
    assert client.interim == [101]
    return world, client


@cells
class TestHandshake:
    def test_forwarded_with_its_fields_and_decided_by_the_backend(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(path=b"/ws", headers=KEY, upgrade=True)
        work = world.work
        assert work.path == b"/ws"
        assert work.header(b"cookie") == b"a=b"
        assert work.header(b"origin") == b"http://o"
        if cell[1] == "h1":
            assert work.header(b"upgrade") == b"websocket"
            assert (work.header(b"connection") or b"").lower() == b"upgrade"
        assert client.interim == []
        assert world.counters.websockets == 0
        work.accept()
        assert client.interim == [101]
        assert (world.counters.websockets, world.counters.websockets_open) == (1, 1)

    @pytest.mark.parametrize("status", [302, 400, 426, 503])
    def test_declined(self, cell: Cell, status: int) -> None:
        world = World(*cell)
        client = world.client()
        client.request(headers=KEY, upgrade=True)
        world.work.reply(status, length=2)
        world.work.data(b"no", True)
        assert (client.status, client.body, client.is_complete) == (status, b"no", True)
        assert not client.is_cut
        assert world.counters.websockets == 0
        world.check_quiet(1)

    def test_nothing_reaches_the_backend_before_it_has_agreed(self, cell: Cell) -> None:
        """Bytes after the handshake may be a request in disguise: a backend that declines would answer it,
        and no rule of this gateway would have seen it."""
        world = World(*cell)
        client = world.client()
        client.request(headers=KEY, upgrade=True)
        smuggled = b"GET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n"
        client.data(smuggled)
        seen = world.work.raw + world.work.body
        if isinstance(world.work, H1Work):
            seen += world.work.connection.h11.trailing_data[0]
        assert b"smuggled" not in seen

    @pytest.mark.parametrize("interim", [False, True])
    def test_what_came_early_follows_once_it_has(self, cell: Cell, interim: bool) -> None:
        world = World(*cell)
        client = world.client()
        client.request(headers=KEY, upgrade=True)
        early = frame(Opcode.TEXT, b"early", mask=True)
        client.data(early)
        if interim:
            world.work.interim(103)
        world.work.accept()
        later = frame(Opcode.TEXT, b"later", mask=True)
        client.data(later)
        assert world.work.raw == early + later
        assert client.pauses[-1:] in ([], ["resume"])

    def test_without_the_block_it_is_plain_http(self, cell: Cell) -> None:
        if cell[0] != "h1":
            pytest.skip("extended CONNECT is not offered then")
        world = World(*cell, websocket=None)
        client = world.client()
        client.request(headers=KEY, upgrade=True)
        assert world.work.header(b"upgrade") is None
        assert world.work.is_complete
        world.work.ok()
        assert client.body == b"ok"
        world.check_quiet(1)


@cells
class TestRelay:
    def test_bytes_both_ways_untouched(self, cell: Cell) -> None:
        world, client = opened(cell)
        up = frame(Opcode.TEXT, b"hello", mask=True)
        down = frame(Opcode.BINARY, bytes(range(200)), mask=False)
        for at in range(len(up)):
            client.data(up[at : at + 1])
        world.work.data(down[:10])
        world.work.data(down[10:])
        assert world.work.raw == up
        assert client.raw == down
        client.vanish()
        world.check_quiet(1)

    @pytest.mark.parametrize("first", ["client", "backend"])
    def test_a_fin_is_passed_on_at_once(self, cell: Cell, first: str) -> None:
        world, client = opened(cell)
        if first == "client":
            client.half_close()
            assert world.work.is_tunnel_ended
            assert not world.exchanges[0].is_done
            world.work.data(frame(Opcode.TEXT, b"late", mask=False))
            assert client.raw.endswith(b"late")
            world.work.half_close()
        else:
            world.work.half_close()
            assert not world.exchanges[0].is_done
            client.data(frame(Opcode.TEXT, b"late", mask=True))
            assert len(world.work.raw) == 10
            client.half_close()
        assert world.statuses() == {"1xx": 1}
        world.check_quiet(1)
        assert world.counters.errors == {}

    def test_backpressure(self, cell: Cell) -> None:
        world, client = opened(cell)
        client.pauses.clear()
        world.work.block()
        assert client.pauses == ["pause"]
        world.work.drain()
        assert client.pauses == ["pause", "resume"]
        client.block()
        assert world.work.pauses[-1:] == ["pause"]
        client.drain()
        assert world.work.pauses[-1:] == ["resume"]

    def test_a_client_that_goes_away(self, cell: Cell) -> None:
        world, client = opened(cell)
        client.vanish()
        assert world.work.is_cut or world.work.is_tunnel_ended or cell[1] == "memory"
        assert world.counters.errors == {Reason.CLIENT_CLOSED.value: 1}
        world.check_quiet(1)

    def test_a_backend_that_is_reset(self, cell: Cell) -> None:
        if cell[1] == "h1":
            world, client = opened(cell)
            assert isinstance(world.work, H1Work)
            world.work.connection.codec.receive_reset()
            world.settle()
        else:
            world, client = opened(cell)
            world.work.vanish()
        assert client.is_cut
        world.check_quiet(1)


@cells
class TestLimits:
    def ended(self, world: World, client: ClientEnd, code: int, kind: str, before: bytes = b"") -> None:
        up = world.work.raw
        down = client.raw
        assert closing(down, masked=False).code == code
        assert up.startswith(before)
        assert closing(up[len(before) :], masked=True).code == code
        assert world.work.is_tunnel_ended
        assert client.is_closed
        assert world.counters.websocket_closed == {str(code): 1}
        # A session that is merely idle, or drained, is no attack.
        assert world.counters.security == ({} if code == 1001 else {kind: 1})
        world.check_quiet(1)

    def test_ping_flood(self, cell: Cell) -> None:
        world, client = opened(cell)
        ping = frame(Opcode.PING, b"", mask=True)
        for _ in range(5):
            client.data(ping)
        assert client.raw == b""
        sent = world.work.raw
        client.data(frame(Opcode.PING, b"", mask=True))
        self.ended(world, client, 1008, "websocket_ping_flood", before=world.work.raw[: len(sent) + 6])

    def test_pings_within_the_rate(self, cell: Cell) -> None:
        world, client = opened(cell)
        for _ in range(20):
            client.data(frame(Opcode.PING, b"", mask=True))
            world.advance(2.5)
        assert not world.exchanges[0].is_done

    def test_a_message_over_the_cap(self, cell: Cell) -> None:
        world, client = opened(cell)
        fine = frame(Opcode.TEXT, b"fine", mask=True)
        client.data(fine + frame(Opcode.BINARY, b"x" * 1001, mask=True))
        self.ended(world, client, 1009, "websocket_1009", before=fine)

    def test_a_message_over_the_cap_from_the_backend(self, cell: Cell) -> None:
        world, client = opened(cell)
        world.work.data(frame(Opcode.BINARY, b"x" * 1001, mask=False))
        self.ended(world, client, 1009, "websocket_1009")

    def test_idle_both_ways(self, cell: Cell) -> None:
        world, client = opened(cell)
        world.advance(50)
        world.work.data(frame(Opcode.PONG, b"", mask=False))
        client.raw = b""
        world.advance(55)
        assert not world.exchanges[0].is_done
        world.advance(10)
        self.ended(world, client, 1001, "websocket_idle")

    def test_a_frame_that_does_not_end(self, cell: Cell) -> None:
        world, client = opened(cell)
        client.data(frame(Opcode.TEXT, b"hello", mask=True)[:-1])
        world.advance(31)
        assert closing(client.raw, masked=False).code == 1008
        assert not world.work.raw.endswith(b"\x88"), "a Close frame inside another frame"
        assert len(world.work.raw) == 10
        assert world.counters.websocket_closed == {"1008": 1}
        assert world.counters.security == {"websocket_frame_stall": 1}
        world.check_quiet(1)

    def test_who_is_paused_does_not_stall(self, cell: Cell) -> None:
        world, client = opened(cell)
        client.data(frame(Opcode.TEXT, b"hello", mask=True)[:-1])
        world.work.block()
        world.advance(50)
        assert not world.exchanges[0].is_done

    def test_the_drains_end_is_told(self, cell: Cell) -> None:
        world, client = opened(cell)
        world.exchanges[0].go_away()
        world.settle()
        assert closing(client.raw, masked=False).code == 1001
        assert closing(world.work.raw, masked=True).code == 1001
        world.check_quiet(1)

    def test_http_deadlines_do_not_hold_for_a_tunnel(self, cell: Cell) -> None:
        world, client = opened(cell)
        for _ in range(10):
            world.advance(40)
            client.data(frame(Opcode.PONG, b"", mask=True))
        assert not world.exchanges[0].is_done

    def test_the_body_cap_does_not_hold_for_a_tunnel(self, cell: Cell) -> None:
        world, client = opened(cell)
        world.service.max_body_bytes = 100
        for _ in range(10):
            client.data(frame(Opcode.BINARY, b"x" * 100, mask=True))
        assert not world.exchanges[0].is_done
        assert len(world.work.raw) == 1060


@cells
class TestHearingOut:
    """A client that breaks the protocol still has the backend's answers to what it sent before that."""

    FINE = frame(Opcode.TEXT, b"fine", mask=True)
    ANSWER = frame(Opcode.TEXT, b"answer", mask=False)
    CLOSE = frame(Opcode.CLOSE, Close(1000, "as you wish").serialize(), mask=False)

    def broken(self, cell: Cell, said: bytes = b"") -> tuple[World, ClientEnd]:
        """A session whose client has sent a message and a frame of a reserved opcode in one."""
        world, client = opened(cell)
        if said:
            world.work.data(said)
        client.data(self.FINE + b"\x83\x80mask")
        assert world.work.raw.startswith(self.FINE)
        assert closing(world.work.raw[len(self.FINE) :], masked=True).code == 1002
        assert client.raw == said, "the client is not told yet"
        assert not client.is_closed
        return world, client

    def check(self, world: World, client: ClientEnd, before: bytes) -> None:
        assert client.raw.startswith(before)
        assert closing(client.raw[len(before) :], masked=False).code == 1002
        assert client.is_closed
        assert world.counters.websocket_closed == {"1002": 1}
        assert world.counters.security == {"websocket_1002": 1}
        assert world.counters.errors == {}
        world.check_quiet(1)

    def test_up_to_the_backends_close(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER)
        assert client.raw == self.ANSWER
        world.work.data(self.ANSWER + self.CLOSE)
        self.check(world, client, self.ANSWER * 2)

    @pytest.mark.parametrize("size", range(1, len(CLOSE)))
    def test_a_close_in_two_parts(self, cell: Cell, size: int) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER + self.CLOSE[:size])
        assert client.raw.startswith(self.ANSWER)
        if not world.exchanges[0].is_done:
            assert client.raw == self.ANSWER
            world.work.data(self.CLOSE[size:])
        self.check(world, client, self.ANSWER)

    def test_byte_by_byte(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        for at in range(len(self.ANSWER)):
            world.work.data(self.ANSWER[at : at + 1])
        world.work.data(self.CLOSE[:1])
        assert client.raw == self.ANSWER
        world.work.data(self.CLOSE[1:])
        self.check(world, client, self.ANSWER)

    def test_a_frame_that_was_begun_before(self, cell: Cell) -> None:
        world, client = self.broken(cell, self.ANSWER[:5])
        world.work.data(self.ANSWER[5:] + self.CLOSE)
        self.check(world, client, self.ANSWER)

    def test_not_for_long(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER)
        world.advance(2)
        self.check(world, client, self.ANSWER)

    def test_never_a_close_frame_inside_another(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER[:-1])
        world.advance(2)
        assert client.raw == self.ANSWER[:-1]
        assert client.is_closed
        world.check_quiet(1)

    def test_a_backend_that_just_ends(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER)
        world.work.half_close()
        self.check(world, client, self.ANSWER)

    def test_a_backend_that_is_reset(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER)
        if isinstance(world.work, H1Work):
            world.work.connection.codec.receive_reset()
            world.settle()
        else:
            world.work.vanish()
        self.check(world, client, self.ANSWER)

    def test_a_backend_that_breaks_the_protocol_too(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.work.data(self.ANSWER + b"\x83\x00")
        self.check(world, client, self.ANSWER)

    def test_what_the_client_sends_meanwhile_is_dropped(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        told = world.work.raw
        client.data(self.FINE)
        client.half_close()
        assert world.work.raw == told
        world.work.data(self.ANSWER + self.CLOSE)
        self.check(world, client, self.ANSWER)

    def test_a_client_that_goes_away_meanwhile(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        client.vanish()
        world.check_quiet(1)

    def test_a_drain_meanwhile(self, cell: Cell) -> None:
        world, client = self.broken(cell)
        world.exchanges[0].go_away()
        world.settle()
        self.check(world, client, b"")

    def test_not_where_the_backend_cannot_be_told(self, cell: Cell) -> None:
        """It stands in a header, of which the second byte breaks the protocol."""
        world, client = opened(cell)
        client.data(b"\x81")
        client.data(b"\x05hello")
        assert closing(client.raw, masked=False).code == 1002
        assert world.work.raw == b"\x81"
        world.check_quiet(1)

    def test_not_where_the_client_stands_in_a_header(self, cell: Cell) -> None:
        world, client = opened(cell)
        world.work.data(self.ANSWER[:1])
        client.data(b"\x83\x80mask")
        assert client.raw == self.ANSWER[:1]
        assert client.is_closed
        world.check_quiet(1)


def test_a_service_without_websocket_that_meets_an_upgrade() -> None:
    """A reload took the block away while this connection was open: an answer, never a silent hang."""
    world = World()
    client = world.client()
    world.service.websocket = None
    client.request(headers=KEY, upgrade=True)
    if world.side.works and not client.status:
        world.work.accept()
    assert client.status or client.is_cut or client.interim, "the client waits for ever"


@cells
def test_the_limit_that_ends_a_session_is_noted(cell: Cell) -> None:
    """For the access log: what was too large, and what was silent for too long."""
    world, client = opened(cell)
    client.data(frame(Opcode.TEXT, b"x" * 1001, mask=True))
    client.vanish()
    world.advance(1)
    assert world.exchanges[0].flags == ["websocket_1009"]
    world, _ = opened(cell)
    world.advance(62)
    assert world.exchanges[0].is_done
    assert world.exchanges[0].flags == ["websocket_idle"]
