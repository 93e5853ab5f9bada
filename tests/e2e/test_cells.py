"""What holds in every cell, front by back: one suite for all versions, in clear text and over TLS.

Nothing here knows a version, but for what only a multiplexed one can show: see ``cells`` and ``talks``.
"""

import hashlib
import queue
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cells import (
    CAP_BYTES,
    CELLS,
    VERSIONS,
    Caller,
    Cell,
    Place,
    begin,
    call,
    is_quiet,
    place_of_cells,
)
from tests.e2e.harness import PATIENCE_S, eventually, need, run
from tests.e2e.http_world import rss_bytes
from tests.e2e.talks import CutError, Fields, Talk, answer, rest

ONCE = [cell for cell in CELLS if not cell.is_tls or (cell.front, cell.back, False) not in CELLS]
"""Each pair of versions once, in clear where that is possible."""
LARGE = random.Random(4).randbytes(3_000_000)
ECHO_BYTES = 200_000
"""So much of an echo may be on its way: less than any window holds."""
HELD_BYTES = 4_000_000
"""What the gateway may hold of a stalled body: the largest window, and what is on its way."""

each_cell = pytest.mark.parametrize("cell", CELLS, ids=str)
each_pair = pytest.mark.parametrize("cell", ONCE, ids=str)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place_of_cells(tmp_path_factory.mktemp("cells")) as place:
        yield place


@pytest.fixture
def caller(place: Place, cell: Cell) -> Iterator[Caller]:
    caller = place.dial(cell)
    yield caller
    caller.close()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of the suite ends with all gauges at zero."""
    place: Place | None = request.getfixturevalue("place") if "place" in request.fixturenames else None
    yield
    if place is not None:
        eventually(lambda: is_quiet(place.gateway), "nothing is under way")


class TestBodies:
    @each_cell
    @pytest.mark.parametrize("body", [b"", b"x", LARGE], ids=["empty", "byte", "large"])
    @pytest.mark.parametrize("kind", ["length", "open"])
    def test_arrive_both_ways_as_they_were_sent(
        self, place: Place, caller: Caller, cell: Cell, body: bytes, kind: str
    ) -> None:
        """Through an echo that answers piece by piece, so that both directions flow at a time."""

        def echo(talk: Talk) -> None:
            length = talk.headers.get("content-length")
            talk.send_head([(":status", "200"), *([("content-length", length)] if length else [])])
            while piece := talk.read():
                talk.send(piece)
            talk.finish()

        def store(talk: Talk) -> None:
            kept.put(rest(talk))
            answer(talk, body)

        kept: queue.Queue[bytes] = queue.Queue()
        for handler in (echo, store):
            path = place.on(handler)
            # A body of no bytes that is declared ends with its head: what came behind it would be too late.
            is_whole = kind == "length" and not body
            talk = begin(caller, path, length=len(body) if kind == "length" else None, end=is_whole)
            got = b""
            for at in range(0, len(body), 50_000):
                talk.send(body[at : at + 50_000], end=at + 50_000 >= len(body))
                if handler is echo:
                    if not talk.headers:
                        talk.read_head()
                    got += talk.read()
                    while len(got) < at - ECHO_BYTES:  # else both sides may come to wait for each other
                        got += talk.read()
            if not body and not is_whole:
                talk.finish()
            if not talk.headers:
                talk.read_head()
            got += rest(talk)
            assert talk.headers[":status"] == "200"
            assert hashlib.sha256(got).digest() == hashlib.sha256(body).digest()
        assert kept.get(timeout=PATIENCE_S) == body


class TestFields:
    @each_cell
    def test_headers_go_both_ways(self, place: Place, caller: Caller, cell: Cell) -> None:
        def script(talk: Talk) -> None:
            seen.put(talk.headers)
            answer(talk, b"", ("x-answer", "a, b;c"), ("set-cookie", "a=1"), ("x-empty", ""))

        seen: queue.Queue[dict[str, str]] = queue.Queue()
        path = place.on(script)
        talk = call(caller, path, ("x-asked", "one two"), ("cookie", "k=v; l=w"), ("accept", "*/*"))
        got = talk.read_head()
        asked = seen.get(timeout=PATIENCE_S)
        assert (asked[":method"], asked[":path"]) == ("GET", path)
        assert (asked.get(":authority") or asked["host"]) == "cells.example"
        assert {name: asked[name] for name in ("x-asked", "cookie", "accept")} == {
            "x-asked": "one two",
            "cookie": "k=v; l=w",
            "accept": "*/*",
        }
        assert (got["x-answer"], got["set-cookie"], got["x-empty"]) == ("a, b;c", "a=1", "")
        assert rest(talk) == b""

    @each_cell
    def test_trailers_go_both_ways(self, place: Place, caller: Caller, cell: Cell) -> None:
        def script(talk: Talk) -> None:
            body = rest(talk)
            seen.put((body, talk.trailers))
            talk.send_head([(":status", "200"), ("trailer", "x-sum")])
            talk.send(body)
            talk.finish([("x-sum", "42"), ("x-more", "a, b")])

        seen: queue.Queue[tuple[bytes, Fields]] = queue.Queue()
        talk = begin(caller, place.on(script), ("te", "trailers"), ("trailer", "x-req"))
        talk.send(b"hello")
        talk.finish([("x-req", "7")])
        assert talk.read_head()[":status"] == "200"
        assert rest(talk) == b"hello"
        assert talk.trailers == [("x-sum", "42"), ("x-more", "a, b")]
        assert seen.get(timeout=PATIENCE_S) == (b"hello", [("x-req", "7")])


class TestStalledPeers:
    """A peer that takes nothing stops the sender, and the gateway holds no more than a window."""

    @each_cell
    def test_a_backend_that_does_not_read(self, place: Place, caller: Caller, cell: Cell) -> None:
        def script(talk: Talk) -> None:
            go_on.get(timeout=PATIENCE_S)
            answer(talk, str(sum(map(len, iter(talk.read, b"")))).encode())

        go_on: queue.Queue[None] = queue.Queue()
        total = VERSIONS[cell.front].stall_bytes
        (pid,) = place.gateway.worker_pids()
        before = rss_bytes(pid)
        talk = begin(caller, place.on(script), length=total)
        taken = talk.offer(total)
        assert 0 < taken < total
        assert rss_bytes(pid) - before < HELD_BYTES
        go_on.put(None)
        talk.send(bytes(total - taken), end=True)
        assert talk.read_head()[":status"] == "200"
        assert rest(talk) == str(total).encode()

    @each_cell
    def test_a_client_that_does_not_read(self, place: Place, caller: Caller, cell: Cell) -> None:
        def script(talk: Talk) -> None:
            talk.send_head([(":status", "200"), ("content-length", str(total))])
            taken = talk.offer(total)
            stuck.put(taken)
            talk.send(bytes(total - taken), end=True)

        stuck: queue.Queue[int] = queue.Queue()
        total = VERSIONS[cell.back].stall_bytes
        (pid,) = place.gateway.worker_pids()
        before = rss_bytes(pid)
        talk = call(caller, place.on(script))
        assert 0 < stuck.get(timeout=PATIENCE_S) < total
        assert rss_bytes(pid) - before < HELD_BYTES
        assert talk.read_head()[":status"] == "200"
        assert sum(map(len, iter(talk.read, b""))) == total

    @each_pair
    def test_one_stalled_exchange_does_not_stop_the_others(
        self, place: Place, caller: Caller, cell: Cell
    ) -> None:
        """On the same connections where there is one for many."""

        def stall(talk: Talk) -> None:
            talk.send_head([(":status", "200"), ("content-length", str(total))])
            talk.offer(total, quiet_s=0.2)
            stuck.put(None)
            talk.until_lost()

        stuck: queue.Queue[None] = queue.Queue()
        total = VERSIONS[cell.back].stall_bytes
        stalled = call(caller, place.on(stall))
        stuck.get(timeout=PATIENCE_S)
        path = place.on(lambda talk: answer(talk, LARGE[:300_000]))
        other = caller if VERSIONS[cell.front].is_multiplexed else place.dial(cell)
        for _ in range(5):
            talk = call(other, path)
            assert talk.read_head()[":status"] == "200"
            assert rest(talk) == LARGE[:300_000]
        stalled.cut()
        other.close()


class TestWhatIsCutShort:
    @each_cell
    @pytest.mark.parametrize("kind", ["length", "open"])
    def test_an_upload_never_completes(self, place: Place, caller: Caller, cell: Cell, kind: str) -> None:
        def script(talk: Talk) -> None:
            began.put(talk.read())
            try:
                rest(talk)
            except CutError:
                outcome.put("cut")
            else:
                outcome.put("complete")

        began: queue.Queue[bytes] = queue.Queue()
        outcome: queue.Queue[str] = queue.Queue()
        talk = begin(caller, place.on(script), length=1000 if kind == "length" else None)
        talk.send(b"half")
        began.get(timeout=PATIENCE_S)
        talk.cut()
        assert outcome.get(timeout=PATIENCE_S) == "cut"

    @each_cell
    @pytest.mark.parametrize("kind", ["length", "open"])
    def test_a_response_never_looks_complete(
        self, place: Place, caller: Caller, cell: Cell, kind: str
    ) -> None:
        def script(talk: Talk) -> None:
            length = [("content-length", "1000")] if kind == "length" else []
            talk.send_head([(":status", "200"), *length])
            talk.send(b"half")
            heard.get(timeout=PATIENCE_S)
            talk.cut()

        heard: queue.Queue[None] = queue.Queue()
        talk = call(caller, place.on(script))
        assert talk.read_head()[":status"] == "200"
        assert talk.read() == b"half"
        heard.put(None)
        with pytest.raises(CutError):
            rest(talk)
        good = place.on(lambda talk: answer(talk, b"good"))
        other = caller if VERSIONS[cell.front].is_multiplexed else place.dial(cell)
        assert_good(other, good)
        other.close()

    @each_cell
    @pytest.mark.parametrize("when", ["before the answer", "in the answer"])
    def test_a_client_that_leaves_is_seen_by_the_backend(
        self, place: Place, caller: Caller, cell: Cell, when: str
    ) -> None:
        def script(talk: Talk) -> None:
            if when == "in the answer":
                talk.send_head([(":status", "200")])
                talk.send(b"begin")
            began.put(None)
            talk.until_lost()
            left.put(None)

        began: queue.Queue[None] = queue.Queue()
        left: queue.Queue[None] = queue.Queue()
        talk = call(caller, place.on(script))
        began.get(timeout=PATIENCE_S)
        if when == "in the answer":
            talk.read_head()
        talk.cut()
        left.get(timeout=2)
        if VERSIONS[cell.front].is_multiplexed:
            assert_good(caller, place.on(lambda talk: answer(talk, b"good")))


def assert_good(caller: Caller, path: str) -> None:
    talk = call(caller, path)
    assert talk.read_head()[":status"] == "200"
    assert rest(talk) == b"good"


class TestAnswersOfTheGateway:
    @each_cell
    @pytest.mark.parametrize("kind", ["declared", "counted"])
    def test_a_body_over_the_cap(self, place: Place, cell: Cell, kind: str) -> None:
        def script(talk: Talk) -> None:
            try:
                rest(talk)
            except CutError:
                return
            completed.append(talk)

        completed: list[Talk] = []
        caller = place.dial(cell, "capped")
        declared = CAP_BYTES + 1 if kind == "declared" else None
        talk = begin(caller, place.on(script), length=declared)
        if kind == "counted":
            try:
                talk.send(bytes(CAP_BYTES))
                talk.send(b"!")
            except CutError:
                pass  # the gateway may have had enough by then; its answer was sent before
        assert talk.read_head()[":status"] == "413"
        caller.close()
        eventually(lambda: is_quiet(place.gateway), "nothing is under way")
        assert not completed

    @each_cell
    def test_the_cap_itself_passes(self, place: Place, cell: Cell) -> None:
        caller = place.dial(cell, "capped")
        path = place.on(lambda talk: answer(talk, str(len(rest(talk))).encode()))
        talk = call(caller, path, body=bytes(CAP_BYTES))
        assert talk.read_head()[":status"] == "200"
        assert rest(talk) == str(CAP_BYTES).encode()
        caller.close()

    @each_cell
    def test_a_backend_that_fails(self, place: Place, caller: Caller, cell: Cell) -> None:
        for kind in ("plain", "dead"):
            other = place.dial(cell, kind)
            try:
                talk = call(other, place.on(lambda talk: talk.cut()))
                assert talk.read_head()[":status"] == "502"
                rest(talk)
            finally:
                other.close()
        assert_good(caller, place.on(lambda talk: answer(talk, b"good")))


class TestReuse:
    @each_cell
    def test_one_connection_on_either_side_serves_many(
        self, place: Place, caller: Caller, cell: Cell
    ) -> None:
        def script(talk: Talk) -> None:
            used.append(talk.connection)
            rest(talk)
            answer(talk, b"good")

        used: list[int] = []
        path = place.on(script)
        accepted = place.gateway.metric("connections_total")
        for number in range(20):
            talk = call(caller, path, body=b"hello" if number % 2 else None)
            assert talk.read_head()[":status"] == "200"
            assert rest(talk) == b"good"
        assert len(used) == 20
        assert len(set(used)) == 1
        assert place.gateway.metric("connections_total") <= accepted + 1


@need("curl")
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.front != "h3"], ids=str)
def test_curl_gets_back_what_it_sent(place: Place, cell: Cell, tmp_path: Path) -> None:
    path = place.on(lambda talk: answer(talk, rest(talk)))
    (tmp_path / "sent").write_bytes(LARGE)
    spoken = {"h1": "--http1.1", "h2": "--http2" if cell.is_tls else "--http2-prior-knowledge"}[cell.front]
    scheme = "https" if cell.is_tls else "http"
    trust = ["--cacert", str(place.files.certificate)]
    told = run(
        *("curl", "-sS", "-m", "20", spoken, *trust, "-H", "Expect:"),
        *(
            "--data-binary",
            f"@{tmp_path}/sent",
            "-o",
            f"{tmp_path}/got",
            "-w",
            "%{http_version} %{http_code}",
        ),
        f"{scheme}://localhost:{place.ports[cell.back, cell.is_tls, 'plain']}{path}",
    )
    assert told == f"{'1.1' if cell.front == 'h1' else '2'} 200"
    assert (tmp_path / "got").read_bytes() == LARGE
