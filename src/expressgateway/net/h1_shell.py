"""What both HTTP/1 connections, to clients and to backends, offer their codec of the stream below."""

from expressgateway.net.stream import Stream


class StreamShell:
    """The part of a codec's shell that is the same on either side. Subclasses have ``flush``."""

    __slots__ = ("stream",)

    def __init__(self) -> None:
        self.stream: Stream | None = None

    def flush(self) -> None:
        raise NotImplementedError

    def pause_reading(self) -> None:
        if self.stream is not None:
            self.stream.pause()

    def resume_reading(self) -> None:
        if self.stream is not None:
            self.stream.resume()

    def unsent(self) -> int:
        return self.stream.backlog_bytes if self.stream is not None else 0

    def half_close(self) -> None:
        self.flush()
        if self.stream is not None:
            self.stream.write_eof()
