"""What `dns` gives, for whoever may never have to ask: the library behind it takes a while to load."""

from dataclasses import dataclass, field
from typing import Final

from expressgateway.upstream.discovery import Endpoint

MAX_TTL_S: Final = 300.0


class DnsError(Exception):
    """There is no address to give for a name. The text is a sentence; `is_negative` if DNS itself says so."""

    def __init__(self, sentence: str, *, is_negative: bool = False) -> None:
        super().__init__(sentence)
        self.is_negative = is_negative


@dataclass(frozen=True, slots=True)
class Answer:
    """The addresses of a name. Never empty, without duplicates, IPv4 first and in order: equal sets are
    equal.
    """

    addresses: tuple[str, ...]

    ttl_s: float
    """For how long from now this may be used; math.inf for a literal."""

    stale: bool = False
    """DNS could not be asked about some or all of it: these are the addresses that were good before."""

    left_out: int = 0
    """Addresses beyond the bound, which are not used."""

    failure: str = field(default="", compare=False)
    """Why it is stale: a sentence."""


@dataclass(frozen=True, slots=True)
class SrvAnswer:
    """The endpoints of a service: those of the lowest priority alone. Never empty, no address and port twice,
    in order: equal sets are equal.
    """

    endpoints: tuple[Endpoint, ...]

    ttl_s: float
    """For how long from now this may be used: the shortest of the service's and its hosts'."""

    stale: bool = False
    """As in `Answer`. A host that was never resolved has no endpoint in it."""

    left_out: int = 0
    """Records and addresses beyond the bound, which are not used."""

    failure: str = field(default="", compare=False)
    """Why it is stale: a sentence."""


@dataclass(slots=True)
class DnsCounters:
    """Since the start: questions put to DNS (one for A and AAAA together), those that failed, stale answers
    given.
    """

    queries: int = 0
    failures: int = 0
    stale_served: int = 0
