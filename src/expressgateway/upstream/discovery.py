"""Who is there: from configured addresses and DNS answers to the backends of a pool.

An *endpoint* is one address that a name stands for; an *answer* is all endpoints of a name now. A name is
asked for under a *key*: itself, or ``srv:NAME`` if it is the name of a service (RFC 2782). The supervisor
asks (``names_of``) and tells the workers; ``expand`` runs on both sides and gives both the same ids, so that
counters, health and affinity survive a changed answer.

Nothing here asks, waits or remembers.
"""

import dataclasses
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from expressgateway.upstream.backend import BackendSettings, SocketAddress

MAX_WEIGHT: Final = 65535
"""Of a backend: the largest that the configuration accepts, and that an SRV record can hold."""

_SRV: Final = "srv:"

Found = tuple[BackendSettings, SocketAddress, str]
"""A backend that is there: its settings, its address, and the id it keeps."""


class Endpoint(NamedTuple):
    """One address of a name. It is written to JSON as a list of three."""

    ip: str

    port: int = 0
    """As the SRV record has it; 0 for an address, whose port is configured."""

    weight: int = 0
    """As the SRV record has it; 0 for an address."""


Answers = Mapping[str, tuple[Endpoint, ...]]
"""What is known of each name, by key. Names that have no good answer yet are not in it."""


def is_literal(host: str) -> bool:
    """Whether this is an address itself, which no DNS is asked about."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def socket_address(ip: str, port: int) -> SocketAddress:
    """In the form in which sockets want and give it."""
    return (ip, port, 0, 0) if ":" in ip else (ip, port)


def key_of(settings: BackendSettings) -> str | None:
    """What to ask for to find this backend; ``None`` if its address is a literal."""
    if is_literal(settings.host):
        return None
    return settings.host if settings.port else f"{_SRV}{settings.host}"


def srv_name(key: str) -> str | None:
    """The service's name if this is the key of one, else ``None``."""
    return key.removeprefix(_SRV) if key.startswith(_SRV) else None


def names_of(settings: Iterable[BackendSettings]) -> list[str]:
    """The keys to be resolved for these backends: in their order, each once."""
    return list(dict.fromkeys(key for each in settings if (key := key_of(each)) is not None))


def expand(settings: Sequence[BackendSettings], answers: Answers) -> list[Found]:
    """The backends there are, by what is known now.

    A literal address is one backend; a name is one per address of its answer, and none without an answer.
    Of a service the port is the record's, and the weight is the record's times the configured one (RFC 2782:
    records of weight 0 get "a very small chance", here the share of 1). Ids are unique: the first one wins.
    """
    found: dict[str, Found] = {}
    for each in settings:
        key = key_of(each)
        if key is None:
            found.setdefault(each.id, (each, socket_address(each.host, each.port), each.id))
            continue
        for ip, port, weight in answers.get(key, ()):
            if each.port:
                id_, here, address = f"{each.id}#{ip}", each, socket_address(ip, each.port)
            else:
                id_, address = f"{each.id}#{ip}:{port}", socket_address(ip, port)
                share = min(each.weight * max(weight, 1), MAX_WEIGHT)
                here = each if share == each.weight else dataclasses.replace(each, weight=share)
            found.setdefault(id_, (here, address, id_))
    return list(found.values())


def read_answers(names: Mapping[str, Iterable[Sequence[str | int]]]) -> dict[str, tuple[Endpoint, ...]]:
    """Answers as they came through the control channel, where a tuple is a list."""
    return {
        key: tuple(Endpoint(str(ip), int(port), int(weight)) for ip, port, weight in endpoints)
        for key, endpoints in names.items()
    }
