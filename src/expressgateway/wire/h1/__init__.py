"""HTTP/1.0 and HTTP/1.1 (RFC 9112): reading and writing messages on a connection.

``fields`` reads header sections, ``start`` reads and writes start lines, ``body`` reads bodies, ``server``
and ``client`` are the two roles. Reading is stricter than the RFC allows wherever two implementations are
known to disagree; what is written never contains a framing field that a peer sent.
"""
