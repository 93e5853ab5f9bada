"""The deny list: networks in the two tries of the kernel, as a set that is changed by its differences."""

from typing import Final

from expressgateway.l4.xdp.layout import Prefix4, Prefix6, octets
from expressgateway.l4.xdp.libbpf import Map
from expressgateway.l4.xdp.wanted import IpNetwork

_YES: Final = b"\1"


class Denied:
    """To be used by one thread. May raise `BpfError`."""

    def __init__(self, denied4: Map, denied6: Map) -> None:
        self._maps = {4: denied4, 6: denied6}
        self._known: dict[int, set[bytes]] = {
            version: set(each.keys()) for version, each in self._maps.items()
        }

    def set(self, networks: frozenset[IpNetwork]) -> None:
        """These and no others. Additions come first: a network that is split is never let in between."""
        wanted: dict[int, set[bytes]] = {4: set(), 6: set()}
        for network in networks:
            wanted[network.version].add(_key(network))
        for version, keys in wanted.items():
            table, known = self._maps[version], self._known[version]
            for key in keys - known:
                table.set(key, _YES)
                known.add(key)
            for key in known - keys:
                table.delete(key)
                known.discard(key)


def _key(network: IpNetwork) -> bytes:
    raw = octets(network.network_address.packed)
    make = Prefix4 if network.version == 4 else Prefix6
    return bytes(make(network.prefixlen, raw))
