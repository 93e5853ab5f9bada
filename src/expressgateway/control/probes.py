"""Active probes: one question to one backend, and the answer as a result that can always be had.

A *probe* is made for one target by `probe_for`, which knows what each type of probe is in the protocol that
the backend speaks; `run` asks it once. Whatever the backend does, or does not do, becomes a result with a
short phrase: refusals, silence, garbage, a certificate that nobody signed. Only a want of something on this
machine gives no result at all, for it says nothing about the backend.

Nothing here remembers an earlier probe: schedules and verdicts are made elsewhere.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from expressgateway.control.probe_grpc import Grpc3Probe, GrpcProbe
from expressgateway.control.probe_h3 import QuicProbe
from expressgateway.control.probe_http import Http2Probe, Http3Probe, HttpProbe
from expressgateway.control.probe_wire import (
    LOCAL_FAULTS,
    ProbeError,
    ProbeTls,
    Target,
    connect,
    opened,
    phrase,
    preamble,
)
from expressgateway.net.tls import TlsConfigError
from expressgateway.observe.logs import Limited
from expressgateway.upstream.backend import BackendSettings, SocketAddress, TlsSettings
from expressgateway.upstream.health_backend import HealthSettings

log = logging.getLogger(__name__)
limited: Final = Limited(log)

MAX_DETAIL: Final = 200  # characters of a result's phrase: some of it is the backend's


class Probe(Protocol):
    async def run(self) -> str:
        """Ask once. What the backend answered, as a phrase; raises `ProbeError`, `OSError` or
        `TlsConfigError` if it does not pass. Has no limit of time."""


class Result(NamedTuple):
    ok: bool
    detail: str


class TcpProbe:
    """The backend accepts a connection."""

    __slots__ = ("_target",)

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        self._target = target

    async def run(self) -> str:
        sock = await connect(self._target)
        with sock:
            if header := preamble(self._target):
                await asyncio.get_running_loop().sock_sendall(sock, header)
        return "connected"


class TlsProbe:
    """The backend completes a handshake, with a certificate that the data path would accept.

    A clear-text backend may be one whose clients speak TLS through the gateway: then nobody said which
    certificate is right, and any is.
    """

    __slots__ = ("_target", "_tls")

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        self._target = target
        host = target.settings.host
        tls = target.settings.tls or TlsSettings(
            verify_peer=False, hostname=host, ca_pem=None, cert_pem=None, key_pem=None
        )
        self._tls = ProbeTls(host, tls)

    async def run(self) -> str:
        async with opened(self._target, self._tls):
            return "handshake done"


_Make = Callable[[Target, HealthSettings], Probe]

# (type of the probe, protocol of the backend)
_PROBES: Final[dict[tuple[str, str], _Make]] = {
    ("tcp", "tcp"): TcpProbe,
    ("tcp", "h1"): TcpProbe,
    ("tcp", "h2"): TcpProbe,
    ("tls", "tcp"): TlsProbe,
    ("tls", "h1"): TlsProbe,
    ("tls", "h2"): TlsProbe,
    ("http", "tcp"): HttpProbe,
    ("http", "h1"): HttpProbe,
    ("http", "h2"): Http2Probe,
    ("grpc", "tcp"): GrpcProbe,
    ("grpc", "h1"): GrpcProbe,
    ("grpc", "h2"): GrpcProbe,
    # There is no connection of TCP: it accepts what completes a handshake.
    ("tcp", "h3"): QuicProbe,
    ("tls", "h3"): QuicProbe,
    ("http", "h3"): Http3Probe,
    ("grpc", "h3"): Grpc3Probe,
}


def probe_for(settings: HealthSettings, backend: BackendSettings, address: SocketAddress) -> Probe:
    """The probe of one backend. Raises `LookupError` where the type means nothing in its protocol."""
    make = _PROBES.get((settings.type, backend.protocol))
    if make is None:
        raise LookupError(f"there is no {settings.type} probe for a backend that speaks {backend.protocol}")
    return make(Target(backend, address), settings)


async def run(probe: Probe, timeout_s: float) -> Result | None:
    """Ask once, for `timeout_s` at most. None: there is no telling. Never raises, unless it is cancelled."""
    try:
        async with asyncio.timeout(timeout_s):
            return Result(True, short(await probe.run()))
    except ProbeError as error:
        cause = str(error)
    except TlsConfigError as error:
        cause = f"its TLS settings cannot be used: {error}"
    except TimeoutError as error:
        # The kernel's own, which has a number, may come before ours.
        cause = phrase(error) if error.errno else f"timed out after {timeout_s * 1000:.0f} ms"
    except OSError as error:
        if error.errno in LOCAL_FAULTS:
            limited.warning("probe", phrase(error), f"a probe could not be made: {phrase(error)}")
            return None
        cause = phrase(error)
    except Exception as error:  # noqa: BLE001 - the one safety net: some backend's answer found a gap in us
        limited.warning("probe_defect", type(error).__name__, f"a defect: a probe ended with {error!r}")
        cause = f"the probe failed unexpectedly: {type(error).__name__}"
    return Result(False, short(cause))


def short(text: str) -> str:
    """A phrase, some of which may be a peer's, made fit for a line of a log."""
    printable = "".join(char if char.isprintable() else "?" for char in text[: MAX_DETAIL + 1])
    return printable if len(printable) <= MAX_DETAIL else f"{printable[: MAX_DETAIL - 3]}..."
