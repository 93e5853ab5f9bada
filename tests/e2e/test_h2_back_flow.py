"""HTTP/2 to backends on a running gateway: large bodies, backpressure, ends of life, fields end to end."""

import contextlib
import hashlib
import threading
import time

from tests.e2e.h2_backends import (
    H2There,
    Request,
    answer_h2,
    backend_table,
    config,
    name_of,
    world,
)
from tests.e2e.h2_raw import request
from tests.e2e.harness import Backend, BackendConnection, Client, House, eventually, resident_kib

MB = 1_000_000


class TestFlow:
    def test_a_hundred_megabytes_each_way(self, house: House) -> None:
        digest = hashlib.sha256(bytes(MB) * 100).digest()
        got: list[bytes] = []

        def script(connection: BackendConnection) -> None:
            there = H2There(connection, initial_window_size=2**20)
            there.h2.increment_flow_control_window(2**24)
            there.flush()
            uploaded = there.wait(1)[0]
            got.append(hashlib.sha256(uploaded.body).digest())
            uploaded.body.clear()
            there.answer(uploaded.stream, bytes(MB) * 100)
            there.serve(name_of(connection))

        free = "max_request_body_bytes = 0"
        with Backend(script) as backend, world(house, backend_table(backend.address), http=free) as at:
            with Client(at.port) as client:
                client.send(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (100 * MB))
                part = bytes(MB)
                for _ in range(100):
                    client.send(part)
                head = client.until(b"\r\n\r\n")
                assert b" 200 " in head.split(b"\r\n")[0]
                found, left = hashlib.sha256(client.buffer), 100 * MB - len(client.buffer)
                while left:
                    data = client.sock.recv(MB)
                    assert data
                    found.update(data)
                    left -= len(data)
            assert got == [digest]
            assert found.digest() == digest
            at.is_quiet()

    def test_a_client_that_does_not_read_stalls_its_backend(self, house: House) -> None:
        """Within the windows, memory flat, siblings served."""
        house.leave()
        sent: list[int] = [0]

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            slow = there.wait(1)[0].stream
            there.head(slow)
            while True:
                while room := min(there.h2.local_flow_control_window(slow), 16_384):
                    there.h2.send_data(slow, bytes(room))
                    sent[0] += room
                    there.flush()
                for each in there.pending():
                    if each.stream != slow:
                        there.answer(each.stream)
                there.read()

        with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
            pid = at.gateway.worker_pids()[0]
            with at.h2(grants=False, receive_buffer=16_384) as client:
                before = resident_kib(pid)
                stream = client.open(request("/slow"))
                client.until(lambda: len(client.answer(stream).body) == 65_535, "its window is full")
                ends = time.monotonic() + 1
                last, since = sent[0], time.monotonic()
                while time.monotonic() < ends or time.monotonic() - since < 0.3:
                    if sent[0] != last:
                        last, since = sent[0], time.monotonic()
                    assert at.ask()[0] == 200, "others are served meanwhile"
                assert 65_535 <= sent[0] <= 3 * MB
                assert resident_kib(pid) - before < 8_000
            eventually(lambda: at.gateway.metric("backend_inflight") == 0, "it is given up")


class TestLife:
    def test_a_backend_removed_by_a_reload_finishes(self, house: House) -> None:
        go = threading.Event()
        ended = threading.Event()

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            first = there.wait(1)[0].stream
            assert go.wait(30)
            there.answer(first, b"old")
            with contextlib.suppress(EOFError):
                there.until(lambda: False)
            assert there.goaway == 0
            ended.set()

        with (
            Backend(script) as old,
            Backend(answer_h2, "new") as new,
            world(house, backend_table(old.address)) as at,
            at.h2() as client,
        ):
            stream = client.open(request("/x"))
            eventually(lambda: at.gateway.metric("backend_inflight") == 1, "it is under way")
            assert at.gateway.reload(config(at.port, backend_table(new.address)))
            assert at.ask()[::2] == (200, b"new")
            go.set()
            assert client.response(stream).body == b"old"
            assert ended.wait(30), "closed after its last exchange"
            at.is_quiet()

    def test_the_drain_waits_for_what_is_under_way(self, house: House) -> None:
        go = threading.Event()

        def script(connection: BackendConnection) -> None:
            there = H2There(connection)
            first = there.wait(1)[0].stream
            assert go.wait(30)
            there.answer(first, b"late")
            there.serve(name_of(connection))

        with (
            Backend(script) as backend,
            world(house, backend_table(backend.address)) as at,
            at.h2() as client,
        ):
            stream = client.open(request("/x"))
            eventually(lambda: at.gateway.metric("backend_inflight") == 1, "it is under way")
            at.gateway.process.terminate()
            client.until(lambda: client.goaways, "it is told")
            go.set()
            assert client.response(stream).body == b"late"
            client.rest()
        house.leave()


def test_fields_end_to_end(house: House) -> None:
    """Every end-to-end field in order, cookies, interim heads and trailers; nothing of the connection."""
    seen: list[Request] = []

    def script(connection: BackendConnection) -> None:
        there = H2There(connection)
        while True:
            for each in there.pending():
                seen.append(each)
                there.h2.send_headers(each.stream, [(":status", "103"), ("link", "</a>")])
                there.head(each.stream, 200, ("set-cookie", "a=1"), ("set-cookie", "b=2"), ("x-end", "yes"))
                there.body(each.stream, b"body", end=False)
                there.h2.send_headers(each.stream, [("x-sum", "7")], end_stream=True)
                there.flush()
            there.read()

    with Backend(script) as backend, world(house, backend_table(backend.address)) as at:
        with at.h2() as client:
            stream = client.open(
                request("/p?q=%2f", "POST", ("cookie", "a=1"), ("cookie", "b=2"), ("x-a", "1"), ("x-a", "2")),
                end=False,
            )
            client.send_body(stream, b"hello", end=False)
            client.send_trailers(stream, [("x-check", "sum")])
            answer = client.response(stream)
        assert answer.informational == [(103, [("link", "</a>")])]
        assert [value for name, value in answer.headers if name == "set-cookie"] == ["a=1", "b=2"]
        assert (answer.get("x-end"), bytes(answer.body), answer.trailers) == (
            "yes",
            b"body",
            [("x-sum", "7")],
        )
        with Client(at.port) as old:
            old.send(
                b"POST /p HTTP/1.1\r\nHost: h.example\r\nCookie: a=1; b=2\r\nTE: trailers\r\n"
                b"Connection: te, x-hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"5\r\nhello\r\n0\r\nx-check: sum\r\n\r\n"
            )
            assert b" 103 " in old.until(b"\r\n\r\n")
            head = old.until(b"\r\n\r\n").lower()
            assert b"set-cookie: a=1\r\nset-cookie: b=2\r\n" in head
            assert b"x-sum: 7" in old.until(b"0\r\n") + old.until(b"\r\n\r\n")
    first, second = seen
    for each in seen:
        assert bytes(each.body) == b"hello"
        assert each.trailers == [("x-check", "sum")]
        assert "; ".join(value for name, value in each.fields if name == "cookie") == "a=1; b=2"
        assert not {name for name, _ in each.fields} & {
            "host", "connection", "keep-alive", "transfer-encoding", "x-hop",
        }  # fmt: skip
    assert first.path == "/p?q=%2f"
    assert [value for name, value in first.fields if name == "x-a"] == ["1", "2"]
    assert second.get(":authority") == "h.example"
