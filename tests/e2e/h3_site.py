"""A gateway with a ``quic`` listener, for tests of HTTP/3 in front."""

import contextlib
from collections.abc import Iterator

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.talks import Fields
from tests.e2e.talks_h3 import H3End, H3Talk

SWEEP = "[runtime.watchdog]\nsweep_interval_ms = 100\n"


def quic_listener(
    files: CertificateFiles, port: int, *backends: str, name: str = "quic", http: str = "", more: str = ""
) -> str:
    """As TOML. ``backends``: addresses, or inline tables; ``http``: lines of that block; ``more``: lines of
    the listener's.
    """
    tables = ", ".join(each if each.startswith("{ ") else f'{{ address = "{each}" }}' for each in backends)
    secret = files.certificate.with_name("retry.secret")
    return f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "quic"
backends = [{tables}]
{more}
[listeners.quic]
cert_path = "{files.certificate}"
key_path = "{files.key}"
retry_secret_path = "{secret}"
[listeners.http]
{http}
"""


def request(path: str, *more: tuple[str, str], method: str = "GET", authority: str = "localhost") -> Fields:
    return [
        (":method", method),
        (":scheme", "https"),
        (":authority", authority),
        (":path", path),
        *more,
    ]


def ask(end: H3End, path: str, *more: tuple[str, str], method: str = "", body: bytes | None = None) -> H3Talk:
    """A request as a whole, whose response's head has come."""
    talk = end.call(
        request(path, *more, method=method or ("GET" if body is None else "POST")), end=body is None
    )
    if body is not None:
        if body:
            talk.send(body, end=True)
        else:
            talk.finish()
    talk.read_head()
    return talk


@contextlib.contextmanager
def closing(end: H3End) -> Iterator[H3End]:
    try:
        yield end
    finally:
        end.close()
