"""A worker process: the other end of the control channel.

A fresh interpreter, not a fork. It inherits the tables shared with the other workers, one end of the control
channel, and one of a socket by which descriptors come, its listening sockets among them; everything else
comes through the channel.
"""

import argparse
import asyncio
import base64
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvloop

from expressgateway.config.pools import Backend
from expressgateway.config.schema import Config
from expressgateway.control.census import MAX_WORKERS, Census
from expressgateway.control.channel import Channel
from expressgateway.control.notify import keeps_sockets
from expressgateway.control.parcels import INSTEAD, LASTING, LISTENER, WRITER, receive
from expressgateway.net.quic.handover import Handover
from expressgateway.net.quic.sharing import QuicSharing
from expressgateway.net.quic.spares import Spares
from expressgateway.net.tls import count_bad_sni
from expressgateway.observe.counters import Sample
from expressgateway.observe.logs import configure, set_level
from expressgateway.observe.stacks import tell_on
from expressgateway.proxy.forwarding import TrustedProxies
from expressgateway.upstream.discovery import read_answers
from expressgateway.upstream.pool import Standing
from expressgateway.worker.build_pools import SnapshotError
from expressgateway.worker.memory import keep_the_heap
from expressgateway.worker.options import add_options
from expressgateway.worker.reports import Reporter, Source
from expressgateway.worker.rights import give_up
from expressgateway.worker.runtime import Runtime

log = logging.getLogger(__name__)

_STATUS_S = 1.0  # between two reports of a drain


class Worker:
    """The control channel's other end."""

    def __init__(
        self,
        slot: int,
        runtime: Runtime,
        channel: Channel,
        census: Census,
        sharing: QuicSharing | None = None,
        parcels: socket.socket | None = None,
    ) -> None:
        self._slot = slot
        self._runtime = runtime
        self._channel = channel
        self._census = census
        self._sharing = sharing
        self._parcels = parcels
        self._drain: asyncio.Task[None] | None = None
        self._is_over = asyncio.Event()
        self._config: Config | None = None
        self._files: dict[str, bytes] = {}
        self._reporter = Reporter(self._sources, channel.send, lambda: {"open": runtime.open()})
        runtime.report_to(channel.send)

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
                is_moving = self._sharing is not None and self._sharing.is_moving
                keeps = keeps_sockets(os.environ)
                self._begin_drain("hand_over" if is_moving else "keep" if keeps else "close")
                return
            try:
                await self._obey(message)
            except Exception:
                # Somebody else's policy may raise anything; a worker that no longer listens is no worker.
                log.exception("the supervisor's message %r failed: this is a defect", message["type"])

    async def _obey(self, message: dict[str, Any]) -> None:
        runtime = self._runtime
        match message["type"]:
            case "sockets":
                self._take_sockets()
            case "seats":
                self._seat(message["live"], bool(message["moving"]))
                self._channel.send({"type": "seated", "id": message["id"]})
            case "configure":
                error = self._configure(message)
                self._channel.send({"type": "configured", "version": message["version"], "error": error})
            case "commit":
                runtime.commit(message["handed"])
            case "answers":
                runtime.set_answers(read_answers(message["names"]))
            case "health":
                runtime.judge({name: _standing(said) for name, said in message["pools"].items()})
            case "tickets":
                runtime.install_tickets(message["listener"], base64.b64decode(message["keys"]))
            case "serve":
                runtime.serve()
                gc.collect()
                gc.freeze()  # what is here now stays: the collector need not look at it again
                self._channel.send({"type": "serving"})
            case "collect":
                self._reporter.ask(message["id"])
            case "reopen":
                runtime.access_log.reopen()
            case "connections":
                told = runtime.told(int(message["limit"]))
                self._channel.send({"type": "connections", "id": message["id"], **told})
            case "log_level":
                set_level(message["level"])
            case "spans_taken":
                runtime.spans.taken()
            case "ping":
                self._channel.send({"type": "pong", "id": message["id"]})
            case "drain":
                self._begin_drain(message["sockets"])
            case unknown:
                log.error("the supervisor sent an unknown message: %s", unknown)

    def _take_sockets(self) -> None:
        """Descriptors have come."""
        if self._parcels is None:
            return
        for label, fd in receive(self._parcels):
            kind, _, number = label.partition(" ")
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            if kind in (LISTENER, LASTING):
                self._runtime.give(int(number), sock, is_lasting=kind == LASTING)
            elif kind == INSTEAD:
                self._runtime.leave_group(int(number), sock)
            elif kind == WRITER and self._sharing is not None:
                self._sharing.connect(int(number), sock)
            else:
                sock.close()

    def _seat(self, live: list[int], is_moving: bool) -> None:
        self._census.set_live(sorted(live))
        if self._sharing is not None:
            self._sharing.seat_all(live, is_moving)

    def _sources(self) -> Iterator[Source]:
        yield from self._runtime.sources()
        yield self, None, self._collect

    def _collect(self) -> Iterator[Sample]:
        labels = (str(self._slot),)
        yield "worker_faults", labels, self._runtime.faults
        yield "worker_loop_lag_seconds", labels, round(self._runtime.lag_s, 6)

    def _configure(self, message: dict[str, Any]) -> str | None:
        try:
            config, files = self._read(message)
            secrets = {name: base64.b64decode(secret) for name, secret in message["secrets"].items()}
            self._runtime.configure(
                config, files, secrets, read_answers(message["answers"]), message.get("numbers")
            )
        except SnapshotError as error:
            return str(error)
        except Exception as error:
            log.exception("a configuration could not be applied: this is a defect")
            return f"unexpected {type(error).__name__}: {error}"
        self._config, self._files = config, files
        runtime = config.runtime
        trusted = TrustedProxies([str(network) for network in runtime.trusted_proxies])
        self._census.set_limits(
            runtime.max_inflight_connections, runtime.per_ip_connection_cap, trusted.__contains__
        )
        return None

    def _read(self, message: dict[str, Any]) -> tuple[Config, dict[str, bytes]]:
        """The snapshot, whole or as what differs from the one before."""
        files = {path: base64.b64decode(content) for path, content in message["files"].items()}
        if "backends" in message:
            if self._config is None:
                raise SnapshotError("there is no configuration to be changed yet")
            config = self._config
            for pool, backends in message["backends"].items():
                config = config.with_backends(pool, tuple(_backend(each) for each in backends))
            return config, {**self._files, **files}
        # The supervisor has checked every rule, and allows run-time changes what a file may not have.
        return Config.model_validate(message["config"], context={"rules_later": True}), files

    def _begin_drain(self, sockets: str) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_all(sockets))

    async def _drain_all(self, sockets: str) -> None:
        reporting = asyncio.ensure_future(self._report())
        aborted = await self._runtime.drain(sockets)
        reporting.cancel()
        self._channel.send({"type": "drained", "aborted": aborted})
        self._channel.close()
        self._is_over.set()

    async def _report(self) -> None:
        while True:
            self._channel.send({"type": "draining", "open": self._runtime.open()})
            await asyncio.sleep(_STATUS_S)


def _standing(said: dict[str, Any]) -> Standing:
    return Standing(
        down=frozenset(said["down"]),
        draining=frozenset(said["draining"]),
        ramps={str(id_): float(since) for id_, since in said["ramps"].items()},
        is_panicking=bool(said["panic"]),
    )


def _backend(given: dict[str, Any]) -> Backend:
    return Backend.model_validate(given, context={"rules_later": True})


async def serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    # The terminal's Ctrl-C reaches the whole process group; only the supervisor decides what it means.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    seat: int = arguments.seat
    census = Census(arguments.census, seat, MAX_WORKERS)
    os.close(arguments.census)
    spares = Spares(arguments.spares, seat, MAX_WORKERS)
    os.close(arguments.spares)
    channel = await Channel.open(socket.socket(fileno=arguments.channel))
    parcels = socket.socket(fileno=arguments.parcels)
    sharing = QuicSharing(seat, spares, Handover(socket.socket(fileno=arguments.reader), {}))
    runtime = Runtime(census, {}, sharing)
    count_bad_sni(lambda: None)
    await Worker(arguments.slot, runtime, channel, census, sharing, parcels).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="expressgateway.worker")
    add_options(parser)
    arguments = parser.parse_args()
    configure(f"worker {arguments.slot}")
    tell_on(arguments.stacks)
    if os.geteuid() != 0:  # root is root: `runtime.user` says that workers are not to be
        give_up()
    keep_the_heap()
    gc.set_threshold(20_000, 20, 50)  # traffic makes few cycles; look for them less often
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(arguments))
    return 0
