"""``least_requests``: fewest exchanges in flight for the backend's weight; equals at random."""

from operator import attrgetter

from expressgateway.upstream.selection.least import Least


class LeastRequests(Least):
    __slots__ = ()

    count = attrgetter("in_flight")
