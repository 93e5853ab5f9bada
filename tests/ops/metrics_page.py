"""docs/metrics.md, from the catalogue and the alert rules.

``python -m tests.ops.metrics_page > docs/metrics.md`` writes it.
"""

import re
import sys
from typing import Final

from expressgateway.config.blocks import Observability
from expressgateway.observe.counters import BUCKETS_S
from tests.ops.rules import CATALOGUE, alerts, selectors, series_names

HEAD: Final = """\
# Metrics

Every metric of `GET /metrics` on the admin listener (`observability.metrics_bind`), in the order they are
written. It speaks the Prometheus text format 0.0.4, and OpenMetrics 1.0 to who asks for it. This page is
generated from the catalogue (`python -m tests.ops.metrics_page > docs/metrics.md`), and a test compares the
two.

Counters and histograms are sums over all workers, those that have died included, and never go backwards;
gauges are sums over the living ones. Many series appear with the first event that they count. All values of
labels come from the configuration or from closed sets, and the product of their numbers is checked against
`observability.max_label_cardinality` ({most}) when a configuration is loaded; each bucket of a histogram
counts. A pool that belongs to one listener has its name.

Histograms have the buckets {buckets} seconds. A listener over QUIC counts its handshakes in
`tls_handshakes_total`, its connections in `connections_total` and `connections_inflight`, and what it drops
in `udp_dropped_total`.

The rules are in `ops/prometheus/alerts.yaml` and explained in the [operations guide](operations.md#alerts); a
dashboard is `ops/grafana/expressgateway.json`.

| name | type | labels | what it counts | alerts |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    used: dict[str, list[str]] = {}
    names = series_names()
    for alert in alerts():
        for read in dict.fromkeys(names[series][0] for series, _ in selectors(alert.expr)):
            used.setdefault(read, []).append(alert.name)
    most = Observability().max_label_cardinality
    lines = [
        HEAD.format(
            most=most, buckets=" ".join(re.sub(r"^0(?=\.)|\.0$", "", str(each)) for each in BUCKETS_S)
        )
    ]
    for name, family in CATALOGUE.items():
        shown = f"{name}_total" if family.kind == "counter" else name
        labels = ", ".join(f"`{label}`" for label in family.labels)
        linked = ", ".join(f"[{alert}](operations.md#{alert.lower()})" for alert in used.get(name, ()))
        lines.append(f"| `{shown}` | {family.kind} | {labels} | {family.help} | {linked} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
