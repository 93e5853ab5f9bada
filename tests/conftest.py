"""Hypothesis profiles: the suite's own, and ``fuzz`` for ``make fuzz``, a hundred times as long."""

import os
import signal
import sys

import pytest
from hypothesis import settings

LONGER = 100

# Container images like to set this. Hundreds of gateways start here, and each process of each would compile
# every module again, which takes as long as all the rest of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Shells ignore both for what runs in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


LONG = (
    "test_selection_conformance.py",
    "test_cells.py",
    "test_cells_load.py",
    "test_distributions.py",
    "test_rolling_live.py",
    "test_h1_fuzz.py",
    "test_selection_keyed.py",
    "test_websocket_streams_limits.py",
    "test_supervisor.py",
    "test_life.py",
)
"""Files that take minutes begin first, so that at the end nobody waits for one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``HYPOTHESIS_PROFILE=fuzz`` every property is tried ``LONGER`` times as often as in the suite."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if os.environ.get("HYPOTHESIS_PROFILE") != "fuzz":
        return
    for item in items:
        function = getattr(item, "obj", None)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None and function is not None:
            inner = getattr(function, "__func__", function)
            inner._hypothesis_internal_use_settings = settings(own, max_examples=own.max_examples * LONGER)
