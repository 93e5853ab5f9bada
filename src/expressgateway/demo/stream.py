"""What the demo's TCP servers have in common: listen, keep track of connections, end them all."""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["StreamServer"]

MAX_CONNECTIONS: Final = 4096  # more are closed unheard
CLOSE_TIMEOUT_S: Final = 30.0  # for the last bytes to leave


class StreamServer:
    """Listens on one address and runs `serve` for each connection until it is closed."""

    def __init__(self, *, limit_bytes: int = 65536) -> None:
        self._limit_bytes = limit_bytes  # for a reader's `readuntil`
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()  # at most MAX_CONNECTIONS

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) it listens on."""
        if self._server is None:
            raise RuntimeError("the server is not started")
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""
        self._server = await asyncio.start_server(
            self._run, host, port, limit=self._limit_bytes, backlog=1024
        )

    async def close(self) -> None:
        """Stop listening and end every connection. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. When it returns, what was written still leaves; when it raises, nothing more
        does.
        """
        raise NotImplementedError

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What goes wrong with a connection ends it, and nothing else."""
        task = asyncio.current_task()
        if task is None or len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            await self.serve(reader, writer)
            writer.close()
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # gone, silent, or out of bounds amid a body: there is nobody to tell
        except asyncio.CancelledError:
            pass  # only `close` cancels; passed on, asyncio would report it as an error
        finally:
            self._connections.discard(task)
            # Nothing to do after an orderly end; after any other, a reset tells the truth.
            writer.transport.abort()
