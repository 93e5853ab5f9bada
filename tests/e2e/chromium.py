"""Chromium without a window, driven by its DevTools protocol: the client that most people use.

A browser is a process of its own with an empty profile, which goes with it. It speaks to nobody but loopback:
no proxy, no updates, and no name but ``localhost`` resolves.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from websockets.sync.client import ClientConnection, connect

from tests.e2e.harness import PATIENCE_S, eventually, program

CHROMIUM: Final = "chromium-headless-shell"

_FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root with one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    # QUIC is tried at one address only, and "localhost" has two.
    "--host-resolver-rules=MAP localhost 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)


def key_hash(certificate: Path) -> str:
    """What ``--ignore-certificate-errors-spki-list`` calls a certificate; QUIC asks for it by name."""
    one = x509.load_pem_x509_certificate(certificate.read_bytes())
    spki = one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(spki).digest()).decode("ascii")


class Page:
    """One tab. What runs in it is JavaScript; what it gives back is what JSON can say."""

    def __init__(self, browser: "Browser", session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def close(self) -> None:
        """The tab is gone, and its connections with it."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def open(self, url: str) -> None:
        """Go there, and wait until it was loaded."""
        self._browser.call("Page.enable", session=self._session)
        answer = self._browser.call("Page.navigate", session=self._session, url=url)
        assert "errorText" not in answer, (url, answer)
        loaded = "document.readyState === 'complete' && location.href !== 'about:blank'"
        eventually(lambda: self.run(loaded), f"{url} is loaded")

    def watch(self) -> None:
        """Have what the page complains about noted from now on, for `complaints`."""
        for domain in ("Runtime", "Log"):
            self._browser.call(f"{domain}.enable", session=self._session)

    def complaints(self) -> list[str]:
        """Errors and warnings on the console so far: of scripts, of the network, of the page's policy."""
        self.run("0")  # they come before its answer
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            said = event["params"]
            entry = said.get("entry", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(said["exceptionDetails"]))
            elif said.get("type") in ("error", "warning", "assert"):
                found.append(json.dumps(said["args"]))
            elif entry.get("level") in ("error", "warning"):
                found.append(f"{entry['text']} {entry.get('url', '')}")
        return found

    def resize(self, width: int, height: int = 900) -> None:
        """Of what the page is shown in, in CSS pixels."""
        self._browser.call(
            "Emulation.setDeviceMetricsOverride",
            session=self._session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """A command of the protocol about this tab."""
        return self._browser.call(method, session=self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression; of a promise, what it comes to."""
        answer = self._browser.call(
            "Runtime.evaluate",
            session=self._session,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")


class Browser:
    """The process, and a connection to it."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)
        """What it told by itself, the newest."""

    def call(self, method: str, *, session: str = "", **parameters: object) -> dict[str, Any]:
        """A command of the protocol and its answer; events on the way are kept in `events`."""
        self._number += 1
        command: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        self._connection.send(json.dumps(command))
        while True:
            answer: dict[str, Any] = json.loads(self._connection.recv(2 * PATIENCE_S))
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def page(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, target)


@contextlib.contextmanager
def chromium(directory: Path, certificate: Path | None, *flags: str) -> Iterator[Browser]:
    """A browser that takes this certificate for good, if one is given. ``directory`` is for its profile and
    what it says."""
    trusted = (
        [] if certificate is None else [f"--ignore-certificate-errors-spki-list={key_hash(certificate)}"]
    )
    log = directory / "chromium.log"
    profile = directory / "profile"
    profile.mkdir(parents=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                program(CHROMIUM),
                *_FLAGS,
                f"--user-data-dir={profile}",
                *trusted,
                *flags,
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            process_group=0,
        )
    try:
        address = ""

        def is_up() -> bool:
            nonlocal address
            said = log.read_text(errors="replace")
            assert process.poll() is None, said
            match = re.search(r"DevTools listening on (ws://\S+)", said)
            address = match[1] if match else ""
            return match is not None

        eventually(is_up, "the browser listens", 60.0)
        with connect(address, max_size=None, proxy=None, open_timeout=PATIENCE_S) as connection:
            browser = Browser(connection)
            yield browser
            browser.call("Browser.close")
            process.wait(PATIENCE_S)
    finally:
        if process.poll() is None:
            # Debian's program is a script that waits for the browser, and would leave it behind.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
