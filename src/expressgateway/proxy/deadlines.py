"""The part of an exchange that watches the clock.

There are no timers per exchange: the front connection's sweep calls ``sweep`` a few times a second, and what
is due is found by comparing moments. Each limit knows whose fault it is when it is passed.
"""

from expressgateway.proxy.backend_side import BackendSide
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.route import Route, Timeouts
from expressgateway.proxy.session import Session
from expressgateway.proxy.upload_rate import UploadRate
from expressgateway.wire.errors import WireError


class Deadlines(BackendSide):
    """See the module's text. Fields get their first values from the exchange."""

    __slots__ = (
        "_body_bytes",
        "_is_told_to_continue",
        "_progress_at",
        "_rate",
        "_route",
        "_session",
        "_started",
        "_unsent",
        "_uploaded_at",
    )

    _route: Route
    _session: Session | None
    _body_bytes: int
    """Of the request, so far."""
    _is_told_to_continue: bool
    _started: float
    _uploaded_at: float
    """0: the request is not complete."""
    _progress_at: float
    """Some body moved, on either side."""
    _unsent: int
    """Bytes waiting in the streams at the last sweep."""
    _rate: UploadRate | None

    def _end_with(self, reason: Reason, detail: str = "", error: WireError | None = None) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    @property
    def timeouts(self) -> Timeouts:
        return self._route.timeouts

    @property
    def body_timeout_s(self) -> float:
        return self._route.timeouts.body

    def sweep(self, now: float) -> None:
        """Find what is due. Called by the front connection, a few times a second."""
        if self.is_done:
            return
        timeouts = self.timeouts
        session = self._session
        if session is not None:
            session.sweep(now, self._front_is_paused, self._back_is_paused)
            if session.is_over:
                self._finish()
            return
        if not self._response_begun:
            if timeouts.total and now - self._started > timeouts.total:
                self._end_with(Reason.TOTAL_TIMEOUT, "no response head in time")
                return
            if self._uploaded_at and now - max(self._uploaded_at, self.attempt_at) > timeouts.head:
                self._end_with(Reason.HEAD_TIMEOUT, "no response head in time")
                return
            per_try = self._retry.per_try_s
            # A client that cannot send on before there is a connection is not what takes the time.
            is_trying = self._backend is not None and (self._uploaded_at or self._is_waiting)
            if per_try and is_trying and now - max(self._uploaded_at, self.attempt_at) > per_try:
                self._time_out_attempt()
                return
        if self._uploaded_at and not self._response_begun:
            return
        unsent = self.front.unsent() + (self.back.unsent() if self.back is not None else 0)
        if unsent != self._unsent:
            self._unsent = unsent
            self._progress_at = now
        if now - self._progress_at > timeouts.body and not self._is_queued:
            self._end_with(self._stalled())
        elif not self._request_end:
            self._sweep_rate(now)

    def _stalled(self) -> Reason:
        """No body moved for too long: whose fault is it?"""
        if self._is_clients_turn() and not self._response_begun:
            return Reason.SLOW_BODY
        if self._response_begun and self._back_is_paused:
            return Reason.SLOW_READER
        return Reason.BODY_TIMEOUT

    def _is_clients_turn(self) -> bool:
        return not self._request_end and not self._front_is_paused and not self._awaits_continue()

    def _awaits_continue(self) -> bool:
        """The client asked before sending its body (RFC 9110 10.1.1) and has not been told."""
        asked = self._head is not None and self._head.expects_continue
        return asked and not self._is_told_to_continue and not self._body_bytes

    def _sweep_rate(self, now: float) -> None:
        service = self.service
        rate = self._rate
        if rate is None:
            rate = self._rate = UploadRate(self._started)
        if (
            not service.min_body_bps
            or self._front_is_paused
            or self._response_begun
            or self._awaits_continue()
        ):
            rate.begin(now, self._body_bytes)
        elif rate.is_too_slow(
            now, self._body_bytes, min_bps=service.min_body_bps, window_s=service.min_body_window_s
        ):
            self._end_with(Reason.SLOW_BODY, "the body comes too slowly")
