"""Sans-IO codecs: bytes in, calls out, bytes out.

Nothing here knows a socket, a clock, an event loop or TLS. A codec is given bytes, calls a sink, and
appends what must be sent to a list that its shell (in ``net/``) pulls and flushes once per read event.
"""
