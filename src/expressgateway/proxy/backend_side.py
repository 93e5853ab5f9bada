"""The half of an exchange that deals with backends: choosing one, waiting for room, trying another.

Words: an *attempt* is one try with one backend. A request can be sent again as long as the client has been
told nothing and its body so far is still held (``REPLAY_BYTES``). What may be tried again is the route's
``RetryPolicy``; the pool's budget bounds how much of it may be.

This half knows nothing of answers: what it cannot mend it hands to the other half (``give_up``).
"""

from typing import Final

from expressgateway.proxy.errors import Reason, reason_of_fault
from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.keys import cookie_value
from expressgateway.proxy.route import RetryPolicy, Target
from expressgateway.proxy.service import HttpService
from expressgateway.upstream.backend import Addresses, Backend
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.upstream.pool import Pool
from expressgateway.wire.errors import PeerClosedError, UnprocessedError, WireError
from expressgateway.wire.head import Field, Fields, RequestHead
from expressgateway.wire.sinks import ClientStream, ServerStream

REPLAY_BYTES: Final = 65536  # of a request body kept for a retry; a longer one cannot be sent again
MOST_ATTEMPTS: Final = 10  # for one exchange, however many backends refuse it
_FAILURE_S: Final = 1.0  # what a failed attempt counts for, at least, where policies go by latency
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"})  # RFC 9110 9.2.2


class BackendSide:
    """See the module's text. Implements ``Waiter`` (but for its sink) and ``Turn``."""

    __slots__ = (
        "_back_is_paused",
        "_backend",
        "_front_is_paused",
        "_has_backend_begun",
        "_head",
        "_held",
        "_held_bytes",
        "_held_trailers",
        "_is_back_blocked",
        "_is_queued",
        "_is_replaced",
        "_is_waiting",
        "_request_end",
        "_response_begun",
        "_retry",
        "_target",
        "attempt_at",
        "attempts",
        "back",
        "flags",
        "front",
        "is_done",
        "key",
        "last",
        "leased_at",
        "peer",
        "service",
        "tried",
    )

    # What is set here is given its first value by the exchange, in one constructor for both halves.
    # Wiring
    service: HttpService
    front: ServerStream
    peer: Peer
    back: ClientStream | None
    _backend: Backend | None
    _target: Target | None
    _retry: RetryPolicy
    # Exchange
    is_done: bool
    _head: RequestHead | None
    _request_end: bool
    _response_begun: bool
    """The final head went to the client: no answer of our own any more."""
    _front_is_paused: bool
    _back_is_paused: bool
    _is_back_blocked: bool
    """It does not take what it was given."""
    _has_backend_begun: bool
    """An interim head, or the final one, has come."""
    # The request, as long as it may have to be sent (again)
    _held: list[bytes] | None
    """The body so far; None: longer than ``REPLAY_BYTES``."""
    _held_bytes: int
    _held_trailers: Fields | None
    # Attempts
    key: bytes | None
    tried: list[Backend]
    last: Backend | None
    """Asked last, for those who want to know afterwards."""
    attempts: int
    attempt_at: float
    """Seconds, as all times here."""
    leased_at: float
    flags: list[str]
    _is_waiting: bool
    """For a connection."""
    _is_queued: bool
    """For room in the pool."""
    _is_replaced: bool
    """A stale connection was replaced once."""

    def give_up(self, reason: Reason, detail: str = "") -> None:
        """There is no way left to serve this exchange: answer it, or cut it short."""
        raise NotImplementedError

    def leave(self) -> None:
        """The listener drains: what would never end by itself ends now."""

    def _send_handshake(self, stream: ClientStream, head: RequestHead) -> None:
        """Ask the backend for a tunnel, and for nothing else before it has agreed."""
        raise NotImplementedError

    # -- choosing --------------------------------------------------------------------------------------

    def _lease(self, target: Target) -> None:
        """Begin the first attempt."""
        self._target = target
        pool = target.pool
        if pool.budget is not None:
            pool.budget.deposit()
        backend = pool.pick() if not target.is_keyed else pool.pick_session(self.key)
        if backend is not None:
            self._begin(backend)
            return
        fault = pool.why_none()
        if fault is Fault.SATURATED:
            if pool.wait(self):
                self._is_queued = True
                self.flag("queued")
                return
            self.flag("queue_full")
        self.give_up(reason_of_fault(fault))

    def _take_key(self, target: Target, head: RequestHead) -> None:
        """What the target's policy goes by, from the request as the client sent it."""
        if target.cookie is not None:
            self.key = cookie_value(head, target.cookie.name)
        elif target.key_of is not None:
            self.key = target.key_of(head, self.peer)

    def session_field(self, backend: Backend) -> Field | None:
        """What binds the client's session to the backend that answered, if it is not bound to it yet."""
        target = self._target
        sessions = target.pool.sessions if target is not None else None
        if target is None or sessions is None:
            return None
        key = self.key
        if target.cookie is not None:
            token = sessions.token(backend)
            if token == key:
                return None
            if key is not None:
                self.flag("affinity_lost")
            return target.cookie.field(token)
        if key is not None:
            if sessions.bound(key) not in (None, backend):
                self.flag("affinity_lost")
            sessions.bind(key, backend)
        return None

    def on_turn(self, backend: Backend) -> None:
        self._is_queued = False
        self._begin(backend)

    def on_turn_lost(self) -> None:
        self._is_queued = False
        self.give_up(Reason.QUEUE_TIMEOUT, "no backend had room in time")

    def _begin(self, backend: Backend) -> None:
        self._backend = self.last = backend
        self.attempts += 1
        self.attempt_at = self.service.clock.now
        backend.begin()
        self._ask(backend, fresh=False)

    def _ask(self, backend: Backend, fresh: bool) -> None:
        if backend.connections is None:
            self.give_up(Reason.NO_BACKEND)
            return
        stream = backend.connections.lease(self, fresh)  # type: ignore[arg-type]  # the exchange is the sink
        if stream is not None:
            self.on_leased(stream)
        else:
            self._is_waiting = True

    @property
    def addresses(self) -> Addresses | None:
        return self.peer.addresses

    def on_leased(self, stream: ClientStream) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self.leased_at = self.service.clock.now
        self.back = stream
        self._is_back_blocked = False
        head = self._head
        if head is None:
            return
        end = self._request_end
        held = self._held
        if head.protocol is not None:
            self._send_handshake(stream, head)
        elif not held and self._held_trailers is None:
            # fast path: nothing but the head so far
            stream.send_head(head, end)
        else:
            stream.send_head(head, False)
            for chunk in held or ():
                stream.send_data(chunk, False)
            if self._held_trailers is not None:
                stream.send_trailers(self._held_trailers)
            elif end:
                stream.send_data(b"", True)
        if self._back_is_paused:
            stream.pause()  # what the client has not read of earlier answers fills its buffer already
        if (
            stream.version == b"1.1"  # it can neither be stale nor come back as not looked at (HTTP/2)
            and not stream.is_reused
            and head.protocol is None
            and not self._retry.replays
        ):
            self._held = None
        if self._front_is_paused and not self._is_back_blocked:
            self._front_is_paused = False
            self.front.resume()

    def _hold(self, chunk: bytes) -> None:
        """Keep body bytes until there is a backend, or as long as they may have to be sent again."""
        held = self._held
        if held is None:
            return
        self._held_bytes += len(chunk)
        if self._held_bytes > REPLAY_BYTES and self.back is not None:
            self._held = None
            return
        if chunk:
            held.append(chunk)
        if self.back is None:
            self._pause_front()

    def _pause_front(self) -> None:
        if not self._front_is_paused:
            self._front_is_paused = True
            self.front.pause()

    # -- trying another --------------------------------------------------------------------------------

    def on_lease_failed(self, error: UpstreamError) -> None:
        """Nothing was sent: another backend may be asked at once."""
        self._is_waiting = False
        backend = self._backend
        if backend is None or self.is_done:
            return
        backend.connect_failures += 1
        reason = reason_of_fault(error.fault)
        if error.fault is Fault.OVER_CAPACITY:
            # It is the gateway that has no sockets: no other backend would help, nor is this one to blame.
            self._leave_backend(0)
            self.give_up(reason, error.detail)
            return
        if not self._retry.on_connect or not self._try_another("connect", error.detail):
            self.give_up(reason, error.detail)

    def _try_another(self, cause: str, detail: str, status: int = 0) -> bool:
        """Begin another attempt elsewhere, if policy, budget and pool allow it.

        ``status``: what the one before answered; 0: nothing. False: nothing has changed, it goes on as it is.
        """
        target = self._target
        backend = self._backend
        if target is None or backend is None:
            return False
        pool = target.pool
        most = self._retry.attempts or min(len(pool.backends), MOST_ATTEMPTS)
        if len(self.tried) + 1 >= most:  # a stale connection that was replaced does not count
            return False
        tried = [*self.tried, backend]
        other = pool.pick_instead(self.key, tried)
        if other is None:
            return cause == "connect" and self._queue_up(pool, tried, detail)
        if cause != "connect" and pool.budget is not None and not pool.budget.withdraw():
            self.flag("budget_spent")
            return False
        self.tried = tried
        pool.retries.add(cause)
        self.flag("retry_" + cause)
        if status:
            self._credit_backend(status)
        else:
            self._fail_backend(detail)
        self._leave_backend(status)
        back, self.back = self.back, None
        if back is not None:
            back.abort(None)
        self._begin(other)
        return True

    def _queue_up(self, pool: Pool, tried: list[Backend], detail: str) -> bool:
        """Wait for another backend, where one is there and only has no room."""
        before, self.tried = self.tried, tried
        if not pool.is_full_past(tried) or not pool.wait(self):
            self.tried = before
            return False
        self._fail_backend(detail)
        self._leave_backend(0)
        self._is_queued = True
        pool.retries.add("connect")
        self.flag("retry_connect")
        self.flag("queued")
        return True

    def _can_repeat(self, stream: ClientStream | None) -> bool:
        """Whether sending the request again can do no harm, and is possible.

        Whatever is idempotent may be sent again (RFC 9110 9.2.2). Anything else only if the backend's kernel
        acknowledged none of it: then no program can have seen it.
        """
        head = self._head
        if head is None or head.protocol is not None or self._response_begun or self._has_backend_begun:
            return False
        if self._held is None:
            self.flag("body_too_long_to_retry")
            return False
        return head.method in _IDEMPOTENT or (stream is not None and not stream.was_delivered())

    def _mend(self, error: WireError, stream: ClientStream | None) -> bool:
        """The backend's connection failed before its response head: go on elsewhere, if that is allowed."""
        backend = self._backend
        if backend is None or stream is None or self._has_backend_begun:
            return False
        # A keep-alive connection that ended under us is no failure of the backend; nor is one that it takes
        # out of use, or a stream that it says it did not look at.
        is_stale = isinstance(error, UnprocessedError) or (
            isinstance(error, PeerClosedError) and stream.is_reused
        )
        if is_stale and not self._is_replaced and self._retry.on_stale and self._can_repeat(stream):
            self._is_replaced = True
            if self._target is not None:
                self._target.pool.retries.add("stale")
            self.flag("retry_stale")
            self.attempts += 1
            self.attempt_at = self.service.clock.now
            self._ask(backend, fresh=True)
            return True
        if self._retry.on_reset and self._can_repeat(stream):
            return self._try_another("reset", error.detail)
        return False

    def _time_out_attempt(self) -> None:
        """One attempt took longer than ``per_try_timeout_ms`` allows."""
        detail = "no response head within the time of one attempt"
        self._leave_queue()
        # Before there is a connection nothing was sent, so anything may be sent elsewhere.
        if (self.back is None or self._can_repeat(self.back)) and self._try_another("timeout", detail):
            return
        self.give_up(Reason.TRY_TIMEOUT, detail)

    def _credit_backend(self, status: int) -> None:
        """Tell the pool that the attempt under way was answered."""
        backend = self._backend
        if backend is not None and self._target is not None:
            pool = self._target.pool
            if status >= 500 and pool.settings.counts_5xx:
                pool.failed(backend, f"status {status}")
            else:
                backend.succeeded()
            if pool.measuring is not None:
                now = self.service.clock.now
                pool.measuring.observe(backend, now - self.attempt_at, now)

    def _fail_backend(self, cause: str) -> None:
        """Tell the pool that the attempt under way failed by its backend's fault."""
        backend = self._backend
        if backend is not None and self._target is not None:
            pool = self._target.pool
            pool.failed(backend, cause)
            if pool.measuring is not None:
                now = self.service.clock.now
                # Who refuses at once is not fast.
                pool.measuring.observe(backend, max(now - self.attempt_at, _FAILURE_S), now)

    def _leave_backend(self, status: int) -> None:
        """Count the attempt's end under the class of ``status``, 0 for none."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.responses[status // 100] += 1
            if status:
                now = self.service.clock.now
                backend.head_durations.observe(now - self.leased_at)
                backend.durations.observe(now - self.attempt_at)
            backend.end()

    def _leave_queue(self) -> None:
        """Wait no longer: neither for a connection nor for room."""
        if self._is_waiting:
            self._is_waiting = False
            if self._backend is not None and self._backend.connections is not None:
                self._backend.connections.cancel(self)  # type: ignore[arg-type]  # as above
        elif self._is_queued:
            self._is_queued = False
            if self._target is not None:
                self._target.pool.queue.leave(self)

    def flag(self, name: str) -> None:
        """Note a decision for the access log. At most a handful per exchange: attempts are bounded."""
        if self.flags is NO_FLAGS:
            self.flags = []
        if name not in self.flags:
            self.flags.append(name)


NO_RETRIES: Final = RetryPolicy()
NO_FLAGS: Final[list[str]] = []  # never appended to
