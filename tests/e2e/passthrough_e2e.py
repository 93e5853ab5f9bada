"""What the end-to-end tests of Mode A have in common."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.e2e import harness
from tests.e2e.quic_world import Client, Server, bytes_of, digest_of

MEGABYTE = 1_000_000
QUICK = "drain_timeout_ms = 100"
"""Flows do not end by themselves: stopping takes the whole time."""


def Gateway(  # noqa: N802 - stands for it
    directory: Path, text: str, workers: int = 1, runtime: str = QUICK
) -> harness.Gateway:
    return harness.Gateway(directory, text, workers=workers, runtime=runtime)


LABELS = {"listener": "passthrough"}


def passthrough(port: int, *servers: Server | str, more: str = "") -> str:
    backends = ", ".join(f'"{each if isinstance(each, str) else each.address}"' for each in servers)
    return f"[passthrough]\nbind_addr = '127.0.0.1:{port}'\nbackends = [{backends}]\n{more}\n"


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


async def is_whole(one: Client, size: int = MEGABYTE) -> None:
    data = bytes_of(size)
    assert (await one.ask(b"put\n" + data)).decode() == digest_of(data)
    assert await one.ask(b"get %d\n" % size) == data


def quic_initial(dcid: bytes, token: bytes = b"", size: int = 1200, version: int = 1) -> bytes:
    """By its public header an Initial of a client; the rest is nothing."""
    head = b"\xc0" + version.to_bytes(4, "big") + bytes((len(dcid),)) + dcid + b"\x02\xaa\xbb"
    head += (0x4000 | len(token)).to_bytes(2, "big") + token
    left = size - len(head) - 2
    return head + (0x4000 | left).to_bytes(2, "big") + bytes(left)


async def until(claim: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not claim():  # noqa: ASYNC110 - the claims are about another process
            await asyncio.sleep(0.01)
