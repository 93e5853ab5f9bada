"""Frames and channels: whole, split, oversized, garbled, and with a peer that does not read."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.control import channel as module
from expressgateway.control.channel import (
    MAX_FRAME_BYTES,
    Channel,
    Decoder,
    FrameError,
    Message,
    encode,
    pack_bytes,
    unpack_bytes,
)

MESSAGES: list[Message] = [
    {"type": "serve"},
    {"type": "tickets", "listener": "wéb", "keys": pack_bytes(os.urandom(80))},
    {"type": "samples", "id": 3, "samples": [["connections", ["web"], 7]], "open": {}},
]


class TestFrames:
    def test_split_at_every_byte(self) -> None:
        wire = b"".join(map(encode, MESSAGES))
        for cut in range(len(wire) + 1):
            decoder = Decoder()
            assert decoder.feed(wire[:cut]) + decoder.feed(wire[cut:]) == MESSAGES
            assert decoder.is_between_frames

    def test_byte_by_byte(self) -> None:
        decoder = Decoder()
        found = [message for byte in encode(MESSAGES[1]) for message in decoder.feed(bytes([byte]))]
        assert found == [MESSAGES[1]]

    @pytest.mark.parametrize(
        "wire",
        [
            (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
            b"\0\0\0\0",
            b"\0\0\0\2[]",
            b"\0\0\0\2{}",
            b"\0\0\0\x0a" + b'{"type":1}',
            b"\0\0\0\3\xff\xfe\xfd",
            b"\0\0\x27\x10" + b"[" * 10000,
        ],
    )
    def test_no_message(self, wire: bytes) -> None:
        with pytest.raises(FrameError):
            Decoder().feed(wire)

    @given(st.binary(max_size=64))
    def test_garbage_raises_nothing_else(self, wire: bytes) -> None:
        try:
            Decoder().feed(wire)
        except FrameError:
            pass

    def test_too_large_to_send(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_FRAME_BYTES", 100)
        with pytest.raises(FrameError, match="too much certificate material"):
            encode({"type": "configure", "files": "x" * 100})

    def test_bytes(self) -> None:
        assert unpack_bytes(pack_bytes(b"\0\xff")) == b"\0\xff"
        for wrong in ("!", "YQ", 3, None):
            with pytest.raises(FrameError):
                unpack_bytes(wrong)


def pair(talk: Callable[[Channel, Channel], Awaitable[None]]) -> None:
    async def main() -> None:
        one, other = socket.socketpair()
        left, right = await Channel.open(one), await Channel.open(other)
        async with asyncio.timeout(30):
            await talk(left, right)
        left.abort()
        right.abort()

    asyncio.run(main())


class TestChannel:
    def test_messages_in_order_then_the_end(self) -> None:
        async def talk(left: Channel, right: Channel) -> None:
            for message in MESSAGES:
                left.send(message)
            left.close()
            assert [await right.receive() for _ in MESSAGES] == MESSAGES
            assert await right.receive() is None
            assert await right.receive() is None
            assert right.has_ended
            right.send({"type": "pong"})  # nobody is there; not an error

        pair(talk)

    def test_receiver_that_waits_is_woken_by_the_end(self) -> None:
        async def talk(left: Channel, right: Channel) -> None:
            waiting = asyncio.ensure_future(right.receive())
            await asyncio.sleep(0)
            left.abort()
            assert await waiting is None

        pair(talk)

    def test_garbage_ends_it(self) -> None:
        async def main() -> None:
            raw, other = socket.socketpair()
            channel = await Channel.open(other)
            raw.send(encode(MESSAGES[0]))
            assert await channel.receive() == MESSAGES[0]
            raw.send(b"\xff\xff\xff\xff")
            assert await channel.receive() is None
            raw.close()

        asyncio.run(main())

    def test_frame_of_megabytes(self) -> None:
        async def talk(left: Channel, right: Channel) -> None:
            left.send({"type": "configure", "files": "x" * 8_000_000})
            message = await right.receive()
            assert message is not None
            assert len(message["files"]) == 8_000_000

        pair(talk)

    def test_peer_that_does_not_read_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_UNSENT_BYTES", 1_000_000)

        async def main() -> None:
            raw, other = socket.socketpair()
            channel = await Channel.open(other)
            sent = 0
            while not channel.has_ended:
                channel.send({"type": "configure", "files": "x" * 100_000})
                sent += 1
                assert sent < 100
            assert await channel.receive() is None
            raw.close()

        asyncio.run(main())

    def test_receiver_that_is_slow_pushes_back(self) -> None:
        async def talk(left: Channel, right: Channel) -> None:
            for number in range(20_000):
                left.send({"type": "ping", "id": number, "pad": "x" * 100})
            for _ in range(1000):
                await asyncio.sleep(0)  # all that can come has come
            most = len(right._messages)
            for number in range(20_000):
                message = await right.receive()
                assert message is not None
                assert message["id"] == number
                most = max(most, len(right._messages))
            assert most < 4000  # what one read brings beyond the mark, never all of it

        pair(talk)
