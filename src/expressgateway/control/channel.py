"""The control channel: how the supervisor and one worker talk.

A *frame* is a length of 4 bytes, big-endian, and that many bytes of JSON: one object, the *message*, with its
kind under ``type``. Both ends use this module, on any event loop. What cannot be a message ends the channel,
and a channel that has ended never begins again: the worker then drains, and the supervisor replaces it.

| supervisor to worker | answer |
| --- | --- |
| ``configure`` {version, config, files: {absolute path: base64}, answers, secrets} | ``configured`` |
| ``configure`` {version, backends: {pool: [table]}, files, answers, secrets} | {version, error} |
| ``answers`` {names: {key: [[ip, port, weight]]}} | |
| ``health`` {pools: {pool: {panic, down: [id], draining: [id], ramps: {id: since}}}} | |
| ``tickets`` {listener, keys: base64} | |
| ``serve`` | ``serving`` |
| ``reopen``: the access log | |
| ``collect`` {id} | ``samples`` {id, new, places, changes, gone}, some, the last with {open: {listener: n}} |
| ``connections`` {id, limit} | ``connections`` {id, counts: {listener: {protocol: n}}, looked_at, listed} |
| ``log_level`` {level} | |
| ``ping`` {id} | ``pong`` {id} |
| ``spans_taken``, after each ``spans`` | |
| ``drain`` | ``draining`` {open: {listener: n}} every second, then ``drained`` {aborted: {listener: n}} |

A worker says ``outcomes`` {pools: {pool: {id: [good, bad, streak, cause]}}} by itself, a few times a second
at most: what its backends did since the last time; and ``spans`` {number, lines}: exchanges for a trace's
collector (``observe.spans``), the next ones when these were taken. ``error`` is null or a sentence. The
second kind of ``configure`` says what differs from the configuration that the worker has. ``samples`` name
series, ``new`` [[number, family, labels]], tell what has changed in them, and which are ``gone`` [number].
``places`` and ``changes`` are arrays of the machine's unsigned and double numbers, in base64: the series'
number times 32, plus the place in a histogram, and there the increase, or a gauge's value
(`worker.reports`). ``listed`` holds [listener, protocol, ip, port, age in seconds, requests or null, state]
for at most ``limit`` connections.

This module knows framing only: who sends what, and when, is the business of `workers` and of the worker.
"""

import asyncio
import base64
import binascii
import json
import logging
import socket
from collections import deque
from typing import Any, Final, cast

log = logging.getLogger(__name__)

Message = dict[str, Any]

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""A configuration with its certificates fits; a larger frame ends the channel."""

MAX_UNSENT_BYTES: Final = 2 * MAX_FRAME_BYTES
"""What may wait for a peer that does not read; more ends the channel."""

_MAX_WAITING: Final = 256  # messages not yet received; then reading pauses, which pushes back on the peer
_HEADER: Final = 4


class FrameError(ValueError):
    """A message that cannot be sent, or bytes that are no message. The text is a sentence."""


def encode(message: Message) -> bytes:
    """The frame of a message. Raises `FrameError` if it is too large."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(
            f"a control message of {len(body)} bytes is larger than the {MAX_FRAME_BYTES} allowed: "
            "the configuration names too much certificate material"
        )
    return len(body).to_bytes(_HEADER, "big") + body


def pack_bytes(data: bytes) -> str:
    """Bytes as they travel inside a message."""
    return base64.b64encode(data).decode("ascii")


def unpack_bytes(text: object) -> bytes:
    """The reverse of `pack_bytes`. Raises `FrameError`."""
    if not isinstance(text, str):
        raise FrameError("expected base64 in a control message")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FrameError(f"expected base64 in a control message: {error}") from None


class Decoder:
    """Bytes in, messages out. Holds at most one incomplete frame."""

    __slots__ = ("_buffer", "_need")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._need = -1  # length of the frame under way; -1 before its header

    @property
    def is_between_frames(self) -> bool:
        return not self._buffer and self._need < 0

    def feed(self, data: bytes) -> list[Message]:
        """Every message that is now complete. Raises `FrameError`; the decoder is then of no more use."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while True:
            if self._need < 0:
                if len(self._buffer) - start < _HEADER:
                    break
                self._need = int.from_bytes(self._buffer[start : start + _HEADER], "big")
                start += _HEADER
                if self._need > MAX_FRAME_BYTES:
                    raise FrameError(f"a control message of {self._need} bytes is larger than allowed")
            if len(self._buffer) - start < self._need:
                break
            messages.append(_parse(self._buffer[start : start + self._need]))
            start += self._need
            self._need = -1
        # once per call, so that many small frames in one read stay linear
        del self._buffer[:start]
        return messages


def _parse(body: bytearray) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise FrameError("a control message is not JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise FrameError("a control message is not an object with a type")
    return message


class Channel(asyncio.Protocol):
    """One end of a control channel. Made by `open`.

    `send` never blocks and never raises for a peer that is gone; that is learned from `receive`.
    """

    __slots__ = ("_decoder", "_has_ended", "_is_paused", "_messages", "_receiver", "_transport")

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._receiver: asyncio.Future[None] | None = None
        self._has_ended = False
        self._is_paused = False

    @classmethod
    async def open(cls, sock: socket.socket) -> "Channel":
        """A channel over one end of a Unix stream socket pair, which it owns from now on."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(cls, sock=sock)
        return channel

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    def send(self, message: Message) -> None:
        """Queue a message. Raises `FrameError` only if it is too large to be sent at all."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """As `send`, for a frame that several channels share."""
        transport = self._transport
        if transport is None or self._has_ended:
            return
        if transport.get_write_buffer_size() + len(frame) > MAX_UNSENT_BYTES:
            log.error("the control channel is closed: the other end does not read it")
            self.abort()
            return
        transport.write(frame)

    async def receive(self) -> Message | None:
        """The next message; None once the channel has ended and every message was taken. One caller only."""
        while not self._messages:
            if self._has_ended:
                return None
            self._receiver = asyncio.get_running_loop().create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        message = self._messages.popleft()
        if self._is_paused and len(self._messages) < _MAX_WAITING // 2 and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return message

    def close(self) -> None:
        """Send what is queued, then end."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End now; what is queued is lost."""
        self._end()
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's, so there is no checking this at run time
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._has_ended:
            return
        try:
            self._messages.extend(self._decoder.feed(data))
        except FrameError as error:
            log.error("the control channel is closed: %s", error)
            self.abort()
            return
        if len(self._messages) >= _MAX_WAITING and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        if not self._decoder.is_between_frames:
            log.warning("the control channel ended within a message")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        self._has_ended = True
        self._wake()

    def _wake(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)
