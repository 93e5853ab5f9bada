"""The dashboard in a browser: numbers that move, causes, the token, a drain, and no complaint of the page."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.chromium import CHROMIUM, Browser, Page, chromium
from tests.e2e.harness import Backend, Client, Gateway, Steady, eventually, need
from tests.ports import free_port

pytestmark = need(CHROMIUM)

WIDTHS = (1280, 1141, 1140, 800, 600, 390)
TOKEN = "open-sesame"
DASH = "\u2013"
"""Where there is no number."""


class Site:
    """A gateway with two backends that serve, and one that is ejected, for nobody is there."""

    def __init__(self, directory: Path, good: Backend, more: str = "", runtime: str = "") -> None:
        self.port = free_port()
        self.bad = f"127.0.0.1:{free_port()}"
        config = (
            f"{more}\n[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{self.port}'\nprotocol = 'h1'\n"
            "pool = 'shop'\n[[pools]]\nname = 'shop'\nretry = { budget_percent = 100 }\n"
            "outlier = { consecutive_failures = 1, ejection_ms = 300000, panic_threshold_percent = 0 }\n"
            f"[[pools.backends]]\nid = 'good'\naddress = '{good.address}'\n"
            f"[[pools.backends]]\nid = 'spare/<b>'\naddress = '{good.address}'\n"
            f"[[pools.backends]]\nid = 'bad'\naddress = '{self.bad}'\n"
        )
        self.gateway = Gateway(directory, config, runtime=f"max_keepalive_requests = 0\n{runtime}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.admin}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser"), None) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Backend() as good:
        site = Site(tmp_path_factory.mktemp("dashboard"), good)
        with site.gateway, Steady(site.port):
            site.gateway.wait_metric("backend_ejections_total", backend="bad")
            yield site


class Tabs:
    """Opens pages, and closes them at the end: a browser has six connections to one place."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._open: list[Page] = []

    def open(self, url: str) -> Page:
        page = self._browser.page()
        self._open.append(page)
        page.watch()
        page.open(url)
        return page

    def close(self) -> None:
        for page in self._open:
            page.close()


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Tabs]:
    tabs = Tabs(browser)
    yield tabs
    tabs.close()


def text(page: Page, selector: str) -> str:
    found: str = page.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")
    return found


def board(tabs: Tabs, site: Site) -> Page:
    page = tabs.open(site.url)
    eventually(lambda: text(page, "#t-rps") not in ("", DASH), "a rate is shown")
    return page


def cells(page: Page, table: str, row: str) -> dict[str, str]:
    """A row of a table by its name: its texts by label."""
    found: dict[str, str] = page.run(
        f"""(() => {{
            const rows = [...document.querySelectorAll({json.dumps(table + " tbody tr")})];
            const row = rows.find(one => one.querySelector('th').textContent === {json.dumps(row)});
            const cells = row ? [...row.querySelectorAll('td')] : [];
            return Object.fromEntries(cells.map(cell => [cell.dataset.label, cell.textContent]));
        }})()"""
    )
    return found


def overflow(page: Page) -> int:
    width: int = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


def test_numbers_move_under_load(site: Site, tabs: Tabs) -> None:
    page = board(tabs, site)
    assert text(page, "#gateway-state") == "serving"
    assert site.gateway.metric("admin_streams") == 1
    eventually(lambda: float(cells(page, "#listeners", "web")["Requests/s"]) > 0, "requests a second")
    assert cells(page, "#listeners", "web")["Open"] == "1"
    assert cells(page, "#listeners", "web")["p99"].endswith("ms")
    assert cells(page, "#workers", "Worker 0")["State"] == "serving"
    up = text(page, "#gateway-facts")
    eventually(lambda: text(page, "#gateway-facts") != up, "the page goes on")
    points = "document.querySelector('#s-rps path:last-child').getAttribute('d')"
    before: str = page.run(points)
    eventually(lambda: page.run(points) != before and "L" in page.run(points), "the curve grows")
    with Client(site.port) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.response()
        eventually(lambda: text(page, "#t-open") == "2", "another connection is seen")
    assert page.complaints() == []


def test_an_ejected_backend_shows_its_cause(site: Site, tabs: Tabs) -> None:
    page = board(tabs, site)
    row = cells(page, "#pools", "bad")
    assert row["State"] == "ejected"
    assert "the backend refused" in row["Cause"]
    assert row["Ejections"] == "1"
    said = text(page, "#attention-list")
    assert "shop / bad is ejected: " in said
    assert "the backend refused" in said
    assert page.run("document.querySelector('#attention-list').getAttribute('aria-live')") == "polite"
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_page(site: Site, tabs: Tabs, scheme: str) -> None:
    page = board(tabs, site)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for width in WIDTHS:
        page.resize(width)
        assert overflow(page) == 0, width
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    assert (max(json.loads(f"[{colour[4:-1]}]")) < 128) == (scheme == "dark")


def test_a_backend_is_drained_after_a_question(site: Site, tabs: Tabs) -> None:
    page = board(tabs, site)
    assert cells(page, "#pools", "spare/<b>")["State"] in ("healthy", "unknown")
    page.run("document.querySelector('[aria-label=\"Change: spare/<b>\"]').click()")
    assert page.run("document.querySelector('#backend-dialog').open")
    assert "spare/<b> of pool shop" in text(page, "#backend-name")
    for state, shown in (("draining", ("draining",)), ("ready", ("healthy", "unknown"))):
        page.run(f"document.querySelector('#backend-form [value={state}]').click()")
        page.run("document.querySelector('#backend-form .primary').click()")
        eventually(lambda: not page.run("document.querySelector('#backend-dialog').open"), "it is done")
        eventually(lambda shown=shown: cells(page, "#pools", "spare/<b>")["State"] in shown, state)  # type: ignore[misc]  # mypy: a default binds it
        page.run("document.querySelector('[aria-label=\"Change: spare/<b>\"]').click()")
    page.run("document.querySelector('#backend-cancel').click()")
    assert page.complaints() == []


def test_what_is_refused_is_told(site: Site, tabs: Tabs) -> None:
    page = board(tabs, site)
    page.run("askState('shop', { id: 'nobody', state: 'healthy' })")
    page.run("document.querySelector('#backend-form .primary').click()")
    eventually(lambda: "there is no backend" in text(page, "#backend-fault"), "the reason")
    assert page.run("document.querySelector('#backend-dialog').open")


def test_pages_of_others_get_nothing(site: Site, tabs: Tabs) -> None:
    """The policy of the page forbids what a script from elsewhere would do."""
    page = board(tabs, site)
    page.run(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://localhost:1/x'}))"
    )
    eventually(lambda: any("Content Security Policy" in one for one in page.complaints()), "it is refused")


def test_a_tab_that_nobody_sees_holds_no_stream(site: Site, tabs: Tabs) -> None:
    page = board(tabs, site)

    def see(hidden: str) -> None:
        page.run(f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}})")
        page.run("document.dispatchEvent(new Event('visibilitychange'))")

    asked = "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/events')).length"
    see("true")
    eventually(lambda: page.run(asked) == 1, "the stream has ended")
    assert page.run("document.querySelector('#banner').hidden")
    see("false")
    up = text(page, "#gateway-facts")
    eventually(lambda: text(page, "#gateway-facts") != up, "it goes on")


def test_the_token(tabs: Tabs, tmp_path: Path) -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    with Backend() as good:
        site = Site(tmp_path, good, f"[admin]\napi_token_hash = '{digest}'")
        with site.gateway, Steady(site.port):
            page = tabs.open(site.url)
            eventually(lambda: not page.run("document.querySelector('#login').hidden"), "a form")
            assert page.complaints() == []

            def give(token: str) -> None:
                page.run(f"document.querySelector('#token').value = {json.dumps(token)}")
                page.run("document.querySelector('#login-form button').click()")

            give("guess")
            eventually(lambda: text(page, "#login-fault") == "This is not the token.", "a refusal")
            eventually(
                lambda: not page.run("document.querySelector('#login-fault').hidden"), "and it is seen"
            )
            give(TOKEN)
            eventually(lambda: text(page, "#gateway-state") == "serving", "the board")
            assert page.run("document.querySelector('#login').hidden")
            page.run("location.reload()")
            eventually(lambda: text(page, "#gateway-state") == "serving", "the tab has kept it")
            stored: list[Any] = page.run("[Object.keys(localStorage), document.cookie]")
            assert stored == [[], ""]


def test_a_drain_is_shown_and_an_end_is_told(tabs: Tabs, tmp_path: Path) -> None:
    with Backend() as good:
        site = Site(tmp_path, good, runtime="drain_timeout_ms = 5000")
        with site.gateway, Client(site.port) as held:
            held.send(b"GET / HTTP/1.1\r\nHost:")
            page = tabs.open(site.url)
            eventually(lambda: text(page, "#t-open") == "1", "a connection")
            site.gateway.process.terminate()
            eventually(lambda: text(page, "#gateway-state") == "draining", "the drain")
            eventually(lambda: "Still open: web 1" in text(page, "#drain-note"), "what is open")
            assert overflow(page) == 0
            with contextlib.suppress(OSError):
                held.send(b" a\r\n\r\n")
            site.gateway.process.wait(30)
            eventually(lambda: "does not answer" in text(page, "#banner"), "a banner")
            eventually(lambda: "Trying again in" in text(page, "#banner"), "and what is done about it")
