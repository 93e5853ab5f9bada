"""The alert rules and the catalogue, as tests look at them; and promtool."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from expressgateway.observe.counters import FAMILIES, SUPERVISOR_FAMILIES, Family

ROOT: Final = Path(__file__).resolve().parents[2]
RULES: Final = ROOT / "ops" / "prometheus" / "alerts.yaml"
CATALOGUE: Final[dict[str, Family]] = {**FAMILIES, **SUPERVISOR_FAMILIES}

PROMTOOL: Final = shutil.which("promtool")
"""Debian's package `prometheus` has it; with what it depends on that is 320 MB, so it is not asked for."""
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool")

_FUNCTIONS: Final = (
    "sum rate increase histogram_quantile time count max min avg clamp_max clamp_min topk sort changes vector"
)
_WORDS: Final = frozenset((*_FUNCTIONS.split(), "unless", "and", "or", "by", "on", "group_left", "vector"))


class Alert(NamedTuple):
    name: str
    expr: str
    severity: str
    annotations: dict[str, str]


def alerts() -> list[Alert]:
    """In the order of the file."""
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return [
        Alert(rule["alert"], rule["expr"], rule["labels"]["severity"], rule["annotations"])
        for group in groups
        for rule in group["rules"]
    ]


def series_names() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every name in an exposition: its family, and the labels it can have."""
    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, family in CATALOGUE.items():
        match family.kind:
            case "counter":
                names[f"{name}_total"] = name, family.labels
            case "histogram":
                names[f"{name}_bucket"] = name, (*family.labels, "le")
                names[f"{name}_sum"] = names[f"{name}_count"] = name, family.labels
            case _:
                names[name] = name, family.labels
    return names


def selectors(expr: str) -> list[tuple[str, list[str]]]:
    """The series that an expression reads, with the labels it chooses by; grouping left out."""
    bare = re.sub(r"\b(?:by|on|without|ignoring)\s*\([^)]*\)", " ", expr)
    found = []
    for match in re.finditer(r"(?<![\w$.])([a-z_]\w*)\s*(\{[^}]*\})?", re.sub(r'"[^"]*"', '""', bare)):
        name = match[1]
        if name in _WORDS:
            continue
        found.append((name, re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match[2] or "")))
    return found


def grouped_by(expr: str) -> set[str]:
    """Labels that an expression groups or joins by."""
    return {
        label.strip()
        for labels in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expr)
        for label in labels.split(",")
    }


def run_promtool(*arguments: str, stdin: str | None = None) -> str:
    """Its output. Fails the test if promtool is not content."""
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
