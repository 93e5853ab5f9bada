"""Every pair of protocols: what goes in on one side comes out on the other, and nothing else."""

import pytest

from expressgateway.proxy.errors import Reason
from tests.proxy.world import CELLS, World

pytestmark = pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell) for cell in CELLS])

Cell = tuple[str, str]
BIG = bytes(range(256)) * 8192  # 2 MiB


class TestBodies:
    def test_a_request_and_its_answer(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"GET", b"/a?b=c", headers=((b"X-A", b"1"), (b"Cookie", b"c=d"), (b"X-A", b"2")))
        work = world.work
        assert (work.method, work.path, work.host) == (b"GET", b"/a?b=c", b"a.example")
        assert [value for name, value in work.headers if name == b"x-a"] == [b"1", b"2"]
        assert work.header(b"cookie") == b"c=d"
        assert work.is_complete
        work.reply(200, headers=[(b"Set-Cookie", b"a"), (b"Set-Cookie", b"b"), (b"Server", b"s")], length=2)
        work.data(b"ok", True)
        assert (client.status, client.body, client.is_complete) == (200, b"ok", True)
        assert [value for name, value in client.headers if name == b"set-cookie"] == [b"a", b"b"]
        assert client.header(b"server") == b"s"
        assert not client.is_cut
        world.check_quiet(1)
        assert world.statuses() == {"2xx": 1}
        assert world.counters.errors == {}
        assert world.side.backend.responses == [0, 0, 1, 0, 0, 0]

    @pytest.mark.parametrize("length", [True, False])
    def test_bodies_both_ways_are_identical(self, cell: Cell, length: bool) -> None:
        world = World(*cell, max_body=0)
        client = world.client()
        client.request(b"POST", b"/", length=len(BIG) if length else None, end=False)
        for at in range(0, len(BIG), 65536):
            client.data(BIG[at : at + 65536])
        client.finish()
        work = world.work
        assert work.body == BIG
        assert work.is_complete
        work.reply(200, length=len(BIG) if length else None)
        for at in range(0, len(BIG), 100_000):
            work.data(BIG[at : at + 100_000])
        work.finish()
        assert client.body == BIG
        assert client.is_complete
        world.check_quiet(1)
        assert world.counters.request_bytes == world.counters.response_bytes == len(BIG)

    def test_full_duplex(self, cell: Cell) -> None:
        """A response may begin before the request has ended, and each side's bytes pass at once."""
        world = World(*cell)
        client = world.client()
        client.request(b"POST", b"/", end=False)
        world.work.reply(200)
        for number in range(5):
            client.data(b"%d" % number)
            assert world.work.body[-1:] == b"%d" % number
            world.work.data(b"%d" % number)
            assert client.body[-1:] == b"%d" % number
        client.finish()
        assert world.work.is_complete
        assert world.recorded == 0
        world.work.finish()
        assert client.is_complete
        world.check_quiet(1)

    def test_trailers_both_ways(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"POST", b"/", headers=((b"TE", b"trailers"),), end=False)
        client.data(b"a")
        client.finish((b"x-sum", b"1"), (b"x-sum", b"2"))
        assert world.work.trailers == [(b"x-sum", b"1"), (b"x-sum", b"2")]
        assert world.work.is_complete
        world.work.reply(200)
        world.work.data(b"b")
        world.work.finish((b"grpc-status", b"0"))
        assert client.trailers == [(b"grpc-status", b"0")]
        assert client.is_complete
        world.check_quiet(1)

    @pytest.mark.parametrize("status", [200, 204, 304, 404, 500, 599])
    def test_an_answer_without_a_body(self, cell: Cell, status: int) -> None:
        world = World(*cell)
        client = world.client()
        client.request()
        world.work.reply(status, end=True)
        assert (client.status, client.body, client.is_complete) == (status, b"", True)
        world.check_quiet(1)

    def test_head(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"HEAD")
        world.work.reply(200, length=1234)
        assert client.header(b"content-length") == b"1234"
        assert client.body == b""
        assert client.is_complete
        world.check_quiet(1)

    def test_options_star(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"OPTIONS", b"*")
        assert world.work.path == b"*"
        world.work.ok()
        world.check_quiet(1)

    def test_interim_answers_pass(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"POST", b"/", headers=((b"Expect", b"100-continue"),), length=2, end=False)
        assert world.work.header(b"expect") == b"100-continue"
        world.work.interim(100)
        world.work.interim(103, [(b"link", b"</a>")])
        assert client.interim == [100, 103]
        client.data(b"ab", True)
        world.work.ok()
        assert client.status == 200
        world.check_quiet(1)

    def test_connections_are_reused(self, cell: Cell) -> None:
        world = World(*cell)
        for _ in range(5):
            client = world.client()
            client.request()
            world.work.ok()
            assert client.is_complete
        assert world.side.dials == 1
        world.check_quiet(5)

    def test_path_and_authority_byte_for_byte(self, cell: Cell) -> None:
        world = World(*cell)
        world.client().request(path=b"/a/%2e/b//c/..%2F?d=/../e&f=%zz", host=b"b.example:8080")
        assert world.work.path == b"/a/%2e/b//c/..%2F?d=/../e&f=%zz"
        assert world.work.host == b"b.example:8080"


class TestTruncation:
    """An upload cut short never completes upstream; a response cut short never looks complete."""

    @pytest.mark.parametrize("length", [10, None])
    @pytest.mark.parametrize("sent", [b"", b"hello"])
    def test_of_an_upload(self, cell: Cell, length: int | None, sent: bytes) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"POST", b"/", length=length, end=False)
        if sent:
            client.data(sent)
        client.vanish()
        assert world.work.is_cut
        assert not world.work.is_complete
        assert not client.is_complete
        assert world.counters.errors == {Reason.CLIENT_CLOSED.value: 1}
        assert world.statuses() == {"4xx": 1}
        world.check_quiet(1)

    @pytest.mark.parametrize("length", [10, None])
    @pytest.mark.parametrize("sent", [b"", b"hello"])
    def test_of_a_response(self, cell: Cell, length: int | None, sent: bytes) -> None:
        world = World(*cell)
        client = world.client()
        client.request()
        world.work.reply(200, length=length)
        if sent:
            world.work.data(sent)
        world.work.vanish()
        assert client.status == 200
        assert client.body == sent
        assert not client.is_complete
        assert client.is_cut
        assert world.counters.errors == {Reason.BACKEND_TRUNCATED.value: 1}
        assert world.side.backend.responses[0] == 1
        world.check_quiet(1)

    def test_a_client_that_leaves_reaches_the_backend(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request()
        world.work.reply(200)
        world.work.data(b"x")
        client.vanish()
        if cell[1] == "h1":
            assert world.work.is_cut
        world.work.data(b"y")
        assert client.body in (b"x", b"")
        assert not client.is_complete
        world.check_quiet(1)

    def test_a_client_that_leaves_while_we_connect(self, cell: Cell) -> None:
        world = World(*cell)
        world.side.connects = False
        client = world.client()
        client.request()
        client.vanish()
        assert world.side.cancelled == 1
        world.side.connects = True
        world.side.connect()
        assert world.side.works == []
        world.check_quiet(1)

    def test_an_answer_before_the_end_of_the_upload(self, cell: Cell) -> None:
        """The backend has said all it will: it never sees a whole request, the client a whole answer."""
        world = World(*cell)
        client = world.client()
        client.request(b"POST", b"/", length=10, end=False)
        client.data(b"hello")
        world.work.reply(403, length=2)
        world.work.data(b"no", True)
        assert (client.status, client.body, client.is_complete) == (403, b"no", True)
        assert not client.is_cut
        assert world.work.is_cut
        assert not world.work.is_complete
        world.check_quiet(1)
        again = world.client()
        again.request()
        world.work.ok()
        assert again.is_complete
        world.check_quiet(2)


class TestBackpressure:
    """A full buffer on one side stops the sender on the other, once, and lets it go on, once."""

    def test_a_client_that_does_not_read(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request()
        world.work.reply(200)
        client.block()
        assert world.work.pauses == ["pause"]
        world.work.data(b"in flight")
        assert world.work.pauses == ["pause"]
        client.drain()
        assert world.work.pauses == ["pause", "resume"]
        client.drain()
        assert world.work.pauses == ["pause", "resume"]
        world.work.finish()
        assert client.body == b"in flight"
        world.check_quiet(1)

    def test_a_backend_that_does_not_read(self, cell: Cell) -> None:
        world = World(*cell)
        client = world.client()
        client.request(b"POST", b"/", end=False)
        client.pauses.clear()
        world.work.block()
        world.work.block()
        assert client.pauses == ["pause"]
        client.data(b"in flight")
        world.work.drain()
        world.work.drain()
        assert client.pauses == ["pause", "resume"]
        client.finish()
        assert world.work.body == b"in flight"
        world.work.ok()
        world.check_quiet(1)

    def test_an_upload_waits_for_its_connection(self, cell: Cell) -> None:
        """One read is held; then the client is paused until there is a backend."""
        world = World(*cell)
        world.side.connects = False
        client = world.client()
        client.request(b"POST", b"/", end=False)
        assert client.pauses == []
        client.data(b"a")
        client.data(b"b")
        assert client.pauses == ["pause"]
        world.side.connect()
        world.settle()
        assert client.pauses == ["pause", "resume"]
        assert world.work.body == b"ab"
        client.data(b"c", True)
        assert world.work.body == b"abc"
        assert world.work.is_complete
        world.work.ok()
        world.check_quiet(1)

    def test_a_client_that_was_full_before_there_was_a_backend(self, cell: Cell) -> None:
        """The answers before this one may fill the client's buffer: the new backend must not add to it."""
        world = World(*cell)
        world.side.connects = False
        client = world.client()
        client.request()
        client.block()
        world.side.connect()
        world.settle()
        world.work.reply(200)
        assert world.work.pauses == ["pause"], "nothing bounds this answer"
        client.drain()
        assert world.work.pauses == ["pause", "resume"]
        world.work.finish()
        world.check_quiet(1)


class TestManyAtOnce:
    def test_streams_do_not_touch_each_other(self, cell: Cell) -> None:
        world = World(*cell)
        clients = [world.client() for _ in range(8)]
        for at, client in enumerate(clients):
            client.request(b"POST", b"/%d" % at, end=False)
            client.data(b"a%d" % at)
        works = {work.path: work for work in world.side.works}
        assert len(works) == 8
        assert world.side.backend.in_flight == 8
        clients[1].vanish()
        works[b"/2"].vanish()
        assert (clients[2].status, clients[2].is_complete) == (502, True)
        for at in (0, 3, 4, 5, 6, 7):
            clients[at].data(b"b%d" % at, True)
            assert works[b"/%d" % at].body == b"a%db%d" % (at, at)
            works[b"/%d" % at].ok(b"%d" % at)
            assert clients[at].body == b"%d" % at
            assert clients[at].is_complete
        world.check_quiet(8)

    def test_a_memory_connection_is_shared(self, cell: Cell) -> None:
        world = World(*cell)
        world.client().request()
        for _ in range(3):
            world.client().request()
        assert world.side.dials == (1 if cell[1] == "memory" else 4)
        for work in world.side.works:
            work.ok()
        world.check_quiet(4)
