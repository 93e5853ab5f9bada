"""Listeners ``quic`` with ``raw_proxy`` (Mode B): each client's connection ends here and another one begins.

Streams and datagrams are relayed, whatever is spoken on them: `quic_relay`, `relay_streams`,
`relay_datagrams`.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from expressgateway.l4.quic_relay import QuicRelay, RelaySettings, RelaySide
from expressgateway.l4.relay_streams import FIRST_BYTES, STREAM_BYTES
from expressgateway.net.batches import BatchSocket
from expressgateway.net.facts import Told
from expressgateway.net.listener import Census
from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.endpoint import EndpointSettings, QuicEndpoint, Sharing
from expressgateway.net.quic.events import Address
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import Grants
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.upstream.backend import BackendSettings
from expressgateway.upstream.pool import Pool

CONNECTION_BYTES: Final = 4 * STREAM_BYTES
DATAGRAM_BYTES: Final = 1191
"""The largest DATAGRAM frame: what fits into a packet of ours, whatever connection ID the other side has."""


def relay_grants(max_streams: int, idle_timeout_s: float, udp_payload_bytes: int) -> Grants:
    """What either side is told that it may do; ``udp_payload_bytes``: the largest datagram it may send."""
    return Grants(
        stream_bytes=STREAM_BYTES,
        first_bytes=FIRST_BYTES,
        connection_bytes=CONNECTION_BYTES,
        streams=max_streams,
        unidirectional=max_streams,
        datagram_bytes=DATAGRAM_BYTES,
        idle_timeout_s=idle_timeout_s,
        udp_payload_bytes=udp_payload_bytes,
    )


def relay_diallers(
    reactor: Reactor,
    timers: Timers,
    connect_timeout_s: float,
    alpn: Sequence[str],
    grants: Grants,
    backends: Sequence[BackendSettings],
) -> dict[str, QuicDialler]:
    """One for each application protocol that clients are offered, with every backend's TLS settings.

    Raises ``ValueError`` if one of those cannot be used.
    """
    made = {name: QuicDialler(reactor, timers, connect_timeout_s, [name], grants) for name in alpn}
    for dialler in made.values():
        for backend in backends:
            dialler.context_for(backend)
    return made


class QuicRelayListener:
    """One datagram socket of one worker. ``pool``, ``settings`` and ``endpoint.settings`` may be swapped at
    any time; relays keep what they began with. Implements ``RelayHost``."""

    def __init__(
        self,
        reactor: Reactor,
        timers: Timers,
        batch: BatchSocket,
        census: Census,
        counters: ListenerCounters,
        endpoint_settings: EndpointSettings,
        sharing: Sharing,
        pool: Pool,
        settings: RelaySettings,
    ) -> None:
        """``batch``: of a bound socket. It is the listener's from here on."""
        self.reactor = reactor
        self.counters = counters
        self.pool = pool
        self.settings = settings
        self._relays: dict[QuicRelay, None] = {}  # as many as the census lets in
        self.endpoint = QuicEndpoint(
            reactor, timers, batch, census, counters, endpoint_settings, self._admit, sharing
        )

    def _admit(self, connection: QuicConnection, ip: str, address: Address) -> RelaySide:
        relay = QuicRelay(self, self.settings, ip)
        self._relays[relay] = None
        return relay.meet(connection)

    def forget(self, relay: QuicRelay) -> None:
        self._relays.pop(relay, None)

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to relay."""
        self.endpoint.start()

    def stop(self, *, hands_over: bool = False) -> None:
        """Take what is in the queue already, then no new connection. The socket stays open while there are
        connections: they go on in both directions. Idempotent."""
        self.endpoint.stop(hands_over=hands_over)

    def drain(self, jitter_s: float = 0.0) -> None:
        """No new connections, whatever the jitter. A relay knows no message to wait for: those that exist go
        on until the drain's time is up."""
        self.endpoint.is_draining = True

    def go_away(self) -> int:
        """End what is left now; gives how many connections that were."""
        left = list(self._relays)
        for relay in left:
            relay.go_away()
        return len(left)

    def sweep(self, now: float) -> None:
        self.endpoint.sweep(now)
        for relay in list(self._relays):
            try:
                relay.sweep(now)
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor
                self.reactor.fault(relay.sweep)

    @property
    def open(self) -> int:
        return self.endpoint.open

    def told(self) -> Iterable[Told]:
        return self._relays

    def connections(self) -> list[QuicConnection]:
        """Clients' connections, open ones and those that are about to be."""
        return self.endpoint.connections()

    def __repr__(self) -> str:
        return f"<QuicRelayListener {self.counters.name} relays={len(self._relays)}>"
