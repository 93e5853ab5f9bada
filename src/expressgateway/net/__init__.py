"""Sockets, readiness and TLS: the only home of transports. Everything else is told bytes and calls."""
