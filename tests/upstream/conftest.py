"""What tests of policies share."""

from collections.abc import Iterator

import pytest

from expressgateway.upstream.selection.least import Least


@pytest.fixture(scope="module")
def ordered() -> Iterator[None]:
    """The least loaded are found by their order however few they are, as they are among many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Least, "MOST_SCANNED", -1)
        yield
