"""One HTTP/2 connection: its state, its streams, and what its shell asks of it (RFC 9113 3, 5).

Theory. Frames come in order and are handled in order; each handler reads its payload in place. What ends a
stream raises ``H2StreamError``, what ends the connection ``H2ConnectionError``; nothing else that a peer does
raises. After a connection error, or once it was left, a connection ``is_closed``: what still arrives goes
nowhere.

A stream lives in ``streams`` until both sides have ended it, or one has reset it. Of the ones before, only
the latest resets are remembered: what arrives for a stream that we reset was sent before the peer knew
(5.1), and is read for its effect on the connection only.

Sending. Frames go to ``out``, which the shell takes with ``take_out`` once per batch of events. DATA that
does not fit into the windows, or that the socket does not take (``congested``), waits in its stream;
streams that may send take turns, a frame each. Control frames never wait.

The connection's own receive window is granted again as soon as DATA is read, whatever becomes of it: one
exchange that is paused must not hold up its siblings. What bounds memory is the streams' windows.
"""

from collections import deque
from typing import Final

from expressgateway.wire.errors import PeerClosedError, WireError
from expressgateway.wire.h2 import frames as f
from expressgateway.wire.h2.flow import ReceiveWindow
from expressgateway.wire.h2.frame_reader import FrameReader
from expressgateway.wire.h2.frames import H2ConnectionError, H2StreamError
from expressgateway.wire.h2.guards import Guards
from expressgateway.wire.h2.hpack import HpackDecoder, HpackEncoder, Triple, list_bytes
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.wire.h2.streams import H2Stream
from expressgateway.wire.shells import Shell
from expressgateway.wire.streams import CLOSED

QUANTUM_BYTES: Final = 262_144  # of queued bodies, given to the socket at once
MAX_RESETS: Final = 256  # streams reset lately that are remembered
MAX_KNOWN: Final = 4  # header blocks whose meaning is kept ...
KNOWN_BYTES: Final = 1024  # ... none of them longer than this ...
KNOWN_LIST_BYTES: Final = 4096  # ... or than this when decoded
MAX_ONCE: Final = 16  # marks of blocks that came once
PING_PAYLOAD: Final = b"exprgate"


class H2Core(FrameReader):
    """See the module's text. ``H2Connection`` has the handlers, ``H2Server`` and ``H2Client`` the roles."""

    __slots__ = (
        "_block",
        "_block_bytes",
        "_block_flags",
        "_block_id",
        "_heard_at",
        "_is_acknowledged",
        "_once",
        "_ping_at",
        "_resets",
        "_settings_at",
        "decoder",
        "encoder",
        "flushed",
        "frame_bytes",
        "granted_window",
        "growth_left",
        "guards",
        "initial_window",
        "is_congested",
        "is_leaving",
        "limits",
        "out",
        "received",
        "send_window",
        "shell",
        "streams",
        "turns",
    )

    def __init__(self, shell: Shell[H2Stream], limits: H2Limits) -> None:
        super().__init__()
        # Wiring
        self.shell = shell
        self.limits = limits
        self.guards = Guards(limits)
        # Connection
        self.decoder = HpackDecoder()
        self.encoder = HpackEncoder()
        self.streams: dict[int, H2Stream] = {}  # at most max_concurrent_streams
        self.is_leaving = False  # GOAWAY was sent or received: no stream is opened any more
        self._resets: dict[int, bool] = {}  # at most MAX_RESETS; whether it was we who reset it
        self._heard_at = 0.0  # seconds, as all times here
        self._ping_at = 0.0  # 0: none is under way
        self._settings_at = 0.0
        self._is_acknowledged = False  # our SETTINGS
        # Sending
        self.out: list[bytes] = []  # bounded by QUANTUM_BYTES, the guards and one batch of the exchanges
        self.flushed = 0  # how often it was taken
        self.send_window = f.DEFAULT_WINDOW
        self.initial_window = f.DEFAULT_WINDOW  # of streams, from the peer's SETTINGS
        self.frame_bytes = f.FRAME_BYTES
        self.is_congested = False
        self.turns: deque[H2Stream] = deque()  # those that may send; each at most once
        # Receiving
        self.received = ReceiveWindow(f.DEFAULT_WINDOW, 0.0)
        self.granted_window = f.DEFAULT_WINDOW  # of streams; ours from the SETTINGS ack on (6.9.2)
        self.growth_left = limits.max_connection_window
        self._block: list[bytes] = []  # fragments: at most max_header_list_size in all
        self._block_bytes = 0
        self._once: set[int] = set()  # at most MAX_ONCE
        self._block_flags = 0
        self._block_id = 0

    # -- the roles -------------------------------------------------------------------------------------

    def is_idle_id(self, stream_id: int) -> bool:
        """Whether no stream of this id was opened yet, or ever can be (5.1.1)."""
        raise NotImplementedError

    def last_processed(self) -> int:
        """What our GOAWAY says (6.8)."""
        raise NotImplementedError

    def on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        """A whole header block."""
        raise NotImplementedError

    def on_half_local(self, stream: H2Stream) -> None:
        """We have ended our side before the peer has ended its own."""

    def on_setting(self, number: int, value: int) -> None:
        """A setting that only one role cares for."""

    def on_settings_done(self) -> None:
        """The peer's settings hold."""

    def on_peer_leaving(self, last_id: int, code: int) -> None:
        """GOAWAY has come. A server need not act on it: its client closes when it is done."""

    def forget_blocks(self) -> None:
        """The table that header blocks refer to is another one."""

    def forget_encoded(self) -> None:
        """Likewise for the blocks that we send."""

    # -- the shell's calls -----------------------------------------------------------------------------

    def _begin(self, *settings: tuple[int, int]) -> None:
        """Our SETTINGS, and credit for the connection."""
        limits = self.limits
        self.write(
            f.settings(
                *settings,
                (f.INITIAL_WINDOW_SIZE, limits.stream_window),
                (f.MAX_HEADER_LIST_SIZE, limits.max_header_list_size),
            )
        )
        more = limits.connection_window - f.DEFAULT_WINDOW
        if more:
            self.received.resize(more)
            self.write(f.window_update(0, more))

    def receive_data(self, data: bytes, now: float) -> None:
        """Take what the peer sent. Never raises."""
        if self.is_closed:
            return
        self.now = self._heard_at = now
        try:
            self.read(data)
        except H2ConnectionError as fault:
            self.fail(fault)

    def receive_eof(self) -> None:
        """The peer ended its sending side. Never raises."""
        self.receive_reset("the connection was closed by its peer")

    def receive_reset(self, detail: str = "") -> None:
        """The connection is gone; ``detail``: what was heard of the cause. Never raises."""
        if not self.is_closed:
            self.is_closed = True
            self._lose_all(PeerClosedError(detail or "the connection was reset by its peer"))
            self.shell.close(False)

    def take_out(self) -> list[bytes]:
        """Give what is to be written, bodies that waited included. Call it for every flush."""
        budget = QUANTUM_BYTES
        while self.turns and budget > 0 and self.send_window > 0 and not self.is_congested:
            budget -= self._take_turn()
        out = self.out
        self.out = []
        self.flushed += 1
        if self.turns and budget <= 0 and self.send_window > 0 and not self.is_congested:
            self.shell.wake()
        return out

    def congested(self) -> None:
        """The socket's backlog has passed its high mark: no more DATA."""
        self.is_congested = True

    def drained(self) -> None:
        """It is below the low mark again."""
        self.is_congested = False
        if self.turns:
            self.shell.wake()

    def is_familiar(self, block: bytes, fields: list[Triple]) -> bool:
        """Whether to remember what the block just decoded means: it came before, and is small either way."""
        if self.decoder.has_changed or len(block) > KNOWN_BYTES:
            return False
        mark = hash(block)
        once = self._once
        if mark in once:
            return list_bytes(fields) <= KNOWN_LIST_BYTES
        if len(once) >= MAX_ONCE:
            once.clear()
        once.add(mark)
        return False

    def go_away_soon(self) -> None:
        """First step of a graceful end (6.8): what the peer opens meanwhile is still served."""
        if not self.is_closed:
            self.write(f.goaway(f.MAX_ID, f.NO_ERROR))

    def go_away(self, code: int = f.NO_ERROR, detail: str = "") -> None:
        """Second step: streams that are open finish, then the connection closes. Idempotent."""
        if self.is_closed or self.is_leaving:
            return
        self.is_leaving = True
        self.write(f.goaway(self.last_processed(), code, detail))
        self._leave_if_done()

    def fail(self, fault: H2ConnectionError) -> None:
        """A connection error: GOAWAY, every stream is lost, and the connection closes. Never raises."""
        if self.is_closed:
            return
        self.is_closed = True
        self._held.clear()
        self._block.clear()
        self.write(f.goaway(self.last_processed(), fault.code, fault.detail))
        if fault.event:
            self.shell.security_event(fault.event, fault.detail)
        self._lose_all(fault)
        self.shell.close(True)

    def sweep(self, now: float) -> None:
        """Find what is due: an answer to our SETTINGS, a sign of life."""
        if self.is_closed:
            return
        self.now = now
        limits = self.limits
        if not self._settings_at:
            self._settings_at = now
            self._heard_at = self._heard_at or now
        if not self._is_acknowledged and now - self._settings_at > limits.keep_alive_timeout_s:
            self.fail(H2ConnectionError(f.SETTINGS_TIMEOUT, "SETTINGS were not acknowledged in time"))
        elif self._ping_at and self._heard_at <= self._ping_at:
            if now - self._ping_at > limits.keep_alive_timeout_s:
                self._die()
        elif limits.keep_alive_interval_s and now - self._heard_at > limits.keep_alive_interval_s:
            self._ping_at = now
            self.write(f.frame(f.PING, 0, 0, PING_PAYLOAD))
        else:
            self._ping_at = 0.0
        for stream in [each for each in self.streams.values() if each.parting_at]:
            if now >= stream.parting_at and not stream.queued:
                self.reset_stream(stream, f.NO_ERROR)

    @property
    def is_mid_head(self) -> bool:
        """Whether a header block has begun that is not complete."""
        held = self._held
        if self._table is self.ONLY_CONTINUATION:
            return True
        return len(held) > 3 and held[3] in (f.HEADERS, f.CONTINUATION)

    def _die(self) -> None:
        """The peer does not answer: nothing that we say is heard."""
        self.is_closed = True
        self._lose_all(PeerClosedError("the peer does not answer a PING"))
        self.shell.close(False)

    # -- writing ---------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self.out:
            self.shell.wake()
        self.out.append(data)

    def send_block(self, stream_id: int, fields: list[Triple], end: bool) -> bytes:
        """Send a header list. Give the block that it became."""
        block: bytes = self.encoder.encode(fields)
        self.forget_encoded()
        self.write(f.header_frames(stream_id, block, end, self.frame_bytes))
        return block

    def want_turn(self, stream: H2Stream) -> None:
        """A stream has something to send. Its turn comes when its window allows it."""
        if not stream.is_waiting and stream.window > 0:
            stream.is_waiting = True
            self.turns.append(stream)
            if not self.out and self.send_window > 0 and not self.is_congested:
                self.shell.wake()

    def _take_turn(self) -> int:
        stream = self.turns.popleft()
        stream.is_waiting = False
        sent = stream.send_frame()
        if stream.can_take_turn() and not stream.is_waiting:
            stream.is_waiting = True
            self.turns.append(stream)
        return sent

    # -- the life of streams ---------------------------------------------------------------------------

    def close_stream(self, stream: H2Stream) -> None:
        """Forget a stream that is closed."""
        if self.streams.pop(stream.id, None) is None:
            return
        self.growth_left += stream.has_grown_by
        stream.drop_queue()
        if stream.is_waiting:
            self.turns.remove(stream)
            stream.is_waiting = False
        stream.sink = None  # or each exchange would be a cycle, left for the collector to find
        self.shell.stream_done(stream)
        if self.is_leaving:
            self._leave_if_done()

    def reset_stream(self, stream: H2Stream, code: int, cause: WireError | None = None) -> None:
        """End a stream by RST_STREAM. Its sink is told of a ``cause``."""
        if stream.state is CLOSED:
            return
        stream.state = CLOSED
        self.remember_reset(stream.id, True)
        self.write(f.rst_stream(stream.id, code))
        if cause is not None:
            stream.on_lost(cause)
        self.close_stream(stream)

    def refuse_id(self, stream_id: int, code: int) -> None:
        """Reset a stream that was never opened."""
        self.remember_reset(stream_id, True)
        self.write(f.rst_stream(stream_id, code))

    def remember_reset(self, stream_id: int, is_ours: bool) -> None:
        resets = self._resets
        resets[stream_id] = is_ours
        if len(resets) > MAX_RESETS:
            del resets[next(iter(resets))]

    def was_reset_by_us(self, stream_id: int) -> bool | None:
        """``None``: not reset, or too long ago."""
        return self._resets.get(stream_id)

    def fail_stream(self, fault: H2StreamError) -> None:
        """A stream error: RST_STREAM, and its sink is told."""
        stream = self.streams.get(fault.stream_id)
        if stream is None:
            self.refuse_id(fault.stream_id, fault.code)
        else:
            self.reset_stream(stream, fault.code, fault.cause)
        self.guards.on_provoked_reset(self.now)

    def _lose_all(self, error: WireError) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        self.turns.clear()
        for stream in streams:
            stream.state = CLOSED
            stream.drop_queue()
            stream.on_lost(error)
            self.shell.stream_done(stream)

    def _leave_if_done(self) -> None:
        if not self.streams and not self.is_closed:
            self.is_closed = True
            self.shell.close(True)
