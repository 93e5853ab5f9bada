"""How far a supervisor is."""

from enum import Enum


class Phase(Enum):
    """In this order."""

    BOOTING = "booting"
    """Nothing is accepted."""
    SERVING = "serving"
    SETTLING = "settling"
    """Unready, still accepting."""
    DRAINING = "draining"
    STOPPED = "stopped"
