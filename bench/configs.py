"""The configuration of every program the bench starts, as text. Starts nothing and looks at nothing.

All proxies do the same work: keep-alive to clients without a request budget, a pool of kept connections to
one backend, `X-Forwarded-For` added, no access log, request and response bodies streamed. *Tuned* is the same
with 64 KiB buffers (and splice for TCP in HAProxy), for the bulk cells only.
"""

import json
from pathlib import Path

from bench.world import Ports, Site

TUNED_BUFFER_BYTES = 65536
MAX_CONNECTIONS = 12_000
BODY_LIMIT_BYTES = 256 * 1024 * 1024


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
    """nginx as the backend: any path answers a few bytes, /10m and its like are files, sinks read a body.

    nginx answers `return` before it has read the body, so a sink takes it into memory first: it proxies to
    its own second server, without the body, and that needs the complete request.
    """

    def sink(path: str, memory: str) -> str:
        return f"""\
    location = {path} {{
      client_max_body_size {BODY_LIMIT_BYTES};
      client_body_buffer_size {memory};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_pass http://sink;
    }}"""

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
    listen 127.0.0.1:{site.h2_backend_port} http2 backlog=4096;
    location / {{ return 200 "hello from the backend, a small body"; }}
    location = /10m {{ root {site.files}; }}
    location = /100m {{ root {site.files}; }}
    location = /1g {{ root {site.files}; }}
{sink("/sink", "12m")}
{sink("/large-sink", "101m")}
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
    tls = f"""\
    ssl_certificate {site.cert_path};
    ssl_certificate_key {site.key_path};
    ssl_protocols TLSv1.2 TLSv1.3;"""
    proxied = """\
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;"""
    held = f"""
  server {{
    listen 127.0.0.1:{ports.held} ssl http2 backlog=4096;
{tls}
    location / {{
      proxy_pass http://127.0.0.1:{site.held_port};
{proxied}
    }}
  }}
"""
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
    listen 127.0.0.1:{ports.https} ssl http2 backlog=4096{reuse};
{tls}
    location / {{
      proxy_pass http://backend;
{proxied}
      {buffers}
    }}
  }}
{held if ports.held else ""}\
}}
{stream if module else ""}"""


def haproxy_cfg(site: Site, ports: Ports, *, tuned: bool) -> str:
    """HAProxy, one thread. Tuned it splices always: `splice-auto`, which judges, costs it twice as much."""
    splice = "  option splice-request\n  option splice-response\n"
    secure = f"ssl crt {site.pem_path} alpn h2,http/1.1 backlog 4096"

    def over_tls(name: str, port: int | None, server: str, more: str = "") -> str:
        """A listener over TLS with a backend of its own."""
        return f"""
listen {name}
  mode http
  option forwardfor
  http-reuse always
{more}
  bind 127.0.0.1:{port} {secure}
  server one 127.0.0.1:{server}
"""

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
  bind 127.0.0.1:{ports.https} {secure}
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
{over_tls("h2", ports.h2, f"{site.h2_backend_port} proto h2") if ports.h2 else ""}\
{over_tls("held", ports.held, str(site.held_port), "  option abortonclose") if ports.held else ""}"""


def envoy_json(site: Site, ports: Ports) -> str:
    """Envoy, one worker by `--concurrency 1`. Its buffer limit is 1 MiB as it comes; 64 KiB is worse."""
    v3 = "type.googleapis.com/envoy.extensions"
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{v3}.filters.http.router.v3.Router"},
    }

    def http(cluster: str, codec: str = "AUTO", **more: object) -> dict[str, object]:
        route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}
        return {
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": f"{v3}.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "web",
                "codec_type": codec,
                "use_remote_address": True,
                "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
                "http_filters": [router],
                **more,
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
            "common_tls_context": {"alpn_protocols": ["h2", "http/1.1"], "tls_certificates": [pair]},
        },
    }

    quic = {
        "name": "envoy.transport_sockets.quic",
        "typed_config": {
            "@type": f"{v3}.transport_sockets.quic.v3.QuicDownstreamTransport",
            "downstream_tls_context": {"common_tls_context": {"tls_certificates": [pair]}},
        },
    }

    def listener(name: str, port: int | None, network_filter: object, **chain: object) -> dict[str, object]:
        return {
            "name": name,
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
            "tcp_backlog_size": 4096,
            "filter_chains": [{"filters": [network_filter], **chain}],
        }

    many = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)

    def cluster(name: str, port: int, **more: object) -> dict[str, object]:
        endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}
        return {
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
            },
            "circuit_breakers": {"thresholds": [many]},
            **more,
        }

    h2_options = {
        f"{v3.removeprefix('type.googleapis.com/')}.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{v3}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    clusters = [cluster("backend", site.backend_port)]
    listeners = [
        listener("http", ports.http, http("backend", "HTTP1")),
        listener("https", ports.https, http("backend"), transport_socket=tls),
        listener("tcp", ports.tcp, relay),
    ]
    if ports.h2:
        clusters.append(cluster("h2", site.h2_backend_port, typed_extension_protocol_options=h2_options))
        listeners.append(listener("h2", ports.h2, http("h2"), transport_socket=tls))
    if ports.held:
        clusters.append(cluster("held", site.held_port))
        listeners.append(listener("held", ports.held, http("held"), transport_socket=tls))
    if ports.h3:
        over_quic = listener(
            "h3", ports.h3, http("backend", "HTTP3", http3_protocol_options={}), transport_socket=quic
        )
        del over_quic["tcp_backlog_size"]
        over_quic["address"] = {
            "socket_address": {"protocol": "UDP", "address": "127.0.0.1", "port_value": ports.h3}
        }
        over_quic["udp_listener_config"] = {
            "quic_options": {},
            "downstream_socket_config": {"prefer_gro": True},
        }
        listeners.append(over_quic)
    return json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}}, indent=1)


def gateway_toml(site: Site, ports: Ports, *, workers: int, directory: Path, more: str = "") -> str:
    """ExpressGateway with its defaults, but for the caps that would end a load from one address or refuse a
    body of 100 MB. ``more``: further tables."""

    def listener(
        protocol: str,
        port: int | None,
        backend_protocol: str,
        more: str = "",
        backend: int = site.backend_port,
    ) -> str:
        return f"""
[[listeners]]
address = "127.0.0.1:{port}"
protocol = "{protocol}"
{more}
[[listeners.backends]]
address = "127.0.0.1:{backend}"
protocol = "{backend_protocol}"
"""

    tls = (
        f'tls = {{ cert_path = "{site.cert_path}", key_path = "{site.key_path}" }}\n'
        f"http = {{ max_request_body_bytes = {BODY_LIMIT_BYTES} }}"
    )
    listeners = [
        listener("h1", ports.http, "h1"),
        listener("h1s", ports.https, "h1", tls),
        listener("tcp", ports.tcp, "tcp"),
    ]
    if ports.h2:
        listeners.append(listener("h1s", ports.h2, "h2", tls, site.h2_backend_port))
    if ports.held:
        listeners.append(listener("h1s", ports.held, "h1", tls, site.held_port))
    if ports.h3:
        secured = (
            f'quic = {{ cert_path = "{site.cert_path}", key_path = "{site.key_path}", '
            f'retry_secret_path = "{directory}/retry-secret" }}\n'
            f"http = {{ max_request_body_bytes = {BODY_LIMIT_BYTES} }}"
        )
        listeners.append(listener("quic", ports.h3, "h1", f'name = "h3"\n{secured}'))
    # Routes by host, expression and prefix; the last one is what the load asks for.
    full = f"""
[[listeners]]
address = "127.0.0.1:{ports.full}"
protocol = "h1"
routes = [
  {{ match = {{ host = "api.example.com" }}, pool = "full" }},
  {{ match = {{ host = "*.example.org", path_prefix = "/x" }}, pool = "full" }},
  {{ match = {{ path_regex = "/users/[0-9]+" }}, pool = "full" }},
  {{ match = {{ path_prefix = "/api" }}, pool = "full" }},
  {{ match = {{ path_prefix = "/" }}, pool = "full" }},
]

[[pools]]
name = "full"
backends = [{{ address = "127.0.0.1:{site.backend_port}" }}]
load_balancing = {{ policy = "least_requests" }}
health = {{ type = "http", interval_ms = 1000 }}
outlier = {{}}
retry = {{ attempts = 2, on = ["connect", "stale", "reset"] }}
"""
    return f"""\
[runtime]
workers = {workers}
per_ip_connection_cap = 100000
max_keepalive_requests = 0
max_requests_per_h3_connection = 0
readiness_settle_ms = 0
drain_timeout_ms = 1000
drain_jitter_ms = 0
{"".join(listeners)}{full}{more}"""
