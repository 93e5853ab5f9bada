"""What the supervisor does about its workers, under load."""

import os
from pathlib import Path

from tests.e2e.harness import Backend, Client, Gateway, answer_ok, eventually
from tests.e2e.load import REQUEST, Load
from tests.ports import free_port

CONFIG = """
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
backends = [{{ address = "{backend}" }}]
load_balancing = {{ policy = "theirs:Leaks" }}
"""
LIMIT_BYTES = 64 * 1024 * 1024
LEAKS = """
class Leaks:
    def __init__(self, backends):
        self.backends = list(backends)
        self.kept = []

    def pick(self, key):
        if len(self.kept) < 64:
            self.kept.append(b"x" * 1024 * 1024)
        return self.backends[0]

    def others(self, picked):
        return self.backends[1:]

    def rebuilt(self, backends):
        return Leaks(backends)
"""


def test_replacing_for_memory_costs_nothing(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "theirs.py").write_text(LEAKS)
    gateway = Gateway(tmp_path, "", workers=2, runtime=f"worker_memory_limit_bytes = {LIMIT_BYTES}")
    gateway.environment["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with Backend(answer_ok) as backend:
        gateway.write(CONFIG.format(port=port, backend=backend.address))
        with gateway:
            before = gateway.worker_pids()
            with Load(port) as load:
                for worker in ("0", "1"):
                    gateway.wait_metric("worker_replacements_total", worker=worker, cause="memory")
            assert not load.broken
            assert set(load.answers) == {200}
            eventually(lambda: not set(before) & set(gateway.worker_pids()), "the old ones have ended")
            assert gateway.metric("worker_replacements_total", cause="memory") == 2, "no storm"
            assert gateway.metric("worker_restarts_total") == 0
            assert gateway.metric("worker_memory_limit_bytes") == LIMIT_BYTES
            with Client(port) as client:
                client.send(REQUEST)
                assert client.response()[0] == 200
