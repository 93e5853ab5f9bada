"""One HTTP/3 connection: its streams, and what its shell asks of it (RFC 9114 3, 5, 8).

Theory. Each stream is in order, and no two of them are in any order to each other: a request may come
before the one that was opened before it, and a header block before the table that it refers to. What ends
a stream raises ``H3StreamError``, what ends the connection ``H3ConnectionError``; nothing else that a peer
does raises. After a connection error, or once it was left, a connection ``is_closed``: what still arrives
goes nowhere.

A stream lives in ``streams`` from its first byte until both sides have ended it and the transport has sent
our side, or one has reset it. A stream that we have given up before its peer's end is remembered until
that end comes: there are never more of them than the transport lets the peer open.

What is sent is given to the transport at once, and the shell is woken once per batch; after it has flushed
it calls ``sent``, and streams that were blocked look again.
"""

from typing import Final

from expressgateway.wire.errors import PeerClosedError, WireError
from expressgateway.wire.h2.hpack import OversizedError, Triple, list_bytes
from expressgateway.wire.h3 import frames as f
from expressgateway.wire.h3.frames import H3ConnectionError, H3StreamError
from expressgateway.wire.h3.guards import H3Guards
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.qpack import BlockedError, QpackDecoder, QpackEncoder, QpackError
from expressgateway.wire.h3.streams import H3Stream
from expressgateway.wire.h3.transport import Transport
from expressgateway.wire.shells import Shell
from expressgateway.wire.streams import CAN_RECEIVE, CLOSED

MAX_KNOWN: Final = 4  # header blocks whose meaning is kept ...
KNOWN_BYTES: Final = 1024  # ... none of them longer than this ...
KNOWN_LIST_BYTES: Final = 4096  # ... or than this when decoded
MAX_ONCE: Final = 16  # marks of blocks that came once
_REASON_BYTES: Final = 128


class H3Core:
    """See the module's text. ``H3Connection`` has the other streams, the roles are built on that."""

    __slots__ = (
        "_busy",
        "_ignored",
        "_is_awake",
        "_once",
        "_parked",
        "control_id",
        "decoder",
        "decoder_id",
        "encoder",
        "encoder_id",
        "flushed",
        "guards",
        "is_closed",
        "is_leaving",
        "limits",
        "now",
        "shell",
        "streams",
        "transport",
    )

    def __init__(self, shell: Shell[H3Stream], transport: Transport, limits: H3Limits) -> None:
        # Wiring
        self.shell = shell
        self.transport = transport
        self.limits = limits
        self.guards = H3Guards(limits)
        # Connection
        self.decoder = QpackDecoder(
            limits.qpack_table_bytes, limits.qpack_blocked_streams, limits.max_header_list_size
        )
        self.encoder = QpackEncoder()
        self.now = 0.0  # seconds, as all times here
        self.streams: dict[int, H3Stream] = {}  # at most max_concurrent_streams
        self.is_leaving = False  # GOAWAY was sent or received: no stream is opened any more
        self.is_closed = False
        self.control_id = self.encoder_id = self.decoder_id = -1  # ours; -1: not open
        self._ignored: set[int] = set()  # given up before their end; bounded by the transport's streams
        self._parked: dict[int, H3Stream] = {}  # they wait for the table: at most qpack_blocked_streams
        self._once: set[int] = set()  # at most MAX_ONCE
        # Sending
        self.flushed = 0  # how often
        self._is_awake = False  # the shell was told since
        self._busy: list[H3Stream] = []  # to be looked at after a flush; each at most once

    # -- the roles -------------------------------------------------------------------------------------

    def goaway_id(self) -> int:
        """What our GOAWAY says (RFC 9114 5.2)."""
        raise NotImplementedError

    def check_frame(self, kind: int) -> None:
        """Whether a frame that is neither DATA nor HEADERS may come on a request stream."""
        raise NotImplementedError

    def receive_other(self, stream_id: int, data: bytes, end: bool) -> None:
        """Bytes of a stream that is not in ``streams``, or is read no more."""
        raise NotImplementedError

    def reset_other(self, stream_id: int, code: int) -> None:
        """Likewise for its reset."""
        raise NotImplementedError

    def forget_blocks(self) -> None:
        """The table that header blocks refer to is another one."""

    def on_half_local(self, stream: H3Stream) -> None:
        """We have ended our side before the peer has ended its own."""

    # -- the shell's calls -----------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """The handshake is complete: open our streams (RFC 9114 6.2), tell our SETTINGS."""
        self.now = now
        transport = self.transport
        limits = self.limits
        ids = [transport.open_stream(True) for _ in range(3)]
        if None in ids:
            self.fail(
                H3ConnectionError(f.STREAM_CREATION_ERROR, "the peer allows less than three streams (6.2)")
            )
            return
        self.control_id, self.encoder_id, self.decoder_id = (each for each in ids if each is not None)
        pairs = [(f.MAX_FIELD_SECTION_SIZE, limits.max_header_list_size), *self.own_settings()]
        if limits.qpack_table_bytes:
            pairs.append((f.QPACK_MAX_TABLE_CAPACITY, limits.qpack_table_bytes))
            pairs.append((f.QPACK_BLOCKED_STREAMS, limits.qpack_blocked_streams))
        self.write(self.control_id, f.integer(f.CONTROL_STREAM) + f.settings(*pairs), False)
        self.write(self.encoder_id, f.integer(f.ENCODER_STREAM), False)
        self.write(self.decoder_id, f.integer(f.DECODER_STREAM), False)

    def own_settings(self) -> list[tuple[int, int]]:
        """Settings that only one role has."""
        return []

    def receive(self, stream_id: int, data: bytes, end: bool, now: float) -> None:
        """Take what came on a stream. Never raises."""
        if self.is_closed:
            return
        self.now = now
        try:
            try:
                stream = self.streams.get(stream_id)
                if stream is not None and CAN_RECEIVE[stream.state]:
                    stream.receive(data, end)
                else:
                    self.receive_other(stream_id, data, end)
            except H3StreamError as fault:
                self.fail_stream(fault)
            if self.decoder.out:
                self.tell_decoded()
        except H3ConnectionError as fault:
            self.fail(fault)

    def receive_reset(self, stream_id: int, code: int, now: float) -> None:
        """RESET_STREAM has come: nothing more will, of this stream. Never raises."""
        if self.is_closed:
            return
        self.now = now
        try:
            stream = self.streams.get(stream_id)
            if stream is None or not CAN_RECEIVE[stream.state]:
                self.reset_other(stream_id, code)
            elif not stream.has_end:
                stream.has_end = True
                stream.on_reset(code)
        except H3ConnectionError as fault:
            self.fail(fault)

    def receive_stop(self, stream_id: int, code: int, now: float) -> None:
        """STOP_SENDING has come. Never raises."""
        if self.is_closed:
            return
        self.now = now
        try:
            if stream_id in (self.control_id, self.encoder_id, self.decoder_id):
                raise H3ConnectionError(f.CLOSED_CRITICAL_STREAM, "a critical stream was stopped")
            stream = self.streams.get(stream_id)
            if stream is not None:
                stream.on_stop(code)
        except H3ConnectionError as fault:
            self.fail(fault)

    def receive_closed(self, error: str = "") -> None:
        """The connection is gone; ``error``: what was heard of the cause. Never raises."""
        if not self.is_closed:
            self.is_closed = True
            self._lose_all(PeerClosedError(error or "the connection was closed by its peer"))
            self.shell.close(False)

    def sent(self) -> None:
        """The shell has flushed. Call it after every flush."""
        self._is_awake = False
        self.flushed += 1
        busy = self._busy
        if busy:
            self._busy = []
            for stream in busy:
                stream.is_busy = False
            for stream in busy:
                if stream.look():
                    self.watch(stream)

    def go_away_soon(self) -> None:
        """First step of a graceful end (RFC 9114 5.2): what the peer opens meanwhile is still served."""
        if not self.is_closed and not self.is_leaving:
            self._say_goaway(self.first_goaway_id())

    def first_goaway_id(self) -> int:
        return f.MAX_REQUEST_ID

    def go_away(self) -> None:
        """Second step: streams that are open finish, then the shell is to close the connection, with
        H3_NO_ERROR and when what was given to the transport has arrived. Idempotent."""
        if self.is_closed or self.is_leaving:
            return
        self.is_leaving = True
        self._say_goaway(self.goaway_id())
        self.leave_if_done()

    def _say_goaway(self, identifier: int) -> None:
        if self.control_id >= 0:
            self.write(self.control_id, f.frame(f.GOAWAY, f.integer(identifier)), False)

    def fail(self, fault: H3ConnectionError) -> None:
        """A connection error: every stream is lost, and the connection is closed. Never raises."""
        if self.is_closed:
            return
        self.is_closed = True
        self.transport.close(fault.code, fault.detail[:_REASON_BYTES])
        if fault.event:
            self.shell.security_event(fault.event, fault.detail)
        self._lose_all(fault)
        self.shell.close(False)

    def sweep(self, now: float) -> None:
        """Find what is due: tunnels that we closed and their peers did not."""
        if self.is_closed:
            return
        self.now = now
        for stream in [each for each in self.streams.values() if each.parting_at]:
            if now >= stream.parting_at and not stream.queued:
                self.stop_stream(stream, f.NO_ERROR)
                self.close_stream(stream)

    @property
    def is_idle(self) -> bool:
        return not self.streams

    # -- writing ---------------------------------------------------------------------------------------

    def wake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            self.shell.wake()

    def write(self, stream_id: int, data: bytes, end: bool) -> None:
        if not self._is_awake:
            self._is_awake = True
            self.shell.wake()
        self.transport.send(stream_id, data, end)

    def send_block(self, stream_id: int, fields: list[Triple], end: bool) -> bytes:
        """Send a header list. Give the block that it became; empty: it cannot be repeated."""
        said, block = self.encoder.encode(stream_id, fields)
        if said:
            self.write(self.encoder_id, said, False)
        self.write(stream_id, f.frame_header(f.HEADERS, len(block)) + block, end)
        return b"" if said or block[0] else block

    def watch(self, stream: H3Stream) -> None:
        """Look at a stream after the next flush."""
        if not stream.is_busy:
            stream.is_busy = True
            self._busy.append(stream)

    def tell_decoded(self) -> None:
        """What our decoder has to say to the peer's encoder."""
        decoder = self.decoder
        if decoder.out:
            if self.decoder_id >= 0 and not self.is_closed:
                self.write(self.decoder_id, decoder.out, False)
            decoder.out = b""

    # -- header blocks ---------------------------------------------------------------------------------

    def decode(self, stream: H3Stream, block: bytes) -> list[Triple] | OversizedError:
        """Give a block's fields; an error if they are more than allowed, which is fatal if repeated. Raises
        ``BlockedError`` for one that must wait."""
        try:
            return self.decoder.decode(stream.id, block)
        except QpackError as error:
            raise H3ConnectionError(f.QPACK_DECOMPRESSION_FAILED, str(error)) from None
        except OversizedError as error:
            self.guards.on_oversized(self.now)
            return error

    def park(self, stream: H3Stream) -> None:
        """A stream waits for the table (RFC 9204 2.1.2)."""
        if len(self._parked) >= self.limits.qpack_blocked_streams:
            detail = "more streams wait for the QPACK table than may"
            raise H3ConnectionError(f.QPACK_DECOMPRESSION_FAILED, detail, "qpack_blocked_streams")
        self._parked[stream.id] = stream

    def unpark(self) -> None:
        """The table has grown: go on with the streams that waited for that."""
        for stream_id, stream in list(self._parked.items()):
            if stream_id not in self._parked:
                continue  # given up meanwhile
            fields: list[Triple] | OversizedError
            try:
                fields = self.decoder.resume(stream_id)
            except BlockedError:
                continue
            except QpackError as error:
                raise H3ConnectionError(f.QPACK_DECOMPRESSION_FAILED, str(error)) from None
            except OversizedError as error:
                self.guards.on_oversized(self.now)
                fields = error
            del self._parked[stream_id]
            try:
                stream.unpark(fields)
            except H3StreamError as fault:
                self.fail_stream(fault)

    def is_familiar(self, block: bytes, fields: list[Triple]) -> bool:
        """Whether to remember what the block just decoded means: it came before, and is small either way. An
        empty one had to wait."""
        if not block or len(block) > KNOWN_BYTES:
            return False
        mark = hash(block)
        once = self._once
        if mark in once:
            return list_bytes(fields) <= KNOWN_LIST_BYTES
        if len(once) >= MAX_ONCE:
            once.clear()
        once.add(mark)
        return False

    # -- the life of streams ---------------------------------------------------------------------------

    def finish(self, stream: H3Stream) -> None:
        """The peer's side is complete. If ours is, and sent, too, forget the stream."""
        if stream.state is CLOSED and not stream.is_busy:
            self.close_stream(stream)

    def close_stream(self, stream: H3Stream) -> None:
        """Forget a stream that is closed."""
        if self.streams.pop(stream.id, None) is None:
            return
        stream.state = CLOSED
        stream.drop()
        stream.sink = None  # or each exchange would be a cycle, left for the collector to find
        self.shell.stream_done(stream)
        if self.is_leaving:
            self.leave_if_done()

    def stop_stream(self, stream: H3Stream, code: int) -> None:
        """Read no more of a stream."""
        self.wake()
        self._parked.pop(stream.id, None)
        was_read = not CAN_RECEIVE[stream.state]
        is_open = stream.stop_reading()
        if is_open:
            self.transport.stop(stream.id, code)
            self._ignored.add(stream.id)
        if not was_read:
            self.decoder.cancel(stream.id)
            self.tell_decoded()

    def reset_stream(self, stream: H3Stream, code: int, cause: WireError | None = None) -> None:
        """End a stream at once, in both directions. Its sink is told of a ``cause``."""
        if self.streams.get(stream.id) is not stream:
            return
        self.transport.reset(stream.id, code)
        self.stop_stream(stream, code)
        stream.state = CLOSED
        if cause is not None:
            stream.on_lost(cause)
        self.close_stream(stream)

    def refuse_id(self, stream_id: int, code: int, end: bool) -> None:
        """Reset a stream that was never opened."""
        self.wake()
        self.transport.reset(stream_id, code)
        if not end:
            self.transport.stop(stream_id, code)
            self._ignored.add(stream_id)
        self.decoder.cancel(stream_id)

    def fail_stream(self, fault: H3StreamError) -> None:
        """A stream error: it is reset, and its sink is told."""
        stream = self.streams.get(fault.stream_id)
        if stream is not None:
            self.reset_stream(stream, fault.code, fault.cause)
        self.guards.on_provoked_reset(self.now)

    def _lose_all(self, error: WireError) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        self._parked.clear()
        self._busy.clear()
        for stream in streams:
            stream.state = CLOSED
            stream.drop()
            stream.on_lost(error)
            stream.sink = None
            self.shell.stream_done(stream)

    def leave_if_done(self) -> None:
        if not self.streams and not self.is_closed:
            self.is_closed = True
            self.shell.close(True)
