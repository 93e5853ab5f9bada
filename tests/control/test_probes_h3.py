"""Probes over HTTP/3 of backends that are far away, or slow to answer."""

import asyncio
import heapq
import time
from pathlib import Path

import pytest

from expressgateway.control.probe_h3 import _readable
from expressgateway.control.probes import Result, probe_for, run
from expressgateway.upstream.backend import BackendSettings, TlsSettings
from tests.control.test_probes import wanted
from tests.e2e.harness import certificate
from tests.e2e.lossy import Lossy, Weather
from tests.e2e.talks import Talk
from tests.e2e.talks_h3 import H3Backend
from tests.l4.udp_gateway import datagram_socket


class Far(Lossy):
    def _meet(self, data: bytes, client: tuple[str, int], is_forward: bool) -> None:
        due = time.monotonic() + 0.5
        heapq.heappush(self._flying, (due, next(self._order), data, client, is_forward))


def never(talk: Talk) -> None:
    raise AssertionError(talk)


@pytest.mark.slow
def test_the_end_of_a_connection_is_believed_at_once(tmp_path: Path) -> None:
    """Not after three times what an answer may take, which is for what comes late (RFC 9000 10.2)."""
    files = certificate(tmp_path)
    with (
        H3Backend(never, "x", files, alpn="hq") as backend,
        Far(backend.port, Weather()) as far,
    ):
        tls = TlsSettings(True, "localhost", files.certificate.read_bytes(), None, None)
        settings = BackendSettings("far", "127.0.0.1", far.port, "h3", 1, tls, None)
        probe = probe_for(wanted("http"), settings, ("127.0.0.1", far.port))
        result = asyncio.run(run(probe, 6))
    assert result == Result(False, "does not agree to speak HTTP/3 (ALPN)")


def test_what_comes_with_the_end_of_the_time_is_not_lost() -> None:
    async def main() -> None:
        with datagram_socket("127.0.0.1") as sock, datagram_socket("127.0.0.1") as other:
            for _ in range(100):
                other.sendto(b"x", sock.getsockname())
                await _readable(sock, 0)
                assert sock.recv(10) == b"x"
            await _readable(sock, 0.001)
            with pytest.raises(BlockingIOError):
                sock.recv(10)

    asyncio.run(main())
