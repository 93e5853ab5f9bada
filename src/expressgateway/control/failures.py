"""Why the supervisor cannot start or go on, as a sentence for the operator."""

from typing import Final

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h


class StartError(Exception):
    """The gateway cannot start: nothing serves. `str()` is the sentence, with what to do about it."""
