"""Many exchanges in every cell, front by back: nothing of them is left, neither in memory nor under way."""

from collections.abc import Iterator

import pytest

from tests.e2e.cells import CELLS, VERSIONS, Cell, Place, call, is_quiet, nginx_of_cells
from tests.e2e.harness import eventually, need, run
from tests.e2e.http_world import fd_count, rss_bytes
from tests.e2e.talks import rest

EXCHANGES = 10_000


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with nginx_of_cells(tmp_path_factory.mktemp("crowded")) as place:
        yield place


@need("nginx", "h2load")
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_thousands_of_exchanges_leave_nothing_behind(crowded: Place, cell: Cell) -> None:
    def load(exchanges: int) -> None:
        if cell.front == "h3":  # which not every h2load speaks
            load_h3(exchanges)
            return
        version = ["-m4"] if VERSIONS[cell.front].is_multiplexed else ["--h1"]
        scheme = "https" if cell.is_tls else "http"
        port = crowded.ports[cell.back, cell.is_tls, "plain"]
        url = f"{scheme}://127.0.0.1:{port}/"
        told = run("h2load", *version, "-c8", f"-n{exchanges}", url)
        assert f" {exchanges} succeeded, 0 failed, 0 errored" in told, told
        assert f"status codes: {exchanges} 2xx" in told, told
        eventually(lambda: is_quiet(crowded.gateway), "nothing is under way")

    def load_h3(exchanges: int) -> None:
        callers = [crowded.dial(cell) for _ in range(8)]
        for _ in range(exchanges // 32):
            talks = [call(caller, "/") for caller in callers for _ in range(4)]
            for talk in talks:
                assert talk.read_head()[":status"] == "200"
                assert rest(talk) == b"served"
        for caller in callers:
            caller.close()
        eventually(lambda: is_quiet(crowded.gateway), "nothing is under way")

    (pid,) = crowded.gateway.worker_pids()
    load(EXCHANGES // 5)
    memory, files = rss_bytes(pid), fd_count(pid)
    load(EXCHANGES)
    assert rss_bytes(pid) - memory < 200 * EXCHANGES
    idle = crowded.gateway.metric("pool_connections", state="idle")
    assert fd_count(pid) <= files + idle
