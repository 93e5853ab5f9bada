"""What matching a route costs: ``python -m bench.routes``.

Tables of 10 to 10,000 routes of the kinds that are found in practice, and requests that hit and miss. Times
are the best of several runs in this process, in nanoseconds for each request, normalising its path included.
Only the ratios of one run mean something.
"""

import sys
import timeit
from collections.abc import Sequence

from expressgateway.proxy.paths import normalise
from expressgateway.proxy.routing import Match, RouteTable
from expressgateway.wire.head import Fields, RequestHead

SIZES = (10, 100, 1_000, 10_000)
_ROUNDS = 7
_REQUESTS_PER_ROUND = 20_000
_SPREAD = 100  # different requests of one kind: no table is only its warmest corner
_FIELDS: Fields = (
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
    (b"accept", b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    (b"accept-language", b"en-GB,en;q=0.5"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"referer", b"https://shop.example/"),
    (b"cookie", b"session=0123456789abcdef; theme=dark"),
    (b"x-canary", b"yes"),
    (b"sec-fetch-mode", b"navigate"),
)


def entries(size: int) -> list[tuple[Match, int]]:
    """A mix of ``size`` routes, in tens: hosts of their own, and one host that has many."""
    made: list[Match] = []
    for number in range(size // 10):
        own = f"host{number}.example"
        made += [
            Match.of(host=own, path_prefix="/"),
            Match.of(host=own, path_prefix="/static"),
            Match.of(host=own, path="/", method="POST"),
            Match.of(host=f"*.zone{number}.example"),
            Match.of(host="shop.example", path=f"/products/{number}"),
            Match.of(host="shop.example", path_prefix=f"/service{number}/v1"),
            Match.of(host="shop.example", path_prefix=f"/service{number}/v1", method="POST"),
            Match.of(host="shop.example", path_prefix=f"/service{number}", headers={"x-canary": "yes"}),
            Match.of(path_prefix=f"/tenant{number}"),
            Match.of(path_prefix=f"/tenant{number}", query={"version": "2"}),
        ]
    return [(match, number) for number, match in enumerate(made)]


def requests(size: int) -> dict[str, list[RequestHead]]:
    """By what they do: each kind of hit, spread over the table, and misses."""
    last = size // 10 - 1
    spread = sorted({last * step // (_SPREAD - 1) for step in range(_SPREAD)})

    def heads(authority: str, path: str) -> list[RequestHead]:
        return [
            RequestHead(
                b"GET", b"https", (authority % {"n": each}).encode(), (path % {"n": each}).encode(), _FIELDS
            )
            for each in spread
        ]

    return {
        "host": heads("host%(n)d.example:443", "/a/b"),
        "wildcard": heads("a.b.zone%(n)d.example", "/"),
        "exact path": heads("shop.example", "/products/%(n)d"),
        "prefix": heads("shop.example", "/service%(n)d/v1/items/7?page=2"),
        "header": heads("shop.example", "/service%(n)d/v2/items"),
        "query": heads("elsewhere.example", "/tenant%(n)d/x?page=3&version=2"),
        "miss": heads("shop.example", "/nothing/of/the/kind"),
        "miss, any host": heads("elsewhere.example", "/nothing"),
    }


def measure(
    sizes: Sequence[int] = SIZES, rounds: int = _ROUNDS, number: int = _REQUESTS_PER_ROUND
) -> dict[str, list[float]]:
    """Nanoseconds a request, by kind, for each size of the table. Sizes take turns: the machine drifts."""
    tables = [RouteTable(entries(size)) for size in sizes]
    found: dict[str, list[float]] = {}
    for kind in requests(sizes[0]):
        best = [float("inf")] * len(sizes)
        for _ in range(rounds):
            for index, (size, table) in enumerate(zip(sizes, tables, strict=True)):
                best[index] = min(best[index], _ns(table, requests(size)[kind], number))
        found[kind] = best
    return found


def _ns(table: RouteTable[int], heads: Sequence[RequestHead], number: int) -> float:
    """Of one run, a request."""

    def once() -> None:
        for head in heads:
            table.find(head, normalise(head.path))

    runs = max(1, number // len(heads))
    return timeit.timeit(once, number=runs) / (runs * len(heads)) * 1e9


def main() -> None:
    found = measure()
    sys.stdout.write("ns a match".ljust(16) + "".join(f"{size:>9,}" for size in SIZES) + "   last/first\n")
    for kind, times in found.items():
        cells = "".join(f"{each:9.0f}" for each in times)
        sys.stdout.write(f"{kind:16}{cells}{times[-1] / times[0]:13.2f}\n")


if __name__ == "__main__":
    main()
