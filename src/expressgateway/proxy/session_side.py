"""The part of an exchange that deals with WebSocket: the handshake before a session, and the session.

Nothing of a tunnel reaches a backend before it has agreed, and no client is told of success before that:
what comes early is held, at most one read or one window of it. What is said in a handshake is in
``handshake``, what is done to a session's bytes in ``session``.
"""

from expressgateway.proxy.deadlines import Deadlines
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.handshake import Handshake
from expressgateway.proxy.session import Session
from expressgateway.proxy.websocket import CLIENT, Verdict
from expressgateway.wire.head import RequestHead, ResponseHead
from expressgateway.wire.sinks import ClientStream


class SessionSide(Deadlines):
    """See the module's text. Its fields, too, have their first values from the exchange."""

    __slots__ = ("_handshake", "_status")

    _handshake: Handshake | None
    """Of the attempt under way; ``None``: not WebSocket, or nobody was asked yet."""
    _status: int

    def _succeed(self, status: int) -> None:
        """The attempt under way has its response head."""
        raise NotImplementedError

    def _add_fields(self, head: ResponseHead) -> None:
        """What the client is told beside what the backend says."""
        raise NotImplementedError

    # -- before ----------------------------------------------------------------------------------------

    def _is_http(self) -> bool:
        return self._head is None or self._head.protocol is None

    def _send_handshake(self, stream: ClientStream, head: RequestHead) -> None:
        handshake = self._handshake = Handshake(head, stream.version)
        sent = handshake.take_request()
        if sent is None:
            self._end_with(Reason.MALFORMED, "a handshake without a Sec-WebSocket-Key, or with more than one")
        else:
            stream.send_head(sent, False)

    def _hold_early(self, chunk: bytes, end: bool) -> None:
        """Bytes behind a handshake may be a request in disguise: no backend sees them before it agreed."""
        if self._response_begun:
            return
        if self._held is not None and chunk:
            self._held.append(chunk)
        self._request_end = self._request_end or end
        self._pause_front()

    def _begin_session(self, head: ResponseHead) -> None:
        """The backend has agreed."""
        service = self.service
        back = self.back
        handshake = self._handshake
        if service.websocket is None or back is None or handshake is None:
            self._end_with(Reason.BACKEND_PROTOCOL, "an upgrade that is not offered any more")
            return
        fault = handshake.take_answer(head)
        if fault:
            self._end_with(Reason.BACKEND_UPGRADE, f"the backend agreed to a WebSocket with {fault}")
            return
        self._session = Session(service, service.websocket, self.front, back, self.peer)
        self._response_begun = True
        self._status = 101
        self._succeed(101)
        service.forwarding.response(head, service.wall_s())
        head.headers = handshake.fields
        self._add_fields(head)
        self.front.send_informational(head)
        held, self._held = self._held, None
        for chunk in held or ():
            self._relay(CLIENT, chunk, False)
        if self._request_end:
            self._relay(CLIENT, b"", True)
        if not self._is_back_blocked:
            self.on_back_drained()

    def _is_misleading(self, status: int) -> bool:
        """Whether the client would take a refusal to open a tunnel for a tunnel."""
        return self._handshake is not None and self._handshake.would_mislead(status)

    # -- the session -----------------------------------------------------------------------------------

    def _relay(self, side: int, chunk: bytes, end: bool) -> None:
        session = self._session
        if session is None:
            return
        if end and side == CLIENT:
            self._request_end = True
        session.relay(side, chunk, end)
        if session.is_over:
            self._finish()

    def on_back_drained(self) -> None:
        """The backend takes more of what the client sends."""
        raise NotImplementedError

    def go_away(self) -> None:
        """The drain's time is up: a session is told 1001, everything else is cut short by its connection."""
        session = self._session
        if session is not None and not self.is_done:
            session.close(Verdict(1001, "websocket_drained", "the gateway is going away"), None)
            self._finish()
