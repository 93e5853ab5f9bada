"""Fixtures of many modules."""

from collections.abc import Iterator

import pytest

from tests.e2e.harness import House


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house")) as house:
        yield house
