"""``least_connections``: fewest connections in use for the backend's weight; equals at random.

Idle connections that are kept for reuse do not count: they are load for nobody, and a backend that was chosen
once would be shunned for having been.
"""

from operator import attrgetter

from expressgateway.upstream.selection.least import Least


class LeastConnections(Least):
    __slots__ = ()

    count = attrgetter("busy")
