"""A listening socket that is about to close: who is in is served, and who comes then is not let in half."""

import logging
import socket

import pytest

from expressgateway.net import no_syn
from expressgateway.net.no_syn import drop_new


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_is_connected_is_served_and_who_comes_is_not_connected(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as door:
        place = door.getsockname()[:2]
        with socket.create_connection(place, 5) as early, socket.socket(family) as late:
            assert drop_new(door)
            late.setblocking(False)
            with pytest.raises(BlockingIOError):
                late.connect(place)
            guest, _ = door.accept()
            with guest:
                early.sendall(b"hello")
                assert guest.recv(10) == b"hello"
                guest.sendall(b"and back")
                assert early.recv(10) == b"and back"
            door.setblocking(False)
            with pytest.raises(BlockingIOError):
                door.accept()


def test_where_the_kernel_refuses(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_syn, "_SO_ATTACH_FILTER", 9999)
    with socket.create_server(("127.0.0.1", 0)) as door, caplog.at_level(logging.DEBUG):
        assert not drop_new(door)
    assert "does not drop new connections" in caplog.text
