"""A round of the supervisor's own samples, as a scrape makes one."""

from collections.abc import Iterable

from expressgateway.control.ledger import Contribution
from expressgateway.observe.counters import Sample


def set_all(contribution: Contribution, samples: Iterable[Sample]) -> None:
    contribution.begin_round()
    for sample in samples:
        contribution.set(sample)
    contribution.end_round()
