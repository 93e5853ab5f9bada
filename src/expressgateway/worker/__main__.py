"""``python -m expressgateway.worker``: started by the supervisor, never by hand.

A fresh interpreter, not a fork. It inherits its listening sockets, the counts shared with the other workers,
and one end of the control channel; everything else comes through that channel.
"""

import argparse
import asyncio
import base64
import gc
import logging
import signal
import socket
import sys
from typing import Any

import uvloop

from expressgateway.config.schema import Config
from expressgateway.control.census import Census
from expressgateway.control.channel import Channel
from expressgateway.net.tls import count_bad_sni
from expressgateway.observe.logs import configure
from expressgateway.proxy.forwarding import TrustedProxies
from expressgateway.worker.build import SnapshotError
from expressgateway.worker.memory import keep_the_heap
from expressgateway.worker.runtime import Runtime

log = logging.getLogger(__name__)

_STATUS_S = 1.0  # between two reports of a drain


class Worker:
    """The control channel's other end."""

    def __init__(self, index: int, runtime: Runtime, channel: Channel, census: Census) -> None:
        self._index = index
        self._runtime = runtime
        self._channel = channel
        self._census = census
        self._drain: asyncio.Task[None] | None = None
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Obey until the drain is over. The end of the channel is an order to drain."""
        listening = asyncio.ensure_future(self._listen())
        await self._is_over.wait()
        listening.cancel()

    async def _listen(self) -> None:
        while True:
            message = await self._channel.receive()
            if message is None:
                log.warning("the supervisor is gone: draining")
                self._begin_drain()
                return
            await self._obey(message)

    async def _obey(self, message: dict[str, Any]) -> None:
        runtime = self._runtime
        match message["type"]:
            case "configure":
                error = await self._configure(message)
                self._channel.send({"type": "configured", "version": message["version"], "error": error})
            case "tickets":
                runtime.install_tickets(message["listener"], base64.b64decode(message["keys"]))
            case "serve":
                runtime.serve()
                gc.collect()
                gc.freeze()  # what is here now stays: the collector need not look at it again
                self._channel.send({"type": "serving"})
            case "collect":
                samples: list[Any] = [
                    [family, list(labels), value] for family, labels, value in runtime.collect()
                ]
                worker = str(self._index)
                samples.append(["worker_faults", [worker], runtime.faults])
                samples.append(["worker_loop_lag_seconds", [worker], round(runtime.lag_s, 6)])
                self._channel.send(
                    {"type": "samples", "id": message["id"], "samples": samples, "open": runtime.open()}
                )
            case "ping":
                self._channel.send({"type": "pong", "id": message["id"]})
            case "drain":
                self._begin_drain()
            case unknown:
                log.error("the supervisor sent an unknown message: %s", unknown)

    async def _configure(self, message: dict[str, Any]) -> str | None:
        try:
            config = Config.model_validate(message["config"])
            files = {path: base64.b64decode(content) for path, content in message["files"].items()}
            await self._runtime.configure(config, files)
        except SnapshotError as error:
            return str(error)
        except Exception as error:
            log.exception("a configuration could not be applied: this is a defect")
            return f"unexpected {type(error).__name__}: {error}"
        runtime = config.runtime
        trusted = TrustedProxies([str(network) for network in runtime.trusted_proxies])
        self._census.set_limits(
            runtime.max_inflight_connections, runtime.per_ip_connection_cap, trusted.__contains__
        )
        return None

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_all())

    async def _drain_all(self) -> None:
        reporting = asyncio.ensure_future(self._report())
        aborted = await self._runtime.drain()
        reporting.cancel()
        self._channel.send({"type": "drained", "aborted": aborted})
        self._channel.close()
        self._is_over.set()

    async def _report(self) -> None:
        while True:
            self._channel.send({"type": "draining", "open": self._runtime.open()})
            await asyncio.sleep(_STATUS_S)


async def serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    # The terminal's Ctrl-C reaches the whole process group; only the supervisor decides what it means.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    sockets = {}
    for pair in arguments.listener:
        position, _, descriptor = pair.partition("=")
        sock = socket.socket(fileno=int(descriptor))
        sock.setblocking(False)
        sockets[int(position)] = sock
    census = Census(arguments.census, arguments.index, arguments.workers)
    channel = await Channel.open(socket.socket(fileno=arguments.channel))
    runtime = Runtime(census, sockets)
    count_bad_sni(lambda: None)
    await Worker(arguments.index, runtime, channel, census).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="expressgateway.worker")
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--census", type=int, required=True)
    parser.add_argument("--listener", action="append", default=[], metavar="POSITION=FD")
    arguments = parser.parse_args()
    configure(f"worker {arguments.index}")
    keep_the_heap()
    gc.set_threshold(20_000, 20, 50)  # traffic makes few cycles; look for them less often
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
