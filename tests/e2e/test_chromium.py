"""Chromium through the gateway: pages, uploads, downloads and WebSocket over each HTTP version."""

import hashlib
import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.chromium import CHROMIUM, Browser, Page, chromium
from tests.e2e.harness import Backend, BackendConnection, Gateway, certificate, eventually, need
from tests.ports import free_port

DOWNLOAD: Final = random.Random(5).randbytes(5_000_000)
UPLOAD_BYTES: Final = 2_000_000
DOT: Final = b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>"
PAGE: Final = b"<!doctype html><title>a page</title><img src='/dot.svg'><p id='text'>served</p>"

pytestmark = need(CHROMIUM)


class Site:
    """A gateway with a listener for each version, all before the same two backends."""

    def __init__(self) -> None:
        self.h1 = free_port()
        self.h2 = free_port()
        self.h3 = free_port()
        self.upgrading = free_port()
        """HTTPS whose answers say that HTTP/3 is at ``h3``."""
        self.files: CertificateFiles
        self.gateway: Gateway
        self.uploads: list[str] = []
        self.closed: list[tuple[int | None, str | None]] = []

    def requests(self, listener: str, version: str) -> float:
        return self.gateway.metric("http_requests_total", listener=listener, version=version)


def answer(connection: BackendConnection, body: bytes, kind: bytes = b"text/html") -> None:
    connection.send(
        b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncache-control: no-store\r\ncontent-length: %d\r\n\r\n"
        % (kind, len(body))
    )
    connection.send(body)


def serve_pages(connection: BackendConnection, site: Site) -> None:
    while True:
        head, body = connection.request()
        path = head.split(b" ", 2)[1]
        if path == b"/download":
            answer(connection, DOWNLOAD, b"application/octet-stream")
        elif path == b"/upload":
            site.uploads.append(hashlib.sha256(body).hexdigest())
            answer(connection, str(len(body)).encode())
        elif path == b"/dot.svg":
            answer(connection, DOT, b"image/svg+xml")
        else:
            answer(connection, PAGE)


def serve_sockets(connection: ServerConnection, site: Site) -> None:
    assert connection.request is not None
    try:
        for message in connection:
            if message == "close, please":
                connection.close(4005, "as you wish")
            connection.send(message)
    except ConnectionClosed:
        pass
    finally:
        site.closed.append((connection.close_code, connection.close_reason))


def configuration(site: Site, pages: str, sockets: str) -> str:
    files = site.files
    tls = f'tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}'
    quic = (
        f'quic = {{ cert_path = "{files.certificate}", key_path = "{files.key}", '
        f'retry_secret_path = "{files.key.parent / "retry.secret"}" }}'
    )
    listeners = (
        ("h1", site.h1, "h1", "", ""),
        ("h2", site.h2, "h1s", tls, "h2_extended_connect = true"),
        ("h3", site.h3, "quic", quic, "h3_extended_connect = true"),
        ("upgrading", site.upgrading, "h1s", f"{tls}\nalt_svc = {{ h3_port = {site.h3} }}", ""),
    )
    text = "".join(
        f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "{protocol}"
pool = "pages"
{security}
[listeners.websocket]
{offer}
[[listeners.routes]]
name = "sockets"
match.path = "/socket"
pool = "sockets"
"""
        for name, port, protocol, security, offer in listeners
    )
    pools = "".join(
        f"\n[[pools]]\nname = '{name}'\nbackends = [{{ address = '{address}' }}]\n"
        for name, address in (("pages", pages), ("sockets", sockets))
    )
    return text + pools


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    it = Site()
    it.files = certificate(directory)
    port = free_port()
    with (
        Backend(lambda connection: serve_pages(connection, it)) as pages,
        serve(
            lambda connection: serve_sockets(connection, it), "127.0.0.1", port, ping_interval=None
        ) as sockets,
    ):
        thread = threading.Thread(target=sockets.serve_forever)
        thread.start()
        try:
            with Gateway(directory, configuration(it, pages.address, f"127.0.0.1:{port}")) as it.gateway:
                yield it
        finally:
            sockets.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def browser(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(
        tmp_path_factory.mktemp("browser"),
        site.files.certificate,
        "--enable-quic",
        f"--origin-to-force-quic-on=localhost:{site.h3}",
        "--enable-features=EnableWebsocketsOverHttp3",
    ) as it:
        yield it


def opened(site: Site, browser: Browser, version: str) -> Page:
    page = browser.page()
    scheme = "http" if version == "h1" else "https"
    page.open(f"{scheme}://localhost:{getattr(site, version)}/")
    return page


# What the browser calls each, and how the gateway counts it.
VERSIONS: Final = {"h1": ("http/1.1", "1.1"), "h2": ("h2", "2"), "h3": ("h3", "3")}
every = pytest.mark.parametrize("version", VERSIONS)

PROTOCOLS: Final = "performance.getEntries().filter(e => e.nextHopProtocol).map(e => e.nextHopProtocol)"


@every
def test_a_page_and_what_is_on_it(site: Site, browser: Browser, version: str) -> None:
    page = opened(site, browser, version)
    assert page.run("document.getElementById('text').textContent") == "served"
    assert page.run("fetch('/other').then(r => r.text())") == PAGE.decode()
    protocols = page.run(PROTOCOLS)
    assert len(protocols) >= 3
    assert set(protocols) == {VERSIONS[version][0]}


DIGEST: Final = """
    async function digest(bytes) {
        const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
        return Array.from(hash, b => b.toString(16).padStart(2, '0')).join('');
    }
"""


@every
def test_a_download(site: Site, browser: Browser, version: str) -> None:
    page = opened(site, browser, version)
    size, hashed = page.run(
        DIGEST
        + "fetch('/download').then(r => r.arrayBuffer()).then(async b => [b.byteLength, await digest(b)])"
    )
    assert (size, hashed) == (len(DOWNLOAD), hashlib.sha256(DOWNLOAD).hexdigest())


@every
def test_an_upload(site: Site, browser: Browser, version: str) -> None:
    page = opened(site, browser, version)
    size, hashed = page.run(
        DIGEST
        + f"""
        const bytes = new Uint8Array({UPLOAD_BYTES});
        for (let at = 0; at < bytes.length; at += 65536)
            crypto.getRandomValues(bytes.subarray(at, at + 65536));
        fetch('/upload', {{ method: 'POST', body: bytes }})
            .then(r => r.text()).then(async size => [size, await digest(bytes)])
        """
    )
    assert size == str(UPLOAD_BYTES)
    assert hashed in site.uploads


@every
def test_many_at_once(site: Site, browser: Browser, version: str) -> None:
    page = opened(site, browser, version)
    before = site.requests(version, VERSIONS[version][1])
    texts = page.run("Promise.all(Array.from({length: 60}, (_, n) => fetch('/n' + n).then(r => r.text())))")
    assert texts == [PAGE.decode()] * 60
    assert site.requests(version, VERSIONS[version][1]) >= before + 60


SOCKET: Final = """
    new Promise((resolve, reject) => {
        const seen = [];
        const socket = new WebSocket(ADDRESS);
        socket.binaryType = 'arraybuffer';
        const blob = new Uint8Array(300000).map((_, n) => n * 7 % 251);
        const send = [() => socket.send('grüße'), () => socket.send(blob), () => ENDING];
        socket.onopen = () => send.shift()();
        socket.onmessage = event => {
            if (typeof event.data === 'string') {
                seen.push(event.data);
            } else {
                const back = new Uint8Array(event.data);
                seen.push(back.length === blob.length && back.every((b, n) => b === blob[n]));
            }
            send.shift()();
        };
        socket.onclose = event => resolve([seen, event.code, event.reason, event.wasClean]);
    })
"""


def session(site: Site, browser: Browser, version: str, ending: str) -> list[Any]:
    """What a page saw of a WebSocket: echoes, and how it ended."""
    page = opened(site, browser, version)
    assert page.run("fetch('/warm').then(r => r.status)") == 200  # it asks on a connection that is there
    scheme = "ws" if version == "h1" else "wss"
    address = f"{scheme}://localhost:{getattr(site, version)}/socket"
    counted = VERSIONS[version][1]
    before = site.gateway.metric("http_requests_total", route="sockets", version=counted)
    seen: list[Any] = page.run(SOCKET.replace("ADDRESS", repr(address)).replace("ENDING", ending))

    def is_counted() -> bool:
        return site.gateway.metric("http_requests_total", route="sockets", version=counted) > before

    eventually(is_counted, f"a session over HTTP/{counted}")
    return seen


@every
def test_a_socket_that_the_page_closes(site: Site, browser: Browser, version: str) -> None:
    before = len(site.closed)
    seen = session(site, browser, version, "socket.close(4002, 'bye')")
    assert seen == [["grüße", True], 4002, "bye", True]
    eventually(lambda: (4002, "bye") in site.closed[before:], "the server got the code")


@every
def test_a_socket_that_the_server_closes(site: Site, browser: Browser, version: str) -> None:
    before = len(site.closed)
    seen = session(site, browser, version, "socket.send('close, please')")
    assert seen == [["grüße", True], 4005, "as you wish", True]
    eventually(lambda: (4005, "as you wish") in site.closed[before:], "the server saw its own code come back")


def test_it_goes_over_to_what_alt_svc_says(site: Site, tmp_path: Path) -> None:
    """Nothing is forced for this origin: the first answer comes over HTTP/2, later ones over HTTP/3."""
    # It believes Alt-Svc only of hosts with a certificate of a public authority, and of those named here.
    elsewhere = f"--origin-to-force-quic-on=localhost:{free_port()}"
    with chromium(tmp_path / "browser", site.files.certificate, "--enable-quic", elsewhere) as browser:
        page = browser.page()
        page.open(f"https://localhost:{site.upgrading}/")
        before = site.requests("h3", "3")
        page.run("performance.setResourceTimingBufferSize(100000)")
        numbers = itertools.count()

        def is_over_h3() -> bool:
            path = f"/again{next(numbers)}"
            assert page.run(f"fetch('{path}').then(r => r.text())") == PAGE.decode()
            protocol = page.run(
                f"performance.getEntriesByName(location.origin + '{path}').map(e => e.nextHopProtocol)"
            )
            assert protocol in ([], ["h2"], ["h3"])
            return bool(protocol == ["h3"])

        eventually(is_over_h3, "a request over HTTP/3")
        assert page.run(PROTOCOLS)[0] == "h2"
        assert site.requests("h3", "3") > before
