"""A gateway with one listener for HTTP/3 before one backend over HTTP/1.1, and what its tests share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.e2e.h3_raw import RawH3
from tests.e2e.harness import Backend, Gateway, Script, answer_ok, certificate
from tests.ports import free_port


class Case(NamedTuple):
    """What a client does, and the errors of which one has to end the connection."""

    name: str
    do: Callable[[RawH3], object]
    codes: tuple[int, ...] = ()


def name_of(case: Case) -> str:
    return case.name


class QuicSite:
    def __init__(self) -> None:
        self.port = free_port()
        self.gateway: Gateway
        self.backend: Backend

    def client(self, **options: object) -> RawH3:
        return RawH3(self.port, **options)  # type: ignore[arg-type]  # passed on as they are


@contextlib.contextmanager
def quic_site(
    directory: Path,
    *,
    script: Script = answer_ok,
    retry: str = "adaptive",
    workers: int = 1,
    more: str = "",
    quic: str = "",
    runtime: str = "",
) -> Iterator[QuicSite]:
    """``more``: further lines of the listener; ``quic``: of its ``quic`` block."""
    files = certificate(directory)
    site = QuicSite()
    with Backend(script) as site.backend:
        config = f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{site.port}"
protocol = "quic"
backends = [{{ address = "{site.backend.address}" }}]
{more}
[listeners.quic]
cert_path = "{files.certificate}"
key_path = "{files.key}"
retry_secret_path = "{directory / "retry.secret"}"
retry = "{retry}"
{quic}
"""
        with Gateway(directory, config, workers=workers, runtime=runtime) as site.gateway:
            yield site
