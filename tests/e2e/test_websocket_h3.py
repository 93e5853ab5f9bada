"""What WebSocket over HTTP/3 has of its own (RFC 9220): directions that are given up by themselves, and
connections that move. All else is in ``test_websocket_streams``, for HTTP/2 as well.
"""

from collections.abc import Iterator

import pytest
from aioquic.h3.connection import ErrorCode

from tests.e2e.harness import eventually
from tests.e2e.websocket_h3 import H3Link, H3Session
from tests.e2e.websocket_site import CODES, Site, ends, site

__all__ = ["ends", "site"]

backs = pytest.mark.parametrize("back", ["h1", "h2", "h3"])


@pytest.fixture
def link(site: Site, back: str) -> Iterator[H3Link]:
    with site.link("h3", back) as link:
        assert isinstance(link, H3Link)
        yield link


def established(link: H3Link) -> H3Session:
    session = link.connect()
    assert isinstance(session, H3Session)
    session.send("x")
    assert session.recv() == "x"
    return session


def is_cancelled(site: Site, back: str, closed: int) -> bool:
    """Whether the backend knows that its session was given up; ``closed``: sessions that had ended before."""
    if back == "h1":
        return 1006 in [each for each, _ in site.closed[closed:]]
    return site.sockets[back].streams[-1].reset == CODES[back].cancelled


@backs
@pytest.mark.parametrize("kind", ["reset", "stop"])
def test_either_direction_given_up_is_both(site: Site, link: H3Link, back: str, kind: str) -> None:
    """By RESET_STREAM or STOP_SENDING alone: the client hears of it, and the backend."""
    closed = len(site.closed)
    session = established(link)
    stream = session.talk.stream
    with link.end.changed:
        if kind == "reset":
            link.end.quic.reset_stream(stream, ErrorCode.H3_REQUEST_CANCELLED)
        else:
            link.end.quic.stop_stream(stream, ErrorCode.H3_REQUEST_CANCELLED)
        link.end.flush()
    session.until(lambda: session.reset is not None)
    assert session.reset == CODES["h3"].cancelled
    eventually(lambda: is_cancelled(site, back, closed), "the backend is told")
    established(link)


@backs
def test_a_client_that_closes_the_connection(site: Site, link: H3Link, back: str) -> None:
    """Its sessions are reset, not ended: nobody said that they were complete."""
    closed = len(site.closed)
    labels = {"listener": f"h3-{back}"}
    established(link)
    eventually(lambda: site.gateway.metric("websocket_sessions_open", **labels) == 1, "it is counted")
    link.end.close()
    eventually(lambda: is_cancelled(site, back, closed), "the backend is told")
    eventually(lambda: site.gateway.metric("websocket_sessions_open", **labels) == 0, "it is over")


@pytest.mark.parametrize("back", ["h1"])
def test_a_client_that_moves_keeps_its_sessions(link: H3Link) -> None:
    session = established(link)
    link.end.move()
    session.send("from elsewhere")
    assert session.recv() == "from elsewhere"
    session.close(4002, "bye")
    assert session.close_code == 4002


@backs
def test_trailers_have_no_place_in_a_tunnel(site: Site, link: H3Link, back: str) -> None:
    """RFC 9114 4.4: whatever is known and not DATA is a connection error, H3_FRAME_UNEXPECTED."""
    closed = len(site.closed)
    session = established(link)
    session.talk.finish([("x-trailer", "1")])
    assert link.end.until_closed().error_code == ErrorCode.H3_FRAME_UNEXPECTED
    eventually(lambda: is_cancelled(site, back, closed), "the backend is told")
