"""The commands the demo prints, in one list: what is shown is what is tested."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from expressgateway.demo.backends import BACKEND_NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from expressgateway.demo.ports import Ports

__all__ = ["Command", "demo_commands"]

HOST: Final = "127.0.0.1"

WEBSOCKET_ONE_LINER: Final = """\
python3 -c '
import socket
s = socket.create_connection(("{host}", {ports.http}))
s.sendall(b"GET /ws HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n"
          b"Sec-WebSocket-Version: 13\\r\\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n")
f = s.makefile("rb")
print(f.readline().decode(), *iter(f.readline, b"\\r\\n"), sep="")
s.sendall(b"\\x81\\x85\\0\\0\\0\\0hello")  # text, masked with zeros
print(f.read(7)[2:])
'"""


class Command(NamedTuple):
    """Something to paste into a shell."""

    title: str
    """One line: what it does and what to look at."""

    command: str
    """For bash; may span lines."""

    shows: str
    """A text that its output contains, if all is well."""


def demo_commands(ports: Ports, pid: int, config: Path, certificate: Path) -> list[Command]:
    """What to paste, in the order to try it. `pid` is the supervisor's."""
    http = f"http://{HOST}:{ports.http}"
    https = f"https://localhost:{ports.https}"
    trust = f"--cacert {certificate}"
    first, second = BACKEND_NAMES
    weigh = f"sed -i '/# backend {first}$/s/weight = [0-9]*/weight = %d/' {config}"
    four = f"for i in 1 2 3 4; do curl -s {http}/ | head -n 1; done"
    return [
        Command("Ask over HTTP: what the backend saw", f"curl -i {http}/", "This is backend"),
        Command("Over HTTPS, trusting the demo's certificate", f"curl {trust} {https}/", "This is backend"),
        Command(
            "Over HTTP/3 (a browser would go there by itself, told by Alt-Svc)",
            f"{sys.executable} -m expressgateway.demo.http3 https://localhost:{ports.h3}/ {certificate}",
            "HTTP/3 200",
        ),
        Command("Several times: the backends take turns", four, f"This is backend {second}"),
        Command(
            "Upload 10 MB, and count what comes back",
            f"head -c 10000000 /dev/zero | curl -s -T - {http}/echo | wc -c",
            "10000000",
        ),
        Command(
            "A stream: lines come as they are made",
            f"curl -sN '{http}/stream?n=5'",
            "line 5 of 5 from backend",
        ),
        Command("A slow answer", f"curl -s '{http}/slow?s=2'", "took 2 seconds"),
        Command(
            "WebSocket: a message there and back",
            WEBSOCKET_ONE_LINER.format(host=HOST, ports=ports),
            "b'hello'",
        ),
        Command(
            "TCP, echoed",
            f"bash -c 'exec 3<>/dev/tcp/{HOST}/{ports.tcp}; echo hello tcp >&3; head -n 1 <&3'",
            "hello tcp",
        ),
        Command(
            "TLS, ended by the gateway; the backend gets plain TCP",
            f"(echo hello tls; sleep 1) | openssl s_client -quiet -no_ign_eof -verify_return_error"
            f" -CAfile {certificate} -servername localhost"
            f" -connect {HOST}:{ports.tls} 2>/dev/null",
            "hello tls",
        ),
        Command(
            "UDP, echoed",
            "python3 -c 'import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(5);"
            f' s.sendto(b"hello udp", ("{HOST}", {ports.udp})); print(s.recv(2048))\'',
            "hello udp",
        ),
        Command(
            "Is it ready, and what has it counted?",
            f"curl -s http://{HOST}:{ports.admin}/readyz;"
            f" curl -s http://{HOST}:{ports.admin}/metrics | grep ^http_requests_total",
            "http_requests_total",
        ),
        Command(
            "Kill a worker: the next request is served all the same",
            f"read -r worker others < /proc/{pid}/task/{pid}/children; kill -9 $worker;"
            f" curl -s --retry 3 {http}/ | head -n 1",
            "This is backend",
        ),
        Command(
            f"Reload: take backend {first} out (weight 0); all answers come from {second}",
            f"{weigh % 0}; kill -HUP {pid}; sleep 1; {four}",
            f"This is backend {second}",
        ),
        Command(
            f"Reload: put backend {first} back",
            f"{weigh % 1}; kill -HUP {pid}; sleep 1; {four}",
            f"This is backend {first}",
        ),
    ]
