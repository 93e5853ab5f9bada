"""An HTTP/3 load generator: ``python -m bench.h3_load HOST PORT PATH``.

No distribution has one (h2load is built without HTTP/3), so this one stands on the gateway's own engine and
codec: it measures servers, not itself. Each process drives its connections in closed loops: a stream that
ends begins the next request. Several processes share the connections where one core of load is not enough.

Prints one line of JSON: requests, errors, bytes of bodies, seconds, and the median and 99th percentile of the
time to a whole answer in milliseconds. With ``--idle`` a line before it says how many connections are open;
they are then held for so many seconds.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import uvloop

from bench.stats import percentile
from expressgateway.net.h3_back import LIMITS
from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.events import Ended
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import Grants
from expressgateway.net.reactor import Reactor
from expressgateway.upstream.backend import Backend, BackendSettings, SocketAddress, TlsSettings
from expressgateway.wire.errors import WireError
from expressgateway.wire.h3.client import H3Client, H3ClientStream
from expressgateway.wire.h3.streams import H3Stream
from expressgateway.wire.head import Fields, RequestHead, ResponseHead

GRANTS: Final = Grants(
    stream_bytes=1_048_576, connection_bytes=16_777_216, streams=0, unidirectional=16, idle_timeout_s=30.0
)
IDLE_S: Final = 600.0  # what idle connections may last, unless the server says less
AT_ONCE: Final = 32  # handshakes of idle connections under way
CHUNK: Final = bytes(65_536)
MAX_TIMES: Final = 200_000  # of which percentiles are taken, in one process


class Tally:
    """What one process has seen."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.bytes = 0
        self.times: list[float] = []
        self.is_over = False


class Request:
    """One request at a time on a connection, again and again. Implements ``ResponseSink``."""

    def __init__(self, session: "LoadSession") -> None:
        self._session = session
        self._stream: H3ClientStream | None = None
        self._began = 0.0
        self._is_good = False
        self._left = 0

    def begin(self) -> None:
        session = self._session
        if session.tally.is_over:
            return
        if not session.codec.can_open:
            session.waiting.append(self)
            return
        self._began = time.perf_counter()
        self._is_good = False
        stream = self._stream = session.codec.open(self)
        upload = session.upload
        head = RequestHead(
            b"POST" if upload else b"GET",
            b"https",
            session.authority,
            session.path,
            ((b"user-agent", b"h3_load"),),
            content_length=upload or None,
        )
        stream.send_head(head, not upload)
        self._left = upload
        self._send()

    def _send(self) -> None:
        while self._left and self._stream is not None:
            size = min(self._left, len(CHUNK))
            self._left -= size
            blocked = self._session.is_blocked
            self._session.is_blocked = False
            self._stream.send_data(CHUNK[:size], not self._left)
            was_blocked, self._session.is_blocked = self._session.is_blocked, blocked
            if was_blocked:
                return

    def _done(self, is_good: bool) -> None:
        tally = self._session.tally
        if is_good:
            tally.requests += 1
            if len(tally.times) < MAX_TIMES:
                tally.times.append(time.perf_counter() - self._began)
        else:
            tally.errors += 1
        self._stream = None
        self._session.reactor.call_soon(self.begin)

    def on_informational(self, head: ResponseHead) -> None:
        """Not of interest."""

    def on_response(self, head: ResponseHead, end: bool) -> None:
        self._is_good = 200 <= head.status < 300
        if end:
            self._done(self._is_good)

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        self._session.tally.bytes += len(chunk)
        if end:
            self._done(self._is_good)

    def on_response_trailers(self, fields: Fields) -> None:
        self._done(self._is_good)

    def on_response_abort(self, error: WireError) -> None:
        if not self._session.tally.is_over:
            self._done(False)

    def on_back_blocked(self) -> None:
        self._session.is_blocked = True

    def on_back_drained(self) -> None:
        self._send()


class LoadSession:
    """One connection. Implements ``Session`` and the codec's shell."""

    def __init__(
        self,
        quic: QuicConnection,
        reactor: Reactor,
        tally: Tally,
        arguments: argparse.Namespace,
        opened: Callable[[], None] | None = None,
    ) -> None:
        self._opened = opened
        self.quic = quic
        self.reactor = reactor
        self.tally = tally
        self.codec = H3Client(self, quic.engine, LIMITS)
        self.path = arguments.path.encode()
        self.authority = b"localhost:%d" % arguments.port
        self.upload = arguments.upload
        self.is_blocked = False
        self.waiting: list[Request] = []
        self.requests = [Request(self) for _ in range(arguments.streams)]
        self.is_idle = arguments.idle

    def on_open(self) -> None:
        self.codec.begin(self.reactor.now)
        if self._opened is not None:
            self._opened()
        if not self.is_idle:
            for request in self.requests:
                request.begin()

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.codec.receive(stream_id, data, end, self.reactor.now)

    def on_stream_reset(self, stream_id: int, code: int) -> None:
        self.codec.receive_reset(stream_id, code, self.reactor.now)

    def on_stream_stop(self, stream_id: int, code: int) -> None:
        self.codec.receive_stop(stream_id, code, self.reactor.now)

    def on_streams_allowed(self) -> None:
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            request.begin()

    def on_datagram(self, data: bytes) -> None:
        """None were agreed on."""

    def on_ended(self, ended: Ended) -> None:
        if not self.tally.is_over:
            sys.stderr.write(f"h3_load: a connection ended: {ended}\n")
            self.tally.errors += 1
        self.codec.receive_closed(str(ended))

    def on_flushed(self) -> None:
        self.codec.sent()

    def on_over(self) -> None:
        """It was counted."""

    def wake(self) -> None:
        self.quic.wake()

    def stream_done(self, stream: H3Stream) -> None:
        self.on_streams_allowed()

    def limits_changed(self) -> None:
        self.on_streams_allowed()

    def unavailable(self) -> None:
        """The server leaves: so do we."""

    def security_event(self, kind: str, detail: str) -> None:
        self.tally.errors += 1

    def close(self, linger: bool) -> None:
        self.quic.wake()


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    reactor = Reactor(asyncio.get_running_loop())
    grants = replace(GRANTS, idle_timeout_s=IDLE_S) if arguments.idle else GRANTS
    dialler = QuicDialler(reactor, Timers(reactor), 60.0, ("h3",), grants)
    tls = TlsSettings(verify_peer=False, hostname="localhost", ca_pem=None, cert_pem=None, key_pem=None)
    settings = BackendSettings("load", arguments.host, arguments.port, "h3", 1, tls, None)
    address: SocketAddress = (arguments.host, arguments.port)
    if ":" in arguments.host:
        address = (arguments.host, arguments.port, 0, 0)
    backend = Backend(settings, address, "load")
    tally = Tally()
    connections: list[QuicConnection] = []

    def dial() -> None:
        if len(connections) < arguments.connections:
            connections.append(
                dialler.dial(backend, lambda quic: LoadSession(quic, reactor, tally, arguments, next_one))
            )

    # Idle ones are there to be held, not to be made: a few at a time, as one opens the next begins.
    next_one = dial if arguments.idle else None
    for _ in range(AT_ONCE if arguments.idle else arguments.connections):
        dial()
    if arguments.idle:
        while not all(connection.engine.is_open for connection in connections):
            await asyncio.sleep(0.05)
            if any(connection.engine.ended for connection in connections):
                break
        sys.stdout.write(json.dumps({"open": sum(each.engine.is_open for each in connections)}) + "\n")
        sys.stdout.flush()
    began = time.perf_counter()
    await asyncio.sleep(arguments.seconds)
    tally.is_over = True
    seconds = time.perf_counter() - began
    opened = sum(connection.engine.is_open for connection in connections)
    for connection in connections:
        connection.engine.close(0x100, "")
        connection.flush()
    return {
        "requests": tally.requests,
        "errors": tally.errors + arguments.connections - opened,
        "bytes": tally.bytes,
        "seconds": seconds,
        "times": tally.times,
    }


def merged(results: list[dict[str, object]]) -> dict[str, object]:
    times = sorted(each for result in results for each in result["times"])  # type: ignore[attr-defined]
    return {
        "requests": sum(int(str(result["requests"])) for result in results),
        "errors": sum(int(str(result["errors"])) for result in results),
        "bytes": sum(int(str(result["bytes"])) for result in results),
        "seconds": max(float(str(result["seconds"])) for result in results),
        "p50_ms": percentile(times, 50) * 1000 if times else 0.0,
        "p99_ms": percentile(times, 99) * 1000 if times else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.h3_load", description=__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--streams", type=int, default=16, help="requests at once on each connection")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--upload", type=int, default=0, help="bytes of a request's body")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--idle", action="store_true", help="only hold the connections open")
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes == 1:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(run(arguments))
        sys.stdout.write(json.dumps(result if arguments.raw else merged([result])) + "\n")
        return 0
    share = -(-arguments.connections // arguments.processes)
    command = [sys.executable, "-m", "bench.h3_load", arguments.host, str(arguments.port), arguments.path]
    command += ["--connections", str(share), "--streams", str(arguments.streams)]
    command += ["--seconds", str(arguments.seconds), "--upload", str(arguments.upload), "--raw"]
    command += ["--idle"] if arguments.idle else []
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(arguments.processes)]
    results = [json.loads(each.communicate()[0]) for each in running]
    sys.stdout.write(json.dumps(merged(results)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
