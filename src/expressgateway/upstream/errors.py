"""What can go wrong on the way to a backend, as a closed set."""

from enum import Enum


class Fault(Enum):
    """The cause, in the words of RFC 9209 2.3 where it has one."""

    NO_BACKEND = "no backend in the pool can be used"
    DNS = "the backend's name could not be resolved"
    REFUSED = "connection refused"
    UNREACHABLE = "the backend cannot be reached"
    CONNECT_TIMEOUT = "connecting took too long"
    TLS = "the TLS handshake failed"
    CERTIFICATE = "the backend's certificate was not accepted"
    PROTOCOL = "the backend does not speak the protocol it was configured with"
    DOWN = "every backend of the pool is down"
    SATURATED = "every backend of the pool is at its limit"
    OVER_CAPACITY = "no resources left for another connection"


class UpstreamError(Exception):
    """No connection to a backend could be had. Nothing was sent to it: trying elsewhere is always safe."""

    def __init__(self, fault: Fault, detail: str = "") -> None:
        super().__init__(detail or fault.value)
        self.fault = fault
        self.detail = detail or fault.value
