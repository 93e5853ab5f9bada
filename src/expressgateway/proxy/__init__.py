"""The exchange: one request and its answer between two sides, in the vocabulary of ``wire``.

Nothing here knows a socket or an HTTP version. ``exchange`` is the walk, ``service`` what a listener's
exchanges share, ``forwarding`` the headers, ``errors`` the answers of our own, ``websocket`` the limits of a
tunnel.
"""
