"""What the access log is told of a trace: what a backend was told, and nothing that a peer made up."""

import json
from typing import Any

import pytest

from expressgateway.observe.access_format import Entry, JsonForm
from expressgateway.observe.access_log import AccessLog
from expressgateway.proxy.forwarding import Forwarding, Peer
from expressgateway.proxy.records import Records
from expressgateway.proxy.trace_context import Ids
from expressgateway.wire.head import RequestHead

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{CALLER}-01".encode()


class Log(AccessLog):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def record(self, entry: Entry) -> None:
        self.lines += map(json.loads, JsonForm().lines([entry]))


def logged(value: bytes, *, is_forwarded: bool) -> tuple[str, str]:
    log = Log()
    head = RequestHead(b"GET", b"http", b"a", b"/", ((b"traceparent", value),))
    if is_forwarded:
        rules = Forwarding(forwarded="none", via=False, server_header="gw", alt_svc=None, ids=Ids())
        rules.request(head, Peer("192.0.2.1", False, b"http"))
    Records(log, lambda: 0.0).take(
        7.0, head, None, b"192.0.2.1", b"", ("web", "", "", "", 400, 0, ()), (0, 0), (0.0, None, None)
    )
    (line,) = log.lines
    return line["trace_id"], line["span_id"]


@pytest.mark.parametrize("is_forwarded", [True, False])
def test_a_trace_that_came(is_forwarded: bool) -> None:
    assert logged(GOOD, is_forwarded=is_forwarded) == (TRACE, CALLER)


def test_one_that_is_made_up() -> None:
    bad = b"x" * 55
    assert logged(bad, is_forwarded=False) == ("", "")
    trace, span = logged(bad, is_forwarded=True)
    assert (len(trace), len(span)) == (32, 16)
    assert "x" not in trace + span
