"""docs/failures.md holds: its reasons, statuses and metrics are the code's, and its tests are there."""

import re

from expressgateway.observe.counters import FAMILIES, SUPERVISOR_FAMILIES
from expressgateway.proxy.errors import Reason, proxy_status_of, status_of
from tests.test_repository import ROOT

PAGE = (ROOT / "docs" / "failures.md").read_text()
TESTS = ROOT / "tests"


def rows(text: str) -> list[list[str]]:
    """The cells of each table's rows, without the heads of the tables."""
    found = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in cells] for cells in found if cells[-1].strip(" -") not in ("", "seen by")
    ]


def test_every_reason_has_its_status_and_its_token() -> None:
    table = PAGE.partition("<!-- reasons:begin -->")[2].partition("<!-- reasons:end -->")[0]
    told = [tuple(cell.strip("`") for cell in cells[:3]) for cells in rows(table)]
    assert sorted(told) == sorted(
        (reason.value, str(status_of(reason)), proxy_status_of(reason)) for reason in Reason
    )


def test_every_metric_is_one() -> None:
    families = FAMILIES | SUPERVISOR_FAMILIES
    names = {
        name + ("_total" if family.kind == "counter" else ""): family for name, family in families.items()
    }
    metrics = [cells[3] for cells in rows(PAGE.partition("<!-- reasons:end -->")[2])]
    told = re.findall(r"`(\w+)(?:\{(\w+)=[^}]*\})?`", " ".join(metrics))
    assert told
    assert [name for name, _ in told if name not in names] == []
    assert [(name, label) for name, label in told if label and label not in names[name].labels] == []


def test_every_test_is_there() -> None:
    missing = []
    for *_, cell in rows(PAGE):
        if cell == "tried":
            continue
        path, _, name = cell.strip("`").partition("::")
        file = TESTS / path
        if not file.is_file() or (name and f"def {name}(" not in file.read_text()):
            missing.append(cell)
    assert missing == []
