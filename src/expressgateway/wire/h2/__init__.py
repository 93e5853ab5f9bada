"""HTTP/2 (RFC 9113): frames and connections, both roles.

``frames`` has the numbers and the faults, ``hpack`` the one door to header compression, ``flow`` the windows
that we grant, ``streams`` the state table and what both roles' streams share, ``fields`` what a header list
may hold, ``guards`` the attack counters, ``limits`` what all of it may cost; ``frame_reader`` cuts bytes into
frames, ``connection`` is what both roles share of a connection; ``server`` and ``client`` are the roles.
"""
