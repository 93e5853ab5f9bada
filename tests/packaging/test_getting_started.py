"""The first document an operator reads: its commands are run in one shell, and show what it promises."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import need
from tests.ports import free_port
from tests.test_repository import ROOT

PAGE = ROOT / "docs" / "getting-started.md"
PORTS = ("8080", "8443", "9090", "3001", "3002")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Kind and text of each block, with free ports in place of the page's."""
    text = PAGE.read_text()
    for port in PORTS:
        text = re.sub(rf"\b{port}\b", str(free_port()), text)
    return BLOCK.findall(text)


@need("curl", "openssl", "bash")
def test_every_command_shows_what_the_page_promises(tmp_path: Path) -> None:
    steps: list[tuple[str, list[str]]] = []
    for kind, text in blocks():
        if kind == "toml":
            (tmp_path / "gateway.toml").write_text(text)
        elif kind == "sh":
            steps.append((text, []))
        elif kind == "text":
            steps[-1][1].extend(text.splitlines())
    script = "".join(f"echo '=== {n}'\n{step}" for n, (step, _) in enumerate(steps))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", "-c", script + "kill $(jobs -p)\n"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "LB_LOG_FORMAT": "text"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            output, _ = shell.communicate(timeout=90)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    shown = re.split(r"^=== \d+\n", output, flags=re.MULTILINE)[1:]
    log = (tmp_path / "gateway.log").read_text()
    assert len(shown) == len(steps), output
    for (step, promised), text in zip(steps, shown, strict=True):
        missing = [line for line in promised if line not in text]
        assert not missing, f"{step}\nshowed\n{text}\nwithout {missing}\n{log}"
