"""What the supervisor makes of what workers say, or do not say, when the API asks them."""

import http.client
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.control.gateway import PATIENCE_S, Gateway

pytestmark = pytest.mark.slow


def ask(gateway: Gateway, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    with closing(http.client.HTTPConnection("127.0.0.1", gateway.admin, timeout=PATIENCE_S)) as connection:
        data = None if body is None else json.dumps(body)
        connection.request(method, f"/api/v1{path}", data, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            answer: dict[str, Any] = json.loads(response.read())
            return response.status, answer


def test_workers_that_answer_nothing_or_nonsense(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway, gateway.connect():
        for whim, silent in (("x", []), ("raves", [0]), ("deaf", [0])):
            gateway.write(whim=whim)
            status, answer = ask(gateway, "POST", "/reload", {})
            assert (status, answer["result"]) == (200, "unchanged" if whim == "x" else "applied")
            status, shown = ask(gateway, "GET", "/connections")
            assert (status, shown["silent_workers"]) == (200, silent)
            if not silent:
                assert shown["looked_at"] == 1
                assert shown["listed"] == [
                    {
                        "listener": "web",
                        "worker": 0,
                        "protocol": "tcp",
                        "client": "192.0.2.1:5",
                        "age_s": 1.5,
                        "requests": None,
                        "state": "active",
                    }
                ]
        gateway.wait_log("sent nonsense of its connections")
        assert ask(gateway, "GET", "/workers")[1]["workers"][0]["state"] == "serving"


def test_reload_that_a_worker_cannot_apply(tmp_path: Path) -> None:
    with Gateway(tmp_path, workers=2) as gateway:
        gateway.write(whim="one-cannot-apply")
        status, answer = ask(gateway, "POST", "/reload", {"version": 1})
        assert (status, answer["result"], answer["version"]) == (500, "failed", 1)
        assert "this worker cannot apply that" in answer["error"]
        gateway.write(whim="y")
        assert ask(gateway, "POST", "/reload", {"version": 1})[1]["version"] == 2
        assert ask(gateway, "POST", "/reload", {"version": 1})[0] == 409
