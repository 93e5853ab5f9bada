"""The shell of a codec with many streams: what HTTP/2 and HTTP/3 ask of the connection around them.

``StreamT_contra`` is the codec's own kind of stream, which the shell gets to see when it is done.
"""

from typing import Protocol, TypeVar

from expressgateway.wire.errors import WireError
from expressgateway.wire.head import RequestHead
from expressgateway.wire.sinks import RequestSink, ServerStream

StreamT_contra = TypeVar("StreamT_contra", contravariant=True)


class Shell(Protocol[StreamT_contra]):
    """What both roles need of it."""

    def wake(self) -> None:
        """There is something to send: flush soon."""

    def stream_done(self, stream: StreamT_contra) -> None:
        """Both directions are complete, or it was reset. Once per stream."""

    def close(self, linger: bool) -> None:
        """Flush, then close. Once. ``linger``: the peer must see what was said, and may still be sending."""

    def security_event(self, kind: str, detail: str) -> None:
        """A guard of the attack catalogue has tripped."""


class ServerShell(Shell[StreamT_contra], Protocol[StreamT_contra]):
    """A client's connection."""

    def open_exchange(self, stream: ServerStream) -> RequestSink: ...
    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        """Nothing was forwarded: answer with ``error.status``.

        ``head``: as far as it could be read, for how to answer; not to be forwarded.
        """

    def rejected(self, error: WireError) -> None:
        """A request was malformed: its stream was reset, and there is nobody else to tell."""


class ClientShell(Shell[StreamT_contra], Protocol[StreamT_contra]):
    """A backend's connection."""

    def limits_changed(self) -> None:
        """The backend's SETTINGS hold: ``can_open`` and ``offers_connect`` may be others."""

    def unavailable(self) -> None:
        """No stream can be opened any more. Those that are open go on. At most once."""
