"""The file a new operator starts from; `config/default.toml` is a copy of it."""

from typing import Final

STARTER: Final = """\
# ExpressGateway: a file to start from. It serves HTTP on 127.0.0.1:8080 from a backend on 127.0.0.1:3000.
#
#   expressgateway check FILE     says what is wrong with it, and binds nothing
#   expressgateway check --print FILE     prints every setting in effect
#   expressgateway FILE           runs it
#
# Lines that begin with "#" show defaults or further possibilities. docs/configuration.md explains every key.

[[listeners]]
name = "web"
address = "127.0.0.1:8080"      # "0.0.0.0:8080" for every IPv4 interface, "[::]:8080" for IPv6
protocol = "h1"                 # h1: HTTP in clear text; h1s: HTTP over TLS; tcp, tls, udp: relays

[[listeners.backends]]
address = "127.0.0.1:3000"
# weight = 1

# A second backend shares the work:
# [[listeners.backends]]
# address = "127.0.0.1:3001"

# [listeners.load_balancing]
# policy = "round_robin"        # or "weighted_round_robin"

# [listeners.http]
# idle_timeout_ms = 75000
# body_timeout_ms = 30000
# max_request_body_bytes = 67108864

# WebSocket is off until this table is there:
# [listeners.websocket]
# idle_timeout_seconds = 60

# HTTP over TLS:
# [[listeners]]
# name = "web-tls"
# address = "127.0.0.1:8443"
# protocol = "h1s"
# backends = [{ address = "127.0.0.1:3000" }]
#
# [listeners.tls]
# cert_path = "certs/server.pem"
# key_path = "certs/server.key" # mode 0600

# [runtime]
# workers = "auto"              # one for each core
# drain_timeout_ms = 10000
# trusted_proxies = ["10.0.0.0/8"]

# Probes and metrics: http://127.0.0.1:9090/readyz and /metrics
[observability]
metrics_bind = "127.0.0.1:9090"
"""
