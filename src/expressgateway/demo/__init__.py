"""``expressgateway demo``: a gateway with backends of its own, and commands to try it."""
