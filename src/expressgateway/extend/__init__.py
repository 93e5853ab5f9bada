"""The filter and plugin interface: reserved, nothing is here yet."""
