"""HTTP/3 over paths that lose, repeat, reorder, corrupt and cut datagrams: nothing that arrives is wrong."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.h3_backend import h3_backend
from tests.e2e.h3_raw import RawH3
from tests.e2e.harness import BackendConnection, Gateway, certificate
from tests.e2e.lossy import Lossy, Weather
from tests.e2e.quic_site import QuicSite, quic_site
from tests.ports import free_port

BODY: Final = random.Random(11).randbytes(1_000_000)
SHORTER: Final = BODY[:300_000]
"""Where a fifth is lost: dozens of losses each way still, and as many long waits."""
LONG_S: Final = 100.0
# On such paths a transfer may stand still for longer than is tolerated elsewhere.
PATIENT: Final = "[runtime.watchdog]\nbody_progress_min_bps = 0"

WEATHERS: Final = {
    "1 % lost": Weather(lose=0.01),
    "5 % lost": Weather(lose=0.05),
    "10 % lost": Weather(lose=0.10),
    "20 % lost": Weather(lose=0.20),
    "20 % repeated": Weather(repeat=0.20),
    "20 % late": Weather(reorder=0.20),
    "5 % corrupt": Weather(corrupt=0.05),
    "20 % corrupt": Weather(corrupt=0.20),
    "10 % cut": Weather(cut=0.10),
    "a small MTU": Weather(lose=0.01, mtu_bytes=1252),
    "all of it": Weather(lose=0.03, repeat=0.05, reorder=0.1, corrupt=0.03, cut=0.02, mtu_bytes=1252),
}
every = pytest.mark.parametrize("weather", WEATHERS.values(), ids=WEATHERS)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def body_for(weather: Weather) -> bytes:
    return SHORTER if max(weather.lose, weather.corrupt) >= 0.2 else BODY


def serve_bodies(connection: BackendConnection) -> None:
    while True:
        head, body = connection.request()
        answer = body or BODY[: int(head.lower().partition(b"x-wanted: ")[2].split(b"\r\n")[0])]
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)


def is_served(client: RawH3, weather: Weather) -> None:
    """A body down, the same up and down again."""
    whole = body_for(weather)
    for body in (None, whole):
        wanted = (b"x-wanted", b"%d" % len(whole))
        fields, answer = client.get(wanted, body=body, patience_s=LONG_S)
        assert fields[b":status"] == b"200"
        assert answer == whole


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuicSite]:
    with quic_site(tmp_path_factory.mktemp("faults"), script=serve_bodies, runtime=PATIENT) as site:
        yield site


@every
def test_in_front(site: QuicSite, weather: Weather) -> None:
    with Lossy(site.port, weather, seed=3) as path, RawH3(path.port) as client:
        is_served(client.begun(), weather)
        assert path.lost or not weather.lose


class Behind:
    """A gateway before a backend over HTTP/3; the way between them is ``path``."""

    def __init__(self) -> None:
        self.port = free_port()
        self.path: Lossy
        self.gateway: Gateway


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    directory: Path = tmp_path_factory.mktemp("behind")
    it = Behind()
    files = certificate(directory)
    port = free_port()
    with (
        h3_backend(files.certificate, files.key, BODY, port),
        Lossy(port, Weather(), seed=4) as it.path,
    ):
        config = f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{it.port}"
protocol = "quic"
http.head_timeout_ms = 100000
http.total_timeout_ms = 100000
[listeners.quic]
cert_path = "{files.certificate}"
key_path = "{files.key}"
retry_secret_path = "{directory / "retry.secret"}"
[[listeners.backends]]
address = "127.0.0.1:{it.path.port}"
protocol = "h3"
tls_ca_path = "{files.certificate}"
tls_verify_hostname = "localhost"
"""
        with Gateway(directory, config, runtime=PATIENT) as it.gateway:
            yield it


@every
def test_behind(behind: Behind, weather: Weather) -> None:
    behind.path.weather = weather
    with RawH3(behind.port) as client:
        is_served(client.begun(), weather)


@pytest.mark.parametrize("name", ["10 % lost", "all of it"])
def test_on_both_sides(behind: Behind, name: str) -> None:
    behind.path.weather = weather = WEATHERS[name]
    with Lossy(behind.port, weather, seed=5) as path, RawH3(path.port) as client:
        is_served(client.begun(), weather)
