"""gRPC over HTTP/3 on ``aioquic``: a client's calls, and a backend with the methods of ``test_grpc.Service``.

Both do by hand what gRPC lays over HTTP: length-prefixed messages, and a status in the trailers.
"""

import queue
from collections.abc import Callable, Iterator

from aioquic.h3.connection import ErrorCode, FrameUnexpected

from tests.e2e.h3_site import request
from tests.e2e.talks import CutError, Fields, Talk, rest
from tests.e2e.talks_h3 import H3End, H3Talk
from tests.proxy.test_grpc import message

PREFIX_BYTES = 5
CONTENT_TYPE = ("content-type", "application/grpc+proto")
OK = [("grpc-status", "0")]


def messages(talk: Talk) -> Iterator[bytes]:
    """Those of one direction, as they come."""
    held = bytearray()
    while chunk := talk.read():
        held += chunk
        while len(held) >= PREFIX_BYTES:
            size = int.from_bytes(held[1:PREFIX_BYTES], "big")
            if len(held) < PREFIX_BYTES + size:
                break
            assert held[0] == 0, "compressed"
            yield bytes(held[PREFIX_BYTES : PREFIX_BYTES + size])
            del held[: PREFIX_BYTES + size]
    assert not held, "a message that is cut short"


class Call:
    """One call. Its requests are sent as the test says so."""

    def __init__(self, end: H3End, method: str, *metadata: tuple[str, str], timeout: str = "") -> None:
        """``timeout``: as it stands in the field."""
        path = method if method.startswith("/") else f"/t.T/{method}"
        fields = request(path, ("te", "trailers"), CONTENT_TYPE, *metadata, method="POST")
        if timeout:
            fields.append(("grpc-timeout", timeout))
        self.talk: H3Talk = end.call(fields, end=False)
        self.answers = messages(self.talk)

    def send(self, *texts: bytes, end: bool = False) -> None:
        """Nothing, once the call is answered."""
        try:
            for text in texts:
                self.talk.send(message(text))
            if end:
                self.talk.finish()
        except (CutError, FrameUnexpected):
            if not self.talk.is_stopped:
                raise

    def rest(self) -> list[bytes]:
        return list(self.answers)

    @property
    def last(self) -> dict[str, str]:
        """What came behind the messages, or in their place."""
        assert self.talk.is_ended, "the call goes on"
        return dict(self.talk.trailers) or self.talk.headers

    def status(self) -> int:
        """Once it has ended."""
        self.talk.read_head()
        assert self.talk.headers[":status"] == "200"
        for _ in self.answers:
            pass
        return int(self.last["grpc-status"])


def unary(end: H3End, method: str, text: bytes, *metadata: tuple[str, str], timeout: str = "") -> Call:
    call = Call(end, method, *metadata, timeout=timeout)
    call.send(text, end=True)
    return call


class Service:
    """An ``Answerer``: a gRPC server."""

    def __init__(self) -> None:
        self.begun: queue.Queue[str] = queue.Queue()
        """What the calls said that are to be given up."""
        self.cancelled: queue.Queue[str] = queue.Queue()
        """What the calls said that were given up by their clients."""
        self.seen: dict[str, dict[str, str]] = {}

    def __call__(self, talk: Talk) -> None:
        name = talk.headers[":path"].rpartition("/")[2]
        self.seen[name] = talk.headers
        methods: dict[str, Callable[[Talk], Fields]] = {
            "Echo": self._echo,
            "Fail": self._fail,
            "Hang": self._hang,
            "Stall": self._stall,
            "Break": self._break,
            "Collect": self._collect,
            "Spread": self._spread,
            "Chat": self._chat,
        }
        method = methods.get(name)
        if method is None:
            rest(talk)
            talk.send_head([(":status", "200"), CONTENT_TYPE, ("grpc-status", "12")], end=True)
            return
        talk.finish(method(talk))

    @staticmethod
    def _begin(talk: Talk, *metadata: tuple[str, str]) -> None:
        talk.send_head([(":status", "200"), CONTENT_TYPE, *metadata])

    def _echo(self, talk: Talk) -> Fields:
        asked = talk.headers.get("x-ask")
        self._begin(talk, *([("x-first", asked), ("x-first-bin", "AP8")] if asked else []))
        for text in messages(talk):
            talk.send(message(text))
        return [*OK, ("x-last", asked), ("x-last-bin", "AP4")] if asked else OK

    def _fail(self, talk: Talk) -> Fields:
        rest(talk)
        self._begin(talk)
        return [("grpc-status", "9"), ("grpc-message", "no, 100%25 %C3%BC%0A"), ("x-why", "because")]

    def _hang(self, talk: Talk) -> Fields:
        self._until_lost(talk, b"".join(messages(talk)).decode())
        raise CutError

    def _stall(self, talk: Talk) -> Fields:
        text = b"".join(messages(talk)).decode()
        self._begin(talk)
        talk.send(message(b"first"))
        self._until_lost(talk, text)
        raise CutError

    def _until_lost(self, talk: Talk, text: str) -> None:
        self.begun.put(text)
        talk.until_lost()
        self.cancelled.put(text)

    def _break(self, talk: Talk) -> Fields:
        """It breaks at the second message."""
        self._begin(talk)
        asked = messages(talk)
        talk.send(message(next(asked)))
        next(asked)
        assert isinstance(talk, H3Talk)
        talk.cut(ErrorCode.H3_EXCESSIVE_LOAD)
        raise CutError

    def _collect(self, talk: Talk) -> Fields:
        text = b",".join(messages(talk))
        self._begin(talk)
        talk.send(message(text))
        return OK

    def _spread(self, talk: Talk) -> Fields:
        (text,) = messages(talk)
        self._begin(talk)
        for each in text.split(b","):
            talk.send(message(each))
        return OK

    def _chat(self, talk: Talk) -> Fields:
        self._begin(talk)
        for each in messages(talk):
            talk.send(message(each + each))
        return OK
