"""The configuration of every program the bench starts, as text. Starts nothing and looks at nothing.

All proxies do the same work: keep-alive to clients without a request budget, a pool of kept connections to
one backend, `X-Forwarded-For` added, no access log, request and response bodies streamed. *Tuned* is the same
with 64 KiB buffers (and splice for TCP in HAProxy), for the bulk cells only.
"""

import json
from pathlib import Path

from bench.world import Ports, Site

TUNED_BUFFER_BYTES = 65536
MAX_CONNECTIONS = 8000
BODY_LIMIT_BYTES = 64 * 1024 * 1024


def _nginx_head(site: Site, directory: Path, workers: int, modules: str = "") -> str:
    return f"""\
{modules}daemon off;
{"user root;" if site.is_root else ""}
worker_processes {workers};
worker_rlimit_nofile {MAX_CONNECTIONS * 2 + 1000};
pid {directory}/nginx.pid;
error_log {directory}/error.log error;
events {{ worker_connections {MAX_CONNECTIONS * 2}; }}
"""


def _nginx_paths(directory: Path) -> str:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "\n".join(f"  {kind}_temp_path {directory}/{kind};" for kind in kinds)


def backend_conf(site: Site, directory: Path) -> str:
    """nginx as the backend: any path answers a few bytes, /10m and /1g are files, /sink reads a whole body.

    nginx answers `return` before it has read the body, so /sink takes it into memory first: it proxies to its
    own second server, without the body, and that needs the complete request.
    """
    return f"""\
{_nginx_head(site, directory, 1)}
http {{
  access_log off;
  sendfile on;
  tcp_nodelay on;
  keepalive_timeout 600s;
  keepalive_requests 1000000000;
  default_type text/plain;
{_nginx_paths(directory)}
  upstream sink {{ server 127.0.0.1:{site.sink_port}; keepalive 64; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{site.backend_port} backlog=4096;
    location / {{ return 200 "hello from the backend, a small body"; }}
    location = /10m {{ root {site.files}; }}
    location = /1g {{ root {site.files}; }}
    location = /sink {{
      client_max_body_size {BODY_LIMIT_BYTES};
      client_body_buffer_size 12m;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_pass http://sink;
    }}
  }}
  server {{
    listen 127.0.0.1:{site.sink_port};
    location / {{ return 200 "taken"; }}
  }}
}}
"""


def nginx_conf(
    site: Site, ports: Ports, directory: Path, *, workers: int, tuned: bool, stream_module: str | None
) -> str:
    """nginx as the proxy; TCP only with its stream module, which Debian packages apart."""
    module = f"load_module {stream_module};\n" if stream_module and ports.tcp else ""
    size = TUNED_BUFFER_BYTES
    buffers = (
        f"proxy_buffer_size {size}; proxy_buffers 16 {size}; proxy_busy_buffers_size {size * 2}; "
        f"client_body_buffer_size {size};"
        if tuned
        else ""
    )
    reuse = " reuseport" if workers > 1 else ""
    stream = f"""
stream {{
  server {{
    listen 127.0.0.1:{ports.tcp} backlog=4096{reuse};
    {f"proxy_buffer_size {size};" if tuned else ""}
    proxy_pass 127.0.0.1:{site.backend_port};
  }}
}}
"""
    return f"""\
{_nginx_head(site, directory, workers, module)}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 600s;
  keepalive_requests 1000000000;
  client_max_body_size {BODY_LIMIT_BYTES};
{_nginx_paths(directory)}
  upstream backend {{
    server 127.0.0.1:{site.backend_port};
    keepalive 256;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{ports.http} backlog=4096{reuse};
    listen 127.0.0.1:{ports.https} ssl backlog=4096{reuse};
    ssl_certificate {site.cert_path};
    ssl_certificate_key {site.key_path};
    ssl_protocols TLSv1.2 TLSv1.3;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
      {buffers}
    }}
  }}
}}
{stream if module else ""}"""


def haproxy_cfg(site: Site, ports: Ports, *, tuned: bool) -> str:
    """HAProxy, one thread. Tuned it splices always: `splice-auto`, which judges, costs it twice as much."""
    splice = "  option splice-request\n  option splice-response\n"
    return f"""\
global
  nbthread 1
  maxconn {MAX_CONNECTIONS}
  no strict-limits
  ssl-default-bind-options ssl-min-ver TLSv1.2
  {f"tune.bufsize {TUNED_BUFFER_BYTES}" if tuned else ""}

defaults
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-keep-alive 600s

frontend web
  mode http
  option forwardfor
  bind 127.0.0.1:{ports.http} backlog 4096
  bind 127.0.0.1:{ports.https} ssl crt {site.pem_path} alpn http/1.1 backlog 4096
  default_backend web

backend web
  mode http
  http-reuse always
  server one 127.0.0.1:{site.backend_port}

listen relay
  mode tcp
{splice if tuned else ""}\
  bind 127.0.0.1:{ports.tcp} backlog 4096
  server one 127.0.0.1:{site.backend_port}
"""


def envoy_json(site: Site, ports: Ports) -> str:
    """Envoy, one worker by `--concurrency 1`. Its buffer limit is 1 MiB as it comes; 64 KiB is worse."""
    v3 = "type.googleapis.com/envoy.extensions"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "backend", "timeout": "0s"}}
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{v3}.filters.http.router.v3.Router"},
    }
    http = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{v3}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "web",
            "codec_type": "HTTP1",
            "use_remote_address": True,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [router],
        },
    }
    relay = {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{v3}.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "relay",
            "cluster": "backend",
        },
    }
    pair = {
        "certificate_chain": {"filename": str(site.cert_path)},
        "private_key": {"filename": str(site.key_path)},
    }
    tls = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{v3}.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {"alpn_protocols": ["http/1.1"], "tls_certificates": [pair]},
        },
    }

    def listener(name: str, port: int | None, network_filter: object, **chain: object) -> dict[str, object]:
        return {
            "name": name,
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
            "tcp_backlog_size": 4096,
            "filter_chains": [{"filters": [network_filter], **chain}],
        }

    endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": site.backend_port}}}
    many = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)
    cluster = {
        "name": "backend",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "backend",
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
        "circuit_breakers": {"thresholds": [many]},
    }
    listeners = [
        listener("http", ports.http, http),
        listener("https", ports.https, http, transport_socket=tls),
        listener("tcp", ports.tcp, relay),
    ]
    return json.dumps({"static_resources": {"listeners": listeners, "clusters": [cluster]}}, indent=1)


def gateway_toml(site: Site, ports: Ports, *, workers: int) -> str:
    """ExpressGateway with its defaults, but for the caps that would end a load from one address."""

    def listener(protocol: str, port: int | None, backend_protocol: str, more: str = "") -> str:
        return f"""
[[listeners]]
address = "127.0.0.1:{port}"
protocol = "{protocol}"
{more}
[[listeners.backends]]
address = "127.0.0.1:{site.backend_port}"
protocol = "{backend_protocol}"
"""

    tls = f'tls = {{ cert_path = "{site.cert_path}", key_path = "{site.key_path}" }}'
    listeners = [
        listener("h1", ports.http, "h1"),
        listener("h1s", ports.https, "h1", tls),
        listener("tcp", ports.tcp, "tcp"),
    ]
    return f"""\
[runtime]
workers = {workers}
per_ip_connection_cap = 100000
max_keepalive_requests = 0
readiness_settle_ms = 0
drain_timeout_ms = 1000
drain_jitter_ms = 0
{"".join(listeners)}"""
