"""HTTP/3 (RFC 9114) on a QUIC connection that somebody else owns, both roles.

``transport`` is what it needs of that connection; ``frames`` has the numbers, the integers and the faults,
``qpack`` the one door to header compression, ``guards`` the attack counters, ``limits`` what all of it may
cost; ``streams`` is what both roles' streams share, ``core`` the life of streams and the shell's calls,
``connection`` the unidirectional streams; ``server`` and ``client`` are the roles. What a header list may
hold is HTTP/2's (``h2.fields``): RFC 9114 4.2 and 4.3 say the same.
"""
