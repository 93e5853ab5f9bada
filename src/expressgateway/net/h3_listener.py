"""Listener ``quic``: HTTP/3, on one datagram socket of one worker.

The same life as the listeners over TCP have; accepting is the endpoint's (`quic/endpoint.py`).
"""

import asyncio
import random
from collections.abc import Iterable

from expressgateway.net.batches import BatchSocket
from expressgateway.net.facts import Told
from expressgateway.net.h3_front import H3FrontConnection
from expressgateway.net.listener import Census
from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.endpoint import EndpointSettings, QuicEndpoint, Sharing
from expressgateway.net.quic.events import Address
from expressgateway.net.quic.timers import Timers
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.forwarding import Peer, TrustedProxies
from expressgateway.proxy.service import HttpService
from expressgateway.wire.h3.limits import H3Limits


class H3Listener:
    """Swapping ``service``, ``h3_limits``, ``trusted`` and the endpoint's settings is all a reload does."""

    def __init__(
        self,
        reactor: Reactor,
        timers: Timers,
        batch: BatchSocket,
        census: Census,
        counters: ListenerCounters,
        settings: EndpointSettings,
        service: HttpService,
        h3_limits: H3Limits,
        trusted: TrustedProxies,
        sharing: Sharing,
    ) -> None:
        self.reactor = reactor
        self.counters = counters
        self.service = service
        self.h3_limits = h3_limits
        self.trusted = trusted
        self._sessions: dict[QuicConnection, H3FrontConnection] = {}  # as many as the endpoint has
        self._local = batch.local_address
        self.endpoint = QuicEndpoint(reactor, timers, batch, census, counters, settings, self._admit, sharing)

    def _admit(self, quic: QuicConnection, ip: str, address: Address) -> H3FrontConnection:
        peer = Peer(
            ip,
            ip in self.trusted,
            b"https",
            addresses=((ip, address[1]), self._local),
            began=self.reactor.now,
        )
        session = self._sessions[quic] = H3FrontConnection(self, peer, quic)
        return session

    def forget(self, quic: QuicConnection) -> None:
        """The connection is over and gone."""
        self._sessions.pop(quic, None)

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.endpoint.start()

    def stop(self, *, hands_over: bool = False) -> None:
        """No new connections; the socket stays open while there are some."""
        self.endpoint.stop(hands_over=hands_over)

    def drain(self, jitter_s: float = 0.0) -> None:
        """Ask every connection to end soon, each at a moment of its own within ``jitter_s``."""
        self.endpoint.is_draining = True
        loop = asyncio.get_running_loop()
        for quic, session in list(self._sessions.items()):
            if jitter_s:
                loop.call_later(random.uniform(0, jitter_s), self._drain_one, quic)
            else:
                session.drain()

    def _drain_one(self, quic: QuicConnection) -> None:
        session = self._sessions.get(quic)
        if session is not None:
            session.drain()

    def go_away(self) -> int:
        """End what is left now; gives how many connections that were."""
        left = self.open
        for session in list(self._sessions.values()):
            session.go_away()
        return left

    def sweep(self, now: float) -> None:
        self.endpoint.sweep(now)
        for session in list(self._sessions.values()):
            try:
                session.sweep(now)
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor
                self.reactor.fault(session.quic.wake)

    def told(self) -> Iterable[Told]:
        return self._sessions.values()

    @property
    def open(self) -> int:
        """Connections that are not over. One that was closed is kept a moment, to say so again."""
        return sum(quic.engine.ended is None for quic in self._sessions)
