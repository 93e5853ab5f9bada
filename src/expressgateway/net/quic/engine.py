"""One QUIC connection's transport: the only door to the library, `qh3`, whose core is in Rust.

The core does packets, keys, acknowledgements, loss, congestion, streams and connection IDs; the TLS handshake
is the library's too (`tls`). Here are the things that a server in front of the internet needs otherwise:

- Credit is given when bytes are *used* (`credit`), so that backpressure reaches the one sender it is meant
  for.
- ``poll_transmit`` raises when a handshake's anti-amplification budget is used up, after it has built
  datagrams: those are kept and sent.
- Whatever the library raises - errors, and panics of its core, which are no ``Exception`` - ends this
  connection and nothing else.
- A core whose time goes backwards fails; it is given a clock that does not.

The core's events come as tuples and leave as calls of the sink, in order. ``transmit`` is to be called after
every batch of calls, ``timer`` after that. All times are seconds of one monotonic clock.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

from expressgateway.net.quic.credit import NEVER, SHORT_HEAD_BYTES
from expressgateway.net.quic.events import (
    FLOW_CONTROL_ERROR,
    PROTOCOL_VIOLATION,
    STREAM_STATE_ERROR,
    Address,
    Ended,
    SinkAndOwner,
)
from expressgateway.net.quic.opening import Opening

log = logging.getLogger(__name__)

_MIN_PATIENCE_S: Final = 0.025  # before a grant is renewed; else three round trips
_OVERHEAD_BYTES: Final = 34  # of a packet, at the least: header, tag, type and number of a stream
_OTHER_SHIFT: Final = 3  # an eighth of what is moved: further headers and frames, and bytes sent twice
_OTHER_BYTES_PER_S: Final = 32_768  # the same of small messages, and of packets that move nothing
_MAX_UNASKED: Final = 4096  # datagrams that nothing accounts for
_RESENT_SHIFT: Final = 8  # a datagram for so many bytes: four times as many as it takes if none is lost
_APPLICATION: Final = 2  # the packet number space
_STREAM_FRAME: Final = 0x8
_STREAM_DATA_BLOCKED_FRAME: Final = 0x15
_PADDING_FRAME: Final = 0x0


class Engine(Opening):
    """See the module's text. Implements ``wire.h3.transport.Transport``."""

    __slots__ = ()

    # -- the connection --------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether everything that was given to it has arrived, or nothing can any more."""
        return self._ended is not None or not (
            self._core.bytes_in_flight or self._core.get_send_buffer_size(None)
        )

    @property
    def peer_address(self) -> Address:
        """Where the peer is now: it may have moved (RFC 9000 9)."""
        address: Address = self._core.active_path[2]
        return address

    def receive(self, data: bytes, segment_bytes: int, address: Address, now: float) -> None:
        """Datagrams of one sender."""
        if self._is_over:
            return
        if now > self.now:
            self.now = now
        # as _guard does, without the call
        try:
            if self.is_open:
                # fast path: nothing but 1-RTT packets
                if len(data) == segment_bytes:
                    report = self._core.receive_datagram(data, address, self.now)
                else:
                    report = self._core.receive_gro_buffer(data, segment_bytes, address, self.now)
                self._drain_core()
                packets = report[2]
                self._unasked -= 2 * packets
                self._watch_waiting(min(len(data), packets * segment_bytes) - packets * _OVERHEAD_BYTES)
            else:
                for at in range(0, len(data), segment_bytes):
                    self._receive_handshake(data[at : at + segment_bytes], address)
        except BaseException as error:  # noqa: BLE001 - a panic of the core is no Exception
            self._fail(error)

    def _watch_waiting(self, size: int) -> None:
        """New packets brought so much, apart from headers; what was told of it is subtracted already. What
        waits for missing bytes is bounded by the core, but for each stream, and small pieces take ten times
        their size.

        Nothing tells pieces from other frames, so all frames count; what honest peers need of those is in
        proportion to the bytes moved in either direction, and to time. No packet is too small to count: a
        byte of a stream fits into the smallest.
        """
        now = self.now
        waiting = self._waiting_bytes - int((now - self._waiting_since) * _OTHER_BYTES_PER_S)
        self._waiting_since = now
        if size > 0:
            waiting += size
        self._waiting_bytes = max(waiting, 0)
        if waiting > self._most_waiting_bytes:
            self._close_transport(FLOW_CONTROL_ERROR, "too much out of order", _STREAM_FRAME)

    def _watch_unasked(self) -> None:
        """A PATH_CHALLENGE has nine bytes, and each is owed a datagram of 1200 (RFC 9000 8.2.2). What we send
        is accounted for by what was to be sent, and by packets that came."""
        if self._unasked > _MAX_UNASKED:
            self._close_transport(PROTOCOL_VIOLATION, "too much that asks for answers")

    def transmit(self, now: float, most: int) -> list[tuple[bytes, Address]]:
        """Datagrams to send now, at most about so many; more may follow."""
        out: list[tuple[bytes, Address]] = []
        if self._is_over:
            return out
        if now > self.now:
            self.now = now
        self._watch_unasked()
        if self._credit.is_due:
            # In front: of a burst that does not fit a socket's buffer, it is the end that is lost.
            self._send_credit(out)
        poll = self._core.poll_transmit
        first = len(out)
        try:
            while len(out) < most:
                sent = poll(self.now)
                if sent is None:
                    break
                out.append((sent[0], sent[1]))
        except RuntimeError as error:
            # What was built before is sent: the budget against amplification is used up, no more than that.
            if "capacity" not in str(error):
                self._fail(error)
        except BaseException as error:  # noqa: BLE001 - as in receive
            self._fail(error)
        if len(out) > first:
            self._polled += len(out) - first
            self._unasked += len(out) - first
            head = out[-1][0]
            if head[0] < 0x80:
                self._sent_head = head[:SHORT_HEAD_BYTES]
                # Every generation of keys sends something, if only the ACK without which there is no next
                # one (RFC 9001 6.1): followed here, none is missed. Two of them look the same.
                sealer = self._sealer
                if sealer is not None and self._core.send_key_phase != sealer.phase:
                    sealer.update()
        return out

    def timer(self) -> float | None:
        """When ``handle_timer`` is due; ``None``: never."""
        if self._is_over:
            return None
        timer = self._guard(self._core.get_timer)
        renew_at = self._credit.renew_at
        if timer is not None and timer[1] <= renew_at:
            at: float = timer[1]
            return at
        return renew_at if renew_at < NEVER and self._ended is None else None if timer is None else timer[1]

    def handle_timer(self, now: float) -> None:
        if self._is_over:
            return
        if now > self.now:
            self.now = now
        self._guard(self._handle_timer)

    def _handle_timer(self) -> None:
        if self._credit.renew_at <= self.now:
            self._credit.renew_lost(self.now)
        self._core.handle_timer(self.now)
        self._drain_core()

    # -- Transport -------------------------------------------------------------------------------------

    def open_stream(self, unidirectional: bool) -> int | None:
        if self._ended is not None:
            return None
        stream_id: int | None = self._guard(self._open_stream, unidirectional)
        return stream_id

    def _open_stream(self, unidirectional: bool) -> int | None:
        limits = self._core.stream_limits
        if limits[2 + unidirectional] >= limits[unidirectional]:
            return None
        stream_id: int = self._core.open_stream(unidirectional)
        return stream_id

    def send(self, stream_id: int, data: bytes, end: bool) -> None:
        if self._ended is None:
            self._waiting_bytes -= len(data) >> _OTHER_SHIFT
            self._unasked -= 1 + (len(data) >> _RESENT_SHIFT)
            try:
                self._core.send_stream(stream_id, data, end)
            except ValueError:
                pass  # the stream is gone: reset, or stopped by the peer
            except BaseException as error:  # noqa: BLE001 - as in receive
                self._fail(error)

    def reset(self, stream_id: int, code: int) -> None:
        if self._ended is None:
            self._try_stream(self._core.reset_stream, stream_id, code)

    def stop(self, stream_id: int, code: int) -> None:
        if self._ended is None:
            self._try_stream(self._core.stop_sending, stream_id, code)

    def _try_stream(self, call: Callable[[int, int], None], stream_id: int, code: int) -> None:
        try:
            call(stream_id, code)
        except ValueError:
            pass  # the stream is complete
        except BaseException as error:  # noqa: BLE001 - as in receive
            self._fail(error)

    def consumed(self, stream_id: int, size: int) -> None:
        credit = self._credit
        credit.consume(stream_id, size)
        if credit.is_due:
            self._owner.wake()

    def hold(self, size: int) -> None:
        """Bytes that were received wait for a stream that cannot go on, and are not to stop the others: the
        connection's window is open for as many more. Negative: it is over; they count again."""
        self._credit.hold(size)

    def queued(self, stream_id: int) -> int:
        if self._ended is not None:
            return 0
        return self._guard(self._core.get_send_buffer_size, stream_id) or 0

    def close(self, code: int, reason: str) -> None:
        """Close with an application's error (RFC 9000 19.19)."""
        self._end(Ended(code, reason, is_application=True, is_ours=True), None)

    def close_transport(self, code: int, reason: str) -> None:
        """Close with an error of the transport's (RFC 9000 20.1), which says nothing of the application."""
        self._close_transport(code, reason)

    def abandon(self, code: int, reason: str, errno: int = 0) -> None:
        """There is no way to the peer any more: nothing is sent or received from now on."""
        self._is_over = True
        self._tell(Ended(code, reason, is_ours=True, errno=errno))

    def release(self, nobody: SinkAndOwner) -> None:
        """It is over, or given up, and tells nobody any more."""
        self._is_over = True
        self.sink = nobody
        self._owner = nobody

    def send_datagram(self, data: bytes) -> bool:
        """A DATAGRAM frame (RFC 9221). False: the peer takes none, or none so large, or no packet does."""
        if self._ended is not None or len(data) > self._datagram_bytes:
            return False
        self._unasked -= 1
        try:
            self._core.send_datagram(data)
        except (ValueError, RuntimeError):
            return False
        except BaseException as error:  # noqa: BLE001 - as in receive
            self._fail(error)
            return False
        return True

    @property
    def room_bytes(self) -> int:
        """How much congestion control lets go now."""
        room: int = self._core.congestion_window - self._core.bytes_in_flight
        return room

    @property
    def in_flight_bytes(self) -> int:
        """What was sent and not acknowledged yet."""
        size: int = self._core.bytes_in_flight
        return size

    def ping(self) -> None:
        if self._ended is None:
            self._unasked -= 1
            self._guard(self._core.send_ping, 0)

    # -- what has happened -----------------------------------------------------------------------------

    def _drain_core(self) -> None:
        take = self._core.next_event
        sink = self.sink
        while (event := take()) is not None:
            kind = event[0]
            if kind == "stream_data":
                _, stream_id, data, end = event
                self._waiting_bytes -= len(data) + (len(data) >> _OTHER_SHIFT)
                if self._ended is not None:
                    continue
                if not self._credit.receive(stream_id, len(data), end):
                    self._close_transport(FLOW_CONTROL_ERROR, "more than was granted", _STREAM_FRAME)
                    continue
                if end:
                    self._finished.add(stream_id)
                sink.on_stream_data(stream_id, data, end)
            elif kind == "stream_finished":
                self._finished.discard(event[1])
                self._credit.forget(event[1])
            elif kind == "crypto_data":
                self._receive_crypto(event[1], event[2], event[3])
            elif self._ended is None or kind == "connection_terminated":
                self._on_rare(event)

    def _on_rare(self, event: tuple[Any, ...]) -> None:
        sink = self.sink
        match event[0]:
            case "stream_reset" if event[1] in self._finished:
                pass  # RFC 9000 3.2: all of it had come
            case "stream_reset":
                if self._credit.reset(event[1], event[3]):
                    sink.on_stream_reset(event[1], event[2])
                else:
                    self._close_transport(FLOW_CONTROL_ERROR, "more than was granted", 0x4)
            case "stop_sending":
                sink.on_stream_stop(event[1], event[2])
            case "streams_available":
                sink.on_streams_allowed()
            case "datagram":
                self._waiting_bytes -= len(event[1])
                sink.on_datagram(event[1])
            case "peer_blocked" if event[1] is not None and event[1] & 3 == 3 - self._is_client:
                # RFC 9000 19.13: of a stream on which it sends nothing
                self._close_transport(
                    STREAM_STATE_ERROR, "blocked on a stream of ours", _STREAM_DATA_BLOCKED_FRAME
                )
            case "peer_blocked":
                self._credit.renew(event[1])
            case "connection_id_issued":
                self._owner.on_cid_issued(event[1])
            case "connection_id_retired":
                self._owner.on_cid_retired(event[1])
            case "handshake_done":
                self._core.handshake_confirmed()
            case "peer_closed":
                _, is_application, code, _frame, reason = event
                self._tell(Ended(code, reason.decode("utf-8", "replace"), is_application=is_application))
            case "protocol_error":
                self._tell(Ended(event[1], event[3], is_ours=True))
            case "connection_terminated":
                self._is_over = True
                self._tell(Ended(event[1], event[3].decode("utf-8", "replace") or "silence", is_ours=True))

    # -- credit ----------------------------------------------------------------------------------------

    def _send_credit(self, out: list[tuple[bytes, Address]]) -> None:
        """Write packets of our own and have the core go on behind their numbers."""
        sealer = self._sealer
        head = self._sent_head
        if sealer is None or not self.is_open or self._ended is not None or not head:
            return
        core = self._core
        credit = self._credit
        try:
            if core.send_key_phase != sealer.phase:
                sealer.update()
            if head[1 : 1 + len(self._peer_cid)] != self._peer_cid or not self._peer_cid:
                # The peer may have issued others since, of any length (RFC 9000 5.1).
                self._peer_cid = sealer.destination_of(head, self._peer_cid_bytes, self._polled)
            address = self.peer_address
            patience_s = max(_MIN_PATIENCE_S, 3 * (core.smoothed_rtt or _MIN_PATIENCE_S))
            while credit.is_due:
                payload = credit.frames(self.now, patience_s)
                number = self._polled
                self._polled += 1
                core.restore_send_packet_number(_APPLICATION, number + 1)
                out.append((sealer.seal(self._peer_cid, number, payload), address))
        except BaseException as error:  # noqa: BLE001 - as in receive
            self._fail(error)
