"""Backends and pools: who is there, who is next, which connection. Knows no HTTP and no listener."""
