"""What a worker's backends are reached by: a dialler for each way, with every TLS setting that they need."""

from typing import Self

from expressgateway.net.dial import Dialler
from expressgateway.net.h1_back import H1Connections
from expressgateway.net.h2_back import H2Connections
from expressgateway.net.h3_back import GRANTS, H3Connections
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.timers import Timers
from expressgateway.net.reactor import Reactor
from expressgateway.net.tls import TlsConfigError
from expressgateway.upstream.backend import Backend
from expressgateway.worker.build import Plan
from expressgateway.worker.build_pools import SnapshotError

_CONNECT_S = 5.0  # until there is a configuration


class Diallers:
    """Connections take their settings from here when they are made, so a reload swaps those in place."""

    __slots__ = ("_reactor", "_timers", "h1", "h2", "h3", "l4")

    def __init__(self, reactor: Reactor, timers: Timers, connect_s: float = _CONNECT_S) -> None:
        self._reactor = reactor
        self._timers = timers
        self.h1 = Dialler(reactor, connect_s, ("http/1.1",))
        self.h2 = Dialler(reactor, connect_s, ("h2",))
        self.l4 = Dialler(reactor, connect_s, (), is_framed=False)
        self.h3 = QuicDialler(reactor, timers, connect_s, ("h3",), GRANTS)

    def compiled(self, plan: Plan) -> Self:
        """Others, with what the backends of a plan need; what is known already is taken over. Raises
        ``SnapshotError``."""
        made = type(self)(self._reactor, self._timers, plan.config.runtime.connect_timeout_ms / 1000)
        for pool in plan.pools.values():
            for backend in pool.backends:
                if backend.tls is None or backend.protocol == "quic":
                    continue  # in clear text; or Mode B's, whose ALPN is its listener's
                try:
                    if backend.protocol == "h3":
                        made.h3.adopt(backend, self.h3)
                    elif backend.protocol == "h2":
                        made.h2.adopt(backend.tls, self.h2)
                    elif backend.protocol == "h1":
                        made.h1.adopt(backend.tls, self.h1)
                    else:
                        made.l4.adopt(backend.tls, self.l4)
                except (TlsConfigError, ValueError) as error:
                    raise SnapshotError(f"pool {pool.name}, backend {backend.id}: {error}") from error
        return made

    def take_over(self, other: Self) -> None:
        self.h1.take_over(other.h1)
        self.h2.take_over(other.h2)
        self.h3.take_over(other.h3)
        self.l4.take_over(other.l4)

    def attach(self, backend: Backend) -> None:
        """Give a new backend its connections; one of layer 4 is dialled for each of its own."""
        match backend.settings.protocol:
            case "h1":
                backend.connections = H1Connections(backend, self._reactor, self.h1)
            case "h2":
                backend.connections = H2Connections(backend, self._reactor, self.h2)
            case "h3":
                backend.connections = H3Connections(backend, self._reactor, self.h3)
